"""What judges the pictures of a benchmark: a scorer of PickScore's size with random weights, and cheap features."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tmpo_trainer.demo.build import make_tokenizer
from tmpo_trainer.rewards.parts.clip import ClipScorer, ClipTowers, crop

#: PickScore: CLIP ViT-H/14. Keys are those of transformers' configs of the two towers.
FULL: tuple[dict[str, Any], dict[str, Any], int] = (
    {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "image_size": 224,
     "patch_size": 14},
    1024,
)  # fmt: skip
#: The same share of a network call on the CPU's reduced models, about 2%.
REDUCED: tuple[dict[str, Any], dict[str, Any], int] = (
    {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2},
    {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
     "patch_size": 8},
    64,
)  # fmt: skip


class PickScoreSized(ClipScorer):
    """A reward that costs what PickScore does: `--reward benchmarks.scoring:PickScoreSized`. On a CPU it is much smaller."""

    def __init__(self, device: torch.device):
        text, vision, width = FULL if device.type == "cuda" else REDUCED
        tokenizer = make_tokenizer()
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        text = {"vocab_size": 49408, "max_position_embeddings": 77, **special, **text}
        dtype = torch.get_default_dtype()
        # The precision in which ClipTowers keeps them.
        torch.set_default_dtype(torch.float16 if device.type == "cuda" else torch.float32)
        try:
            with torch.device(device):
                model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
        finally:
            torch.set_default_dtype(dtype)
        prepare = crop(vision["image_size"], offset=math.floor)
        super().__init__("pickscore-sized", ClipTowers(model, tokenizer, prepare, device))


class Thumbnail:
    """Features of pictures that cost nothing: 4x4 means. Flow-GRPO's and GARDO's cost is then that of the method."""

    name = "thumbnail"

    def __call__(self, images: np.ndarray) -> Tensor:
        """uint8 RGB `[N, H, W, 3]` -> float32 `[N, 48]`."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1)
