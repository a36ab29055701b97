"""PickScore: human preference, about 20 to 24. Kirstain et al. 2023, arXiv:2305.01569."""

from __future__ import annotations

from math import floor
from typing import Literal

import torch

from .parts.clip import TOKENIZER, ClipScorer
from .parts.openclip import load_towers
from .parts.weights import Source, existing, hub_folder

OPTIONS = ("pickscore_scale",)
SOURCES: tuple[Source, ...] = (("yuvalkirstain/PickScore_v1", ("config.json", "model.safetensors")), TOKENIZER)

#: `raw` is the score as its authors print it. `flow` is that divided by 26, about 1, as in Flow-GRPO.
Scale = Literal["raw", "flow"]
DIVISORS: dict[Scale, float] = {"raw": 1, "flow": 26}


def load(device: torch.device, path: str | None = None, pickscore_scale: Scale = "raw") -> ClipScorer:
    """exp(logit_scale) * cos of a ViT-H/14 CLIP.

    Args:
        path: a folder or file with the model, see `openclip.load_towers`, in place of the hub's.
        pickscore_scale: one of DIVISORS.

    Raises:
        ConfigError: the weights cannot be found or downloaded, or are not this scorer's.
    """
    folder = existing("pickscore", path) if path else hub_folder("pickscore", SOURCES[0])
    return ClipScorer("pickscore", load_towers("pickscore", folder, device, floor), DIVISORS[pickscore_scale])
