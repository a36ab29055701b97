"""The neutral advantage: exact facts of the residual, statistics by hand, and a Gaussian that must not shrink."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from tmpo_trainer import nuisance, objectives
from tmpo_trainer.nuisance import neutral_rewards
from tmpo_trainer.settings.config import Nuisance, TrainConfig

K = 27


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_residual_is_uncorrelated_with_every_statistic() -> None:
    rewards, rows = normal(K) + 3, 50 + 10 * normal(4, K, seed=1)
    found = neutral_rewards(rewards, rows)
    assert torch.corrcoef(torch.cat([found[None], rows]))[0, 1:].abs().max() < 1e-12
    assert found.mean().item() == pytest.approx(rewards.mean().item())
    # The fit is the ordinary one with an intercept.
    design = torch.cat([torch.ones(1, K, dtype=torch.float64), rows]).T
    fit = design @ torch.linalg.lstsq(design, rewards[:, None]).solution[:, 0]
    torch.testing.assert_close(found, rewards - fit + rewards.mean())
    torch.testing.assert_close(neutral_rewards(rewards, rows, [0.25]), rewards - 0.25 * (rewards - found))
    # Unequal shares: each of its statistic's own part, beyond the statistics before it.
    first, both = neutral_rewards(rewards, rows[:1]), neutral_rewards(rewards, rows[:2])
    torch.testing.assert_close(neutral_rewards(rewards, rows[:2], [1.0, 0.25]), first + 0.25 * (both - first))
    assert neutral_rewards(rewards.float(), rows).dtype == torch.float32


def test_statistics_that_say_nothing_more_change_nothing() -> None:
    rewards, row = normal(K), normal(1, K, seed=1)
    # Constant but for rounding: 0.1 added up is not the same everywhere.
    constant = torch.full((1, K), 0.3, dtype=torch.float64)
    constant[0, ::2] = 0.1 + 0.1 + 0.1
    assert torch.equal(neutral_rewards(rewards, constant), rewards)
    alone = neutral_rewards(rewards, row)
    for more in (constant, row, -3 * row + 1e-9 * normal(1, K, seed=2)):
        torch.testing.assert_close(neutral_rewards(rewards, torch.cat([row, more]), [1.0, 0.5]), alone)


def test_a_reward_that_is_linear_in_a_statistic_leaves_nothing() -> None:
    rows = 1000 + normal(2, K)
    found = neutral_rewards((0.3 * rows[0] - 2 * rows[1]).float(), rows, keep_spread=True)
    # Not even rounding, which a z-score would blow up.
    assert (found == found[0]).all()


def test_a_normalised_reward_gets_its_spread_back() -> None:
    rewards, row = normal(K), normal(1, K, seed=1)
    left = neutral_rewards(rewards, row)
    stretched = neutral_rewards(rewards, row, keep_spread=True)
    assert stretched.std().item() == pytest.approx(rewards.std().item())
    assert torch.corrcoef(torch.stack([left, stretched]))[0, 1].item() == pytest.approx(1)
    # Where nearly all of it was the statistic, noise stays small.
    almost = row[0] + 1e-3 * rewards
    assert neutral_rewards(almost, row, keep_spread=True).std() < 0.02
    # Without the limit, a method that divides by the group's deviation would train on this remainder.
    assert neutral_rewards(almost, row).std() == 0


def test_figures_are_of_the_reward_before() -> None:
    statistics = {"a": normal(K, 2, seed=1), "b": normal(K, 2, seed=2)}
    rewards = [normal(K), statistics["b"][:, 1] * 2]
    found, figures = nuisance.neutralise(rewards, statistics, [1.0], True)
    for name, values in statistics.items():
        expected = [torch.corrcoef(torch.stack([own, values[:, p]]))[0, 1].item() for p, own in enumerate(rewards)]
        assert figures[f"neutral/{name}"] == pytest.approx(expected)
    rows = torch.stack([values[:, 0] for values in statistics.values()])
    taken = 1 - (neutral_rewards(rewards[0], rows).var() / rewards[0].var()).item()
    assert figures["neutral/share"] == pytest.approx([taken, 1.0])
    # Stretched, the reward's variance would say nothing.
    assert found[0].var().item() == pytest.approx(rewards[0].var().item())
    flat = nuisance.neutralise([torch.ones(K)] * 2, statistics, [1.0], False)[1]
    assert flat == {"neutral/a": [0.0] * 2, "neutral/b": [0.0] * 2, "neutral/share": [0.0] * 2}


def test_statistics_of_groups() -> None:
    latents = torch.tensor([[3.0, 4.0], [-1.0, 0.0], [1.0, 2.0]])[:, None, :, None]
    pictures = np.stack([np.full((1, 4, 4, 3), level, np.uint8) for level in (0, 51, 255)])
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])[:, None]
    names = ("latent_norm", "latent_distance", "feature_distance", "brightness")
    found = nuisance.measure(names, latents, pictures, features)
    expected = ([25, 1, 5], [8, 8, 0], [0.5, 0.5, 1], [0, 0.2, 1])
    for name, values in zip(names, expected, strict=True):
        assert (found[name].shape, found[name].dtype) == ((3, 1), torch.float64)
        assert found[name][:, 0].tolist() == pytest.approx(values)
    with pytest.raises(ValueError, match="latent_norm is not finite"):
        nuisance.measure(["latent_norm"], torch.full((3, 1, 2), 1e30), pictures, None)


def test_settings_know_the_statistics() -> None:
    assert set(get_args(Nuisance)) == nuisance.STATISTICS.keys()
    for name, statistic in nuisance.STATISTICS.items():
        assert TrainConfig(neutral=(name,)).needs_features == (statistic.on == "features")


def trained(rule: str, wanted: float, updates: int = 150) -> tuple[float, float]:
    """Mean of the first coordinate and standard deviation of a Gaussian in eight dimensions, after policy gradient with the
    reward -|x - a|^2, where a has `wanted` as first coordinate."""
    mean, log_sd = torch.zeros(8, requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([mean, log_sd], lr=0.02)
    aim = torch.tensor([wanted] + [0.0] * 7)
    for update in range(updates):
        loss = torch.zeros(())
        for group in range(4):
            noise = normal(K, 8, seed=4 * update + group).float()
            x = (mean + log_sd.exp() * noise).detach()
            rewards = -(x - aim).square().sum(1)
            if rule != "none":
                rewards = neutral_rewards(rewards, nuisance.STATISTICS[rule].function(x)[None])
            policy = torch.distributions.Normal(mean, log_sd.exp())
            loss = loss - (objectives.group_advantage(rewards) * policy.log_prob(x).sum(1)).mean() / 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return mean[0].item(), log_sd.exp().item()


def test_a_gaussian_does_not_shrink() -> None:
    assert trained("none", 0.0)[1] < 0.1
    assert trained("latent_norm", 0.0) == pytest.approx((0.0, 1.0), abs=1e-3)


def test_what_else_the_reward_asks_for_is_learned() -> None:
    mean, sd = trained("none", 2.0, 20)
    assert mean > 0.35 and sd < 0.5
    for rule in ("latent_norm", "latent_distance"):
        mean, sd = trained(rule, 2.0, 20)
        assert mean > 0.35 and sd > 0.8
