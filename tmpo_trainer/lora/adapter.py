"""The LoRA of a run: attaches it to a transformer and starts it from a file. `export` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..backbones.base import Backbone
from ..settings.config import LoraTargets
from ..settings.errors import ConfigError
from .attach import check_lora
from .file import named
from .layers import Layers


class _MasterLinear(torch.nn.Linear):
    """A linear layer with float32 weights that computes in its input's precision, as autocast would."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.linear(input, self.weight.to(input.dtype))


def attach(transformer: Any, config: LoraConfig) -> None:
    """Adds a LoRA to a diffusers transformer, with float32 weights whatever the transformer's precision.

    Next to bfloat16 layers it computes in bfloat16. Otherwise peft would keep a float32 copy of every layer's input for
    the backward pass, which takes more than half of a replay's memory.
    """
    transformer.add_adapter(config)
    cast_training_params(transformer, dtype=torch.float32)
    if transformer.dtype == torch.float32:
        return
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for half in (layer.lora_A, layer.lora_B):
                plain: Any = half["default"]
                with torch.device("meta"):
                    half["default"] = _MasterLinear(plain.in_features, plain.out_features, bias=False)
                half["default"].weight = plain.weight


def check_fits(path: Path, backbone: Backbone, targets: LoraTargets, rank: int) -> Layers:
    """Reads a LoRA file and checks that a run's adapter can have exactly its effect.

    Args:
        backbone: the model, which may lack its weights. targets, rank: the adapter's; the file may have fewer and a lower
            one.

    Raises:
        ConfigError: the adapter cannot.
    """
    found = check_lora(path, backbone)
    where = f"--init-lora {found.file}"
    extra = list(found.magnitudes) or [name for name, bias in found.biases.items() if bias.any()]
    if extra:
        kind = "a DoRA: the magnitudes" if found.magnitudes else "a LoRA with biases: those"
        raise ConfigError(f"{where} is {kind} of {named(extra)} are beyond a run's LoRA; give one without")
    shapes = backbone.target_shapes(targets)
    pairs = {
        name: pair if name in shapes and len(pair[0]) <= rank else _trim(*pair) for name, pair in found.pairs.items()
    }
    pairs = {name: pair for name, pair in pairs.items() if len(pair[0])}
    strange = [name for name in pairs if name not in shapes]
    if strange:
        wider = all(name in backbone.target_shapes("all-linear") for name in strange)
        fix = "give --lora-targets all-linear" if wider else "no --lora-targets include them all"
        raise ConfigError(f"{where} changes {named(strange)}, which are no LoRA targets of this run: {fix}")
    high = {name: len(down) for name, (down, _) in pairs.items() if len(down) > rank}
    if high:
        raise ConfigError(
            f"{where} has rank {max(high.values())} in {named(list(high))}, but the run {rank}: give --lora-rank "
            f"{max(high.values())}"
        )
    return replace(found, pairs=pairs)


def _trim(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same product without the rows of down and columns of up that add nothing."""
    kept = down.any(1) & up.any(0)
    return down[kept], up[:, kept]


def start(parameters: Mapping[str, Tensor], scale: float, lora: Layers) -> None:
    """Sets a fresh adapter's parameters from a LoRA that `check_fits` has read, so that its effect is exactly the same.

    If the file's rank is lower, the adapter keeps its random lora_A rows for the rest, and zeros in lora_B cancel them.
    Modules that the file lacks stay at zero.

    Args:
        parameters: {`<module>.lora_A.default.weight`: value}, as peft names them. scale: the adapter's alpha / rank.
    """
    for module, (down, up) in lora.pairs.items():
        wide = parameters[f"{module}.lora_B.default.weight"]
        with torch.no_grad():
            parameters[f"{module}.lora_A.default.weight"][: len(down)].copy_(down)
            wide.zero_()
            wide[:, : len(down)].copy_(up.float() * (1 / scale))
