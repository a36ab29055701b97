// What the views of texts and pairs share: a frame that scrolls in itself, and the way outputs reach a view.

import { app } from "../../scripts/app.js";
import { addStyle, element } from "./tmpo_dom.js";

// In Nodes 2.0 the height of a view's content would force the height of its node; size containment keeps it out.
const CSS = `
.tmpo-panel { contain: size; box-sizing: border-box; position: relative; display: flex; flex-direction: column;
  overflow: hidden; border: 1px solid var(--border-color); border-radius: 6px; background: var(--comfy-menu-bg);
  color: var(--fg-color); font: 12px/1.45 system-ui, sans-serif; }
.tmpo-scroll { flex: 1; min-height: 0; overflow: auto; scrollbar-width: thin;
  scrollbar-color: var(--descrip-text) transparent; }
.tmpo-empty { margin: auto; padding: 12px; color: var(--descrip-text); text-align: center; }
`;

/** A frame of at least this height. The wheel scrolls its `tmpo-scroll` parts; the canvas gets what the frame does not use. */
export function panel(className, minHeight) {
  const root = element("div", `tmpo-panel ${className}`);
  root.style.minHeight = `${minHeight}px`;
  root.addEventListener(
    "wheel",
    (event) => {
      event.stopPropagation();
      const part = event.target.closest(".tmpo-scroll");
      const scrolls = part && (part.scrollHeight > part.clientHeight || part.scrollWidth > part.clientWidth);
      if (scrolls && !event.ctrlKey) return;
      event.preventDefault();
      app.canvas.processMouseWheel(event);
    },
    { passive: false },
  );
  // The middle button moves the canvas, also over a view.
  for (const name of ["Down", "Move", "Up"]) {
    root.addEventListener(`pointer${name.toLowerCase()}`, (event) => {
      if (name === "Move" ? event.buttons & 4 : event.button === 1) app.canvas[`processMouse${name}`](event);
    });
  }
  // Selected text is copied, where ComfyUI would copy its node.
  root.addEventListener("copy", (event) => {
    if (!getSelection().isCollapsed) event.stopPropagation();
  });
  return root;
}

/**
 * Gives every node of one of these types a view at its end. `make(node)` returns `{ root, height, show(output) }`, where
 * `height` is the smallest in pixels; `size` is that of a new node. `show` gets the node's output after a run, after an
 * undo, which creates all nodes again, and in a workflow that is opened again and sends no event.
 */
export function addViews(name, types, size, make) {
  app.registerExtension({
    name,

    onNodeOutputsUpdated(outputs) {
      for (const [place, output] of Object.entries(outputs)) {
        // The key is `id` or `subgraph:id`.
        const at = place.lastIndexOf(":");
        const graph = at < 0 ? app.graph : app.graph.subgraphs?.get(place.slice(0, at));
        const node = output && graph?.getNodeById(place.slice(at + 1));
        if (node && types.includes(node.comfyClass)) node.tmpoView.show(output);
      }
    },

    beforeRegisterNodeDef(nodeType, nodeData) {
      if (!types.includes(nodeData.name)) return;
      const { onNodeCreated, onExecuted, onConfigure } = nodeType.prototype;

      nodeType.prototype.onNodeCreated = function () {
        onNodeCreated?.apply(this, arguments);
        const view = make(this);
        this.tmpoView = view;
        this.addDOMWidget("tmpo_view", "tmpo_view", view.root, {
          serialize: false,
          hideOnZoom: false,
          getMinHeight: () => view.height,
        });
        const least = this.computeSize();
        this.setSize([Math.max(size[0], least[0]), Math.max(size[1], least[1])]);
      };

      nodeType.prototype.onConfigure = function () {
        onConfigure?.apply(this, arguments);
        const place = this.graph === app.graph ? this.id : `${this.graph?.id}:${this.id}`;
        const last = app.nodeOutputs[place];
        if (last) this.tmpoView.show(last);
      };

      nodeType.prototype.onExecuted = function (output) {
        onExecuted?.apply(this, arguments);
        if (output) this.tmpoView.show(output);
      };
    },
  });
}

addStyle(CSS);
