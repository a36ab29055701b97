"""The benchmark at a size that a CPU can do: a random model of the real classes, and an iteration measured on it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(("kind", "blocks", "calls"), [("flux", "1 1", 96), ("sd35m", "2", 96)])
def test_an_iteration_on_random_weights(
    kind: str,
    blocks: str,
    calls: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def script(name: str, flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *flags.split()])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        assert done.value.code == 0
        return capsys.readouterr().out

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / kind
    script("random_model.py", f"{kind} {folder} --blocks {blocks} --heads 2")
    flags = f"""--preset pickscore --reward shapes --model {folder} --resolution 16 16 --max-sequence-length 8 --updates 1
        --branch-early 1 2 3 --branch-late 1 2 3 --kappa 1e9 --lora-rank 4"""
    out = script("iteration.py", flags)
    for phase in ("rollout", "replay", "decode", "reward", "total"):
        assert f"\n{phase} " in out
    assert f"per prompt, rollout: {calls}.0" in out and "per prompt, replay: 12.0" in out


def test_full_size_is_that_of_the_models() -> None:
    """Of their published configs: 11.9 G weights, 2.2 G weights and a second attention in blocks 0 to 12."""
    module = runpy.run_path(str(BENCHMARKS / "random_model.py"))
    with torch.device("meta"):
        flux = module["flux"](*module["SIZES"]["flux"][1:], True).transformer
        sd35m = module["sd35m"](*module["SIZES"]["sd35m"][1:], True).transformer
    assert sum(p.numel() for p in flux.parameters()) == 11_901_408_320
    assert sum(p.numel() for p in sd35m.parameters()) == pytest.approx(2.24e9, rel=0.02)
    assert sd35m.config.dual_attention_layers == tuple(range(13))
