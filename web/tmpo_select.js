// The node "Select Branches" shows only the inputs of its mode. It and "Score Images" show a notice about their result.

import { app } from "../../scripts/app.js";

const SELECT = "TMPO_SelectBranches";
const WITH_NOTICE = [SELECT, "TMPO_ScoreImages"];
const NOTICE = "tmpo_notice";
const INPUTS = {
  "best by score": ["count"],
  "most diverse": ["count"],
  "most diverse above a score": ["count", "min_score"],
  "sample by weight": ["count", "beta", "seed", "control_after_generate"],
  "by index": ["index"],
  "by choice": [],
};

/** The classic renderer reads the first, Nodes 2.0 the second, in the object that it got with the widget. */
function hide(widget, hidden) {
  widget.hidden = hidden;
  widget.options.hidden = hidden;
}

/** Nodes 2.0 looks at the widgets again only if an element of their list changes; a copy of the list does not do. */
function refresh(node) {
  node.widgets.push(node.widgets.pop());
}

/** Runs `change`, and makes the node as much higher or lower as that needs. A size set by hand keeps its surplus. */
function fitted(node, change) {
  const before = node.computeSize()[1];
  change();
  const after = node.computeSize()[1];
  if (after !== before) node.setSize([node.size[0], Math.max(after, node.size[1] + after - before)]);
  node.setDirtyCanvas(true, true);
}

function showInputsOf(node) {
  const mode = node.widgets.find((widget) => widget.name === "mode").value;
  const shown = ["mode", NOTICE, ...(INPUTS[mode] ?? [])];
  for (const widget of node.widgets) {
    const hidden = !shown.includes(widget.name);
    hide(widget, hidden);
    // A seed that is not used must not change, or the node and all behind it would run again.
    if (widget.name === "control_after_generate" && hidden) widget.value = "fixed";
  }
  refresh(node);
}

function showNotice(node, text) {
  let widget = node.widgets.find((each) => each.name === NOTICE);
  if ((widget?.element.textContent ?? "") === (text ?? "")) return;
  if (!widget) {
    const element = document.createElement("div");
    element.style.cssText =
      "box-sizing: border-box; padding: 6px 10px; border-radius: 6px; overflow: auto; font: 12px/1.35 system-ui, sans-serif;" +
      "color: var(--fg-color); background: color-mix(in srgb, orange 22%, var(--comfy-input-bg));";
    const lines = () => (element.textContent ? 34 + 17 * Math.ceil(element.textContent.length / 38) : 0);
    widget = node.addDOMWidget(NOTICE, NOTICE, element, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: lines,
      getMaxHeight: lines,
    });
  }
  fitted(node, () => {
    widget.element.textContent = text ?? "";
    hide(widget, !text);
    refresh(node);
  });
}

app.registerExtension({
  name: "tmpo.select",
  beforeRegisterNodeDef(type, definition) {
    if (!WITH_NOTICE.includes(definition.name)) return;
    const executed = type.prototype.onExecuted;
    type.prototype.onExecuted = function (output) {
      executed?.apply(this, arguments);
      showNotice(this, output?.[NOTICE]?.[0]);
    };
  },
  nodeCreated(node) {
    if (node.comfyClass !== SELECT) return;
    const mode = node.widgets.find((widget) => widget.name === "mode");
    const changed = mode.callback;
    mode.callback = function () {
      changed?.apply(this, arguments);
      fitted(node, () => showInputsOf(node));
    };
    const configured = node.onConfigure;
    // A workflow's values are set after the node is made, and with them the size that goes with them.
    node.onConfigure = function () {
      configured?.apply(this, arguments);
      showInputsOf(node);
    };
    fitted(node, () => showInputsOf(node));
  },
});
