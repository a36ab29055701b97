"""GARDO (arXiv:2512.24138): Flow-GRPO with rarity in the advantage, and a KL penalty that holds suspicious samples only.

A gate chooses the samples of an update that the reward likes and auxiliary scorers do not; the penalty compares them with a
copy of the adapter, which is renewed now and then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from ..settings.errors import ConfigError
from . import flow_grpo

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy as np
    from torch import Tensor

    from ..processes import Processes
    from .base import Figures
    from .batch import AdapterWeights, PromptBatch

#: The share of suspicious samples that is held: at the start, its bounds, and the factor by which it moves.
SHARE, SHARE_MIN, SHARE_MAX, SHARE_STEP = 0.1, 0.02, 0.2, 0.1

#: Updates whose mean suspicion is remembered.
MEMORY = 20

#: The reference becomes the current policy when the KL exceeds the first, or after so many updates.
KL_LIMIT, UPDATES_LIMIT = 3e-4, 15


def win_rate(scores: np.ndarray) -> np.ndarray:
    """The share of samples that each one beats, ties counting half: `[n]` -> `[n]` in 0..1."""
    import numpy as np

    ordered = np.sort(scores)
    below = np.searchsorted(ordered, scores, "left")
    return (below + np.searchsorted(ordered, scores, "right")) / (2 * len(scores))


class Gate:
    """State of the adaptive gate and of the reference's age. Everything in it is part of a checkpoint."""

    def __init__(self) -> None:
        self.share, self.memory, self.age, self.kl = SHARE, [], 0, 0.0

    def held(self, reward: np.ndarray, auxiliary: Sequence[np.ndarray]) -> np.ndarray:
        """Which samples of an update the KL penalty holds: `[n]` bool.

        A sample is suspicious if it wins more by the reward than by the auxiliary scores; of those the most suspicious
        `share` are held. The share grows when suspicion is above all that is remembered, and shrinks below it.

        Args:
            reward: `[n]`, over all prompts. auxiliary: `[n]` each.
        """
        import numpy as np

        suspicion = win_rate(reward) - np.mean([win_rate(scores) for scores in auxiliary], axis=0)
        positive = suspicion[suspicion > 0]
        if not len(positive):
            return np.zeros(len(reward), dtype=bool)
        mean = float(positive.mean())
        if self.memory and mean > max(self.memory):
            self.share *= 1 + SHARE_STEP
        elif self.memory and mean < min(self.memory):
            self.share *= 1 - SHARE_STEP
        self.share = min(max(self.share, SHARE_MIN), SHARE_MAX)
        self.memory = [*self.memory, mean][-MEMORY:]
        return (suspicion > 0) & (suspicion >= np.quantile(positive, 1 - self.share))

    def renew(self) -> bool:
        """To be called before every update: whether the reference is to become the current policy."""
        self.age += 1
        if self.kl <= KL_LIMIT and self.age <= UPDATES_LIMIT:
            return False
        self.age, self.kl = 1, 0.0
        return True

    def state(self) -> dict[str, Any]:
        return {"share": self.share, "memory": self.memory, "age": self.age, "kl": self.kl}

    def load(self, state: Mapping[str, Any]) -> None:
        self.share, self.memory, self.age, self.kl = state["share"], list(state["memory"]), state["age"], state["kl"]


class Settings(flow_grpo.Settings):
    """Settings of gardo."""

    exclusive: ClassVar[tuple[str, ...]] = ("auxiliary",)

    auxiliary: tuple[str, ...] = ()
    """Scorers beside the reward: a picture that they rank far below the reward is held by the KL penalty."""

    @model_validator(mode="after")
    def _has_auxiliary(self) -> Settings:
        if not (self.auxiliary and self.kl_weight):
            raise ValueError(
                "method gardo needs auxiliary scorers and a kl_weight above 0: its gate decides where that acts"
            )
        if self.reuse_forward:
            raise ValueError("reuse_forward with gardo: its reference changes the adapter's weights before the replay")
        if len(set(self.auxiliary)) != len(self.auxiliary) or self.auxiliary == self.reward:
            raise ValueError(f"auxiliary {' '.join(self.auxiliary)}: name each once, and others than the reward alone")
        return self

    @property
    def extra_rewards(self) -> tuple[str, ...]:
        return self.auxiliary

    @property
    def needs_features(self) -> bool:
        """The rarity of a picture is measured on them."""
        return True


class Method(flow_grpo.Method):
    copies = 1
    config: Settings

    def __init__(self, config: Settings, sigmas: Tensor):
        super().__init__(config, sigmas)
        self.gate = Gate()
        #: The adapter that the KL penalty compares with; made at the first update.
        self.copy: dict[str, Tensor] = {}
        #: Of the update that is under way: held samples, and processes that they are on.
        self._held, self._processes = 0, 1

    def begin(self, update: int, weights: AdapterWeights) -> None:
        super().begin(update, weights)
        if not self.copy:
            self.copy = weights.copy()
        if self.gate.renew():
            weights.write(self.copy)

    def reference(self) -> AbstractContextManager[None]:
        """The network with the copy of the adapter."""
        return self.weights.using(self.copy)

    def judge(self, batches: Sequence[PromptBatch], processes: Processes) -> Figures:
        """Tells every batch which of its samples the gate holds; ranks are over all prompts of all processes."""
        import numpy as np
        import torch

        own = [torch.stack(batch.rewards, 1).flatten().numpy() for batch in batches]
        auxiliary = [
            np.concatenate([batch.scores[name].flatten().numpy() for batch in batches])
            for name in self.config.auxiliary
        ]
        everyone = processes.gather((np.concatenate(own), auxiliary))
        held = self.gate.held(
            np.concatenate([rewards for rewards, _ in everyone]),
            [np.concatenate([scores[i] for _, scores in everyone]) for i in range(len(auxiliary))],
        )
        first = sum(len(rewards) for rewards, _ in everyone[: processes.rank])
        for batch, rewards in zip(batches, own, strict=True):
            batch.own["held"] = torch.from_numpy(held[first : first + len(rewards)])
            first += len(rewards)
        self._held, self._processes = int(held.sum()), processes.count
        return {"gated": [float(held.mean())]}

    def leaf_advantage(self, batch: PromptBatch, p: int) -> Tensor:
        from .. import objectives

        assert batch.features is not None
        return objectives.diverse_advantage(batch.rewards[p], batch.features[:, p])

    def kl_shares(self, batch: PromptBatch) -> list[Tensor]:
        """The penalty is a mean over the transitions of the held samples of the whole update."""
        branches = batch.rollout.branches
        # Chains have as many parents at every step as there are leaves, in the same order.
        return [
            batch.own["held"].to(branch.x.dtype) / max(self._held * len(branches), 1) * self.kl_scale(branch)
            for branch in branches
        ]

    def kl_prompts(self, batch: PromptBatch) -> float:
        # The shares are of all processes' samples already, and gradients are averaged over the processes.
        return self._processes

    def end(self, figures: Mapping[str, float]) -> None:
        self.gate.kl = figures["kl_reference"]

    def state(self) -> dict[str, Any]:
        return self.gate.state()

    def tensors(self) -> dict[str, Tensor]:
        return self.copy

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if state["age"] and not tensors:
            raise ConfigError("the checkpoint lacks the copy of the adapter that gardo keeps (method.safetensors)")
        self.gate.load(state)
        self.copy = dict(tensors)
