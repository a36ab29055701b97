"""The LoRA of a run: attaches it to a transformer and starts it from a file. `export` writes it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn.functional import linear

from ..backbones.base import Backbone
from ..settings.config import LoraTargets
from ..settings.errors import ConfigError
from .attach import check_lora
from .file import named
from .layers import Layers


def attach(transformer: Any, config: LoraConfig) -> None:
    """Adds a LoRA to a diffusers transformer, with float32 weights whatever the transformer's precision.

    It computes in the precision of the layer's input. peft would keep a float32 copy of every bfloat16 layer's input for the
    backward pass, which takes more than half of a replay's memory.

    The gradients of attention outputs are made contiguous, see `ContiguousGradient`; SD3's are anyway.
    """
    _make_gradients_contiguous(sys.modules[type(transformer).__module__])
    transformer.add_adapter(config)
    cast_training_params(transformer, dtype=torch.float32)
    for module in transformer.modules():
        layer: Any = module
        if isinstance(module, LoraLayer):
            layer.forward = partial(_forward, layer)


class ContiguousGradient(torch.autograd.Function):
    """The identity, which hands on its gradient as a contiguous tensor.

    The single-stream blocks of FLUX.1 and FLUX.2 concatenate attention's output with another tensor, so its gradient is a slice
    of a wider one.
    cuDNN's attention, torch's choice on Hopper GPUs since torch 2.11, reads such a slice as if it were packed (cuDNN 9.19 on an
    H100): the gradients of query, key and value have nothing in common with the right ones, or the memory access is illegal.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous()


def _make_gradients_contiguous(module: Any) -> None:
    """Wraps the function by which a diffusers module of networks computes attention, once for the process.

    A hook of a network's parts would be too late: FLUX.2 concatenates within its attention.
    """
    attend = vars(module).get("dispatch_attention_fn")
    if attend is None or isinstance(attend, _Contiguous):
        return
    module.dispatch_attention_fn = _Contiguous(attend)


class _Contiguous:
    """A function whose result's gradient is made contiguous."""

    def __init__(self, function: Any):
        self._function = function

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return ContiguousGradient.apply(self._function(*arguments, **options))


def _forward(layer: Any, x: Tensor) -> Tensor:
    """The layer with its LoRA, added to its output within one matrix product; peft multiplies by the scale, then adds."""
    result = layer.base_layer(x)
    if layer.disable_adapters:
        return result
    down, up = (half["default"].weight.to(x.dtype) for half in (layer.lora_A, layer.lora_B))
    inner = linear(x, down) * layer.scaling["default"]
    # In place it need not be copied, but of bitsandbytes' layers it is a view, which autograd does not let change.
    add = torch.Tensor.addmm_ if type(layer.base_layer) is torch.nn.Linear else torch.addmm
    return add(result.flatten(0, -2), inner.flatten(0, -2), up.T).view_as(result)


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
