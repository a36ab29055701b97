"""LoRAs of a run: how one is attached to a transformer, and started from a file. `export` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..settings.errors import ConfigError
from .file import LoraFile, read


class _MasterLinear(torch.nn.Linear):
    """A linear layer with float32 weights that computes in its input's precision, as autocast would."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.linear(input, self.weight.to(input.dtype))


def attach(transformer: Any, config: LoraConfig) -> None:
    """Adds a LoRA to a diffusers transformer, with float32 weights whatever the transformer's precision.

    Beside bfloat16 layers it computes in bfloat16. peft would have a float32 copy of every layer's input instead, kept
    for the backward pass: more than half of a replay's memory.
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


def check_fits(path: Path, shapes: Mapping[str, tuple[int, int]], rank: int) -> LoraFile:
    """A LoRA file that fits an adapter.

    Args:
        shapes: {module: (inputs, outputs)} of the adapter. rank: of the adapter, at least the file's.

    Raises:
        ConfigError: it does not fit.
    """
    lora = read(path)
    for module, (down, up) in lora.layers.items():
        name = module.removeprefix("transformer.")
        if name not in shapes:
            raise ConfigError(
                f"--init-lora {path}: {module} is no LoRA target here: is it of another model, not in diffusers' names, "
                "or does it need --lora-targets all-linear?"
            )
        if len(down) > rank:
            raise ConfigError(f"--init-lora {path} has rank {len(down)}, the run {rank}: give --lora-rank {len(down)}")
        if (down[0].numel(), len(up)) != shapes[name]:
            found = f"{tuple(up.shape)} x {tuple(down.shape)}"
            raise ConfigError(f"--init-lora {path}: {module} is {found}, of another model")
    return lora


def start(parameters: Mapping[str, Tensor], scale: float, path: Path) -> None:
    """Sets a fresh adapter's parameters to a LoRA file, whose effect they then have exactly.

    A lower rank is filled up with the adapter's own random lora_A rows, which zeros in lora_B silence. Modules that the
    file lacks stay at zero.

    Args:
        parameters: {`<module>.lora_A.default.weight`: value}, as peft names them. scale: the adapter's alpha / rank.

    Raises:
        ConfigError: the file does not fit the adapter.
    """
    down_of, up_of = ".lora_A.default.weight", ".lora_B.default.weight"
    downs = {name.removesuffix(down_of): value for name, value in parameters.items() if name.endswith(down_of)}
    shapes = {name: (down.shape[1], len(parameters[name + up_of])) for name, down in downs.items()}
    lora = check_fits(path, shapes, len(next(iter(downs.values()))))
    for module, (down, up) in lora.layers.items():
        name, rank = module.removeprefix("transformer."), len(down)
        strength = lora.alphas[module] / rank if module in lora.alphas else lora.scale
        with torch.no_grad():
            downs[name][:rank].copy_(down)
            parameters[name + up_of].zero_()
            parameters[name + up_of][:, :rank].copy_(up.float() * (strength / scale))
