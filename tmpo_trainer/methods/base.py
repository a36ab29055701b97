"""What every method has, and what those share that train on the stochastic transitions of a rollout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ..settings.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from ..objectives import Transitions
    from ..processes import Processes
    from ..tree import Branch, TreePlan
    from .batch import AdapterWeights, Network, PromptBatch

#: Figures of an update, a list of values per name.
Figures = dict[str, list[float]]


class Method(ABC):
    """A training method: the shape of its rollouts, its gradient, and what it keeps between updates.

    An update is `plan`, `begin`, the rollouts, `judge`, for every optimiser step `backward` of every batch, then `end`.

    Args:
        config: an instance of the file's `Settings`. sigmas: `[N + 1]`, of the rollout.

    Raises:
        ConfigError: the rollout's steps do not fit.
    """

    #: Copies of the adapter that it keeps: for the memory estimate.
    copies: ClassVar[int] = 0

    @property
    def swaps(self) -> bool:
        """Whether it gives `rollout_weights`: for the memory estimate."""
        return False

    def __init__(self, config: Any, sigmas: Tensor):
        self.config, self.sigmas = config, sigmas

    @abstractmethod
    def plan(self, update: int) -> TreePlan:
        """The rollout of one prompt at an update counted from 0: a pure function. It may have no stochastic step."""

    def shape(self, update: int) -> TreePlan:
        """`plan` with its leaves' steps as `leaf_steps` has them: what is rolled out."""
        return self.plan(update).shortened(self.config.leaf_steps)

    @property
    def transition(self) -> dict[str, Any]:
        """Arguments of `tree.rollout` for its stochastic steps: kernel, eta, reduce."""
        return {}

    @property
    def graphs(self) -> bool:
        """Whether the rollout keeps the graphs of its stochastic steps. Not with `rollout_weights`, which are gone by then."""
        return False

    def about(self, update: int) -> dict[str, float]:
        """What metrics.jsonl shall say of an update's settings."""
        return {}

    def metadata(self) -> dict[str, str]:
        """What the exported LoRA's metadata shall say, beside the method's name."""
        return {}

    @abstractmethod
    def evaluations(self, plan: TreePlan) -> dict[str, int]:
        """Network evaluations of one prompt in one update, in latents: forward passes by phase; those of `replay` are
        forward and backward passes, those of `backward` backward passes alone."""

    def keeps(self, plan: TreePlan) -> int:
        """Latents per prompt that are kept until the update ends: for the memory estimate."""
        return plan.leaves

    def rollout_weights(self, weights: AdapterWeights) -> Mapping[str, Tensor] | None:
        """Other weights to roll out with, or None for the current ones."""
        return None

    def begin(self, update: int, weights: AdapterWeights) -> None:
        """Called before the rollouts of an update. `tensors` may change here, and only as `state` and `weights` say: an update
        that fails is begun again from the same state."""
        self.weights = weights

    def judge(self, batches: Sequence[PromptBatch], processes: Processes) -> Figures:
        """Called with all batches of this process before the first gradient."""
        return {}

    @abstractmethod
    def backward(self, batch: PromptBatch, network: Network, inner: int) -> Figures:
        """Adds the batch's gradient, averaged over all prompts of the update on this process.

        Args:
            inner: optimiser steps that this rollout has already been used for.
        """

    def end(self, figures: Mapping[str, float]) -> None:  # noqa: B027
        """Called after the last optimiser step, with the update's figures of all processes."""

    def state(self) -> dict[str, Any]:
        """What it keeps between updates beside `tensors`, as JSON. Both go into the checkpoint."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the adapter that it keeps between updates."""
        return {}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Takes over what `state` and `tensors` gave."""


class StochasticSettings(TrainConfig):
    """Settings of methods whose rollouts may have stochastic steps and whose loss may have a KL penalty."""

    kernel: Literal["cps", "flow_sde", "dance"] = "cps"
    """Transition kernel of the stochastic steps."""
    eta: float = Field(0.7, ge=0.01, le=10)
    """Noise level of the stochastic steps; at most 1 for cps."""
    kl_weight: float = Field(0.0, ge=0, le=1e4)
    """Weight of the KL penalty to the pretrained model. With the GRPO family the KL is measured as Flow-GRPO does, see
    methods/flow_grpo.py; with methods on noised leaves it is the mean squared difference of the velocities."""

    @model_validator(mode="after")
    def _kernel_fits(self) -> StochasticSettings:
        if self.kernel == "cps" and self.eta > 1:
            raise ValueError(f"eta {self.eta} is too large for kernel cps: at most 1")
        return self


class ClipSettings(TrainConfig):
    """Settings of methods that clip ratios."""

    clip: float = Field(0.2, gt=0, le=1000)
    """PPO's epsilon."""


class TransitionSettings(StochasticSettings, ClipSettings):
    """Settings of methods that train on stochastic transitions."""

    logp_reduce: Literal["mean", "sum"] = "mean"
    """How log-probabilities are reduced over latent dimensions (paper: mean)."""
    reuse_forward: bool = False
    """Keep the activations of the rollout's stochastic steps, so that the first replay is a backward pass alone. They must fit
    into memory all at once: those of every parent of every prompt of the update."""


class TransitionMethod(Method):
    """A loss on the log-probabilities of a rollout's transitions, backpropagated by `tree.replay`."""

    config: Any

    @property
    def transition(self) -> dict[str, Any]:
        return {"kernel": self.config.kernel, "eta": self.config.eta, "reduce": self.config.logp_reduce}

    @property
    def graphs(self) -> bool:
        return self.config.reuse_forward

    @property
    def last(self) -> int:
        """The last step that may carry noise."""
        from ..flow import last_stochastic_step

        return last_stochastic_step(self.sigmas)

    @property
    def needs_reference(self) -> bool:
        """Whether the reference policy's means are needed."""
        return bool(self.config.kl_weight)

    @property
    def anchored(self) -> bool:
        """Whether the loss looks at the log ratio to the reference."""
        return False

    def evaluations(self, plan: TreePlan) -> dict[str, int]:
        """Rollout, reference (for a KL or an anchor), ratio (of later optimiser steps), replay; backward, if graphs are kept;
        see `Method`."""
        parents, steps = plan.train_evaluations, self.config.inner_updates
        reused = {"backward": parents} if self.config.reuse_forward else {}
        return {
            "rollout": plan.rollout_evaluations,
            "reference": parents if self.needs_reference else 0,
            "ratio": parents * (steps - 1),
            "replay": parents * (steps - len(reused)),
            **reused,
        }

    def keeps(self, plan: TreePlan) -> int:
        """Leaves, parents with their means, the children of every edge, the reference's means."""
        means = 3 if self.needs_reference else 2
        return plan.leaves + means * plan.train_evaluations + len(plan.index().edge_parent)

    def reference(self) -> AbstractContextManager[None]:
        """The network with the weights that the KL and the anchor compare with: the pretrained model."""
        return self.weights.pretrained()

    @abstractmethod
    def loss(self, batch: PromptBatch, p: int, transitions: Transitions) -> tuple[Tensor, dict[str, float]]:
        """The loss of prompt number p, differentiable in `transitions.log_probs`, and the figures to log."""

    def kl_shares(self, batch: PromptBatch) -> list[Tensor]:
        """The weight of every parent's KL in the penalty, `[parents of the branch]` per branch, that of a mean over the
        transitions of the batch."""
        from .. import tree

        run = batch.rollout
        shares = tree.parent_shares(run).cpu().split([len(branch.x) for branch in run.branches])
        return [share * self.kl_scale(branch) for share, branch in zip(shares, run.branches, strict=True)]

    def kl_scale(self, branch: Branch) -> float:
        """What a step's KL, mean_d (mu - mu_ref)^2 / (2 std^2), is multiplied by."""
        return 1.0

    def kl_prompts(self, batch: PromptBatch) -> float:
        """What the shares of a batch are multiplied by, so that gradients averaged over the processes give the penalty's
        mean over all prompts."""
        return batch.share

    def backward(self, batch: PromptBatch, network: Network, inner: int) -> Figures:
        import torch

        from .. import objectives, tree

        run, count = batch.rollout, batch.count
        # The anchor compares the reference with the rollout's means, the KL penalty with the replay's. With both, the penalty's
        # batches are taken.
        alone = self.anchored and not self.config.kl_weight
        most = self.config.max_batch if alone else network.max_batch
        if self.needs_reference and batch.reference is None:
            with network.phase("reference"), self.reference():
                batch.reference = tree.parent_means(network, run, most, alone)
        if inner == 0:
            means = [branch.mean for branch in run.branches]
            log_probs, shift = run.log_probs, torch.zeros_like(run.log_probs)
        else:
            with network.phase("ratio"):
                means = tree.parent_means(network, run, most, alone)
            log_probs, shift = tree.edge_log_probs(run, means), tree.edge_mean_shift(run, means)
        parts = {"log_probs": log_probs, "old_log_probs": run.log_probs, "shift": shift}
        if self.anchored:
            assert batch.reference is not None
            parts["reference_log_ratio"] = tree.edge_log_ratio(run, means, batch.reference)
        # Edge e * P + p is edge e of prompt p.
        by_prompt = {name: values.view(-1, count).cpu() for name, values in parts.items()}
        index = batch.plan.index()
        coefficients, figures = [], defaultdict(list)
        for p in range(count):
            own = {name: values[:, p] for name, values in by_prompt.items()}
            own["log_probs"] = own["log_probs"].clone().requires_grad_()
            transitions = objectives.Transitions(**own, leaf_edges=index.leaf_edges, edge_parent=index.edge_parent)
            loss, logged = self.loss(batch, p, transitions)
            coefficients.append(objectives.edge_coefficients(loss, transitions.log_probs))
            for name, value in logged.items():
                figures[name].append(value)
            figures["loss"].append(loss.item())
        weights = None
        if self.config.kl_weight:
            weights = self.config.kl_weight * torch.cat(self.kl_shares(batch)) * self.kl_prompts(batch)
        if run.graphs:
            network.evaluated["backward"] += sum(len(branch.x) for branch in run.branches)
        with network.phase("replay"):
            replayed, kl = tree.replay(
                network,
                run,
                (torch.stack(coefficients, 1).flatten() / self.config.prompts_per_update).to(network.device),
                max_batch=network.max_batch,
                kl_weights=weights,
                reference=None if weights is None else batch.reference,
                backward=network.backward,
            )
        if weights is not None:
            # Summed over the prompts of all processes and divided by their number, this is the penalty's mean.
            total = (weights.to(kl) * kl).sum().item() / self.config.kl_weight
            figures["kl_reference"] += [total * self.config.prompts_per_update / count] * count
        if inner == 0:
            # Replaying at unchanged weights must give the stored log-probabilities: a ratio of 1.
            figures["replay_ratio_error"].append((replayed - run.log_probs).exp().sub(1).abs().max().item())
        return figures
