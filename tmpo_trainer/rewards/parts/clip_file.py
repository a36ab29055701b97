"""A CLIPModel in one .safetensors file, without the config.json that a folder has: ComfyUI's clip_vision files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from ...settings.errors import ConfigError, one_line
from .weights import fill, read_tensors

#: How the names of the text tower's and the vision tower's tensors begin in transformers.
TEXT, VISION = "text_model.", "vision_model."

#: Width of a tower -> width of its heads, for the towers whose heads are not 64 wide: ViT-H/14 and ViT-bigG/14.
HEAD = {1280: 80, 1664: 104}


def build(scorer: str, file: Path) -> CLIPModel:
    """The model with its weights, float32.

    Raises:
        ConfigError: the file cannot be read, is not a CLIPModel, or holds only one tower, as most clip_vision files do.
    """
    names = header(scorer, file)
    for start, tower, other in ((TEXT, "vision", "text"), (VISION, "text", "vision")):
        if not any(name.startswith(start) for name in names):
            if any(name.startswith((TEXT, VISION)) for name in names):
                raise ConfigError(
                    f"reward {scorer}: {file} holds only the {tower} tower: give the whole model, which has a {other} tower too"
                )
            raise ConfigError(f"reward {scorer}: {file} is not a CLIP model in transformers' names")
    # Positions are counted, not learned, but some files store them.
    tensors = {k: v.float() for k, v in read_tensors(scorer, file).items() if not k.endswith("position_ids")}
    try:
        model = CLIPModel(config_of(tensors))
    except (LookupError, ValueError, TypeError, ArithmeticError, RuntimeError, StrictDataclassError) as error:
        raise ConfigError(
            f"reward {scorer}: {file} is not a CLIP model in transformers' names (at {one_line(error)})"
        ) from None
    own = {k: v for k, v in model.state_dict().items() if k.endswith("position_ids")}
    fill(scorer, file, model, tensors | own)
    return model


def header(scorer: str, file: Path) -> list[str]:
    """Names of a file's tensors, without reading them. Raises ConfigError if it is not a safetensors file."""
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        reason = one_line(error)
        raise ConfigError(
            f"reward {scorer}: {file} cannot be read ({reason}): give a folder with the model, or its model.safetensors"
        ) from None


def config_of(tensors: Mapping[str, Tensor]) -> CLIPConfig:
    """The sizes of a CLIPModel, from its weights.

    The weights do not show the activation. As in ComfyUI, it is GELU for ViT-H and ViT-bigG, which are LAION's, and
    OpenAI's quick GELU for smaller models.
    """
    positions, words = (tensors[f"{TEXT}embeddings.{name}_embedding.weight"].shape[0] for name in ("position", "token"))
    patches = tensors[f"{VISION}embeddings.position_embedding.weight"].shape[0] - 1
    patch = tensors[f"{VISION}embeddings.patch_embedding.weight"].shape[-1]
    vision = _tower(tensors, VISION)
    activation = "gelu" if vision["hidden_size"] in HEAD else "quick_gelu"
    return CLIPConfig(
        projection_dim=tensors["text_projection.weight"].shape[0],
        text_config={
            **_tower(tensors, TEXT),
            "hidden_act": activation,
            "vocab_size": words,
            "max_position_embeddings": positions,
            "bos_token_id": words - 2,
            "eos_token_id": words - 1,
        },
        vision_config={
            **vision,
            "hidden_act": activation,
            "image_size": math.isqrt(patches) * patch,
            "patch_size": patch,
        },
    )


def _tower(tensors: Mapping[str, Tensor], start: str) -> dict[str, int]:
    layers = [
        int(name.split("layers.")[1].split(".")[0]) for name in tensors if name.startswith(f"{start}encoder.layers.")
    ]
    inner, width = tensors[f"{start}encoder.layers.0.mlp.fc1.weight"].shape
    # The text tower's heads are 64 wide, whatever the tower's width.
    head = HEAD.get(width, 64) if start == VISION else 64
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 1 + max(layers),
        "num_attention_heads": width // head,
    }
