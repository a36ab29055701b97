"""Centered Reward Distillation (arXiv:2603.14128): log p_theta / p_ref of a picture, times lambda, is to be its reward.

That holds for the pretrained model tilted by exp(R / lambda), up to a constant of the prompt, its log partition function, which
subtracting the group's mean removes from both sides. With it goes the group's mean error, which nothing in this loss holds: the
errors of all leaves may grow together until the pictures are destroyed. The paper therefore anchors by a KL penalty, here
`kl_weight` (docs/comparison.md, "Methods on noised leaves").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from .noised import ErrorMethod, NoisedSettings, advantage

if TYPE_CHECKING:
    from torch import Tensor

    from .batch import PromptBatch


class Settings(NoisedSettings):
    """Settings of crd."""

    tilt_weight: float = Field(1.0, ge=1e-4, le=1e6)
    """lambda: the pretrained model tilted by exp(R / lambda) is asked for, with log-probabilities as means over latent
    dimensions."""


class Method(ErrorMethod):
    config: Settings

    @property
    def needs_reference_errors(self) -> bool:
        return True

    def loss(
        self, batch: PromptBatch, p: int, errors: Tensor, old: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, dict[str, float]]:
        assert reference is not None
        strength = self.config.tilt_weight
        wanted, log_ratio = advantage(batch.rewards[p]), strength * (reference - errors)
        off = wanted - (log_ratio - log_ratio.mean())
        # So that lambda does not scale the gradient: at the pretrained model it is that of awm.
        return off.square().mean() / (2 * strength), {
            "advantage_std": wanted.std(correction=0).item(),
            "log_ratio_std": log_ratio.detach().std(correction=0).item(),
        }
