"""PickScore: human preference, about 20 to 24. Kirstain et al. 2023, arXiv:2305.01569."""

from __future__ import annotations

import torch

from .clip import TOKENIZER, ClipScorer, load_clip
from .weights import Source, existing, hub_folder

SOURCES: tuple[Source, ...] = (("yuvalkirstain/PickScore_v1", ("config.json", "model.safetensors")), TOKENIZER)


#: What Flow-GRPO divides the score by, to bring it near 1. A z-score within the group undoes it.
FLOW_SCALE = 26.0


def load(device: torch.device, path: str | None = None, scale: str = "raw") -> ClipScorer:
    """exp(logit_scale) * cos of a ViT-H/14 CLIP.

    Args:
        path: a folder with the model, or its model.safetensors, in place of the hub's.
        scale: `raw`, or `flow` for the score over FLOW_SCALE.

    Raises:
        ConfigError: the weights cannot be had.
    """
    folder = existing("pickscore", path) if path else hub_folder("pickscore", SOURCES[0])
    return ClipScorer("pickscore", load_clip("pickscore", folder, device), FLOW_SCALE if scale == "flow" else 1.0)
