"""The limit of training by reward: the base model tilted by its own reward, estimated from the base's own pictures.

For a prompt c, p(x | c) exp(b R(x)) / Z is the distribution with the highest mean reward at its KL divergence from the base,
so no model with that reward is nearer to the base. n pictures of the base estimate it without training: picture i of a prompt
gets the weight w_i = softmax(b R)_i, with one strength b for all prompts. Selecting the best of several pictures moves along
nearly the same curve.

Error. A prompt's weights are normalised over its n pictures, so its tilt is too weak. To first order in b, the reward gained
is too low by the factor (n - 1) / n and the diversity lost, a mean over pairs, by (n - 2) / n. The loss at a given reward is
therefore multiplied by (n - 1) / (n - 2). At larger b this is too much: on the demo, the loss from 8 pictures is within a
tenth of that from 32 for gains up to .15, and a quarter above it near the most that 8 pictures reach. The n pictures cannot be
tilted beyond the best of them. The intervals are bootstraps over prompts and do not include these errors.

What it cannot see. Of a prompt that the base never gets right, the weights stay as they are: the limit gains nothing there,
although a model may learn it from other prompts. A model can therefore lose less than the limit "needs". The limit also says
nothing about how to reach it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..files import replacing
from .statistics import Interval

if TYPE_CHECKING:
    from .held_out import Evaluation

#: The name of the diversity that the limit is about.
COSINE = "cosine diversity"
#: Strengths in units of one over the reward's standard deviation within prompts.
RELATIVE_STRENGTHS = np.concatenate([[0], np.geomspace(0.01, 100, 100)])
#: Bootstrap draws, as many as keep 500 prompts fast.
DRAWS = 2000
#: Numbers in one block of pair weights.
BLOCK = 4_000_000


def tilted(rewards: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """Self-normalised weights softmax(b R) of one prompt's pictures: `rewards [n]`, `strengths [B]` -> `[B, n]`."""
    logits = strengths[:, None] * (rewards - rewards.max())
    weights = np.exp(logits)
    return weights / weights.sum(1, keepdims=True)


def pair_mean(values: np.ndarray, rewards: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """Mean over pairs of different pictures, sum_{i != j} w_i w_j v_ij / sum_{i != j} w_i w_j, with w of `tilted`.

    Args:
        values: `[n, n]`, symmetric; a pair with NaN is left out. rewards: `[n]`, n >= 2. strengths: `[B]`.

    Returns:
        `[B]`, NaN where no pair is left.
    """
    first, second = np.triu_indices(len(rewards), 1)
    known = np.isfinite(values[first, second])
    if not known.any():
        return np.full(len(strengths), np.nan)
    first, second = first[known], second[known]
    # The weights of pairs are a softmax of their own: products of two weights may all round to zero.
    sums = rewards[first] + rewards[second]
    rows = max(1, BLOCK // len(sums))
    blocks = [strengths[start : start + rows] for start in range(0, len(strengths), rows)]
    return np.concatenate([tilted(sums, block) @ values[first, second] for block in blocks])


@dataclass(frozen=True)
class Front:
    """The tilted base at B strengths on P prompts. `[P, B]` each; the first strength is 0, the base itself.

    strengths: b, `[B]`, in one over the reward's unit. reward: its tilted mean. divergence: KL from the base in nats.
    spread: {name: how much the pictures of a prompt differ}: the mean cosine distance, and the variance of each factor.
    correction: what the losses are multiplied by because of the finite number of pictures, see the module.
    """

    prompts: Sequence[str]
    strengths: np.ndarray
    reward: np.ndarray
    divergence: np.ndarray
    spread: Mapping[str, np.ndarray]
    correction: float

    @classmethod
    def of(
        cls,
        prompts: Sequence[str],
        rewards: Sequence[np.ndarray] | np.ndarray,
        distances: Sequence[np.ndarray] | np.ndarray,
        factors: Mapping[str, Sequence[np.ndarray] | np.ndarray] | None = None,
        strengths: np.ndarray | None = None,
    ) -> Front:
        """Tilts each prompt's pictures.

        Args:
            prompts: P of them; copies of a prompt are tilted each for itself. rewards: `[n]` for each, n >= 2.
            distances: cosine distances `[n, n]` for each. factors: {name: `[n]` for each}, NaN where a picture has none.
            strengths: `[B]` from 0; by default `RELATIVE_STRENGTHS` over the reward's standard deviation within prompts.
        """
        rewards = [np.asarray(own, float) for own in rewards]
        deviation = np.sqrt(np.mean([own.var() for own in rewards]))
        at = RELATIVE_STRENGTHS / (deviation or 1.0) if strengths is None else strengths
        names = [COSINE, *(factors or {})]
        reward, divergence, spread = [], [], []
        for p, own in enumerate(rewards):
            weights = tilted(own, at)
            reward.append(weights @ own)
            divergence.append((weights * np.log(np.maximum(weights * len(own), 1e-300))).sum(1))
            columns = [np.asarray(values[p], float) for values in (factors or {}).values()]
            # The mean of half the squared difference over pairs is the variance without bias.
            tables = [np.asarray(distances[p], float), *((x[:, None] - x) ** 2 / 2 for x in columns)]
            spread.append([pair_mean(table, own, at) for table in tables])
        by_name = dict(zip(names, np.swapaxes(spread, 0, 1), strict=True))
        # A factor in which no prompt's pictures differ has nothing to lose.
        by_name = {name: own for name, own in by_name.items() if name == COSINE or np.nansum(own[:, 0]) > 0}
        # Two pictures are one pair, whose distance no tilt changes.
        corrections = [(len(own) - 1) / (len(own) - 2) for own in rewards if len(own) > 2]
        correction = float(np.mean(corrections)) if corrections else 1.0
        return cls(list(prompts), at, np.stack(reward), np.stack(divergence), by_name, correction)

    @property
    def flat(self) -> bool:
        """Whether no prompt's pictures differ in their features, so that there is no diversity to lose."""
        return not self.spread[COSINE][:, 0].sum() > 0

    def kept(self, name: str) -> np.ndarray:
        """The share of a spread that is kept at each strength, of a factor its standard deviation: `[B]`, 1 at b = 0."""
        means = self.spread[name][np.isfinite(self.spread[name][:, 0])].mean(0)
        return 1 - self.lost(name, means)

    def lost(self, name: str, means: np.ndarray) -> np.ndarray:
        """The share lost at each strength, at most 1: mean spreads `[..., B]` -> `[..., B]`, 0 at b = 0."""
        return np.minimum(1, self.correction * (1 - _share(name, means, means[..., :1])))

    def band(self, draws: int = DRAWS) -> tuple[np.ndarray, np.ndarray]:
        """Ends `[B]` of the 95% bootstrap interval of the cosine diversity kept at each strength."""
        means = _resampled(self.prompts, draws) @ self.spread[COSINE]
        low, high = np.percentile(1 - self.lost(COSINE, means), [2.5, 97.5], axis=0)
        return low, high


class Cost(NamedTuple):
    """What a model pays for its reward in one spread, and what the limit pays for the same reward.

    base, model: the spread, of a factor the standard deviation within a prompt. lost: the share of it that the model lost.
    needed: the share that the limit loses at the model's reward; None if its reward is not above the base's, or is beyond
    what the base's pictures reach. excess: lost / needed; None as well if the interval of `needed` is not above 0.
    slope: of the model's values on the base's within prompts, same noise, see `slope`. None for the cosine diversity.
    """

    base: float
    model: float
    lost: Interval
    needed: Interval | None
    excess: Interval | None
    slope: float | None

    def content(self) -> dict[str, Any]:
        """For JSON."""

        def plain(value: Interval | float | None) -> Any:
            if isinstance(value, Interval):
                return value.finite()
            return value if value is not None and np.isfinite(value) else None

        return {key: plain(value) for key, value in self._asdict().items()}


def costs(front: Front, reward: np.ndarray, spread: Mapping[str, np.ndarray]) -> dict[str, Cost]:
    """What a model costs in each spread that both have, without slopes.

    Args:
        reward: the model's mean reward of every prompt, `[P]`. spread: {name: `[P]`}, as in `Front`.
    """
    weights = _resampled(front.prompts)
    curve, gained = weights @ front.reward, weights @ reward
    found = {}
    for name, own in spread.items():
        if name not in front.spread:
            continue
        before, after = front.spread[name], own
        # Of a prompt without a value in two pictures nothing is known, at any strength.
        known = np.isfinite(before[:, 0]) & np.isfinite(after)
        if not known.any():
            continue
        sums = weights[:, known]
        base, model = sums @ before[known], sums @ after[known]
        total = sums.sum(1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            lost = 1 - _share(name, model, base[:, 0])
            limit = front.lost(name, base)
            # Where even the base's best pictures have less reward, the limit needs more than is known: any ratio is smaller.
            needed = np.array([np.interp(r, c, v, right=np.inf) for r, c, v in zip(gained, curve, limit, strict=True)])
        plain = [float(_root(name, value)) for value in (base[0, 0] / total[0, 0], model[0] / total[0, 0])]
        price = excess = None
        if gained[0] > curve[0, 0] and np.isfinite(needed[0]):
            price = _interval(needed, front.prompts)
            if price.low > 0:
                # At most one draw in 40 needs nothing: the interval's upper end stays finite.
                with np.errstate(divide="ignore", invalid="ignore"):
                    excess = _interval(np.where(needed > 0, lost / needed, np.inf), front.prompts)
        found[name] = Cost(plain[0], plain[1], _interval(lost, front.prompts), price, excess, None)
    return found


def slope(base: np.ndarray, model: np.ndarray) -> float | None:
    """Least-squares slope of the model's values on the base's, each less its prompt's mean: `[P, n]` each, same noise.

    1: every picture kept its place. Below 1: pictures have moved to their prompt's mean, or no longer correspond to the
    base's. A pair with NaN is left out.
    None if the base's pictures do not differ.
    """
    known = np.isfinite(base) & np.isfinite(model)
    count = known.sum(1, keepdims=True)
    x, y = (np.where(known, values, 0) for values in (base, model))
    x, y = (np.where(known, v - v.sum(1, keepdims=True) / np.maximum(count, 1), 0) for v in (x, y))
    square = float((x * x).sum())
    return float((x * y).sum()) / square if square > 0 else None


def front(base: Evaluation) -> Front | None:
    """The base's front for its first score; None if its pictures were not measured for it, are alike, or are less than three of
    a prompt: two are one pair, whose distance no tilt changes."""
    if base.distances is None or base.distances.shape[1] < 3:
        return None
    found = Front.of(base.prompts, target(base), base.distances, base.factors)
    return None if found.flat else found


def target(evaluation: Evaluation) -> np.ndarray:
    """The reward that the limit is about, the first score: `[P, n]`."""
    return next(iter(evaluation.scores.values()))


def compared(curve: Front, base: Evaluation, runs: Sequence[Evaluation]) -> dict[str, Cost]:
    """The costs of one arm's runs, averaged per prompt over the runs, by cosine diversity and by each factor."""
    spread = {COSINE: np.mean([run.diversity[COSINE] for run in runs], 0)}
    names = [name for name in base.factors if all(name in run.factors for run in runs)]
    for name in names:
        spread[name] = np.mean([_variance(run.factors[name]) for run in runs], 0)
    found = costs(curve, np.mean([target(run).mean(1) for run in runs], 0), spread)
    for name in set(names) & set(found):
        slopes = [slope(base.factors[name], run.factors[name]) for run in runs]
        known = [own for own in slopes if own is not None]
        found[name] = found[name]._replace(slope=float(np.mean(known)) if known else None)
    return found


def rows(label: str, found: Mapping[str, Cost]) -> list[list[str]]:
    """The cells of a table with a row per spread of one model, under `HEAD`."""

    def share(value: Interval | None) -> str:
        return "-" if value is None else value.text(".1%").replace("inf%", "?")

    return [
        [
            label,
            name if name == COSINE else f"{name}, sd",
            f"{cost.base:.3g}",
            f"{cost.model:.3g}",
            share(cost.lost),
            share(cost.needed),
            "-" if cost.excess is None else cost.excess.text(".1f"),
            "" if name == COSINE else "-" if cost.slope is None else f"{cost.slope:.2f}",
        ]
        for name, cost in found.items()
    ]


HEAD = ("", "spread within a prompt", "base", "model", "lost", "needed", "lost / needed", "slope")


def about(reward: str, alone: bool = False) -> str:
    """What a report says of the limit and of its table. reward: the name of the first score. alone: of a single prompt."""
    ends = "of a single prompt there is no interval." if alone else "in the draws of that end it is beyond them."
    return (
        f"The limit is the base tilted by its own {reward}. *Needed* is what it loses at the same {reward} as the model's. "
        "*Slope* is that of the model's values on the base's for the same noise (1: every picture kept its place; below: they "
        "have moved to their prompt's mean, or changed places). A dash: the reward did not rise, is beyond the base's best "
        f"pictures, or needs no more than the error. A question mark: {ends}"
    )


def draw(axis: Any, curve: Front) -> None:
    """The front on a matplotlib axis of reward over cosine diversity, with its 95% band over prompts."""
    base = float(curve.spread[COSINE][:, 0].mean())
    low, high = curve.band()
    reward = curve.reward.mean(0)
    axis.plot(base * curve.kept(COSINE), reward, color="grey", linewidth=1.5, label="limit", zorder=0)
    axis.fill_betweenx(reward, base * low, base * high, color="grey", alpha=0.2, linewidth=0, zorder=0)


def plot(path: Path, curve: Front, base: Evaluation, models: Mapping[str, Evaluation]) -> None:
    """Writes a PNG with the front, the base and models by label: reward over cosine diversity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 4), layout="constrained")
    axis = figure.subplots()
    draw(axis, curve)
    for label, shown in {"base": base, **models}.items():
        style: dict[str, Any] = {"color": "black", "marker": "X"} if shown is base else {"marker": "o"}
        axis.scatter(shown.diversity[COSINE].mean(), target(shown).mean(), s=70, label=label, **style)
    axis.set_xlabel(COSINE)
    axis.set_ylabel(f"{next(iter(base.scores))}, held out")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def point_rows(curve: Front, count: int = 8) -> list[list[str]]:
    """The cells of a table, under `POINTS_HEAD`, of points whose mean rewards are about evenly spaced."""
    reward, kept, divergence = curve.reward.mean(0), curve.kept(COSINE), curve.divergence.mean(0)
    chosen = sorted({int(np.abs(reward - level).argmin()) for level in np.linspace(reward[0], reward[-1], count)})
    return [[f"{curve.strengths[i]:.3g}", f"{reward[i]:.3f}", f"{kept[i]:.1%}", f"{divergence[i]:.3f}"] for i in chosen]


def content(curve: Front) -> dict[str, list[float]]:
    """The front for JSON: means over prompts at each strength."""
    columns = {"strength": curve.strengths, "reward": curve.reward.mean(0), "KL": curve.divergence.mean(0)}
    known = [name for name, spread in curve.spread.items() if np.isfinite(spread).any()]
    kept = {f"{name} kept": curve.kept(name) for name in known}
    return {name: np.round(values, 6).tolist() for name, values in (columns | kept).items()}


#: The head of `point_rows`: b in one over the reward's unit, mean reward, share of the cosine diversity, nats.
POINTS_HEAD: tuple[str, ...] = ("strength", "reward", "diversity kept", "KL")


def _root(name: str, values: Any) -> Any:
    """A factor's standard deviation from its variance; the cosine diversity as it is."""
    return values if name == COSINE else np.sqrt(values)


def _share(name: str, after: np.ndarray, before: np.ndarray) -> np.ndarray:
    return _root(name, after / before)


def _variance(values: np.ndarray) -> np.ndarray:
    """The variance of each prompt's values `[P, n]` without those that are NaN: `[P]`, NaN with fewer than two."""
    known = np.isfinite(values)
    count = known.sum(1)
    mean = np.where(known, values, 0).sum(1) / np.maximum(count, 1)
    square = np.where(known, values - mean[:, None], 0) ** 2
    return np.where(count > 1, square.sum(1) / np.maximum(count - 1, 1), np.nan)


def _resampled(prompts: Sequence[str], draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Weights of the P prompts: all equal in the first row, then of `draws` bootstrap samples. `[1 + draws, P]`.

    Copies of a prompt are drawn together, as in `statistics.paired_gain`.
    """
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    own = np.array([places[prompt] for prompt in prompts])
    count = len(places)
    drawn = np.random.default_rng(seed).integers(0, count, (draws, count))
    drawn += count * np.arange(draws)[:, None]
    times = np.bincount(drawn.ravel(), minlength=draws * count).reshape(draws, count)[:, own]
    weights = np.concatenate([np.ones((1, len(own))), times])
    return weights / weights.sum(1, keepdims=True)


def _interval(values: np.ndarray, prompts: Sequence[str]) -> Interval:
    """The first value, and the 95% range of the others; infinite for a single prompt."""
    if len(set(prompts)) < 2:
        return Interval(float(values[0]), -np.inf, np.inf)
    low, high = np.nanpercentile(values[1:], [2.5, 97.5], method="inverted_cdf")
    return Interval(float(values[0]), float(low), float(high))
