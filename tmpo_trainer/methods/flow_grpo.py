"""Flow-GRPO (arXiv:2505.05470): chains with noise at every step but the last, z-scored advantages, a KL penalty.

Its KL divides by the SDE's noise level squared where TMPO's divides by the variance of the step, which is that times dt: so
does the published code, from which the paper's weights come. The whole family has it so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .base import TransitionMethod, TransitionSettings

if TYPE_CHECKING:
    from torch import Tensor

    from ..objectives import Transitions
    from ..tree import Branch, TreePlan
    from .batch import PromptBatch


class Settings(TransitionSettings):
    """Settings of the GRPO family."""

    @property
    def combining(self) -> Literal["zscore", "none"]:
        """A single reward stays raw: the method normalises the group itself."""
        return self.reward_norm if len(self.reward) > 1 else "none"


class Method(TransitionMethod):
    config: Settings

    def plan(self, update: int) -> TreePlan:
        return self.chains(range(1, self.last + 1))

    def chains(self, noisy: range) -> TreePlan:
        """K independent chains with noise at some steps."""
        from .. import tree

        return tree.TreePlan(self.config.rollout_steps, self.config.leaves, dict.fromkeys(noisy, 1))

    def kl_scale(self, branch: Branch) -> float:
        # The noise level squared is the step's variance over dt.
        return branch.sigma - branch.sigma_next

    def leaf_advantage(self, batch: PromptBatch, p: int) -> Tensor:
        """`[K]`, of prompt number p."""
        from .. import objectives

        if len(self.config.reward) > 1:
            # Each reward is normalised already; doing it again would blow up the noise of equal rewards.
            return batch.rewards[p].clamp(-objectives.ADVANTAGE_LIMIT, objectives.ADVANTAGE_LIMIT)
        return objectives.group_advantage(batch.rewards[p])

    def edge_advantage(self, leaf: Tensor, transitions: Transitions) -> Tensor:
        """`[E]`, from the advantages of the leaves `[K]`: every transition of a chain gets that of its end."""
        from .. import objectives

        return objectives.edge_mean(leaf, transitions.leaf_edges, len(transitions.log_probs))

    def loss(self, batch: PromptBatch, p: int, transitions: Transitions) -> tuple[Tensor, dict[str, float]]:
        from .. import objectives

        advantage = self.edge_advantage(self.leaf_advantage(batch, p), transitions)
        return objectives.grpo_loss(transitions, advantage, self.config.clip)
