"""HPS-v2.1: human preference as a plain cosine, about .2 to .37. Wu et al. 2023, arXiv:2306.09341."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from ..errors import ConfigError
from .clip import TOKENIZER, ClipTowers, load_tokenizer, pad
from .weights import Source, existing, fill, hub_folder, state

SOURCES: tuple[Source, ...] = (("xswu/HPSv2", ("HPS_v2.1_compressed.pt",)), TOKENIZER)
#: Of a block, from open_clip's names to transformers'. Queries, keys and values are one tensor there.
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OUTSIDE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
#: Multiplied from the other side.
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names of a CLIP model to transformers'. Unknown keys stay as they are."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key in OUTSIDE:
            found[OUTSIDE[key]] = value
        elif key in TRANSPOSED:
            found[TRANSPOSED[key]] = value.T
        elif "resblocks." in key:
            tower = "vision_model" if key.startswith("visual.") else "text_model"
            number, _, name = key.split("resblocks.")[1].partition(".")
            block = f"{tower}.encoder.layers.{number}"
            module, _, ending = name.rpartition(".")
            if name.startswith("attn.in_proj_"):
                for letter, part in zip("qkv", value.chunk(3), strict=True):
                    found[f"{block}.self_attn.{letter}_proj.{name.removeprefix('attn.in_proj_')}"] = part
            else:
                found[f"{block}.{BLOCK.get(module, module)}.{ending}"] = value
        # The causal mask, which some checkpoints carry.
        elif key != "attn_mask":
            found[key] = value
    return found


def config_of(tensors: Mapping[str, Tensor], image_size: int = 224) -> CLIPConfig:
    """The sizes of a checkpoint in open_clip's names. Heads are 64 wide in the text tower and 80 in that of ViT-H."""
    layers = [
        1 + max(int(k.split("resblocks.")[1].split(".")[0]) for k in tensors if k.startswith(start))
        for start in ("transformer.resblocks.", "visual.transformer.resblocks.")
    ]
    text, vision = tensors["ln_final.weight"].shape[0], tensors["visual.ln_pre.weight"].shape[0]
    embedding = tensors["token_embedding.weight"].shape[0]
    return CLIPConfig(
        projection_dim=tensors["text_projection"].shape[1],
        text_config=CLIPTextConfig(
            vocab_size=embedding,
            hidden_size=text,
            intermediate_size=4 * text,
            num_hidden_layers=layers[0],
            num_attention_heads=text // 64,
            max_position_embeddings=tensors["positional_embedding"].shape[0],
            hidden_act="gelu",
            bos_token_id=embedding - 2,
            eos_token_id=embedding - 1,
        ).to_dict(),
        vision_config=CLIPVisionConfig(
            hidden_size=vision,
            intermediate_size=4 * vision,
            num_hidden_layers=layers[1],
            num_attention_heads=vision // (80 if vision == 1280 else 64),
            image_size=image_size,
            patch_size=tensors["visual.conv1.weight"].shape[-1],
            hidden_act="gelu",
        ).to_dict(),
    )


def clean(prompt: str) -> str:
    """open_clip's cleaning: broken encodings, HTML entities, white space, lower case."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()


class HpsScorer:
    """The cosine of picture and prompt."""

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
        path: the checkpoint, .pt or .safetensors in open_clip's names, in place of the hub's; a tokenizer beside it is
            used in place of the hub's.

    Raises:
        ConfigError: the weights cannot be had or are others.
    """
    file = existing("hpsv2", path) if path else hub_folder("hpsv2", SOURCES[0]) / SOURCES[0][1][0]
    tensors = state("hpsv2", file, "state_dict")
    return HpsScorer(ClipTowers(build(file, tensors), load_tokenizer("hpsv2", file.parent), pad(224), device, clean))


def build(file: Path, tensors: Mapping[str, Tensor]) -> CLIPModel:
    """A transformers CLIPModel from a checkpoint in open_clip's names. Raises ConfigError if it is none."""
    try:
        config = config_of(tensors)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"reward hpsv2: {file} is not its checkpoint (at {error})") from None
    model = CLIPModel(config)
    mapped = {key: value.float() for key, value in from_open_clip(tensors).items()}
    # Positions are counted there, not stored.
    own = {key for key in model.state_dict() if key.endswith("position_ids")}
    fill("hpsv2", file, model, mapped | {key: model.state_dict()[key] for key in own})
    return model
