"""Sharpness: the variance of the Laplacian of a picture's luma. No model; higher is sharper, noise included.

Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy". It is useless as a reward. As an auxiliary score
(GARDO) it shows when pictures with a high reward have become soft or harsh.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

WEIGHTS = "none"

#: ITU-R BT.601.
LUMA = np.array([0.299, 0.587, 0.114])


class SharpnessScorer:
    """Scores by the variance of the Laplacian (4 neighbours, without the border) of luma in 0..255."""

    name = "sharpness"

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None = None) -> Tensor:
        """uint8 RGB `[N, H, W, 3]`, at least 3 by 3 -> float32 `[N]`. The prompts are ignored."""
        luma = np.asarray(images, dtype=np.float64) @ LUMA
        inner = luma[:, 1:-1, 1:-1]
        around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
        return torch.from_numpy((around - 4 * inner).var((1, 2))).float()


def load(device: torch.device, path: str | None = None) -> SharpnessScorer:
    """The scorer, which runs on the CPU."""
    return SharpnessScorer()
