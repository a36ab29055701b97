"""A whole run of a tiny Qwen-Image through the command line: stopped and resumed, inspected, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tmpo_trainer.commands import loading, main
from tmpo_trainer.lora.file import FILE_NAME


def test_a_run_is_resumed_bit_for_bit(
    tiny_qwen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    red_scorer: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_scorer", lambda name, *more, **rest: red_scorer)
    # Two prompts of different lengths in one batch.
    Path("p.txt").write_text("a red circle\ntwo blue squares\n")
    text = f"""--model {tiny_qwen} --prompts p.txt --eval-prompts p.txt --updates 3 --prompts-per-update 2 --prompts-per-batch 2
        --rollout-steps 4 --branching 2 --branch-early 1 2 --branch-late 1 2 --resolution 32 48 --guidance 3.5 --output-dir out
        --max-sequence-length 20 --text-cache text --lora-rank 4 --lora-alpha 8 --learning-rate 1e-2 --ema-every 1
        --sample-every 0 --no-report --checkpoint-every 2 --gradient-checkpointing --reward sharpness --device cpu"""
    run = text.split()
    assert main.main([*run, "--dry-run"]) == 0
    assert "text encoding: " in capsys.readouterr().out
    assert main.main(run) == 0
    whole, metrics = load_file(Path("out", FILE_NAME)), Path("out/metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 3 and all(json.loads(line)["replay_ratio_error"] < 1e-4 for line in metrics)
    assert main.main(["--resume", "out/checkpoint-2"]) == 0
    lora, again = load_file(Path("out", FILE_NAME)), Path("out/metrics.jsonl").read_text().splitlines()
    assert lora.keys() == whole.keys() and all(torch.equal(lora[name], whole[name]) for name in whole)
    last = [json.loads(lines[2]) for lines in (metrics, again)]
    assert last[0]["loss"] == last[1]["loss"]
    capsys.readouterr()
    assert main.main(["inspect", "out"]) == 0
    assert "qwen-image/lora" in capsys.readouterr().out
    for more, told in (
        (["--resolution", "40", "32"], "resolution 40x32 must be a multiple of 16 in both directions"),
        (["--max-sequence-length", "0"], "Qwen-Image needs at least one token of text"),
        (["--attention", "flash"], "--attention flash is not for Qwen-Image models"),
    ):
        assert main.main([*run, *more]) == 2
        assert sum(told in line for line in capsys.readouterr().err.splitlines()) == 1
