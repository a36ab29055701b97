"""Drift on values whose figures are known."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from tmpo_trainer.evaluation import appearance, drift
from tmpo_trainer.evaluation.drift import Drift, drifts

PROMPTS = [f"prompt {i}" for i in range(30)]


def values(images: int = 8) -> np.ndarray:
    """`[30, images]` about means that differ by prompt, with a standard deviation of 2 within a prompt."""
    rng = np.random.default_rng(0)
    return 10 * rng.normal(size=(30, 1)) + 2 * rng.normal(size=(30, images))


def test_equal_pictures_have_no_drift() -> None:
    x = values()
    found = drift.drift(x, x.copy(), PROMPTS)
    assert found.shift == (0, 0, 0) and found.relative == (0, 0, 0) and not found.beyond
    assert found.slope == pytest.approx((1, 1, 1)) and found.spread == pytest.approx((1, 1, 1))
    within = x - x.mean(1, keepdims=True)
    assert found.sd == pytest.approx(((within**2).sum() / (30 * 7)) ** 0.5)


def test_pictures_that_contract_to_their_prompts_mean_have_that_slope() -> None:
    x = values()
    means = x.mean(1, keepdims=True)
    found = drift.drift(x, means + 0.9 * (x - means), PROMPTS)
    assert found.shift == pytest.approx((0, 0, 0))
    assert found.slope == pytest.approx((0.9, 0.9, 0.9)) and found.spread == pytest.approx((0.9, 0.9, 0.9))


def test_a_constant_is_a_shift_alone() -> None:
    x = values()
    found = drift.drift(x, x + 1.5, PROMPTS)
    assert found.shift == pytest.approx((1.5, 1.5, 1.5)) and found.slope == pytest.approx((1, 1, 1))
    assert found.relative == pytest.approx([1.5 / found.sd] * 3) and found.trained - found.base == pytest.approx(1.5)


def test_pictures_that_change_places_do_not_contract() -> None:
    """Their slope is low, as if they did; the spread tells."""
    x = values()
    found = drift.drift(x, np.roll(x, 1, axis=1), PROMPTS)
    assert found.slope.high < 0.2 and found.spread == pytest.approx((1, 1, 1)) and not found.beyond


def test_intervals_are_over_different_prompts() -> None:
    """Half of the prompts contract: the slope is between. The copies of a prompt are one prompt with more pictures."""
    x = values()
    means = x.mean(1, keepdims=True)
    y = means + np.resize([1.0, 0.5], (30, 1)) * (x - means)
    found = drift.drift(x, y, PROMPTS)
    assert found.slope.low < 0.7 < found.slope.mean < 0.8 < found.slope.high
    copied = drift.drift(*(v.reshape(60, 4) for v in (x, y)), [p for p in PROMPTS for _ in range(2)])
    assert (copied.sd, *copied.slope, *copied.spread) == pytest.approx((found.sd, *found.slope, *found.spread))
    assert copied.shift == pytest.approx(found.shift)
    # Of a single prompt, over its pictures.
    alone = drift.drift(x[:2], y[:2] + 0.1 * x[:2] ** 2, ["a", "a"])
    assert alone.shift.low < alone.shift.mean < alone.shift.high < np.inf and alone.slope.low < alone.slope.high


@pytest.mark.parametrize("x", [values(1), np.full((30, 4), 0.1)], ids=["one picture each", "pictures alike"])
def test_without_pictures_that_differ_there_is_no_slope(x: np.ndarray) -> None:
    """The table says so, the rest stands, and JSON has null."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = drifts({"brightness": x}, {"brightness": x + 0.25}, PROMPTS)
        text = drift.table(found)
    one = found["brightness"]
    assert one.shift == pytest.approx((0.25, 0.25, 0.25)) and not one.beyond and drift.warning(found) == ""
    row, said = text.splitlines()[2], text.splitlines()[-1]
    assert row.endswith("| +0.250 | none | none | none |")
    assert said == "brightness: no prompt has two pictures that differ, so there is no slope."
    content = json.loads(json.dumps(drift.content(found), allow_nan=False))["brightness"]
    assert content["slope"] == {"mean": None, "low": None, "high": None} and content["sd"] is None
    assert drift.figures(found, "drift") == {}


def test_prompts_whose_pictures_are_alike_do_not_spoil_the_slope() -> None:
    x = values()
    x[4:] = 0.5
    found = drift.drift(x, x, PROMPTS)
    assert found.slope == pytest.approx((1, 1, 1))


@pytest.mark.parametrize(
    ("change", "scale", "says"),
    [
        (0.45, 1.0, None),
        (0.55, 1.0, "moved by +0.55 of"),
        (-0.55, 1.0, "moved by -0.55 of"),
        (0.0, 0.92, None),
        (0.0, 0.88, "contracted (spread 0.88, slope 0.88)"),
        (0.0, 1.1, None),
        (0.0, 1.13, "spread (spread 1.13, slope 1.13)"),
    ],
)
def test_a_warning_beyond_the_thresholds_names_what_holds_it(change: float, scale: float, says: str | None) -> None:
    x = values()
    means, sd = x.mean(1, keepdims=True), drift.drift(x, x, PROMPTS).sd
    found = drifts(
        {"contrast": x, "size": x}, {"contrast": means + scale * (x - means) + change * sd, "size": x}, PROMPTS
    )
    text = drift.warning(found)
    assert found["contrast"].beyond == (says is not None) and not found["size"].beyond
    if says is None:
        assert text == "" and drift.section(found) == drift.table(found)
        return
    assert text.startswith(f"drift: contrast {says}") and "size" not in text and "`kl_weight`" in text
    assert ("latent_distance" in text) == (scale != 1) and ("a statistic that moved" in text) == (change != 0)
    assert drift.section(found).endswith(text)
    # What the run already has is not advised again.
    text = drift.warning(found, ["contrast", "feature_distance"])
    assert text.endswith(". It is held by a larger `kl_weight`.") and drift.section(found, ["contrast"]) != text


def test_a_spread_of_few_prompts_is_not_warned_of() -> None:
    """As on a sample grid. A shift is: all pictures tell of it."""
    x = np.random.default_rng(0).normal(size=(19, 4))
    for prompts in (PROMPTS[:19], ["a"] * 19):
        found = drift.drift(x, 0.5 * x + 3, prompts)
        few = len(set(prompts)) > 1
        assert found.moved and found.spread.high < drift.SPREAD and found.contracted != few


def test_a_warning_needs_the_whole_interval() -> None:
    x = values()
    far = np.resize([6.0, -3.0], (30, 1))
    found = drift.drift(x, x + far, PROMPTS)
    assert found.relative.mean > drift.SHIFT > found.relative.low and not found.beyond


def test_statistics_of_pictures_and_latents() -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[1] = 255
    latents = np.stack([np.full((4, 2, 2), 2.0), np.resize([3.0, -4.0], (4, 2, 2))])
    found = appearance.measure(images, latents)
    assert tuple(found) == appearance.NAMES and "latent_norm" not in appearance.measure(images)
    assert found["brightness"] == pytest.approx([0, 1])
    assert found["latent_norm"] == pytest.approx([2, 12.5**0.5])


def test_the_table_of_arms_has_means_over_runs() -> None:
    def made(shift: float, scale: float) -> dict[str, Drift]:
        x = values()
        means, sd = x.mean(1, keepdims=True), drift.drift(x, x, PROMPTS).sd
        return drifts({"edge_density": x}, {"edge_density": means + scale * (x - means) + shift * sd}, PROMPTS)

    text = drift.by_arm({"a": [made(0.2, 1.0), made(0.4, 0.8)], "b": [made(0.6, 0.9), made(1.0, 0.7)]})
    assert text.splitlines()[-4:] == [
        "|  | edge density |", "|---|---|", "| a | +0.30, 0.90, 0.90 |", "| b | **+0.80, 0.80, 0.80** |"
    ]  # fmt: skip
