"""`compare`: budgets, arms, resumption, and the figures of its table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from tmpo_trainer import methods
from tmpo_trainer.commands import arms, compare, comparison, main
from tmpo_trainer.commands.children import Training
from tmpo_trainer.commands.flags import layers, parse
from tmpo_trainer.lora.export import FILE_NAME
from tmpo_trainer.settings.presets import make_config
from tmpo_trainer.training.lock import LOCK, Locked, locked

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def flags(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of runs of the tiny model, in a working directory of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("train.txt").write_text("a red circle\ntwo blue squares\n")
    Path("held.txt").write_text("a green triangle\na pink circle\ntwo red squares\n")
    return f"""--model {tiny_model} --reward sharpness --prompts train.txt --eval-prompts held.txt --threads 1 --rollout-steps 6
        --branching 2 --branch-early 1 2 3 --branch-late 1 2 3 --resolution 32 32 --lora-rank 4 --lora-alpha 8 --kernel flow_sde
        --learning-rate 1e-2 --ema-every 1 --max-sequence-length 0 --guidance 1 --eval-images 2 --eval-steps 4 --baseline none
        --kl-weight 0.03 --features efficientnet-lite0""".split()


def start(flags: list[str], *more: str) -> int:
    return main.main(["compare", *more, "--output-dir", "out", *flags])


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


# -- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tmpo", "flow-grpo", "tree-grpo"])
def test_the_most_updates_within_a_budget(load: Callable[..., Any], method: str) -> None:
    """Positions move with the length of a run, so its cost is that of its own schedule."""
    settings = {
        "method": method, "kernel": "flow_sde", "kl_weight": 0.03, "branch_late": (1, 3, 4), "prompts_per_update": 2
    }  # fmt: skip
    config = make_config([("settings", settings)])
    sigmas = load(0).sigmas(6, 32, 32)

    def total(updates: int) -> float:
        made = methods.make(config.model_copy(update={"updates": updates}), sigmas)
        return 2 * sum(methods.cost(made.evaluations(made.plan(u))) for u in range(updates))

    for budget in (total(1), 20_000, total(57)):
        found = arms.updates_within(config, sigmas, budget)
        assert total(found) <= budget < total(found + 1)
    assert arms.updates_within(config, sigmas, total(1) - 1) == 0


def test_arms_that_differ_in_a_weight_alone_are_a_front() -> None:
    """In the order of the weight. Of a grid of two weights the first makes the fronts; another difference parts arms."""
    own = {"kl_weight": 0.0, "tilt_weight": 1.0, "baseline": "none"}
    named: dict[str, dict[str, Any]] = {
        "a-1": own | {"kl_weight": 1.0}, "b": own | {"baseline": "group"}, "a": own | {"kl_weight": 0.03}, "a-0": own,
        "c": {"tilt_weight": 1.0}, "d-2": own | {"tilt_weight": 2.0, "kl_weight": 1.0}, "c-10": {"tilt_weight": 10.0},
        "d": own | {"tilt_weight": 2.0, "kl_weight": 3.0}, "e": own | {"tilt_weight": 5.0},
    }  # fmt: skip
    assert arms.fronts(named) == [["a-0", "a", "a-1"], ["b"], ["c", "c-10"], ["d-2", "d"], ["e"]]


# -- whole comparisons ---------------------------------------------------------------------------------------------


def test_a_comparison_is_killed_goes_on_and_grows(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two methods at one number of evaluations; SIGTERM in the midst; then a third arm and another seed."""
    command = ["compare", "--methods", "tmpo", "flow-grpo", "--evaluations", "2500", "--output-dir", "out", *flags]
    process = subprocess.Popen(
        [sys.executable, "-m", "tmpo_trainer", *command],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    metrics = tmp_path / "out/tmpo-seed0/metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 2:
            break
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()[1].decode()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert process.stderr is not None and b"give the same command again to continue" in process.stderr.read()
    assert list(tmp_path.glob("out/tmpo-seed0/checkpoint-*")) and not (metrics.parent / FILE_NAME).exists()
    assert not (tmp_path / "out/flow-grpo-seed0").exists(), "never begun"

    capsys.readouterr()
    assert main.main(command) == 0
    known = yaml.safe_load(Path("out/compare.yaml").read_text())["arms"]
    lines = {name: Path(f"out/{name}-seed0/metrics.jsonl").read_text().splitlines() for name in known}
    assert {name: len(found) for name, found in lines.items()} == {n: arm["updates"] for n, arm in known.items()}
    # The tree: 8 leaves, 4 + 4 * ... nodes; chains cost several times as much.
    assert known["tmpo"]["updates"] > 2 * known["flow-grpo"]["updates"]
    table = json.loads(Path("out/table.json").read_text())["arms"]
    for name in ("tmpo", "flow-grpo"):
        spent = table[name]["network evaluations"]["mean"]
        assert spent <= 2500 < spent + 2 * table[name]["network evaluations/update"]["mean"]
    text = capsys.readouterr().out
    assert "| base |" in text and "| flow-grpo |" in text and "±" not in text
    for picture in ("pareto.png", "curves.png", "samples.png"):
        assert min(Image.open(f"out/{picture}").size) > 100

    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("*-seed0/*")}
    Path("arms.yaml").write_text("tmpo: {method: tmpo}\ngroup.1: {method: tmpo, baseline: group}\n")
    command[1:4] = ["--arms", "arms.yaml", "--seeds", "0", "1"]
    assert main.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what is there is not done again"
    table = json.loads(Path("out/table.json").read_text())["arms"]
    assert set(table) == {"base", "tmpo", "group.1"}
    first, second = table["tmpo"]["sharpness"]["runs"]
    assert table["tmpo"]["sharpness"]["spread"] == pytest.approx(abs(first - second) / 2**0.5)
    assert first != second and table["tmpo"]["sharpness"]["mean"] == pytest.approx((first + second) / 2)
    assert table["tmpo"]["gain"]["sharpness"]["mean"] == pytest.approx(
        table["tmpo"]["sharpness"]["mean"] - table["base"]["sharpness"]["mean"]
    )

    capsys.readouterr()
    assert main.main([*command, "--kappa", "3"]) == 2
    assert "arm tmpo has kappa 6.0, not 3.0" in complaint(capsys)
    assert main.main([*command[:-1], "0.03", "--evaluations", "9"]) == 2
    assert "another --output-dir" in complaint(capsys)


def test_a_budget_of_seconds_is_tried_first(flags: list[str]) -> None:
    # So large a kappa that all updates cost the same.
    assert start(flags, "--methods", "tmpo", "--seconds", "1.5", "--kappa", "1e9") == 0
    updates = yaml.safe_load(Path("out/compare.yaml").read_text())["arms"]["tmpo"]["updates"]
    trial = [json.loads(line) for line in Path("out/trials/tmpo/metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"]["total"] for line in trial[1:]]
    assert updates == max(1, int(1.5 * len(seconds) / sum(seconds)))
    assert len(Path("out/tmpo-seed0/metrics.jsonl").read_text().splitlines()) == updates


def test_a_trial_run_is_stopped_with_the_comparison(flags: list[str], tmp_path: Path) -> None:
    """It would go on beside the next one, and the speed that is measured would be half."""
    command = ["compare", "--methods", "tmpo", "--seconds", "1000", "--output-dir", "out", *flags]
    process = subprocess.Popen(
        [sys.executable, "-m", "tmpo_trainer", *command, "--rollout-steps", "400"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
    )
    log = tmp_path / "out/trials/tmpo/log.txt"
    deadline = time.monotonic() + 120
    while not (log.exists() and "training in" in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(Locked), locked(tmp_path / "out/trials/tmpo.lock", tmp_path):
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert process.stderr is not None and b"give the same command again to continue" in process.stderr.read()
    # Nothing of it lives.
    with locked(tmp_path / "out/trials/tmpo.lock", tmp_path):
        assert not Path("out/compare.yaml").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_signal_reaches_every_run(tmp_path: Path) -> None:
    """Also while the main thread starts one, and if another has just ended."""
    training = Training(1, None)
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    over, alive = (subprocess.Popen(command, start_new_session=True) for command in ([sys.executable, "-c", ""], sleep))
    over.wait()
    training._running |= {over, alive}
    with training._lock:
        training._stop(signal.SIGTERM, None)
    assert alive.wait(20) == -signal.SIGTERM and training.stopped == signal.SIGTERM


def test_one_that_fails_does_not_stop_the_others(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    Path("no_number.py").write_text(
        "import torch\n\nclass NoNumber:\n    def __init__(self, device): pass\n\n"
        "    def score(self, images, prompts, metadata=None): return torch.full((len(images),), torch.nan)\n"
    )
    Path("arms.yaml").write_text(
        "bad: {method: gardo, auxiliary: ['no_number:NoNumber'], pickscore_scale: raw}\ngood: {learning_rate: 1.0e-3}\n"
    )
    assert start(flags, "--arms", "arms.yaml", "--updates", "3") == 1
    out, err = capsys.readouterr()
    assert "bad-seed0 failed, see" in err and "| good | 1 | 3 |" in out and "| bad |" not in out
    assert "Failed and not in the table: bad-seed0" in Path("out/table.md").read_text()
    assert "reward no_number:NoNumber gave nan" in Path("out/bad-seed0/log.txt").read_text()


def test_the_papers_protocols_with_all_methods(flags: list[str], tmp_path: Path) -> None:
    """GARDO's has another scale of PickScore, and auxiliary scorers, which no other arm has."""
    named = {name: {"method": name} for name in compare.RIVALS}
    for preset in ("pickscore", "geneval"):
        of = parse(["--preset", preset])
        made = arms.make_arms(named, [0], lambda name, own, of=of: layers(*of, own), tmp_path, {})
        assert {arm.name: arm.first.method for arm in made} == {name: name for name in named}
    known: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "compare", lambda made, *more: known.extend(made) or 0)
        Path("ir").mkdir()
        assert start(["--preset", "pickscore"], "--methods", "tmpo", "gardo", "--reward-models", "imagereward=ir") == 0
    assert [arm.first.reward_models for arm in known] == [(), (f"imagereward={tmp_path / 'ir'}",)]
    # Rollouts are drawn on one scale.
    lines = [{"reward/pickscore": 0.8, "update": 1}, {"reward/ocr": 1}]
    assert comparison._on_scale(lines, "flow", "raw") == [
        {"reward/pickscore": 0.8 * 26, "update": 1},
        {"reward/ocr": 1},
    ]
    assert comparison._on_scale(lines, "raw", "raw") is lines


def test_the_places_of_scorers(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known: list[Any] = []
    monkeypatch.setattr(comparison, "compare", lambda made, *more: known.extend(made) or 0)
    Path("file.yaml").write_text("reward_models: [sharpness=elsewhere]\n")
    # They stay in the order in which they are given, and `none` takes back those of a file.
    rewards = ["--reward", "hpsv2", "pickscore", "--reward-models", "pickscore=a", "hpsv2=b"]
    assert main.main(["compare", "--methods", "tmpo", "--output-dir", "out", *rewards]) == 0
    assert known.pop().first.reward_models == ("pickscore=a", "hpsv2=b")
    assert start([*flags, "--config", "file.yaml", "--reward-models", "none"], "--methods", "tmpo") == 0
    assert known.pop().first.reward_models == ()
    # An arm with places of its own, and one with a typing error.
    Path("arms.yaml").write_text("a: {reward_models: [sharpness=own]}\n")
    capsys.readouterr()
    assert start([*flags, "--reward-models", "sharpness=b"], "--arms", "arms.yaml") == 2
    assert "--reward-models sharpness=b: sharpness is no reward of any arm" in complaint(capsys)
    Path("arms.yaml").write_text("a: {}\nb: {lerning_rate: 1}\n")
    assert start([*flags, "--reward-models", "sharpness=b"], "--arms", "arms.yaml") == 2
    assert "arm b: unknown key lerning_rate" in complaint(capsys)


def test_a_folder_that_was_there_stays(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    assert start(flags, "--methods", "tmpo", "--evaluations", "9") == 2
    assert Path("out").is_dir()


def test_what_is_not_its_own_is_left_alone(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A run that still goes on, and one with other settings in a folder of that name."""
    other = Path("out/tmpo-seed0")
    other.mkdir(parents=True)
    (other / "config.yaml").write_text("method: tmpo\nupdates: 7\n")
    assert start(flags, "--methods", "tmpo", "--updates", "1") == 1
    assert "holds a run with other settings: move it away" in capsys.readouterr().err
    assert (other / "config.yaml").exists()
    (other / "config.yaml").write_text("method: tmpo\nfuture: 1\n")
    assert start(flags, "--methods", "tmpo", "--updates", "1") == 1
    assert "config.yaml: unknown key future" in capsys.readouterr().err
    (other / "config.yaml").unlink()
    with locked(Path("out/settings/tmpo-seed0.lock"), other):
        assert start(flags, "--methods", "tmpo", "--updates", "1") == 1
        assert "tmpo-seed0 is still being trained by another process" in capsys.readouterr().err
    # A run that was started by itself has the lock of its folder alone, and must not be emptied.
    (other / "half").touch()
    with locked(other / LOCK, other):
        assert start(flags, "--methods", "tmpo", "--updates", "1") == 1
        assert "tmpo-seed0 is still being trained by another process" in capsys.readouterr().err
    assert (other / "half").exists()
    assert start(flags, "--methods", "tmpo", "--updates", "1") == 0


def test_a_run_that_cannot_be_measured_is_left_out(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(flags, "--methods", "tmpo", "--updates", "1", "--seeds", "0", "1") == 0
    # Another LoRA in its place: the stored measurement is not of that one.
    file = Path("out/tmpo-seed1") / FILE_NAME
    tensors = load_file(file)
    save_file({name: torch.full_like(value, torch.nan) for name, value in tensors.items()}, file)
    capsys.readouterr()
    assert start(flags, "--methods", "tmpo", "--updates", "1", "--seeds", "0", "1") == 1
    out, err = capsys.readouterr()
    assert "tmpo-seed1 cannot be measured" in err and "not finite" in err and "| tmpo | 1 | 1 |" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--methods tmpo grpo", "grpo"),
        ("--methods tmpo --seeds 1 1", "names a seed twice"),
        ("--evaluations 0", "must be above 0"),
        ("--evaluations 5 --seconds 5", "not allowed with"),
        ("--methods tmpo --arms arms.yaml", "not allowed with"),
        ("--arms missing.yaml", "missing.yaml"),
        ("--arms base.yaml", "arm base: write NAME"),
        ("--arms dots.yaml", "arm ..: write NAME"),
        ("--arms empty.yaml", "names no arms"),
        ("--arms seed.yaml", "arm a: seed is set by the comparison"),
        ("--arms updates.yaml --evaluations 9", "arm a: updates is set by the comparison"),
        ("--methods tmpo --seed abc", "seed 'abc'"),
        ("--methods tmpo --seconds inf", "must be above 0"),
        ("--methods tmpo --evaluations 9 --updates 3", "which set the budget: leave --updates out"),
        ("--methods tmpo --seconds 9 --jobs 2", "leave --jobs out"),
        ("--arms list.yaml", "arm x: write NAME: {setting: value}"),
        ("--arms steps.yaml", "eval_steps differs between a (4) and b (5)"),
        ("--arms unknown.yaml", "unknown key lerning_rate, did you mean learning_rate"),
        ("--methods tmpo --baseline group --kappa 0", "kappa"),
        ("--methods tmpo --evaluations 9", "--evaluations 9: not even one update of tmpo costs as few, give more"),
        ("--methods tmpo --ema-decay 0.9", "--ema-decay is set by the comparison: leave it out"),
        ("--methods tmpo --report", "--report is set by the comparison: leave it out"),
        ("--methods tmpo --reward-models imagereward=x", "imagereward is no reward of any arm"),
        ("--methods tmpo --resume latest", "no --resume"),
        ("--methods tmpo --nonsense 1", "unknown flag --nonsense"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], capsys: pytest.CaptureFixture[str], more: str, message: str) -> None:
    Path("arms.yaml").write_text("a: {}\n")
    Path("list.yaml").write_text("x: [1]\n")
    for name, text in (("base", "base: {}"), ("dots", "..: {}"), ("empty", "{}"), ("seed", "a: {seed: 1}"),
                       ("updates", "a: {updates: 1}")):  # fmt: skip
        Path(f"{name}.yaml").write_text(f"{text}\n")
    Path("steps.yaml").write_text("a: {}\nb: {eval_steps: 5}\n")
    Path("unknown.yaml").write_text("a: {lerning_rate: 1}\n")
    assert start(flags, *more.split()) == 2
    assert message in complaint(capsys)
    assert not Path("out").exists()
