"""The GRPO family on scalars: advantages per edge, and the clipped policy gradient they all share.

Shapes as in `objectives.py`: E edges, K leaves, T transitions per path, `leaf_edges [K, T]`, `edge_parent [E]`. Rewards are
those of one prompt's group. Sources: Flow-GRPO (arXiv:2505.05470), MixGRPO (arXiv:2507.21802), TreeGRPO (arXiv:2512.08153),
GARDO (arXiv:2512.24138).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives import clipped_surrogate, edge_mean, path_sum, ratio_figures, sibling_log_softmax

#: Added to the group's standard deviation, as Flow-GRPO does.
STD_FLOOR = 1e-4

#: Advantages are clipped to +- this.
ADVANTAGE_LIMIT = 5.0


def group_advantage(rewards: Tensor) -> Tensor:
    """(R - mean) / (std + STD_FLOOR), population std, clipped to +- ADVANTAGE_LIMIT. `[K]` -> `[K]`."""
    centred = rewards - rewards.mean()
    return (centred / (centred.square().mean().sqrt() + STD_FLOOR)).clamp(-ADVANTAGE_LIMIT, ADVANTAGE_LIMIT)


def diverse_advantage(rewards: Tensor, features: Tensor) -> Tensor:
    """GARDO's (R - mean) * d, without a standard deviation, clipped to +- ADVANTAGE_LIMIT.

    d is 1 below the mean reward; elsewhere the cosine distance to the nearest other sample, over its mean in the group (1 for
    a group of equal pictures): good samples count the more the rarer they are.

    Args:
        rewards: `[K]`. features: `[K, D]`, DINOv2 in the paper.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    distance = 1 - unit @ unit.T
    nearest = distance.fill_diagonal_(torch.inf).min(1).values.clamp_min(0).to(rewards.dtype)
    mean = nearest.mean()
    rarity = nearest / mean if mean > 0 else torch.ones_like(nearest)
    centred = rewards - rewards.mean()
    return (centred * torch.where(centred < 0, 1.0, rarity)).clamp(-ADVANTAGE_LIMIT, ADVANTAGE_LIMIT)


def tree_advantage(leaf_advantage: Tensor, log_probs: Tensor, leaf_edges: Tensor, edge_parent: Tensor) -> Tensor:
    """TreeGRPO's advantage of every edge: that of a leaf, or of its children weighted by softmax(log pi_old).

    Args:
        leaf_advantage: `[K]`. log_probs: `[E]`, at rollout time.
        leaf_edges: `[K, T]`; each leaf must have its own last edge.

    Returns:
        `[E]`.
    """
    found = torch.zeros_like(log_probs)
    found[leaf_edges[:, -1]] = leaf_advantage
    weight = sibling_log_softmax(log_probs, edge_parent).exp()
    # From the leaves up: an edge's children all end on the same child edge's parent.
    for level in range(leaf_edges.shape[1] - 1, 0, -1):
        pairs = torch.unique(leaf_edges[:, level - 1 : level + 1], dim=0)
        parent, child = pairs.unbind(1)
        found.index_add_(0, parent, weight[child] * found[child])
    return found


def edge_advantage(leaf_advantage: Tensor, leaf_edges: Tensor, edges: int) -> Tensor:
    """Every transition of a chain gets the advantage of its end: `[K]` -> `[E]`."""
    return edge_mean(leaf_advantage, leaf_edges, edges)


def grpo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantage: Tensor, leaf_edges: Tensor, clip: float
) -> tuple[Tensor, dict[str, float]]:
    """-mean over edges of min(rho A, clip(rho) A), ratios per transition; differentiable in `log_probs`.

    Args:
        log_probs, old_log_probs: `[E]`, of the current policy and at rollout time. advantage: `[E]`.

    Returns:
        the loss (a scalar) and the figures that go into metrics.jsonl.
    """
    log_ratio = log_probs - old_log_probs
    loss = -clipped_surrogate(log_ratio, advantage, clip).mean()
    return loss, {
        "log_prob_std": path_sum(log_probs.detach(), leaf_edges).std(correction=0).item(),
        "advantage_mean": advantage.mean().item(),
        "advantage_std": advantage.std(correction=0).item(),
        **ratio_figures(log_ratio, clip),
    }
