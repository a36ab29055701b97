"""HPS-v2.1: human preference as a plain cosine, about .2 to .37. Wu et al. 2023, arXiv:2306.09341."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .parts.clip import TOKENIZER, ClipTowers, pad
from .parts.openclip import load_checkpoint
from .parts.weights import Source, existing, hub_folder

PACKAGES = {"ftfy": "ftfy"}
SOURCES: tuple[Source, ...] = (("xswu/HPSv2", ("HPS_v2.1_compressed.pt",)), TOKENIZER)


class HpsScorer:
    """Scores by the cosine between picture and prompt."""

    name = "hpsv2"

    def __init__(self, towers: ClipTowers):
        self.towers = towers

    def to(self, device: torch.device) -> None:
        self.towers.to(device)

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None = None) -> Tensor:
        """uint8 RGB `[N, H, W, 3]` and N prompts -> float32 `[N]`."""
        return self.towers.cosine(images, prompts)


def load(device: torch.device, path: str | None = None) -> HpsScorer:
    """The scorer.

    Args:
        path: the checkpoint, .pt or .safetensors in open_clip's names, in place of the hub's.

    Raises:
        ConfigError: the weights cannot be found or downloaded, or are not this scorer's.
    """
    file = existing("hpsv2", path) if path else hub_folder("hpsv2", SOURCES[0]) / SOURCES[0][1][0]
    return HpsScorer(load_checkpoint("hpsv2", file, device, pad))
