"""Flow-GRPO: its gradient written out, its chains, its network calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tmpo_trainer.methods.base import Method

Check = Callable[..., None]


def loss(prompt: Any, clipped: Callable[..., Tensor]) -> Tensor:
    """The z-score of the end of a chain, at each of its steps; ratios per step, without RatioNorm."""
    return -torch.cat([clipped(step.new - step.old, prompt.z) for step in prompt.steps]).mean()


@pytest.mark.parametrize("kernel", ["flow_sde", "cps"])
def test_gradient_is_that_of_the_loss_written_out(check_gradient: Check, kernel: str) -> None:
    """The KL divides by the noise level squared, which is the variance over dt."""
    check_gradient("flow-grpo", loss, kl_scale=lambda step: step.dt, kl_weight=0.5, kernel=kernel)


def test_batches_change_nothing(check_batches: Check) -> None:
    check_batches("flow-grpo")


def test_network_calls(check_calls: Check, check_evaluations: Check) -> None:
    # The tiny model's sixth of six steps ends at 0 and its fifth near it: four may carry noise. With FLUX five may.
    check_calls("flow-grpo", 162, 27 * 4)
    check_evaluations("flow-grpo", 162, 27 * 5, 27 * 5, kl_weight=0.03)


def test_no_noise_where_it_would_stay_in_the_picture(planned: Callable[..., Method]) -> None:
    sd3 = torch.tensor([1, 0.923, 0.819, 0.668, 0.432, 0.0089, 0])
    plan = planned("flow-grpo", sd3, kl_weight=0.03).plan(0)
    assert plan.fanout == {1: 1, 2: 1, 3: 1, 4: 1} and plan.roots == plan.leaves == 27


def test_equal_rewards_train_nothing(check_equal_rewards: Check) -> None:
    check_equal_rewards("flow-grpo")


def test_several_rewards_are_normalised_once(planned: Callable[..., Method]) -> None:
    """One by one, before they are added; a single one by the method itself."""
    assert planned("flow-grpo").config.combining == "none"
    assert planned("flow-grpo", reward=("shapes", "sharpness")).config.combining == "zscore"


@pytest.mark.parametrize("settings", [{"anchor": "ref"}, {"baseline": "group"}, {"auxiliary": ("sharpness",)}], ids=str)
def test_what_belongs_to_others_is_refused(refused: Check, settings: dict[str, Any]) -> None:
    owner = "gardo" if "auxiliary" in settings else "tmpo"
    refused(f"belongs to method {owner}, not to flow-grpo: leave it at its default", method="flow-grpo", **settings)


def test_metrics_have_no_beta(make: Callable[..., Any]) -> None:
    assert "beta" not in make("flow-grpo").update()
