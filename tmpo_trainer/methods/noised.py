"""What the methods share that train on noised leaves: the forward process in place of the rollout's transitions.

A leaf x0, a noise level t in 0..1 and noise eps give x_t = (1 - t) x0 + t eps, whose velocity is v = eps - x0. The error of a
leaf is the mean over latent dimensions, and over its draws of (t, eps), of w(t) (v_theta(x_t, t) - v)^2. Less error is more
likelihood: minus the error stands for log p_theta(x0) (the evidence lower bound), and e_ref - e_theta for
log p_theta(x0) / p_ref(x0), of a picture and not of a path. So no log-probabilities are needed, and any solver will do.

The velocity is that of the rollout, with the same guidance.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ..settings.errors import ConfigError
from .base import Figures, Method, StochasticSettings
from .leaves import NoisedLeaves, Part, mean_square

if TYPE_CHECKING:
    from torch import Tensor

    from ..tree import TreePlan
    from .batch import Network, PromptBatch


#: Floor of the adaptive weight's divisor.
ERROR_FLOOR = 1e-5


class NoisedSettings(StochasticSettings):
    """Settings of methods that train on noised leaves."""

    draws: int = Field(1, ge=1, le=1000)
    """How many noise levels every leaf is trained at, with fresh noise each."""
    noise_shift: float = Field(1.0, ge=0.01, le=100)
    """Noise levels are uniform in 0..1 and then shifted, as the schedules of SD3 and FLUX are: a level t becomes
    shift t / (1 + (shift - 1) t). More than 1 trains at more noise."""
    noise_weight: float = Field(0.0, ge=0, le=10)
    """The weight of a noised leaf is (1 + p) (1 - t)^p at noise level t, where p is this, in the loss and in its KL penalty. 0
    weighs all levels alike, as the papers do; with 1 those count less at which a leaf's own noise outweighs what its reward
    says. The mean weight is 1 at a shift of 1, and less at a larger one."""
    adaptive_weight: bool = False
    """Train on the squared error of the clean latent, divided by its mean absolute error, of every noised leaf. A leaf that is
    worse than its group then pushes with a bounded gradient."""
    level_importance: float = Field(0.0, ge=0, lt=1)
    """Importance sampling of noise levels: this share of them is drawn where most of the gradient's noise is, with density
    12 t^2 (1 - t) before the shift, and the rest evenly. Rows weigh the inverse of their density, so that what is minimised
    stays the same."""
    negative_limit: float | None = Field(None, gt=1, le=1000)
    """Stop pushing away from a leaf, at a noise level, once the network's error there is more than this many times the
    pretrained model's. Nothing else bounds that error: where a policy goes on drawing what it is pushed away from, it grows
    until the network is worse on all its leaves. By default there is no limit, as in the papers."""
    rollout: Literal["chains", "split-chains", "tree"] = "chains"
    """`chains` rolls out independent seeds without noise on the way; `tree` branches at `branch_early`, so that leaves share
    early steps and cost less; `split-chains` has as many leaves, of independent seeds that branch once, at the last step of
    `branch_early`."""

    @property
    def branches_there(self) -> bool:
        return self.rollout != "chains"


class AdvantageSettings(NoisedSettings):
    """Settings of methods on noised leaves whose gradient of a leaf is proportional to its advantage."""

    leaf_importance: float = Field(0.0, ge=0, lt=1)
    """Importance sampling of leaves: this share of the draws goes to leaves in proportion to the size of their advantages, and
    the rest evenly (Neyman's allocation). Rows weigh the inverse of their leaf's share, so that what is minimised stays the
    same. `draws` is then the mean over the leaves."""
    reference_share: float = Field(1.0, gt=0, le=1)
    """The share of the noised leaves, at least one of a prompt, at which the pretrained model is evaluated. The KL penalty is
    estimated from these: the same on average, with more noise. `negative_limit` needs all of them. Evaluations of nft's old
    policy stay as they are."""

    @model_validator(mode="after")
    def _limit_has_its_reference(self) -> AdvantageSettings:
        if self.reference_share < 1 and self.negative_limit is not None:
            raise ValueError(
                f"reference_share {self.reference_share:g} with negative_limit {self.negative_limit:g}: the limit needs the "
                "pretrained model at every noised leaf, use reference_share 1 or negative_limit none"
            )
        return self


def trained_error(part: Part, velocity: Tensor, adaptive: bool) -> Tensor:
    """`[n]`: the error that a leaf is trained with, see `NoisedSettings.adaptive_weight`."""
    off = velocity - part.v
    if not adaptive:
        return mean_square(off)
    # The clean latent's error is t times the velocity's.
    off = part.t.view(-1, *[1] * (off.dim() - 1)) * off
    return mean_square(off) / off.detach().abs().flatten(1).mean(1).clamp_min(ERROR_FLOOR)


class NoisedMethod(Method):
    """A loss on the velocities at noised leaves, row by row; a KL penalty on them."""

    config: Any

    def __init__(self, config: Any, sigmas: Tensor):
        from .. import flow

        super().__init__(config, sigmas)
        try:
            flow.check_stochastic(config.kernel, config.eta, sigmas, list(self.plan(0).fanout))
        except ValueError as error:
            raise ConfigError(f"branch_early {list(config.branch_early)}: {error}") from None

    def plan(self, update: int) -> TreePlan:
        from .. import tree

        config = self.config
        if config.rollout == "tree":
            return tree.TreePlan.tmpo(config.rollout_steps, config.branch_early, config.branching)
        if config.rollout == "split-chains":
            fanout = {config.branch_early[-1]: config.branching}
            return tree.TreePlan(config.rollout_steps, config.leaves // config.branching, fanout)
        return tree.TreePlan(config.rollout_steps, config.leaves, {})

    @property
    def transition(self) -> dict[str, Any]:
        return {"kernel": self.config.kernel, "eta": self.config.eta}

    @property
    def needs_reference_errors(self) -> bool:
        """Whether the loss has the pretrained model's errors of all leaves."""
        return False

    @property
    def needs_reference(self) -> bool:
        """Whether the pretrained model's velocities are needed."""
        return bool(self.config.kl_weight) or self.config.negative_limit is not None or self.needs_reference_errors

    def referenced(self, plan: TreePlan) -> int:
        """At how many noised leaves of a prompt the pretrained model is evaluated."""
        return plan.leaves * self.config.draws if self.needs_reference else 0

    def evaluations(self, plan: TreePlan) -> dict[str, int]:
        """Rollout, reference, replay; see `Method`."""
        return {
            "rollout": plan.rollout_evaluations,
            "reference": self.referenced(plan),
            "ratio": 0,
            "replay": plan.leaves * self.config.draws * self.config.inner_updates,
        }

    def keeps(self, plan: TreePlan) -> int:
        """Leaves, and velocities of the reference."""
        return plan.leaves + self.referenced(plan)

    def noised(self, batch: PromptBatch) -> NoisedLeaves:
        config = self.config
        key = config.seed, batch.update
        leaves = batch.rollout.leaves
        return NoisedLeaves(
            leaves,
            batch.slots,
            key,
            config.draws,
            config.noise_shift,
            config.noise_weight,
            config.level_importance,
            self.shares(batch),
        )

    def shares(self, batch: PromptBatch) -> Tensor | None:
        """`[K, P]`, the share of a prompt's draws that each leaf has, or None for equal ones; see `NoisedLeaves`."""
        return None

    def prepare(self, batch: PromptBatch, noised: NoisedLeaves, network: Network, inner: int) -> Figures:
        """What is computed before the replay of a batch, for `row_loss`; the figures, a value per prompt."""
        return {}

    @abstractmethod
    def row_loss(self, batch: PromptBatch, part: Part, velocity: Tensor) -> Tensor:
        """`[n]`, from the network's velocity at a part's rows, `[n, ...latent]`. A prompt's loss is the mean over its rows,
        times their weights."""

    @abstractmethod
    def repelled(self, batch: PromptBatch, rows: slice) -> Tensor:
        """`[n]`, bool: the rows whose error the loss raises."""

    def backward(self, batch: PromptBatch, network: Network, inner: int) -> Figures:
        import torch

        config = self.config
        noised = self.noised(batch)
        if self.needs_reference and "reference" not in batch.own:
            with network.phase("reference"), self.weights.pretrained():
                batch.own["reference"] = Reference(noised, network, self.referenced(batch.plan))
        figures = self.prepare(batch, noised, network, inner)
        losses, errors, kl, halted = (torch.zeros_like(noised.t) for _ in range(4))
        scale = batch.share / len(noised.t)
        with network.phase("replay"):
            for part in noised.parts(network.max_batch):
                velocity = network(part.x, part.t).to(part.x)
                loss = self.row_loss(batch, part, velocity)
                losses[part.rows] = part.weight * loss.detach()
                errors[part.rows] = mean_square(velocity.detach() - part.v)
                if config.negative_limit is not None:
                    most = config.negative_limit * batch.own["reference"].errors[part.rows]
                    stop = self.repelled(batch, part.rows) & (errors[part.rows] > most)
                    halted[part.rows] = stop.to(halted)
                    loss = loss.masked_fill(stop, 0)
                if config.kl_weight:
                    off = batch.own["reference"].distance(velocity, part.rows)
                    kl[part.rows] = off.detach()
                    loss = loss + config.kl_weight * off
                network.backward((part.weight * loss).sum() * scale)
        if inner == 0:
            batch.own["errors"] = noised.leaf_means(noised.weight * errors)
        found = {"loss": losses, "velocity_mse": noised.importance * errors}
        if config.kl_weight:
            found["kl_reference"] = noised.importance * kl
        if config.negative_limit is not None:
            found["negative_halted"] = halted
        # Row % P is the prompt.
        return {name: rows.view(-1, batch.count).mean(0).tolist() for name, rows in found.items()} | figures


class AdvantageMethod(NoisedMethod):
    """Draws and passes of the pretrained model as `AdvantageSettings` have them."""

    def shares(self, batch: PromptBatch) -> Tensor | None:
        return advantage_shares(batch.rewards, self.config.leaf_importance)

    def referenced(self, plan: TreePlan) -> int:
        count = super().referenced(plan)
        return max(1, round(self.config.reference_share * count)) if count else 0


class Reference:
    """The pretrained model's velocities at noised leaves: at all rows, or at a sample of them.

    Args:
        noised: the rows. network: of the pretrained weights. count: at how many rows of every prompt it is evaluated.

    Attributes:
        errors: `[count * P]`, of its velocity; in the order of the rows if it is evaluated at all of them.
    """

    def __init__(self, noised: NoisedLeaves, network: Network, count: int):
        total = len(noised.t)
        self._rows = None if count * noised.count == total else noised.sample(count)
        self._velocities, self.errors = evaluated(noised, network, self._rows)
        self._weight = total / (count * noised.count)

    def distance(self, velocity: Tensor, rows: slice) -> Tensor:
        """Mean squared distance to the pretrained model's velocity, `[n, ...latent]` -> `[n]`, at these of all rows. Outside
        the sample it is 0, and inside it weighs as much more as there are fewer rows."""
        if self._rows is None:
            return mean_square(velocity - self._velocities[rows])
        found = ((self._rows >= rows.start) & (self._rows < rows.stop)).nonzero()[:, 0]
        own = (self._rows[found] - rows.start).to(velocity.device)
        off = self._weight * mean_square(velocity[own] - self._velocities[found.to(velocity.device)])
        return off.new_zeros(len(velocity)).index_copy(0, own, off)


def evaluated(noised: NoisedLeaves, network: Network, sample: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The network's velocities without gradient at all rows, or at those of a `sample`, `[n, ...latent]`, and their errors,
    `[n]`."""
    import torch

    velocities, errors = [], []
    with torch.no_grad():
        for part in noised.parts(network.max_batch, sample):
            velocities.append(network(part.x, part.t).to(part.x))
            errors.append(mean_square(velocities[-1] - part.v))
    return torch.cat(velocities), torch.cat(errors)


class ErrorMethod(NoisedMethod):
    """A loss on the errors of a prompt's leaves, which may couple them."""

    #: Whether the first optimiser step needs the errors' values, and not only their gradients.
    needs_errors: ClassVar[bool] = True

    def evaluations(self, plan: TreePlan) -> dict[str, int]:
        rows, steps = plan.leaves * self.config.draws, self.config.inner_updates
        return super().evaluations(plan) | {"ratio": rows * (steps if self.needs_errors else steps - 1)}

    @abstractmethod
    def loss(
        self, batch: PromptBatch, p: int, errors: Tensor, old: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of prompt number p and the figures to log.

        Args:
            errors: of the current weights, `[K]`; the loss is differentiable in them. old: at the first optimiser step.
            reference: of the pretrained model, with `needs_reference_errors`.
        """

    def prepare(self, batch: PromptBatch, noised: NoisedLeaves, network: Network, inner: int) -> Figures:
        import torch

        from .. import objectives

        own = batch.own
        if inner or self.needs_errors:
            with network.phase("ratio"):
                errors = noised.leaf_means(noised.weight * evaluated(noised, network)[1])
        else:
            errors = torch.zeros(batch.plan.leaves, batch.count, dtype=noised.t.dtype)
        old = own["errors"] if inner else errors
        reference = noised.leaf_means(noised.weight * own["reference"].errors) if self.needs_reference_errors else None
        weights, figures = [], defaultdict(list)
        for p in range(batch.count):
            current = errors[:, p].clone().requires_grad_()
            loss, logged = self.loss(batch, p, current, old[:, p], None if reference is None else reference[:, p])
            # The replay takes the mean over the leaves.
            weights.append(objectives.edge_coefficients(loss, current) * len(current))
            for name, value in (logged | {"loss": loss.item()}).items():
                figures[name].append(value)
        own["weights"] = torch.stack(weights, 1).flatten()[noised.leaf].to(noised.t)
        return figures

    def row_loss(self, batch: PromptBatch, part: Part, velocity: Tensor) -> Tensor:
        return batch.own["weights"][part.rows] * trained_error(part, velocity, self.config.adaptive_weight)

    def repelled(self, batch: PromptBatch, rows: slice) -> Tensor:
        return batch.own["weights"][rows] < 0


def advantage(rewards: Tensor) -> Tensor:
    """R - mean, clipped to +- ADVANTAGE_LIMIT. `[K]` -> `[K]`. `reward_norm` has divided R by its standard deviation."""
    from .. import objectives

    wide = objectives.widened(rewards)
    return (wide - wide.mean()).clamp(-objectives.ADVANTAGE_LIMIT, objectives.ADVANTAGE_LIMIT).to(rewards.dtype)


def advantage_shares(rewards: Sequence[Tensor], importance: float) -> Tensor | None:
    """The shares of the draws that leaves have by the sizes of their advantages, see `AdvantageSettings`. P of `[K]` ->
    `[K, P]`, or None for equal ones."""
    import torch

    if not importance:
        return None
    sizes = torch.stack([advantage(each).double() for each in rewards], 1).abs()
    total = sizes.sum(0)
    even = 1 / len(sizes)
    return torch.where(total > 0, (1 - importance) * even + importance * sizes / total.clamp_min(1e-300), even)
