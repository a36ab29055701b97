// Tree View's pause: `nodes/pause.py` tells what waits. The view shows that tree and a button that continues with the choice.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { addStyle, allNodes, element, isHere, nodeOf, notify } from "./tmpo_dom.js";

const EVENT = "tmpo.waiting";
const CSS = `
.tmpo-tree-pause { display: flex; gap: 8px; align-items: center; padding: 6px 12px;
  border-bottom: 1px solid var(--border-color); background: color-mix(in srgb, var(--fg-color) 12%, transparent); }
.tmpo-tree-pause span { flex: 1; min-width: 0; }
.tmpo-tree-pause button { flex: none; padding: 4px 12px; border: 0; border-radius: 4px; cursor: pointer; font: inherit;
  background: var(--fg-color); color: var(--comfy-menu-bg); }
.tmpo-tree-pause button:disabled { cursor: default; opacity: 0.5; }
`;

async function goOn(node, id, button) {
  button.disabled = true;
  const choice = String(node.widgets.find((widget) => widget.name === "selected").value);
  const body = JSON.stringify({ id, choice });
  let fault = "";
  try {
    const reply = await api.fetchApi("/tmpo/continue", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    if (!reply.ok) fault = await reply.text();
  } catch (error) {
    fault = error.message;
  }
  if (!fault) return;
  button.disabled = false;
  notify("error", "The run does not continue", fault);
  // The run may be over.
  await ask();
}

function barOf(node, id) {
  const bar = element("div", "tmpo-tree-pause");
  const button = element("button", "", "Continue");
  button.addEventListener("click", () => goOn(node, id, button));
  bar.append(element("span", "", "The run waits. Choose leaves, or none for the best."), button);
  bar.dataset.id = id;
  return bar;
}

function show(waiting) {
  const here = waiting.filter(isHere);
  for (const node of allNodes()) {
    const view = node.tmpoTree;
    if (!view) continue;
    const found = here.find((each) => nodeOf(each.node) === node);
    const id = found?.id;
    if (id === view.pause?.dataset.id) continue;
    view.pause = found ? barOf(node, id) : null;
    if (found) view.show(found.tree);
    else view.draw();
  }
}

/** A page that was loaded again, another workflow, an undo: all create the nodes anew. */
async function ask() {
  const reply = await api.fetchApi("/tmpo/waiting");
  if (reply.ok) show(await reply.json());
}

app.registerExtension({
  name: "tmpo.pause",
  setup() {
    addStyle(CSS);
    api.addEventListener(EVENT, ({ detail }) => {
      show(detail);
      if (detail.some(isHere)) notify("info", "Tree View waits for your choice", "Choose leaves in it and press Continue.");
      else if (detail.some(({ client }) => client === api.clientId)) {
        notify("info", "Tree View waits for your choice", "Open the workflow that was queued, choose leaves and press Continue.");
      }
    });
    api.addEventListener("reconnected", ask);
  },
  afterConfigureGraph: ask,
});
