// Shows the text output of nodes that describe what they did, below their widgets.
import { app } from "../../scripts/app.js";

const NODES = ["TMPO_LoadLora", "TMPO_Compare", "TMPO_Train", "TMPO_TrainingMonitor"];

app.registerExtension({
  name: "tmpo.text",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.includes(nodeData.name)) return;
    const created = nodeType.prototype.onNodeCreated;
    nodeType.prototype.onNodeCreated = function () {
      created?.apply(this, arguments);
      const box = document.createElement("pre");
      Object.assign(box.style, {
        margin: "0",
        padding: "6px",
        overflow: "auto",
        font: "11px/1.4 monospace",
        whiteSpace: "pre-wrap",
        color: "var(--input-text)",
        background: "var(--comfy-input-bg)",
        borderRadius: "4px",
      });
      this.tmpoText = box;
      this.addDOMWidget("text", "tmpo_text", box, {
        serialize: false,
        hideOnZoom: false,
        getMinHeight: () => 90,
      });
    };
    const executed = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      executed?.apply(this, arguments);
      if (output?.text) this.tmpoText.textContent = output.text.join("\n");
    };
  },
});
