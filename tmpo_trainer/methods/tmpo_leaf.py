"""Softmax Trajectory Balance with the evidence of noised leaves in the place of the paths' log-probabilities.

Minus a leaf's error stands for log p of its picture, whatever path led there, so that mass can move between seeds. The
advantage is TMPO's, plain or anchored, and weights the gradient of the evidence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import model_validator

from .base import ClipSettings
from .noised import ErrorMethod, NoisedSettings
from .tmpo import TargetSettings

if TYPE_CHECKING:
    from torch import Tensor

    from .batch import PromptBatch


class Settings(NoisedSettings, TargetSettings, ClipSettings):
    """Settings of tmpo-leaf."""

    @model_validator(mode="after")
    def _fits_the_method(self) -> Settings:
        if self.baseline == "siblings":
            raise ValueError(f"baseline siblings with {self.method}: evidence is of leaves, use none or group")
        return self


class Method(ErrorMethod):
    config: Settings

    @property
    def needs_reference_errors(self) -> bool:
        return self.config.anchor == "ref"

    def about(self, update: int) -> dict[str, float]:
        return {"beta": self.config.beta(update)}

    def metadata(self) -> dict[str, str]:
        return {"beta": f"{self.config.beta(0)} to {self.config.beta_end}"}

    def loss(
        self, batch: PromptBatch, p: int, errors: Tensor, old: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, dict[str, float]]:
        from .. import objectives

        config, rewards, beta = self.config, batch.rewards[p], self.config.beta(batch.update)
        evidence = -errors.detach()
        log_q = objectives.log_target(rewards, beta)
        anchor = None
        if config.anchor == "ref":
            assert reference is not None
            anchor = evidence + reference
        advantage = objectives.softmax_tb_advantage(rewards, evidence, beta, anchor, config.anchor_weight)
        weight = advantage - advantage.mean() if config.baseline == "group" else advantage
        log_ratio = old - errors
        loss = -objectives.clipped_surrogate(log_ratio, weight, config.clip).mean()
        return loss, {
            **objectives.target_figures(rewards, beta, evidence),
            "advantage_mean": advantage.mean().item(),
            "kl_q_p": (log_q.exp() * advantage).sum().item(),
            **objectives.ratio_figures(log_ratio, config.clip),
        }
