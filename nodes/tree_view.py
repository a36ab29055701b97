"""Shows a tree as a picture and in the interactive view `web/tmpo_tree.js`, which draws what the node reports."""

from __future__ import annotations

import logging
import math
import uuid
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..tmpo_trainer.pictures import tree as tree_picture
from .choice import Choice, check_choice, chosen_leaves, suggestions
from .full_size import with_full_size
from .images import thumbs, to_image, unlike
from .inputs import one_of
from .newer import aliases
from .pause import answers, wait_for_choice
from .types import CATEGORY, Scores, ScoresSocket, Tree, TreeSocket, finite

#: Longest side of the pictures sent to the browser.
THUMBNAIL = 256


def decoded_images(x0: Tensor, vae: Any) -> Tensor:
    """Decodes latents `[n, C, h, w]` (or the first of their frames) with a VAE to `[n, h, w, 3]` in 0..1."""
    images = vae.decode(x0)
    return images[:, 0] if images.dim() == 5 else images


@dataclass
class Decoded:
    """A tree decoded by a VAE: previews by step, and `thumbs` of the first leaves. vae: serves to recognise the VAE."""

    vae: weakref.ref[Any]
    previews: dict[int, list[Image.Image]]
    first: Tensor


#: Kept as long as the tree itself. Choosing a leaf runs the view again with the same tree from ComfyUI's cache.
_known: weakref.WeakKeyDictionary[Tree, Decoded] = weakref.WeakKeyDictionary()


def decoded(tree: Tree, vae: Any) -> Decoded:
    """Decodes a tree. The result is kept, so that each tree passes through the VAE once."""
    known = _known.get(tree)
    if known is None or known.vae() is not vae:
        previews = {step: to_pil(decoded_images(x0, vae)) for step, x0 in tree.previews.items()}
        first = thumbs(decoded_images(tree.first, vae)) if len(tree.first) else torch.zeros(0)
        known = _known[tree] = Decoded(weakref.ref(vae), previews, first)
    return known


def to_pil(images: Tensor) -> list[Image.Image]:
    """`[n, h, w, 3]` in 0..1 -> pictures of at most `THUMBNAIL` pixels a side."""
    pictures = []
    for image in images:
        pixels = (255 * image[..., :3].float().clamp(0, 1)).round().to(torch.uint8).cpu().numpy()
        picture = Image.fromarray(pixels)
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        pictures.append(picture)
    return pictures


def save(pictures: list[Image.Image]) -> list[dict[str, str]]:
    """Writes temporary files. Returns the references by which the browser asks for them."""
    # Browsers cache by name, so every call needs new names.
    tensors = [torch.from_numpy(np.asarray(picture, np.float32) / 255) for picture in pictures]
    return list(ui.ImageSaveHelper.save_images(tensors, f"tmpo_tree_{uuid.uuid4().hex[:8]}", io.FolderType.temp, None))


def report(
    tree: Tree,
    pictures: list[Image.Image],
    previews: dict[int, list[Image.Image]],
    scores: Scores | None,
    weights: list[float] | None,
    group: str,
) -> dict[str, Any]:
    """What the view draws, as JSON. Scores that are not finite are null, and the seed (up to 64 bits) is a string."""
    nodes = tree_picture.layout(tree.plan)
    first = scores.first().tolist() if scores is not None else []
    low, high = tree_picture.limits(first)
    best = tree_picture.best_leaves(first)
    means = tree_picture.node_scores(nodes, first) if scores is not None else [math.nan] * len(nodes)
    leaf_files = save(pictures)
    files = {step: save(shown) for step, shown in previews.items()}
    branches, leaves = [], []
    for i, (node, mean) in enumerate(zip(nodes, means, strict=True)):
        root = [node.path[0] // tree.prompts] if node.path else []
        common = {
            "id": i,
            "parent": node.parent,
            "prompt": node.prompt,
            "column": node.column,
            "row": node.row,
            "path": [*root, *node.path[1:]],
            "colours": {theme: tree_picture.colour(mean, low, high, theme) for theme in tree_picture.RAMPS},
        }
        if node.leaf:
            values = {} if scores is None else {name: finite(v[node.index]) for name, v in scores.values.items()}
            q = None if weights is None else weights[node.index]
            leaves.append({
                **common,
                "index": node.index,
                "image": leaf_files[node.index],
                "scores": values,
                "q": q,
                "seed": str(tree.seed),
            })  # fmt: skip
        else:
            shown = files.get(node.step) if node.column and node.step is not None else None
            branches.append({
                **common,
                "leaves": node.leaves,
                "step": node.step,
                "sigma": None if node.step is None else tree.sigmas[node.step - 1],
                "mean": finite(mean),
                "image": None if shown is None else shown[node.index],
            })  # fmt: skip
    return {
        "seed": str(tree.seed),
        "steps": tree.plan.num_steps,
        "prompts": tree.prompts,
        "rows": tree_picture.rows(tree.plan),
        "columns": 2 + len(tree.plan.fanout),
        "aspect": pictures[0].width / pictures[0].height,
        "score": None if scores is None else next(iter(scores.values)),
        "low": low,
        "high": high,
        "decimals": tree_picture.decimals(low, high),
        "ramps": tree_picture.RAMPS,
        "best": best[0] if best else None,
        "stars": tree_picture.starred_leaves(first),
        "group": group,
        "nodes": branches,
        "leaves": leaves,
    }


class TreeView(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_TreeView",
            display_name="Tree View",
            category=CATEGORY,
            **aliases("variations", "image picker", "choose image", "seed explorer"),
            description="Shows how a tree of pictures branched, coloured by score. Click a leaf to choose it.",
            is_output_node=True,
            inputs=[
                TreeSocket.Input("tree", tooltip="From a tree sampler."),
                io.Image.Input("images", tooltip="All leaves of that tree, decoded."),
                ScoresSocket.Input(
                    "scores", optional=True, tooltip="Optional: scores of these images. The first one colours the tree."
                ),
                io.Vae.Input(
                    "vae", optional=True,
                    tooltip="Optional: decodes the previews where branches part. Without it they are rough estimates.",
                ),
                io.Combo.Input(
                    "theme", options=list(tree_picture.RAMPS), default="dark",
                    tooltip="The theme of the picture. The view itself follows ComfyUI's theme.",
                ),
                io.Float.Input(
                    "beta", default=1.0, min=0.0, max=100.0, step=0.1,
                    tooltip="How sharply the weights q = softmax(beta * standardised score) favour high scores.",
                ),
                io.String.Input(
                    "selected", default="",
                    tooltip="The chosen leaves, by their places in the batch: 12, 3. Empty for the leaf with the best score. A "
                    "click in the view adds the tree they belong to, after @. In another tree the best leaf is passed on.",
                ),
                io.Boolean.Input(
                    "pause", default=False, optional=True,
                    tooltip="Whether the run waits until leaves are chosen here. It does not if selected names leaves of this "
                    "tree already.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="The tree as one picture."),
                io.Int.Output(display_name="selected_index", tooltip="The place of the first chosen leaf in the batch."),
                io.Image.Output(display_name="selected_image", tooltip="The chosen leaves, in the order of the choice."),
                io.String.Output(
                    display_name="choice", tooltip="The places of the chosen leaves, for Select Branches, mode 'by choice'."
                ),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, selected=None) -> bool | str:
        try:
            Choice.parse(selected or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, selected="", pause=False, **inputs) -> Any:
        return answers(selected or "") if pause is not False else 0

    @classmethod
    def execute(
        cls, tree: Tree, images: Tensor, theme, beta, selected, scores: Scores | None = None, vae=None, pause=False
    ) -> io.NodeOutput:
        tree.check(len(images), "images")
        one_of(theme, list(tree_picture.RAMPS), "theme")
        weights, first, name, group = None, None, "", "latent"
        if scores is not None:
            scores.check(images)
            first, name = scores.first().tolist(), next(iter(scores.values))
            weights = tree_picture.leaf_weights(scores.first(), beta, tree.prompts).tolist()
            group = "prompt" if len(set(scores.prompts)) > 1 else "latent"
        pictures = to_pil(images)
        if vae is not None:
            known = decoded(tree, vae)
            previews = known.previews
            if len(known.first) and unlike(known.first, thumbs(images[: len(known.first)])):
                raise ValueError(
                    "images are not the leaves of this tree: connect both to the same tree sampler, or disconnect vae to "
                    "show them anyway"
                )
        else:
            previews = {step: to_pil(colours) for step, colours in tree.colours.items()}
        shown = with_full_size(report(tree, pictures, previews, scores, weights, group), images, cls)
        shown["suggestions"] = suggestions(images, scores)
        leaves, shown["notice"] = chosen_leaves(selected, tree)
        if pause and not leaves:
            waiting = {**shown, "notice": "", "fingerprints": [tree.fingerprint]}
            selected = wait_for_choice(waiting, selected, lambda text: check_choice(text, tree), cls)
            leaves, shown["notice"] = chosen_leaves(selected, tree)
        if shown["notice"]:
            logging.warning("Tree View: %s", shown["notice"])
        # The choice may hold the fingerprint of the same tree, sampled another time.
        shown["fingerprints"] = [tree.fingerprint, *([Choice.parse(selected).tree] if leaves else [])]
        picture = tree_picture.draw(
            tree.plan, pictures, tree.sigmas, first, weights, previews, name, f"seed {tree.seed}", leaves, group, theme
        )
        chosen = leaves or [shown["best"] or 0]
        return io.NodeOutput(
            to_image(picture), chosen[0], images[chosen], ", ".join(map(str, chosen)), ui={"tmpo_tree": [shown]}
        )
