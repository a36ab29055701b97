// A Tree View fills in while its tree is sampled: `nodes/live.py` sends the tree's shape once, then pictures of its nodes.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { allNodes, isHere, nodeOf } from "./tmpo_dom.js";

const EVENT = "tmpo.growing";

/** Views whose tree comes from the sampler with this id. */
function viewsOf(id) {
  const sampler = nodeOf(id);
  if (!String(sampler?.comfyClass ?? sampler?.type).startsWith("TMPO_TreeSampler")) return [];
  return allNodes().filter((node) => {
    const slot = node.tmpoTree ? node.inputs.findIndex((input) => input.name === "tree") : -1;
    return slot >= 0 && node.getInputNode(slot) === sampler;
  }).map((node) => node.tmpoTree);
}

function grow(view, { tree, pictures }) {
  if (tree) {
    if (!view.tree?.growing) view.finished = view.tree;
    view.show(tree);
  }
  // A page that was opened in the middle of a run does not know the tree.
  if (!view.tree?.growing) return;
  for (const node of [...view.tree.nodes, ...view.tree.leaves]) {
    const image = pictures[node.id];
    if (!image) continue;
    node.image = image;
    const shown = view.root.querySelector(`[data-node="${node.id}"] img`);
    if (shown) shown.src = image;
  }
}

/** A run that ends without the view, because it failed, was interrupted or ran other nodes alone, leaves the tree before it. */
function restore() {
  for (const node of allNodes()) {
    const view = node.tmpoTree;
    if (!view?.tree?.growing) continue;
    if (view.finished) view.show(view.finished);
    else view.clear();
  }
}

app.registerExtension({
  name: "tmpo.growing",
  setup() {
    api.addEventListener(EVENT, ({ detail }) => {
      if (!isHere(detail)) return;
      for (const view of viewsOf(detail.node)) grow(view, detail);
    });
    for (const event of ["execution_error", "execution_interrupted", "execution_success"]) api.addEventListener(event, restore);
    // A page that was not connected when the run ended hears of it by an empty queue.
    api.addEventListener("status", ({ detail }) => {
      if (detail?.exec_info?.queue_remaining === 0) restore();
    });
  },
});
