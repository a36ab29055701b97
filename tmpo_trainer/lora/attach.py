"""Loads a LoRA file into a pipeline, as diffusers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from ..backbones.base import Backbone
from ..settings.errors import ConfigError, one_line
from . import file as lora_file


def check_lora(path: Path, transformer: Any) -> None:
    """Raises ConfigError unless a file is a sound LoRA of this model. The transformer may lack its weights."""
    modules = dict(transformer.named_modules())
    for name, (down, up) in lora_file.read(path).layers.items():
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise ConfigError(f"{path}: {name} has numbers that are not finite")
        if name.startswith("transformer."):
            module = modules.get(name.removeprefix("transformer."))
            wanted = (module.out_features, module.in_features) if isinstance(module, torch.nn.Linear) else None
            if down.numel() == 0 or wanted != (len(up), down[0].numel()):
                raise ConfigError(
                    f"{path}: {name} does not fit {type(transformer).__name__}: give a LoRA of the same model"
                )


def attach(backbone: Backbone, path: Path) -> None:
    """Loads a LoRA file as diffusers does. Raises ConfigError unless it is a LoRA of this model."""
    check_lora(path, backbone.transformer)
    file = path / lora_file.FILE_NAME if path.is_dir() else path
    try:
        backbone.pipeline.load_lora_weights(file.parent, weight_name=file.name)
    except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        # diffusers' converters raise these for names that they do not know.
        reason = one_line(error)
        raise ConfigError(
            f"{file} cannot be loaded by diffusers ({reason}): rename its keys as diffusers does"
        ) from None
    if not any(isinstance(module, LoraLayer) for module in backbone.transformer.modules()):
        raise ConfigError(
            f"{file}: {type(backbone.transformer).__name__} has none of its modules: give a LoRA of the same model"
        )
