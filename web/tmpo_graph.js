// What "Re-sample" and "Grow variations" share: new nodes with the inputs of a tree's sampler, below the graph.

import { app } from "../../scripts/app.js";
import { notify } from "./tmpo_dom.js";

// Pixels: Nodes 2.0 draws no node narrower than this, whatever its size says.
export const NARROWEST = 225;

export function inputNode(node, name) {
  const slot = node.inputs?.findIndex((input) => input.name === name) ?? -1;
  return slot < 0 ? null : node.getInputNode(slot);
}

/** Connects an input of a node to what feeds the same input of another node. Whether there is such a thing. */
export function sameLink(from, to, name) {
  const source = from.inputs?.findIndex((input) => input.name === name) ?? -1;
  const target = to.inputs?.findIndex((input) => input.name === name) ?? -1;
  const link = source < 0 || target < 0 ? null : from.getInputLink(source);
  if (!link) return false;
  const { graph } = from;
  const origin = graph.getNodeById(link.origin_id);
  if (origin) return Boolean(origin.connect(link.origin_slot, to, target));
  // An input of the subgraph has a slot in place of a node.
  const outer = graph.inputNode?.id === link.origin_id ? graph.inputNode.slots[link.origin_slot] : null;
  return Boolean(outer?.connect(to.inputs[target], to));
}

export function fieldOf(node, name) {
  return node?.widgets?.find((widget) => widget.name === name);
}

export function set(node, name, value) {
  const widget = fieldOf(node, name);
  if (!widget) return;
  widget.value = value;
  widget.callback?.(value);
}

/** The sampler of a view's tree if its type is one of these, or null after a notice. */
export function samplerOf({ node }, types) {
  const sampler = inputNode(node, "tree");
  if (types.includes(sampler?.comfyClass ?? sampler?.type)) return sampler;
  const fix = "Connect Tree View's input tree to Tree Sampler in the same graph, without nodes between them.";
  notify("error", "The sampler of this tree was not found", fix);
  return null;
}

/** Connects two nodes by the name of the second one's input. */
export function join(from, slot, to, name) {
  from.connect(slot, to, to.inputs.findIndex((input) => input.name === name));
}

/** Gives a VAE Decode the VAE of a view, or that of the node which has decoded its images. */
export function sameVae(node, decode) {
  const pictures = inputNode(node, "images");
  if (sameLink(node, decode, "vae") || (pictures !== null && sameLink(pictures, decode, "vae"))) return;
  notify("warn", "Connect a VAE to the new VAE Decode", "Tree View has none, and the node before its images has none.");
}

/** Adds nodes to a graph as one step of undo, then shows what `build(add)` returns. `add(type, left)` places a node below all others. */
export function extend(graph, build) {
  app.canvas.emitBeforeChange();
  // Below everything, where nothing is covered.
  const bottom = Math.max(...graph.nodes.map((other) => other.pos[1] + other.size[1])) + 90;
  const add = (kind, left, down = 0) => {
    const made = window.LiteGraph.createNode(kind);
    made.pos = [left, bottom + down];
    graph.add(made);
    return made;
  };
  const { selected, shown } = build(add);
  app.canvas.emitAfterChange();
  app.canvas.selectNode(selected);
  app.canvas.centerOnNode(shown);
  graph.setDirtyCanvas(true, true);
}

/** Where a node to the right of another one begins. */
export function rightOf(other) {
  return other.pos[0] + Math.max(other.size[0], NARROWEST) + 60;
}
