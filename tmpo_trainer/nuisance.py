"""The neutral advantage: rewards less what they owe to nuisance statistics of the samples.

Within the K samples of a prompt a reward may correlate with something that nobody asked for, such as contrast. All prompts
then push the model in that one direction, and it goes much further there than the reward is worth. The rewards are replaced
by their residual after a least-squares fit on such statistics, as evaluations of language models take out the length of an
answer (length-controlled AlpacaEval, arXiv:2404.04475). Every method that looks at rewards alone can use it.

`STATISTICS` lists the statistics. A new one needs an entry there and its name in `settings.config.Nuisance`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from . import diversity
from .pictures.statistics import PICTURE_STATISTICS, PictureStatistic

#: A statistic whose standard deviation is at most this share of its largest value is constant but for rounding. Directions
#: in which statistics differ by less than this share of what they have in common are left alone for the same reason.
CONSTANT = 1e-6
#: A residual of at most this share of the reward's spread, or of rewards' rounding in float32, is taken as 0.
ROUNDING = 1e-5
#: A residual is stretched at most this much. Where the statistics explain all but 1% of the variance, the rest is no signal.
MOST_STRETCH = 10.0


def latent_norm(latents: Tensor) -> Tensor:
    """|x|^2: `[K, ...]` -> `[K]`."""
    return latents.flatten(1).square().sum(1)


def latent_distance(latents: Tensor) -> Tensor:
    """|x - m|^2, where m is the group's mean: `[K, ...]` -> `[K]`."""
    return latent_norm(latents - latents.mean(0))


def _of_pictures(function: PictureStatistic) -> Callable[[np.ndarray], Tensor]:
    return lambda images: torch.from_numpy(function(images))


@dataclass(frozen=True)
class Statistic:
    """A number of each sample of a group.

    function: `[K, ...]` -> `[K]`. on: its input, final latents, features of pictures, or pictures (uint8 `[K, H, W, 3]`).
    """

    function: Callable[..., Tensor]
    on: Literal["latents", "features", "pictures"]


#: Every statistic by its name in the setting `neutral`.
STATISTICS = {
    "latent_norm": Statistic(latent_norm, "latents"),
    "latent_distance": Statistic(latent_distance, "latents"),
    "feature_distance": Statistic(diversity.mean_cosine_distances, "features"),
    **{name: Statistic(_of_pictures(function), "pictures") for name, function in PICTURE_STATISTICS.items()},
}


def measure(names: Sequence[str], latents: Tensor, images: np.ndarray, features: Tensor | None) -> dict[str, Tensor]:
    """Statistics of the samples of P prompts by name, float64 `[K, P]` on the CPU.

    Args:
        latents: `[K, P, ...]`. images: uint8 `[K, P, H, W, 3]`. features: `[K, P, D]`, needed if a statistic is on them.

    Raises:
        ValueError: a statistic is not finite.
    """
    given = {"latents": latents, "features": features, "pictures": images}
    found = {}
    for name in names:
        statistic = STATISTICS[name]
        groups = given[statistic.on]
        assert groups is not None
        values = torch.stack([statistic.function(groups[:, p]).double().cpu() for p in range(groups.shape[1])], 1)
        if not torch.isfinite(values).all():
            raise ValueError(f"the statistic {name} is not finite: take it out of neutral")
        found[name] = values
    return found


def standardised(statistics: Tensor) -> Tensor:
    """Each row of `[m, K]` less its mean, divided by its population standard deviation; 0 for a constant row. float64."""
    wide = statistics.double()
    centred = wide - wide.mean(1, keepdim=True)
    std = centred.square().mean(1, keepdim=True).sqrt()
    constant = std <= CONSTANT * wide.abs().amax(1, keepdim=True)
    return torch.where(constant, 0.0, centred / std.masked_fill(constant, 1.0))


def neutral_rewards(
    rewards: Tensor, statistics: Tensor, shares: Sequence[float] = (1.0,), keep_spread: bool = False
) -> Tensor:
    """R' = R - sum_j share_j q_j <q_j, R>, where q_1 ... q_m are the standardised statistics made orthonormal, in their order.

    Each statistic takes what it explains beyond those before it. With shares of 1 that is the residual of the least-squares fit
    on all of them, whatever their order: R' is uncorrelated with every statistic. R' has the mean of R.

    Args:
        rewards: `[K]`. statistics: `[m, K]`.
        shares: how much of its part a statistic takes out, in 0..1: one value for all of them, or one each.
        keep_spread: stretch R' about its mean to the standard deviation of R, by a factor of at most MOST_STRETCH.

    Returns:
        `[K]`, in the dtype of the rewards. A group whose statistics are all constant keeps its rewards.
    """
    wide = rewards.double()
    mean = wide.mean()
    centred = wide - mean
    left, basis = centred, wide.new_zeros(len(wide), 0)
    for column, share in zip(standardised(statistics), spread(shares, len(statistics)), strict=True):
        direction = column
        for _ in range(2):  # The second time takes out what rounding has left.
            direction = direction - basis @ (basis.T @ direction)
        # Divided by sqrt(K), a standardised statistic has length 1.
        if direction.norm() <= CONSTANT * len(wide) ** 0.5:
            continue
        unit = direction / direction.norm()
        left = left - share * unit * (unit @ centred)
        basis = torch.cat([basis, unit[:, None]], 1)
    if not basis.shape[1]:
        return rewards
    before, after = centred.norm(), left.norm()
    rounded = torch.finfo(torch.float32).eps * wide.norm()
    if after <= ROUNDING * before + rounded or (not keep_spread and after * MOST_STRETCH < before):
        # Methods that divide by the group's own deviation would make a full advantage of what is left.
        left = torch.zeros_like(left)
    elif keep_spread:
        left = left * (before / after).clamp_max(MOST_STRETCH)
    return (mean + left).to(rewards.dtype)


def spread(shares: Sequence[float], count: int) -> list[float]:
    """One share for each of `count` statistics. A single one is for all."""
    return list(shares) * (count if len(shares) == 1 else 1)


def neutralise(
    rewards: Sequence[Tensor], statistics: dict[str, Tensor], shares: Sequence[float], keep_spread: bool
) -> tuple[list[Tensor], dict[str, list[float]]]:
    """`neutral_rewards` of P prompts, and the figures to log, a value per prompt.

    The figures are `neutral/<name>`, the correlation of the rewards with a statistic before anything was taken out, and
    `neutral/share`, the share of the rewards' variance that was taken out. In K samples of an unrelated statistic chance alone
    gives a correlation of about 1 / sqrt(K - 1) of either sign, and m statistics a share of about m / (K - 1).

    Args:
        rewards: `[K]` each. statistics: of `measure`. shares, keep_spread: see `neutral_rewards`.
    """
    found: list[Tensor] = []
    figures: dict[str, list[float]] = {f"neutral/{name}": [] for name in (*statistics, "share")}
    for p, own in enumerate(rewards):
        rows = torch.stack([values[:, p] for values in statistics.values()])
        unit = standardised(own[None])[0] / len(own)
        for name, correlation in zip(statistics, (standardised(rows) @ unit).tolist(), strict=True):
            figures[f"neutral/{name}"].append(correlation)
        before = own.double().var(correction=0).item()
        after = neutral_rewards(own.double(), rows, shares).var(correction=0).item()
        figures["neutral/share"].append(1 - after / before if before else 0.0)
        found.append(neutral_rewards(own, rows, shares, keep_spread))
    return found, figures
