// "Re-sample only this leaf": adds a Leaf node with the inputs of the tree's sampler, and nodes that show its picture.

import { app } from "../../scripts/app.js";
import { notify } from "./tmpo_dom.js";

const LEAF_OF = { TMPO_TreeSampler: "TMPO_Leaf", TMPO_TreeSamplerAdvanced: "TMPO_LeafAdvanced" };
// Pixels: Nodes 2.0 draws no node narrower than this, whatever its size says.
const NARROWEST = 225;

function inputNode(node, name) {
  const slot = node.inputs?.findIndex((input) => input.name === name) ?? -1;
  return slot < 0 ? null : node.getInputNode(slot);
}

/** Connects an input of a node to what feeds the same input of another node. Whether there is such a thing. */
function sameLink(from, to, name) {
  const source = from.inputs?.findIndex((input) => input.name === name) ?? -1;
  const target = to.inputs?.findIndex((input) => input.name === name) ?? -1;
  const link = source < 0 || target < 0 ? null : from.getInputLink(source);
  if (!link) return false;
  const { graph } = from;
  const origin = graph.getNodeById(link.origin_id);
  if (origin) return Boolean(origin.connect(link.origin_slot, to, target));
  // An input of the subgraph has a slot in place of a node.
  const outer = graph.inputNode?.id === link.origin_id ? graph.inputNode.slots[link.origin_slot] : null;
  return Boolean(outer?.connect(to.inputs[target], to));
}

function fieldOf(node, name) {
  return node?.widgets?.find((widget) => widget.name === name);
}

function set(node, name, value) {
  const widget = fieldOf(node, name);
  if (!widget) return;
  widget.value = value;
  widget.callback?.(value);
}

export function resample(view, leaf) {
  const { node } = view;
  const { graph } = node;
  const sampler = inputNode(node, "tree");
  const type = LEAF_OF[sampler?.comfyClass ?? sampler?.type];
  if (!type) {
    const fix = "Connect Tree View's input tree to Tree Sampler in the same graph, without nodes between them.";
    notify("error", "The sampler of this tree was not found", fix);
    return;
  }
  app.canvas.emitBeforeChange();
  const add = (kind, left, top) => {
    const made = window.LiteGraph.createNode(kind);
    made.pos = [left, top];
    graph.add(made);
    return made;
  };
  const rightOf = (other) => other.pos[0] + Math.max(other.size[0], NARROWEST) + 60;
  // Below everything, where nothing is covered.
  const bottom = Math.max(...graph.nodes.map((other) => other.pos[1] + other.size[1])) + 90;
  const made = add(type, node.pos[0], bottom);
  // The seed below is the tree's. One that comes over a link may be another by now.
  for (const { name } of made.inputs ?? []) if (name !== "seed") sameLink(sampler, made, name);
  for (const widget of sampler.widgets ?? []) set(made, widget.name, widget.value);
  // The seed field may have changed since the tree was sampled.
  const seed = Number(view.tree.seed);
  const field = fieldOf(inputNode(sampler, "noise"), "noise_seed");
  if (type === "TMPO_Leaf") set(made, "seed", seed);
  else if (field && field.value !== seed) {
    const noise = add("RandomNoise", made.pos[0] - NARROWEST - 60, bottom);
    set(noise, "noise_seed", seed);
    set(noise, "control_after_generate", "fixed");
    noise.connect(0, made, made.inputs.findIndex((input) => input.name === "noise"));
  }
  set(made, "control_after_generate", "fixed");
  set(made, "path", leaf.path.join(", "));
  made.title = `Leaf ${leaf.path.join(", ")}`;
  const decode = add("VAEDecode", rightOf(made), bottom);
  made.connect(0, decode, decode.inputs.findIndex((input) => input.name === "samples"));
  const pictures = inputNode(node, "images");
  const decoded = sameLink(node, decode, "vae") || (pictures !== null && sameLink(pictures, decode, "vae"));
  if (!decoded) notify("warn", "Connect a VAE to the new VAE Decode", "Tree View has none, and the node before its images has none.");
  const shown = add("PreviewImage", rightOf(decode), bottom);
  shown.setSize([300, 340]);
  decode.connect(0, shown, 0);
  app.canvas.emitAfterChange();
  app.canvas.selectNode(made);
  app.canvas.centerOnNode(decode);
  graph.setDirtyCanvas(true, true);
}
