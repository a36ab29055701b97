"""Several rewards as one: a mean of z-scores by default, weights as they are given, sums that overflow."""

from __future__ import annotations

import pytest
import torch

from tmpo_trainer import objectives, rewards


def test_without_weights_the_rewards_are_averaged() -> None:
    first, second, third = torch.randn(3, 27, generator=torch.Generator().manual_seed(0))
    found = rewards.combine({"a": first, "b": 9 * second, "c": third - 5}, None, "zscore")
    torch.testing.assert_close(found, sum(map(objectives.zscore, (first, second, third))) / 3)
    # beta asks for the same sharpness: rewards that agree are as one.
    torch.testing.assert_close(rewards.combine(dict.fromkeys("abc", first), None, "zscore"), objectives.zscore(first))


@pytest.mark.parametrize("norm", ["zscore", "none"])
def test_a_single_reward_stays_as_it_is(norm: str) -> None:
    only = torch.randn(27, generator=torch.Generator().manual_seed(0))
    expected = objectives.zscore(only) if norm == "zscore" else only
    assert torch.equal(rewards.combine({"a": only}, None, norm), expected)


def test_weights_are_taken_as_they_are_given() -> None:
    first, second = torch.randn(2, 27, generator=torch.Generator().manual_seed(0))
    found = rewards.combine({"a": first, "b": second}, (1.0, 0.5), "zscore")
    torch.testing.assert_close(found, objectives.zscore(first) + 0.5 * objectives.zscore(second))


def test_a_sum_that_overflows_names_its_terms() -> None:
    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    with pytest.raises(ValueError, match=r"the reward 1e\+300 a \+ 1 b is not finite: choose smaller weights"):
        rewards.combine(scores, (1e300, 1.0), "zscore")


def test_scores_are_float32_and_finite_there() -> None:
    found = rewards.check_finite("mine", torch.tensor([1.5, 2.0], dtype=torch.float64), ["x", "y"])
    assert found.dtype == torch.float32 and found.tolist() == [1.5, 2.0]
    with pytest.raises(ValueError, match=r"reward mine gave 1e\+200 for image 1 of prompt 'y'"):
        rewards.check_finite("mine", torch.tensor([1.5, 1e200], dtype=torch.float64), ["x", "y"])
