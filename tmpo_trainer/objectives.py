"""Losses on scalars: rewards of leaves and log-probabilities of edges in, one loss out.

No network appears here. The loss of a tree couples all its edges, but only through their scalar log-probabilities, so
the gradient with respect to those is all that `tree.replay` needs. Shapes: E edges (stochastic transitions), K leaves
(paths), T transitions per path.

Sources: Softmax-TB (arXiv:2605.10983), Flow-GRPO (arXiv:2505.05470), MixGRPO (arXiv:2507.21802), TreeGRPO (arXiv:2512.08153),
GARDO (arXiv:2512.24138).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Baseline = Literal["none", "group", "siblings"]

#: Floor of the group's standard deviation in `zscore`: a group of equal rewards gives 0, not noise blown up.
ZSCORE_FLOOR = 1e-4
#: Flow-GRPO adds this to the group's standard deviation.
STD_FLOOR = 1e-4
#: The GRPO family clips advantages to +- this.
ADVANTAGE_LIMIT = 5.0
#: Rewards beyond +- this are normalised in float64. In float32 the mean of larger ones is off by more than a tenth of the
#: floors above, so that equal rewards would get an advantage, and squares overflow at 1.8e19.
FLOAT32_REWARDS = 64.0
#: A log ratio counts as at most this where only its size matters: exp overflows float32 at 88.7.
LOG_RATIO_LIMIT = 80.0


@dataclass
class Transitions:
    """The stochastic transitions of one prompt's rollout.

    log_probs: `[E]`, of the current policy; the only tensor that carries gradient. old_log_probs: `[E]`, at rollout time.
    shift: `[E]`, RatioNorm's mean_d (mu - mu_old)^2 / (2 std^2), a constant that is added to the log ratio.
    leaf_edges: `[K, T]`, int64, the edges of each path. edge_parent: `[E]`, int64, the parent node of each edge.
    reference_log_ratio: `[E]`, log pi - log pi_ref summed over dimensions, where the loss has an anchor.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    shift: Tensor
    leaf_edges: Tensor
    edge_parent: Tensor
    reference_log_ratio: Tensor | None = None


def widened(rewards: Tensor) -> Tensor:
    """The rewards in float64 if float32 does not do for their mean and their squares, else as they are."""
    return rewards.double() if rewards.abs().max() > FLOAT32_REWARDS else rewards


def zscore(rewards: Tensor) -> Tensor:
    """(R - mean) / max(std, ZSCORE_FLOOR) over the last dimension, population std. Same shape and dtype."""
    wide = widened(rewards)
    centred = wide - wide.mean(-1, keepdim=True)
    std = centred.square().mean(-1, keepdim=True).sqrt()
    return (centred / std.clamp_min(ZSCORE_FLOOR)).to(rewards.dtype)


def log_target(rewards: Tensor, beta: float) -> Tensor:
    """log q of the Boltzmann target q = softmax(beta R) (paper eq. 4). `[K]` -> `[K]`.

    Raises:
        ValueError: beta R overflows.
    """
    log_q = (beta * rewards).log_softmax(-1)
    if not torch.isfinite(log_q).all():
        raise ValueError(
            f"beta {beta:g} times rewards from {rewards.min():g} to {rewards.max():g} overflows: choose a smaller beta or "
            "smaller reward weights"
        )
    return log_q


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

    Raises:
        ValueError: beta R overflows.
    """
    policy = log_probs if anchor_log_ratio is None else anchor_weight * anchor_log_ratio
    return (log_target(rewards, beta) - policy.log_softmax(-1)).detach()


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
    # Where A is not negative the clip decides and the gradient is 0. An infinite rho would make that 0 times infinity.
    ratio = torch.where(advantage < 0, log_ratio, log_ratio.clamp_max(LOG_RATIO_LIMIT)).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def softmax_tb_loss(
    transitions: Transitions,
    rewards: Tensor,
    beta: float,
    clip: float = 0.2,
    baseline: Baseline = "none",
    anchor_weight: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The Softmax-TB loss of one prompt's tree (paper eq. 6, 7, 32).

    Args:
        rewards: `[K]`. beta: inverse temperature. clip: PPO's epsilon.
        baseline: `none` (paper), `group` (subtract the mean advantage; ratios per path) or `siblings` (each edge's mean
            advantage of the leaves below it less that of its siblings; ratios per edge, one mean per level).
        anchor_weight: lambda of the anchor, see `softmax_tb_advantage`; None for none.

    Returns:
        the loss (a scalar) and the figures every run logs.

    Raises:
        ValueError: an unknown baseline, an anchor without a reference, or beta R overflows.
    """
    leaf_edges, parent = transitions.leaf_edges, transitions.edge_parent
    path_log_probs = path_sum(transitions.log_probs.detach(), leaf_edges)
    if anchor_weight is None:
        advantage = softmax_tb_advantage(rewards, path_log_probs, beta)
    elif transitions.reference_log_ratio is None:
        raise ValueError("an anchor needs the log ratio to the reference")
    else:
        anchor = path_sum(transitions.reference_log_ratio, leaf_edges)
        advantage = softmax_tb_advantage(rewards, path_log_probs, beta, anchor, anchor_weight)
    log_ratio = transitions.log_probs - transitions.old_log_probs + transitions.shift.detach()
    if baseline == "siblings":
        weight = subtract_sibling_mean(edge_mean(advantage, leaf_edges, len(log_ratio)), parent)
        loss = -level_means(clipped_surrogate(log_ratio, weight, clip), leaf_edges)
    elif baseline in ("none", "group"):
        log_ratio = path_sum(log_ratio, leaf_edges)
        weight = advantage - advantage.mean() if baseline == "group" else advantage
        loss = -clipped_surrogate(log_ratio, weight, clip).mean()
    else:
        raise ValueError(f"unknown baseline {baseline!r}: one of {', '.join(get_args(Baseline))}")
    log_q = log_target(rewards, beta)
    return loss, {
        **target_figures(rewards, beta, path_log_probs),
        "advantage_mean": advantage.mean().item(),
        "kl_q_p": (log_q.exp() * advantage).sum().item(),
        **ratio_figures(log_ratio, clip),
    }


def subtree_balance_loss(
    transitions: Transitions, rewards: Tensor, beta: float, clip: float = 0.2, baseline: Baseline = "none"
) -> tuple[Tensor, dict[str, float]]:
    """Balance at every branch point instead of along paths: the paper's ablation "Step-wise Balance (Detailed)".

    With log F of an edge = logmeanexp of beta R over the leaves below it, its advantage is
    log softmax_siblings(log F) - log softmax_siblings(log pi). Ratios per edge, one mean per level.

    Args:
        baseline: `none`, or `siblings` to subtract the siblings' mean. Others: see `softmax_tb_loss`.

    Returns:
        as `softmax_tb_loss`, less the figures of its path advantage.

    Raises:
        ValueError: baseline `group`: there is no advantage of a path. beta R overflows.
    """
    if baseline == "group":
        raise ValueError(
            "step-wise balance has no advantage per path to take a group's mean of: baseline none or siblings"
        )
    leaf_edges, parent = transitions.leaf_edges, transitions.edge_parent
    edges, detached = len(transitions.log_probs), transitions.log_probs.detach()
    count = torch.bincount(leaf_edges.flatten(), minlength=edges).to(detached.dtype)
    below = (beta * rewards)[:, None].expand_as(leaf_edges).flatten()
    log_flow = group_logsumexp(below, leaf_edges.flatten(), edges) - count.log()
    advantage = sibling_log_softmax(log_flow, parent) - sibling_log_softmax(detached, parent)
    if baseline == "siblings":
        advantage = subtract_sibling_mean(advantage, parent)
    log_ratio = transitions.log_probs - transitions.old_log_probs + transitions.shift.detach()
    loss = -level_means(clipped_surrogate(log_ratio, advantage, clip), leaf_edges)
    return loss, {
        **target_figures(rewards, beta, path_sum(detached, leaf_edges)),
        "advantage_mean": advantage.mean().item(),
        **ratio_figures(log_ratio, clip),
    }


def group_advantage(rewards: Tensor) -> Tensor:
    """(R - mean) / (std + STD_FLOOR), population std, clipped to +- ADVANTAGE_LIMIT. `[K]` -> `[K]`."""
    wide = widened(rewards)
    centred = wide - wide.mean()
    advantage = centred / (centred.square().mean().sqrt() + STD_FLOOR)
    return advantage.clamp(-ADVANTAGE_LIMIT, ADVANTAGE_LIMIT).to(rewards.dtype)


def diverse_advantage(rewards: Tensor, features: Tensor) -> Tensor:
    """GARDO's (R - mean) * d, without a standard deviation, clipped to +- ADVANTAGE_LIMIT.

    d is 1 below the mean reward; elsewhere it is the cosine distance to the nearest other sample, over its mean in the group
    (1 for a group of equal pictures): a good sample counts the more the rarer it is.

    Args:
        rewards: `[K]`. features: `[K, D]`, DINOv2 in the paper.

    Raises:
        ValueError: features that are not finite.
    """
    if not torch.isfinite(features).all():
        raise ValueError("the features of the pictures are not finite, so their rarity cannot be measured")
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    distance = 1 - unit @ unit.T
    nearest = distance.fill_diagonal_(torch.inf).min(1).values.clamp_min(0).to(rewards.dtype)
    mean = nearest.mean()
    rarity = nearest / mean if mean > 0 else torch.ones_like(nearest)
    wide = widened(rewards)
    centred = wide - wide.mean()
    advantage = centred * torch.where(centred < 0, 1.0, rarity)
    return advantage.clamp(-ADVANTAGE_LIMIT, ADVANTAGE_LIMIT).to(rewards.dtype)


def tree_advantage(leaf_advantage: Tensor, transitions: Transitions) -> Tensor:
    """TreeGRPO's advantage of every edge: that of a leaf, or of its children weighted by softmax(log pi_old).

    Args:
        leaf_advantage: `[K]`. transitions: in which each leaf has its own last edge.

    Returns:
        `[E]`.
    """
    leaf_edges, log_probs = transitions.leaf_edges, transitions.old_log_probs
    found = torch.zeros_like(log_probs)
    found[leaf_edges[:, -1]] = leaf_advantage
    weight = sibling_log_softmax(log_probs, transitions.edge_parent).exp()
    # From the leaves up: an edge's children all end on the same child edge's parent.
    for level in range(leaf_edges.shape[1] - 1, 0, -1):
        pairs = torch.unique(leaf_edges[:, level - 1 : level + 1], dim=0)
        parent, child = pairs.unbind(1)
        found.index_add_(0, parent, weight[child] * found[child])
    return found


def grpo_loss(transitions: Transitions, advantage: Tensor, clip: float) -> tuple[Tensor, dict[str, float]]:
    """-mean over edges of min(rho A, clip(rho) A), ratios per transition and without RatioNorm's shift.

    Args:
        advantage: `[E]`.

    Returns:
        the loss (a scalar) and the figures that go into metrics.jsonl.
    """
    log_ratio = transitions.log_probs - transitions.old_log_probs
    loss = -clipped_surrogate(log_ratio, advantage, clip).mean()
    return loss, {
        "log_prob_std": path_sum(transitions.log_probs.detach(), transitions.leaf_edges).std(correction=0).item(),
        "advantage_mean": advantage.mean().item(),
        "advantage_std": advantage.std(correction=0).item(),
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
    """exp of the entropy of a distribution `[K]`, given by its logs: K if all are alike, 1 if one has it all."""
    # A probability of 0 adds nothing: 0 times its log, which is -infinity, would be NaN.
    finite = log_q.clamp_min(torch.finfo(log_q.dtype).min)
    return torch.exp(-(log_q.exp() * finite).sum()).item()


def target_figures(rewards: Tensor, beta: float, path_log_probs: Tensor) -> dict[str, float]:
    """How far rewards and log-probabilities `[K]` spread, and among how many leaves softmax(beta R) does."""
    log_q = log_target(rewards, beta)
    return {
        "log_prob_std": path_log_probs.std(correction=0).item(),
        "beta_reward_std": widened(beta * rewards).std(correction=0).item(),
        "effective_leaves": effective_number(log_q),
    }


def ratio_figures(log_ratio: Tensor, clip: float) -> dict[str, float]:
    """Mean and maximum of the ratios exp(log_ratio), and the share beyond 1 +- clip."""
    ratio = log_ratio.detach().clamp_max(LOG_RATIO_LIMIT).exp()
    return {
        "ratio_mean": ratio.mean().item(),
        "ratio_max": ratio.max().item(),
        "clip_fraction": ((ratio - 1).abs() > clip).float().mean().item(),
    }


def edge_coefficients(loss: Tensor, log_probs: Tensor) -> Tensor:
    """d loss / d log_probs `[E]`: the weight of each edge's log-probability in the replay."""
    return torch.autograd.grad(loss, log_probs)[0]
