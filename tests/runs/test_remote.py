"""Training the bundled model with a reward behind a real server: jointly, and with the server killed on the way."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tmpo_trainer.commands import main
from tmpo_trainer.files import read_metrics
from tmpo_trainer.lora.export import FILE_NAME
from tmpo_trainer.rewards import remote

REPOSITORY = Path(__file__).parents[2]
FLAGS = """--method tmpo --reward shapes remote --updates 4 --prompts-per-update 2 --prompts-per-batch 2 --rollout-steps 6
    --branching 2 --branch-early 1 2 3 --branch-late 1 3 4 --sample-every 0 --checkpoint-every 2 --no-report --threads 1"""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[int], tuple[subprocess.Popen[str], int]]]:
    """`serve(port)`: `python -m tmpo_trainer serve`, once it listens, and its port."""
    running: list[subprocess.Popen[str]] = []

    def serve(port: int = 0) -> tuple[subprocess.Popen[str], int]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tmpo_trainer", "serve", "--reward", "shapes", "--port", str(port)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"serving shapes at http://127\.0\.0\.1:(\d+)", line):
                # Nobody reads on: a full pipe would stop it.
                threading.Thread(target=process.stderr.read, daemon=True).start()
                return process, int(found[1])
        raise AssertionError(f"the server ended with {process.wait()}")

    yield serve
    for process in running:
        process.kill()
        process.wait()


def flags(port: int, folder: Path) -> list[str]:
    return [*FLAGS.split(), "--reward-models", f"remote=http://127.0.0.1:{port}", "--output-dir", str(folder)]


def test_joint_reward_and_a_server_that_is_killed(
    serve: Callable[..., tuple[subprocess.Popen[str], int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The server's scores are those of the scorer here. Killed, the run ends with 1 and a checkpoint, and goes on later."""
    monkeypatch.setattr(remote, "PAUSES", (0.05, 0.1))
    server, port = serve()
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert main.main(flags(port, whole)) == 0
    lines = read_metrics(whole / "metrics.jsonl")
    assert len(lines) == 4
    for line in lines:
        assert line["reward/shapes"] == line["reward/remote"] and line["reward_std/shapes"] == line["reward_std/remote"]
    assert any(line["reward_std/shapes"] > 0 for line in lines)

    def kill() -> None:
        while len(read_metrics(folder / "metrics.jsonl")) < 3:
            time.sleep(0.005)
        server.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    # Long enough that the kill comes before the end.
    assert main.main([*flags(port, folder), "--updates", "400"]) == 1
    killer.join()
    server.wait()
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"failed after update \d+: reward remote at http://127\.0\.0\.1:\d+: .*\(3 tries\)", last)
    assert re.search(r"kept checkpoint-\d+, continue with --resume", last)
    done = len(read_metrics(folder / "metrics.jsonl"))
    assert (folder / f"checkpoint-{done}").is_dir()
    # Still down: refused before anything else.
    assert main.main(["--resume", str(folder)]) == 2
    assert "is it running?" in capsys.readouterr().err
    serve(port)
    assert main.main(["--resume", str(folder), "--updates", str(done + 2)]) == 0
    assert len(read_metrics(folder / "metrics.jsonl")) == done + 2
    lora = load_file(folder / FILE_NAME)
    assert all(torch.isfinite(value).all() for value in lora.values())
