"""Scorers. Each maps images and prompts to one float32 number per image; one file per scorer."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tmpo_trainer import objectives
from tmpo_trainer.config import ConfigError, suggest


class Scorer(Protocol):
    """What training, evaluation and the nodes expect of a reward."""

    name: str

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None = None) -> Tensor:
        """uint8 RGB `[N, H, W, 3]` and N prompts -> float32 `[N]`, higher is better. Never 0 for a failure: raise."""
        ...


class Parked:
    """A scorer whose weights are on the device only while it scores.

    Args:
        scorer: with a method `to(device)`. device: where it scores; in between it is on the CPU.
    """

    def __init__(self, scorer: Any, device: torch.device):
        self.name, self._scorer, self._device = scorer.name, scorer, device
        scorer.to(torch.device("cpu"))

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None = None) -> Tensor:
        """As the scorer does."""
        self._scorer.to(self._device)
        try:
            return self._scorer.score(images, prompts, metadata)
        finally:
            self._scorer.to(torch.device("cpu"))


NAMES = ("shapes", "pickscore", "hpsv2", "imagereward", "clipscore")
#: Of the presets, but not here yet.
PLANNED = ("ocr", "geneval", "remote")


def check_name(name: str) -> None:
    """Raises ConfigError for a scorer that is not known."""
    if name in PLANNED:
        known = ", ".join(NAMES)
        raise ConfigError(
            f"reward {name} is not part of this version yet (there are {known}, and your own from Python)"
        )
    if name not in NAMES:
        raise ConfigError(f"unknown reward {name}{suggest(name, NAMES)} (known: {', '.join(NAMES)})")


def load_scorer(name: str, device: torch.device | None = None, path: str | None = None) -> Scorer:
    """A scorer by its name.

    Args:
        device: where it runs; by default the CPU. path: of its weights, in place of the hub's.

    Raises:
        ConfigError: it is not known, or its weights cannot be had.
    """
    check_name(name)
    if name == "shapes":
        from tmpo_trainer.rewards.shapes import ShapesScorer

        if path:
            raise ConfigError("--reward-models shapes=...: shapes has no weights, leave it out")
        return ShapesScorer()
    module = importlib.import_module(f"tmpo_trainer.rewards.{name}")
    return module.load(device or torch.device("cpu"), path)


def check_finite(name: str, scores: Tensor, prompts: Sequence[str]) -> Tensor:
    """Raises ValueError, naming the scorer and the first prompt to blame, unless all scores are finite numbers."""
    bad = torch.nonzero(~torch.isfinite(scores)).flatten()
    if len(bad):
        i = int(bad[0])
        raise ValueError(f"reward {name} gave {scores[i].item()} for image {i} of prompt {prompts[i]!r}")
    return scores


def combine(scores: dict[str, Tensor], weights: Sequence[float] | None, norm: str) -> Tensor:
    """Weighted sum of rewards `[K]` each; with `zscore` normalised within the group first. `[K]`."""
    factors = weights or [1.0] * len(scores)
    parts = [objectives.zscore(values) if norm == "zscore" else values for values in scores.values()]
    return torch.stack([factor * part for factor, part in zip(factors, parts, strict=True)]).sum(0)
