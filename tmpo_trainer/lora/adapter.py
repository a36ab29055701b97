"""The LoRA of a run: attaches it to a transformer and starts it from a file. `export` writes it."""

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


def check_fits(path: Path, shapes: Mapping[str, tuple[int, int]], rank: int) -> LoraFile:
    """Reads a LoRA file and checks that it fits an adapter.

    Args:
        shapes: {module: (inputs, outputs)} of the adapter. rank: the adapter's; the file's may be lower.

    Raises:
        ConfigError: it does not fit.
    """
    lora = read(path)
    for module, (down, up) in lora.layers.items():
        name = module.removeprefix("transformer.")
        if name not in shapes:
            raise ConfigError(
                f"--init-lora {path}: {module} is not a LoRA target of this run: give a LoRA of the same model in "
                "diffusers' names, or --lora-targets all-linear"
            )
        if len(down) > rank:
            raise ConfigError(
                f"--init-lora {path} has rank {len(down)}, but the run {rank}: give --lora-rank {len(down)}"
            )
        if (down[0].numel(), len(up)) != shapes[name]:
            found = f"{tuple(up.shape)} x {tuple(down.shape)}"
            raise ConfigError(f"--init-lora {path}: {module} is {found}: give a LoRA of the same model")
    return lora


def start(parameters: Mapping[str, Tensor], scale: float, path: Path) -> None:
    """Sets a fresh adapter's parameters from a LoRA file, so that its effect is exactly the same.

    If the file's rank is lower, the adapter keeps its random lora_A rows for the rest, and zeros in lora_B cancel them.
    Modules that the file lacks stay at zero.

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
