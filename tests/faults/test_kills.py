"""A few disturbed runs of `python -m benchmarks faults`, which tries many more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform == "win32", reason="the runs are forked")
def test_disturbed_runs_end_like_undisturbed_ones(tmp_path: Path) -> None:
    """SIGKILL at a random moment and while writing, Ctrl-C twice, damage, a full disk, two runs in one folder."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "faults", "--output-dir", str(tmp_path), "--short"],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    results = [json.loads(line) for line in (tmp_path / "results-0.jsonl").read_text().splitlines()]
    assert len(results) >= 8 and all(result["survived"] for result in results)
