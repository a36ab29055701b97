// Small helpers for the views of this pack.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

/** The nodes of the workflow, those in subgraphs as well. */
export function allNodes() {
  return [app.graph, ...(app.graph.subgraphs?.values() ?? [])].flatMap((graph) => graph.nodes);
}

/** The node that a run calls by this id: before its own stand the ids of the subgraphs around it, as in 12:5. */
export function nodeOf(id) {
  const path = String(id).split(":");
  const graph = path.slice(0, -1).reduce((outer, part) => outer?.getNodeById(Number(part))?.subgraph, app.graph);
  return graph?.getNodeById(Number(path.at(-1))) ?? null;
}

/**
 * Whether a run is of the workflow that is open. Node ids alone would also be found in another one. What was queued without a
 * workflow is shown where it was queued.
 */
export function isHere({ client = api.clientId, workflow }) {
  return workflow === null ? client === api.clientId : workflow === app.graph.id;
}

export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

/** The address of a picture: a file that ComfyUI has saved, or the picture itself as a data URL. */
export function address(ref) {
  return typeof ref === "string" ? ref : api.apiURL(`/view?${new URLSearchParams(ref)}`);
}

/** An <img>, empty if there is no picture yet. */
export function picture(ref, alt) {
  const made = element("img");
  made.draggable = false;
  if (ref) Object.assign(made, { alt, src: address(ref) });
  return made;
}

export function put(target, left, top, width, height) {
  Object.assign(target.style, { left: `${left}px`, top: `${top}px`, width: `${width}px`, height: `${height}px` });
}

export function percent(q) {
  return `${(100 * q).toFixed(1)} %`;
}

export function addStyle(css) {
  document.head.append(element("style", "", css));
}

export function notify(severity, summary, detail = "") {
  app.extensionManager.toast.add({ severity, summary, detail, life: severity === "error" ? 8000 : 3000 });
}
