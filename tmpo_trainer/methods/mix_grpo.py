"""MixGRPO (arXiv:2507.21802): Flow-GRPO with noise, and gradient, in a window of steps that slides over the rollout.

After its last place the window starts again at the first step, as in the published scripts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ..settings.config import COUNT
from ..settings.errors import ConfigError
from . import flow_grpo

if TYPE_CHECKING:
    from torch import Tensor

    from ..tree import TreePlan


class Settings(flow_grpo.Settings):
    """Settings of mix-grpo."""

    window: int = Field(4, ge=1, le=1000)
    """How many neighbouring steps carry noise."""
    window_every: int = Field(25, ge=1, le=COUNT)
    """Updates after which the window moves on by one step. After its last place it starts again at the first step."""


class Method(flow_grpo.Method):
    config: Settings

    def __init__(self, config: Settings, sigmas: Tensor):
        super().__init__(config, sigmas)
        if config.window > self.last:
            raise ConfigError(
                f"window {config.window}: of {config.rollout_steps} steps only {self.last} may carry noise"
            )

    def plan(self, update: int) -> TreePlan:
        places = self.last - self.config.window + 1
        start = 1 + update // self.config.window_every % places
        return self.chains(range(start, start + self.config.window))
