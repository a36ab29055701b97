"""A tiny network and a batch of made-up leaves, for the tests of what trains on noised leaves."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tmpo_trainer import methods, objectives, tree
from tmpo_trainer.methods.batch import Clock, Network, PromptBatch
from tmpo_trainer.methods.leaves import NoisedLeaves
from tmpo_trainer.settings.presets import make_config
from tmpo_trainer.training.weights import Weights

SHAPE = (2, 1, 2)
SIGMAS = torch.tensor([1, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0])
BRANCHING, DRAWS, SLOTS = 3, 2, [3, 1]
LEAVES, COUNT = BRANCHING**2, len(SLOTS)


class Tiny(nn.Module):
    """A frozen network and an adapter in float64: row r is of prompt r % 2."""

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) / 2

        size = math.prod(SHAPE) + 1
        self.base, self.on = drawn(size, size - 1), True
        self.prompts = drawn(COUNT, size - 1)
        self.adapter = nn.Parameter(drawn(size, size - 1))

    def disable_adapters(self) -> None:
        self.on = False

    def enable_adapters(self) -> None:
        self.on = True

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        given = torch.cat([x.flatten(1), sigma[:, None]], 1)
        out = given @ self.base + self.prompts.repeat(len(x) // COUNT, 1)
        if self.on:
            out = out + torch.tanh(given @ self.adapter)
        return out.unflatten(1, SHAPE)


def set_up(method: str, rewards: Tensor | None = None, seed: int = 0, **settings: Any) -> Any:
    """A method at the first update with made-up leaves and rewards `[2, K]`: method, batch, network, transformer, weights."""
    given = {
        "method": method, "branching": BRANCHING, "branch_early": (1, 2), "draws": DRAWS, "noise_shift": 2.0,
        "prompts_per_update": 4, "prompts_per_batch": COUNT, **settings,
    }  # fmt: skip
    made: Any = methods.make(make_config([("settings", given)]), SIGMAS)
    transformer = Tiny(seed)
    weights = Weights(transformer)
    made.begin(5, weights)
    plan = made.shape(5)
    leaves = torch.randn(LEAVES * COUNT, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if rewards is None:
        rewards = torch.stack([leaves[p::COUNT].flatten(1).mean(1) for p in range(COUNT)])
    run = tree.Rollout(plan.forest(COUNT), "cps", 0.7, "mean", leaves, [])
    normalised = list(objectives.zscore(rewards))
    batch = PromptBatch(5, ["a", "b"], plan, run, COUNT / 4, {}, normalised, None, SLOTS)
    network = Network(transformer, Clock(torch.device("cpu")), torch.device("cpu"))
    network.max_batch = 5
    return SimpleNamespace(method=made, batch=batch, network=network, transformer=transformer, weights=weights)


def found(made: Any, inner: int = 0) -> tuple[Tensor, dict[str, list[float]]]:
    """The gradient, and the figures."""
    made.transformer.zero_grad()
    figures = made.method.backward(made.batch, made.network, inner)
    return made.transformer.adapter.grad.clone(), figures


def all_parts(noised: NoisedLeaves) -> Any:
    (part,) = noised.parts(None)
    return part


def all_rows(made: Any) -> Any:
    return all_parts(made.method.noised(made.batch))


def move(made: Any, by: float) -> None:
    with torch.no_grad():
        made.transformer.adapter += by * torch.linspace(-1, 1, made.transformer.adapter.numel()).view_as(
            made.transformer.adapter
        )
