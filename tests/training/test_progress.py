"""What the reporter writes and says about drift, and about the velocity's error."""

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


def test_a_rising_error_of_the_velocity_is_warned_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also in a run that is resumed; a method without such an error has no warning."""

    def run(folder: Path, done: int, errors: dict[int, float | None]) -> list[str]:
        unasked: Any = None
        reporter = Reporter(folder, 99, done, ["red"], unasked, unasked, Accelerator(cpu=True))
        for update, error in errors.items():
            line = {"update": update, "reward/red": 0.5, "lgmd": 0.1}
            reporter.update(line | ({} if error is None else {"velocity_mse": error}))
        reporter.close()
        return [line for line in capsys.readouterr().err.splitlines() if "velocity_mse" in line]

    level = dict.fromkeys(range(1, 41), 0.25)
    # The mean of the last 20 is twice the first 20's at update 50, and more at 51.
    risen = dict.fromkeys(range(41, 61), 0.75)
    (said,) = run(tmp_path / "whole", 0, level | risen)
    assert "update 51: velocity_mse" in said and "is 2.1 times that of the first 20 updates" in said
    assert not run(tmp_path / "part", 0, level | dict.fromkeys(range(41, 51), 0.75))
    (said,) = run(tmp_path / "part", 50, dict.fromkeys(range(51, 61), 0.75))
    assert "update 51: velocity_mse" in said
    assert not run(tmp_path / "part", 60, dict.fromkeys(range(61, 71), 0.75))
    assert not run(tmp_path / "other", 0, dict.fromkeys(range(1, 61), None))
    assert not run(tmp_path / "short", 0, {update: float(update) for update in range(1, 40)})
