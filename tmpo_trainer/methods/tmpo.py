"""TMPO: Softmax Trajectory Balance on a tree (arXiv:2605.10983), and its ablations as variants of the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ..settings.config import COUNT, TrainConfig
from ..settings.errors import ConfigError
from .base import TransitionMethod, TransitionSettings

if TYPE_CHECKING:
    from torch import Tensor

    from ..objectives import Transitions
    from ..tree import TreePlan
    from .batch import PromptBatch


class TargetSettings(TrainConfig):
    """Settings of TMPO's target."""

    beta_start: float = Field(0.8, ge=1e-4, le=1000)
    """Inverse temperature of the Boltzmann target at the first update."""
    beta_end: float = Field(2.0, ge=1e-4, le=1000)
    """Inverse temperature after the warm-up."""
    beta_warmup: int = Field(150, ge=0, le=COUNT)
    """Updates over which beta rises linearly."""
    baseline: Literal["none", "group", "siblings"] = "none"
    """What is subtracted from the advantage: nothing (the paper), the group's mean, or the siblings' mean per edge."""
    anchor: Literal["none", "ref"] = "none"
    """`ref` matches the pretrained model tilted by the reward, at the cost of one reference forward for everything trained."""
    anchor_weight: float = Field(1.0, ge=1e-4, le=1e4)
    """lambda: the anchor asks for the pretrained model tilted by exp(beta R / lambda); for tmpo on the scale
    of kl_weight, for tmpo-leaf some hundred times that, because its evidence is a mean over latent dimensions."""

    def beta(self, update: int) -> float:
        """Inverse temperature of an update counted from 0."""
        progress = min(update / self.beta_warmup, 1.0) if self.beta_warmup else 1.0
        return self.beta_start + (self.beta_end - self.beta_start) * progress


class Settings(TransitionSettings, TargetSettings):
    """Settings of TMPO and its ablations."""

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tmpo-beta-1": {"beta_start": 1.0, "beta_end": 1.0},
        "tmpo-step-balance": {"balance": "subtree"},
        "tmpo-no-tree": {"tree": False},
        "tmpo-fixed-branching": {"schedule": "fixed"},
    }
    exclusive: ClassVar[tuple[str, ...]] = ("baseline", "anchor", "diversity_weight")

    branch_late: tuple[int, ...] = (1, 3, 5)
    """Mean branch steps at the last update."""
    kappa: float = Field(6.0, ge=0.01, le=1e9)
    """Concentration of the branch steps around their means; 2 with a mean in the middle is uniform."""
    schedule: Literal["curriculum", "fixed"] = "curriculum"
    """`fixed` branches at `branch_early` in every update."""
    tree: bool = True
    """Without a tree, K chains from independent seeds draw their noise at the branch steps."""
    balance: Literal["trajectory", "subtree"] = "trajectory"
    """`subtree` balances every branch point by itself (the paper's step-wise ablation) instead of whole paths."""
    diversity_weight: float = Field(0.0, ge=0, le=100)
    """Weight of a term for diversity in the reward, see `diversity`; 0 for none."""
    diversity: Literal["distance", "rarity"] = "distance"
    """`distance` adds diversity_weight times the z-scored mean cosine distance of a picture's features to those of the other
    leaves. `rarity` multiplies what a reward has above the group's mean by 1 + diversity_weight (d - 1), where d is the
    distance to the nearest other leaf over its mean: with a weight of 1 that is GARDO's advantage (arXiv:2512.24138)."""

    @model_validator(mode="after")
    def _fits_the_method(self) -> Settings:
        if self.diversity == "rarity" and self.diversity_weight > 1:
            raise ValueError(f"diversity_weight {self.diversity_weight:g} with diversity rarity: at most 1")
        if self.schedule == "curriculum":
            self.check_steps("branch_late", self.branch_late)
            if len(self.branch_early) != len(self.branch_late):
                raise ValueError("branch_early and branch_late differ in number")
        if self.balance == "subtree" and not self.tree:
            raise ValueError(f"balance subtree with {self.method}: chains have no siblings to balance, use trajectory")
        if self.anchor != "none" and (not self.tree or self.balance == "subtree"):
            raise ValueError(f"anchor {self.anchor} needs paths of a tree: not with {self.method}")
        if self.baseline == "siblings" and not self.tree:
            raise ValueError(f"baseline siblings with {self.method}: chains have no siblings, use none or group")
        if self.baseline == "group" and self.balance == "subtree":
            raise ValueError(f"baseline group with {self.method}: it has no advantage per path, use none or siblings")
        return self

    @property
    def branches_there(self) -> bool:
        return True

    @property
    def needs_features(self) -> bool:
        return super().needs_features or self.diversity_weight > 0


class Method(TransitionMethod):
    config: Settings

    def __init__(self, config: Settings, sigmas: Tensor):
        from .. import flow, tree

        super().__init__(config, sigmas)
        curriculum = config.schedule == "curriculum"
        for name in ("branch_early", "branch_late") if curriculum else ("branch_early",):
            steps = getattr(config, name)
            try:
                flow.check_stochastic(config.kernel, config.eta, sigmas, [s for s in steps if s > 1])
            except ValueError as error:
                raise ConfigError(f"{name} {list(steps)}: {error}") from None
        try:
            self._schedule = tree.BranchSchedule(
                config.rollout_steps,
                config.branch_early,
                config.branch_late if curriculum else config.branch_early,
                config.kappa,
                config.updates,
                config.seed,
                self.last,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def plan(self, update: int) -> TreePlan:
        from .. import tree

        config = self.config
        steps = config.branch_early if config.schedule == "fixed" else self._schedule.steps(update)
        if config.tree:
            return tree.TreePlan.tmpo(config.rollout_steps, steps, config.branching)
        return tree.TreePlan(config.rollout_steps, config.leaves, {step: 1 for step in steps if step > 1})

    def about(self, update: int) -> dict[str, float]:
        return {"beta": self.config.beta(update)}

    def metadata(self) -> dict[str, str]:
        return {"beta": f"{self.config.beta(0)} to {self.config.beta_end}"}

    @property
    def needs_reference(self) -> bool:
        return super().needs_reference or self.anchored

    @property
    def anchored(self) -> bool:
        return self.config.anchor == "ref"

    def rewards(self, batch: PromptBatch, p: int) -> Tensor:
        """`[K]`, those of prompt number p with the term for diversity."""
        from .. import diversity, objectives

        rewards, weight = batch.rewards[p], self.config.diversity_weight
        if not weight:
            return rewards
        assert batch.features is not None
        features = batch.features[:, p]
        if self.config.diversity == "rarity":
            return (1 - weight) * rewards + weight * objectives.diverse_advantage(rewards, features)
        return rewards + weight * objectives.zscore(diversity.mean_cosine_distances(features)).to(rewards.dtype)

    def loss(self, batch: PromptBatch, p: int, transitions: Transitions) -> tuple[Tensor, dict[str, float]]:
        from .. import objectives

        config, rewards, beta = self.config, self.rewards(batch, p), self.config.beta(batch.update)
        if config.balance == "subtree":
            return objectives.subtree_balance_loss(transitions, rewards, beta, config.clip, config.baseline)
        weight = config.anchor_weight if self.anchored else None
        return objectives.softmax_tb_loss(transitions, rewards, beta, config.clip, config.baseline, weight)
