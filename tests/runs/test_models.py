"""Whole runs of tiny FLUX and SD3.5 models through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tmpo_trainer import tree
from tmpo_trainer.commands import loading, main

PROMPTS = ["a red circle", "two blue squares"]
STEPS, TOKENS = 6, 12


@pytest.fixture(params=["flux-dev", "flux-schnell", "sd35"])
def model(request: pytest.FixtureRequest, tiny_flux: Callable[[bool], Path], tiny_sd35: Path) -> Path:
    return tiny_sd35 if request.param == "sd35" else tiny_flux(request.param == "flux-dev")


def flags(model: Path, *more: str) -> list[str]:
    text = f"""--model {model} --prompts good.txt --eval-prompts good.txt --updates 5 --sample-every 0 --eval-images 2
        --eval-steps 2 --rollout-steps 6 --branch-early 1 2 3 --branch-late 1 3 4 --resolution 32 48 --output-dir out
        --lora-rank 4 --lora-alpha 8 --learning-rate 1e-2 --ema-every 1 --max-sequence-length {TOKENS} --text-cache text
        --no-report --checkpoint-every 0"""
    return [*text.split(), *more]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, red_scorer: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_scorer", lambda name, *more, **rest: red_scorer)
    (tmp_path / "good.txt").write_text("\n".join(PROMPTS))
    return tmp_path


@pytest.mark.parametrize("kernel", ["cps", "flow_sde", "dance"])
@pytest.mark.parametrize("targets", ["paper", "all-linear"])
def test_five_updates_and_a_lora(
    place: Path,
    model: Path,
    kernel: str,
    targets: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--kernel", kernel, "--lora-targets", targets, "--gradient-checkpointing"]
    if request.node.callspec.params["model"] == "flux-schnell" and kernel != "cps":
        assert main.main(flags(model, *more)) == 2
        assert f"--kernel {kernel} is not for model {model}, which was distilled" in capsys.readouterr().err
        return
    assert main.main(flags(model, *more)) == 0
    lines = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    # Replaying at the weights of the rollout gives its log-probabilities: a ratio of 1.
    assert all(line["replay_ratio_error"] < 1e-4 for line in lines)
    lora = load_file(place / "out" / "pytorch_lora_weights.safetensors")
    assert lora and all(key.startswith("transformer.") for key in lora)
    assert any(value.any() for key, value in lora.items() if ".lora_B." in key)
    assert any("attn2" in key for key in lora) == (
        json.loads((model / "model_index.json").read_text())["_class_name"] == "StableDiffusion3Pipeline"
    )
    assert main.main(["inspect", "out"]) == 0


@pytest.mark.parametrize("max_batch", [None, 8])
def test_network_calls_are_those_of_the_plan(
    model: Path, make_trainer: Callable[..., Any], max_batch: int | None
) -> None:
    """How many calls, with how many rows: guidance of SD3.5 doubles the rows, that of FLUX is an input."""
    trainer = make_trainer(
        folder=model,
        max_sequence_length=TOKENS,
        guidance=3.5,
        prompts_per_update=1,
        max_batch=max_batch,
        replay_batch=4,
    )
    rows: dict[bool, list[int]] = {False: [], True: []}
    trainer.backbone.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows[torch.is_grad_enabled()].append(len(kwargs["hidden_states"])),
        with_kwargs=True,
    )
    trainer.update()
    factor = 2 if hasattr(trainer.backbone.pipeline, "text_encoder_3") else 1
    plan = tree.TreePlan.tmpo(STEPS, (1, 2, 3), 3)
    limit = max_batch or max(plan.widths)
    expected = [factor * min(limit, width - first) for width in plan.widths for first in range(0, width, limit)]
    assert rows[False] == expected and sum(expected) == factor * 96
    assert rows[True] == [factor * 4] * 3


def test_only_the_prompts_that_a_run_draws_are_encoded(
    place: Path, tiny_flux: Callable[[bool], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of its updates, of its sample grids or its report, and the empty one; resumed, those of the remaining updates."""
    (place / "many.txt").write_text("\n".join(f"number {i}" for i in range(300)))
    more = """--reward sharpness --prompts many.txt --updates 2 --prompts-per-update 2 --prompts-per-batch 2 --device cpu
        --checkpoint-every 1 --checkpoints-kept 2"""
    run = flags(tiny_flux(True), *more.split())
    assert main.main([*run, "--dry-run"]) == 0
    assert (
        "text features: 5 prompts will be drawn, 5 of them have to be encoded; 0.000 GiB on disk"
        in capsys.readouterr().out
    )
    assert not (place / "text").exists()
    assert main.main(run) == 0
    files = set((place / "text").iterdir())
    assert len(files) == 5
    assert main.main([*run, "--output-dir", "another", "--dry-run"]) == 0
    assert "5 prompts will be drawn, 0 of them" in capsys.readouterr().out
    assert main.main(["--resume", "out/checkpoint-1", "--text-cache", "other", "--sample-every", "2"]) == 0
    resumed = {path.name for path in (place / "other").iterdir()}
    assert len(resumed) == 2 + 1 + len(PROMPTS) and len(resumed & {path.name for path in files}) == 2 + 1


def test_a_text_cache_that_cannot_be_written_is_refused_before_anything_is_loaded(
    place: Path, tiny_flux: Callable[[bool], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_scorer", lambda *arguments: pytest.fail("loaded"))
    run = flags(tiny_flux(True), "--text-cache", "good.txt/text")
    for more in ([], ["--dry-run"]):
        assert main.main([*run, *more]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "text-cache" in line]
        assert "--text-cache good.txt/text: text features cannot be written there (Not a directory)" in line
