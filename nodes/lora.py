"""Nodes for the trainer's LoRAs: one loads a LoRA and shows what it was trained on, one compares it with its base."""

from __future__ import annotations

import math
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.utils
import folder_paths
import numpy as np
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor, nn

from ..tmpo_trainer.diversity import measure
from ..tmpo_trainer.evaluation import appearance, drift
from ..tmpo_trainer.lora import file as lora_file
from ..tmpo_trainer.pictures import grids
from .changed import Changes
from .demo_model import FOLDER
from .diversity import feature_vectors
from .images import pixels, to_image
from .inputs import inside
from .newer import aliases
from .types import CATEGORY, Scores, ScoresSocket, finite

NONE = "(none)"
#: The LoRA that comes with the demo model.
DEMO, DEMO_FILE = "(demo)", FOLDER.parent / "lora" / lora_file.FILE_NAME
#: Of the files that were loaded.
CHANGES = Changes()


def apply_lora(model: Any, lora: lora_file.LoraFile, strength: float) -> Any:
    """A clone of the model with the LoRA's layers, without those of text encoders.

    Raises:
        ValueError: a number is not finite, or a layer does not fit the model.
    """
    lora.check_finite()
    loose = {key for key in lora.loose if not key.endswith(".dora_scale")}
    state = {key: value for key, value in lora.state.items() if key not in loose}
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(state), keys, log_missing=False)
    layers = len(lora.layers) - len(lora.text)
    clone = model.clone()
    fitting = {key: adapter for key, adapter in loaded.items() if _fits(model.model, key, adapter)}
    placed = len(clone.add_patches(fitting, strength))
    if placed < layers or not placed:
        raise ValueError(
            f"{lora.file.name} is a LoRA of another model: {placed} of its {layers} layers are in "
            f"{type(model.model).__name__}. Connect the model it was trained on. If it is connected, update ComfyUI: older "
            "versions do not know all layers of newer models"
        )
    return clone


def _fits(model: nn.Module, key: Any, adapter: Any) -> bool:
    """Whether a LoRA's layer has the shape of the weight, or slice of a weight, that it would change."""
    name, part = (key, None) if isinstance(key, str) else key[:2]
    try:
        # Not the state dict's: GGUF and four-bit layers write their packed bytes there.
        shape = list(comfy.utils.get_attr(model, name).shape)[:2]
    except AttributeError:
        return False
    if len(shape) < 2:
        return False
    if part is not None:
        shape[part[0]] = part[2]
    up, down = adapter.weights[:2]
    return [up.shape[0], down.shape[1]] == shape


class LoadTmpoLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_LoadLora",
            display_name="Load TMPO LoRA",
            category=CATEGORY,
            **aliases("LoRA loader"),
            description="Applies a LoRA to a model and shows what it was trained on. Refuses a LoRA for another model, which "
            "ComfyUI would load without effect.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the LoRA was trained on."),
                io.Combo.Input(
                    "lora",
                    options=[NONE, DEMO, *folder_paths.get_filename_list("loras")],
                    tooltip="A file in models/loras. (demo) is for the demo model, (none) leaves the model as it is.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="1 applies the LoRA as trained. A larger value exaggerates it.",
                ),
                io.String.Input(
                    "path",
                    default="",
                    optional=True,
                    tooltip="A file or a run's folder in ComfyUI's output folder. It replaces the file chosen above.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the LoRA."),
                io.String.Output(display_name="about", tooltip="What the LoRA was trained on."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, model=None, lora="", strength=1.0, path="") -> Any:
        # Also with a path of its own: the node notes its file then, too, and a change must be counted before.
        changes = CHANGES.count()
        if path is None:
            # The path comes from another node.
            return changes
        file = cls._file(lora, path)
        return (str(file), file.stat().st_mtime_ns if file is not None and file.exists() else 0, strength)

    @staticmethod
    def _file(lora: str, path: str) -> Path | None:
        if path:
            given = inside(path, "path", folder_paths.get_folder_paths("loras"))
            return given / lora_file.FILE_NAME if given.is_dir() else given
        if lora == NONE:
            return None
        return DEMO_FILE if lora == DEMO else Path(folder_paths.get_full_path_or_raise("loras", lora))

    @classmethod
    def execute(cls, model, lora, strength, path="") -> io.NodeOutput:
        file = cls._file(lora, path)
        if file is None or strength == 0:
            return io.NodeOutput(model, "no LoRA", ui=ui.PreviewText("no LoRA"))
        CHANGES.note(file)
        lora = lora_file.read(file)
        about, sound = lora_file.describe(lora)
        if not sound:
            about += "\nNot all checks hold: the LoRA may not have its trained effect."
        return io.NodeOutput(apply_lora(model, lora, strength), about, ui=ui.PreviewText(about))


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_Compare",
            display_name="Compare",
            category=CATEGORY,
            **aliases("before and after", "LoRA test", "side by side"),
            description="Compares base and LoRA on the same seeds, pair by pair under a slider, and in tables of scores, "
            "diversity and drift, which is what the LoRA does to all pictures.",
            inputs=[
                io.Image.Input("base", tooltip="Pictures of the model without the LoRA."),
                io.Image.Input("lora", tooltip="Pictures with the LoRA, from the same seeds in the same order."),
                ScoresSocket.Input("base_scores", optional=True, tooltip="Scores of the base's pictures."),
                ScoresSocket.Input("lora_scores", optional=True, tooltip="Scores of the LoRA's pictures."),
                io.Int.Input(
                    "pairs", default=9, min=1, max=64, tooltip="Number of pairs to show, spread over the batch."
                ),
                io.Boolean.Input(
                    "diversity",
                    default=True,
                    tooltip="Also measures the diversity of the pictures, if EfficientNet-lite0 is installed.",
                ),
                io.Latent.Input(
                    "base_latent", optional=True, tooltip="The base's latents, for the drift of their norm."
                ),
                io.Latent.Input(
                    "lora_latent", optional=True, tooltip="The LoRA's latents, for the drift of their norm."
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="grid",
                    tooltip="Pairs of pictures, the base's on the left and the LoRA's on the right.",
                ),
                io.String.Output(
                    display_name="table", tooltip="Mean scores and diversity of both, and the drift, as Markdown."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, base, lora, pairs, diversity, base_scores=None, lora_scores=None, base_latent=None, lora_latent=None
    ) -> io.NodeOutput:
        if base.shape != lora.shape:
            raise ValueError(
                f"base is a batch of {len(base)} {base.shape[2]}x{base.shape[1]}, lora of {len(lora)} "
                f"{lora.shape[2]}x{lora.shape[1]}: sample both with the same seeds and size"
            )
        for scores, images, name in ((base_scores, base, "base_scores"), (lora_scores, lora, "lora_scores")):
            if scores is not None:
                scores.check(images, name)
        if (base_latent is None) != (lora_latent is None):
            raise ValueError("base_latent and lora_latent go together: connect both or neither")
        for latent, name in ((base_latent, "base_latent"), (lora_latent, "lora_latent")):
            if latent is not None and len(latent["samples"]) != len(base):
                raise ValueError(
                    f"{name} has {len(latent['samples'])} entries for {len(base)} images: connect the latents of these images"
                )
        before, after = pixels(base), pixels(lora)
        chosen = np.unique(np.linspace(0, len(before) - 1, min(pairs, len(before))).round().astype(int))
        columns = columns_of(len(chosen), 2 * before.shape[2] / before.shape[1])
        # The gap inside a pair is narrower than that between pairs.
        thin, wide = (np.full((before.shape[1], width, 3), 255, np.uint8) for width in (1, 8))
        tiles = [np.concatenate([before[i], thin, after[i], wide], 1) for i in chosen]
        rows = [np.stack(tiles[first : first + columns]) for first in range(0, len(tiles), columns)]
        # The output has all pixels.
        zoom = max(1, grids.zoom(before))
        picture: Image.Image = grids.grid(rows, (), zoom)
        picture = picture.crop((0, 0, picture.width - int(zoom) * wide.shape[1], picture.height))
        # Pictures without scores are taken to be of one prompt.
        prompts = [""] * len(before) if base_scores is None else base_scores.prompts
        moved = drift.drifts(statistics(before, base_latent), statistics(after, lora_latent), prompts)
        text = table(cls._lines(base, lora, diversity, base_scores, lora_scores)) + "\n\n" + drift.section(moved)
        report = {
            "aspect": before.shape[2] / before.shape[1],
            "pairs": pairs_report(chosen.tolist(), base, lora, base_scores, lora_scores),
        }
        return io.NodeOutput(to_image(picture), text, ui={"text": (text,), "tmpo_compare": [report]})

    @staticmethod
    def _lines(base: Any, lora: Any, with_diversity: bool, first: Any, second: Any) -> list[tuple[str, float, float]]:
        lines = []
        for name, (before, after) in common_scores(first, second).items():
            lines.append((name, before.mean().item(), after.mean().item()))
        if with_diversity and len(base) > 1 and find_spec("efficientnet_lite_pytorch") is not None:
            before, after = (measure(features=feature_vectors("efficientnet-lite0", images)) for images in (base, lora))
            lines += [(name, before[name], after[name]) for name in before]
        return lines


def columns_of(count: int, aspect: float) -> int:
    """Columns of a grid of `count` tiles of width / height `aspect`: near a square, and few places left empty."""

    def cost(columns: int) -> float:
        rows = -(-count // columns)
        return abs(math.log(columns * aspect / rows)) + columns * rows - count

    return min(range(1, count + 1), key=cost)


def common_scores(first: Scores | None, second: Scores | None) -> dict[str, tuple[Tensor, Tensor]]:
    """The scores that both batches have."""
    if first is None or second is None:
        return {}
    return {name: (values, second.values[name]) for name, values in first.values.items() if name in second.values}


def pairs_report(
    chosen: list[int], base: Tensor, lora: Tensor, first: Scores | None, second: Scores | None
) -> list[dict[str, Any]]:
    """What `web/tmpo_compare.js` shows of each chosen pair: its place, both files and both scores, null if not finite."""
    # Browsers cache by name, so every call needs new names.
    files = [
        ui.ImageSaveHelper.save_images(
            images[chosen][..., :3], f"tmpo_compare_{uuid.uuid4().hex[:8]}", io.FolderType.temp, None, compress_level=1
        )
        for images in (base, lora)
    ]
    scores = common_scores(first, second)
    return [
        {
            "index": index,
            "base": before,
            "lora": after,
            "scores": {name: [finite(v[index].item()) for v in both] for name, both in scores.items()},
        }
        for index, before, after in zip(chosen, *files, strict=True)
    ]


def statistics(images: np.ndarray, latent: Any) -> dict[str, np.ndarray]:
    """Statistics `[N, 1]` of pictures uint8 `[N, H, W, 3]` and, if there are any, of their latents."""
    latents = None if latent is None else latent["samples"].float().cpu().numpy()
    return {name: values[:, None] for name, values in appearance.measure(images, latents).items()}


def table(lines: list[tuple[str, float, float]]) -> str:
    """Markdown: measure, base, LoRA, change."""
    rows = [f"| {name} | {before:.4f} | {after:.4f} | {after - before:+.4f} |" for name, before, after in lines]
    return "\n".join(["| | base | LoRA | change |", "|---|---|---|---|", *rows])
