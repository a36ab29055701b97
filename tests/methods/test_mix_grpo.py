"""MixGRPO: its gradient written out, its window, its network calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tmpo_trainer.methods.base import Method
from tmpo_trainer.settings.errors import ConfigError

Check = Callable[..., None]


def loss(prompt: Any, clipped: Callable[..., Tensor]) -> Tensor:
    """The z-score of the end of a chain, at each step of the window; ratios per step, without RatioNorm."""
    assert len(prompt.steps) == 2
    return -torch.cat([clipped(step.new - step.old, prompt.z) for step in prompt.steps]).mean()


def test_gradient_is_that_of_the_loss_written_out(check_gradient: Check) -> None:
    # In the second window.
    check_gradient("mix-grpo", loss, kl_scale=lambda step: step.dt, update=30, kl_weight=0.5, window=2)


def test_batches_change_nothing(check_batches: Check) -> None:
    check_batches("mix-grpo")


def test_network_calls(check_calls: Check, check_evaluations: Check) -> None:
    check_calls("mix-grpo", 162, 27 * 2, window=2)
    check_evaluations("mix-grpo", 162, 27 * 4, 27 * 4, kl_weight=0.03)


def test_the_window_slides_and_starts_again(planned: Callable[..., Method]) -> None:
    """Its place is a function of the update alone, so resuming needs no state."""
    made = planned("mix-grpo")
    first, second = [1, 2, 3, 4], [2, 3, 4, 5]
    # Steps 1 to 5 of six may carry noise: two places, 25 updates at each.
    assert [list(made.plan(u).fanout) for u in (0, 24, 25, 49, 50, 74, 75)] == [
        first, first, second, second, first, first, second,
    ]  # fmt: skip
    quick = planned("mix-grpo", window=2, window_every=1)
    assert [min(quick.plan(u).fanout) for u in (*range(9), 10**6)] == [1, 2, 3, 4, 1, 2, 3, 4, 1, 1]
    only = planned("mix-grpo", window=5, window_every=1)
    assert [min(only.plan(u).fanout) for u in range(3)] == [1, 1, 1] and made.state() == {}


def test_a_window_that_does_not_fit(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="window 5: of 6 steps only 4 may carry noise"):
        make("mix-grpo", window=5)


def test_equal_rewards_train_nothing(check_equal_rewards: Check) -> None:
    check_equal_rewards("mix-grpo")


def test_what_belongs_to_others_is_refused(refused: Check) -> None:
    refused("baseline group belongs to method tmpo, not to mix-grpo", method="mix-grpo", baseline="group")
