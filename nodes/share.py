"""Nodes for showing a tree to others: pictures that say which leaf they are, and the tree as an animation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io, ui
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..tmpo_trainer import selection
from ..tmpo_trainer.pictures import animation
from ..tmpo_trainer.pictures import tree as tree_picture
from .images import pixels
from .inputs import one_of
from .newer import aliases
from .tree_sampler import MOST_LEAVES
from .tree_view import decoded, to_pil
from .types import CATEGORY, Scores, ScoresSocket, Tree, TreeSocket, finite

#: The entry of a PNG's text that says which leaf the picture is, as JSON.
KEY = "tmpo"
FORMATS = ["webp", "gif"]
#: EXIF tags in which ComfyUI's page looks for a workflow in a WebP file.
MODEL, MAKE = 0x0110, 0x010F

PREFIX_TIP = "Where the file goes in ComfyUI's output folder, as in Save Image."


def matched(count: int, indices: str, tree: Tree | None, scores: Scores | None) -> tuple[list[int], list[int]]:
    """Which of `count` pictures are meant, and which leaves they are.

    The pictures may be those that `indices` names, in this order, or all leaves. Without indices they are all leaves.

    Raises:
        ValueError: the numbers of pictures, indices and leaves do not fit, or it cannot be told which leaf a picture is.
    """
    leaves = selection.indices(indices, MOST_LEAVES if tree is None else tree.leaves)
    if not leaves:
        if tree is not None and count != tree.leaves:
            raise ValueError(
                f"images has {count} entries, but the tree has {tree.leaves} leaves: connect indices from the node that "
                "chose the images"
            )
        return list(range(count)), list(range(count))
    if len(leaves) == count:
        every = list(range(count))
        # Then the images may be all leaves, or what was chosen of them: scores that were chosen with them tell.
        another = leaves != every and sorted(leaves) == every and (tree is None or count == tree.leaves)
        if another and (scores is None or scores.picked != leaves):
            tell = "" if tree is not None else "the tree, "
            raise ValueError(
                f"indices names all {count} images in another order, and images may be in either: connect {tell}the scores "
                "that were chosen with the images, or all leaves without indices"
            )
        return every, leaves
    if max(leaves) < count and (tree is None or count == tree.leaves):
        return leaves, leaves
    raise ValueError(
        f"indices has {len(leaves)} entries for {count} images: connect all leaves, or the images that were chosen with them"
    )


def facts(leaf: int, path: tuple[int, ...], tree: Tree | None, scores: Scores | None, row: int) -> dict[str, Any]:
    """What a saved picture says about itself. path, branch_steps, kernel, eta, solver and denoise are inputs of the node Leaf.

    path: from `Tree.paths`. row: the picture's place in the scores.
    """
    found: dict[str, Any] = {"leaf": leaf}
    if tree is not None:
        plan = tree.plan
        steps = [*([1] if plan.roots > plan.trees else []), *plan.fanout]
        found |= {
            "seed": tree.seed,
            "path": ", ".join(map(str, (path[0] // tree.prompts, *path[1:]))),
            "steps": plan.num_steps,
            "branch_steps": ", ".join(map(str, steps)),
            "kernel": tree.kernel,
            "eta": tree.eta,
            "solver": tree.solver,
        }
        if tree.denoise < 1:
            found["denoise"] = tree.denoise
        if tree.prompts > 1:
            found["latent"] = path[0] % tree.prompts
    if scores is not None:
        found["prompt"] = scores.prompts[row]
        values = {name: value[row].item() for name, value in scores.values.items()}
        found["scores"] = {name: finite(value) for name, value in values.items()}
    return found


def workflow_of(node: type[io.ComfyNode]) -> dict[str, str]:
    """What ComfyUI saves with a picture, `prompt` and `workflow` as JSON. Empty with `--disable-metadata`."""
    if args.disable_metadata:
        return {}
    given = {"prompt": node.hidden.prompt, **(node.hidden.extra_pnginfo or {})}
    return {name: json.dumps(value) for name, value in given.items() if value is not None}


class SaveLeaves(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_SaveLeaves",
            display_name="Save Leaves",
            category=CATEGORY,
            **aliases("save image", "metadata", "save with scores"),
            description="Saves pictures with leaf, path, seed and scores in the file, besides ComfyUI's own workflow.",
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="All leaves of a tree, or some of them."),
                io.String.Input("filename_prefix", default="leaves/leaf", tooltip=PREFIX_TIP),
                TreeSocket.Input("tree", optional=True, tooltip="Says where the leaves come from: path, seed, steps, noise."),
                ScoresSocket.Input("scores", optional=True, tooltip="Scores of these images, or of all leaves."),
                io.String.Input(
                    "indices", optional=True, force_input=True,
                    tooltip="Which leaves to save, e.g. 12, 3: indices of Select Branches or choice of Tree View. Without it "
                    "the images are all leaves.",
                ),
            ],
            outputs=[],
        )  # fmt: skip

    @classmethod
    def execute(cls, images: Tensor, filename_prefix: str, tree=None, scores=None, indices="") -> io.NodeOutput:
        rows, leaves = matched(len(images), indices or "", tree, scores)
        if scores is not None:
            if len(scores) != len(images) and max(leaves) < len(scores):
                scores = scores.pick(leaves)
                scores.check(images[rows])
            else:
                scores.check(images)
                scores = scores.pick(rows)
        paths = [()] * (max(leaves) + 1) if tree is None else tree.paths()
        shared = workflow_of(cls)
        saved = []
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), images.shape[2], images.shape[1]
        )
        for place, (leaf, picture) in enumerate(zip(leaves, pixels(images[rows], 4), strict=True)):
            info = None
            if not args.disable_metadata:
                info = PngInfo()
                for key, text in {**shared, KEY: json.dumps(facts(leaf, paths[leaf], tree, scores, place))}.items():
                    info.add_text(key, text)
            # SaveImage has the same rule for names.
            file = f"{name.replace('%batch_num%', str(place))}_{counter + place:05}_.png"
            Image.fromarray(picture).save(Path(folder, file), pnginfo=info, compress_level=4)
            saved.append(ui.SavedResult(file, subfolder, io.FolderType.output))
        return io.NodeOutput(ui=ui.SavedImages(saved))


class TreeAnimation(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_TreeAnimation",
            display_name="Tree Animation",
            category=CATEGORY,
            **aliases("GIF", "WebP", "animation"),
            description="Saves a tree as an animation of its denoising: branches grow from noise to the leaves.",
            is_output_node=True,
            inputs=[
                TreeSocket.Input("tree", tooltip="From a tree sampler."),
                io.Image.Input("images", tooltip="All leaves of that tree, decoded."),
                io.String.Input("filename_prefix", default="leaves/tree", tooltip=PREFIX_TIP),
                io.Combo.Input(
                    "format", options=FORMATS, default=FORMATS[0],
                    tooltip="webp has all colours. gif has 256 and opens everywhere.",
                ),
                io.Combo.Input(
                    "theme", options=list(tree_picture.RAMPS), default="dark", tooltip="The colours of the background."
                ),
                io.Int.Input(
                    "frame_time", default=80, min=20, max=1000, step=10,
                    tooltip="Milliseconds of a frame. The finished tree stays for 24 frames.",
                ),
                io.Int.Input(
                    "size", default=1280, min=480, max=4096, step=16,
                    tooltip="The longest side in pixels. The pictures get as large as the tree allows.",
                ),
                ScoresSocket.Input("scores", optional=True, tooltip="Scores of these images. The first one colours the tree."),
                io.Vae.Input(
                    "vae", optional=True,
                    tooltip="Decodes the pictures where branches part. Without it they are rough estimates.",
                ),
            ],
            outputs=[],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, tree: Tree, images: Tensor, filename_prefix, format, theme, frame_time, size, scores=None, vae=None
    ) -> io.NodeOutput:
        tree.check(len(images), "images")
        one_of(format, FORMATS, "format")
        one_of(theme, list(tree_picture.RAMPS), "theme")
        values, name = None, ""
        if scores is not None:
            scores.check(images)
            values, name = scores.first().tolist(), next(iter(scores.values))
        if vae is not None:
            previews = decoded(tree, vae).previews
        else:
            previews = {step: to_pil(colours) for step, colours in tree.colours.items()}
        times = animation.timeline(tree.plan)
        bar = comfy.utils.ProgressBar(len(times))
        pictures = []
        for picture in animation.frames(
            tree.plan,
            to_pil(images),
            tree.sigmas,
            values,
            None,
            previews,
            name,
            f"seed {tree.seed}",
            theme=theme,
            longest=size,
        ):
            pictures.append(picture)
            # It also ends an interrupted run.
            bar.update_absolute(len(pictures), len(times))
        width, height = pictures[0].size
        folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), width, height
        )
        file = f"{stem}_{counter:05}_.{format}"
        animation.write(Path(folder, file), pictures, [count for _, count in times], frame_time, exif(workflow_of(cls)))
        return io.NodeOutput(
            ui=ui.SavedImages([ui.SavedResult(file, subfolder, io.FolderType.output)], is_animated=True)
        )


def exif(texts: dict[str, str]) -> bytes:
    """EXIF with one tag for each text, from which ComfyUI's page opens a workflow."""
    tags = Image.Exif()
    # `prompt` is the first, and the others count down, as in ComfyUI's own files.
    tag = MAKE
    for name, text in texts.items():
        if name == "prompt":
            tags[MODEL] = f"{name}:{text}"
        else:
            tags[tag] = f"{name}:{text}"
            tag -= 1
    return tags.tobytes()
