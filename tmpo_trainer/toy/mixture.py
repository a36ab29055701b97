"""The toy of the paper's Fig. 2: a small flow model of a Gaussian mixture in the plane, trained by several objectives.

The mixture is a ring of eight modes and a rare one in the centre; five of the nine are rewarded. All trained arms use the
project's own rollout, replay and objectives, on the same trees.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import flow, objectives, tree
from .noised import NoisedArm

RING, RADIUS, SD = 8, 4.0, 0.35

#: Weight of the mode in the centre; each mode of the ring has weight 1.
RARE_WEIGHT = 0.1

#: Every second mode of the ring, and the rare one.
REWARDED = (0, 2, 4, 6, 8)

REWARD_WIDTH = 0.6

#: A sample belongs to a mode if it is this near to its centre (3 sd). The discs do not overlap; each has 98.9% of its mode.
MODE_RADIUS = 3 * SD

#: Rollouts: evenly spaced sigmas, 3 children per branch, positions from (1, 2, 3) to (1, 3, 5) as in the paper.
STEPS, BRANCHING, EARLY, LATE, KAPPA = 6, 3, (1, 2, 3), (1, 3, 5), 6.0

SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]

#: Trees per update. A group of 27 chains costs about five trees' evaluations (162 + 135 backward, against 54..96 + 12).
TREES, CHAIN_GROUPS = 10, 2

BETA, ANCHOR_WEIGHT, CLIP = 2.0, 1.0, 0.2

LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 3e-3, 1e-4, 1.0

PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_RATE = 4000, 512, 1e-2

#: Measurements: Euler steps of the probability-flow ODE, samples of a trained model, samples behind the target.
ODE_STEPS, SAMPLES, TARGET_SAMPLES, CURVE_SAMPLES, CURVE_POINTS = 50, 10_000, 100_000, 1_000, 12

#: The rollouts that are compared with their per-root optimum: this many roots, 8 x 8 paths from each.
ROOTS, CHILDREN = 400, 8

#: Added to every bin's count before a KL divergence, so that an empty one gives a finite value.
PSEUDO_COUNT = 1.0


def centres() -> Tensor:
    """`[9, 2]`: the ring, counter-clockwise from the right, then the rare mode in the middle."""
    angle = torch.arange(RING) * (2 * math.pi / RING)
    return torch.cat([RADIUS * torch.stack([angle.cos(), angle.sin()], 1), torch.zeros(1, 2)])


def sample_mixture(count: int, generator: torch.Generator) -> Tensor:
    """`[count, 2]` samples of the data."""
    weights = torch.tensor([1.0] * RING + [RARE_WEIGHT])
    mode = torch.multinomial(weights, count, replacement=True, generator=generator)
    return centres()[mode] + SD * torch.randn(count, 2, generator=generator)


def reward(x: Tensor) -> Tensor:
    """R(x) = max_k exp(-|x - c_k|^2 / (2 REWARD_WIDTH^2)) over the rewarded centres, 0..1. `[N, 2]` -> `[N]`."""
    squared = torch.cdist(x, centres()[list(REWARDED)].to(x)).square()
    return (-squared.min(1).values / (2 * REWARD_WIDTH**2)).exp()


def mode_masses(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """`[10]`: the share of samples `[N, 2]` (of their weights `[N]`) in each mode's disc, then the share outside all."""
    distance, mode = torch.cdist(x, centres().to(x)).min(1)
    mode = torch.where(distance <= MODE_RADIUS, mode, RING + 1)
    weights = torch.ones(len(x)) if weights is None else weights
    return torch.bincount(mode, weights, minlength=RING + 2) / weights.sum()


def effective_modes(masses: Tensor) -> float:
    """exp of the entropy of the rewarded modes' masses, normalised among themselves: 1 to 5. 0 if all are empty."""
    share = masses[list(REWARDED)]
    if share.sum() == 0:
        return 0.0
    share = share / share.sum()
    return torch.exp(-torch.special.xlogy(share, share).sum()).item()


def kl(p: Tensor, q: Tensor, samples: int) -> float:
    """KL(p || q) in nats between two rows of masses, each as counts of `samples` plus PSEUDO_COUNT per bin."""
    p, q = (
        (masses * samples + PSEUDO_COUNT) / (masses.sum() * samples + PSEUDO_COUNT * len(masses)) for masses in (p, q)
    )
    return (p * (p / q).log()).sum().item()


def tilt(rewards: Tensor, strength: float = BETA / ANCHOR_WEIGHT) -> Tensor:
    """Importance weights exp(beta R / lambda) / Z of samples of the base over the last dimension: they sum to 1."""
    return (strength * rewards).softmax(-1)


class Network(nn.Module):
    """The velocity, three linear layers: `x [N, 2]`, `sigma [N]` -> `[N, 2]`."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.layers(torch.cat([x, sigma[:, None]], 1))


def pretrain(seed: int, steps: int = PRETRAIN_STEPS) -> Network:
    """Flow matching on the mixture: E |v(x, sigma) - (x1 - x0)|^2 with uniform sigma, by Adam with a cosine decay to 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network()
    optimizer = torch.optim.Adam(network.parameters(), PRETRAIN_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        data, noise = sample_mixture(PRETRAIN_BATCH, generator), torch.randn(PRETRAIN_BATCH, 2, generator=generator)
        sigma = torch.rand(PRETRAIN_BATCH, generator=generator)
        x = (1 - sigma[:, None]) * data + sigma[:, None] * noise
        loss = (network(x, sigma) - (noise - data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return network


@torch.no_grad()
def sample(network: tree.Velocity, count: int, seed: int) -> Tensor:
    """`[count, 2]` by ODE_STEPS Euler steps of the ODE, evenly spaced in sigma. The same noise for the same seed."""
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    for sigma, sigma_next in pairwise(torch.linspace(1, 0, ODE_STEPS + 1).tolist()):
        x, _ = flow.transition("ode", x, network(x, torch.full((count,), sigma)), sigma, sigma_next, 0.0)
    return x


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        objective: a loss of `objectives`. kl_weight: weight of the penalty towards the base.
        anchor: what Softmax-TB uses as log p: the path's log-probability (paper), its ratio to the base's, or, as a
            control, the same for all paths. baseline: see `objectives.Baseline`.
        inner_updates: optimiser steps per rollout. reduce: how log-probabilities combine the two dimensions.
        chains: train on groups of 27 independent chains with flow_sde noise at steps 1..5, as Flow-GRPO does, in place
            of trees with cps.
        noised: settings of a method on noised leaves, in place of an objective on transitions. zscore: its rewards are
            divided by their standard deviation within a group.
    """

    name: str
    objective: Literal["grpo", "softmax-tb"] = "softmax-tb"
    kl_weight: float = 0.0
    anchor: Literal["none", "ref", "uniform"] = "none"
    baseline: objectives.Baseline = "none"
    inner_updates: int = 1
    reduce: flow.Reduce = "mean"
    beta: float = BETA
    chains: bool = False
    noised: dict[str, Any] = field(default_factory=dict)
    zscore: bool = False


ARMS = (
    Arm("GRPO", "grpo"),
    Arm("GRPO + KL .03", "grpo", kl_weight=0.03),
    Arm("Softmax-TB", "softmax-tb"),
    Arm("anchored Softmax-TB", anchor="ref", baseline="siblings"),
)

CONTROLS = (
    Arm("GRPO, 27 chains", "grpo", chains=True),
    Arm("GRPO + KL 1", "grpo", kl_weight=1.0),
    Arm("GRPO + KL 1, 27 chains", "grpo", kl_weight=1.0, chains=True),
    Arm("Softmax-TB without log p", anchor="uniform"),
    Arm("Softmax-TB, 4 inner updates", inner_updates=4),
    Arm("Softmax-TB, sum", reduce="sum"),
    Arm("Softmax-TB, sum, 4 inner updates", reduce="sum", inner_updates=4),
    Arm("Softmax-TB, beta 8", beta=8.0),
    Arm("Softmax-TB, siblings", baseline="siblings"),
    Arm("anchored, no baseline", anchor="ref"),
    Arm("anchored, 4 inner updates", anchor="ref", baseline="siblings", inner_updates=4),
)

#: The methods on noised leaves. The tilt and the anchor ask for the target, but for the scale of the leaves' evidence.
_DRAWS = {"draws": 4}
_LEAF = {**_DRAWS, "method": "tmpo-leaf", "beta_start": BETA, "beta_end": BETA, "baseline": "group"}
NOISED = (
    Arm("AWM", noised={**_DRAWS, "method": "awm"}, zscore=True),
    Arm("AWM + KL 1", noised={**_DRAWS, "method": "awm", "kl_weight": 1.0}, zscore=True),
    Arm("DiffusionNFT", noised={**_DRAWS, "method": "nft"}, zscore=True),
    Arm("CRD", noised={**_DRAWS, "method": "crd", "tilt_weight": ANCHOR_WEIGHT / BETA}),
    Arm("Softmax-TB on leaves", noised=_LEAF),
    Arm("anchored Softmax-TB on leaves", noised={**_LEAF, "anchor": "ref", "anchor_weight": ANCHOR_WEIGHT}),
)


def train(
    arm: Arm,
    base: Network,
    seed: int,
    updates: int,
    learning_rate: float = LEARNING_RATE,
    callback: Callable[[int, Network], None] | None = None,
) -> Network:
    """Trains a copy of the base by AdamW with a cosine decay to a tenth. All noise is a function of the seed.

    Args:
        callback: called before every update and after the last with (updates done, network).

    Raises:
        ValueError: a gradient is not finite.
    """
    network = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=WEIGHT_DECAY)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates, learning_rate / 10)
    schedule = tree.BranchSchedule(STEPS, EARLY, LATE, KAPPA, updates, seed, flow.last_stochastic_step(SIGMAS))
    generator = torch.Generator().manual_seed(seed)
    leaves = NoisedArm(arm.noised, arm.zscore, seed, network, base) if arm.noised else None
    groups, kernel = (CHAIN_GROUPS, "flow_sde") if arm.chains else (TREES, "cps")
    for update in range(updates):
        if callback is not None:
            callback(update, network)
        if arm.chains:
            plan = tree.TreePlan(STEPS, BRANCHING ** len(EARLY), dict.fromkeys(range(1, STEPS), 1))
        else:
            plan = tree.TreePlan.tmpo(STEPS, schedule.steps(update), BRANCHING)
        with nullcontext() if leaves is None else leaves.rolling_out(update):
            run = tree.rollout(
                network, generator_noise(generator), SIGMAS, plan.forest(groups), kernel=kernel, reduce=arm.reduce
            )
        rewards = reward(run.leaves).view(plan.leaves, groups)
        batch = None if leaves is None else leaves.batch(update, plan, run, rewards)
        reference = tree.parent_means(base, run) if arm.kl_weight or arm.anchor == "ref" else None
        for inner in range(arm.inner_updates):
            optimizer.zero_grad()
            if leaves is not None and batch is not None:
                leaves.backward(batch, inner)
            else:
                coefficients = edge_coefficients(arm, network, run, plan, rewards, reference, inner)
                weights = arm.kl_weight * tree.parent_shares(run) if arm.kl_weight else None
                tree.replay(network, run, coefficients / groups, kl_weights=weights, reference=reference)
            norm = nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)
            if not torch.isfinite(norm):
                raise ValueError(
                    f"{arm.name}, seed {seed}: the gradient of update {update + 1} is {norm.item()}: choose a smaller "
                    "--learning-rate"
                )
            optimizer.step()
        if leaves is not None:
            leaves.end()
        decay.step()
    if callback is not None:
        callback(updates, network)
    return network


def generator_noise(generator: torch.Generator) -> tree.Noise:
    """Noise drawn in the order of the nodes. It is faster than `keyed_noise`, which only resuming needs."""
    return lambda step, path: torch.randn(2, generator=generator)


def edge_coefficients(
    arm: Arm,
    network: Network,
    run: tree.Rollout,
    plan: tree.TreePlan,
    rewards: Tensor,
    reference: list[Tensor] | None,
    inner: int,
) -> Tensor:
    """d loss / d log pi of every edge of the forest, `[E * groups]`. rewards: `[K, groups]`."""
    index, groups = plan.index(), rewards.shape[1]
    means = [branch.mean for branch in run.branches]
    current, shift = run.log_probs, torch.zeros_like(run.log_probs)
    if inner:
        means = tree.parent_means(network, run)
        current, shift = tree.edge_log_probs(run, means), tree.edge_mean_shift(run, means)
    anchor = torch.zeros_like(current)
    if arm.anchor == "ref":
        assert reference is not None
        anchor = tree.edge_log_ratio(run, means, reference)
    # Edge e * groups + g is edge e of group g.
    old, current, shift, anchor = (values.view(-1, groups) for values in (run.log_probs, current, shift, anchor))
    found = []
    for g in range(groups):
        edges = objectives.Transitions(
            current[:, g].clone().requires_grad_(),
            old[:, g],
            shift[:, g],
            index.leaf_edges,
            index.edge_parent,
            None if arm.anchor == "none" else anchor[:, g],
        )
        if arm.objective == "grpo":
            leaf = objectives.group_advantage(rewards[:, g])
            advantage = objectives.edge_mean(leaf, index.leaf_edges, len(edges.log_probs))
            loss, _ = objectives.grpo_loss(edges, advantage, CLIP)
        else:
            weight = None if arm.anchor == "none" else ANCHOR_WEIGHT
            loss, _ = objectives.softmax_tb_loss(edges, rewards[:, g], arm.beta, CLIP, arm.baseline, weight)
        found.append(objectives.edge_coefficients(loss, edges.log_probs))
    return torch.stack(found, 1).flatten()


@torch.no_grad()
def root_rollouts(network: tree.Velocity, seed: int) -> tuple[Tensor, Tensor]:
    """Leaves `[K * ROOTS, 2]` and rewards `[K, ROOTS]` of stochastic rollouts that branch where the schedule ends."""
    plan = tree.TreePlan(STEPS, ROOTS, dict.fromkeys(LATE[1:], CHILDREN))
    run = tree.rollout(network, generator_noise(torch.Generator().manual_seed(seed)), SIGMAS, plan)
    return run.leaves, reward(run.leaves).view(-1, ROOTS)


@dataclass(frozen=True)
class Target:
    """The targets that the arms are measured against, from the base model alone.

    masses: `[10]` of p_ref exp(beta R / lambda) / Z under ODE sampling. reward: its mean.
    per_root: `[10]` of rollouts from fixed roots, tilted root by root: the optimum of the anchored arm. per_root_reward: its
    mean. pooled: `[10]`, tilted over all roots together, which no transition can reach.
    """

    masses: Tensor
    reward: float
    per_root: Tensor
    per_root_reward: float
    pooled: Tensor


def make_target(base: Network, samples: Tensor) -> Target:
    """The targets by importance weights exp(beta R / lambda) on samples `[N, 2]` and rollouts of the base."""
    rewards = reward(samples)
    leaves, by_root = root_rollouts(base, seed=1)
    weights = tilt(by_root.T).T / ROOTS
    return Target(
        mode_masses(samples, tilt(rewards)),
        (tilt(rewards) * rewards).sum().item(),
        mode_masses(leaves, weights.flatten()),
        (weights * by_root).sum().item(),
        mode_masses(leaves, tilt(by_root.flatten())),
    )


def measure(network: Network, samples: Tensor, target: Target) -> dict[str, Any]:
    """The figures of one model, from its ODE samples `[N, 2]` and from its stochastic rollouts."""
    masses = mode_masses(samples)
    leaves, rewards = root_rollouts(network, seed=1)
    return {
        "reward": reward(samples).mean().item(),
        "effective_modes": effective_modes(masses),
        "rare": masses[RING].item(),
        "outside": masses[-1].item(),
        "kl_to_target": kl(masses, target.masses, len(samples)),
        "kl_from_target": kl(target.masses, masses, len(samples)),
        "rollout_reward": rewards.mean().item(),
        "kl_to_per_root": kl(mode_masses(leaves), target.per_root, len(leaves)),
        "masses": [round(value, 5) for value in masses.tolist()],
    }


def run_arm(job: tuple[Arm, Network, Target, int, int, float]) -> tuple[dict[str, Any], Tensor]:
    """Trains and measures (arm, base, target, seed, updates, learning rate): the figures, and ODE samples for the picture."""
    arm, base, target, seed, updates, learning_rate = job
    # A network this small gains nothing from more threads, and the figures must not depend on the number of cores.
    torch.set_num_threads(1)
    curve: list[dict[str, float]] = []

    def watch(update: int, network: Network) -> None:
        # The curve is denser at the start, where it changes most.
        if update in {round(updates * (i / CURVE_POINTS) ** 2) for i in range(CURVE_POINTS + 1)}:
            x = sample(network, CURVE_SAMPLES, seed=2)
            modes = effective_modes(mode_masses(x))
            curve.append({"update": update, "reward": reward(x).mean().item(), "effective_modes": modes})

    start = time.perf_counter()
    network = train(arm, base, seed, updates, learning_rate, watch)
    seconds = time.perf_counter() - start
    samples = sample(network, SAMPLES, seed=3)
    return {"seed": seed, "seconds": round(seconds, 2), **measure(network, samples, target), "curve": curve}, samples
