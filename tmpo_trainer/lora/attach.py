"""A LoRA file on a pipeline, as diffusers loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from ..backbones.base import Backbone
from ..settings.errors import ConfigError
from . import file as lora_file


def check_lora(path: Path, transformer: Any) -> None:
    """Raises ConfigError for a file that is no sound LoRA, or one of another model. The transformer may lack its weights."""
    modules = dict(transformer.named_modules())
    for name, (down, up) in lora_file.read(path).layers.items():
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise ConfigError(f"{path}: {name} has numbers that are not finite")
        if name.startswith("transformer."):
            module = modules.get(name.removeprefix("transformer."))
            wanted = (module.out_features, module.in_features) if isinstance(module, torch.nn.Linear) else None
            if down.numel() == 0 or wanted != (len(up), down[0].numel()):
                raise ConfigError(f"{path}: {name} does not fit {type(transformer).__name__}: of another model")


def attach(backbone: Backbone, path: Path) -> None:
    """Loads a LoRA file as diffusers does. Raises ConfigError if it is none or of another model."""
    check_lora(path, backbone.transformer)
    file = path / lora_file.FILE_NAME if path.is_dir() else path
    try:
        backbone.pipeline.load_lora_weights(file.parent, weight_name=file.name)
    except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        # What diffusers' converters do with names that they do not know.
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file} cannot be loaded by diffusers, are its names its own? ({reason})") from None
    if not any(isinstance(module, LoraLayer) for module in backbone.transformer.modules()):
        raise ConfigError(
            f"{file}: none of its modules is in {type(backbone.transformer).__name__}, by diffusers' names"
        )
