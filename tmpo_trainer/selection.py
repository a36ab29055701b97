"""Choosing some pictures of a batch: the best, the most diverse, or a sample by reward. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from . import objectives


def boltzmann(scores: Tensor, beta: float) -> Tensor:
    """q = softmax(beta * z-scored scores) `[K]` of one prompt (paper eq. 4): the target that TMPO trains towards."""
    return (beta * objectives.zscore(scores.double())).softmax(0)


def best(scores: Tensor, count: int) -> list[int]:
    """Indices of the highest scores, best first; of equal ones the earlier."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].tolist()


def most_diverse(distances: Tensor, count: int, allowed: list[int], first: int) -> list[int]:
    """Greedy max-min: each next index is the allowed one farthest from its nearest chosen one.

    Args:
        distances: `[K, K]`. allowed: indices to choose from. first: where to begin, one of them.
    """
    chosen = [first]
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
