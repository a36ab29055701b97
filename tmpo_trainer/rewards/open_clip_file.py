"""CLIP models in checkpoints of open_clip: run by open_clip where it is installed and works, by transformers elsewhere.

open_clip needs torchvision, which nothing else here does, so no module imports it. Both ways give the same features (a test
holds them to 1e-5), and both get the pictures as `clip.crop` or `clip.pad` prepare them.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ftfy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from ..errors import ConfigError
from .clip import ClipTowers, Prepare, load_tokenizer
from .weights import fill, state

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


def config_of(tensors: Mapping[str, Tensor], activation: str = "gelu") -> CLIPConfig:
    """The sizes of a checkpoint in open_clip's names. Heads are 64 wide in the text tower and 80 in that of ViT-H."""
    layers = []
    for start in ("transformer.resblocks.", "visual.transformer.resblocks."):
        numbers = [int(k.split("resblocks.")[1].split(".")[0]) for k in tensors if k.startswith(start)]
        if not numbers:
            raise KeyError(f"{start}0")
        layers.append(1 + max(numbers))
    text, vision = tensors["ln_final.weight"].shape[0], tensors["visual.ln_pre.weight"].shape[0]
    embedding, patch = tensors["token_embedding.weight"].shape[0], tensors["visual.conv1.weight"].shape[-1]
    patches = tensors["visual.positional_embedding"].shape[0] - 1
    return CLIPConfig(
        projection_dim=tensors["text_projection"].shape[1],
        text_config=CLIPTextConfig(
            vocab_size=embedding,
            hidden_size=text,
            intermediate_size=4 * text,
            num_hidden_layers=layers[0],
            num_attention_heads=text // 64,
            max_position_embeddings=tensors["positional_embedding"].shape[0],
            hidden_act=activation,
            bos_token_id=embedding - 2,
            eos_token_id=embedding - 1,
        ).to_dict(),
        vision_config=CLIPVisionConfig(
            hidden_size=vision,
            intermediate_size=4 * vision,
            num_hidden_layers=layers[1],
            num_attention_heads=vision // (80 if vision == 1280 else 64),
            image_size=math.isqrt(patches) * patch,
            patch_size=patch,
            hidden_act=activation,
        ).to_dict(),
    )


def clean(prompt: str) -> str:
    """open_clip's cleaning: broken encodings, HTML entities, white space, lower case."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()


class OpenClipTowers(ClipTowers):
    """A frozen model of open_clip, with its tokenizer."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(list(prompts)).to(self.device))


def installed() -> Any | None:
    """The module open_clip, or None where it is not installed or cannot be imported."""
    try:
        import open_clip
    except Exception:
        # Mostly torchvision: not there, or built for another torch, which has errors of many kinds.
        return None
    return open_clip


def is_open_clip(file: Path) -> bool:
    """Whether a file holds a CLIP model in open_clip's names. False for one that cannot be read."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                return "visual.conv1.weight" in opened.keys()  # noqa: SIM118
        return "visual.conv1.weight" in state("", file, "state_dict")
    except (ConfigError, OSError, SafetensorError):
        return False


def load_open_clip(
    scorer: str, file: Path, prepare: Prepare, device: torch.device, activation: str = "gelu"
) -> ClipTowers:
    """The towers of a checkpoint, .pt, .bin or .safetensors in open_clip's names.

    Args:
        activation: `gelu`, or OpenAI's `quick_gelu`; the weights do not tell.

    Raises:
        ConfigError: it cannot be read or is another.
    """
    tensors = state(scorer, file, "state_dict")
    module = installed()
    if module is None:
        model = build(scorer, file, tensors, activation)
        return ClipTowers(model, load_tokenizer(scorer, file.parent), prepare, device, clean)
    config: Any = _sizes(scorer, file, tensors, activation)
    text, vision = config.text_config, config.vision_config
    model = module.model.CLIP(
        config.projection_dim,
        module.model.CLIPVisionCfg(
            layers=vision.num_hidden_layers,
            width=vision.hidden_size,
            head_width=vision.hidden_size // vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
        ),
        module.model.CLIPTextCfg(
            context_length=text.max_position_embeddings,
            vocab_size=text.vocab_size,
            width=text.hidden_size,
            heads=text.num_attention_heads,
            layers=text.num_hidden_layers,
        ),
        quick_gelu=activation == "quick_gelu",
    )
    fill(scorer, file, model, {key: value.float() for key, value in tensors.items() if key != "attn_mask"})
    return OpenClipTowers(
        model, module.tokenizer.SimpleTokenizer(context_length=text.max_position_embeddings), prepare, device
    )


def _sizes(scorer: str, file: Path, tensors: Mapping[str, Tensor], activation: str) -> CLIPConfig:
    try:
        return config_of(tensors, activation)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"reward {scorer}: {file} is not its checkpoint (at {error})") from None


def build(scorer: str, file: Path, tensors: Mapping[str, Tensor], activation: str = "gelu") -> CLIPModel:
    """A transformers CLIPModel from a checkpoint in open_clip's names. Raises ConfigError if it is none."""
    model = CLIPModel(_sizes(scorer, file, tensors, activation))
    mapped = {key: value.float() for key, value in from_open_clip(tensors).items()}
    # Positions are counted there, not stored.
    own = {key for key in model.state_dict() if key.endswith("position_ids")}
    fill(scorer, file, model, mapped | {key: model.state_dict()[key] for key in own})
    return model
