// A new "Tree Animation" has room for its animation, for which ComfyUI itself would leave a few pixels.

import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "tmpo.share",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "TMPO_TreeAnimation") return;
    const { onNodeCreated } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function () {
      onNodeCreated?.apply(this, arguments);
      this.setSize([400, 700]);
    };
  },
});
