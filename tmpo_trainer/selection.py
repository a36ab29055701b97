"""Chooses pictures from a batch: the best, the most diverse, or a sample by reward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import objectives


def boltzmann(scores: Tensor, beta: float) -> Tensor:
    """q = softmax(beta * z-scored scores) `[K]` of one prompt (paper eq. 4): the target that TMPO trains towards."""
    return (beta * objectives.zscore(scores.double())).softmax(0)


def boltzmann_by_group(scores: Tensor, groups: Iterable[list[int]], beta: float) -> Tensor:
    """`boltzmann` within each group, `[K]`, as in training for each prompt, so that an easy prompt does not take all."""
    weights = torch.zeros(len(scores), dtype=torch.float64)
    for members in groups:
        weights[members] = boltzmann(scores[members], beta).cpu()
    return weights


def best(scores: Tensor, count: int) -> list[int]:
    """Indices of the highest scores, best first. Of equal scores, the earlier comes first."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].tolist()


def pixel_distances(images: Tensor) -> Tensor:
    """Euclidean distances `[K, K]`, float64, of pictures `[K, H, W, C]` shrunk to 32x32."""
    small = torch.nn.functional.interpolate(images.movedim(-1, 1).float(), (32, 32), mode="area").flatten(1).double()
    return torch.cdist(small, small)


def most_diverse(distances: Tensor, scores: Tensor, least: float, count: int) -> list[int]:
    """Indices of the best picture, then repeatedly of the one farthest from its nearest chosen one (greedy max-min).

    Args:
        distances: `[K, K]`. scores: `[K]`; a picture below `least` is never chosen.

    Raises:
        ValueError: all are below `least`.
    """
    allowed = [i for i, value in enumerate(scores.tolist()) if value >= least]
    if not allowed:
        raise ValueError(f"no score is {least:g} or more: the best is {scores.max():.4f}")
    chosen = best(scores, 1)
    while len(chosen) < min(count, len(allowed)):
        rest = [i for i in allowed if i not in chosen]
        nearest = distances[rest][:, chosen].min(1).values
        chosen.append(rest[int(nearest.argmax())])
    return chosen


def sample(weights: Tensor, count: int, seed: int) -> list[int]:
    """Indices drawn without replacement with probabilities `[K]`, the same for the same seed, whatever the device."""
    generator = torch.Generator().manual_seed(seed)
    # Gumbel top-k; weights of 0 come last.
    uniform = torch.rand(len(weights), generator=generator, dtype=torch.float64)
    keys = weights.double().cpu().log() - torch.log(-torch.log(uniform))
    return torch.sort(keys, descending=True, stable=True).indices[:count].tolist()


def indices(text: str, total: int) -> list[int]:
    """`12, 3` -> [12, 3], without repetitions: places in a batch of `total`. Raises ValueError for anything else."""
    try:
        found = [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"{text[:60]!r} are no places in a batch: write numbers, e.g. 12, 3") from None
    wrong = [index for index in found if not 0 <= index < total]
    if wrong:
        raise ValueError(f"{wrong[0]} is not in a batch of {total}: choose 0 to {total - 1}")
    return list(dict.fromkeys(found))
