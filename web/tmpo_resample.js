// "Re-sample only this leaf": adds a Leaf node with the inputs of the tree's sampler, and nodes that show its picture.

import { NARROWEST, extend, fieldOf, inputNode, join, rightOf, sameLink, sameVae, samplerOf, set } from "./tmpo_graph.js";

const LEAF_OF = { TMPO_TreeSampler: "TMPO_Leaf", TMPO_TreeSamplerAdvanced: "TMPO_LeafAdvanced" };

/** A node that samples a leaf of a sampler's tree alone, with the tree's own seed. `add` is that of `extend`. */
export function leafNode({ node, tree }, leaf, sampler, add) {
  const type = LEAF_OF[sampler.comfyClass ?? sampler.type];
  const made = add(type, node.pos[0]);
  // The seed below is the tree's. One that comes over a link may be another by now.
  for (const { name } of made.inputs ?? []) if (name !== "seed") sameLink(sampler, made, name);
  for (const widget of sampler.widgets ?? []) set(made, widget.name, widget.value);
  // The seed field may have changed since the tree was sampled.
  const seed = Number(tree.seed);
  const field = fieldOf(inputNode(sampler, "noise"), "noise_seed");
  if (type === "TMPO_Leaf") set(made, "seed", seed);
  else if (field && field.value !== seed) {
    const noise = add("RandomNoise", made.pos[0] - NARROWEST - 60);
    set(noise, "noise_seed", seed);
    set(noise, "control_after_generate", "fixed");
    join(noise, 0, made, "noise");
  }
  set(made, "control_after_generate", "fixed");
  set(made, "path", leaf.path.join(", "));
  made.title = `Leaf ${leaf.path.join(", ")}`;
  return made;
}

export function resample(view, leaf) {
  const { node } = view;
  const sampler = samplerOf(view, Object.keys(LEAF_OF));
  if (!sampler) return;
  extend(node.graph, (add) => {
    const made = leafNode(view, leaf, sampler, add);
    const decode = add("VAEDecode", rightOf(made));
    join(made, 0, decode, "samples");
    sameVae(node, decode);
    const shown = add("PreviewImage", rightOf(decode));
    shown.setSize([300, 340]);
    decode.connect(0, shown, 0);
    return { selected: made, shown: decode };
  });
}
