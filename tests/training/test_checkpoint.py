"""Runs that end early and go on, through the CLI: bit for bit what one uninterrupted run gives."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file

from tmpo_trainer.commands import loading, main, train
from tmpo_trainer.commands.children import Training
from tmpo_trainer.evaluation import report
from tmpo_trainer.files import read_metrics
from tmpo_trainer.lora.export import FILE_NAME
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.training import checkpoint, lock, loop, stopping
from tmpo_trainer.training.lock import LOCK, locked
from tmpo_trainer.training.loop import Trainer
from tmpo_trainer.training.progress import Reporter

REPOSITORY = Path(__file__).parents[2]
UPDATES, CALLS_PER_UPDATE = 20, 2

#: The CLI with a reward that means something for pictures of random weights, and that can end the process.
RUNNER = """
import os, signal, sys
import torch
from tmpo_trainer.commands import loading
from tmpo_trainer.commands.main import main
from tmpo_trainer.training import checkpoint

calls = flushes = 0

class Red:
    name = "red"

    def score(self, images, prompts, metadata=None):
        global calls
        calls += 1
        if calls == int(os.environ.get("KILL_AT_SCORE", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        means = torch.from_numpy(images.astype("float32") / 255).mean((1, 2))
        return means[:, 0] - means[:, 2]

def flush(path, flush=checkpoint.flush):
    global flushes
    flushes += 1
    if flushes == int(os.environ.get("KILL_AT_FLUSH", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    flush(path)

checkpoint.flush = flush
loading.load_scorer = lambda name, *more, **rest: Red()
sys.exit(main())
"""


@pytest.fixture(scope="module")
def flags(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a run of 20 short updates with a checkpoint every 5."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("# four of the domain\na red circle\ntwo blue squares\na green triangle\n\na pink circle\n")
    text = f"""--model {tiny_model} --reward shapes --prompts {prompts} --eval-prompts {prompts} --no-report --threads 1
        --updates {UPDATES} --checkpoint-every 5 --sample-every 0 --prompts-per-update {CALLS_PER_UPDATE}
        --prompts-per-batch 1 --rollout-steps 6 --branching 2 --branch-early 1 2 3 --branch-late 1 3 4 --resolution 32 32
        --lora-rank 4 --lora-alpha 8 --learning-rate 1e-2 --ema-every 2 --max-sequence-length 0 --guidance 1"""
    return text.split()


class Scorer:
    """As in RUNNER; `at` calls it does something else first, whose result, if any, is the score."""

    name = "red"

    def __init__(self, score: Callable[..., torch.Tensor]):
        self.red = score
        self.calls = 0
        self.at: dict[int, Callable[[int], Any]] = {}

    def score(self, images: Any, prompts: Sequence[str], metadata: Any = None) -> torch.Tensor:
        self.calls += 1
        instead = self.at[self.calls](len(images)) if self.calls in self.at else None
        return self.red(images, prompts) if instead is None else instead


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch, red_scorer: Any) -> Scorer:
    """The scorer of runs within this process."""
    scorer = Scorer(red_scorer.score)
    monkeypatch.setattr(loading, "load_scorer", lambda name, *more, **rest: scorer)
    return scorer


@pytest.fixture(scope="module")
def whole(flags: list[str], red_scorer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in one go. Do not write to it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_scorer", lambda name, *more, **rest: red_scorer)
        assert main.main([*flags, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    shutil.copytree(whole, tmp_path / "copied")
    return tmp_path / "copied"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same(folder: Path, whole: Path) -> None:
    """Every bit of LoRA and average, and every figure. (safetensors writes metadata in a random order, so not bytes.)"""
    checkpoint_files = [f"checkpoint-{UPDATES}/{name}" for name in ("lora.safetensors", "ema.safetensors")]
    for name in (FILE_NAME, *checkpoint_files):
        ours, theirs = (load_file(path / name) for path in (folder, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    with safe_open(folder / FILE_NAME, "pt") as ours, safe_open(whole / FILE_NAME, "pt") as theirs:
        assert ours.metadata() == theirs.metadata()
    assert [line["update"] for line in metrics(folder)] == list(range(1, UPDATES + 1))
    assert metrics(folder) == metrics(whole)


def subprocess_run(arguments: list[str], directory: Path, **environment: int) -> subprocess.CompletedProcess[str]:
    """RUNNER with these arguments in another process."""
    script = directory / "runner.py"
    script.write_text(RUNNER)
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), **{k: str(v) for k, v in environment.items()}}
    return subprocess.run(
        [sys.executable, str(script), *arguments], cwd=directory, env=variables, text=True, capture_output=True, timeout=300
    )  # fmt: skip


def twice(number: signal.Signals) -> Callable[[int], None]:
    """For `Scorer.at`: the same signal again before the first was acted on."""

    def send(count: int) -> None:
        for _ in range(2):
            os.kill(os.getpid(), number)

    return send


def test_a_whole_run(whole: Path) -> None:
    """What the comparisons below stand on: it learns, every update differs, old checkpoints are gone."""
    assert names(whole) == ["checkpoint-15", "checkpoint-20"]
    lora = load_file(whole / FILE_NAME)
    assert any(value.any() for key, value in lora.items() if ".lora_B." in key)
    lines = metrics(whole)
    assert len({line["reward/red"] for line in lines}) == UPDATES
    assert len({tuple(line["branch_steps"]) for line in lines}) > 1
    assert {path.name for path in whole.iterdir()} == {
        ".lock", "checkpoint-15", "checkpoint-20", "config.yaml", "env.json", "metrics.jsonl", FILE_NAME
    }  # fmt: skip
    assert sorted(path.name for path in (whole / "checkpoint-20").iterdir()) == sorted(
        (*checkpoint.FILES, checkpoint.SUMS)
    )


def test_killed_twice_and_resumed_is_the_same(flags: list[str], whole: Path, tmp_path: Path) -> None:
    """kill -9 in update 13, then kill -9 while the next checkpoint is being written, then to the end."""
    folder = tmp_path / "outputs" / "killed"
    killed = subprocess_run(
        [*flags, "--output-dir", str(folder)], tmp_path, KILL_AT_SCORE=12 * CALLS_PER_UPDATE + 1
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert names(folder) == ["checkpoint-10", "checkpoint-5"] and not (folder / FILE_NAME).exists()
    assert [line["update"] for line in metrics(folder)] == list(range(1, 13))
    # A kill can also cut the last line short.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"update": 13, "branch_st')

    again = subprocess_run(["--resume", str(folder)], tmp_path, KILL_AT_FLUSH=3)
    assert again.returncode == -signal.SIGKILL, again.stderr
    assert names(folder) == [".checkpoint-15.tmp", "checkpoint-10", "checkpoint-5"]

    finished = subprocess_run(["--resume", "latest"], tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "resuming in" in finished.stderr
    assert names(folder) == ["checkpoint-15", "checkpoint-20"]
    assert_same(folder, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_exits_130(
    flags: list[str], whole: Path, scorer: Scorer, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    # Hang-ups may be ignored here, as under nohup.
    handler = signal.getsignal(number) or signal.SIG_DFL
    request.addfinalizer(partial(signal.signal, number, handler))
    if handler is signal.SIG_IGN:
        handler = signal.SIG_DFL
        signal.signal(number, handler)
    folder = tmp_path / "run"
    scorer.at[6 * CALLS_PER_UPDATE + 1] = lambda count: os.kill(os.getpid(), number)
    assert main.main([*flags, "--output-dir", str(folder)]) == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"tmpo_trainer: stopped by {number.name} after update 7; saved, continue with --resume {folder}"
    assert names(folder) == ["checkpoint-5", "checkpoint-7"] and not (folder / FILE_NAME).exists()
    assert signal.getsignal(number) is handler
    assert main.main(["--resume", str(folder)]) == 0
    assert_same(folder, whole)


def test_what_was_due_when_a_signal_came_is_made_up_for(flags: list[str], scorer: Scorer, tmp_path: Path) -> None:
    """Sample grids and evaluations are those of a run that nobody stopped; what was shown is not shown again."""
    more = [
        *flags,
        "--updates",
        "4",
        "--sample-every",
        "2",
        "--eval-every",
        "2",
        "--eval-images",
        "2",
        "--eval-steps",
        "2",
    ]
    runs = {name: tmp_path / name for name in ("straight", "stopped")}
    assert main.main([*more, "--output-dir", str(runs["straight"])]) == 0
    scorer.calls = 0
    scorer.at[CALLS_PER_UPDATE + 1] = lambda count: os.kill(os.getpid(), signal.SIGTERM)
    assert main.main([*more, "--output-dir", str(runs["stopped"])]) == 130
    assert not (runs["stopped"] / "evaluations.jsonl").exists()
    for _ in range(2):
        assert main.main(["--resume", str(runs["stopped"])]) == 0
    files = [sorted(path.name for path in (run / "samples").iterdir()) for run in runs.values()]
    assert files[0] == files[1] and len(files[0]) == 3
    for name in ("evaluations.jsonl", "drift.jsonl"):
        lines = [(run / name).read_text() for run in runs.values()]
        assert lines[0] == lines[1] and lines[0].count("\n") == 2


def test_the_signal_that_windows_has(
    flags: list[str], scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-Break, with which ComfyUI's node stops a training there; here another signal stands for it."""
    monkeypatch.setattr(loop, "stopping", lambda: (*stopping.stopping(), signal.SIGUSR1))
    folder = tmp_path / "run"
    scorer.at[1] = lambda count: os.kill(os.getpid(), signal.SIGUSR1)
    assert main.main([*flags, "--output-dir", str(folder)]) == 130
    assert names(folder) == ["checkpoint-1"]
    scorer.at[scorer.calls + 1] = twice(signal.SIGUSR1)
    assert main.main(["--resume", str(folder)]) == 130
    assert names(folder) == ["checkpoint-1"]


def test_a_hang_up_that_is_ignored_stays_so() -> None:
    """Under nohup the terminal may go away. Who listens to it otherwise saves, also if it comes twice."""
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert {number.name for number in stopping.stopping()} == {"SIGINT", "SIGTERM"}
        with Training(1, None).listening():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in stopping.stopping()
        with Training(1, None).listening():
            assert signal.getsignal(signal.SIGHUP) not in (signal.SIG_IGN, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_checkpoint_is_saved_before_what_is_shown(flags: list[str], tmp_path: Path, scorer: Scorer) -> None:
    """ComfyUI, a scheduler or the user may kill a run that does not look at its signal for minutes."""
    folder, seen = tmp_path / "run", []

    def samples(self: Reporter, update: int) -> None:
        seen.append((update, names(folder)))
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "samples", samples)
        assert main.main([*flags, "--sample-every", "5", "--output-dir", str(folder)]) == 130
    # The first update's grid was stopped after: it is no time for a checkpoint, so one is made then.
    assert seen == [(1, [])] and names(folder) == ["checkpoint-1"]
    seen.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "samples", samples)
        patch.setattr(Reporter, "shown", lambda self, update: {"samples"})
        assert main.main(["--resume", str(folder)]) == 130
    assert seen == [(5, ["checkpoint-1", "checkpoint-5"])] and names(folder) == ["checkpoint-1", "checkpoint-5"]


def test_grids_of_a_course_that_is_given_up_go(flags: list[str], tmp_path: Path, scorer: Scorer) -> None:
    folder = tmp_path / "run"
    assert main.main([*flags, "--updates", "10", "--sample-every", "5", "--output-dir", str(folder)]) == 0
    samples = folder / "samples"
    assert {file.name for file in samples.iterdir()} == {f"update-{n:06d}.png" for n in (1, 5, 10)}
    (samples / "update-mine.png").touch()
    scorer.at[scorer.calls + 1] = lambda count: os.kill(os.getpid(), signal.SIGTERM)
    assert main.main(["--resume", str(folder / "checkpoint-5"), "--updates", "20"]) == 130
    assert {file.name for file in samples.iterdir()} == {"update-000001.png", "update-000005.png", "update-mine.png"}


def test_a_run_that_failed_in_its_first_update_leaves_its_folder_free(
    flags: list[str], tmp_path: Path, scorer: Scorer
) -> None:
    folder = tmp_path / "run"

    def fail(count: int) -> None:
        raise RuntimeError("the server is down")

    scorer.at[1] = fail
    assert main.main([*flags, "--updates", "2", "--output-dir", str(folder)]) == 1
    assert (folder / "metrics.jsonl").read_text() == "" and not names(folder)
    assert main.main([*flags, "--updates", "2", "--output-dir", str(folder)]) == 0
    assert len(metrics(folder)) == 2


def test_a_resumed_run_does_not_need_the_lora_it_began_with(
    flags: list[str], tmp_path: Path, scorer: Scorer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([*flags, "--updates", "1", "--output-dir", str(tmp_path / "first")]) == 0
    begun = tmp_path / "first" / FILE_NAME
    folder = tmp_path / "run"
    assert main.main([*flags, "--updates", "2", "--init-lora", str(begun), "--output-dir", str(folder)]) == 0
    begun.unlink()
    assert main.main(["--resume", str(folder), "--updates", "3", "--dry-run"]) == 0
    capsys.readouterr()
    assert main.main(["--resume", str(folder), "--updates", "3"]) == 0
    assert str(begun) in (folder / "config.yaml").read_text() and "init_lora" not in capsys.readouterr().err
    assert len(metrics(folder)) == 3


def test_a_resumed_run_with_another_reward_has_a_report(tmp_path: Path, flags: list[str]) -> None:
    """Its evaluations before have no gain in that reward."""
    more = ["--report", "--eval-every", "1", "--eval-images", "2", "--eval-steps", "2"]
    folder = tmp_path / "run"
    assert main.main([*flags, *more, "--updates", "2", "--output-dir", str(folder)]) == 0
    assert main.main(["--resume", str(folder), "--updates", "4", "--reward", "sharpness"]) == 0
    assert "| sharpness |" in (folder / "report.md").read_text()


def test_the_figures_come_before_the_files(
    tmp_path: Path,
    flags: list[str],
    scorer: Scorer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk that is full at the end does not take a run's evaluation along."""

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "side_by_side", full)
    more = ["--report", "--eval-images", "2", "--eval-steps", "2", "--updates", "1"]
    assert main.main([*flags, *more, "--output-dir", str(tmp_path / "run")]) == 1
    assert "cosine diversity: " in capsys.readouterr().err and (tmp_path / "run" / "report.json").exists()


def test_a_second_signal_stops_at_once(flags: list[str], whole: Path, scorer: Scorer, tmp_path: Path) -> None:
    """In the middle of update 7: what is saved is update 6, whole."""
    folder = tmp_path / "run"
    scorer.at[6 * CALLS_PER_UPDATE + 1] = twice(signal.SIGINT)
    assert main.main([*flags, "--output-dir", str(folder)]) == 130
    assert names(folder) == ["checkpoint-5", "checkpoint-6"]
    assert main.main(["--resume", str(folder)]) == 0
    assert_same(folder, whole)


def test_a_signal_from_outside(flags: list[str], tmp_path: Path) -> None:
    """The module as users start it, with the reward of the domain, and Ctrl-C."""
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "tmpo_trainer", *flags, "--updates", "100000", "--output-dir", str(folder)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, text=True, stderr=subprocess.PIPE
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not read_metrics(folder / "metrics.jsonl"):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    done = len(read_metrics(folder / "metrics.jsonl"))
    assert f"stopped by SIGINT after update {done}; saved" in errors and "Traceback" not in errors
    assert checkpoint.find(str(folder), tmp_path).name == f"checkpoint-{done}"


def test_a_score_that_is_no_number_stops_and_can_be_resumed(
    flags: list[str], whole: Path, scorer: Scorer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 1, the scorer and the prompt named; the last whole update is kept and a mended scorer goes on from it."""
    folder = tmp_path / "run"
    scorer.at[7 * CALLS_PER_UPDATE + 2] = lambda count: torch.full((count,), torch.nan)
    assert main.main([*flags, "--output-dir", str(folder)]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("tmpo_trainer: failed after update 7: reward red gave nan for image 0 of prompt '")
    assert last.endswith(f"(kept checkpoint-7, continue with --resume {folder})")
    assert names(folder) == ["checkpoint-5", "checkpoint-7"]
    assert checkpoint.load(folder / "checkpoint-7").state["update"] == 7
    assert main.main(["--resume", str(folder)]) == 0
    assert_same(folder, whole)


def test_a_failure_in_the_first_update_saves_nothing(
    flags: list[str], scorer: Scorer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    scorer.at[1] = lambda count: torch.full((count,), torch.inf)
    assert main.main([*flags, "--output-dir", str(folder)]) == 1
    assert names(folder) == []
    assert capsys.readouterr().err.strip().endswith("(nothing saved yet)")


def test_resuming_a_finished_run_changes_nothing(whole: Path, copied: Path, scorer: Scorer) -> None:
    (copied / FILE_NAME).unlink()
    assert main.main(["--resume", str(copied)]) == 0
    assert scorer.calls == 0
    assert_same(copied, whole)


def test_a_new_run_in_an_old_ones_folder_is_refused(
    flags: list[str], whole: Path, scorer: Scorer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([*flags, "--output-dir", str(whole)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{whole} already holds a run: continue it with --resume {whole}" in line
    assert scorer.calls == 0


def test_resuming_with_more_updates_goes_on(copied: Path, scorer: Scorer) -> None:
    assert main.main(["--resume", str(copied), "--updates", "22"]) == 0
    assert [line["update"] for line in metrics(copied)] == list(range(1, 23))


@pytest.mark.parametrize(
    ("more", "blame"),
    [
        (["--lora-rank", "8"], "continues with lora_rank 4: for 8, start a new run"),
        (["--seed", "1"], "continues with seed 0: for 1, start a new run"),
        (["--model", "OTHER"], "is of another model or LoRA rank"),
        (["--preset", "demo"], "no --config or --preset"),
    ],
    ids=["rank", "seed", "model", "preset"],
)
def test_resuming_with_other_settings_is_refused(
    copied: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], blame: str
) -> None:
    if "OTHER" in more:
        from diffusers import SD3Transformer2DModel

        other = shutil.copytree(tiny_model, tmp_path / "other")
        transformer = SD3Transformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
        shallow = SD3Transformer2DModel.from_config({**transformer.config, "num_layers": 1})
        shallow.save_pretrained(other / "transformer")
        more = ["--model", str(other)]
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert main.main(["--resume", str(copied), *more]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tmpo_trainer")]
    assert blame in line
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


# -- checkpoints by themselves -------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing in between cleans up after it."""


def save(folder: Path, update: int, keep: int = 2) -> Path:
    parameter = torch.nn.Parameter(torch.full((3,), float(update)))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    state = {"seed": 0, "lora_rank": 3}
    return checkpoint.save(folder, update, {"a": parameter}, {"a": parameter}, optimizer.state_dict(), state, keep)


POINTS = [("flush", n) for n in range(1, 8)] + [("save_file", 1), ("save_file", 2), ("rename", 1)]


@pytest.mark.parametrize(("function", "call"), POINTS, ids=str)
def test_a_kill_while_saving_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int
) -> None:
    folder = tmp_path / "outputs" / "run"
    save(folder, 5)
    calls = 0
    owner = Path if function == "rename" else checkpoint
    original = getattr(owner, function)

    def dying(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, dying)
        with pytest.raises(Killed):
            save(folder, 10)
    # Only the last flush comes after the renaming.
    expected = 10 if (function, call) == ("flush", 7) else 5
    for resume in ("latest", str(folder)):
        found = checkpoint.find(resume, tmp_path / "outputs")
        assert found == folder / f"checkpoint-{expected}"
        saved = checkpoint.load(found)
        assert saved.state["update"] == expected and set(saved.optimizer) == {"state", "param_groups"}
        assert not saved.tensors
        assert saved.lora["a"].tolist() == saved.ema["a"].tolist() == pytest.approx([expected] * 3, abs=0.01)
    save(folder, 15)
    assert ".checkpoint-10.tmp" not in names(folder) and "checkpoint-15" in names(folder)


def test_old_checkpoints_go_by_number(tmp_path: Path) -> None:
    for update in (5, 10, 95, 100):
        save(tmp_path, update, keep=3)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100", "checkpoint-95"]
    assert save(tmp_path, 105, keep=1) == tmp_path / "checkpoint-105"
    assert names(tmp_path) == ["checkpoint-105"]


def test_a_run_that_went_back_forgets_what_came_after(tmp_path: Path) -> None:
    """Resumed from update 5 of 15: what it saves is neither pruned at once nor overshadowed by the old run's later state."""
    for update in (5, 10, 15):
        save(tmp_path, update, keep=3)
    assert save(tmp_path, 7, keep=3).is_dir()
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-7"]
    # What a kill left of one that was being deleted goes with them.
    (tmp_path / "checkpoint-5").rename(tmp_path / ".checkpoint-5.old.tmp")
    checkpoint.drop_later(tmp_path, 7)
    assert names(tmp_path) == ["checkpoint-7"]
    assert checkpoint.find(str(tmp_path), tmp_path).name == "checkpoint-7"


def test_latest_is_the_newest_of_all_runs(tmp_path: Path) -> None:
    for name, update, age in (("a", 50, 300), ("b", 5, 100), ("c", 90, 200)):
        file = save(tmp_path / name, update) / "state.json"
        os.utime(file, (time.time() - age,) * 2)
    assert checkpoint.find("latest", tmp_path) == tmp_path / "b" / "checkpoint-5"
    assert checkpoint.find(str(tmp_path / "c"), tmp_path) == tmp_path / "c" / "checkpoint-90"
    with pytest.raises(ConfigError, match="no checkpoint under"):
        checkpoint.find("latest", tmp_path / "nowhere")


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 5)
    (folder / name).write_bytes((folder / name).read_bytes()[:20])
    with pytest.raises(ConfigError, match=name) as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)


def test_folders_that_cannot_be_synced_and_what_others_may_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems sync no folders. safetensors lets only the owner read its files."""
    sync = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    lora = {"a": torch.ones(2)}
    saved = checkpoint.save(tmp_path, 1, lora, lora, {"step": 1}, {}, 2)
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1

    def full(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.save(tmp_path, 2, lora, lora, {"step": 1}, {}, 2)


def test_reporter_drops_what_will_be_written_again(tmp_path: Path) -> None:
    line = {"reward/red": 0.0, "lgmd": 0.0, "ratio_mean": 1.0}
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"update": n, **line}) + "\n" for n in range(1, 5)) + '{"update": 5, "rew')
    assert [entry["update"] for entry in read_metrics(path)] == [1, 2, 3, 4]
    unasked = lambda: pytest.fail("nothing to draw was asked for")  # noqa: E731
    reporter = Reporter(tmp_path, 10, 3, ["red"], unasked, unasked, Accelerator(cpu=True))
    reporter.update({"update": 4, **line})
    reporter.close()
    assert [entry["update"] for entry in metrics(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe\x00 not UTF-8\n",
        b"[1, 2]\n",
        b"null\n",
        b'{"reward/red": 1.0}\n',
        b"NaN\n",
        b'{"update": NaN}\n',
        b'{"update": "3"}\n',
        b"[" * 100_000 + b"\n",
    ],
    ids=["bytes", "list", "null", "no update", "NaN", "NaN update", "text", "deep"],
)
def test_a_damaged_line_of_metrics_is_left_out(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"update": 1}\n' + line + b'{"update": 2}\n')
    assert read_metrics(path) == [{"update": 1}, {"update": 2}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_an_error_once(tmp_path: Path) -> None:
    """The line that could not be written is still in memory when the file is closed, which must not raise again."""
    unasked = lambda: pytest.fail("nothing to draw was asked for")  # noqa: E731
    reporter = Reporter(tmp_path, 10, 0, ["red"], unasked, unasked, Accelerator(cpu=True))
    reporter.file.close()
    reporter.file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        reporter.update({"update": 1})
    reporter.close()


# -- damaged and crafted checkpoints -------------------------------------------------------------------------------


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink], ids=["flip", "cut", "delete"])
@pytest.mark.parametrize("name", checkpoint.FILES)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, harm: Callable[[Path], None]
) -> None:
    older, newest = save(tmp_path / "run", 5), save(tmp_path / "run", 10)
    harm(newest / name)
    for resume in ("latest", str(tmp_path / "run")):
        assert checkpoint.find(resume, tmp_path) == older
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"tmpo_trainer: checkpoint-10 of {tmp_path / 'run'} is damaged ({name} ")
        assert line.endswith("continuing from checkpoint-5")
    with pytest.raises(
        ConfigError, match=f"checkpoint-10 is damaged .{name}.*--resume .*run takes the run's last whole"
    ):
        checkpoint.find(str(newest), tmp_path)
    flip(older / "optimizer.pt")
    with pytest.raises(
        ConfigError, match=r"optimizer.pt differs from its checksum.*no whole checkpoint, start a new run"
    ):
        checkpoint.find(str(tmp_path / "run"), tmp_path)


def test_checksums_survive_a_copy_and_damage_of_their_own_is_seen(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", 5)
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "checkpoint-5"))
    sums = moved / checkpoint.SUMS
    sums.write_bytes(sums.read_bytes().replace(b"\n", b"\r\n"))
    assert checkpoint.damage(moved) is None
    sums.write_bytes(b"")
    assert checkpoint.damage(moved) == "SHA256SUMS is damaged"


def test_a_checkpoint_without_checksums_is_read_instead(tmp_path: Path) -> None:
    """Earlier versions wrote none, and could save a LoRA that had become infinite."""
    older, newest = save(tmp_path, 5), save(tmp_path, 10)
    for path in (older, newest):
        (path / checkpoint.SUMS).unlink()
    assert checkpoint.find(str(tmp_path), tmp_path) == newest
    checkpoint.save_file({"a": torch.tensor([1.0, torch.inf, 0.0])}, newest / "lora.safetensors")
    assert "a is not finite" in (checkpoint.damage(newest) or "")
    assert checkpoint.find(str(tmp_path), tmp_path) == older


def test_a_crafted_optimizer_file_is_refused(tmp_path: Path) -> None:
    """Neither code nor compressed zeros nor other shapes than the LoRA's."""
    import zipfile

    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    folder = save(tmp_path, 5)
    file, good = folder / "optimizer.pt", (folder / "optimizer.pt").read_bytes()
    torch.save({"state": {}, "code": Code()}, file)
    with pytest.raises(ConfigError, match=r"optimizer.pt cannot be read"):
        checkpoint.load(folder)
    assert not (tmp_path / "ran").exists()
    file.write_bytes(good)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr("optimizer/data/9", bytes(10_000))
    with pytest.raises(ConfigError, match="compressed parts"):
        checkpoint.load(folder)
    torch.save({"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(1).expand(1 << 40)}}}, file)
    with pytest.raises(ConfigError, match="not of this LoRA's optimiser"):
        checkpoint.load(folder).moments(folder, {"a": torch.zeros(3)})


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)

    def full(*arguments: Any) -> None:
        raise RuntimeError("unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"optimizer.pt cannot be written, is the disk full"):
        save(tmp_path, 10)
    assert names(tmp_path) == ["checkpoint-5"]


# -- one process in a run's folder ---------------------------------------------------------------------------------


def test_a_second_process_is_refused(whole: Path, flags: list[str], copied: Path, capsys: pytest.CaptureFixture[str],
                                     tmp_path: Path) -> None:  # fmt: skip
    for folder, arguments in ((copied, ["--resume", str(copied)]), (tmp_path / "new", [*flags])):
        folder.mkdir(exist_ok=True)
        with locked(folder / LOCK, folder):
            assert main.main([*arguments, "--output-dir", str(folder)]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tmpo_trainer")]
        assert lines == [
            f"tmpo_trainer: another process is training in {folder}: wait for it, stop it, or give another --output-dir"
        ]


def test_a_file_system_without_locks_is_used_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def take(file: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_take", take)
    with locked(tmp_path / LOCK, tmp_path):
        assert f"{tmp_path} is on a file system without locks" in capsys.readouterr().err


def test_a_lock_that_fails_otherwise_is_not_called_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(file: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(lock, "_take", take)
    with (
        pytest.raises(ConfigError, match="cannot be locked: Input/output error") as caught,
        locked(tmp_path / LOCK, tmp_path),
    ):
        pass
    assert not isinstance(caught.value, lock.Locked)


def test_an_abandoned_checkpoint_that_stays_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be found by the next `--resume`."""
    save(tmp_path / "run", 5)
    later = save(tmp_path / "run", 10)
    (tmp_path / "run" / ".checkpoint-10.old.tmp" / "left").mkdir(parents=True)
    checkpoint.drop_later(tmp_path / "run", 5)
    assert not later.exists() and [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-5"]
    later = save(tmp_path / "run", 10)
    monkeypatch.setattr(checkpoint, "_remove", lambda path: None)
    with pytest.raises(ConfigError, match="checkpoint-10 is of an abandoned course and cannot be deleted"):
        checkpoint.drop_later(tmp_path / "run", 5)
    assert later.exists()


# -- a run that diverges -------------------------------------------------------------------------------------------


def test_a_diverged_run_advises_an_earlier_checkpoint(
    flags: list[str],
    copied: Path,
    scorer: Scorer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The settings refuse such a rate. Less would take more updates to diverge.
    monkeypatch.setattr(Trainer, "learning_rate", lambda self, update: 1e30)
    assert main.main(["--resume", str(copied / "checkpoint-15"), "--checkpoints-kept", "1"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("tmpo_trainer: failed after update 16: non-finite ")
    assert last.endswith(
        "(kept checkpoint-16; the same settings fail again, continue with --resume "
        f"{copied / 'checkpoint-15'} and a lower --learning-rate)"
    )
    with monkeypatch.context() as usual:
        usual.setattr(Trainer, "learning_rate", lambda self, update: 1e-2)
        assert main.main(["--resume", str(copied / "checkpoint-15")]) == 0
    capsys.readouterr()
    assert main.main([*flags, "--output-dir", str(tmp_path / "new")]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.endswith(
        "(kept checkpoint-1; the same settings fail again, start a new run with a lower --learning-rate)"
    )


def test_a_lora_that_is_not_finite_is_not_saved(
    copied: Path, scorer: Scorer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # AdamW decays by the product of rate and weight decay, which overflows.
    monkeypatch.setattr(Trainer, "learning_rate", lambda self, update: 1e38)
    assert main.main(["--resume", str(copied / "checkpoint-15"), "--weight-decay", "10"]) == 1
    assert "failed after update 15: the LoRA is not finite after update 16" in capsys.readouterr().err
    assert names(copied) == ["checkpoint-15"]


def test_a_file_that_cannot_be_read_just_now_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that is passed over is deleted later, so a passing fault of a disk must not look like damage."""
    save(tmp_path / "run", 5)
    newest = save(tmp_path / "run", 10)

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sha256", fail)
        with pytest.raises(ConfigError, match="--resume latest: Input/output error"):
            checkpoint.find("latest", tmp_path)
    assert checkpoint.find("latest", tmp_path) == newest


def test_a_checkpoint_that_was_saved_meanwhile_is_not_deleted(
    copied: Path, scorer: Scorer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that held the folder saved it after `--resume` had chosen an older one."""
    taken = train.claim

    def claim(*arguments: Any) -> None:
        shutil.copytree(checkpoint.checkpoints(copied)[-1], copied / "checkpoint-99")
        taken(*arguments)

    monkeypatch.setattr(train, "claim", claim)
    assert main.main(["--resume", str(copied)]) == 2
    assert "has got another checkpoint meanwhile: give the command again" in capsys.readouterr().err
    assert (copied / "checkpoint-99").is_dir()
