"""Rollout plans of every method, the table of network evaluations, and GARDO's gate."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from tmpo_trainer import tree
from tmpo_trainer.methods import gardo
from tmpo_trainer.methods.base import Planner, cost, evaluations
from tmpo_trainer.settings.config import TrainConfig

#: FLUX.1-dev at 512x512, six steps.
SIGMAS = torch.tensor([1, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0])
KL = {"kl_weight": 0.03}
GARDO = {"kl_weight": 0.04, "auxiliary": ("imagereward",)}


def planner(method: str, sigmas: torch.Tensor = SIGMAS, **settings: Any) -> Planner:
    return Planner(TrainConfig(**{"method": method, "kernel": "flow_sde", "kappa": 1e9, **settings}), sigmas)


@pytest.mark.parametrize(
    ("method", "settings", "update", "rollout", "replay", "reference"),
    [
        ("tmpo", {}, 0, 96, 12, 0),
        ("tmpo", {}, 10**6, 54, 12, 0),
        ("tmpo", {"anchor": "ref"}, 0, 96, 12, 12),
        ("tmpo-beta-1", {}, 0, 96, 12, 0),
        ("tmpo-step-balance", {}, 0, 96, 12, 0),
        ("tmpo-fixed-branching", {}, 10**6, 96, 12, 0),
        ("tmpo-no-tree", {}, 0, 162, 54, 0),
        ("flow-grpo", KL, 0, 162, 135, 135),
        ("mix-grpo", KL, 0, 162, 108, 108),
        ("gardo", GARDO, 0, 162, 135, 135),
    ],
)
def test_network_evaluations(
    method: str, settings: dict[str, Any], update: int, rollout: int, replay: int, reference: int
) -> None:
    """By counting the rows that a network sees; `evaluations` must say the same."""
    made = planner(method, **settings)
    plan = made.plan(update)
    rows: Counter[bool] = Counter()

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        rows[torch.is_grad_enabled()] += len(x)
        return x * scale

    scale = torch.ones((), requires_grad=True)
    run = tree.rollout(velocity, tree.keyed_noise((0,), (2,)), SIGMAS, plan, kernel="flow_sde")
    assert (rows[False], rows[True]) == (rollout, 0) and len(run.leaves) == 27
    tree.replay(velocity, run, torch.ones_like(run.log_probs))
    assert rows[True] == replay
    counts = evaluations(made.config, plan)
    assert counts == {"rollout": rollout, "reference": reference, "ratio": 0, "replay": replay}
    assert cost(counts) == rollout + reference + 2 * replay


def test_tree_grpo_draws_early_windows_more_often() -> None:
    made = planner("tree-grpo", **KL)
    plans = [made.plan(update) for update in range(2000)]
    starts = Counter(min(plan.fanout) for plan in plans)
    assert all(list(plan.fanout) == list(range(min(plan.fanout), min(plan.fanout) + 3)) for plan in plans)
    # Odds 4 : 2 : 1, within four standard deviations.
    for start, share in ((1, 4 / 7), (2, 2 / 7), (3, 1 / 7)):
        assert abs(starts[start] - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5
    assert {plan.rollout_evaluations for plan in plans} == {94, 68, 42}
    assert {plan.train_evaluations for plan in plans} == {13} and {plan.leaves for plan in plans} == {27}
    assert [made.plan(u).fanout for u in range(9)] == [planner("tree-grpo", **KL).plan(u).fanout for u in range(9)]
    assert [made.plan(u).fanout for u in range(99)] != [
        planner("tree-grpo", seed=1, **KL).plan(u).fanout for u in range(99)
    ]


def test_mix_grpo_window_slides_and_stays_at_the_end() -> None:
    made = planner("mix-grpo", **KL)
    assert [list(made.plan(u).fanout) for u in (0, 24, 25, 49, 50, 10**6)] == [
        [1, 2, 3, 4], [1, 2, 3, 4], [2, 3, 4, 5], [2, 3, 4, 5], [2, 3, 4, 5], [2, 3, 4, 5],
    ]  # fmt: skip
    quick = planner("mix-grpo", window=2, window_every=1, **KL)
    assert [min(quick.plan(u).fanout) for u in range(6)] == [1, 2, 3, 4, 4, 4]


def test_no_tree_has_the_steps_of_the_tree() -> None:
    with_tree, without = planner("tmpo", kappa=6), planner("tmpo-no-tree", kappa=6)
    for update in range(50):
        one, other = with_tree.plan(update), without.plan(update)
        assert list(one.fanout) == list(other.fanout) and set(other.fanout.values()) == {1}
        assert one.leaves == other.leaves == other.roots == 27


def test_no_noise_where_it_would_stay_in_the_picture() -> None:
    sd3 = torch.tensor([1, 0.923, 0.819, 0.668, 0.432, 0.0089, 0])
    assert list(planner("flow-grpo", sd3, branch_late=(1, 2, 3), **KL).plan(0).fanout) == [1, 2, 3, 4]


def test_beta() -> None:
    assert [TrainConfig(method="tmpo-beta-1").beta(u) for u in (0, 75, 500)] == [1, 1, 1]


# -- GARDO's gate --------------------------------------------------------------------------------------------------


def test_win_rate() -> None:
    np.testing.assert_allclose(gardo.win_rate(np.array([3.0, 1, 2, 1])), [3.5 / 4, 1 / 4, 2.5 / 4, 1 / 4])
    np.testing.assert_allclose(gardo.win_rate(np.zeros(5)), [0.5] * 5)


def test_gate_holds_the_most_suspicious() -> None:
    gate = gardo.Gate()
    reward = np.arange(100.0)
    # The reward likes the last ones, both other scores the first.
    other = reward[::-1].copy()
    held = gate.held(reward, [other, other])
    # Half are suspicious; a tenth of them is held.
    assert held.sum() == 5 and held[-5:].all()
    assert not gardo.Gate().held(reward, [reward, 10 * reward]).any()


def test_gate_widens_when_suspicion_grows_and_narrows_when_it_falls() -> None:
    gate, reward = gardo.Gate(), np.arange(100.0)

    def feed(strength: float) -> float:
        # Rank correlation falls with strength.
        noise = np.random.default_rng(0).permutation(100)
        gate.held(reward, [reward * (1 - strength) + noise * strength])
        return gate.share

    assert feed(0.5) == gardo.SHARE, "nothing to compare with yet"
    assert feed(0.8) == pytest.approx(0.11) and feed(0.6) == pytest.approx(0.11)
    assert feed(0.3) == pytest.approx(0.099)
    for strength in np.linspace(0.8, 1, 30):
        feed(strength)
    assert gate.share <= gardo.SHARE_MAX and len(gate.memory) == gardo.MEMORY


def test_reference_is_renewed_by_kl_or_age() -> None:
    gate = gardo.Gate()
    # Every 15 updates, the first time when 15 are done.
    assert [update for update in range(50) if gate.renew()] == [15, 30, 45]
    gate.kl = 1.01 * gardo.KL_LIMIT
    assert gate.renew() and gate.kl == 0 and not gate.renew()
    other = gardo.Gate()
    other.load(gate.state())
    assert other.state() == gate.state()
