"""Shows a tree as a picture and in the interactive view `web/tmpo_tree.js`, which draws what the node reports."""

from __future__ import annotations

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
from .full_size import with_full_size
from .images import thumbs, to_image, unlike
from .inputs import one_of
from .tree_sampler import MOST_LEAVES
from .types import CATEGORY, Scores, ScoresSocket, Tree, TreeSocket

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
    best: int | None,
) -> dict[str, Any]:
    """What the view draws, as JSON. Scores that are not finite are null, and the seed (up to 64 bits) is a string."""
    nodes = tree_picture.layout(tree.plan)
    first = scores.first().tolist() if scores is not None else []
    low, high = tree_picture.limits(first)
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
            values = {} if scores is None else {name: _finite(v[node.index]) for name, v in scores.values.items()}
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
                "mean": _finite(mean),
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
        "best": best,
        "nodes": branches,
        "leaves": leaves,
    }


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


class TreeView(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_TreeView",
            display_name="Tree View",
            category=CATEGORY,
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
                io.Int.Input(
                    "selected", default=-1, min=-1, max=MOST_LEAVES - 1,
                    tooltip="The chosen leaf's place in the batch. -1 chooses the leaf with the best score.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="The tree as one picture."),
                io.Int.Output(display_name="selected_index", tooltip="The chosen leaf's place, for Select Branches."),
                io.Image.Output(display_name="selected_image", tooltip="The chosen leaf alone."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, tree: Tree, images: Tensor, theme, beta, selected, scores: Scores | None = None, vae=None
    ) -> io.NodeOutput:
        tree.check(len(images), "images")
        if selected >= tree.leaves:
            raise ValueError(
                f"selected is {selected}, but this tree has {tree.leaves} leaves: set it to -1 for the best"
            )
        weights, best, first, name = None, None, None, ""
        if scores is not None:
            scores.check(images)
            first, name = scores.first().tolist(), next(iter(scores.values))
            weights = tree_picture.leaf_weights(scores.first(), beta, tree.prompts).tolist()
            best = tree_picture.best_leaf(first)
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
        picture = tree_picture.draw(
            tree.plan, pictures, tree.sigmas, first, weights, previews, name, f"seed {tree.seed}",
            selected if selected >= 0 else None, one_of(theme, list(tree_picture.RAMPS), "theme"),
        )  # fmt: skip
        chosen = selected if selected >= 0 else best or 0
        return io.NodeOutput(
            to_image(picture),
            chosen,
            images[chosen : chosen + 1],
            ui={"tmpo_tree": [with_full_size(report(tree, pictures, previews, scores, weights, best), images, cls)]},
        )
