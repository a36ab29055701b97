"""Base against trained model on held-out prompts: scores, diversity, paired intervals and the verdict."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from .. import diversity, tree
from ..backbones.base import Backbone
from ..prompts.lists import PromptList, about, as_list
from ..rewards import Scorer, score_all
from .features import Features

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Evaluation:
    """One model on P prompts x n images.

    scores: {name: `[P, n]`}. lgmd, cosine: `[P]`. latent_std: of all final latents. images: of the prompts numbered
    `shown`, uint8 `[len(shown), n, H, W, 3]`.
    """

    prompts: list[str]
    scores: dict[str, np.ndarray]
    lgmd: np.ndarray
    cosine: np.ndarray
    latent_std: float
    shown: list[int]
    images: np.ndarray


@dataclass(frozen=True)
class Sampling:
    """How evaluation draws pictures: plain Euler steps from noise keyed by (seed, prompt, image), so that pairs compare.

    batch: most latents in one network call. decode_batch: most latents in one VAE decode.
    """

    steps: int
    seed: int
    guidance: float
    resolution: tuple[int, int]
    batch: int = 128
    decode_batch: int = 64


@torch.no_grad()
def sample(
    backbone: Backbone, prompts: Sequence[str], images: int, how: Sampling
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Latents `[P', n, ...latent]` and pictures uint8 `[P', n, H, W, 3]`, some prompts at a time, in order."""
    sigmas = backbone.sigmas(how.steps, *how.resolution)
    shape = backbone.latent_shape(*how.resolution)
    group = max(1, how.batch // images)
    for first in range(0, len(prompts), group):
        chosen = list(prompts[first : first + group])
        sources = [tree.keyed_noise((how.seed, "evaluate", prompt), shape) for prompt in chosen]
        count = len(chosen)

        def noise(step: int, path: tree.Path, sources=sources, count=count) -> Tensor:
            image, prompt = divmod(path[0], count)
            return sources[prompt](step, (image,)).to(backbone.device)

        plan = tree.TreePlan(how.steps, images, {}).forest(count)
        velocity = backbone.velocity(chosen, how.guidance)
        run = tree.rollout(velocity, noise, sigmas, plan, kernel="ode", max_batch=how.batch)
        latents = run.leaves.unflatten(0, (images, count)).transpose(0, 1)
        pictures = backbone.decode(latents.flatten(0, 1), how.decode_batch)
        yield latents, pictures.reshape(count, images, *pictures.shape[1:])


@dataclass
class _Measured:
    """What is kept of one prompt's pictures, so that processes can share the prompts."""

    scores: dict[str, np.ndarray]
    lgmd: float
    cosine: float
    latent_sum: float
    latent_square_sum: float
    latent_count: int
    images: np.ndarray | None


def evaluate(
    backbone: Backbone,
    prompts: Sequence[str] | PromptList,
    scorers: Sequence[tuple[str, Scorer]],
    features: Callable[[np.ndarray], Tensor],
    images: int,
    how: Sampling,
    show: int = 10,
    progress: Callable[[int], Any] | None = None,
    accelerator: Accelerator | None = None,
) -> Evaluation:
    """Draws `images` pictures per prompt and measures them. The transformer is used as it stands (LoRA on or off).

    Args:
        scorers: (name, scorer) pairs. features: uint8 `[N, H, W, 3]` -> `[N, D]`, for cosine diversity.
        show: of how many prompts, spread over the list, the pictures are kept.
        progress: called with the number of prompts done since the last call.
        accelerator: of several processes, which then share the prompts and all get the result. A picture is the same
            whichever process draws it.
    """
    metadata, prompts = as_list(prompts).metadata, as_list(prompts).texts
    shown = sorted(set(np.linspace(0, len(prompts) - 1, min(show, len(prompts))).astype(int).tolist()))
    processes, rank = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    # As many for every process, some twice if need be: a sharded transformer wants the same calls everywhere.
    share = -(-len(prompts) // processes)
    own = [(rank * share + i) % len(prompts) for i in range(share)]
    measured: dict[int, _Measured] = {}
    for latents, pictures in sample(backbone, [prompts[i] for i in own], images, how):
        chosen = own[len(measured) : len(measured) + len(latents)]
        for row, i in enumerate(chosen):
            if not torch.isfinite(latents[row]).all():
                raise ValueError(f"the model gave non-finite latents for prompt {prompts[i]!r}")
        texts = [prompts[i] for i in chosen for _ in range(images)]
        flat = pictures.reshape(-1, *pictures.shape[2:])
        scores = {
            name: values.view(len(latents), images).numpy()
            for name, values in score_all(scorers, flat, texts, about(metadata, texts)).items()
        }
        vectors = features(flat).unflatten(0, (len(latents), images))
        exact = latents.double().flatten(1)
        for row, i in enumerate(chosen):
            measured[i] = _Measured(
                {name: values[row] for name, values in scores.items()},
                diversity.lgmd(latents[row]).item(),
                diversity.cosine_diversity(vectors[row]).item(),
                exact[row].sum().item(),
                exact[row].square().sum().item(),
                exact[row].numel(),
                pictures[row] if i in shown else None,
            )
        if progress is not None:
            progress(len(latents) * processes)
    everyone = gather_object([measured]) if processes > 1 else [measured]
    merged = {i: part for measured in everyone for i, part in measured.items()}
    parts = [merged[i] for i in range(len(prompts))]
    count = sum(part.latent_count for part in parts)
    total, square = sum(part.latent_sum for part in parts), sum(part.latent_square_sum for part in parts)
    return Evaluation(
        prompts=list(prompts),
        scores={name: np.stack([part.scores[name] for part in parts]) for name, _ in scorers},
        lgmd=np.array([part.lgmd for part in parts]),
        cosine=np.array([part.cosine for part in parts]),
        latent_std=((square - total**2 / count) / (count - 1)) ** 0.5,
        shown=shown,
        images=np.stack([part.images for part in parts if part.images is not None]),
    )


class HeldOut:
    """Measures one backbone on the same held-out prompts and noise again and again: the base once, then what it became.

    Args:
        file: where the base's figures are kept, so that a resumed run does not draw its pictures again; None for nowhere.
        identity: whatever else the base's figures depend on: with another one they are measured anew.
        others: see `evaluate`.
    """

    def __init__(
        self,
        file: Path | None,
        backbone: Backbone,
        prompts: Sequence[str] | PromptList,
        scorers: Sequence[tuple[str, Scorer]],
        features: Features,
        images: int,
        how: Sampling,
        accelerator: Accelerator | None = None,
        identity: Sequence[str] = (),
    ):
        self.accelerator = accelerator
        self.file, self.backbone, self.prompts, self.scorers = file, backbone, as_list(prompts), list(scorers)
        self.features, self.images, self.how = features, images, how
        self._base: Evaluation | None = None
        names = [name for name, _ in scorers]
        settings = [
            self.prompts.texts,
            self.prompts.metadata,
            names,
            features.name,
            images,
            # How much is done at a time does not matter.
            {key: value for key, value in asdict(how).items() if key not in ("batch", "decode_batch")},
            list(identity),
        ]
        self._key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def measure(self, progress: Callable[[int], Any] | None = None) -> Evaluation:
        """The transformer as it stands."""
        return evaluate(
            self.backbone,
            self.prompts,
            self.scorers,
            self.features,
            self.images,
            self.how,
            progress=progress,
            accelerator=self.accelerator,
        )

    def base(self, progress: Callable[[int], Any] | None = None) -> Evaluation:
        """The base model: from memory, from `file`, or measured now with the transformer as it stands (LoRA off)."""
        if self._base is not None:
            if progress is not None:
                progress(len(self.prompts.texts))
            return self._base
        self._base = self.stored(self.file, progress)
        return self._base

    def stored(
        self, file: Path | None, progress: Callable[[int], Any] | None = None, lora: Path | None = None
    ) -> Evaluation:
        """What a file holds of an earlier measurement with the same settings; else `measure`, and the file is written.

        Args:
            lora: the file of the LoRA that is measured: a measurement of another one does not count.
        """
        key = self._key if lora is None else f"{self._key} {hashlib.sha256(lora.read_bytes()).hexdigest()}"
        told = [self._read(file, key) if self.accelerator is None or self.accelerator.is_main_process else None]
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            broadcast_object_list(told)
        if told[0] is None:
            found = self.measure(progress)
            self._write(file, found, key)
            return found
        if progress is not None:
            progress(len(self.prompts.texts))
        return told[0]

    def _read(self, file: Path | None, key: str) -> Evaluation | None:
        if file is None or not file.exists():
            return None
        try:
            with np.load(file) as stored:
                if str(stored["key"]) != key:
                    return None
                return Evaluation(
                    prompts=self.prompts.texts,
                    scores={name: stored[f"score/{name}"] for name, _ in self.scorers},
                    lgmd=stored["lgmd"],
                    cosine=stored["cosine"],
                    latent_std=float(stored["latent_std"]),
                    shown=stored["shown"].tolist(),
                    images=stored["images"],
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            # Cut short: it is only kept to save time.
            return None

    def _write(self, file: Path | None, found: Evaluation, key: str) -> None:
        if file is None or (self.accelerator is not None and not self.accelerator.is_main_process):
            return
        temporary = file.with_name(f".{file.name}")
        with temporary.open("wb") as out:
            np.savez_compressed(
                out,
                key=np.array(key),
                lgmd=found.lgmd,
                cosine=found.cosine,
                latent_std=np.array(found.latent_std),
                shown=np.array(found.shown),
                images=found.images,
                **{f"score/{name}": values for name, values in found.scores.items()},  # type: ignore[arg-type]
            )
        temporary.replace(file)
