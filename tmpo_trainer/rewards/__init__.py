"""Scorers. Each maps images and prompts to one float32 number per image; one file per scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tmpo_trainer import objectives
from tmpo_trainer.config import ConfigError


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


def load_scorer(name: str) -> Scorer:
    """A scorer by its name. Raises ConfigError that lists the known ones."""
    if name == "shapes":
        from tmpo_trainer.rewards.shapes import ShapesScorer

        return ShapesScorer()
    if name in ("pickscore", "hpsv2", "imagereward", "clipscore", "ocr", "geneval", "remote"):
        raise ConfigError(f"reward {name} is not part of this version yet: use shapes, or your own Scorer from Python")
    raise ConfigError(f"unknown reward {name} (known: shapes)")


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
