"""The solvers that the benchmark compares, on a Gaussian whose flow is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.solvers import integrate, spaced
from tmpo_trainer import tree
from tmpo_trainer.tree import TreePlan

MEAN, STD = 3.0, 0.5
START = torch.randn(20, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def velocity(x: Tensor, sigma: Tensor) -> Tensor:
    s = sigma.view(-1, 1, 1)
    return (s - (1 - s) * STD**2) / ((1 - s) ** 2 * STD**2 + s**2) * (x - (1 - s) * MEAN) - MEAN


def levels(steps: int) -> list[float]:
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (2 * even / (1 + even)).tolist()


@pytest.mark.parametrize("solver", ["euler", "ab2"])
def test_those_that_training_offers_are_the_rollouts(solver: str) -> None:
    run = tree.rollout(velocity, lambda _, path: START[path[0]], levels(12), TreePlan(12, 20, {}), solver=solver)  # type: ignore[arg-type]
    torch.testing.assert_close(integrate(solver, velocity, START, levels(12)), run.leaves, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("solver", "least"), [("euler", 1.9), ("ab2", 3.7), ("ab3", 3.7), ("dpm", 2.8)])
def test_errors_fall_with_the_order(solver: str, least: float) -> None:
    exact = MEAN + STD * START
    errors = [(integrate(solver, velocity, START, levels(n)) - exact).abs().max().item() for n in (100, 200)]
    assert errors[0] / errors[1] > least


def test_leaf_levels_are_those_of_training() -> None:
    sigmas, plan = torch.tensor(levels(10)), TreePlan.tmpo(10, (1, 4, 5), 3)
    expected = tree.shortened_sigmas(sigmas, plan.shortened(3))[5:]
    torch.testing.assert_close(torch.tensor(spaced(sigmas[5:], 3)), expected)
