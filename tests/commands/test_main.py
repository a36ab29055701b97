"""The command line: what it accepts, one line for whatever is wrong, what a run leaves behind."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import errors

from tmpo_trainer import __version__
from tmpo_trainer.backbones import hub_files
from tmpo_trainer.commands import loading, main
from tmpo_trainer.commands.flags import make_parser
from tmpo_trainer.commands.lasting import Lasting
from tmpo_trainer.evaluation import appearance
from tmpo_trainer.rewards import Parked
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.settings.presets import all_settings, preset_names
from tmpo_trainer.training.run_folder import check_free

REPOSITORY = Path(__file__).parents[2]

#: Scripts and notebooks rely on these: removing or renaming one is a breaking change and belongs into the CHANGELOG.
FLAGS = {
    "--adam-betas", "--anchor", "--anchor-weight", "--attention", "--baseline", "--beta-end", "--beta-start", "--beta-warmup",
    "--branch-early", "--branch-late", "--branching", "--checkpoint-every", "--checkpoints-kept", "--clip",
    "--config", "--data-folder", "--decode-batch", "--device", "--dry-run", "--dtype", "--ema-decay", "--ema-every", "--eta",
    "--eval-every", "--eval-images", "--eval-limit", "--eval-prompts", "--eval-solver", "--eval-steps", "--solver",
    "--neutral", "--neutral-share", "--diversity-weight", "--diversity",
    "--leaf-steps", "--reuse-forward", "--no-reuse-forward", "--gradient-checkpointing",
    "--compile", "--guidance", "--help", "--init-lora",
    "--inner-updates", "--kappa", "--kernel", "--kl-weight", "--learning-rate", "--logp-reduce", "--lora-alpha",
    "--lora-rank", "--lora-targets", "--lr-min-ratio", "--max-batch", "--max-grad-norm", "--max-sequence-length",
    "--method", "--model", "--no-compile", "--no-gradient-checkpointing", "--no-offload-scorers", "--no-split-guidance",
    "--offload-scorers",
    "--no-report", "--output-dir", "--preset", "--print-config", "--prompts",
    "--prompts-per-batch", "--prompts-per-update", "--quantize", "--replay-batch", "--report", "--resolution", "--resume",
    "--reward", "--reward-models", "--reward-norm", "--reward-weights", "--rollout-steps", "--sample-every", "--seed",
    "--split-guidance",
    "--remote-hosts", "--remote-timeout", "--features", "--text-cache", "--threads", "--tracker", "--transformer",
    "--updates", "--version", "--weight-decay", "--auxiliary", "--pickscore-scale", "--window", "--window-every",
    "--schedule", "--tree", "--no-tree", "--balance", "--draws", "--noise-shift", "--noise-weight",
    "--level-importance", "--leaf-importance", "--negative-limit", "--reference-share", "--rollout", "--strength",
    "--reward-range", "--adaptive-weight", "--no-adaptive-weight", "--old-decay-rise", "--old-decay-max", "--tilt-weight",
    "--data-weight", "--data-images",
}  # fmt: skip


class MeanColours:
    """Stands in for the feature extractor of the report."""

    name = "means"

    def __init__(self, device: torch.device):
        pass

    def __call__(self, images: Any) -> torch.Tensor:
        return torch.from_numpy(images.astype("float32").mean((1, 2)))


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


BAD: list[tuple[str, list[str]]] = [
    ("--updatez 3", ["unknown flag --updatez", "did you mean --updates?"]),
    ("--update 3", ["unknown flag --update", "did you mean --updates?"]),
    ("strayword", ["unknown argument strayword"]),
    ("--updates", ["--updates", "expected one argument"]),
    ("--config unknown.yaml", ["unknown.yaml", "learning_rat", "did you mean learning_rate?"]),
    ("--config broken.yaml", ["broken.yaml is not YAML"]),
    ("--config list.yaml", ["list.yaml is not a mapping"]),
    ("--config value.yaml", ["value.yaml", "updates 'many'"]),
    ("--config none.yaml", ["cannot read none.yaml"]),
    ("--config latin.txt", ["latin.txt is not YAML: byte 0xfc in line 1 is not UTF-8: save it as UTF-8"]),
    ("--preset demi", ["unknown preset demi", "did you mean demo?", "pickscore"]),
    ("--learning-rate fast", ["flags: learning_rate 'fast'"]),
    ("--updates 1.5", ["updates '1.5'"]),
    ("--updates 0", ["updates '0'", "greater than or equal to 1"]),
    ("--seed -1", ["seed '-1'"]),
    ("--kernel euler", ["kernel 'euler'", "cps"]),
    ("--method grpo", ["method 'grpo'", "tmpo"]),
    ("--resolution 32", ["resolution"]),
    ("--resolution 40 32", ["resolution 40x32 must be a multiple of 16"]),
    ("--eta 1.2", ["eta 1.2 is too large for kernel cps"]),
    ("--reward-weights 1 2", ["reward_weights has 2 values for 1 rewards"]),
    ("--branch-late 1 4 4", ["branch_late [1, 4, 4] must be strictly increasing"]),
    ("--branch-early 3 2 1", ["branch_early [3, 2, 1] must be strictly increasing"]),
    ("--branch-late 1 4", ["branch_early and branch_late differ in number"]),
    ("--branch-late 1 3 6", ["branch_late [1, 3, 6] must stay below rollout_steps 6"]),
    ("--rollout-steps 10 --branch-late 1 4 9", ["branch_late [1, 4, 9]", "step 9 of 10 ends at sigma", "(std 0.0"]),
    ("--prompts none.txt", ["prompt file none.txt does not exist"]),
    ("--prompts empty.txt", ["prompt file empty.txt is empty"]),
    ("--prompts latin.txt", ["prompt file latin.txt cannot be read as UTF-8"]),
    ("--prompts good.yaml", ["prompt file good.yaml: .yaml is not read, give a .txt"]),
    ("--prompts ~no-one/x.txt", ["flags: prompts '~no-one/x.txt': the home folder ~no-one is not known", "./~no-one"]),
    ("--config ~no-one/x.yaml", ["argument --config: ~no-one/x.yaml: the home folder ~no-one is not known"]),
    ("--resume ~no-one/x", ["the home folder ~no-one is not known"]),
    ("--resume run --output-dir none", ["--resume run: not a checkpoint"]),
    ("--prompts foreign.txt", ["foreign.txt", "'a photo of a cat'", "two red circles"]),
    ("--eval-prompts foreign.txt", ["foreign.txt", "'a photo of a cat'"]),
    ("--resume no-pipeline", ["--resume no-pipeline", "not a checkpoint"]),
    ("--resume nowhere", ["--resume nowhere", "not a checkpoint"]),
    ("--resume latest", ["--resume latest", "no checkpoint under out"]),
    ("--model nowhere", ["model nowhere is not a folder"]),
    ("--model no-pipeline", ["model no-pipeline is a folder without model_index.json"]),
    ("--model unnamed", ["unnamed/model_index.json has no _class_name"]),
    ("--model sana", ["model sana is a SanaPipeline"]),
    ("--model without-vae", ["model without-vae has no folder vae/"]),
    ("--model cut", ["model cut: cut/transformer/diffusion_pytorch_model.safetensors is damaged or cut short"]),
    ("--max-sequence-length 0 --resolution 0 32", ["resolution 0x32 must lie in 16..128"]),
    ("--resolution 32 144", ["resolution 32x144 must lie in 16..128"]),
    ("--learning-rate inf", ["learning_rate 'inf'", "finite"]),
    ("--reward-weights nan", ["reward_weights", "finite"]),
    ("--reward shapes shapes", ["reward shapes shapes names one twice"]),
    ("--branch-early 1 --branch-late 1", ["branch_early [1] leaves nothing to train"]),
    ("--prompts-per-update 8 --prompts-per-batch 8 --max-batch 7", ["max_batch 7 cannot hold", "8 prompts"]),
    ("--prompts-per-update 8 --prompts-per-batch 8 --replay-batch 7", ["replay_batch 7 cannot hold", "8 prompts"]),
    ("--tracker wandb", ["tracker wandb is not installed: pip install wandb"]),
    ("--quantize nf4", ["--quantize nf4 needs a CUDA GPU"]),
    ("--attention sage", ["attention sage has no gradient"]),
    ("--attention flash", ["--attention flash is not for SD3 models"]),
    ("--transformer none.safetensors", ["--transformer none.safetensors is missing"]),
    ("--transformer good.txt", ["--transformer good.txt is damaged"]),
    ("--init-lora good.txt", ["good.txt cannot be read as safetensors"]),
    ("--reward beauty", ["unknown reward beauty"]),
    ("--reward picscore", ["unknown reward picscore", "did you mean pickscore?"]),
    ("--reward-models pickscore=x", ["pickscore is none of the rewards shapes"]),
    ("--reward-models shapes", ["reward_models shapes: write NAME=PATH"]),
    ("--reward-models shapes=x", ["shapes has no weights"]),
    ("--reward-models shapes=nowhere --dry-run", ["--reward-models shapes=nowhere: shapes has no weights"]),
    ("--reward sharpness --reward-models sharpness=nowhere --dry-run", ["sharpness has no weights, leave it out"]),
    ("--reward shapes-partial --reward-models shapes-partial=x --dry-run", ["shapes-partial has no weights"]),
    ("--reward beautiful-remote", ["unknown reward beautiful-remote"]),
    ("--reward pickscore --reward-models pickscore=nowhere", ["pickscore=nowhere: nowhere does not exist"]),
    ("--reward ocr", ["good.txt: prompt 'a red circle' has no text to render", "between quotation marks"]),
    ("--reward ocr --reward-models ocr=x --prompts signs.jsonl --eval-prompts signs.jsonl", ["ocr=x: x does not exist"]),
    ("--reward remote", ["reward remote needs its address: --reward-models remote=http"]),
    ("--reward shapes remote --reward-models remote=ftp://x --dry-run", ["give a URL such as"]),
    ("--reward shapes remote --reward-models remote=http://example.org --dry-run", ["--remote-hosts example.org"]),
    ("--reward shapes remote --dry-run", ["reward remote needs its address"]),
    ("--prompts bare.jsonl", ["bare.jsonl, line 2: write an object with a \"prompt\""]),
    ("--prompts text.jsonl", ["text.jsonl, line 1: not JSON"]),
    ("--prompts twice.jsonl", ["twice.jsonl, line 3: 'a red circle' already has other metadata"]),
    ("--features no-folder --report", ["features no-folder: no such folder"]),
    ("--device tpu9", ["device tpu9", "use auto, cpu, cuda"]),
    ("--device meta", ["device meta", "use auto, cpu, cuda"]),
    ("--device cuda:99", ["device cuda:99", "CUDA devices"]),
    ("--output-dir good.txt/run", ["output folder good.txt/run cannot be made", "good.txt is a file"]),
    ("--output-dir good.txt --dry-run", ["output folder good.txt is a file"]),
    ("--output-dir run --dry-run", ["run already holds a run", "give another --output-dir"]),
    (f"--output-dir {300 * 'x'}", ["flags: output_dir 'xxx", "no name of more than 255 bytes"]),
    (f"--resume {300 * 'x'}", ["argument --resume: xxx", "no name of more than 255 bytes"]),
    ("--output-dir lora", ["lora already holds a LoRA: give another --output-dir"]),
    ("--output-dir run", ["run already holds a run", "give another --output-dir"]),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "blame"), BAD, ids=[flags for flags, _ in BAD])
def test_bad_input_is_one_line_and_exit_2(
    place: Path, base: list[str], capsys: pytest.CaptureFixture[str], flags: str, blame: list[str]
) -> None:
    before = files(place)
    assert main.main([*base, *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("tmpo_trainer: ")
    for part in blame:
        assert part in line
    assert files(place) == before


def test_a_folder_that_may_not_be_entered_is_one_line(
    place: Path, base: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`Path.exists` and the like raise there. (The tests may run as root, who may enter any.)"""
    exists = Path.exists

    def entered(path: Path, **more: Any) -> bool:
        if "secret" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path, **more)

    monkeypatch.setattr(Path, "exists", entered)
    assert main.main([*base, "--output-dir", "secret/run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tmpo_trainer: secret/run") and line.endswith(": Permission denied")


def test_a_terminal_that_has_gone_ends_nothing() -> None:
    """Such as that of a closed connection, or the `tee` behind a pipe."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", buffering=1) as stream:
        os.close(reader)
        lasting = Lasting(stream)
        for _ in range(3):
            print("progress", file=lasting)
        lasting.flush()
        assert lasting.fileno() == writer and lasting.encoding == stream.encoding
        # So that closing it, which writes what is kept, has a reader.
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)


@pytest.mark.skipif(os.name == "nt", reason="a shell closes it")
def test_a_process_without_a_stderr_runs(place: Path) -> None:
    command = f'exec "{sys.executable}" -m tmpo_trainer --preset demo --print-config 2>&-'
    done = subprocess.run(
        ["sh", "-c", command], env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == 0 and "method: nft" in done.stdout


def test_a_drive_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(ConfigError, match=r"output folder .*run cannot be made: .* does not exist"):
        check_free(Path("run"))


def test_the_same_flags_without_the_mistake_run(
    place: Path, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(base) == 0
    assert (place / "out" / "pytorch_lora_weights.safetensors").is_file()
    assert "LoRA: out/pytorch_lora_weights.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("reward", ["pickscore", "geneval", "ocr"])
def test_flux_without_a_gpu_names_the_demo(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reward: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main.main(["--reward", reward]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "FLUX.1-dev needs a CUDA GPU" in line and "python -m tmpo_trainer --preset demo" in line


def response(status: int) -> Any:
    # The hub's package changed its HTTP client with version 2.
    try:
        import httpx2 as httpx
    except ModuleNotFoundError:
        import httpx  # type: ignore[no-redef]

    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("failure", "blame"),
    [
        (lambda: errors.GatedRepoError("403", response=response(403)), "is gated: accept its licence at https://"),
        (lambda: errors.RepositoryNotFoundError("404", response=response(404)), "nor a repository on the hub"),
        (lambda: errors.LocalEntryNotFoundError("Got: ConnectError\nmore"), "cannot be downloaded (Got: ConnectError)"),
        (lambda: errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set"), "hf download some/model --local-dir DIR"),
    ],
    ids=["gated", "missing", "unreachable", "offline"],
)
def test_a_hub_model_that_cannot_be_had(
    place: Path,
    base: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: Any,
    blame: str,
) -> None:
    def download(*arguments: Any, **options: Any) -> str:
        raise failure()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert main.main([*base, "--model", "some/model", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tmpo_trainer: model some/model") and blame in line


def test_a_hub_model_is_taken_from_where_the_hub_put_it(
    place: Path, base: list[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tiny_model)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda model, name: str(tiny_model / name))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert main.main([*base, "--model", "some/model", "--device", "cpu", "--updates", "1"]) == 0
    # The configs first: what they tell against a run is told before gigabytes are downloaded.
    configs, everything = (hub_files("some/model", tiny_model, weights, True) for weights in (False, True))
    assert asked[0] == ("some/model", configs) and asked[-1] == ("some/model", everything)
    assert all(call in (asked[0], asked[-1]) for call in asked)


def module(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        text=True,
        capture_output=True,
        timeout=120,
    )


@pytest.mark.parametrize("flags", ["--updatez 3", "--rollout-steps 10 --branch-late 1 4 9"])
def test_libraries_add_no_lines(place: Path, base: list[str], flags: str) -> None:
    done = module(["-m", "tmpo_trainer", *base, *flags.split()])
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("tmpo_trainer: ")


def test_settings_need_no_torch() -> None:
    code = (
        "import sys; from tmpo_trainer.commands.main import main; assert main(['--print-config']) == 0; "
        "assert main(['--updatez']) == 2; print('torch' in sys.modules, file=sys.stderr)"
    )
    done = module(["-c", code])
    assert done.stderr.splitlines()[-1] == "False", done.stderr
    assert yaml.safe_load(done.stdout)["model"] == "demo"


def test_the_flags_are_pinned() -> None:
    options = {name for action in make_parser()._actions for name in action.option_strings if name.startswith("--")}
    assert options == FLAGS


def test_help_lists_every_setting_with_a_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Wide enough not to break words at hyphens.
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        main.main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in all_settings().items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description and " ".join(field.description.split()) in text
    assert "flags > --config > --preset > defaults" in text
    assert all(name in text for name in preset_names())


def test_help_imports_nothing_large() -> None:
    code = """
import sys
from tmpo_trainer.commands.main import main
try:
    main(["--help"])
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    large = {"torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "PIL", "tqdm"}
    assert "pydantic" in done.stderr.split() and not large & set(done.stderr.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["--version"])
    assert caught.value.code == 0 and __version__ in capsys.readouterr().out


def test_dry_run_counts_and_writes_nothing(
    place: Path, base: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(place)
    # So large a kappa puts the branches on their means.
    assert main.main([*base, "--dry-run", "--kappa", "1e9", "--updates", "100", "--prompts-per-update", "2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "prompts: 2 for training, 2 held out" in out
    first, last = (next(line for line in out.splitlines() if line.startswith(f"update {u}:")) for u in (1, 100))
    assert "27 leaves" in first
    assert "noise at steps (2, 3), 3 seeds" in first and "96 rollout, 12 replay" in first
    assert "noise at steps (3, 4), 3 seeds" in last and "72 rollout, 12 replay" in last
    assert "54 images" in out and "100 updates" in out
    assert "report:" not in out
    assert files(place) == before
    assert main.main([*base, "--dry-run", "--report", "--eval-images", "3", "--eval-steps", "4"]) == 0
    said = "report: 2 prompts x 3 images x 4 steps, base and trained: 48 network evaluations (fewer with --eval-limit"
    assert said in capsys.readouterr().out


def test_what_a_run_leaves_behind(
    place: Path, base: list[str], monkeypatch: pytest.MonkeyPatch, red_scorer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings, environment, figures, sample grids and the report; the settings repeat the run."""
    from tmpo_trainer.diversity import MEASURES, Measure

    # A new measure of diversity needs its entry alone.
    monkeypatch.setitem(MEASURES, "largest", Measure(lambda latents: latents.max(), "latents"))
    monkeypatch.setattr(loading, "load_scorer", lambda name, *more, **rest: red_scorer)
    monkeypatch.setattr(loading, "load_features", lambda name, device: MeanColours(device))
    more = ["--report", "--sample-every", "2", "--eval-images", "3", "--eval-steps", "4", "--learning-rate", "1e-2"]
    more += ["--ema-every", "1"]
    assert main.main([*base, *more]) == 0
    err = capsys.readouterr().err
    assert "red: " in err and "largest: " in err and "report: out/report.md" in err
    names = {path.name for path in (place / "out").iterdir()}
    assert {"config.yaml", "env.json", "metrics.jsonl", "drift.jsonl", "samples", "checkpoint-2", "report.md", "report.json",
            "curves.png", "pareto.png", "samples.png", "pytorch_lora_weights.safetensors", ".lock"} == names  # fmt: skip
    assert sorted(path.name for path in (place / "out" / "samples").iterdir()) == [
        "update-000001.png", "update-000002.png"
    ]  # fmt: skip
    settings = yaml.safe_load((place / "out" / "config.yaml").read_text())
    capsys.readouterr()
    assert main.main([*base, *more, "--print-config"]) == 0
    typed = yaml.safe_load(capsys.readouterr().out)
    assert settings == typed | {key: str(place / typed[key]) for key in ("prompts", "eval_prompts", "output_dir")}
    environment = json.loads((place / "out" / "env.json").read_text())
    assert environment["tmpo_trainer"] == __version__ and environment["torch"] == torch.__version__
    assert str(Path.home()) not in json.dumps(environment) and str(place) not in json.dumps(environment)
    report = (place / "out" / "report.md").read_text()
    assert all(f"| {name} |" in report for name in ("red", *MEASURES)) and "2 held-out prompts x 3 images" in report
    summary = json.loads((place / "out" / "report.json").read_text())
    assert summary["gain"]["red"]["low"] <= summary["gain"]["red"]["mean"] <= summary["gain"]["red"]["high"]
    assert summary["trained"]["red"] != summary["base"]["red"]
    (line,) = [json.loads(line) for line in (place / "out" / "drift.jsonl").read_text().splitlines()]
    # The grid has the report's prompts, noise and weights, and 8 pictures of each in place of 3.
    assert line.pop("update") == 2 and line.keys() == summary["drift"].keys() == set(appearance.NAMES)
    assert "| latent norm |" in report and line["latent_norm"]["shift"]["mean"] != 0
    assert line["latent_norm"]["slope"]["mean"] == pytest.approx(
        summary["drift"]["latent_norm"]["slope"]["mean"], abs=0.2
    )


def test_evaluation_on_the_way(
    place: Path, base: list[str], monkeypatch: pytest.MonkeyPatch, red_scorer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Base and averaged weights on the same prompts and noise, as the report measures them; resuming keeps the base."""
    from tmpo_trainer.evaluation import held_out

    measured: list[int] = []
    original = held_out.evaluate

    def counted(*args: Any, **kwargs: Any) -> Any:
        measured.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(held_out, "evaluate", counted)
    monkeypatch.setattr(loading, "load_scorer", lambda name, *more, **rest: red_scorer)
    monkeypatch.setattr(loading, "load_features", lambda name, device: MeanColours(device))
    more = ["--eval-every", "1", "--eval-images", "3", "--eval-steps", "4", "--learning-rate", "1e-2", "--updates", "3"]
    more += ["--ema-every", "1"]
    more += ["--checkpoint-every", "1", "--checkpoints-kept", "3"]
    assert main.main([*base, *more]) == 0
    path = place / "out" / "evaluations.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 3] and len(measured) == 4
    assert lines[0]["drift"]["brightness"]["base"] == lines[2]["drift"]["brightness"]["base"]
    assert len({line["base"]["red"] for line in lines}) == 1 and len({line["trained"]["red"] for line in lines}) == 3
    assert "update 2, held-out prompts: red " in capsys.readouterr().err
    assert main.main(["--resume", "out/checkpoint-1", "--report"]) == 0
    again = [json.loads(line) for line in path.read_text().splitlines()]
    # Updates 2 and, as the report, 3; the base and update 1 stand.
    assert again == lines[:2] and len(measured) == 4 + 2
    final = json.loads((place / "out" / "report.json").read_text())
    assert {key: final[key] for key in ("base", "trained", "gain")} == {
        key: lines[2][key] for key in ("base", "trained", "gain")
    }


def test_a_resumed_run_measures_the_base_anew_if_the_model_is_another(
    place: Path, base: list[str], monkeypatch: pytest.MonkeyPatch, red_scorer: Any
) -> None:
    """Another dtype gives other pictures: the base that is kept would not be the one that is trained."""

    monkeypatch.setattr(loading, "load_scorer", lambda name, *more, **rest: red_scorer)
    monkeypatch.setattr(loading, "load_features", lambda name, device: MeanColours(device))
    more = ["--eval-every", "1", "--eval-images", "2", "--eval-steps", "2", "--checkpoint-every", "1"]
    assert main.main([*base, *more, "--updates", "1"]) == 0
    assert main.main(["--resume", "latest", "--output-dir", "out", "--updates", "2", "--dtype", "bfloat16"]) == 0
    lines = [json.loads(line) for line in (place / "out" / "evaluations.jsonl").read_text().splitlines()]
    assert lines[0]["base"]["red"] != lines[1]["base"]["red"]


def test_a_tracker_gets_figures_and_pictures(place: Path, base: list[str]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["--tracker", "tensorboard", "--sample-every", "1", "--eval-steps", "2", "--checkpoint-every", "1"]
    assert main.main([*base, *more]) == 0
    # The second update is sent again, and shown once.
    assert main.main(["--resume", "out/checkpoint-1"]) == 0
    events = EventAccumulator(str(place / "out" / "tmpo")).Reload()
    written = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    for name in ("reward/shapes", "lgmd", "grad_norm"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(line["update"], pytest.approx(line[name], rel=1e-5)) for line in written]
    assert "seconds/total" in events.Tags()["scalars"]
    (drift,) = [json.loads(line) for line in (place / "out" / "drift.jsonl").read_text().splitlines()]
    (slope,) = events.Scalars("drift/latent_norm slope")
    assert slope.step == drift["update"] == 2
    assert slope.value == pytest.approx(drift["latent_norm"]["slope"]["mean"], rel=1e-5)
    assert [event.step for event in events.Images("samples")] == [1, 2]


@pytest.mark.parametrize("broken", [True, False])
def test_torchvision_is_not_needed_and_a_broken_one_is_told(tmp_path: Path, broken: bool) -> None:
    """As on a machine without CUDA, where PyPI's build of it cannot be imported and takes transformers' CLIP with it."""
    if broken:
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
        about = tmp_path / "torchvision-0.28.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    code = (
        f"import sys\nif not {broken}: sys.modules['torchvision'] = None\nfrom tmpo_trainer.commands.main import main\n"
        "sys.exit(main(['score', 'nowhere.png', '--reward', 'pickscore', '--prompt', 'x']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path if broken else ''}{os.pathsep}{REPOSITORY}"},
    )  # fmt: skip
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert ("torchvision is installed but broken (operator nms" if broken else "nowhere.png does not exist") in last


def test_a_terminal_without_the_letters(tmp_path: Path) -> None:
    """A file name that the encoding of stdout does not have, as on Windows with stdout in a file or pipe."""
    code = "from tmpo_trainer.commands import main as m; m._run = lambda a: print('一只猫') or 0; print(m.main([]))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "cp1252"},
    )  # fmt: skip
    assert done.stdout.split() == [b"???", b"0"], done.stderr


def test_an_unknown_command_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["evalute", "run"]) == 2
    assert "unknown command evalute, did you mean evaluate?" in capsys.readouterr().err


def test_a_zero_learning_rate_is_reported(place: Path, base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*base, "--learning-rate", "0"]) == 0
    assert "the LoRA is zero" in capsys.readouterr().err


def test_a_parked_scorer_is_on_the_device_only_to_score(
    place: Path, base: list[str], monkeypatch: pytest.MonkeyPatch, red_scorer: Any
) -> None:

    moves: list[str] = []

    class Movable(type(red_scorer)):
        def to(self, device: torch.device) -> None:
            moves.append(str(device))

        def score(self, *arguments: Any) -> torch.Tensor:
            moves.append("score")
            return super().score(*arguments)

    monkeypatch.setattr(loading, "load_scorer", lambda name, *more, **rest: Movable())
    # A device that differs from where it waits, by its name alone.
    monkeypatch.setattr(loading, "Parked", lambda scorer, device: Parked(scorer, torch.device("cpu:0")))
    assert main.main([*base, "--offload-scorers"]) == 0
    assert moves == ["cpu", *["cpu:0", "score", "cpu"] * 2]
    moves.clear()
    assert main.main([*base, "--output-dir", "plain"]) == 0
    assert moves == ["score"] * 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_not_cleared_again() -> None:
    """In a process of its own, which no other test has told to keep its memory."""
    script = """
import resource
from tmpo_trainer.commands import main

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [b"x" * 15_000_000 for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

main.main(["no-such-command"])
print(faults(), faults(), faults())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, *later = map(int, run.stdout.split())
    assert max(later) < first / 10
