"""DiffusionNFT (arXiv:2509.16117): flow matching on the leaves with an implicit positive and an implicit negative policy.

With v_old of the policy that drew the leaves, they are v_+- = v_old +- strength (v_theta - v_old); a leaf of optimality r in
0..1 trains the positive one with weight r and the negative one with 1 - r. At v_theta = v_old and without the adaptive weight
the gradient is that of the error, weighted by the advantage. The old policy is a copy of the adapter that follows it; it also
rolls out. Scales are those of the published code, from which the paper's KL weight comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ..settings.errors import ConfigError
from .noised import AdvantageMethod, AdvantageSettings, advantage, evaluated, trained_error

if TYPE_CHECKING:
    from torch import Tensor

    from ..tree import TreePlan
    from .base import Figures
    from .batch import AdapterWeights, Network, PromptBatch
    from .leaves import NoisedLeaves, Part


class Settings(AdvantageSettings):
    """Settings of nft."""

    strength: float = Field(1.0, ge=1e-3, le=1000)
    """How far the implicit positive and negative policies go beyond the old one, as a share of what has been learned
    (the paper's beta). Less is bolder."""
    reward_range: float = Field(5.0, ge=0.01, le=1000)
    """The advantage, in standard deviations of the group's rewards, at which a leaf counts as wholly good."""
    adaptive_weight: bool = True
    """Train on the squared error of the clean latent, divided by its mean absolute error, of every noised leaf. A leaf that is
    worse than its group then pushes with a bounded gradient."""
    old_decay_rise: float = Field(0.001, ge=0, le=1)
    """By how much the old policy's decay rises per update. At a decay of 0 it becomes the current policy after every update. At
    a rise of 0 it always does, and costs no evaluations of its own."""
    old_decay_max: float = Field(0.5, ge=0, lt=1)
    """The largest decay of the old policy. 0 is the same as a rise of 0."""


class Method(AdvantageMethod):
    copies: ClassVar[int] = 1
    config: Settings

    def __init__(self, config: Settings, sigmas: Tensor):
        super().__init__(config, sigmas)
        #: The adapter of the old policy; made at the first update.
        self.old: dict[str, Tensor] = {}
        self.done = 0
        #: Whether this is the first optimiser step of an update.
        self.first = True

    @property
    def on_policy(self) -> bool:
        """Whether the old policy is the current one at the first optimiser step of every update."""
        return not (self.config.old_decay_rise and self.config.old_decay_max)

    def evaluations(self, plan: TreePlan) -> dict[str, int]:
        """`reference` has the old policy's evaluations too, if it is not always the current one."""
        counts = super().evaluations(plan)
        if self.on_policy:
            return counts
        return counts | {"reference": counts["reference"] + plan.leaves * self.config.draws}

    def keeps(self, plan: TreePlan) -> int:
        return super().keeps(plan) + plan.leaves * self.config.draws

    @property
    def swaps(self) -> bool:
        return not self.on_policy

    def rollout_weights(self, weights: AdapterWeights) -> Mapping[str, Tensor] | None:
        return None if self.on_policy else self.old

    def begin(self, update: int, weights: AdapterWeights) -> None:
        super().begin(update, weights)
        # On policy also after a checkpoint of a run that was not.
        if not self.old or self.on_policy:
            self.old = weights.copy()

    def prepare(self, batch: PromptBatch, noised: NoisedLeaves, network: Network, inner: int) -> Figures:
        import torch

        own = batch.own
        if "old" not in own:
            if self.on_policy:
                # The replay's own velocities at the first optimiser step.
                old = noised.leaves.new_empty(len(noised.t), *noised.leaves.shape[1:])
            else:
                with network.phase("reference"), self.weights.using(self.old):
                    old, _ = evaluated(noised, network)
            share = torch.stack([advantage(rewards) for rewards in batch.rewards], 1) / self.config.reward_range
            optimality = (0.5 + share.clamp(-1, 1) / 2).to(noised.t)
            own["spread"] = optimality.std(0, correction=0)
            own["optimality"] = optimality.flatten()[noised.leaf]
            # Last: an attempt that fails before is made again.
            own["old"] = old
        self.first = inner == 0
        return {"optimality_std": own["spread"].tolist()}

    def row_loss(self, batch: PromptBatch, part: Part, velocity: Tensor) -> Tensor:
        config, good = self.config, batch.own["optimality"][part.rows]
        if self.on_policy and self.first:
            batch.own["old"][part.rows] = velocity.detach()
        old = batch.own["old"][part.rows]
        step = config.strength * (velocity - old)
        positive, negative = (trained_error(part, old + sign * step, config.adaptive_weight) for sign in (1, -1))
        return (good * positive + (1 - good) * negative) * config.reward_range / config.strength

    def repelled(self, batch: PromptBatch, rows: slice) -> Tensor:
        return batch.own["optimality"][rows] < 0.5

    def end(self, figures: Mapping[str, float]) -> None:
        decay = min(self.done * self.config.old_decay_rise, self.config.old_decay_max)
        for name, value in self.weights.copy().items():
            self.old[name].lerp_(value, 1 - decay)
        self.done += 1

    def state(self) -> dict[str, Any]:
        return {"updates": self.done}

    def tensors(self) -> dict[str, Tensor]:
        return self.old

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if state["updates"] and not tensors:
            raise ConfigError("the checkpoint lacks the copy of the adapter that nft keeps (method.safetensors)")
        self.done, self.old = state["updates"], dict(tensors)
