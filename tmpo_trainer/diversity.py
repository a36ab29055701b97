"""Diversity of a group of samples: LGMD in latent space, cosine diversity and Vendi score in feature space."""

from __future__ import annotations

import torch
from torch import Tensor

#: Floor of a normalised distance, so that identical samples give a finite (very negative) LGMD.
DISTANCE_FLOOR = 1e-8


def _rows(x: Tensor, least: int) -> Tensor:
    x = x.flatten(1)
    if len(x) < least:
        raise ValueError(f"diversity needs at least {least} samples, got {len(x)}")
    return x if x.dtype == torch.float64 else x.float()


def lgmd(latents: Tensor) -> Tensor:
    """Log geometric mean distance: mean over pairs of log(||a - b|| / sqrt(D)) (paper, section 5.1). A scalar.

    Args:
        latents: `[K, ...]`, scaled diffusion latents, i.e. what the denoiser sees. Independent N(0, 1) gives .346.
    """
    x = _rows(latents, 2)
    # pdist is exact; cdist switches to a matrix product above 25 rows, which loses near-duplicates.
    distance = torch.pdist(x) / x.shape[1] ** 0.5
    return distance.clamp_min(DISTANCE_FLOOR).log().mean()


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(_rows(features, 2).double(), dim=1)


def cosine_diversity(features: Tensor) -> Tensor:
    """Mean over pairs i != j of 1 - cos(f_i, f_j) (GARDO, arXiv:2512.24138). `features [K, D]` -> scalar in 0..2."""
    unit = _unit(features)
    count = len(unit)
    total = (unit.sum(0) ** 2).sum() - (unit**2).sum()
    return (1 - total / (count * (count - 1))).to(features.dtype)


def vendi_score(features: Tensor) -> Tensor:
    """exp of the entropy of the cosine kernel's eigenvalues (arXiv:2210.02410). `[K, D]` -> scalar in 1..K."""
    unit = _unit(features)
    values = torch.linalg.eigvalsh(unit @ unit.T / len(unit)).clamp_min(0)
    return torch.exp(-torch.xlogy(values, values).sum()).to(features.dtype)
