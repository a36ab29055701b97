"""The adapter's weights in training, their moving average, and the network with other ones for a while."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..processes import like, whole


class Diverged(ValueError):
    """The LoRA, or what it leads to, is not finite. The same settings would lead there again."""


def trainable(transformer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: value for name, value in transformer.named_parameters() if value.requires_grad}


class Weights:
    """The LoRA of a diffusers transformer.

    Attributes:
        lora: the parameters, float32 masters. ema: their average, which evaluation and export use.
        swapped: whether the parameters have other values for a while, or an interrupted change has left a mixture.
    """

    def __init__(self, transformer: Any):
        self.transformer = transformer
        self.lora = trainable(transformer)
        self.ema = self.copy()
        self.swapped = False

    @property
    def sharded(self) -> bool:
        """Whether the parameters are shards (FSDP2); every process must then make the same network calls."""
        return isinstance(next(iter(self.lora.values())), DTensor)

    def finite(self) -> bool:
        """Whether the parameters, or this process's shards of them, are finite."""
        parts = [value.to_local() if isinstance(value, DTensor) else value for value in self.lora.values()]
        # A rank smaller than the number of processes leaves some without a shard, and nothing has no largest value.
        parts = [part for part in parts if part.numel()]
        return not parts or math.isfinite(torch.nn.utils.get_total_norm(parts, math.inf))

    def copy(self) -> dict[str, Tensor]:
        """A copy of the parameters as they stand."""
        return {name: value.detach().clone() for name, value in self.lora.items()}

    def write(self, target: Mapping[str, Tensor]) -> None:
        """Writes the parameters into a copy of them."""
        for name, value in target.items():
            value.copy_(self.lora[name].detach())

    @torch.no_grad()
    def read(self, values: Mapping[str, Tensor]) -> None:
        """Sets the parameters."""
        for name, parameter in self.lora.items():
            parameter.copy_(values[name])

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """One step of the moving average."""
        for name, parameter in self.lora.items():
            self.ema[name].lerp_(parameter, 1 - decay)

    def averaged(self) -> AbstractContextManager[None]:
        """The transformer with the averaged weights, for evaluation and export."""
        return self.using(self.ema)

    @contextmanager
    def using(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """The transformer with other values of its parameters."""
        kept, self.swapped = self.copy(), True
        try:
            self.read(values)
            yield
        finally:
            self.read(kept)
            self.swapped = False

    @contextmanager
    def pretrained(self) -> Iterator[None]:
        """The transformer with the adapter off."""
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()

    def whole(self, tensors: Mapping[str, Tensor], main: bool) -> dict[str, Tensor]:
        """Whole tensors from shards, one after another: all processes must call this, and only the main one, to which they
        come on the CPU, gets any."""
        found = {}
        for name, value in tensors.items():
            full = whole(value)
            if main:
                found[name] = full.cpu() if self.sharded else full
        return found

    def share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the parameters' names, on the device and sharded as those are."""
        return {name: like(value.to(self.lora[name].device), self.lora[name]) for name, value in tensors.items()}
