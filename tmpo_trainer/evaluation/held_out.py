"""Evaluates a model: draws pictures of held-out prompts and measures their scores and diversity."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import diversity, flow, tree
from ..backbones.base import Backbone
from ..files import replacing
from ..processes import Processes
from ..prompts.lists import PromptList, about
from ..rewards import ScoredBatch, Scorer, Scoring, factors
from ..settings.errors import one_line
from . import appearance
from .features import Features

#: Called with the number of prompts done since the last call.
Progress = Callable[[int], Any]
#: Fields of `Sampling` that are not in the key of a stored evaluation: batch sizes do not change the result, and a solver is
#: appended to the key, because earlier versions had only Euler's.
APART = ("batch", "decode_batch", "solver")


@dataclass
class Evaluation:
    """The results of one model on P prompts x n images.

    scores: {name: `[P, n]`}. diversity: {name in `diversity.MEASURES`: `[P]`}. latent_std: standard deviation of
    all final latents. images: of the prompts numbered `shown`, uint8 `[len(shown), n, H, W, 3]`. distances: cosine
    distances of the features of a prompt's pictures, `[P, n, n]`. factors: {name: `[P, n]`}, see `rewards.factors`.
    statistics: of each picture, {name in `appearance.NAMES`: `[P, n]`}.
    """

    prompts: list[str]
    scores: dict[str, np.ndarray]
    diversity: dict[str, np.ndarray]
    latent_std: float
    shown: list[int]
    images: np.ndarray
    distances: np.ndarray | None = None
    factors: dict[str, np.ndarray] = field(default_factory=dict)
    statistics: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def measures(self) -> dict[str, np.ndarray]:
        """Scores `[P, n]` and diversities `[P]` by their names in reports."""
        return self.scores | self.diversity


@dataclass(frozen=True)
class Sampling:
    """How evaluation draws pictures: from noise keyed by (seed, prompt, image), so that models share it, and without more.

    The pictures of a prompt's later copies continue the count: k copies x n images are the pictures of one prompt x k n.

    batch: the largest number of latents in one network call. decode_batch: likewise, in one VAE decode.
    """

    steps: int
    seed: int
    guidance: float
    resolution: tuple[int, int]
    batch: int = 128
    decode_batch: int = 64
    solver: flow.Solver = "euler"

    @property
    def about(self) -> str:
        """The steps in words, for a report."""
        return f"{self.steps} steps" + (f" of {self.solver}" if self.solver != "euler" else "")


@dataclass(frozen=True)
class EvaluationProtocol:
    """The settings that evaluations must share to be comparable.

    scorers: (name, scorer) pairs. features: the extractor for diversity of pictures. images: pictures per prompt.
    """

    prompts: PromptList
    scorers: Sequence[tuple[str, Scorer]]
    features: Features
    images: int
    sampling: Sampling


def ordinals(prompts: Sequence[str]) -> list[int]:
    """For each prompt, how many copies of it come before it in the list."""
    seen: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        found.append(seen[prompt])
        seen[prompt] += 1
    return found


def spread(prompts: Sequence[str], count: int) -> list[int]:
    """The indices of at most `count` different prompts, spread evenly over the list."""
    first = [i for i, ordinal in enumerate(ordinals(prompts)) if ordinal == 0]
    return [first[i] for i in np.linspace(0, len(first) - 1, min(count, len(first))).astype(int)]


@torch.no_grad()
def sample(
    backbone: Backbone, prompts: Sequence[str], images: int, how: Sampling, copies: Sequence[int] | None = None
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Draws some prompts at a time, in order: latents `[P', n, ...latent]` and pictures uint8 `[P', n, H, W, 3]`.

    Args:
        copies: the ordinal of each prompt, if the prompts are a part of a longer list; see `ordinals`.

    Raises:
        ValueError: latents or pixels are not finite.
    """
    copies = ordinals(prompts) if copies is None else copies
    sigmas = backbone.sigmas(how.steps, *how.resolution)
    shape = backbone.latent_shape(*how.resolution)
    group = max(1, how.batch // images)
    for first in range(0, len(prompts), group):
        chosen = list(prompts[first : first + group])
        before = [images * copy for copy in copies[first : first + group]]
        sources = [tree.keyed_noise((how.seed, "evaluate", prompt), shape) for prompt in chosen]
        count = len(chosen)

        def noise(step: int, path: tree.NodePath, sources=sources, before=before, count=count) -> Tensor:
            image, prompt = divmod(path[0], count)
            return sources[prompt](step, (before[prompt] + image,)).to(backbone.device)

        plan = tree.TreePlan(how.steps, images, {}).forest(count)
        velocity = backbone.velocity(chosen, how.guidance)
        run = tree.rollout(velocity, noise, sigmas, plan, kernel="ode", solver=how.solver, max_batch=how.batch)
        latents = run.leaves.unflatten(0, (images, count)).transpose(0, 1)
        for prompt, own in zip(chosen, latents, strict=True):
            if not torch.isfinite(own).all():
                raise ValueError(f"the model gave non-finite latents for prompt {prompt!r}")
        pictures = backbone.decode(latents.flatten(0, 1), how.decode_batch)
        yield latents, pictures.reshape(count, images, *pictures.shape[1:])


@dataclass
class _Measured:
    """The measurements of one prompt's pictures, in a form that processes can exchange."""

    scores: dict[str, np.ndarray]
    diversity: dict[str, float]
    latent_sum: float
    latent_square_sum: float
    latent_count: int
    images: np.ndarray | None
    distances: np.ndarray
    factors: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]


def evaluate(
    backbone: Backbone,
    protocol: EvaluationProtocol,
    show: int = 10,
    progress: Progress | None = None,
    processes: Processes | None = None,
    sharded: bool = False,
) -> Evaluation:
    """Draws the pictures of every prompt and measures them. The transformer is used as it stands (LoRA on or off).

    Args:
        show: number of different prompts, spread over the list, whose pictures are kept.
        processes: they share the prompts, and all get the result, or an error if one has one. A picture does not depend on
            the process that draws it.
        sharded: whether the transformer is sharded over them. An error then leaves the others waiting for this one.

    Raises:
        ValueError: latents or scores are not finite.
    """
    prompts = protocol.prompts.texts
    shown, copies = spread(prompts, show), ordinals(prompts)
    processes = processes or Processes()
    # Every process gets the same number, some prompts twice: a sharded transformer needs the same calls on all of them.
    share = -(-len(prompts) // processes.count)
    own = [(processes.rank * share + i) % len(prompts) for i in range(share)]
    measured: dict[int, _Measured] = {}
    drawn = [prompts[i] for i in own], protocol.images, protocol.sampling, [copies[i] for i in own]
    error = None
    try:
        with Scoring(protocol.scorers) as scoring:
            for parts in _one_behind(_measure(protocol, scoring, own, sample(backbone, *drawn))):
                for i, part in zip(own[len(measured) :], parts, strict=False):
                    if i not in shown:
                        part.images = None
                    measured[i] = part
                if progress is not None:
                    progress(len(parts) * processes.count)
    except Exception as caught:
        if sharded:
            raise
        error = caught
    processes.agree(error)
    merged = {i: part for found in processes.gather(measured) for i, part in found.items()}
    return _merge(prompts, [merged[i] for i in range(len(prompts))], shown)


def _measure(
    protocol: EvaluationProtocol, scoring: Scoring, numbers: Sequence[int], drawn: Iterable[tuple[Tensor, np.ndarray]]
) -> Iterator[Callable[[], list[_Measured]]]:
    """Measures the prompts with these numbers, some at a time as `sample` gives them. Each result waits for the scorers."""
    first = 0
    for latents, pictures in drawn:
        prompts = [protocol.prompts.texts[i] for i in numbers[first : first + len(latents)]]
        first += len(latents)
        texts = [prompt for prompt in prompts for _ in range(protocol.images)]
        flat = pictures.reshape(-1, *pictures.shape[2:])
        scored = scoring.batch(texts, about(protocol.prompts.metadata, texts))
        scored.add(flat)
        scored.complete(flat)
        vectors = protocol.features(flat).unflatten(0, (len(prompts), protocol.images))
        exact = latents.double().flatten(1)
        judged = factors(protocol.scorers, flat, texts)
        judged = {name: values.reshape(len(prompts), protocol.images) for name, values in judged.items()}
        found = [
            _Measured(
                {},
                diversity.measure(latents=latents[row], features=vectors[row]),
                exact[row].sum().item(),
                exact[row].square().sum().item(),
                exact[row].numel(),
                pictures[row],
                diversity.cosine_distances(vectors[row]).float().numpy(),
                {name: values[row] for name, values in judged.items()},
                appearance.measure(pictures[row], latents[row].float().cpu().numpy()),
            )
            for row in range(len(prompts))
        ]

        def finish(scored: ScoredBatch = scored, found: list[_Measured] = found) -> list[_Measured]:
            for name, values in scored.scores().items():
                for part, own in zip(found, values.view(len(found), protocol.images).numpy(), strict=True):
                    part.scores[name] = own
            return found

        yield finish


def _one_behind(begun: Iterable[Callable[[], list[_Measured]]]) -> Iterator[list[_Measured]]:
    """The results, each asked for once the next has begun: scorers that wait work while the next pictures are drawn."""
    last = None
    for finish in begun:
        if last is not None:
            yield last()
        last = finish
    if last is not None:
        yield last()


def _merge(prompts: Sequence[str], parts: Sequence[_Measured], shown: list[int]) -> Evaluation:
    count = sum(part.latent_count for part in parts)
    total, square = sum(part.latent_sum for part in parts), sum(part.latent_square_sum for part in parts)
    return Evaluation(
        prompts=list(prompts),
        scores={name: np.stack([part.scores[name] for part in parts]) for name in parts[0].scores},
        diversity={name: np.array([part.diversity[name] for part in parts]) for name in parts[0].diversity},
        latent_std=((square - total**2 / count) / (count - 1)) ** 0.5,
        shown=shown,
        images=np.stack([part.images for part in parts if part.images is not None]),
        distances=np.stack([part.distances for part in parts]),
        factors={name: np.stack([part.factors[name] for part in parts]) for name in parts[0].factors},
        statistics={name: np.stack([part.statistics[name] for part in parts]) for name in appearance.NAMES},
    )


class HeldOut:
    """Evaluates one backbone repeatedly by the same protocol: the base once, then the trained model.

    Args:
        file: keeps the base's evaluation, so that a resumed run does not draw its pictures again; None keeps no file.
        identity: everything else that the base's evaluation depends on. If it changes, the base is evaluated again.
        processes, sharded: see `evaluate`.
    """

    def __init__(
        self,
        backbone: Backbone,
        protocol: EvaluationProtocol,
        file: Path | None,
        identity: Sequence[str],
        processes: Processes | None = None,
        sharded: bool = False,
    ):
        self.backbone, self.protocol, self.file = backbone, protocol, file
        self.processes, self.sharded = processes or Processes(), sharded
        self._base: Evaluation | None = None
        settings = [
            protocol.prompts.texts,
            protocol.prompts.metadata,
            [name for name, _ in protocol.scorers],
            protocol.features.name,
            protocol.images,
            {key: value for key, value in asdict(protocol.sampling).items() if key not in APART},
            list(identity),
        ]
        if protocol.sampling.solver != "euler":
            settings.append(protocol.sampling.solver)
        copies = ordinals(protocol.prompts.texts)
        if any(copies):
            # In earlier versions the copies of a prompt had the same noise.
            settings.append(copies)
        self._key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def measure(self, progress: Progress | None = None) -> Evaluation:
        """Evaluates the transformer as it stands."""
        return evaluate(self.backbone, self.protocol, progress=progress, processes=self.processes, sharded=self.sharded)

    def base(self, progress: Progress | None = None) -> Evaluation:
        """The base model: from memory, from `file`, or evaluated now with the transformer as it stands (LoRA off)."""
        if self._base is None:
            self._base = self.stored(self.file, progress)
        elif progress is not None:
            progress(len(self.protocol.prompts.texts))
        return self._base

    def stored(self, file: Path | None, progress: Progress | None = None, lora: Path | None = None) -> Evaluation:
        """Reads an evaluation with the same settings from `file`; otherwise measures one and writes the file.

        Args:
            lora: file of the evaluated LoRA. A stored evaluation of another LoRA is not used.
        """
        key = self._key if lora is None else f"{self._key} {hashlib.sha256(lora.read_bytes()).hexdigest()}"
        main = self.processes.main
        found = self.processes.broadcast(_read(file, key, self.protocol) if file is not None and main else None)
        if found is not None:
            if progress is not None:
                progress(len(self.protocol.prompts.texts))
            return found
        measured = self.measure(progress)
        error = None
        if file is not None and main:
            try:
                _write(file, measured, key)
            except OSError as caught:
                # The file only saves time.
                notice = f"{file} cannot be written ({one_line(caught)}): the next command measures this again"
                tqdm.write(f"tmpo_trainer: {notice}", file=sys.stderr)
            except Exception as caught:
                error = caught
        self.processes.agree(error)
        return measured


def _read(file: Path, key: str, protocol: EvaluationProtocol) -> Evaluation | None:
    """The stored evaluation; None if the file is missing or damaged, has another key or lacks a measure."""
    if not file.exists():
        return None
    try:
        with np.load(file) as stored:
            if str(stored["key"]) != key:
                return None
            return Evaluation(
                prompts=protocol.prompts.texts,
                scores={name: stored[f"score/{name}"] for name, _ in protocol.scorers},
                diversity={name: stored[f"diversity/{name}"] for name in diversity.MEASURES},
                latent_std=float(stored["latent_std"]),
                shown=stored["shown"].tolist(),
                images=stored["images"],
                distances=stored["distances"],
                factors={name.removeprefix("factor/"): stored[name] for name in stored if name.startswith("factor/")},
                statistics={name: stored[f"statistics/{name}"] for name in appearance.NAMES},
            )
    except KeyError as error:
        notice = f"{file.name} is from another version ({one_line(error.args[0])}): its pictures are drawn again"
        tqdm.write(f"tmpo_trainer: {notice}", file=sys.stderr)
        return None
    except Exception:
        # The file only saves time: a damaged one is replaced, and numpy and zipfile have many errors for those.
        return None


def _write(file: Path, evaluation: Evaluation, key: str) -> None:
    arrays = {
        "key": np.array(key),
        "latent_std": np.array(evaluation.latent_std),
        "shown": np.array(evaluation.shown),
        "images": evaluation.images,
        "distances": evaluation.distances,
        **{f"factor/{name}": values for name, values in evaluation.factors.items()},
        **{f"score/{name}": values for name, values in evaluation.scores.items()},
        **{f"diversity/{name}": values for name, values in evaluation.diversity.items()},
        **{f"statistics/{name}": values for name, values in evaluation.statistics.items()},
    }
    with replacing(file) as temporary:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
