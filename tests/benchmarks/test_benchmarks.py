"""The entry `python -m benchmarks`, and the models that it makes."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import faults, gradient_signal, random_model
from benchmarks.__main__ import COMMANDS, main
from tmpo_trainer.commands import arms
from tmpo_trainer.commands.flags import layers, parse
from tmpo_trainer.settings.presets import make_config, preset
from tmpo_trainer.settings.yaml_file import read_yaml

REPOSITORY = Path(__file__).parents[2]


def test_help_lists_every_subcommand_without_torch() -> None:
    code = "import sys; from benchmarks.__main__ import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for command in COMMANDS:
        (line,) = (line for line in lines if line.split()[:1] == [command])
        assert line.endswith(".")


def test_an_unknown_subcommand_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gradient_signal"]) == 2
    assert "did you mean gradient-signal" in capsys.readouterr().err


def test_full_size_is_that_of_the_models() -> None:
    """Of their published configs: 11.9 G weights, 2.2 G weights and a second attention in blocks 0 to 12."""
    with torch.device("meta"):
        flux = random_model.flux(*random_model.SIZES["flux"][1:], True).transformer
        sd35m = random_model.sd35m(*random_model.SIZES["sd35m"][1:], True).transformer
    assert sum(p.numel() for p in flux.parameters()) == 11_901_408_320
    assert sum(p.numel() for p in sd35m.parameters()) == pytest.approx(2.24e9, rel=0.02)
    assert sd35m.config.dual_attention_layers == tuple(range(13))


def test_a_written_model_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "flux"
    assert main(f"random-model flux {folder} --blocks 1 1 --heads 2".split()) == 0
    flags = (
        f"--model {folder} --preset pickscore --reward shapes --resolution 16 16 --max-sequence-length 8 --lora-rank 4"
    )
    assert main(f"speed {flags} --rounds 1 --arms floor --no-memory".split()) == 0
    out = capsys.readouterr().out
    assert "FluxPipeline" in out and "FluxBackbone" in out and "96 F + 12 G" in out


@pytest.mark.parametrize(
    "table", sorted(Path(__file__).parents[2].glob("benchmarks/*.yaml")), ids=lambda path: path.stem
)
def test_no_two_arms_of_a_table_are_the_same(table: Path, tmp_path: Path) -> None:
    """Presets move after a table has been measured: an arm that names what it is about stays what it was."""
    actions, settings = parse(["--preset", "demo"])
    made = arms.make_arms(read_yaml(table), [0], lambda name, own: layers(actions, settings, own), tmp_path, {})
    found = {arm.name: arms.describe(arm) for arm in made}
    for (one, first), (other, second) in itertools.combinations(found.items(), 2):
        assert first != second, f"{one} is {other}"


def test_an_arm_of_two_tables_is_the_same_in_both() -> None:
    """So that the fronts take the runs of the table of methods."""
    one, other = (read_yaml(REPOSITORY / f"benchmarks/{name}.yaml") for name in ("methods", "fronts"))
    shared = one.keys() & other.keys()
    assert {"nft-chains-6", "tmpo", "tmpo-neutral", "flow-grpo", "gardo"} <= shared
    assert {name: one[name] for name in shared} == {name: other[name] for name in shared}


def test_a_control_differs_from_its_arm_in_one_setting() -> None:
    methods, controls = (read_yaml(REPOSITORY / f"benchmarks/{name}.yaml") for name in ("methods", "controls"))
    assert controls == {
        "nft-chains-6-attention": methods["nft-chains-6"] | {"lora_targets": "attention"},
        "tmpo-feed-forward": methods["tmpo"] | {"lora_targets": "paper"},
        "recommended": {key: value for key, value in methods["tmpo-neutral"].items() if key != "learning_rate"},
    }
    # It has the demo model's baseline, which is the preset's too.
    assert controls["recommended"].items() <= preset("recommended").items()


@pytest.mark.parametrize(
    ("preset", "file", "expected"),
    [
        ("demo", "nft-tree", (100, 2, 1, 3e-3, 0.1, 1, 0)),
        ("demo-long", "nft-tree-long", (220, 3, 3, 5e-3, 0.3, 0, 0.001)),
    ],
)
def test_a_former_run_of_a_preset_is_as_it_was(preset: str, file: str, expected: tuple[float, ...]) -> None:
    actions, settings = parse(["--preset", preset, "--config", str(REPOSITORY / f"benchmarks/settings/{file}.yaml")])
    made: Any = make_config(layers(actions, settings, {}))
    assert (
        made.updates, made.leaf_steps, made.draws, made.learning_rate, made.kl_weight, made.noise_weight, made.old_decay_rise
    ) == expected  # fmt: skip
    assert (made.method, made.rollout, made.rollout_steps, made.branch_early) == ("nft", "tree", 10, (1, 4, 5))
    assert (made.level_importance, made.leaf_importance, made.negative_limit) == (0, 0, None)


def test_the_sweep_of_the_rivals_is_as_it_was(tmp_path: Path) -> None:
    table = read_yaml(Path(__file__).parents[2] / "benchmarks/sweep-rivals.yaml")
    actions, settings = parse(["--preset", "demo"])
    for arm in arms.make_arms(table, [0], lambda name, own: layers(actions, settings, own), tmp_path, {}):
        rate = {"3e-3": 3e-3, "1e-2": 1e-2}.get(arm.name.partition("-lr-")[2], 1e-3)
        prompts = 2 if arm.name.endswith("two-prompts") else 8
        assert (arm.first.learning_rate, arm.first.prompts_per_update) == (rate, prompts)


def test_a_variant_that_was_interrupted_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "start").mkdir()
    (tmp_path / "start/metrics.jsonl").write_text("{}\n")
    asked: list[bool] = []
    commands: list[list[str]] = []

    def run(command: list[str], stderr: Any) -> Any:
        asked.append((tmp_path / "start").exists())
        commands.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["sweep", "start", "--output", str(tmp_path)]) == 2
    assert asked == [False]
    # One that has saved goes on.
    (tmp_path / "start/checkpoint-60").mkdir(parents=True)
    assert main(["sweep", "start", "--output", str(tmp_path)]) == 2
    assert asked == [False, True] and "--resume" in commands[1] and "--resume" not in commands[0]
    assert f"variant start ended with exit code 3, see {tmp_path / 'start.log'}" in capsys.readouterr().err


def test_gardo_has_no_gradient_without_its_penalty(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gradient-signal", "--method", "gardo"]) == 2
    assert "without which there is no gardo" in capsys.readouterr().err


def test_a_case_is_tried_again_on_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries: list[int] = []
    monkeypatch.setattr(faults, "tried", lambda kind, number, *more: (tries.append(number), (number != 1, "note"))[1])
    kind = next(kind for kind, (_, count) in faults.KINDS.items() if count > 2)
    command = ["--output-dir", str(tmp_path), "--kinds", kind]
    count = faults.KINDS[kind][1]
    assert faults.main(command) == 1 and tries == list(range(count))
    tries.clear()
    # Only what failed.
    assert faults.main(command) == 1 and tries == [1]
    tries.clear()
    # The one case of the short form is another.
    assert faults.main([*command, "--short"]) == 0 and tries == [0]
    tries.clear()
    monkeypatch.setattr(faults, "code", lambda: "other")
    assert faults.main(command) == 1 and tries == list(range(count))


def test_the_gradient_of_the_demo_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its neutral advantage needs features of pictures. The parts of all noise levels are the whole gradient."""
    for name, value in {"STEPS": 2, "BATCHES": 1, "PROMPTS": 1, "IMAGES": 1}.items():
        monkeypatch.setattr(gradient_signal, name, value)
    given, parts = [], []
    signal_to_noise, rows = gradient_signal.signal_to_noise, gradient_signal.ByLevel.rows
    monkeypatch.setattr(gradient_signal, "signal_to_noise", lambda g: (given.append(g), signal_to_noise(g))[1])
    monkeypatch.setattr(gradient_signal.ByLevel, "rows", lambda self: (parts.append(self.gradients), rows(self))[1])
    flags = "--preset demo --updates 2 --prompts-per-update 1 --prompts-per-batch 1 --noise-weight 10"
    assert main(f"gradient-signal {flags}".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("signal to noise per update") for line in lines)
    by_level = [[int(share) for share in re.findall(r"(-?\d+)%", line)] for line in lines if "noise levels" in line]
    assert len(by_level) == 5 and all(
        sum(column) == pytest.approx(100, abs=3) for column in zip(*by_level, strict=True)
    )
    torch.testing.assert_close(torch.stack(parts[0]).sum(1), given[0], rtol=1e-3, atol=1e-7)
    # Near t = 1 the weight is next to nothing.
    low, *_, high = torch.stack(parts[0]).norm(dim=(0, 2))
    assert high < 1e-4 * low
