"""What the methods differ in: where a rollout carries noise, and the loss over its edges. All else is shared.

| method | rollout | advantage | ratio |
|---|---|---|---|
| tmpo | the tree, positions by the schedule | Softmax-TB | per path (per edge with `siblings`) |
| tmpo-beta-1 | the same | the same, beta = 1 throughout | the same |
| tmpo-step-balance | the same | balance at every branch point | per edge |
| tmpo-no-tree | K chains, noise at the same steps | Softmax-TB | per path |
| tmpo-fixed-branching | the tree at `branch_early` | Softmax-TB | as tmpo |
| flow-grpo | K chains, noise at every step but the last | z-score | per step |
| mix-grpo | K chains, noise in a sliding window | z-score | per step |
| tree-grpo | one seed, a tree in a random window | z-score, backed up through the tree | per edge |
| gardo | as flow-grpo | R - mean, times rarity | per step |

Several rewards are z-scored one by one and then added, for all methods.

The KL penalty of the GRPO family divides by the SDE's noise level squared where TMPO's divides by the variance of the step,
which is that times dt: so does Flow-GRPO's code, from which the paper's weights come.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from .. import flow, objectives, tree
from ..settings.config import TrainConfig
from ..settings.errors import ConfigError
from . import grpo

#: TreeGRPO: the window starts at step i with probability proportional to this to the power of i.
WINDOW_DECAY = 0.5


class Planner:
    """The shape of every rollout of a run, as a pure function of the update.

    Args:
        sigmas: `[N + 1]`, of the rollout.

    Raises:
        ConfigError: positions that cannot carry noise.
    """

    def __init__(self, config: TrainConfig, sigmas: Tensor):
        self.config = config
        self.last = flow.last_stochastic_step(sigmas)
        self._schedule = None
        if config.method.startswith("tmpo"):
            self._schedule = _schedule(config, sigmas, self.last)
        elif config.method == "mix-grpo" and config.window > self.last:
            raise ConfigError(
                f"window {config.window}: of {config.rollout_steps} steps only {self.last} may carry noise"
            )
        elif config.method == "tree-grpo" and len(config.branch_early) > self.last:
            raise ConfigError(
                f"method tree-grpo branches at {len(config.branch_early)} neighbouring steps (as many as branch_early has), "
                f"of {config.rollout_steps} only {self.last} may carry noise"
            )

    def plan(self, update: int) -> tree.TreePlan:
        """Of one prompt, at an update counted from 0."""
        config, steps, leaves = self.config, self.config.rollout_steps, self.config.leaves
        if config.method in ("flow-grpo", "gardo"):
            return tree.TreePlan(steps, leaves, dict.fromkeys(range(1, self.last + 1), 1))
        if config.method == "mix-grpo":
            start = min(1 + update // config.window_every, self.last - config.window + 1)
            return tree.TreePlan(steps, leaves, dict.fromkeys(range(start, start + config.window), 1))
        if config.method == "tree-grpo":
            depth = len(config.branch_early)
            starts = range(1, self.last - depth + 2)
            (start,) = random.Random(f"{config.seed}:window:{update}").choices(
                starts, [WINDOW_DECAY**i for i in starts]
            )
            return tree.TreePlan(steps, 1, dict.fromkeys(range(start, start + depth), config.branching))
        assert self._schedule is not None
        fixed = config.method == "tmpo-fixed-branching"
        positions = config.branch_early if fixed else self._schedule.steps(update)
        if config.method == "tmpo-no-tree":
            return tree.TreePlan(steps, leaves, {step: 1 for step in positions if step > 1})
        return tree.TreePlan.tmpo(steps, positions, config.branching)


def _schedule(config: TrainConfig, sigmas: Tensor, last: int) -> tree.BranchSchedule:
    for name in ("branch_early", "branch_late"):
        try:
            flow.check_stochastic(config.kernel, config.eta, sigmas, [s for s in getattr(config, name) if s > 1])
        except ValueError as error:
            raise ConfigError(f"{name} {list(getattr(config, name))}: {error}") from None
    try:
        return tree.BranchSchedule(
            config.rollout_steps,
            config.branch_early,
            config.branch_late,
            config.kappa,
            config.updates,
            config.seed,
            last,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def evaluations(config: TrainConfig, plan: tree.TreePlan) -> dict[str, int]:
    """Network evaluations of one prompt in one update, in latents.

    rollout, reference (of a KL or an anchor) and ratio (of later inner updates) are forward passes; replay is forward and
    backward.
    """
    parents = plan.train_evaluations
    return {
        "rollout": plan.rollout_evaluations,
        "reference": parents if config.kl_weight or config.anchor == "ref" else 0,
        "ratio": parents * (config.inner_updates - 1),
        "replay": parents * config.inner_updates,
    }


def cost(counts: dict[str, float] | dict[str, int]) -> float:
    """Evaluations as one number: a replay counts as two, since its backward pass takes about as long as its forward pass."""
    return sum(counts.values()) + counts["replay"]


def reward_norm(config: TrainConfig) -> str:
    """How rewards are combined. The GRPO family leaves a single one raw: it normalises itself, and GARDO not at all."""
    return config.reward_norm if config.method.startswith("tmpo") or len(config.reward) > 1 else "none"


def loss(
    config: TrainConfig,
    update: int,
    log_probs: Tensor,
    old_log_probs: Tensor,
    shift: Tensor,
    index: tree.TreeIndex,
    rewards: Tensor,
    anchor: Tensor | None = None,
    features: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one prompt's rollout, differentiable in `log_probs`, and the figures to log.

    Args:
        log_probs, old_log_probs: `[E]`, of the current policy and at rollout time. shift: `[E]`, RatioNorm's, TMPO's alone.
        rewards: `[K]`, combined. anchor: `[E]`, log pi - log pi_ref, for `anchor: ref`. features: `[K, D]`, for gardo.
    """
    leaf_edges, parent = index.leaf_edges, index.edge_parent
    if config.method.startswith("tmpo"):
        beta = config.beta(update)
        common = (log_probs, old_log_probs, shift, leaf_edges, parent, rewards, beta, config.clip, config.baseline)
        if config.method == "tmpo-step-balance":
            return objectives.subtree_balance_loss(*common)
        return objectives.softmax_tb_loss(*common, anchor, config.anchor_weight)
    if config.method == "gardo":
        assert features is not None
        leaf = grpo.diverse_advantage(rewards, features)
    elif len(config.reward) > 1:
        # Already normalised, each by itself; again would blow the noise of equal rewards up.
        leaf = rewards.clamp(-grpo.ADVANTAGE_LIMIT, grpo.ADVANTAGE_LIMIT)
    else:
        leaf = grpo.group_advantage(rewards)
    if config.method == "tree-grpo":
        advantage = grpo.tree_advantage(leaf, old_log_probs, leaf_edges, parent)
    else:
        advantage = grpo.edge_advantage(leaf, leaf_edges, len(log_probs))
    return grpo.grpo_loss(log_probs, old_log_probs, advantage, leaf_edges, config.clip)


def kl_weights(config: TrainConfig, run: tree.Rollout, gate: Tensor | None = None, gated: int = 0) -> Tensor:
    """The weight of every parent's KL `[parents]`, so that the penalty is kl_weight * its mean over transitions.

    Args:
        run: of one prompt or several. gate: `[K * prompts]`, whether a chain is held (gardo): then the mean is over the
            transitions of those alone. gated: how many chains of the whole update are.
    """
    weights = []
    shares = tree.parent_shares(run).cpu().split([len(branch.x) for branch in run.branches])
    for branch, share in zip(run.branches, shares, strict=True):
        if gate is not None:
            # Chains: as many parents as leaves, in the same order.
            share = gate.to(share) / max(gated * len(run.branches), 1)
        # The level squared is the step's variance over dt.
        weights.append(share * (1.0 if config.method.startswith("tmpo") else branch.sigma - branch.sigma_next))
    return config.kl_weight * torch.cat(weights)
