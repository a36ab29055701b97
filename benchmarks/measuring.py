"""Clocks, memory and recorded calls of a benchmark."""

from __future__ import annotations

import os
import platform
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tmpo_trainer.training.memory import Peak
from tmpo_trainer.training.run_folder import environment

#: In the order of an update; what belongs to none of them is `other`.
PHASES = ("rollout", "decode", "reward", "replay", "optimiser", "other")


class Phases:
    """Seconds by phase of the main thread, and the most memory in use during each.

    A phase inside another one counts for itself alone. On a GPU every change of phase waits for the queue, so that a phase's
    time is its own.

    Args:
        peak: counts memory on a CPU; without it there is none to read there.

    Attributes:
        seconds: by phase. bytes: by phase, the peak; on a GPU all that is allocated, on a CPU what `peak` counts.
        at_start: by phase, the bytes in use when it last began.
    """

    def __init__(self, device: torch.device, peak: Peak | None = None):
        self.device, self.peak = device, peak
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.bytes: defaultdict[str, int] = defaultdict(int)
        self.at_start: dict[str, int] = {}
        self._phase, self._since = "other", 0.0

    @contextmanager
    def whole(self) -> Iterator[None]:
        """One update."""
        self.seconds.clear()
        self.bytes.clear()
        self._take_peak()
        self._since = self._now()
        try:
            yield
        finally:
            self._switch("other")

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        before = self._phase
        self._switch(phase)
        self.at_start[phase] = self._in_use()
        try:
            yield
        finally:
            self._switch(before)

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Makes an object's method a phase. Calls in other threads, beside the main one's work, are not counted."""
        plain: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any, **more: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return plain(*arguments, **more)
            with self(phase):
                return plain(*arguments, **more)

        setattr(owner, name, watched)

    def _switch(self, phase: str) -> None:
        now = self._now()
        self.seconds[self._phase] += now - self._since
        self.bytes[self._phase] = max(self.bytes[self._phase], self._take_peak())
        self._phase, self._since = phase, now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _in_use(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return 0 if self.peak is None else self.peak.now

    def _take_peak(self) -> int:
        """The most bytes since the last call."""
        if self.device.type == "cuda":
            most = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return most
        if self.peak is None:
            return 0
        most, self.peak.peak = self.peak.peak, self.peak.now
        return most


class Calls:
    """The calls of a module, recorded with their inputs, so that they can be made again with nothing around them.

    Attributes:
        forwards, backwards: rows of the calls without and with gradient.
    """

    def __init__(self, module: torch.nn.Module):
        self.module = module
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor | None]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        def keep(module: Any, arguments: Any, more: Any, output: Any) -> None:
            gradient = None
            if torch.is_grad_enabled():
                gradient = torch.randn_like(output[0])
            arguments, more = tree_map(_detached, (arguments, more))
            self._calls.append((arguments, more, gradient))

        hook = self.module.register_forward_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def again(self, gradient: bool) -> None:
        """The recorded calls without gradient, or those with it, each of which is then backpropagated."""
        for arguments, more, given in self._calls:
            if gradient and given is not None:
                self.module(*arguments, **more)[0].backward(given)
            elif not gradient and given is None:
                with torch.no_grad():
                    self.module(*arguments, **more)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def machine(device: torch.device) -> dict[str, Any]:
    """Versions and hardware of a measurement."""
    about = {**environment(device), "processor": _processor(), "cores": os.cpu_count()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {"memory": properties.total_memory, "cuda": torch.version.cuda}
    return about


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of every phase over the rounds."""
    return {phase: statistics.median(one.get(phase, 0.0) for one in rounds) for phase in PHASES}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table, aligned for reading in a terminal."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)
