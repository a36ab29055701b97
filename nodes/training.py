"""Nodes that train in a separate process and show a run's progress."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
import yaml
from comfy_api.latest import io, ui
from torch import Tensor

from ..tmpo_trainer.files import has_metrics, read_metrics, write_text
from ..tmpo_trainer.lora.file import FILE_NAME
from ..tmpo_trainer.pictures.reading import read_picture
from ..tmpo_trainer.settings.yaml_file import read_yaml
from .changed import Changes
from .diversity import kept_features
from .images import to_image
from .inputs import inside, verdict
from .newer import aliases
from .scoring import kept_scorer
from .train_settings import AS_PRESET, NO_LAYER, NO_LORA, OWN, asked, choices, owned
from .types import CATEGORY

PACK = Path(__file__).parents[1]
INSTALL = (
    f'in {PACK}, make an environment (python -m venv .venv), pip install -c constraints.txt -e ".[train]" there, and start '
    "ComfyUI with TMPO_PYTHON set to its interpreter"
)
RUN_TIP = "A run's folder in ComfyUI's output folder."
#: The settings that a run was started with, in its folder.
ASKED = "asked.yaml"
#: Seconds between two looks at a run.
LOOK = 0.5
#: Pixels of a sample grid's longer side, as it is shown.
MOST_SIDE = 4096
#: Of the runs' LoRAs.
CHANGES = Changes()


def missing_packages(python: str) -> str | None:
    """The error of an interpreter that imports training's packages; None if all are there.

    Raises:
        ValueError: the interpreter cannot be run.
    """
    # The error goes to stdout: libraries may write warnings to stderr after it, while the interpreter ends.
    code = (
        "try: import accelerate, diffusers, peft, matplotlib, pydantic, yaml, cv2, rapidocr\n"
        "except Exception as error: print(f'{type(error).__name__}: {error}'); raise"
    )
    try:
        # -P keeps modules of the same name in the current folder out.
        tried = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"python {python} cannot be run ({error}): give the path of an interpreter") from None
    return None if tried.returncode == 0 else ((tried.stdout or tried.stderr).strip().splitlines() or ["it failed"])[-1]


class Train(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        lists = choices()
        return io.Schema(
            node_id="TMPO_Train",
            display_name="Train TMPO LoRA",
            category=CATEGORY,
            **aliases("LoRA training", "reward fine-tuning", "reinforcement learning"),
            description="Runs `python -m tmpo_trainer` in a separate process and outputs the LoRA's path. Cancel saves a "
            "checkpoint; queueing again continues from it.",
            inputs=[
                io.String.Input("output_dir", default="tmpo_run", tooltip=RUN_TIP),
                io.Combo.Input(
                    "preset", options=lists["preset"], default="demo",
                    tooltip="Where all settings start from. demo and demo-long train the bundled model on a CPU; the others "
                    "are the paper's protocols for FLUX.1-dev.",
                ),
                io.Combo.Input(
                    "layer", options=lists["layer"], default=NO_LAYER,
                    tooltip="A second preset over the first: for a GPU's memory, or the recommended objective.",
                ),
                io.Combo.Input(
                    "model", options=lists["model"], default=AS_PRESET,
                    tooltip="A diffusers folder in models/diffusers, or one that this machine's owner has named.",
                ),
                io.Combo.Input(
                    "transformer", options=lists["transformer"], default=OWN,
                    tooltip="A file of models/diffusion_models in place of the model's own transformer.",
                ),
                io.String.Input(
                    "reward", default="",
                    tooltip="What to train for, separated by commas: pickscore, hpsv2, imagereward, clipscore, ocr, geneval, "
                    "shapes, sharpness. Empty: the preset's.",
                ),
                io.Combo.Input(
                    "method", options=lists["method"], default=AS_PRESET,
                    tooltip="tmpo or one of its rivals.",
                ),
                io.String.Input(
                    "prompts", multiline=True, default="",
                    tooltip="Training prompts, one per line. Empty: the list that comes with the reward.",
                ),
                io.String.Input(
                    "eval_prompts", multiline=True, default="",
                    tooltip="Held-out prompts for the report, one per line. Empty: the list that comes with the reward.",
                ),
                io.Int.Input("updates", default=0, min=0, max=100_000, tooltip="Number of updates; 0: the preset's."),
                io.Float.Input(
                    "learning_rate", default=0.0, min=0.0, max=1.0, step=1e-6,
                    tooltip="The peak learning rate; 0: the preset's.",
                ),
                io.Int.Input("lora_rank", default=0, min=0, max=1024, tooltip="Rank of the LoRA; 0: the preset's."),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**63 - 1, control_after_generate=False,
                    tooltip="The seed of all randomness.",
                ),
                io.Combo.Input(
                    "init_lora", options=lists["init_lora"], default=NO_LORA,
                    tooltip="A LoRA to start from.",
                ),
                io.String.Input(
                    "settings", multiline=True, default="",
                    tooltip="Further settings, one `name: value` per line, e.g. `resolution: 512 512` or `report: false`. The "
                    "help page lists them.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="lora_path", tooltip="The LoRA's path, for Load TMPO LoRA."),
                io.String.Output(display_name="report", tooltip="The run's report, as Markdown."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, model=None) -> bool | str:
        # ComfyUI then leaves the list of models to `asked`: a model of the owner's is missing from it if the file is wrong.
        return verdict(owned)

    @classmethod
    def fingerprint_inputs(cls, output_dir, **inputs) -> Any:
        # The node runs again if its LoRA was deleted, or another run has written one.
        if output_dir is None:
            # It comes from another node.
            return CHANGES.count()
        return CHANGES.count(inside(output_dir, "output_dir") / FILE_NAME)

    @classmethod
    def execute(cls, output_dir, **inputs) -> io.NodeOutput:
        # The interpreter is not an input of the node: a workflow from elsewhere must not choose a program.
        python = os.environ.get("TMPO_PYTHON", sys.executable)
        folder = inside(output_dir, "output_dir")
        settings, names, files = asked(inputs, folder)
        missing = missing_packages(python)
        if missing is not None:
            raise ValueError(f"the trainer cannot run with {Path(python).name}: {missing}. To install it: {INSTALL}")
        # Also what the settings do not say, so that the file shows whether a run is asked for that the folder does not hold.
        more = {"presets": " ".join(names)} | {n: hashlib.sha256(t.encode()).hexdigest() for n, t in files.items()}
        text = "".join(f"# {name}: {value}\n" for name, value in more.items())
        text += yaml.safe_dump(settings, allow_unicode=True)
        if any(folder.glob("checkpoint-*")):
            # The settings of a run that resumes are those of its folder, so it must be one that this node has started.
            if known_runs().get(str(folder)) != hashlib.sha256(text.encode()).hexdigest():
                raise ValueError(
                    f"{folder} holds a run with other settings, or one that was not started by this node: choose another "
                    "output_dir"
                )
            words = ["--resume", str(folder)]
        else:
            if folder == Path(folder_paths.get_output_directory()).resolve() or has_metrics(folder):
                raise ValueError(
                    f"{folder} already holds other files, or a run without a checkpoint: choose another output_dir"
                )
            remember(folder, text)
            folder.mkdir(parents=True, exist_ok=True)
            for name, lines in {**files, ASKED: text}.items():
                (folder / name).write_text(lines, encoding="utf-8")
            words = ["--config", str(folder / ASKED), "--output-dir", str(folder), "--preset", *names]
        if not finished(folder):
            run(python, words, folder)
        CHANGES.note(folder / FILE_NAME)
        report = folder / "report.md"
        text = report.read_text(encoding="utf-8") if report.exists() else "no report"
        return io.NodeOutput(str(folder / FILE_NAME), text, ui=ui.PreviewText(text))


def _record() -> Path:
    """The file of the runs that the node has started. It is not in the output folder, where a run from elsewhere may lie."""
    return Path(folder_paths.get_user_directory()) / "tmpo_runs.json"


def known_runs() -> dict[str, str]:
    """The runs that the node has started: {folder: hash of what was asked}."""
    try:
        return dict(json.loads(_record().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def remember(folder: Path, text: str) -> None:
    """Adds a run to `known_runs`."""
    runs = known_runs() | {str(folder): hashlib.sha256(text.encode()).hexdigest()}
    _record().parent.mkdir(parents=True, exist_ok=True)
    write_text(_record(), json.dumps(runs, indent=1))


def run(python: str, words: list[str], folder: Path) -> None:
    """Trains, with progress and cancel. Raises ValueError with the trainer's last line if it fails."""
    # Weights that ComfyUI keeps on the GPU, and our own nodes in the CPU's memory, would take the run's.
    comfy.model_management.unload_all_models()
    kept_scorer.cache_clear()
    kept_features.cache_clear()
    comfy.model_management.soft_empty_cache()
    places = [str(PACK), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    bar = comfy.utils.ProgressBar(1)
    with (folder / "log.txt").open("w+", encoding="utf-8", errors="replace") as errors:
        windows = os.name == "nt"
        process = subprocess.Popen(
            [python, "-P", "-m", "tmpo_trainer", *words],
            env=environment,
            stderr=errors,
            stdout=subprocess.DEVNULL,
            # Ctrl-Break reaches only process groups.
            creationflags=subprocess.CREATE_NEW_PROCESS_GROUP if windows else 0,  # type: ignore[attr-defined]
        )
        try:
            while process.poll() is None:
                comfy.model_management.throw_exception_if_processing_interrupted()
                done = len(read_metrics(folder / "metrics.jsonl"))
                bar.update_absolute(done, max(planned(folder), 1))
                time.sleep(LOOK)
        except BaseException:
            # The signal makes the run save a checkpoint and end. Until it looks, after an update or what it shows, minutes may
            # pass. A second Cancel does not wait.
            try:
                # Not Ctrl-C's: a ComfyUI that a script has started in the background ignores that one, and so do its children.
                process.send_signal(signal.CTRL_BREAK_EVENT if windows else signal.SIGTERM)  # type: ignore[attr-defined]
                while process.poll() is None:
                    comfy.model_management.throw_exception_if_processing_interrupted()
                    time.sleep(LOOK)
            # On Windows, a program without a console cannot send it.
            except (OSError, comfy.model_management.InterruptProcessingException):
                process.kill()
                process.wait()
            raise
        errors.seek(0)
        lines = [line for line in errors.read().replace("\r", "\n").splitlines() if line.strip()]
    if process.returncode:
        last = next(
            (line for line in reversed(lines) if line.startswith("tmpo_trainer:")), (lines or ["no message"])[-1]
        )
        raise ValueError(f"training ended with exit code {process.returncode}: {last.removeprefix('tmpo_trainer: ')}")


def planned(folder: Path) -> int:
    """The number of updates that a run will have, from its settings; 0 before they are written."""
    file = folder / "config.yaml"
    return int(read_yaml(file).get("updates", 0)) if file.exists() else 0


def finished(folder: Path) -> bool:
    """Whether a run has made all its updates, and has written its LoRA and its report: to resume it would measure it again."""
    file = folder / "config.yaml"
    if not file.exists():
        return False
    wanted = [FILE_NAME, *(["report.md"] if read_yaml(file).get("report", True) else [])]
    saved = folder / f"checkpoint-{planned(folder)}"
    return saved.exists() and all((folder / name).exists() for name in wanted)


class TrainingMonitor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_TrainingMonitor",
            display_name="Training Monitor",
            category=CATEGORY,
            **aliases("training progress", "loss curve"),
            description="Shows the curves and the newest sample grid of a run, also while it trains.",
            inputs=[io.String.Input("run", default="tmpo_run", tooltip=RUN_TIP)],
            outputs=[
                io.Image.Output(display_name="curves", tooltip="Rewards, diversity and gradient over the updates."),
                io.Image.Output(display_name="samples", tooltip="The newest sample grid, or black if there is none yet."),
                io.String.Output(display_name="text", tooltip="The first and newest values as text."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, run) -> Any:
        if run is None:
            # It comes from another node.
            return float("nan")
        folder = inside(run, "run")
        shown = [folder / "metrics.jsonl", *sample_grids(folder)[-1:]]
        return [(str(file), file.stat().st_mtime_ns) for file in shown if file.exists()]

    @classmethod
    def execute(cls, run) -> io.NodeOutput:
        from ..tmpo_trainer.pictures import charts

        folder = inside(run, "run")
        lines = read_metrics(folder / "metrics.jsonl")
        if not lines:
            raise ValueError(f"run: {folder} has no metrics.jsonl, or an empty one: choose the folder of a run")
        rewards = [key for key in lines[-1] if key.startswith("reward/")]
        # A run that was resumed may have had other rewards before.
        lines = [line for line in lines if all(key in line for key in rewards)]
        series = {key.removeprefix("reward/"): [line[key] for line in lines] for key in rewards}
        series |= {"LGMD": [line["lgmd"] for line in lines], "gradient norm": [line["grad_norm"] for line in lines]}
        curves = charts.draw([line["update"] for line in lines], series)
        samples, unread = blank(), ""
        if grids := sample_grids(folder):
            try:
                grid = read_picture(grids[-1])
                # That of a large model has more pixels than a node shows.
                grid.thumbnail((MOST_SIDE, MOST_SIDE))
                samples = to_image(grid)
            except ValueError as error:
                unread = f"\n{error}"
        text = f"update {lines[-1]['update']} of {planned(folder)}\n" + "\n".join(
            f"{name}: {values[0]:.4f} -> {np.mean(values[-max(1, len(values) // 10) :]):.4f}"
            for name, values in series.items()
        )
        text += unread
        return io.NodeOutput(to_image(curves), samples, text, ui=ui.PreviewText(text))


def sample_grids(folder: Path) -> list[Path]:
    """The sample grids of a run, newest last. Their names count the updates."""
    return sorted((folder / "samples").glob("[!.]*.png"))


def blank() -> Tensor:
    return torch.zeros(1, 64, 64, 3)
