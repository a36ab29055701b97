"""Paired intervals and the verdict, on made-up figures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tmpo_trainer.evaluation import statistics
from tmpo_trainer.evaluation.held_out import Evaluation
from tmpo_trainer.evaluation.statistics import Interval, counted, paired_gain, verdict

CLAIMS = ("rose", "LGMD", "cosine", "latent standard deviation")


def made(score: float = 0.5, lgmd: float = 0.3, cosine: float = 0.2, latent_std: float = 1.0) -> Evaluation:
    """Made-up figures of 40 prompts x 4 images; the noise is the same in all, as in paired evaluations."""
    noise = np.random.default_rng(0).normal(0, 0.02, (40, 4))
    return Evaluation(
        prompts=[f"prompt {i}" for i in range(40)],
        scores={"shapes strict": score + noise, "other": noise},
        diversity={"LGMD": np.full(40, lgmd), "cosine diversity": np.full(40, cosine)},
        latent_std=latent_std,
        shown=[0],
        images=np.zeros((1, 4, 8, 8, 3), np.uint8),
    )


def named(count: int) -> list[str]:
    return [f"prompt {i}" for i in range(count)]


def test_a_single_prompt_is_no_evidence() -> None:
    alone = paired_gain(np.zeros(1), np.ones(1), ["a"])
    assert alone == (1.0, -np.inf, np.inf)
    assert alone.finite() == {"mean": 1.0, "low": None, "high": None}
    assert alone.text("+.1f") == "+1.0 [-inf, +inf]"
    assert Interval.of(alone.finite()) == alone


def test_many_prompts_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same numbers."""
    values = np.random.default_rng(0).normal(size=(2, 61))
    whole = paired_gain(*values, named(61))
    monkeypatch.setattr(statistics, "BLOCK", 500)
    assert paired_gain(*values, named(61)) == whole


def test_prompts_may_weigh_differently() -> None:
    """Two tasks of one and three prompts that count alike: the mean of their means."""
    gains = np.array([1.0, 0.0, 0.2, 0.1])
    found = paired_gain(np.zeros(4), gains, named(4), weights=np.array([1, 1 / 3, 1 / 3, 1 / 3]))
    assert found.mean == pytest.approx((1 + 0.1) / 2) and found.low < found.mean < found.high


def test_no_difference_is_no_gain() -> None:
    values = np.random.default_rng(0).normal(size=(30, 8))
    assert paired_gain(values, values, named(30)) == (0.0, 0.0, 0.0)


def test_a_constant_difference_has_no_width() -> None:
    """However much the prompts differ among themselves: the interval is paired."""
    values = 10 * np.random.default_rng(0).normal(size=30)
    assert paired_gain(values, values + 0.25, named(30)) == pytest.approx((0.25, 0.25, 0.25))
    assert paired_gain(values, values - 0.25, named(30))[0] == pytest.approx(-0.25)


def test_interval_is_over_prompts_and_about_two_standard_errors() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=(50, 6))
    gains = rng.normal(0.3, 0.5, 50)
    mean, low, high = paired_gain(base, base + gains[:, None], named(50))
    error = gains.std() / 50**0.5
    assert mean == pytest.approx(gains.mean())
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    assert paired_gain(base, base + gains[:, None], named(50)) == (mean, low, high)


def test_different_prompts_have_the_bootstrap_of_their_means() -> None:
    """Bit for bit in the scores' precision, because published figures come from it."""
    gains = np.random.default_rng(3).normal(size=(23, 4)).astype(np.float32)
    means = gains.mean(1)
    drawn = means[np.random.default_rng(0).integers(0, 23, (10_000, 23))].mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert paired_gain(np.zeros_like(gains), gains, named(23)) == (float(means.mean()), float(low), float(high))


def test_copies_of_a_prompt_are_one_prompt_with_more_pictures() -> None:
    gains = np.random.default_rng(4).normal(size=(12, 16))
    once = paired_gain(np.zeros_like(gains), gains, named(12))
    copied = gains.reshape(48, 4)
    assert paired_gain(np.zeros_like(copied), copied, [n for n in named(12) for _ in range(4)]) == pytest.approx(once)
    assert paired_gain(np.zeros(4), np.ones(4), ["a"] * 4) == (1.0, -np.inf, np.inf)
    assert counted(["a", "a", "b"]) == "3 prompts (2 different)" and counted(["a", "b"]) == "2 prompts"


def test_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        base = rng.normal(size=40)
        _, low, high = paired_gain(base, base + rng.normal(0.1, 1.0, 40), named(40), draws=500)
        covered += low <= 0.1 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_verdict_of_a_good_run() -> None:
    base = made()
    for trained in (made(0.6), made(0.6, lgmd=0.26, cosine=0.181, latent_std=1.14), made(0.51, latent_std=0.86)):
        claims = verdict(base, trained, "shapes strict")
        assert len(claims) == 4 and all(claims.values())
        assert all(type(holds) is bool for holds in claims.values())


@pytest.mark.parametrize(
    ("trained", "violated"),
    [
        (made(0.5), "rose"),
        (made(0.4), "rose"),
        (made(0.6, lgmd=0.24), "LGMD"),
        (made(0.6, cosine=0.179), "cosine"),
        (made(0.6, latent_std=1.16), "latent standard deviation"),
        (made(0.6, latent_std=0.84), "latent standard deviation"),
    ],
    ids=["no gain", "loss", "lgmd", "cosine", "overshoot", "shrinkage"],
)
def test_verdict_of_a_violated_claim(trained: Evaluation, violated: str) -> None:
    claims = verdict(made(), trained, "shapes strict")
    assert {word: next(holds for claim, holds in claims.items() if word in claim) for word in CLAIMS} == {
        word: word != violated for word in CLAIMS
    }


def test_verdict_needs_the_interval_above_0_not_the_mean() -> None:
    base = made()
    noisy = 0.02 + 0.5 * np.resize([1, -1], (40, 1))
    trained = replace(base, scores={"shapes strict": base.scores["shapes strict"] + noisy})
    gain, low, _ = paired_gain(base.scores["shapes strict"], trained.scores["shapes strict"], base.prompts)
    assert gain > 0 > low
    assert not next(iter(verdict(base, trained, "shapes strict").values()))
