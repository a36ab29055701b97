"""Drift: how the trained model's pictures differ from the base's pictures of the same noise, one statistic at a time.

A reward can rise because all pictures become brighter, sharper or more alike, whatever their prompt asks for. Three figures of
each statistic show that:

- The shift is the mean difference, also in units of the base's standard deviation within a prompt.
- The slope is the regression of the trained model's value on the base's within the prompts. It is 1 if the pictures keep their
  differences, and .9 if each moves a tenth of the way to the mean of its prompt.
- The spread is the trained model's standard deviation within a prompt over the base's. A slope below 1 with a spread of 1 is no
  contraction: the pictures of a prompt have changed places.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .statistics import Interval, markdown_table, paired_gain, ratio

#: A larger shift is warned of, in standard deviations: 69% of the pictures are then beyond what half of the base's were.
SHIFT = 0.5
#: A smaller spread is warned of, and one above its inverse: a fifth of the variance within a prompt is then gone.
SPREAD = 0.9
#: A spread is warned of only if it is that of so many prompts, or pictures of the only one. Variances have heavy tails, and the
#: interval of a few of them is far too narrow.
FEW = 20
#: Bootstrap draws: fewer than for gains, since there are many figures, and evaluations during training must cost little.
DRAWS = 2000

#: The settings that hold a drift, for the texts below.
HOLDS_SHIFT = "`neutral` with the name of a statistic that moved (at a `neutral_share` of 1)"
HOLDS_SPREAD = "`neutral` with `latent_distance` or `feature_distance`"

#: A figure that does not exist, because no prompt has two pictures that differ.
NONE = Interval(np.nan, np.nan, np.nan)


@dataclass(frozen=True)
class Drift:
    """The drift of one statistic, see the module, with 95% bootstrap intervals over prompts.

    base, trained: means. shift: mean of trained less base. sd: the base's standard deviation within a prompt. sd, slope and
    spread are nan if no prompt has two pictures that differ in the statistic. units: how many prompts slope and
    spread are of, or pictures of the only one.
    """

    base: float
    trained: float
    shift: Interval
    sd: float
    slope: Interval
    spread: Interval
    units: int

    @property
    def relative(self) -> Interval:
        """The shift in units of `sd`."""
        return Interval(*(value / self.sd for value in self.shift))

    @property
    def moved(self) -> bool:
        """Whether the whole interval of the relative shift is beyond `SHIFT`."""
        return self.relative.low > SHIFT or self.relative.high < -SHIFT

    @property
    def contracted(self) -> bool:
        """Whether the whole interval of the spread is below `SPREAD`, of no less than `FEW` units."""
        return self.units >= FEW and self.spread.high < SPREAD

    @property
    def spread_out(self) -> bool:
        """Whether the whole interval of the spread is above the inverse of `SPREAD`, of no less than `FEW` units."""
        return self.units >= FEW and self.spread.low > 1 / SPREAD

    @property
    def beyond(self) -> bool:
        """Whether the drift is beyond a threshold."""
        return self.moved or self.contracted or self.spread_out

    def finite(self) -> dict[str, Any]:
        """For JSON: a figure that does not exist is null."""
        return {
            "base": self.base,
            "trained": self.trained,
            "sd": self.sd if np.isfinite(self.sd) else None,
            "shift": self.shift.finite(),
            "shift/sd": self.relative.finite(),
            "slope": self.slope.finite(),
            "spread": self.spread.finite(),
        }


def drift(base: np.ndarray, trained: np.ndarray, prompts: Sequence[str]) -> Drift:
    """The drift of one statistic from its values `[P, n]` for the same noise.

    Args:
        prompts: `[P]`; the pictures of equal prompts are those of one prompt. If all are equal, the intervals are over
            its pictures and say nothing about other prompts.
    """
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    own = np.array([places[prompt] for prompt in prompts]).repeat(base.shape[1])
    x, y = base.ravel(), trained.ravel()
    counts = np.bincount(own)
    dx, dy = (values - (np.bincount(own, values) / counts)[own] for values in (x, y))
    # The bootstrap draws prompts, or the pictures of the only one.
    unit = own if len(counts) > 1 else np.arange(len(x))
    xx, xy, yy = (np.bincount(unit, product) for product in (dx * dx, dx * dy, dy * dy))
    shift = paired_gain(x, y, [str(number) for number in unit], draws=DRAWS)
    sd = float(np.sqrt(xx.sum() / max(1, len(x) - len(counts))))
    # Pictures that do not differ have a standard deviation of rounding errors.
    least = 1e-9 * np.abs(x).max()
    if sd <= least:
        return Drift(float(x.mean()), float(y.mean()), shift, np.nan, NONE, NONE, 0)
    kept = xx > least**2
    slope, variance = ratio(xy[kept], xx[kept], draws=DRAWS), ratio(yy[kept], xx[kept], draws=DRAWS)
    # If a single prompt is kept, the ends are infinite.
    spread = Interval(*(float(np.sign(value) * abs(value) ** 0.5) for value in variance))
    return Drift(float(x.mean()), float(y.mean()), shift, sd, slope, spread, int(kept.sum()))


def drifts(
    base: Mapping[str, np.ndarray], trained: Mapping[str, np.ndarray], prompts: Sequence[str]
) -> dict[str, Drift]:
    """The drift of every statistic, see `drift`."""
    return {name: drift(values, trained[name], prompts) for name, values in base.items()}


def table(found: Mapping[str, Drift]) -> str:
    """A Markdown table with a row per statistic."""
    rows = [
        [
            name.replace("_", " "),
            f"{one.base:.3f}",
            f"{one.trained:.3f}",
            f"{one.shift.mean:+.3f}",
            one.relative.text("+.2f") if np.isfinite(one.sd) else "none",
            one.slope.text(".2f") if np.isfinite(one.sd) else "none",
            one.spread.text(".2f") if np.isfinite(one.sd) else "none",
        ]
        for name, one in found.items()
    ]
    text = markdown_table(["drift", "base", "trained", "shift", "shift / sd of the base", "slope", "spread"], rows)
    lacking = [row[0] for row in rows if row[-1] == "none"]
    if lacking:
        text += f"\n\n{', '.join(lacking)}: no prompt has two pictures that differ, so there is no slope."
    return text


def warning(found: Mapping[str, Drift], neutral: Collection[str] = ()) -> str:
    """Which statistics are beyond the thresholds, and the settings that hold them, on one line; "" if there are none.

    Args:
        neutral: what the run takes out of its reward wholly, which is not advised again.
    """
    parts, settings = [], []
    for name, one in found.items():
        if one.moved:
            parts.append(f"{name} moved by {one.relative.mean:+.2f} of the base's standard deviations")
        if one.contracted or one.spread_out:
            verb = "contracted" if one.contracted else "spread"
            parts.append(f"{name} {verb} (spread {one.spread.mean:.2f}, slope {one.slope.mean:.2f})")
    if not parts:
        return ""
    if any(one.moved and name not in neutral for name, one in found.items()):
        settings.append(HOLDS_SHIFT)
    spread = any(one.contracted or one.spread_out for one in found.values())
    if spread and not {"latent_distance", "feature_distance"} & set(neutral):
        settings.append(HOLDS_SPREAD)
    settings.append("a larger `kl_weight`")
    return f"drift: {', '.join(parts)}. It is held by {' or '.join(settings)}."


def section(found: Mapping[str, Drift], neutral: Collection[str] = ()) -> str:
    """The table, and the warning below it if there is one, see `warning`."""
    return "\n\n".join(part for part in (table(found), warning(found, neutral)) if part)


def content(found: Mapping[str, Drift]) -> dict[str, Any]:
    """For JSON."""
    return {name: one.finite() for name, one in found.items()}


def figures(found: Mapping[str, Drift], group: str) -> dict[str, float]:
    """Single numbers for a tracker: `group/<name>` is the shift in standard deviations, `group/<name> slope` the slope."""
    with_sd = {name: one for name, one in found.items() if np.isfinite(one.sd)}
    return {f"{group}/{name}": one.relative.mean for name, one in with_sd.items()} | {
        f"{group}/{name} slope": one.slope.mean for name, one in with_sd.items()
    }


def by_arm(arms: Mapping[str, Sequence[Mapping[str, Drift]]]) -> str:
    """A Markdown table with a row per arm: each statistic's shift / sd, slope and spread, means over the arm's runs."""

    def cell(runs: Sequence[Drift]) -> str:
        if not np.isfinite([one.sd for one in runs]).all():
            return "none"
        shift, slope, spread = np.mean([[o.relative.mean, o.slope.mean, o.spread.mean] for o in runs], 0)
        text = f"{shift:+.2f}, {slope:.2f}, {spread:.2f}"
        return f"**{text}**" if all(one.beyond for one in runs) else text

    names = list(next(iter(next(iter(arms.values())))))
    rows = [[arm, *(cell([run[name] for run in runs]) for name in names)] for arm, runs in arms.items()]
    return "\n\n".join(
        [
            "Drift from the base's pictures of the same noise: shift in the base's standard deviations, slope, spread. "
            f"Bold: in every run the shift is beyond {SHIFT} or the spread is outside {SPREAD} to {1 / SPREAD:.2f}, the whole "
            f"interval included; {HOLDS_SHIFT}, {HOLDS_SPREAD} and a larger `kl_weight` hold it.",
            markdown_table(["", *(name.replace("_", " ") for name in names)], rows),
        ]
    )
