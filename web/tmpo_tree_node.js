// The node "Tree View": its view, the choice in its widget `selected`, and the ways in which a tree reaches the view.

import { app } from "../../scripts/app.js";
import { allNodes } from "./tmpo_dom.js";
import { TreeView } from "./tmpo_tree.js";
import { MIN_HEIGHT } from "./tmpo_tree_style.js";

const NODE = "TMPO_TreeView";
const OUTPUT = "tmpo_tree";
// The size of a new node, which fits a screen of 1366x768.
const SIZE = [720, 600];

app.registerExtension({
  name: "tmpo.tree",

  /** Colours of scores depend on the theme, which is in classes and variables of the page. */
  setup() {
    const look = () => document.body.className + document.documentElement.className + document.documentElement.style.cssText;
    let before = look();
    const observer = new MutationObserver(() => {
      if (look() === before) return;
      before = look();
      for (const node of allNodes()) node.tmpoTree?.draw();
    });
    for (const place of [document.body, document.documentElement]) {
      observer.observe(place, { attributes: true, attributeFilter: ["class", "style"] });
    }
  },

  /** A workflow that is opened again, from another tab or the history, has its last outputs but sends no event. */
  onNodeOutputsUpdated(outputs) {
    for (const [place, output] of Object.entries(outputs)) {
      if (!output?.[OUTPUT]) continue;
      // The key is `id` or `subgraph:id`.
      const at = place.lastIndexOf(":");
      const graph = at < 0 ? app.graph : app.graph.subgraphs?.get(place.slice(0, at));
      graph?.getNodeById(place.slice(at + 1))?.tmpoTree?.show(output[OUTPUT][0]);
    }
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    const { onNodeCreated, onExecuted, onConfigure, onRemoved } = nodeType.prototype;

    nodeType.prototype.onNodeCreated = function () {
      onNodeCreated?.apply(this, arguments);
      const widget = this.widgets.find((candidate) => candidate.name === "selected");
      const view = new TreeView((text) => {
        // With this the choice can be undone and is saved with the workflow.
        app.canvas.emitBeforeChange();
        widget.value = text;
        widget.callback?.(text);
        app.canvas.emitAfterChange();
        this.graph?.setDirtyCanvas(true, true);
      });
      view.node = this;
      this.tmpoTree = view;
      const changed = widget.callback;
      // A typed choice marks its leaves, too.
      widget.callback = function (value) {
        changed?.apply(this, arguments);
        view.mark(value);
      };
      this.addDOMWidget("tree_view", "tmpo_tree", view.root, {
        serialize: false,
        // The tree is what a zoomed-out graph is looked at for.
        hideOnZoom: false,
        getMinHeight: () => MIN_HEIGHT,
      });
      this.setSize(SIZE);
    };

    nodeType.prototype.onConfigure = function () {
      onConfigure?.apply(this, arguments);
      // Workflows of earlier versions have a number, -1 for none.
      const widget = this.widgets.find((candidate) => candidate.name === "selected");
      if (typeof widget.value === "number") widget.value = widget.value < 0 ? "" : String(widget.value);
      // An undo creates all nodes again.
      const place = this.graph === app.graph ? this.id : `${this.graph?.id}:${this.id}`;
      const last = app.nodeOutputs[place]?.[OUTPUT]?.[0];
      if (last) this.tmpoTree.show(last);
      this.tmpoTree.mark(widget.value);
    };

    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      const tree = output[OUTPUT]?.[0];
      if (tree) this.tmpoTree.show(tree);
    };

    nodeType.prototype.onRemoved = function () {
      onRemoved?.apply(this, arguments);
      this.tmpoTree.observer.disconnect();
    };
  },
});
