"""Softmax-TB on scalars: rewards of leaves and log-probabilities of edges in, one loss out. The rivals: `grpo.py`.

No network appears here. The loss of a tree couples all its edges, but only through their scalar log-probabilities, so
the gradient with respect to those is all that `tree.replay` needs. Shapes: E edges (stochastic transitions), K leaves
(paths), T transitions per path. `leaf_edges [K, T]` lists the edges of each path.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Baseline = Literal["none", "group", "siblings"]

#: Floor of the group's standard deviation in `zscore`: a group of equal rewards gives 0, not noise blown up.
ZSCORE_FLOOR = 1e-4


def zscore(rewards: Tensor) -> Tensor:
    """(R - mean) / max(std, ZSCORE_FLOOR) over the last dimension, population std. Same shape."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    std = centred.square().mean(-1, keepdim=True).sqrt()
    return centred / std.clamp_min(ZSCORE_FLOOR)


def softmax_tb_advantage(
    rewards: Tensor,
    log_probs: Tensor,
    beta: float,
    anchor_log_ratio: Tensor | None = None,
    anchor_weight: float = 1.0,
) -> Tensor:
    """A = log softmax(beta R) - log p, detached (paper eq. 5).

    Args:
        rewards: `[K]`, the rewards of one prompt's leaves.
        log_probs: `[K]`, log-probability of each path: the sum over its transitions.
        beta: inverse temperature, > 0.
        anchor_log_ratio: `[K]`, log P_theta - log P_ref of each path, summed over dimensions. Given, p is
            softmax(anchor_weight * anchor_log_ratio) instead of softmax(log_probs), and the fixed point becomes the
            reference tilted by exp(beta R / anchor_weight).
        anchor_weight: lambda, > 0.

    Returns:
        `[K]`. With q = softmax(beta R): sum(q A) = KL(q || p).
    """
    policy = log_probs if anchor_log_ratio is None else anchor_weight * anchor_log_ratio
    return ((beta * rewards).log_softmax(-1) - policy.log_softmax(-1)).detach()


def path_sum(edge_values: Tensor, leaf_edges: Tensor) -> Tensor:
    """Sums edge values `[E]` along each path: `[K]`."""
    return edge_values[leaf_edges].sum(1)


def edge_mean(leaf_values: Tensor, leaf_edges: Tensor, edges: int) -> Tensor:
    """Mean of the leaf values `[K]` over the leaves below each edge: `[E]`."""
    flat = leaf_edges.flatten()
    repeated = leaf_values[:, None].expand_as(leaf_edges).flatten()
    total = torch.zeros(edges, dtype=leaf_values.dtype, device=leaf_values.device).index_add_(0, flat, repeated)
    return total / torch.bincount(flat, minlength=edges)


def level_means(edge_values: Tensor, leaf_edges: Tensor) -> Tensor:
    """The sum over levels of the mean of edge values `[E]`. A scalar."""
    # An edge on k of the K paths stands for k / K of them: over one level these sum to 1.
    count = torch.bincount(leaf_edges.flatten(), minlength=len(edge_values))
    return (count.to(edge_values.dtype) / len(leaf_edges) * edge_values).sum()


def subtract_sibling_mean(edge_values: Tensor, edge_parent: Tensor) -> Tensor:
    """Subtracts from each edge value `[E]` the mean over the edges of the same parent (itself included): `[E]`."""
    parents = int(edge_parent.max()) + 1
    total = torch.zeros(parents, dtype=edge_values.dtype, device=edge_values.device)
    total.index_add_(0, edge_parent, edge_values)
    return edge_values - (total / torch.bincount(edge_parent, minlength=parents))[edge_parent]


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's min(rho A, clip(rho, 1 - eps, 1 + eps) A), elementwise (paper eq. 6 without the mean and the sign)."""
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def softmax_tb_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    shift: Tensor,
    leaf_edges: Tensor,
    edge_parent: Tensor,
    rewards: Tensor,
    beta: float,
    clip: float = 0.2,
    baseline: Baseline = "none",
    anchor_log_ratio: Tensor | None = None,
    anchor_weight: float = 1.0,
) -> tuple[Tensor, dict[str, float]]:
    """The Softmax-TB loss of one prompt's tree (paper eq. 6, 7, 32), differentiable in `log_probs`.

    Args:
        log_probs: `[E]`, of the current policy. The only argument that carries gradient.
        old_log_probs: `[E]`, at rollout time.
        shift: `[E]`, RatioNorm's mean_d (mu - mu_old)^2 / (2 std^2): added to the log ratio, constant.
        leaf_edges: `[K, T]`, int64. edge_parent: `[E]`, int64, the parent node of each edge.
        rewards: `[K]`. beta: inverse temperature. clip: PPO's epsilon.
        baseline: `none` (paper), `group` (subtract the mean advantage; ratios per path) or `siblings` (each edge's mean
            advantage of the leaves below it less that of its siblings; ratios per edge, one mean per level).
        anchor_log_ratio, anchor_weight: see `softmax_tb_advantage`; `[E]` here, per edge.

    Returns:
        the loss (a scalar) and the figures every run logs.
    """
    detached = log_probs.detach()
    path_log_probs = path_sum(detached, leaf_edges)
    anchor = None if anchor_log_ratio is None else path_sum(anchor_log_ratio, leaf_edges)
    advantage = softmax_tb_advantage(rewards, path_log_probs, beta, anchor, anchor_weight)
    log_ratio = log_probs - old_log_probs + shift.detach()
    if baseline == "siblings":
        weight = subtract_sibling_mean(edge_mean(advantage, leaf_edges, len(log_probs)), edge_parent)
        loss = -level_means(clipped_surrogate(log_ratio, weight, clip), leaf_edges)
    elif baseline in ("none", "group"):
        log_ratio = path_sum(log_ratio, leaf_edges)
        weight = advantage - advantage.mean() if baseline == "group" else advantage
        loss = -clipped_surrogate(log_ratio, weight, clip).mean()
    else:
        raise ValueError(f"unknown baseline {baseline!r}: one of {', '.join(get_args(Baseline))}")
    log_q = (beta * rewards).log_softmax(-1)
    return loss, {
        **target_figures(rewards, beta, path_log_probs),
        "advantage_mean": advantage.mean().item(),
        "kl_q_p": (log_q.exp() * advantage).sum().item(),
        **ratio_figures(log_ratio, clip),
    }


def subtree_balance_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    shift: Tensor,
    leaf_edges: Tensor,
    edge_parent: Tensor,
    rewards: Tensor,
    beta: float,
    clip: float = 0.2,
    baseline: Baseline = "none",
) -> tuple[Tensor, dict[str, float]]:
    """Balance at every branch point instead of along paths: the paper's ablation "Step-wise Balance (Detailed)".

    With log F of an edge = logmeanexp of beta R over the leaves below it, its advantage is
    log softmax_siblings(log F) - log softmax_siblings(log pi). Ratios per edge, one mean per level.

    Args:
        baseline: `none`, or `siblings` to subtract the siblings' mean. Others: see `softmax_tb_loss`.

    Returns:
        as `softmax_tb_loss`, less the figures of its path advantage.

    Raises:
        ValueError: baseline `group`: there is no advantage of a path.
    """
    if baseline == "group":
        raise ValueError(
            "step-wise balance has no advantage per path to take a group's mean of: baseline none or siblings"
        )
    edges, detached = len(log_probs), log_probs.detach()
    count = torch.bincount(leaf_edges.flatten(), minlength=edges).to(log_probs.dtype)
    below = (beta * rewards)[:, None].expand_as(leaf_edges).flatten()
    log_flow = group_logsumexp(below, leaf_edges.flatten(), edges) - count.log()
    advantage = sibling_log_softmax(log_flow, edge_parent) - sibling_log_softmax(detached, edge_parent)
    if baseline == "siblings":
        advantage = subtract_sibling_mean(advantage, edge_parent)
    log_ratio = log_probs - old_log_probs + shift.detach()
    loss = -level_means(clipped_surrogate(log_ratio, advantage, clip), leaf_edges)
    return loss, {
        **target_figures(rewards, beta, path_sum(detached, leaf_edges)),
        "advantage_mean": advantage.mean().item(),
        **ratio_figures(log_ratio, clip),
    }


def group_logsumexp(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """log of the sum of exp of the values `[n]` in each group; `group [n]`, int64, says which: `[groups]`."""
    peak = torch.full((groups,), -torch.inf, dtype=values.dtype, device=values.device)
    peak = peak.scatter_reduce(0, group, values, "amax")
    return peak + torch.zeros_like(peak).index_add_(0, group, (values - peak[group]).exp()).log()


def sibling_log_softmax(edge_values: Tensor, edge_parent: Tensor) -> Tensor:
    """log softmax of edge values `[E]` among the edges of the same parent: `[E]`."""
    return edge_values - group_logsumexp(edge_values, edge_parent, int(edge_parent.max()) + 1)[edge_parent]


def effective_number(log_q: Tensor) -> float:
    """exp of the entropy of a distribution `[K]`, given by its finite logs: K if all are alike, 1 if one has it all."""
    return torch.exp(-(log_q.exp() * log_q).sum()).item()


def target_figures(rewards: Tensor, beta: float, path_log_probs: Tensor) -> dict[str, float]:
    """How far rewards and log-probabilities `[K]` spread, and among how many leaves softmax(beta R) does."""
    log_q = (beta * rewards).log_softmax(-1)
    return {
        "log_prob_std": path_log_probs.std(correction=0).item(),
        "beta_reward_std": (beta * rewards).std(correction=0).item(),
        "effective_leaves": effective_number(log_q),
    }


def ratio_figures(log_ratio: Tensor, clip: float) -> dict[str, float]:
    """Mean and maximum of the ratios exp(log_ratio), and the share beyond 1 +- clip."""
    ratio = log_ratio.detach().exp()
    return {
        "ratio_mean": ratio.mean().item(),
        "ratio_max": ratio.max().item(),
        "clip_fraction": ((ratio - 1).abs() > clip).float().mean().item(),
    }


def edge_coefficients(loss: Tensor, log_probs: Tensor) -> Tensor:
    """d loss / d log_probs `[E]`: the weight of each edge's log-probability in the replay."""
    return torch.autograd.grad(loss, log_probs)[0]
