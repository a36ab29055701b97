// Colours of this pack's nodes, of the sockets that carry trees and scores, and of their links.

import { app } from "../../scripts/app.js";

const COLOURS = { TMPO_TREE: "#5fb3a1", TMPO_SCORES: "#d9a441" };
/** Of the title, in the trees' hue; ComfyUI lightens it in light themes. */
const TITLE = "#2f5d54";

/** A new palette empties the colours of all types that it does not know; these stay. */
function keep(colours) {
  for (const [type, colour] of Object.entries(COLOURS)) {
    Object.defineProperty(colours, type, { get: () => colour, set() {}, enumerable: true, configurable: true });
  }
}

app.registerExtension({
  name: "tmpo.style",

  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("TMPO_")) return;
    node.color = TITLE;
    const configured = node.onConfigure;
    // A saved node has the colour that was saved, or none if the artist took it away.
    node.onConfigure = function (saved) {
      configured?.apply(this, arguments);
      if (!saved.color) this.color = undefined;
    };
  },

  setup() {
    keep(app.canvas.default_connection_color_byType);
    keep(window.LGraphCanvas.link_type_colors);
    // Nodes 2.0 takes the colours from here.
    const style = document.createElement("style");
    const rules = Object.entries(COLOURS).map(([type, colour]) => `--color-datatype-${type}: ${colour};`);
    style.textContent = `:root { ${rules.join(" ")} }`;
    document.head.append(style);
  },
});
