"""TreeGRPO: its gradient written out, its random window, its network calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tmpo_trainer.methods.base import Method
from tmpo_trainer.settings.errors import ConfigError

Check = Callable[..., None]


def loss(prompt: Any, clipped: Callable[..., Tensor]) -> Tensor:
    """The z-score of a leaf at its edge; at an edge above, that of its children by their probability in the rollout."""
    below, terms = prompt.z, []
    for step in reversed(prompt.steps):
        terms.append(clipped(step.new - step.old, below))
        # Row c * parents + p is child c of parent p.
        children = step.old.view(-1, step.parents).softmax(0)
        below = (children * below.view(-1, step.parents)).sum(0)
    return -torch.cat(terms).mean()


def test_gradient_is_that_of_the_loss_written_out(check_gradient: Check) -> None:
    check_gradient("tree-grpo", loss, kl_scale=lambda step: step.dt, kl_weight=0.5)


def test_batches_change_nothing(check_batches: Check) -> None:
    check_batches("tree-grpo")


def test_network_calls(check_calls: Check, check_evaluations: Check) -> None:
    check_calls("tree-grpo", 94, 13, seed=1)
    check_evaluations("tree-grpo", 94, 13, 13, seed=1, kl_weight=0.03)


def test_early_windows_are_drawn_more_often(planned: Callable[..., Method]) -> None:
    made = planned("tree-grpo")
    plans = [made.plan(update) for update in range(2000)]
    starts = Counter(min(plan.fanout) for plan in plans)
    assert all(list(plan.fanout) == list(range(min(plan.fanout), min(plan.fanout) + 3)) for plan in plans)
    # Odds 4 : 2 : 1, within four standard deviations.
    for start, share in ((1, 4 / 7), (2, 2 / 7), (3, 1 / 7)):
        assert abs(starts[start] - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5
    assert {plan.rollout_evaluations for plan in plans} == {94, 68, 42}
    assert {plan.train_evaluations for plan in plans} == {13} and {plan.leaves for plan in plans} == {27}
    assert [made.plan(u).fanout for u in range(9)] == [planned("tree-grpo").plan(u).fanout for u in range(9)]
    assert [made.plan(u).fanout for u in range(99)] != [planned("tree-grpo", seed=1).plan(u).fanout for u in range(99)]


def test_a_window_that_does_not_fit(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="branches at 3 neighbouring steps"):
        make("tree-grpo", rollout_steps=4)


def test_equal_rewards_train_nothing(check_equal_rewards: Check) -> None:
    check_equal_rewards("tree-grpo")
