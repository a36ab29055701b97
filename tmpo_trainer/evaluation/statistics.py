"""Means, paired bootstrap intervals and the verdict of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from .held_out import Evaluation

#: Limits of `verdict`: largest loss of LGMD, smallest share of cosine diversity, largest change of the latent std.
LGMD_LOSS, COSINE_SHARE, LATENT_STD_SHARE = 0.05, 0.9, 0.15
#: Prompts in all draws that a bootstrap makes at once.
BLOCK = 1 << 20


class Interval(NamedTuple):
    """A mean over prompts and the ends of its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    def text(self, form: str = ".3f") -> str:
        """`mean [low, high]`, each number in the given format."""
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def finite(self) -> dict[str, float | None]:
        """For JSON, which has no infinity: the ends of a single prompt's interval are null."""
        return {key: value if np.isfinite(value) else None for key, value in self._asdict().items()}

    @classmethod
    def of(cls, stored: Mapping[str, float | None]) -> Interval:
        """From what `finite` has made of one with a finite mean."""
        mean, low, high = (stored[key] for key in ("mean", "low", "high"))
        assert mean is not None
        return cls(mean, -np.inf if low is None else low, np.inf if high is None else high)


def paired_gain(
    base: np.ndarray,
    trained: np.ndarray,
    prompts: Sequence[str],
    seed: int = 0,
    draws: int = 10_000,
    weights: np.ndarray | None = None,
) -> Interval:
    """Mean gain per prompt and its 95% bootstrap interval over different prompts. `[P]` or `[P, n]` each.

    The copies of a prompt are drawn together: more pictures of a prompt say nothing about other prompts. A single
    prompt's interval is infinite.

    Args:
        prompts: `[P]`; copies of a prompt are equal. weights: `[P]`, of the prompts in the mean; by default equal ones.
    """
    difference = (trained - base).reshape(len(base), -1).mean(1)
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    own = np.array([places[prompt] for prompt in prompts])
    sums = np.zeros(len(places), difference.dtype)
    np.add.at(sums, own, difference if weights is None else weights * difference)
    sizes = np.bincount(own, weights).astype(difference.dtype)
    mean = difference.mean() if weights is None else np.average(difference, weights=weights)
    return ratio(sums, sizes, seed, draws)._replace(mean=float(mean))


def ratio(above: np.ndarray, below: np.ndarray, seed: int = 0, draws: int = 10_000) -> Interval:
    """sum(above) / sum(below) of `[P]` different prompts and its 95% bootstrap interval, infinite for a single prompt."""
    count, centre = len(above), float(above.sum() / below.sum())
    if count < 2:
        return Interval(centre, -np.inf, np.inf)
    random, found = np.random.default_rng(seed), []
    # Some draws at a time, or a long list of prompts would take gigabytes.
    block = max(1, BLOCK // count)
    for first in range(0, draws, block):
        drawn = random.integers(0, count, (min(block, draws - first), count))
        found.append(above[drawn].sum(1) / below[drawn].sum(1))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return Interval(centre, float(low), float(high))


def interval(values: np.ndarray, prompts: Sequence[str]) -> Interval:
    """Mean over prompts and its 95% bootstrap interval, see `paired_gain`. `[P]` or `[P, n]`."""
    return paired_gain(np.zeros_like(values), values, prompts)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; every row has as many cells as the head."""
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)])


def counted(prompts: Sequence[str], kind: str = "prompts") -> str:
    """`240 prompts`, or with copies `960 prompts (240 different)`."""
    different = len(set(prompts))
    return f"{len(prompts)} {kind}" + (f" ({different} different)" if different < len(prompts) else "")


def verdict(base: Evaluation, trained: Evaluation, score: str) -> dict[str, bool]:
    """The claims of a successful run, each true or false: the score rose, and nothing collapsed or overshot."""
    before, after = ({name: v.mean() for name, v in model.diversity.items()} for model in (base, trained))
    claims = {
        f"{score} rose (95% interval above 0)": (
            paired_gain(base.scores[score], trained.scores[score], base.prompts).low > 0
        ),
        f"LGMD at least the base's less {LGMD_LOSS}": after["LGMD"] >= before["LGMD"] - LGMD_LOSS,
        f"cosine diversity at least {COSINE_SHARE:.0%} of the base's": (
            after["cosine diversity"] >= COSINE_SHARE * before["cosine diversity"]
        ),
        f"latent standard deviation within {LATENT_STD_SHARE:.0%} of the base's": (
            abs(trained.latent_std / base.latent_std - 1) <= LATENT_STD_SHARE
        ),
    }
    return {claim: bool(holds) for claim, holds in claims.items()}


def summary(base: Evaluation, trained: Evaluation) -> dict[str, Any]:
    """Means of base and trained model, and the gains with their 95% paired intervals."""
    before, after = base.measures, trained.measures
    return {
        "base": {name: float(values.mean()) for name, values in before.items()} | {"latent_std": base.latent_std},
        "trained": {name: float(values.mean()) for name, values in after.items()} | {"latent_std": trained.latent_std},
        "gain": {name: paired_gain(before[name], after[name], base.prompts).finite() for name in before},
    }
