"""A method that is one new file: its flag, its help, and a run of it through the command line; nothing else is changed.

It has no stochastic step. Its gradient is a regression on noised leaves, weighted by the reward.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tmpo_trainer import methods
from tmpo_trainer.commands import loading, main
from tmpo_trainer.files import read_metrics
from tmpo_trainer.lora.export import FILE_NAME
from tmpo_trainer.settings import presets
from tmpo_trainer.settings.errors import ConfigError

SOURCE = '''
"""Regression on noised leaves, weighted by their reward."""

from typing import ClassVar

import torch
from pydantic import Field

from tmpo_trainer.methods import base
from tmpo_trainer.settings.config import TrainConfig


class Settings(TrainConfig):
    exclusive: ClassVar = ("frozen_rollout",)

    noise_levels: int = Field(2, ge=1)
    """Noise levels at which a leaf is regressed."""
    frozen_rollout: bool = False
    """Roll out with the weights of the first update."""


class Method(base.Method):
    copies = 1

    def __init__(self, config, sigmas):
        super().__init__(config, sigmas)
        self.seen, self.first = 0, {}

    def plan(self, update):
        from tmpo_trainer.tree import TreePlan

        return TreePlan(self.config.rollout_steps, self.config.leaves, {})

    def evaluations(self, plan):
        replay = plan.leaves * self.config.noise_levels * self.config.inner_updates
        return {"rollout": plan.rollout_evaluations, "replay": replay}

    def begin(self, update, weights):
        super().begin(update, weights)
        self.first = self.first or weights.copy()

    def rollout_weights(self, weights):
        return self.first if self.config.frozen_rollout else None

    def backward(self, batch, network, inner):
        x0 = batch.rollout.leaves
        weight = torch.stack([(r - r.mean()) / r.std(correction=0) for r in batch.rewards], 1).flatten()
        generator = torch.Generator().manual_seed(batch.update)
        total = 0.0
        with network.phase("replay"):
            for level in range(self.config.noise_levels):
                eps, t = torch.randn(x0.shape, generator=generator), (level + 1) / (self.config.noise_levels + 1)
                rows = range(len(x0))
                size = network.max_batch or len(x0)
                size -= size % batch.count
                for first in range(0, len(x0), size):
                    part = slice(first, first + size)
                    target = eps[part] - x0[part]
                    v = network((1 - t) * x0[part] + t * eps[part], torch.full((len(target),), t))
                    off = (v - target).square().flatten(1).mean(1)
                    loss = (weight[part] * off).sum() * batch.share / len(rows) / self.config.noise_levels
                    network.backward(loss)
                    total += loss.item() / batch.share
        return {"loss": [total] * batch.count}

    def end(self, figures):
        self.seen += 1

    def state(self):
        return {"seen": self.seen}

    def tensors(self):
        return self.first

    def load(self, state, tensors):
        self.seen, self.first = state["seen"], dict(tensors)
'''


class MeanColours:
    """Stands in for the feature extractor of the report."""

    name = "means"

    def __call__(self, images: Any) -> torch.Tensor:
        return torch.from_numpy(images.astype("float32").mean((1, 2)))


@pytest.fixture
def noised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with the method's file in it, where methods are looked for."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "noised_leaves.py").write_text(SOURCE)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    importlib.invalidate_caches()
    yield
    sys.modules.pop("tmpo_trainer.methods.noised_leaves", None)
    if hasattr(methods, "noised_leaves"):
        del methods.noised_leaves


@pytest.fixture
def flags(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, red_scorer: Any) -> list[str]:
    """Of a short run on the tiny model, in a working directory of its own; later flags win."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_scorer", lambda name, *more, **rest: red_scorer)
    monkeypatch.setattr(loading, "load_features", lambda name, device: MeanColours())
    Path("good.txt").write_text("a red circle\ntwo blue squares\n")
    return f"""--model {tiny_model} --prompts good.txt --eval-prompts good.txt --no-report --updates 2 --sample-every 0
        --rollout-steps 6 --branch-early 1 2 --branch-late 1 2 --resolution 32 32 --output-dir out --lora-rank 4
        --learning-rate 1e-2 --ema-every 1 --guidance 1 --max-sequence-length 0 --method noised-leaves""".split()


def printed(capsys: pytest.CaptureFixture[str], *given: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main.main([*given, "--print-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_its_setting_is_a_flag_with_a_help_text(
    noised: None, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        main.main(["--help"])
    assert caught.value.code == 0
    assert "--noise-levels NOISE_LEVELS" in (text := capsys.readouterr().out)
    assert "Noise levels at which a leaf is regressed." in text and "--no-frozen-rollout" in text
    settings = printed(capsys, *flags, "--noise-levels", "3")
    assert settings["method"] == "noised-leaves" and settings["noise_levels"] == 3
    # What belongs to other methods is not among its settings.
    assert "kappa" not in settings and "noise_levels" not in printed(capsys, "--noise-levels", "3")
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    assert printed(capsys, "--config", "run.yaml") == settings
    assert main.main([*flags, "--noise-levels", "0"]) == 2
    assert "flags: noise_levels '0': input should be greater than or equal to 1" in capsys.readouterr().err
    assert main.main(["--frozen-rollout", "--dry-run"]) == 2
    assert "frozen_rollout True belongs to method noised-leaves, not to nft" in capsys.readouterr().err
    assert main.main(["--method", "noised-leaf"]) == 2
    assert "did you mean noised-leaves?" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_no_method() -> None:
    """The other tests leave nothing behind."""
    assert "noised-leaves" not in presets.method_names() and "noise_levels" not in presets.all_settings()
    with pytest.raises(ConfigError, match="method 'noised-leaves' is not known"):
        presets.method_file("noised-leaves")


def test_dry_run(noised: None, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*flags, "--dry-run", "--noise-levels", "3", "--replay-batch", "5"]) == 0
    out = capsys.readouterr().out
    assert "update 1: noise at steps (), 9 seeds" in out and "9 leaves" in out
    assert "network evaluations per prompt: 54 rollout, 27 replay" in out
    # A replay call has the rows that the method trains on, not those of transitions.
    assert "replay, 5 latents a call" in out
    assert not Path("out").exists()


def test_it_trains_and_goes_on(noised: None, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With a report at the end; resumed from its checkpoint, it does to the bit what it did."""
    more = """--updates 3 --checkpoint-every 1 --checkpoints-kept 3 --noise-levels 3 --report --sample-every 2 --eval-images 2
        --eval-steps 2 --prompts-per-update 2 --prompts-per-batch 2 --replay-batch 5"""
    flags += more.split()
    assert main.main(flags) == 0
    err = capsys.readouterr().err
    assert "LGMD=" in err and "ratio=" not in err
    lines = read_metrics(Path("out/metrics.jsonl"))
    assert [(line["evaluations/rollout"], line["evaluations/replay"]) for line in lines] == [(54, 27)] * 3
    assert all(line["branch_steps"] == [1] and line["grad_norm"] > 0 for line in lines)
    assert len({line["loss"] for line in lines}) == 3 and "ratio_mean" not in lines[0] and "beta" not in lines[0]
    assert Path("out/curves.png").is_file() and Path("out/report.md").is_file()
    states = [json.loads(Path(f"out/checkpoint-{n}/state.json").read_text()) for n in (1, 2, 3)]
    assert [(state["method"], state["method_state"]) for state in states] == [
        ("noised-leaves", {"seen": n}) for n in (1, 2, 3)
    ]
    lora = load_file(Path("out", FILE_NAME))
    assert any(value.any() for name, value in lora.items() if "lora_B" in name)

    shutil.copytree("out", "again")
    assert main.main(["--resume", "again/checkpoint-2"]) == 0
    assert [{**line, "seconds": 0} for line in read_metrics(Path("again/metrics.jsonl"))] == [
        {**line, "seconds": 0} for line in lines
    ]
    again = load_file(Path("again", FILE_NAME))
    assert again.keys() == lora.keys() and all(torch.equal(again[name], value) for name, value in lora.items())
    assert json.loads(Path("again/checkpoint-3/state.json").read_text())["method_state"] == {"seen": 3}
    assert main.main(["--resume", "again", "--method", "tmpo"]) == 2


def test_it_rolls_out_with_weights_of_its_own(noised: None, flags: list[str]) -> None:
    """Those of the first update: its rewards are those of a run that never learns."""

    def rewards(folder: str, *more: str) -> list[float]:
        assert main.main([*flags, "--output-dir", folder, *more, "--updates", "3"]) == 0
        return [line["reward/red"] for line in read_metrics(Path(folder, "metrics.jsonl"))]

    still = rewards("still", "--learning-rate", "0")
    learning, frozen = rewards("learning"), rewards("frozen", "--frozen-rollout")
    assert frozen == still and learning[0] == still[0] and learning[2] != still[2]
    # The gradient is that of the current weights, and is what is exported.
    lora = load_file(Path("frozen", FILE_NAME))
    assert any(value.any() for name, value in lora.items() if "lora_B" in name)


def test_out_of_memory_halves_what_it_trains_on(
    noised: None, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(method="noised-leaves", branch_early=(1, 2), branch_late=(1, 2))
    original, tried = trainer.backbone.velocity, []

    def velocity(prompts: Any, guidance: float) -> Any:
        network = original(prompts, guidance)

        def limited(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                tried.append(len(x))
                if len(x) > 5:
                    raise torch.OutOfMemoryError("made up")
            return network(x, sigma)

        return limited

    monkeypatch.setattr(trainer.backbone, "velocity", velocity)
    trainer.update()
    # Two levels of nine leaves could be one call of 18.
    assert tried[:3] == [9, 9, 4] and trainer.replay_batch == 4
