"""ImageReward: human preference, about -2 to 2. Xu et al. 2023, arXiv:2304.05977.

The network is a BLIP whose text encoder attends to the picture. Its first token goes through a small head. The network is
built from transformers' parts, because the original package does not work with current versions of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from ..hub import checked_tokenizer
from ..settings.errors import ConfigError
from .parts.clip import BATCH, crop
from .parts.weights import Source, existing, fill, hub_folder, read_tensors

SOURCES: tuple[Source, ...] = (
    ("zai-org/ImageReward", ("ImageReward.pt",)),
    ("google-bert/bert-base-uncased", ("tokenizer_config.json", "vocab.txt", "tokenizer.json")),
)
#: Mean and standard deviation of the raw scores on the authors' data.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
LENGTH = 35
#: Rows of the embedding: BERT's 30,522 words and BLIP's two.
WORDS = 30524
VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks": "encoder.layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}


class ImageReward(torch.nn.Module):
    """The network: pixels `[N, 3, 224, 224]`, tokens `[N, 35]` and their mask -> raw score `[N]`."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig, widths: Sequence[int] = (1024, 128, 64, 16, 1)):
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        layers: list[torch.nn.Module] = []
        size = text.hidden_size
        for i, width in enumerate(widths):
            layers.append(torch.nn.Linear(size, width))
            # In training, dropout was here. The head has no activations.
            if i < len(widths) - 2:
                layers.append(torch.nn.Identity())
            size = width
        self.head = torch.nn.Sequential(*layers)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        seen = self.vision(pixels).last_hidden_state
        read = self.text(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], device=seen.device, dtype=torch.long),
            is_decoder=False,
        ).last_hidden_state
        return self.head(read[:, 0].float()).squeeze(-1)


def from_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of the original checkpoint to the names in `ImageReward`."""
    found = {}
    for key, value in tensors.items():
        if key.startswith("blip.visual_encoder."):
            name = key.removeprefix("blip.visual_encoder.")
            for theirs, ours in VISION.items():
                name = name.replace(theirs, ours)
            # This comes after the loop, because norm1 and norm2 begin with the same word.
            name = f"post_layernorm.{name.removeprefix('norm.')}" if name.startswith("norm.") else name
            found[f"vision.{name}"] = value
        elif key.startswith("blip.text_encoder."):
            if not key.endswith("position_ids"):
                found[f"text.{key.removeprefix('blip.text_encoder.')}"] = value
        elif key.startswith("mlp.layers."):
            found[f"head.{key.removeprefix('mlp.layers.')}"] = value
    return found


class ImageRewardScorer:
    """(raw score - mean) / std, with the authors' constants.

    Args:
        device: where it runs, in float16 on a GPU; the head is float32.
    """

    name = "imagereward"

    def __init__(self, network: ImageReward, tokenizer: Any, device: torch.device, batch: int = BATCH):
        self.network, self.tokenizer, self.batch = network.eval().requires_grad_(False), tokenizer, batch
        self._dtype = torch.float16 if device.type == "cuda" else torch.float32
        size: Any = network.vision.config.image_size
        self._prepare = crop(size)
        self.to(device)

    def to(self, device: torch.device) -> None:
        self.device = device
        # First, so that float32 weights never take the device's memory.
        for tower in (self.network.vision, self.network.text):
            torch.nn.Module.to(tower, self._dtype)
        self.network.to(device)

    @torch.no_grad()
    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None = None) -> Tensor:
        """uint8 RGB `[N, H, W, 3]` and N prompts -> float32 `[N]`."""
        found = []
        for first in range(0, len(images), self.batch):
            chosen = slice(first, first + self.batch)
            pixels = self._prepare([Image.fromarray(image) for image in images[chosen]])
            text = self.tokenizer(
                list(prompts[chosen]), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
            )
            raw = self.network(
                pixels.to(self.device, self._dtype),
                text["input_ids"].to(self.device),
                text["attention_mask"].to(self.device),
            )
            found.append((raw.float() - MEAN) / STD)
        return torch.cat(found).cpu()


def load(device: torch.device, path: str | None = None) -> ImageRewardScorer:
    """The scorer.

    Args:
        path: the checkpoint, .pt or .safetensors in the original names, in place of the hub's; a tokenizer beside it is
            used in place of the hub's.

    Raises:
        ConfigError: the weights cannot be found or downloaded, or are not this scorer's.
    """
    file = existing("imagereward", path) if path else hub_folder("imagereward", SOURCES[0]) / SOURCES[0][1][0]
    tensors = {key: value.float() for key, value in from_original(read_tensors("imagereward", file)).items()}
    if not tensors:
        raise ConfigError(f"reward imagereward: {file} is not its checkpoint (no blip.* keys)")
    vision = BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )
    text = BlipTextConfig(
        vocab_size=WORDS,
        hidden_size=768,
        encoder_hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        layer_norm_eps=1e-12,
        hidden_act="gelu",
    )
    folder = file.parent
    if not (folder / "tokenizer_config.json").is_file():
        folder = hub_folder("imagereward", SOURCES[1])
    tokenizer = checked_tokenizer(BertTokenizer, "reward imagereward", folder, WORDS)
    network = ImageReward(vision, text)
    fill("imagereward", file, network, tensors)
    return ImageRewardScorer(network, tokenizer, device)
