"""CLIP checkpoints in open_clip's names, such as HPS's and LAION's. open_clip runs them if it works, else transformers.

open_clip needs a working torchvision, so it is never required. Both give the same scores, see
tests/rewards/parts/test_openclip.py.
"""

from __future__ import annotations

import html
import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ...hub import readable_errors
from ...settings.errors import ConfigError, one_line
from .clip import VOCABULARY, ClipTowers, Prepare, crop, load_clip, load_tokenizer
from .clip_file import header
from .weights import fill, read_tensors

#: Names inside a block: open_clip's -> transformers'. Queries, keys and values are one tensor in open_clip.
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

#: These are multiplied from the other side, and therefore transposed.
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a CLIP model's tensors from open_clip's names to transformers'. Unknown keys stay as they are."""
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
        else:
            found[key] = value
    return found


def config_of(tensors: Mapping[str, Tensor], quick_gelu: bool = False) -> CLIPConfig:
    """The sizes of a checkpoint in open_clip's names. Heads are 64 wide, but 80 in the vision tower of ViT-H.

    Raises:
        KeyError, ValueError, IndexError: it is not a CLIP of two transformers.
    """
    layers = [
        1 + max(int(k.split("resblocks.")[1].split(".")[0]) for k in tensors if k.startswith(start))
        for start in ("transformer.resblocks.", "visual.transformer.resblocks.")
    ]
    text, vision = tensors["ln_final.weight"].shape[0], tensors["visual.ln_pre.weight"].shape[0]
    embedding = tensors["token_embedding.weight"].shape[0]
    patch = tensors["visual.conv1.weight"].shape[-1]
    activation = "quick_gelu" if quick_gelu else "gelu"
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
            # There is a position for each patch and one for the class.
            image_size=patch * math.isqrt(tensors["visual.positional_embedding"].shape[0] - 1),
            patch_size=patch,
            hidden_act=activation,
        ).to_dict(),
    )


def clean(prompt: str) -> str:
    """open_clip's cleaning: broken encodings, HTML entities, white space, lower case."""
    # Imported here, because PickScore and CLIP score from a folder do not need it.
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()


class OpenClipTowers(ClipTowers):
    """Towers of an `open_clip.CLIP`. Its tokenizer cleans prompts itself."""

    def _encode_images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def _encode_texts(self, prompts: Sequence[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(prompts).to(self.device))


def package() -> Any | None:
    """open_clip, if it is installed and can be imported."""
    try:
        return importlib.import_module("open_clip")
    # A torchvision that was built for another torch, or for CUDA on a machine without it, fails in any of these ways.
    except (ImportError, RuntimeError, OSError, AttributeError):
        return None


def build_transformers(scorer: str, file: Path, tensors: Mapping[str, Tensor], config: CLIPConfig) -> CLIPModel:
    """A transformers CLIPModel with the checkpoint's weights. Raises ConfigError if they do not fit."""
    model = CLIPModel(config)
    # transformers counts positions and does not store them.
    own = {key: value for key, value in model.state_dict().items() if key.endswith("position_ids")}
    fill(scorer, file, model, from_open_clip(tensors) | own)
    return model


def build_open_clip(
    open_clip: Any, scorer: str, file: Path, tensors: Mapping[str, Tensor], config: CLIPConfig
) -> torch.nn.Module:
    """An `open_clip.CLIP` with the checkpoint's weights. Raises ConfigError if they do not fit."""
    text: Any = config.text_config
    vision: Any = config.vision_config
    model = open_clip.CLIP(
        config.projection_dim,
        open_clip.CLIPVisionCfg(
            layers=vision.num_hidden_layers,
            width=vision.hidden_size,
            head_width=vision.hidden_size // vision.num_attention_heads,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
        ),
        open_clip.CLIPTextCfg(
            context_length=text.max_position_embeddings,
            vocab_size=text.vocab_size,
            width=text.hidden_size,
            heads=text.num_attention_heads,
            layers=text.num_hidden_layers,
        ),
        quick_gelu=text.hidden_act == "quick_gelu",
    )
    fill(scorer, file, model, tensors)
    return model


def load_checkpoint(
    scorer: str, file: Path, device: torch.device, prepare: Callable[[int], Prepare], quick_gelu: bool = False
) -> ClipTowers:
    """The towers of a checkpoint's file (.pt, .bin or .safetensors).

    Args:
        prepare: size -> preprocessing, such as `clip.crop` and `clip.pad`. quick_gelu: whether the activation is the
            approximation that OpenAI's weights need.

    Raises:
        ConfigError: the file cannot be read, or is not a CLIP in open_clip's names.
    """
    # Some checkpoints also store the causal mask.
    tensors = {
        key: value.float() for key, value in read_tensors(scorer, file, "state_dict").items() if key != "attn_mask"
    }
    try:
        config = config_of(tensors, quick_gelu)
    except (LookupError, ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
        raise ConfigError(
            f"reward {scorer}: {file} is not its checkpoint (not a CLIP in open_clip's names: at {one_line(error)})"
        ) from None
    text: Any = config.text_config
    vision: Any = config.vision_config
    pixels = prepare(vision.image_size)
    # open_clip's tokenizer has only this vocabulary. A model with another one comes with its own tokenizer.
    open_clip = package() if text.vocab_size == VOCABULARY else None
    if open_clip is None:
        with readable_errors(f"reward {scorer}", file):
            model = build_transformers(scorer, file, tensors, config)
        return ClipTowers(model, load_tokenizer(scorer, file.parent, text.vocab_size), pixels, device, clean)
    tokenizer = open_clip.SimpleTokenizer(context_length=text.max_position_embeddings)
    with readable_errors(f"reward {scorer}", file):
        model = build_open_clip(open_clip, scorer, file, tensors, config)
    return OpenClipTowers(model, tokenizer, pixels, device)


def described(scorer: str, file: Path) -> tuple[bool, Callable[..., Prepare]]:
    """What the weights do not show, read from the hub's `open_clip_config.json` beside them.

    OpenAI's weights need another activation, LAION's ViT-L/14 another mean and std. A guess would give plausible but wrong
    scores.

    Returns:
        whether the activation is OpenAI's approximation of GELU; the preprocessing.

    Raises:
        ConfigError: the file is missing, cannot be read, or asks for a preprocessing that is not supported.
    """
    beside = file.with_name("open_clip_config.json")
    if not beside.is_file():
        raise ConfigError(
            f"reward {scorer}: {file} needs the {beside.name} of its hub repository beside it (for a transformers model, "
            "give the folder)"
        )
    with readable_errors(f"reward {scorer}", beside):
        found = json.loads(beside.read_text(encoding="utf-8"))
        model, pictures = dict(found["model_cfg"]), dict(found.get("preprocess_cfg", {}))
        mean = [float(value) for value in pictures.get("mean", OPENAI_CLIP_MEAN)]
        std = [float(value) for value in pictures.get("std", OPENAI_CLIP_STD)]
        for key, ours in (("resize_mode", "shortest"), ("interpolation", "bicubic")):
            if pictures.get(key, ours) != ours:
                raise ValueError(f"{key} {pictures[key]!r} is not supported, only {ours}")
    return bool(model.get("quick_gelu", False)), partial(crop, mean=mean, std=std)


def load_towers(scorer: str, path: Path, device: torch.device, offset: Callable[[float], int] = round) -> ClipTowers:
    """The towers of a CLIP model.

    Args:
        path: a transformers CLIPModel in a folder or one .safetensors file, or a checkpoint in open_clip's names with its
            `open_clip_config.json` beside it.
        offset: see `clip.crop`.

    Raises:
        ConfigError: it is neither.
    """
    if path.is_dir() or (path.suffix == ".safetensors" and "visual.conv1.weight" not in header(scorer, path)):
        return load_clip(scorer, path, device, offset)
    quick_gelu, prepare = described(scorer, path)
    return load_checkpoint(scorer, path, device, partial(prepare, offset=offset), quick_gelu)
