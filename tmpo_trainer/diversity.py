"""Diversity of a group of samples: LGMD in latent space, cosine diversity and Vendi score in feature space.

`MEASURES` lists them all. All reports of diversity use it, so a new measure needs only an entry there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: Floor of a normalised distance, so that identical samples give a finite (very negative) LGMD.
DISTANCE_FLOOR = 1e-8
#: Distances of larger values are computed in float64: in float32 their squares overflow at 1.8e19.
FLOAT32_VALUES = 1e15


def _rows(x: Tensor) -> Tensor:
    x = x.flatten(1)
    if len(x) < 2:
        raise ValueError(f"diversity needs at least 2 samples, got {len(x)}")
    bad = (~torch.isfinite(x)).any(1).nonzero().flatten()
    if len(bad):
        raise ValueError(f"the diversity of {len(x)} samples cannot be measured: sample {int(bad[0])} is not finite")
    return x if x.dtype == torch.float64 else x.float()


def lgmd(latents: Tensor) -> Tensor:
    """Log geometric mean distance: mean over pairs of log(||a - b|| / sqrt(D)) (paper, section 5.1). A scalar.

    Args:
        latents: `[K, ...]`, scaled diffusion latents, i.e. what the denoiser sees. Independent N(0, 1) gives .346.
    """
    x = _rows(latents)
    dtype = x.dtype
    if x.abs().max() > FLOAT32_VALUES:
        x = x.double()
    # pdist is exact; cdist switches to a matrix product above 25 rows, which loses near-duplicates.
    distance = torch.pdist(x) / x.shape[1] ** 0.5
    return distance.clamp_min(DISTANCE_FLOOR).log().mean().to(dtype)


def _unit(features: Tensor) -> Tensor:
    # A vector of zeros has no direction and stays zero: it is as far from all others as an orthogonal one.
    return torch.nn.functional.normalize(_rows(features).double(), dim=1)


def cosine_distances(features: Tensor) -> Tensor:
    """1 - cos(f_i, f_j) of every pair: `features [K, D]` -> float64 `[K, K]`, at least 0."""
    unit = _unit(features)
    return (1 - unit @ unit.T).clamp_min(0).fill_diagonal_(0)


def mean_cosine_distances(features: Tensor) -> Tensor:
    """Mean of 1 - cos(f_i, f_j) over the other samples j: `features [K, D]` -> float64 `[K]`, in 0..2."""
    distances = cosine_distances(features)
    return distances.sum(1) / (len(distances) - 1)


def cosine_diversity(features: Tensor) -> Tensor:
    """Mean over pairs i != j of 1 - cos(f_i, f_j) (GARDO, arXiv:2512.24138). `features [K, D]` -> scalar in 0..2."""
    unit = _unit(features)
    count = len(unit)
    total = (unit.sum(0) ** 2).sum() - (unit**2).sum()
    return (1 - total / (count * (count - 1))).to(features.dtype)


def vendi_score(features: Tensor) -> Tensor:
    """exp of the entropy of the cosine kernel's eigenvalues (arXiv:2210.02410). `[K, D]` -> scalar in 1..K."""
    unit = _unit(features)
    kernel = (unit @ unit.T).fill_diagonal_(1)
    values = torch.linalg.eigvalsh(kernel / len(unit)).clamp_min(0)
    return torch.exp(-torch.xlogy(values, values).sum()).to(features.dtype)


@dataclass(frozen=True)
class Measure:
    """How much the samples of a group differ.

    function: `[K, ...]` of K >= 2 samples -> scalar. on: its input, scaled diffusion latents or features of pictures.
    """

    function: Callable[[Tensor], Tensor]
    on: Literal["latents", "features"]


#: Every measure by its name in reports.
MEASURES = {
    "LGMD": Measure(lgmd, "latents"),
    "cosine diversity": Measure(cosine_diversity, "features"),
    "Vendi score": Measure(vendi_score, "features"),
}


def measure(*, latents: Tensor | None = None, features: Tensor | None = None) -> dict[str, float]:
    """The measures of one group by name: those on latents `[K, ...]`, on features `[K, D]`, or on both if both are given.

    Raises:
        ValueError: the group has fewer than two samples, or one that is not finite.
    """
    given = {"latents": latents, "features": features}
    groups = {name: (own.function, given[own.on]) for name, own in MEASURES.items()}
    return {name: function(samples).item() for name, (function, samples) in groups.items() if samples is not None}
