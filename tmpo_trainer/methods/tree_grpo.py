"""TreeGRPO (arXiv:2512.08153): one seed, a tree in a random window, advantages of leaves backed up to their ancestors."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from ..settings.errors import ConfigError
from . import flow_grpo
from .flow_grpo import Settings as Settings

if TYPE_CHECKING:
    from torch import Tensor

    from ..objectives import Transitions
    from ..tree import TreePlan

#: The window starts at step i with a probability proportional to this to the power of i.
WINDOW_DECAY = 0.5


class Method(flow_grpo.Method):
    def __init__(self, config: Settings, sigmas: Tensor):
        super().__init__(config, sigmas)
        if self.depth > self.last:
            raise ConfigError(
                f"method tree-grpo branches at {self.depth} neighbouring steps (as many as branch_early has), "
                f"of {config.rollout_steps} only {self.last} may carry noise"
            )

    @property
    def depth(self) -> int:
        """Neighbouring steps that branch."""
        return len(self.config.branch_early)

    def plan(self, update: int) -> TreePlan:
        from .. import tree

        starts = range(1, self.last - self.depth + 2)
        generator = random.Random(f"{self.config.seed}:window:{update}")
        (start,) = generator.choices(starts, [WINDOW_DECAY**i for i in starts])
        fanout = dict.fromkeys(range(start, start + self.depth), self.config.branching)
        return tree.TreePlan(self.config.rollout_steps, 1, fanout)

    def edge_advantage(self, leaf: Tensor, transitions: Transitions) -> Tensor:
        """That of a leaf's edge is the leaf's; that of an inner edge is its children's, weighted by their probability."""
        from .. import objectives

        return objectives.tree_advantage(leaf, transitions)
