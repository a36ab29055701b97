"""Advantage Weighted Matching (arXiv:2509.25050): flow matching on the leaves, each weighted by its advantage.

The weight is negative where a leaf is worse than its group. Further optimiser steps on the same leaves have PPO's ratio of
the likelihoods, exp(e_old - e_theta).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .base import ClipSettings
from .noised import AdvantageMethod, AdvantageSettings, ErrorMethod, advantage

if TYPE_CHECKING:
    from torch import Tensor

    from .batch import PromptBatch


class Settings(AdvantageSettings, ClipSettings):
    """Settings of awm."""


class Method(AdvantageMethod, ErrorMethod):
    needs_errors: ClassVar[bool] = False

    def loss(
        self, batch: PromptBatch, p: int, errors: Tensor, old: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, dict[str, float]]:
        from .. import objectives

        weight, log_ratio = advantage(batch.rewards[p]), old - errors
        loss = -objectives.clipped_surrogate(log_ratio, weight, self.config.clip).mean()
        figures = {"advantage_std": weight.std(correction=0).item()}
        return loss, figures | objectives.ratio_figures(log_ratio, self.config.clip)
