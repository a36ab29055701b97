// A new node of this pack keeps its seed from run to run. A choice in a tree, or a drawn branch, belongs to its seed: by
// ComfyUI's default every run would draw another one. A workflow that is opened keeps what was saved with it.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "tmpo.seed",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("TMPO_")) return;
    const control = node.widgets?.find((widget) => widget.name === "control_after_generate");
    if (control) control.value = "fixed";
  },
});
