"""Two CPU processes, plain data parallel and FSDP2, against one process with both prompts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tmpo_trainer import processes
from tmpo_trainer.commands import launch, loading, main, train
from tmpo_trainer.settings.config import TrainConfig
from tmpo_trainer.settings.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("distributed_worker.py")
KINDS = ("ddp", "fsdp")


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def one(worker: ModuleType, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return worker.run(str(tiny_model), tmp_path_factory.mktemp("one"), None, 2, "-", 3)


@pytest.fixture(scope="module")
def two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """`two(kind, resume="-")`: three updates on two processes, the folder of their run beside the figures."""
    done: dict[tuple[str, str, str], dict[str, Any]] = {}

    def two(kind: str, resume: str = "-", method: str = "tmpo") -> dict[str, Any]:
        if (kind, resume, method) not in done:
            folder = tmp_path_factory.mktemp(kind)
            file = folder / "result.pt"
            process = torchrun(str(WORKER), str(tiny_model), str(folder), kind, str(file), resume, "3", method)
            assert process.returncode == 0, process.stderr[-3000:]
            done[kind, resume, method] = torch.load(file, weights_only=True) | {"folder": folder}
        return done[kind, resume, method]

    return two


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_process(one: dict[str, Any], two: Callable[..., dict[str, Any]], kind: str) -> None:
    expected, got = one["gradients"], two(kind)["gradients"]
    assert expected.keys() == got.keys()
    largest = max(value.abs().max().item() for value in expected.values())
    assert largest > 0
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-5 * largest, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_all_prompts(one: dict[str, Any], two: Callable[..., dict[str, Any]], kind: str) -> None:
    for expected, got in zip(one["figures"], two(kind)["figures"], strict=True):
        assert expected.keys() == got.keys()
        assert got["branch_steps"] == expected["branch_steps"] and got["learning_rate"] == expected["learning_rate"]
        for name in ("reward/red", "lgmd", "latent_std", "evaluations/rollout", "grad_norm", "kl_reference"):
            assert got[name] == pytest.approx(expected[name], rel=5e-3, abs=2e-5), name
        assert got["replay_ratio_error"] < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_resume_continues_as_if_nothing_had_happened(two: Callable[..., dict[str, Any]], kind: str) -> None:
    straight = two(kind)
    resumed = two(kind, str(straight["folder"] / "checkpoint-2"))
    assert resumed["figures"] == straight["figures"][2:]
    for name, value in straight["lora"].items():
        assert torch.equal(resumed["lora"][name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_gardo_ranks_over_all_processes(
    worker: ModuleType, tiny_model: Path, tmp_path: Path, two: Callable[..., dict[str, Any]], kind: str
) -> None:
    """Its gate, its penalty and its copy are those of one process with all prompts, and are resumed."""
    one = worker.run(str(tiny_model), tmp_path, None, 2, "-", 3, "gardo")
    straight = two(kind, method="gardo")
    # In the second update it is over the limit, and the copy is renewed.
    assert [line["kl_reference"] > 0 for line in one["figures"]] == [False, True, False]
    for expected, got in zip(one["figures"], straight["figures"], strict=True):
        assert got["gated"] == expected["gated"] > 0
        for name in ("kl_reference", "grad_norm", "reward/red", "reward/blue"):
            assert got[name] == pytest.approx(expected[name], rel=5e-3, abs=2e-5), name
    states = [
        json.loads((f / "checkpoint-2/state.json").read_text())["method_state"] for f in (tmp_path, straight["folder"])
    ]
    assert states[0]["age"] == states[1]["age"] == 2 and states[0]["share"] == states[1]["share"]
    assert states[1]["memory"] == pytest.approx(states[0]["memory"], rel=1e-4)
    assert load_file(straight["folder"] / "checkpoint-2/method.safetensors").keys() == one["lora"].keys()
    resumed = two(kind, str(straight["folder"] / "checkpoint-2"), "gardo")
    assert resumed["figures"] == straight["figures"][2:]


def test_methods_on_noised_leaves_have_one_gradient(
    worker: ModuleType, tiny_model: Path, tmp_path: Path, two: Callable[..., dict[str, Any]]
) -> None:
    """Noise is that of the prompt's place among all; the copy that nft keeps is sharded, and whole in a checkpoint."""
    one = worker.run(str(tiny_model), tmp_path, None, 2, "-", 3, "nft")
    straight = two("fsdp", method="nft")
    for expected, got in zip(one["figures"], straight["figures"], strict=True):
        for name in ("loss", "kl_reference", "grad_norm", "reward/red", "optimality_std"):
            assert got[name] == pytest.approx(expected[name], rel=5e-3, abs=2e-5), name
    largest = max(value.abs().max().item() for value in one["gradients"].values())
    for name, value in one["gradients"].items():
        torch.testing.assert_close(straight["gradients"][name], value, atol=1e-5 * largest, rtol=1e-5)
    copies = [load_file(folder / "checkpoint-2/method.safetensors") for folder in (tmp_path, straight["folder"])]
    assert [{n: v.shape for n, v in copy.items()} for copy in copies] == [
        {n: v.shape for n, v in one["lora"].items()}
    ] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_and_export_are_whole(one: dict[str, Any], two: Callable[..., dict[str, Any]], kind: str) -> None:
    """The same files as from one process: nothing in them tells that there were shards."""
    folder = two(kind)["folder"]
    saved = load_file(folder / "checkpoint-2" / "lora.safetensors")
    assert {name: value.shape for name, value in saved.items()} == {n: v.shape for n, v in one["lora"].items()}
    exported = load_file(folder / "pytorch_lora_weights.safetensors")
    assert len(exported) == len(saved) and all(value.isfinite().all() for value in exported.values())
    assert json.loads((folder / "checkpoint-2" / "state.json").read_text())["processes"] == 2


FLAGS = """-m tmpo_trainer --prompts good.txt --eval-prompts good.txt --updates 2 --sample-every 1 --eval-images 2
    --eval-steps 3 --rollout-steps 6 --branch-early 1 2 3 --branch-late 1 3 4 --resolution 32 32 --output-dir out
    --lora-rank 4 --eval-every 1 --learning-rate 1e-2 --ema-every 1 --prompts-per-update 1 --prompts-per-batch 1"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_text("a red circle\ntwo blue squares\na green triangle\n")
    return tmp_path


def test_a_run_of_the_command_line(place: Path, tiny_model: Path) -> None:
    """One process writes and prints; both draw and measure."""
    done = torchrun(*FLAGS.split(), "--model", str(tiny_model))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("training in out") == 1 and done.stderr.count("report: out/report.md") == 1
    lines = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2]
    report = json.loads((place / "out" / "report.json").read_text())
    assert report["prompts"] == 3 and report["trained"]["shapes strict"] >= 0
    assert (place / "out" / "samples.png").is_file() and (place / "out" / "samples" / "update-000001.png").is_file()


def test_an_error_on_one_process_ends_all_with_its_message(place: Path, tiny_model: Path) -> None:
    script = place / "failing.py"
    script.write_text(
        "import os, sys\n"
        "from tmpo_trainer.commands.main import main\n"
        "from tmpo_trainer.rewards.shapes import ShapesScorer\n"
        "if os.environ['RANK'] == '1':\n"
        "    def fail(self, images, prompts, metadata=None):\n"
        "        raise ValueError('the scorer of process 1 broke')\n"
        "    ShapesScorer.score = fail\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    flags = FLAGS.replace("-m tmpo_trainer", "").split()
    done = torchrun(str(script), *flags, "--model", str(tiny_model), "--no-report", "--eval-every", "0")
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("tmpo_trainer: failed after update 0")]
    assert told and all("the scorer of process 1 broke" in line for line in told), done.stderr[-3000:]
    assert any("process 1: ValueError" in line for line in told)


BROKEN = {
    "evaluation": (1, "from tmpo_trainer.evaluation import held_out as place; name = '_measure'"),
    "writing": (0, "from tmpo_trainer.training.progress import Reporter as place; name = '_append'"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_an_error_in_an_evaluation_saves_the_run(place: Path, tiny_model: Path, what: str) -> None:
    """Of the process that measures, or of the one that writes: all end together, with the update that was done."""
    rank, broken = BROKEN[what]
    script = place / "failing.py"
    script.write_text(
        "import os, sys\n"
        "from tmpo_trainer.commands.main import main\n"
        f"{broken}\n"
        "def fail(*given):\n"
        "    raise OSError('the disk is full')\n"
        f"if os.environ['RANK'] == '{rank}':\n"
        "    setattr(place, name, fail)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    flags = FLAGS.replace("-m tmpo_trainer", "").split()
    done = torchrun(str(script), *flags, "--model", str(tiny_model), "--checkpoint-every", "0")
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("tmpo_trainer: failed after update 1")]
    assert told and all("the disk is full" in line and "kept checkpoint-1" in line for line in told), done.stderr[
        -3000:
    ]
    assert (place / "out" / "checkpoint-1" / "state.json").is_file()


def test_a_signal_to_one_process_stops_all_after_the_same_update(place: Path, tiny_model: Path) -> None:
    script = place / "stopping.py"
    script.write_text(
        "import os, signal, sys\n"
        "from tmpo_trainer.commands.main import main\n"
        "from tmpo_trainer.training.loop import Trainer\n"
        "original = Trainer.update\n"
        "def update(self):\n"
        "    if os.environ['RANK'] == '1' and self.done == 1:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return original(self)\n"
        "Trainer.update = update\n"
        "code = main(sys.argv[1:])\n"
        "print(f'process {os.environ[\"RANK\"]} ends with {code}', file=sys.stderr)\n"
    )
    flags = FLAGS.replace("-m tmpo_trainer", "").replace("--updates 2", "--updates 5").split()
    done = torchrun(str(script), *flags, "--model", str(tiny_model), "--no-report", "--eval-every", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "process 0 ends with 130" in done.stderr and "process 1 ends with 130" in done.stderr
    assert done.stderr.count("stopped by SIGTERM after update 2; saved") == 1
    assert (place / "out" / "checkpoint-2" / "state.json").is_file()
    assert len((place / "out" / "metrics.jsonl").read_text().splitlines()) == 2


def test_bad_settings_are_told_once(place: Path, tiny_model: Path) -> None:
    done = torchrun(*FLAGS.split(), "--model", str(tiny_model), "--updatez", "3")
    assert done.returncode != 0
    assert done.stderr.count("unknown flag --updatez") == 1


def test_the_shipped_configs_are_accelerates(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate reads them without complaint, and they say what their names say."""
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {name: load_config_from_file(str(path)) for name, path in launch.launch_configs().items()}
    assert {name: str(kind.distributed_type).split(".")[-1] for name, kind in kinds.items()} == {
        "ddp": "MULTI_GPU", "fsdp2": "FSDP"
    }  # fmt: skip
    assert kinds["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert all(kind.mixed_precision == "no" for kind in kinds.values())


def test_launch_calls_accelerate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[list[str]] = []
    # Set first, so that what the command sets is undone as well.
    monkeypatch.setenv(launch.SHUTDOWN, "")
    monkeypatch.delenv(launch.SHUTDOWN)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(launch, "_cores", lambda: 30)
    # In place of this process, whose signals it then gets.
    monkeypatch.setattr(launch.os, "execv", lambda program, command: calls.append(command) or 0)
    assert main.main(["launch", "fsdp2", "--num-processes", "4", "--seed", "3"]) == 0
    (command,) = calls
    assert os.environ[launch.SHUTDOWN] == "3600"
    config = str(launch.launch_configs()["fsdp2"])
    port = command[command.index("--main_process_port") + 1]
    assert 1024 <= int(port) < 65536 and os.environ["OMP_NUM_THREADS"] == "7"
    assert command[1:] == ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "4",
                           "--main_process_port", port, "-m", "tmpo_trainer", "--seed", "3"]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert main.main(["launch", "ddp", "--updates", "5"]) == 0 and "8" in calls[1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    capsys.readouterr()
    for arguments, blame in (
        (["launch", "ddp"], "needs two GPUs or more, but torch sees 1"),
        (["launch", "ddp", "--num-processes", "0"], "--num-processes 0: give 1 or more"),
        (["launch", "ddp", "--num-processes", "2"], "--num-processes 2: torch sees 1 GPUs, give 1 to 1"),
        (["launch", "dpp"], "invalid choice: 'dpp'"),
        (["launch", "ddp", "--updatez", "3"], "unknown flag --updatez, did you mean --updates?"),
    ):
        assert main.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert blame in line
    assert len(calls) == 2


def test_a_process_that_cannot_load_tells_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have loaded; all end with its line, and the first prints it."""
    told = ["process 1: reward ocr needs rapidocr"]
    monkeypatch.setattr(processes, "gather_object", lambda own: [*own, *told])
    accelerator: Any = SimpleNamespace(num_processes=2, process_index=0)
    with pytest.raises(ConfigError, match="process 1: reward ocr needs rapidocr"):
        processes.together(accelerator, lambda: ([], None, "backbone"))  # type: ignore[arg-type,return-value]
    told.clear()
    told.append(None)  # type: ignore[arg-type]
    assert processes.together(accelerator, lambda: ([], None, "backbone"))[2] == "backbone"  # type: ignore[arg-type,return-value]

    def fail() -> Any:
        raise ConfigError("no weights")

    with pytest.raises(ConfigError, match="process 0: no weights"):
        processes.together(accelerator, fail)

    def closed(own: Any) -> Any:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(processes, "gather_object", closed)
    with pytest.raises(ConfigError, match=r"another process died while the run was loaded .Connection closed by peer"):
        processes.together(accelerator, lambda: None)


def test_nf4_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' four-bit weights are no tensors that FSDP2 could share out."""
    monkeypatch.setattr(loading, "check", lambda config, device: (None, None, None))
    monkeypatch.setattr(train, "Accelerator", lambda **more: SimpleNamespace(
        num_processes=1, is_main_process=True, is_fsdp2=True, device="cpu"
    ))  # fmt: skip
    with pytest.raises(ConfigError, match="--quantize nf4 cannot be sharded: use `launch ddp`"):
        train.train(TrainConfig(quantize="nf4"), "demo", None)
