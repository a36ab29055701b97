from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX in full width with two blocks of each kind, random weights."""
    folder = tmp_path_factory.mktemp("random") / "flux"
    command = [sys.executable, "-m", "benchmarks", "random-model", "flux", str(folder), "--blocks", "2", "2"]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    return folder
