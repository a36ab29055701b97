"""On a GPU: `launch` trains as a plain run does, through NCCL and, with FSDP2, on shards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
REPOSITORY = Path(__file__).parents[2]
FLAGS = [
    "--reward", "sharpness", "--updates", "2", "--branch-late", "1", "2", "3", "--replay-batch", "6", "--decode-batch", "4",
    "--kappa", "1e9", "--no-report", "--sample-every", "0", "--learning-rate", "1e-3", "--seed", "0",
]  # fmt: skip


def run(model: Path, folder: Path, *launch: str) -> list[dict[str, float]]:
    """Metrics of two updates."""
    (folder / "prompts.txt").write_text("a red circle\na green square\n")
    flags = [
        "--model",
        str(model),
        "--prompts",
        str(folder / "prompts.txt"),
        "--output-dir",
        str(folder / "run"),
        *FLAGS,
    ]
    command = [sys.executable, "-m", "tmpo_trainer", *launch, *flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in next(folder.rglob("metrics.jsonl")).read_text().splitlines()]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_launched_run_is_the_plain_one(model: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "plain").mkdir(), (tmp_path / kind).mkdir()
    plain = run(model, tmp_path / "plain")
    launched = run(model, tmp_path / kind, "launch", kind, "--num-processes", "1")
    assert len(plain) == len(launched) == 2
    for a, b in zip(plain, launched, strict=True):
        # Sums of bfloat16 products in another order.
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.05)
    (one,) = (tmp_path / "plain").rglob("lora.safetensors")
    (other,) = (tmp_path / kind).rglob("lora.safetensors")
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    distance = sum((first[name].float() - second[name].float()).square().sum() for name in first)
    size = sum(value.float().square().sum() for value in first.values())
    assert distance < 0.05 * size
