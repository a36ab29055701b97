"""Models of the benchmark: the demo model, or FLUX and SD3.5-Medium with random weights in three sizes."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from tmpo_trainer.backbones import decoder, find_model
from tmpo_trainer.backbones.base import Backbone
from tmpo_trainer.backbones.flux import FluxBackbone
from tmpo_trainer.backbones.sd3 import SD3Backbone
from tmpo_trainer.commands import loading
from tmpo_trainer.prompts.lists import PromptList, as_list
from tmpo_trainer.settings.config import TrainConfig

from . import random_model

KINDS = ("demo", "flux", "sd35m")
#: The prompts of models with random weights, whose text features are made up.
PROMPTS = [f"prompt {number}" for number in range(8)]


@dataclass(frozen=True)
class Size:
    """blocks: for FLUX joint and single ones. heads: of attention. resolution: side of the picture in pixels. tokens:
    `max_sequence_length`. rank: of the LoRA. vae: channels, layers and groups of its blocks."""

    blocks: list[int]
    heads: int
    resolution: int
    tokens: int
    rank: int
    vae: tuple[tuple[int, ...], int, int] = ((128, 256, 512, 512), 2, 32)


#: `reduced` is the largest share of the real model that a CPU thread does in seconds: matrix products still take most of
#: the time of a call, and VAE and LoRA have about the share of the network's time that they have in the real model.
SIZES = {
    "flux": {
        "full": Size([19, 38], 24, 512, 256, 64),
        "reduced": Size([1, 2], 3, 64, 16, 8, ((8, 16, 16), 1, 8)),
        "tiny": Size([1, 1], 1, 16, 4, 4, ((4, 4, 4), 1, 2)),
    },
    "sd35m": {
        "full": Size([24], 24, 512, 256, 64),
        "reduced": Size([2], 6, 64, 8, 8, ((8, 16, 16), 1, 8)),
        "tiny": Size([1], 1, 16, 4, 4, ((4, 4, 4), 1, 2)),
    },
}
FAMILIES: dict[str, tuple[type[Backbone], Any, Any, tuple[float, float]]] = {
    "flux": (
        FluxBackbone,
        random_model.flux_transformer,
        random_model.flux_scheduler,
        random_model.FLUX_SCALE,
    ),
    "sd35m": (
        SD3Backbone,
        random_model.sd35m_transformer,
        random_model.sd35m_scheduler,
        random_model.SD3_SCALE,
    ),
}


@dataclass
class Model:
    """A backbone and what the memory estimate reads. folder: the configs. prompts: those that the backbone knows."""

    backbone: Backbone
    folder: Path
    prompts: PromptList

    def skeleton(self, config: TrainConfig) -> Backbone:
        """The model without its weights, for `memory.estimate`."""
        kind = type(self.backbone)
        found = kind.skeleton(self.folder, self.backbone.vae.dtype, self.backbone.max_sequence_length)
        found.split_guidance = config.split_guidance
        return found


def settings(kind: str, size: str) -> dict[str, Any]:
    """The settings that go with a model: resolution, text, LoRA. For the kind `own`, which is `--model`, there are none."""
    if kind == "own":
        return {}
    if kind == "demo":
        return {"model": "demo", "resolution": (64, 64), "max_sequence_length": 0, "guidance": 1.0, "reward": ("shapes",)} | {
            "lora_rank": 32, "lora_alpha": 32, "lora_targets": "attention", "prompts_per_update": 8, "prompts_per_batch": 8,
            "decode_batch": 8,
        }  # fmt: skip
    chosen = SIZES[kind][size]
    return {
        "resolution": (chosen.resolution, chosen.resolution),
        "max_sequence_length": chosen.tokens,
        "lora_rank": chosen.rank,
        "lora_alpha": 2 * chosen.rank,
        "reward": ("benchmarks.scoring:PickScoreSized",),
    }


def make(kind: str, size: str, config: TrainConfig, device: torch.device, folder: Path) -> Model:
    """The demo model, that of `--model`, or one with random weights, which are never on a disk.

    Args:
        folder: empty; it gets the configs of a random model.
    """
    if kind in ("demo", "own"):
        # All are encoded at once, as in a run, because the text encoders of a large model are then freed.
        prompts = loading.train_prompts(config).first(8 * config.prompts_per_update)
        return Model(loading.load_model(config, device, prompts.texts), find_model(config.model), prompts)
    family, transformer, scheduler, scale = FAMILIES[kind]
    chosen = SIZES[kind][size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            network = transformer(chosen.blocks, chosen.heads)
            vae = random_model.vae(*scale, *chosen.vae)
    finally:
        torch.set_default_dtype(before)
    parts: dict[str, Any] = dict.fromkeys(family.text_parts())
    pipeline: Any = family.pipeline_class(**parts, scheduler=scheduler(), vae=vae, transformer=network)
    _write_configs(pipeline, folder)
    for part in (network, vae):
        part.to(device, dtype).requires_grad_(False).eval()
    if device.type == "cpu":
        # As `Backbone.load` does.
        decoder.prepare(vae)
    if config.quantize == "nf4":
        quantise(network, dtype)
    backbone = family(pipeline, config.max_sequence_length)
    for prompt in ["", *PROMPTS]:
        blank = backbone.blank_conditioning(folder)
        backbone.keep(prompt, {name: torch.randn(value.shape).to(value.dtype) for name, value in blank.items()})
    return Model(backbone, folder, as_list(PROMPTS))


def _write_configs(pipeline: Any, folder: Path) -> None:
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if isinstance(part, ModelMixin):
            part.save_config(folder / name)
        elif part is not None:
            part.save_pretrained(folder / name)
    # The number of CLIP's tokens, which the made-up features of SD3 need.
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))


def quantise(transformer: Any, dtype: torch.dtype) -> None:
    """Puts the linear layers into NF4, as loading with `quantize: nf4` does. Raises ImportError without bitsandbytes."""
    import bitsandbytes

    for module in list(transformer.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is not torch.nn.Linear:
                continue
            device = layer.weight.device
            with torch.device("meta"):
                four = bitsandbytes.nn.Linear4bit(
                    layer.in_features, layer.out_features, layer.bias is not None, dtype, quant_type="nf4"
                )
            four.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            four.bias = layer.bias
            setattr(module, name, four.to(device))
    # peft asks for this.
    transformer.is_loaded_in_4bit = True


def share(backbone: Backbone) -> Backbone:
    """A backbone with the same frozen weights, to which another adapter can be added. It must have none yet."""
    transformer = backbone.transformer
    kept = {id(tensor): tensor for tensor in (*transformer.parameters(), *transformer.buffers())}
    parts = {**backbone.pipeline.components, "transformer": copy.deepcopy(transformer, kept)}
    found = type(backbone)(type(backbone.pipeline)(**parts), backbone.max_sequence_length)
    found._kept, found._text = backbone._kept, backbone._text
    return found
