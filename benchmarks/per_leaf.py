"""TMPO without sharing, for comparison: every node by itself, and every leaf's transitions by themselves in the replay.

The rollout calls the network once per node, with batch 1. The replay makes a forward and backward pass for each of the K T
transitions of the K leaves, although leaves below the same branch share theirs. The gradient is exactly the trainer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tmpo_trainer import flow, objectives, tree
from tmpo_trainer.prompts.lists import about
from tmpo_trainer.rewards import combine
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.training.loop import Trainer

from .measuring import Phases


@dataclass
class Transition:
    """x, x_child: `[1, ...latent]`. log_prob: `[1]`."""

    sigma: float
    sigma_next: float
    x: Tensor
    x_child: Tensor
    log_prob: Tensor


@dataclass
class Leaf:
    """A node on its way to a leaf. x: `[1, ...latent]`. path: see `tree.NodePath`. transitions: those that led to it."""

    x: Tensor
    path: tree.NodePath
    transitions: list[Transition] = field(default_factory=list)


@torch.no_grad()
def rollout(
    velocity: tree.Velocity,
    noise: tree.Noise,
    sigmas: Sequence[float],
    plan: tree.TreePlan,
    kernel: flow.Kernel,
    eta: float,
    reduce: flow.Reduce,
) -> list[Leaf]:
    """The leaves of `tree.rollout`, in its order, with one network call per node."""
    nodes = [Leaf(noise(0, (root,))[None], (root,)) for root in range(plan.roots)]
    for step in range(1, plan.num_steps + 1):
        sigma, sigma_next = sigmas[step - 1], sigmas[step]
        predicted = [velocity(node.x, node.x.new_full((1,), sigma)) for node in nodes]
        if step not in plan.fanout:
            moved = [
                flow.transition("ode", node.x, v, sigma, sigma_next, 0.0)[0]
                for node, v in zip(nodes, predicted, strict=True)
            ]
            nodes = [Leaf(x, node.path, node.transitions) for x, node in zip(moved, nodes, strict=True)]
            continue
        born: list[Leaf] = []
        for child in range(plan.fanout[step]):
            for node, v in zip(nodes, predicted, strict=True):
                mean, std = flow.transition(kernel, node.x, v, sigma, sigma_next, eta)
                path = (*node.path, child)
                x = mean + std * noise(step, path)[None].to(mean)
                made = Transition(sigma, sigma_next, node.x, x, flow.log_prob(x, mean, std, reduce))
                born.append(Leaf(x, path, [*node.transitions, made]))
        nodes = born
    return nodes


def coefficients(leaves: Sequence[Leaf], rewards: Tensor, beta: float, config: Any) -> Tensor:
    """d loss / d log pi of every leaf's transitions, `[K, T]`; no two leaves share any.

    Args:
        rewards: `[K]`. config: TMPO's settings.
    """
    old = torch.cat([made.log_prob for leaf in leaves for made in leaf.transitions]).cpu()
    log_probs = old.clone().requires_grad_()
    edges = torch.arange(len(old))
    transitions = objectives.Transitions(log_probs, old, torch.zeros_like(old), edges.view(len(leaves), -1), edges)
    loss, _ = objectives.softmax_tb_loss(transitions, rewards, beta, config.clip, config.baseline)
    return objectives.edge_coefficients(loss, log_probs).view(len(leaves), -1)


def replay(
    velocity: tree.Velocity,
    leaves: Sequence[Leaf],
    weights: Tensor,
    kernel: flow.Kernel,
    eta: float,
    reduce: flow.Reduce,
) -> None:
    """Backpropagates sum_kt weight_kt log pi_kt, one forward and backward pass per leaf and transition. weights: `[K, T]`."""
    for leaf, row in zip(leaves, weights.tolist(), strict=True):
        for made, weight in zip(leaf.transitions, row, strict=True):
            with torch.enable_grad():
                predicted = velocity(made.x, made.x.new_full((1,), made.sigma))
                mean, std = flow.transition(kernel, made.x, predicted, made.sigma, made.sigma_next, eta)
                (weight * flow.log_prob(made.x_child, mean, std, reduce)).sum().backward()


class PerLeaf:
    """Updates of a trainer's model and settings, computed without sharing.

    Args:
        trainer: its model, optimiser and scorers are used, and not its methods.

    Raises:
        ConfigError: settings that this implementation does not have.
    """

    def __init__(self, trainer: Trainer):
        config: Any = trainer.config
        if config.method != "tmpo" or config.kl_weight or config.anchor != "none" or config.baseline == "siblings":
            raise ConfigError(
                "the per-leaf implementation has no KL penalty, anchor or siblings: leave out the arm per-leaf, or those "
                "settings"
            )
        if config.solver != "euler" or config.leaf_steps is not None:
            raise ConfigError(
                "the per-leaf implementation takes all steps by Euler: leave out the arm per-leaf, or solver and leaf_steps"
            )
        self.trainer = trainer
        self.forwards = self.backwards = 0

    def gradient(self, update: int, phases: Phases, rewards: Sequence[Tensor] | None = None) -> None:
        """Adds the gradient of an update, averaged over its prompts.

        Args:
            rewards: of every prompt, `[K]`, in place of its own. Pictures that are decoded one by one differ from those of a
                batch by rounding, and the z-score of nearly equal rewards makes much of that.
        """
        trainer = self.trainer
        config: Any = trainer.config
        backbone, how = trainer.backbone, trainer.method.transition
        plan, sigmas = trainer.method.plan(update), trainer.roller.sigmas.tolist()
        rolled = []
        for number, (slot, prompt) in enumerate(trainer._slots(update)):
            velocity = self._counted(backbone.velocity([prompt], config.guidance))
            noise = tree.keyed_noise((config.seed, update, slot), trainer.roller.latent_shape)
            with phases("rollout"):
                leaves = rollout(velocity, lambda s, p, n=noise: n(s, p).to(backbone.device), sigmas, plan, **how)
            metadata = about(trainer.judges.metadata, [prompt])
            with phases("decode"):
                pictures = [backbone.decode(leaf.x, 1) for leaf in leaves]
            with phases("reward"):
                scores = {
                    scorer.name: torch.cat([scorer.score(picture, [prompt], metadata) for picture in pictures])
                    for scorer in trainer.judges.rewards
                }
            own = combine(scores, config.reward_weights, config.combining) if rewards is None else rewards[number]
            rolled.append((velocity, leaves, coefficients(leaves, own, config.beta(update), config)))
        with phases("replay"):
            for velocity, leaves, weights in rolled:
                replay(velocity, leaves, weights / config.prompts_per_update, **how)

    def update(self, update: int, phases: Phases, rewards: Sequence[Tensor] | None = None) -> None:
        """An update with its optimiser step; see `gradient`."""
        self.forwards = self.backwards = 0
        self.trainer.optimizer.zero_grad()
        self.gradient(update, phases, rewards)
        torch.nn.utils.clip_grad_norm_(self.trainer.weights.lora.values(), self.trainer.config.max_grad_norm)
        with phases("optimiser"):
            self.trainer.optimizer.step()

    def _counted(self, velocity: tree.Velocity) -> tree.Velocity:
        def counted(x: Tensor, sigma: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                self.backwards += len(x)
            else:
                self.forwards += len(x)
            return velocity(x, sigma)

        return counted


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """|found - expected| / |expected| of two gradients, in float64."""
    flat = [torch.cat([part.detach().double().flatten().cpu() for part in parts]) for parts in (found, expected)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()
