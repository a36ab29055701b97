"""Loads a LoRA file into a pipeline, as diffusers does."""

from __future__ import annotations

from pathlib import Path

import torch

from ..backbones.base import Backbone
from ..settings.errors import ConfigError, one_line
from . import layers
from .layers import Layers


def check_lora(path: Path, backbone: Backbone) -> Layers:
    """Reads a LoRA file of this model. The transformer may lack its weights. Raises ConfigError for any other file."""
    found = layers.read(path, backbone.pipeline_class)
    linear = {
        name: (module.in_features, module.out_features)
        for name, module in backbone.transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    found.check(linear, type(backbone.transformer).__name__)
    for module, vector in (*found.biases.items(), *found.magnitudes.items()):
        if vector.shape != linear[module][1:]:
            raise ConfigError(f"{found.file}: {one_line(module)} has {layers.by(vector.shape)} biases or magnitudes")
    if found.magnitudes and found.magnitudes.keys() != found.pairs.keys():
        missing = layers.named(sorted(found.pairs.keys() - found.magnitudes.keys()))
        raise ConfigError(f"{found.file} is a DoRA without magnitudes of {missing}: give a whole file")
    return found


def attach(backbone: Backbone, path: Path) -> None:
    """Loads a LoRA file with the effect that diffusers gives it. Raises ConfigError unless it is a LoRA of this model."""
    found = check_lora(path, backbone)
    if found.biases:
        # diffusers gives all modules a bias if one has it.
        for module, (_, up) in found.pairs.items():
            found.biases.setdefault(module, up.new_zeros(len(up)))
    try:
        backbone.transformer.load_lora_adapter(found.state(), low_cpu_mem_usage=True)
    except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ConfigError(f"{found.file} cannot be loaded by diffusers ({one_line(error)})") from None
