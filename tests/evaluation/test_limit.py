"""The limit: the base tilted by its own reward."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from tmpo_trainer.diversity import MEASURES
from tmpo_trainer.evaluation import limit
from tmpo_trainer.evaluation.held_out import Evaluation
from tmpo_trainer.evaluation.limit import COSINE, Front


def made(prompts: int = 4, images: int = 6, seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Prompts, rewards `[P, n]`, symmetric distances `[P, n, n]` and a factor `[P, n]` with a picture that has none."""
    random = np.random.default_rng(seed)
    distances = random.random((prompts, images, images))
    distances = distances + distances.transpose(0, 2, 1)
    factor = random.normal(size=(prompts, images))
    factor[0, 0] = np.nan
    return [f"p{i}" for i in range(prompts)], random.random((prompts, images)), distances, factor


def test_every_strength_is_the_sum_over_pictures_and_pairs() -> None:
    """Against loops; at strength 0 the plain means."""
    prompts, rewards, distances, factor = made()
    strengths = np.array([0, 0.7, 3.0])
    front = Front.of(prompts, list(rewards), list(distances), {"x": list(factor)}, strengths)
    for p in range(len(prompts)):
        for b, strength in enumerate(strengths):
            w = np.exp(strength * rewards[p]) / np.exp(strength * rewards[p]).sum()
            pairs = list(combinations(range(6), 2))
            cosine = sum(w[i] * w[j] * distances[p, i, j] for i, j in pairs) / sum(w[i] * w[j] for i, j in pairs)
            known = [pair for pair in pairs if p or 0 not in pair]
            square = sum(w[i] * w[j] * (factor[p, i] - factor[p, j]) ** 2 / 2 for i, j in known)
            assert front.reward[p, b] == pytest.approx((w * rewards[p]).sum())
            assert front.divergence[p, b] == pytest.approx((w * np.log(6 * w)).sum(), abs=1e-12)
            assert front.spread[COSINE][p, b] == pytest.approx(cosine)
            assert front.spread["x"][p, b] == pytest.approx(square / sum(w[i] * w[j] for i, j in known))
        assert front.reward[p, 0] == pytest.approx(rewards[p].mean())
        assert front.spread["x"][p, 0] == pytest.approx(np.nanvar(factor[p], ddof=1))
    assert front.kept(COSINE)[0] == 1


def test_three_pictures_by_hand() -> None:
    """Rewards 1, 1, 0 at strength log 2: weights 2/5, 2/5, 1/5, pairs 4 : 2 : 2. However strong, the two best remain."""
    table = np.array([[0, 0.1, 0.5], [0.1, 0, 0.3], [0.5, 0.3, 0]])
    front = Front.of(["p"], [np.array([1, 1, 0])], [table], strengths=np.array([0, np.log(2), 1e6]))
    assert front.reward[0].tolist() == pytest.approx([2 / 3, 4 / 5, 1])
    assert front.spread[COSINE][0].tolist() == pytest.approx([0.3, (4 * 0.1 + 2 * 0.5 + 2 * 0.3) / 8, 0.1])
    assert front.divergence[0, 2] == pytest.approx(np.log(3 / 2))
    # A single best picture leaves its pair with the next: no 0 / 0.
    alone = Front.of(["p"], [np.array([2.0, 1.0, 0.0])], [table], strengths=np.array([0, 1e6]))
    assert alone.spread[COSINE][0, 1] == pytest.approx(0.1)


def test_a_gaussian_keeps_its_variance() -> None:
    """N(0, 1) tilted by exp(b x) is N(b, 1), at the KL b^2 / 2."""
    x = np.random.default_rng(0).normal(size=(4, 1500))
    strengths = np.array([0, 0.5, 1])
    front = Front.of(list("abcd"), list(x), [np.zeros((1500, 1500))] * 4, {"x": list(x)}, strengths)
    assert front.reward.mean(0) == pytest.approx(strengths, abs=0.08)
    assert front.divergence.mean(0) == pytest.approx(strengths**2 / 2, abs=0.08)
    assert front.spread["x"].mean(0) == pytest.approx(np.ones(3), abs=0.15)


def test_equal_rewards_need_nothing() -> None:
    """And a higher reward is beyond the base's pictures: nothing can be said."""
    prompts, rewards, distances, _ = made()
    front = Front.of(prompts, list(np.full_like(rewards, 0.5)), list(distances))
    assert front.kept(COSINE) == pytest.approx(np.ones(len(front.strengths))) and np.abs(front.divergence).max() < 1e-12
    spread = {COSINE: 0.9 * front.spread[COSINE][:, 0]}
    for reward in (0.5, 0.6):
        cost = limit.costs(front, np.full(4, reward), spread)[COSINE]
        assert cost.lost.mean == pytest.approx(0.1) and cost.needed is None and cost.excess is None


def test_a_model_on_the_front_needs_all_that_it_loses() -> None:
    """Distances that grow with the difference in reward: a tilt must lose them. Half as much again is 1.5."""
    prompts, rewards, _, _ = made(prompts=12, images=40)
    distances = np.abs(rewards[:, :, None] - rewards[:, None])
    front = Front.of(prompts, list(rewards), list(distances))
    at = 60
    kept = front.kept(COSINE)[at]
    assert 0.3 < kept < 0.9
    base = front.spread[COSINE][:, 0]
    cost = limit.costs(front, front.reward[:, at], {COSINE: kept * base})[COSINE]
    assert cost.needed is not None and cost.excess is not None
    assert cost.needed.mean == pytest.approx(1 - kept) and cost.needed.low < 1 - kept < cost.needed.high
    assert cost.excess.mean == pytest.approx(1) and cost.excess.low < 1 < cost.excess.high
    more = limit.costs(front, front.reward[:, at], {COSINE: (1 - 1.5 * (1 - kept)) * base})[COSINE]
    assert more.excess is not None and more.excess.mean == pytest.approx(1.5)
    # No gain: nothing is needed, so nothing can be divided by it.
    for reward in (front.reward[:, 0], front.reward[:, 0] - 0.1):
        assert limit.costs(front, reward, {COSINE: front.spread[COSINE][:, at]})[COSINE][3:5] == (None, None)
    # A single prompt says nothing about others.
    single = Front.of(["a"] * 12, list(rewards), list(distances))
    assert limit.costs(single, front.reward[:, at], {COSINE: front.spread[COSINE][:, at]})[COSINE].excess is None


def test_where_the_pictures_end_the_ratio_is_small() -> None:
    """Draws of prompts whose best pictures have less reward than the model: what the limit needs there is more than known."""
    rewards = (np.random.default_rng(3).random((6, 6)) < 0.5).astype(float)
    # Right pictures are near each other.
    distances = (1 - 0.6 * rewards[:, :, None] * rewards[:, None]) * (1 - np.eye(6))
    front = Front.of(list("abcdef"), list(rewards), list(distances))
    spread = {COSINE: 0.9 * front.spread[COSINE][:, 0]}
    cost = limit.costs(front, rewards.mean(1) + 0.4, spread)[COSINE]
    assert cost.needed is not None and cost.needed.high == np.inf
    assert cost.excess is not None and cost.excess.low == pytest.approx(0, abs=1e-9) and np.isfinite(cost.excess.high)


@pytest.mark.parametrize("count", [4, 8])
def test_few_pictures_need_what_many_need(count: int) -> None:
    """Right pictures are closer to each other than wrong ones. Uncorrected, 4 pictures would need .64 of it and 8 .84."""
    random = np.random.default_rng(0)
    right = (random.random((40, 256)) < random.beta(1.2, 1.6, (40, 1))).astype(float)
    places = random.normal(size=(40, 256, 3)) * (1.1 - 0.2 * right[..., None])
    strengths = np.linspace(0, 3, 20)

    def needed(count: int) -> float:
        groups = [x.reshape(-1, count, *x.shape[2:]) for x in (right, places)]
        distances = ((groups[1][:, :, None] - groups[1][:, None]) ** 2).sum(-1)
        front = Front.of([str(i) for i in range(len(distances))], groups[0], distances, strengths=strengths)
        gained = front.reward.mean(0) - front.reward[:, 0].mean()
        return 1 - float(np.interp(0.1, gained, front.kept(COSINE)))

    assert needed(count) == pytest.approx(needed(256), rel=0.12)


def test_slope_is_what_was_kept_of_each_picture() -> None:
    """Contracted by .9 to each prompt's own mean, and moved; a value that is missing in one of both does not count."""
    base = np.random.default_rng(0).normal(size=(3, 5)) + np.array([[0], [10], [20]])
    model = 0.9 * (base - base.mean(1, keepdims=True)) + np.array([[3], [1], [7]])
    assert limit.slope(base, model) == pytest.approx(0.9)
    model[0, 0] = base[1, 1] = np.nan
    assert limit.slope(base, model) == pytest.approx(0.9)
    assert limit.slope(np.ones((2, 3)), np.ones((2, 3))) is None


def test_costs_of_two_runs_by_factor(tmp_path: Path) -> None:
    """The cells of the table: the sd that is left, its slope, and a dash where the reward did not rise."""
    prompts, rewards, distances, _ = made(prompts=3, images=5)
    factor = np.random.default_rng(1).normal(size=(3, 5))

    def evaluation(scale: float, gain: float) -> Evaluation:
        return Evaluation(
            prompts,
            {"right": rewards + gain},
            {name: scale * np.full(3, 0.5) for name in MEASURES},
            1.0,
            [0],
            np.zeros((1, 5, 8, 8, 3), np.uint8),
            distances,
            {"place": scale * factor},
        )

    base, runs = evaluation(1, 0), [evaluation(0.8, 0), evaluation(0.8, -0.1)]
    front = limit.front(base)
    assert front is not None
    cosine, place = limit.rows("x", limit.compared(front, base, runs))
    assert cosine[:2] == ["x", "cosine diversity"] and cosine[5:] == ["-", "-", ""]
    assert place[:2] == ["x", "place, sd"] and place[4].startswith("20.0% [") and place[5:] == ["-", "-", "0.80"]
    deviation = np.sqrt(factor.var(1, ddof=1).mean())
    assert place[2:4] == [f"{deviation:.3g}", f"{0.8 * deviation:.3g}"]
    limit.plot(tmp_path / "pareto.png", front, base, {"x": runs[0]})
    assert (tmp_path / "pareto.png").stat().st_size > 1000
    # Two pictures are one pair, which no tilt changes: the limit would seem to cost nothing.
    base.distances, base.scores = distances[:, :2, :2], {"right": rewards[:, :2]}
    assert limit.front(base) is None
    base.distances = None
    assert limit.front(base) is None


def test_what_does_not_differ_has_no_front() -> None:
    """A factor that is the same in all pictures has no row; pictures that are alike have no limit. Neither is NaN."""
    rewards, distances = np.array([[0.0, 1.0, 0.0]]), 1 - np.eye(3)[None]
    curve = limit.Front.of(["a"], rewards, distances, {"count": np.ones((1, 3)), "size": np.array([[1.0, 2.0, 3.0]])})
    assert set(curve.spread) == {limit.COSINE, "size"} and not curve.flat
    assert all(np.isfinite(values).all() for values in limit.content(curve).values())
    assert limit.Front.of(["a"], rewards, np.zeros((1, 3, 3))).flat


def test_one_short_group_does_not_correct_the_others() -> None:
    sizes = [64] * 19 + [3]
    rewards = [np.arange(n) % 2 for n in sizes]
    curve = limit.Front.of([str(i) for i in range(20)], rewards, [1 - np.eye(n) for n in sizes])
    assert curve.correction == pytest.approx((19 * 63 / 62 + 2) / 20)
