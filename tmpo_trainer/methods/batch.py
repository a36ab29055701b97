"""What a rollout leaves for a method to train on, and the network that it may call."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import tree


class Clock:
    """Seconds by phase. On a GPU a phase's time is that of its stretch of the queue, for which nothing waits but `seconds`."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stretches: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        yield
        self._stretches.append((phase, start, self._now()))

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        # It gets its time when the GPU reaches it: at once where the GPU has nothing to do, so work on the CPU counts too.
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds so far, by phase. It waits for the GPU."""
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.synchronize(self.device)
        found: defaultdict[str, float] = defaultdict(float)
        for phase, start, end in self._stretches:
            found[phase] += start.elapsed_time(end) / 1000 if gpu else end - start
        return dict(found)


class Network:
    """The transformer for the prompts of one batch: a `tree.Velocity` whose calls are timed and counted by phase.

    Args:
        velocity: of the backbone, for these prompts. device: where it runs.

    Attributes:
        max_batch: most latents in one call with gradient, or None.
        evaluated: latents evaluated so far, by phase.
        rolled_out: whether the rollout has made its last call.
    """

    def __init__(self, velocity: tree.Velocity, clock: Clock, device: torch.device):
        self.device = device
        self.evaluated: defaultdict[str, int] = defaultdict(int)
        self.max_batch: int | None = None
        self.rolled_out = False
        self._velocity, self._clock, self._phase = velocity, clock, "rollout"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the network is called for meanwhile: rollout, reference, ratio or replay."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        with self._clock(self._phase):
            predicted = self._velocity(x, sigma)
        # Count only calls that succeeded.
        self.evaluated[self._phase] += len(x)
        return predicted

    @contextmanager
    def prompted(self, velocity: tree.Velocity) -> Iterator[None]:
        """Calls the transformer for other prompts meanwhile, timed and counted like the rest."""
        before, self._velocity = self._velocity, velocity
        try:
            yield
        finally:
            self._velocity = before

    def backward(self, value: Tensor) -> None:
        """Backpropagates a scalar."""
        with self._clock(self._phase):
            value.backward()


class AdapterWeights(Protocol):
    """What a method may do with the weights of the adapter, see `training.weights`."""

    def copy(self) -> dict[str, Tensor]: ...

    def write(self, target: Mapping[str, Tensor]) -> None: ...

    def using(self, values: Mapping[str, Tensor]) -> AbstractContextManager[None]: ...

    def pretrained(self) -> AbstractContextManager[None]: ...


@dataclass(eq=False)
class PromptBatch:
    """The rollout of P prompts in one forest, K leaves each. Row l * P + p is leaf l of prompt p.

    plan: of one prompt. rollout: of all of them. share: of the update's prompts on this process, P / prompts_per_update.
    slots: places of the prompts among those of the update on all processes, which key their noise.
    scores: by scorer, `[K, P]`. rewards: of every prompt, combined and without the part that the `neutral` statistics explain,
    `[K]` each. features: `[K, P, D]`, or None.
    own: what the method keeps of this batch until the update ends.
    """

    update: int
    prompts: list[str]
    plan: tree.TreePlan
    rollout: tree.Rollout
    share: float
    scores: dict[str, Tensor]
    rewards: list[Tensor]
    features: Tensor | None
    slots: list[int]
    own: dict[str, Any] = field(default_factory=dict)
    #: The reference policy's means, once they are known.
    reference: list[Tensor] | None = None

    @property
    def count(self) -> int:
        """P."""
        return len(self.prompts)
