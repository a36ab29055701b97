"""The methods on noised leaves as arms of the toy: the project's own, on the toy's network, trees and raw rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .. import objectives, tree
from ..methods.base import Method
from ..methods.batch import Clock, Network, PromptBatch
from ..settings import discovery
from ..settings.presets import make_config


class Weights:
    """All weights of a small network in the place of an adapter's, see `methods.batch.AdapterWeights`."""

    def __init__(self, network: nn.Module, base: nn.Module):
        self._own = dict(network.named_parameters())
        self._base = {name: value.detach() for name, value in base.named_parameters()}

    def copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._own.items()}

    @torch.no_grad()
    def write(self, target: Mapping[str, Tensor]) -> None:
        for name, value in self._own.items():
            value.copy_(target[name])

    @contextmanager
    def using(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        before = self.copy()
        self.write(values)
        try:
            yield
        finally:
            self.write(before)

    def pretrained(self) -> AbstractContextManager[None]:
        return self.using(self._base)


class NoisedArm:
    """A method's state over the updates of one run.

    Args:
        settings: of the method, its name among them. zscore: divide a group's rewards by their standard deviation, as the
            method's authors do, in place of taking them raw. network, base: the trained and the pretrained one.
    """

    def __init__(self, settings: Mapping[str, Any], zscore: bool, seed: int, network: nn.Module, base: nn.Module):
        config = make_config([("the toy's arm", {**settings, "seed": seed})])
        kind: Callable[..., Method] = discovery.load("methods", config.method).Method
        self.method = kind(config, torch.linspace(1, 0, config.rollout_steps + 1))
        self.weights = Weights(network, base)
        self._zscore = zscore
        self._network = Network(network, Clock(torch.device("cpu")), torch.device("cpu"))

    def rolling_out(self, update: int) -> AbstractContextManager[None]:
        """Begins an update. Within the context the network has the weights that roll out."""
        self.method.begin(update, self.weights)
        chosen = self.method.rollout_weights(self.weights)
        return nullcontext() if chosen is None else self.weights.using(chosen)

    def batch(self, update: int, plan: tree.TreePlan, run: tree.Rollout, rewards: Tensor) -> PromptBatch:
        """Groups as prompts. rewards: `[K, groups]`."""
        groups = rewards.shape[1]
        own = [objectives.zscore(group) if self._zscore else group for group in rewards.T]
        return PromptBatch(update, [""] * groups, plan, run, 1.0, {}, own, None, list(range(groups)))

    def backward(self, batch: PromptBatch, inner: int) -> None:
        self.method.backward(batch, self._network, inner)

    def end(self) -> None:
        self.method.end({})
