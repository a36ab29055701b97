"""The clock of a network's calls: seconds by phase, on a GPU without waiting for it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from tmpo_trainer.methods.batch import Clock


def test_seconds_add_up_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 5.0, 7.0, 10.0, 10.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    for phase in ("rollout", "decode", "rollout"):
        with clock(phase):
            pass
    assert clock.seconds == {"rollout": 1.5, "decode": 2.0}


def test_a_gpu_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is queued at once and takes a second each; the phases' seconds are the queue's, not the time to queue it."""
    queue = {"seconds": 0.0, "waits": 0}

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self, stream: Any) -> None:
            self.at = queue["seconds"]

        def elapsed_time(self, end: Event) -> float:
            assert queue["waits"]
            return 1000 * (end.at - self.at)

    def synchronize(device: torch.device) -> None:
        queue["waits"] += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    clock = Clock(torch.device("cuda"))
    for phase, work in (("rollout", 2), ("decode", 1), ("rollout", 1)):
        with clock(phase):
            queue["seconds"] += work
    assert queue["waits"] == 0
    assert clock.seconds == {"rollout": 3.0, "decode": 1.0}
    assert queue["waits"] == 1
