// "Grow variations of this leaf": a second tree that begins at the leaf's latent, with some noise. The leaf is sampled alone by
// a node of its own, so that it stays what it is whatever the first sampler draws next.

import { notify } from "./tmpo_dom.js";
import { extend, inputNode, join, rightOf, sameLink, sameVae, samplerOf, set } from "./tmpo_graph.js";
import { leafNode } from "./tmpo_resample.js";

const DENOISE = 0.6;

export function regrow(view, leaf) {
  const { node, tree } = view;
  const sampler = samplerOf(view, ["TMPO_TreeSampler"]);
  if (!sampler) return;
  extend(node.graph, (add) => {
    let start = leafNode(view, leaf, sampler, add);
    if (tree.prompts > 1) {
      // It is sampled for each latent of the batch.
      const all = start;
      start = add("LatentFromBatch", rightOf(all));
      join(all, 0, start, "samples");
      set(start, "batch_index", leaf.prompt);
      set(start, "length", 1);
      // No node takes one row out of a conditioning.
      const fix = "If every latent has a prompt of its own, connect this one's to the new tree sampler.";
      notify("info", "Variations of one of several latents", fix);
    }
    const grown = add("TMPO_TreeSampler", rightOf(start));
    for (const { name } of grown.inputs ?? []) if (!["seed", "latent_image"].includes(name)) sameLink(sampler, grown, name);
    for (const widget of sampler.widgets ?? []) set(grown, widget.name, widget.value);
    join(start, 0, grown, "latent_image");
    // With the tree's own noise one of them would be the leaf itself. Above 2^53 the next number would be the same one.
    set(grown, "seed", (Number(tree.seed) + 1) % 2 ** 50);
    set(grown, "control_after_generate", "fixed");
    set(grown, "denoise", DENOISE);
    grown.title = `Variations of ${leaf.path.join(", ")}`;
    const decode = add("VAEDecode", rightOf(grown));
    join(grown, 0, decode, "samples");
    sameVae(node, decode);
    const scorer = inputNode(node, "scores");
    let scores = null;
    // Scores of several prompts belong to the places of their latents, of which one is left.
    if (scorer?.type === "TMPO_ScoreImages" && tree.prompts === 1) {
      scores = add("TMPO_ScoreImages", decode.pos[0], 130);
      for (const { name } of scores.inputs ?? []) if (!["images", "tree"].includes(name)) sameLink(scorer, scores, name);
      for (const widget of scorer.widgets ?? []) set(scores, widget.name, widget.value);
      join(decode, 0, scores, "images");
    }
    const shown = add("TMPO_TreeView", rightOf(scores ?? decode));
    join(grown, 1, shown, "tree");
    join(decode, 0, shown, "images");
    if (scores) join(scores, 0, shown, "scores");
    sameLink(node, shown, "vae");
    for (const name of ["theme", "beta"]) set(shown, name, node.widgets.find((widget) => widget.name === name)?.value);
    return { selected: grown, shown };
  });
}
