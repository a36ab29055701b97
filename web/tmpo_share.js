// The nodes that save files: a prefix may have ComfyUI's %date:...% and %Node.widget%, which its page replaces for its own
// nodes only. A new "Tree Animation" has room for its animation, for which ComfyUI itself would leave a few pixels.

import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "tmpo.share",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!["TMPO_SaveLeaves", "TMPO_TreeAnimation"].includes(nodeData.name)) return;
    const { onNodeCreated } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function () {
      onNodeCreated?.apply(this, arguments);
      const prefix = this.widgets.find((widget) => widget.name === "filename_prefix");
      prefix.serializeValue = () => window.comfyAPI.utils.applyTextReplacements(app, prefix.value);
      if (nodeData.name === "TMPO_TreeAnimation") this.setSize([400, 700]);
    };
  },
});
