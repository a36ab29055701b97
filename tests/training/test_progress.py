"""What the reporter writes and says about drift."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator

from tmpo_trainer.evaluation.drift import Drift, drifts
from tmpo_trainer.training.progress import Reporter


def test_drift_of_a_grid_is_written_and_warned_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A statistic has one warning, however long its drift stays; lines after the checkpoint are written again."""
    x = np.random.default_rng(0).random((4, 6))
    shifts = iter([0.0, 1.0, 1.1, 1.2])

    def draw() -> tuple[np.ndarray, list[str], dict[str, Drift]]:
        moved = drifts({"contrast": x}, {"contrast": x + next(shifts)}, list("abcd"))
        return np.zeros((1, 2, 8, 8, 3), np.uint8), ["a"], moved

    def reporter(done: int) -> Reporter:
        unasked: Any = None
        return Reporter(tmp_path, 9, done, ["red"], draw, unasked, Accelerator(cpu=True), ["contrast"])

    first = reporter(0)
    said = []
    for update in (2, 4, 6):
        first.samples(update)
        said.append([line for line in capsys.readouterr().err.splitlines() if "drift: " in line])
    first.close()
    assert [len(lines) for lines in said] == [0, 1, 0]
    assert (
        said[1][0].startswith("update 4, samples: drift: contrast moved by +2.96 of")
        and "held by a larger" in said[1][0]
    )
    second = reporter(4)
    second.samples(6)
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "drift.jsonl").read_text().splitlines()]
    assert [(line["update"], line["contrast"]["shift"]["mean"]) for line in lines] == [
        (2, 0), (4, pytest.approx(1)), (6, pytest.approx(1.2))
    ]  # fmt: skip
