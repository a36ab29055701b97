"""The measurement of full-size models, on tiny ones and a CPU through the same code."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, models
from benchmarks.__main__ import main

REPOSITORY = Path(__file__).parents[2]
#: Packages that the trainer uses elsewhere, and that a rented machine may lack.
ABSENT = ("cv2", "torchvision", "efficientnet_lite_pytorch", "matplotlib", "rapidocr", "ftfy")


def test_a_part_in_its_own_process_without_other_packages(tmp_path: Path) -> None:
    """With NF4, because bitsandbytes works on a CPU too."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT}))
from benchmarks.__main__ import main
sys.exit(main(["gpu", "--tiny", "--only", "flux-24gb", "--json", {str(tmp_path / "part.json")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "part.json").read_text())
    assert "error" not in found
    assert (found["forwards"], found["forwards and backwards"]) == (54, 12)
    assert len(found["updates"]) == len(found["floors"]) == gpu.ROUNDS
    assert set(found["memory"]) == {"rollout", "decode", "replay", "most"}
    assert found["settings"]["quantize"] == "nf4"


def test_a_failed_part_is_one_line_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def part(name: str, tiny: bool, limit: float, rounds: int, log: Path) -> dict[str, Any]:
        assert limit <= gpu.PARTS[name].seconds
        if name == "sd35m":
            file = tmp_path / "own.json"
            gpu.work(name, tiny, file, time.monotonic() + limit)
            # What is there already, when the next part begins.
            assert set(json.loads((tmp_path / "all.json").read_text())["parts"]) == {"pickscore"}
            return json.loads(file.read_text())
        return {"error": "CUDA error: out of memory"}

    monkeypatch.setattr(gpu, "part", part)
    assert main(["gpu", "--tiny", "--parts", "pickscore", "sd35m", "--json", str(tmp_path / "all.json")]) == 1
    out = capsys.readouterr().out
    assert "pickscore: CUDA error: out of memory" in out and "| sd35m " in out


def test_the_log_has_what_a_failed_part_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.sys, "executable", str(Path(sys.prefix) / "bin" / "python"))
    monkeypatch.setattr(gpu, "REPOSITORY", tmp_path)
    log = tmp_path / "gpu.log"
    log.write_text("of an earlier part\n")
    assert gpu.part("pickscore", True, 60, 1, log) == {"error": f"{sys.prefix}/bin/python: No module named benchmarks"}
    assert log.read_text().startswith("of an earlier part\n") and "No module named" in log.read_text()


def test_a_part_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "gpu.log"
    with log.open("w+") as output:
        assert gpu.finished(["sh", "-c", "sleep 60 & echo $!; wait"], 3, output) is None
    status = Path(f"/proc/{int(log.read_text())}/status")
    # It is killed already, but may be seen until somebody has asked for its end.
    end = time.monotonic() + 30
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    assert time.monotonic() < end
    monkeypatch.setattr(gpu, "finished", lambda command, limit, output: None)
    assert gpu.part("pickscore", True, 30, 1, log) == {"error": "it took longer than its 30 seconds"}


def test_nothing_begins_without_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--tiny", "--parts", "compile", "--seconds", "5", "--json", str(tmp_path / "all.json")]) == 1
    assert "compile: no time was left" in capsys.readouterr().out


def test_a_run_begins_its_log_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "all.log").write_text("of an earlier run")
    monkeypatch.setattr(gpu, "part", lambda name, tiny, limit, rounds, log: {"chars": log.open("a").write(name)})
    assert main(["gpu", "--tiny", "--parts", "tests", "--json", str(tmp_path / "all.json")]) == 0
    assert (tmp_path / "all.log").read_text() == "tests"


def test_no_round_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--tiny", "--rounds", "0"]) == 2
    assert "--rounds 0: at least 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_full_size_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu"]) == 2
    assert "needs a CUDA GPU: --tiny" in capsys.readouterr().err


def test_four_bits_in_place_are_near_the_weights() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 8)).requires_grad_(
        False
    )
    x = torch.randn(5, 64)
    before = network(x)
    models.quantise(network, torch.float32)
    assert type(network[0]).__name__ == "Linear4bit" and network[0].weight.numel() == 64 * 64 // 2
    assert (network(x) - before).norm() < 0.2 * before.norm()
