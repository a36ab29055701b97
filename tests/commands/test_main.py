"""Flags, files and presets: what is accepted, in which order it counts, and one line for whatever is wrong."""

from __future__ import annotations

import json
import os
import platform
import shutil
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
from tmpo_trainer.settings.presets import all_settings, make_config, preset_names
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

#: Appendix D.4 of the paper.
PAPER = {
    "pickscore": {"learning_rate": 5e-5, "updates": 500, "max_grad_norm": 0.3, "beta_warmup": 150, "inner_updates": 1},
    "geneval": {"learning_rate": 3e-5, "updates": 1000, "max_grad_norm": 0.5, "beta_warmup": 150, "inner_updates": 1},
    "ocr": {"learning_rate": 3e-5, "updates": 250, "max_grad_norm": 0.5, "beta_warmup": 100, "inner_updates": 1},
    "joint": {"learning_rate": 3e-5, "updates": 500, "max_grad_norm": 0.5, "beta_warmup": 150, "inner_updates": 2},
}
#: Appendix D.5, laid over a protocol of D.4; on the demo model a sweep chose others.
RIVALS: dict[str, float] = {"flow-grpo": 0.03, "mix-grpo": 0.03, "tree-grpo": 0.03, "gardo": 0.04}
#: Methods on noised leaves, laid over a protocol.
NOISED: dict[str, dict[str, Any]] = {
    "awm": {"learning_rate": 3e-4, "draws": 6, "noise_shift": 3, "kl_weight": 1e-3},
    "nft": {"learning_rate": 3e-4, "draws": 10, "noise_shift": 3, "kl_weight": 1e-4, "strength": 1, "reward_range": 5},
    "crd": {"learning_rate": 3e-4, "draws": 6, "noise_shift": 3, "tilt_weight": 100, "kl_weight": 1e-3},
    "tmpo-leaf": {"learning_rate": 3e-4, "draws": 6, "noise_shift": 3, "baseline": "group"},
}
#: Prompts per update, learning rate and KL weight, see docs/comparison.md.
DEMO_RIVALS = {
    "flow-grpo": (8, 3e-3, 0.03),
    "mix-grpo": (8, 1e-3, 0.03),
    "tree-grpo": (2, 1e-3, 3),
    "gardo": (8, 3e-3, 0.04),
}
#: On a GPU that is small for the model, with weights of 16 bits and of four.
SMALL = {"gradient_checkpointing": True, "max_batch": 27, "decode_batch": 4, "offload_scorers": True}
NF4 = {"quantize": "nf4", **SMALL}
FLUX2 = {"guidance": 4.0, "max_sequence_length": 512}
#: What these change beside the model.
OVERLAYS: dict[str, dict[str, Any]] = {
    "recommended": {
        "baseline": "siblings", "kl_weight": 0.1, "neutral": ["feature_distance", "latent_norm"], "neutral_share": [1.0, 0.5],
    },
    "flux-80gb": {"gradient_checkpointing": False, "max_batch": 27, "replay_batch": 4, "decode_batch": 9},
    "flux-24gb": {
        "quantize": "nf4", "gradient_checkpointing": True, "max_batch": 27, "replay_batch": 6, "decode_batch": 4,
        "offload_scorers": True,
    },
    "sd35m-24gb": {
        "branch_late": [1, 3, 4], "gradient_checkpointing": True, "max_batch": 27, "replay_batch": 12, "decode_batch": 9,
    },
    "sd35l-24gb": {"branch_late": [1, 3, 4], **NF4, "replay_batch": 6},
    "klein4b-24gb": {**FLUX2, **SMALL, "replay_batch": 6},
    "klein9b-24gb": {**FLUX2, **NF4, "max_batch": 18, "replay_batch": 6},
    "klein9b-80gb": {
        **FLUX2, "gradient_checkpointing": False, "max_batch": 27, "replay_batch": 3, "decode_batch": 9,
    },
    "flux2-80gb": {**FLUX2, **SMALL, "max_batch": 9, "replay_batch": 4},
    "qwen-24gb": {
        "guidance": 4.0, "branch_late": [1, 3, 4], "split_guidance": True, **NF4, "max_batch": 9, "replay_batch": 2,
        "decode_batch": 2,
    },
    "qwen-80gb": {
        "guidance": 4.0, "branch_late": [1, 3, 4], "gradient_checkpointing": True, "max_batch": 27, "replay_batch": 12,
        "decode_batch": 9,
    },
    "zimage-24gb": {"guidance": 4.0, "split_guidance": True, **SMALL, "replay_batch": 4},
}  # fmt: skip
PAPER_COMMON = {
    "model": "black-forest-labs/FLUX.1-dev", "method": "tmpo", "rollout_steps": 6, "eval_steps": 28, "branching": 3,
    "branch_early": (1, 2, 3), "branch_late": (1, 3, 5), "kappa": 6, "kernel": "cps", "eta": 0.7, "clip": 0.2,
    "beta_start": 0.8, "beta_end": 2.0, "adam_betas": (0.9, 0.999), "weight_decay": 1e-4, "lr_min_ratio": 0.1,
    "ema_decay": 0.9, "ema_every": 8, "lora_rank": 64, "lora_alpha": 128, "baseline": "none", "anchor": "none",
    "kl_weight": 0, "logp_reduce": "mean", "reward_norm": "zscore", "prompts_per_update": 1,
}  # fmt: skip


@pytest.fixture
def place(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with good and bad files in it."""
    monkeypatch.chdir(tmp_path)
    texts = {
        "good.txt": "a red circle\ntwo blue squares\n",
        "empty.txt": "\n# only a comment\n",
        "foreign.txt": "a red circle\na photo of a cat\n",
        "signs.jsonl": '{"prompt": "a sign", "target": "open"}\n',
        "bare.jsonl": '{"prompt": "a red circle"}\n["a red circle"]\n',
        "text.jsonl": "a red circle\n",
        "twice.jsonl": '{"prompt": "a red circle", "a": 1}\n\n{"prompt": "a red circle", "a": 2}\n',
        "good.yaml": "learning_rate: 5e-5\nupdates: 70\nguidance: 2\n",
        "unknown.yaml": "learning_rat: 1.0e-4\n",
        "broken.yaml": "updates: [1\nseed: }",
        "list.yaml": "- updates\n",
        "value.yaml": "updates: many\n",
        "run/metrics.jsonl": '{"update": 1}\n',
        "lora/pytorch_lora_weights.safetensors": "",
        "no-pipeline/config.json": "{}",
        "unnamed/model_index.json": "{}",
        "sana/model_index.json": json.dumps({"_class_name": "SanaPipeline"}),
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.txt").write_bytes("ein roter Würfel".encode("latin-1"))
    shutil.copytree(tiny_model, tmp_path / "without-vae")
    shutil.rmtree(tmp_path / "without-vae" / "vae")
    shutil.copytree(tiny_model, tmp_path / "cut")
    weights = tmp_path / "cut" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return tmp_path


@pytest.fixture
def base(tiny_model: Path) -> list[str]:
    """Flags of a short run on the tiny model; later flags win."""
    text = f"""--model {tiny_model} --prompts good.txt --eval-prompts good.txt --no-report --updates 2 --sample-every 0
        --rollout-steps 6 --branch-early 1 2 3 --branch-late 1 3 4 --resolution 32 32 --output-dir out --lora-rank 4"""
    return text.split()


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


# -- settings ------------------------------------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main.main([*flags, "--print-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_flags_over_config_over_preset_over_defaults(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    defaults: Any = make_config([])
    only_preset = printed(capsys, "--preset", "demo")
    assert only_preset["updates"] not in (70, 95, defaults.updates)
    assert only_preset["weight_decay"] == defaults.weight_decay
    with_file = printed(capsys, "--preset", "demo", "--config", "good.yaml")
    # PyYAML reads 5e-5 as a string.
    assert with_file == {**only_preset, "learning_rate": 5e-5, "updates": 70, "guidance": 2}
    flags = printed(capsys, "--updates", "95", "--config", "good.yaml", "--preset", "demo")
    assert flags == {**with_file, "updates": 95}


def test_the_preset_follows_the_reward(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys) == printed(capsys, "--preset", "demo") == printed(capsys, "--reward", "shapes")
    for name in ("pickscore", "geneval", "ocr"):
        assert printed(capsys, "--reward", name) == printed(capsys, "--preset", name)
    several = printed(capsys, "--reward", "hpsv2", "imagereward", "pickscore")
    assert several == printed(capsys, "--preset", "joint")
    (place / "ocr.yaml").write_text("reward: [ocr]\nseed: 3\n")
    assert printed(capsys, "--config", "ocr.yaml") == {**printed(capsys, "--preset", "ocr"), "seed": 3}
    assert printed(capsys, "--reward", "ocr", "--preset", "demo")["model"] == "demo"


def test_values_of_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    settings = printed(
        capsys, "--resolution", "64", "96", "--no-report", "--max-batch", "32", "--learning-rate=2e-4", "--threads", "none"
    )  # fmt: skip
    assert settings["resolution"] == [64, 96] and settings["report"] is False and settings["max_batch"] == 32
    assert settings["learning_rate"] == 2e-4 and settings["threads"] is None
    given = ["--baseline", "none", "--anchor", "none", "--reward-norm", "none", "--max-batch", "None"]
    words = printed(capsys, "--method", "tmpo", *given)
    assert (words["baseline"], words["anchor"], words["reward_norm"], words["max_batch"]) == (
        "none", "none", "none", None
    )  # fmt: skip
    # An optional list: nothing, and not a list of nothing.
    weighted = ["--reward", "shapes", "sharpness", "--reward-weights"]
    assert printed(capsys, *weighted, "1", "2")["reward_weights"] == [1, 2]
    assert printed(capsys, *weighted, "none")["reward_weights"] is None
    assert printed(capsys, "--neutral", "none")["neutral"] == []


def test_of_several_processes_one_describes_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        for action in ("--print-config", "--dry-run"):
            assert main.main([action]) == 0
            said.append(capsys.readouterr().out)
    assert said[0].startswith("model: demo") and said[1].startswith("model demo on ") and said[2:] == ["", ""]


def test_a_gpu_that_is_full_while_scorers_are_loaded_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loading, "scorers", full)
    assert main.main(["--updates", "1"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tmpo_trainer: ")]
    assert "CUDA out of memory. Tried to allocate 2.00 GiB.; another program may use the GPU" in line


@pytest.mark.parametrize("name", preset_names())
def test_print_config_round_trips(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main.main(["--preset", name, "--seed", "7", "--max-batch", "9", "--print-config"]) == 0
    text = capsys.readouterr().out
    (place / "printed.yaml").write_text(text)
    assert main.main(["--config", "printed.yaml", "--print-config"]) == 0
    assert capsys.readouterr().out == text
    settings = yaml.safe_load(text)
    assert set(settings) == set(type(make_config([("printed", settings)])).model_fields)


@pytest.mark.parametrize("name", PAPER)
def test_presets_hold_the_papers_values(capsys: pytest.CaptureFixture[str], name: str) -> None:
    config: Any = make_config([("printed", printed(capsys, "--preset", name))])
    settings = config.model_dump()
    expected = {**PAPER_COMMON, **PAPER[name]}
    assert {key: settings[key] for key in expected} == expected
    warmup = PAPER[name]["beta_warmup"]
    assert [config.beta(u) for u in (0, warmup // 2, warmup, 10 * warmup)] == pytest.approx([0.8, 1.4, 2.0, 2.0])


def test_there_is_no_other_preset_than_these() -> None:
    assert set(preset_names()) == {*PAPER, *OVERLAYS, "demo", "demo-long"}


@pytest.mark.parametrize(("name", "expected"), NOISED.items())
def test_methods_on_noised_leaves_go_with_a_protocol(
    capsys: pytest.CaptureFixture[str], name: str, expected: dict[str, Any]
) -> None:
    """Those of the authors' code; nothing of the protocol's TMPO gets in their way."""
    for flags in (["--preset", "geneval"], ["--preset", "pickscore", "recommended"], ["--preset", "demo-long"]):
        settings = printed(capsys, *flags, "--method", name)
        assert flags[1] == "demo-long" or {key: settings[key] for key in expected} == expected
    assert settings["prompts_per_update"] == settings["prompts_per_batch"] == 8
    assert (settings["rollout"], settings["solver"]) == ("tree" if name == "tmpo-leaf" else "chains", "ab2")


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_has_the_papers_settings_over_the_protocol(capsys: pytest.CaptureFixture[str], name: str) -> None:
    expected = {
        "method": name, "kernel": "flow_sde", "learning_rate": 5e-5, "max_grad_norm": 0.3, "clip": 0.2,
        "kl_weight": RIVALS[name], "inner_updates": 1,
    }  # fmt: skip
    for protocol in ("geneval", "pickscore", "joint"):
        rewards = printed(capsys, "--preset", protocol)["reward"]
        for flags in (["--preset", protocol], ["--preset", protocol, "flux-24gb"], ["--reward", *rewards]):
            settings = printed(capsys, *flags, "--method", name)
            assert {key: settings[key] for key in expected} == expected
            assert settings["updates"] == PAPER[protocol]["updates"] and settings["reward"] == rewards
    # Several rewards, of which GARDO's auxiliary scores are two, are loaded once each; PickScore as in GARDO's code.
    assert printed(capsys, "--reward", "pickscore", "--method", name)["pickscore_scale"] == (
        "flow" if name == "gardo" else "raw"
    )
    # Flags are stronger; the demo model has settings of its own.
    assert printed(capsys, "--preset", "ocr", "--method", name, "--learning-rate", "1e-3")["learning_rate"] == 1e-3
    demo = printed(capsys, "--method", name)
    assert demo["model"] == "demo" and demo["method"] == name and "baseline" not in demo
    assert (demo["prompts_per_update"], demo["learning_rate"], demo["kl_weight"]) == DEMO_RIVALS[name]


def test_a_preset_that_names_its_method_is_stronger_than_the_methods_own(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`demo-long` is written for nft, whose settings for the demo model are those of short runs."""
    short, long = printed(capsys, "--method", "nft"), printed(capsys, "--preset", "demo-long")
    assert short["method"] == long["method"] == "nft"
    assert (short["draws"], long["draws"], short["noise_weight"], long["noise_weight"]) == (2, 3, 1, 0)
    assert (short["rollout_steps"], long["rollout_steps"]) == (6, 10)
    same = "rollout", "neutral", "level_importance", "leaf_importance", "negative_limit", "old_decay_rise"
    assert [short[key] for key in same] == [long[key] for key in same]
    assert printed(capsys, "--preset", "demo-long", "--method", "nft") == long
    # A file for the same method changes nothing of that.
    Path("own.yaml").write_text("method: nft\n")
    assert printed(capsys, "--preset", "demo-long", "--config", "own.yaml") == long
    # For another method, that method's own are stronger, also than a preset laid over the first.
    for more in ((), ("recommended",)):
        other = printed(capsys, "--preset", "demo-long", *more, "--method", "awm")
        assert (other["kl_weight"], other["draws"], other["lora_targets"]) == (0.1, 1, "attention")
        assert (other["rollout"], other["neutral"]) == ("chains", [])
    # So are they than the file of a run.
    Path("run.yaml").write_text(yaml.safe_dump(short))
    Path("long.yaml").write_text(yaml.safe_dump(long))
    own = "rollout", "noise_weight", "adaptive_weight", "level_importance", "negative_limit"
    for name, expected in (
        ("awm", ["chains", 0, False, 0, None]),
        ("crd", ["chains", 0, False, 0, None]),
        ("tmpo-leaf", ["tree", 0, True, 0, None]),
    ):
        for file in ("run.yaml", "long.yaml"):
            other = printed(capsys, "--config", file, "--method", name)
            assert [other[key] for key in own] == expected
            assert other.get("leaf_importance", 0) == 0
    # Nothing else in crd's loss holds the mean error.
    assert printed(capsys, "--preset", "demo", "--method", "crd")["kl_weight"] == 0.1
    settings = printed(capsys, "--preset", "demo", "--method", "tmpo")
    assert [settings[key] for key in ("solver", "leaf_steps", "lora_targets")] == ["ab2", 3, "attention"]
    for name in ("tmpo", *RIVALS, *NOISED):
        targets = "paper" if name == "nft" else "attention"
        assert printed(capsys, "--preset", "demo-long", "--method", name)["lora_targets"] == targets
        # Six steps are nft's in preset demo, also where a run's file says so.
        if name != "nft":
            for flags in (("--preset", "demo"), ("--preset", "demo-long"), ("--config", "run.yaml")):
                assert printed(capsys, *flags, "--method", name)["rollout_steps"] == 10
    assert printed(capsys, "--preset", "pickscore", "recommended", "--method", "nft")["kl_weight"] == 1e-4
    assert printed(capsys, "--preset", "pickscore", "flux-24gb", "--method", "nft")["kl_weight"] == 1e-4
    # recommended is written for tmpo, on any model, and so are the protocols.
    for flags in (("--preset", "demo", "recommended"), ("--preset", "pickscore", "recommended", "--model", "demo")):
        settings = printed(capsys, *flags)
        assert (settings["method"], settings["baseline"], settings["kl_weight"]) == ("tmpo", "siblings", 0.1)
        assert settings["neutral"] == ["feature_distance", "latent_norm"]
    # A variant has what its method has.
    variants = {name: printed(capsys, "--method", f"tmpo-{name}") for name in ("beta-1", "step-balance", "no-tree")}
    assert {settings["kl_weight"] for settings in variants.values()} == {0.3}
    assert [settings["baseline"] for settings in variants.values()] == ["siblings", "siblings", "group"]


def test_a_method_beats_a_file_written_for_another(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--print-config` writes all settings of the method down, also those that belong to it alone."""
    for first, second in (("tmpo", "gardo"), ("gardo", "flow-grpo"), ("flow-grpo", "tree-grpo")):
        Path("all.yaml").write_text(yaml.safe_dump(printed(capsys, "--method", first)))
        assert printed(capsys, "--config", "all.yaml")["method"] == first
        assert printed(capsys, "--config", "all.yaml", "--method", second) == printed(capsys, "--method", second)
    # A file without a method is above the settings of any.
    Path("any.yaml").write_text("kl_weight: 0.5\n")
    assert printed(capsys, "--config", "any.yaml") == printed(capsys, "--kl-weight", "0.5")
    # With the file's own method its values stand.
    Path("own.yaml").write_text("method: flow-grpo\nkl_weight: 0.5\n")
    assert printed(capsys, "--config", "own.yaml")["kl_weight"] == 0.5
    assert printed(capsys, "--config", "own.yaml", "--method", "flow-grpo")["kl_weight"] == 0.5
    Path("gardo.yaml").write_text("method: gardo\n")
    assert "auxiliary" not in printed(capsys, "--config", "gardo.yaml", "--method", "tmpo", "--auxiliary", "none")


@pytest.mark.parametrize(
    ("name", "fixed"),
    [
        ("tmpo-beta-1", {"beta_start": 1, "beta_end": 1}),
        ("tmpo-step-balance", {"balance": "subtree"}),
        ("tmpo-no-tree", {"tree": False}),
        ("tmpo-fixed-branching", {"schedule": "fixed"}),
    ],
)
def test_an_ablation_changes_nothing_else(capsys: pytest.CaptureFixture[str], name: str, fixed: dict[str, Any]) -> None:
    plain, settings = (printed(capsys, "--preset", "pickscore", *more) for more in ((), ("--method", name)))
    assert settings == plain | {"method": name} | fixed


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_preset_laid_over_a_protocol_leaves_the_rest_alone(capsys: pytest.CaptureFixture[str], name: str) -> None:
    changed = {"model", *OVERLAYS[name]}
    for protocol, flags in (
        ("pickscore", ["--preset", name]),
        ("geneval", ["--preset", name, "--reward", "geneval"]),
        ("ocr", ["--preset", "ocr", name]),
        ("joint", ["--preset", name, "--reward", "hpsv2", "imagereward", "pickscore"]),
    ):
        plain, settings = printed(capsys, "--preset", protocol), printed(capsys, *flags)
        assert {key for key in settings if settings[key] != plain[key]} <= changed
        assert {key: settings[key] for key in OVERLAYS[name]} == OVERLAYS[name]
    assert printed(capsys, "--preset", name, "--max-batch", "5")["max_batch"] == 5


def test_later_presets_win(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--preset", "flux-24gb", "geneval")["replay_batch"] == 12
    assert printed(capsys, "--preset", "geneval", "flux-24gb")["replay_batch"] == 6
    settings = printed(capsys, "--preset", "recommended", "flux-24gb", "--method", "flow-grpo")
    assert (settings["kl_weight"], settings["replay_batch"]) == (0.03, 6) and "baseline" not in settings


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
    from tmpo_trainer.commands import loading
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
    typed = printed(capsys, *base, *more)
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
    from tmpo_trainer.commands import loading
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
    from tmpo_trainer.commands import loading

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
    from tmpo_trainer.commands import loading

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
