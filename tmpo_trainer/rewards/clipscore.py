"""CLIP score on Flow-GRPO's scale: exp(logit_scale) * cos / 30 with OpenAI's ViT-L/14 and its own preprocessing, about .6 to 1.

Other papers call the plain cosine, or 2.5 max(cos, 0), by the same name.
"""

from __future__ import annotations

from math import floor

import torch

from .parts.clip import TOKENIZER, ClipScorer
from .parts.openclip import load_towers
from .parts.weights import Source, existing, hub_folder

SOURCES: tuple[Source, ...] = (("openai/clip-vit-large-patch14", ("config.json", "model.safetensors")), TOKENIZER)


def load(device: torch.device, path: str | None = None) -> ClipScorer:
    """The scorer. A `path` replaces the hub's model, see `openclip.load_towers`. Raises ConfigError without weights."""
    folder = existing("clipscore", path) if path else hub_folder("clipscore", SOURCES[0])
    return ClipScorer("clipscore", load_towers("clipscore", folder, device, floor), divisor=30)
