"""Training from within ComfyUI, in a process of its own, and a look at a run's progress."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..tmpo_trainer.files import read_metrics
from ..tmpo_trainer.lora.file import FILE_NAME
from .images import to_image
from .types import CATEGORY, inside

PACK = Path(__file__).parents[1]
INSTALL = f'pip install -c constraints.txt -e ".[train]" in {PACK}, or name an interpreter that has it in TMPO_PYTHON'
RUN_TIP = "A run's folder, in ComfyUI's output folder."
#: Flags that lead elsewhere, or start other programs.
REFUSED = ("launch", "--output-dir", "--config", "--resume")
#: Seconds that a cancelled run has to save.
SAVING = 120
#: Seconds between two looks at a run.
LOOK = 0.5


def missing_packages(python: str) -> str | None:
    """What an interpreter says when it imports what training needs; None if all is there. Raises ValueError."""
    code = "import accelerate, diffusers, peft, matplotlib, pydantic, yaml, cv2, rapidocr"
    try:
        # -P: no module of the same name from the current folder.
        tried = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"python {python} cannot be run ({error}): give the path of an interpreter") from None
    return None if tried.returncode == 0 else (tried.stderr.strip().splitlines() or ["it failed"])[-1]


class Train(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_Train",
            display_name="Train TMPO LoRA",
            category=CATEGORY,
            description="Runs `python -m tmpo_trainer` in a process of its own and gives the LoRA's path. Cancel saves a "
            "checkpoint; queueing again continues it.",
            inputs=[
                io.String.Input("output_dir", default="tmpo_run", tooltip=RUN_TIP),
                io.String.Input(
                    "flags", multiline=True, default="--preset demo",
                    tooltip="As on the command line, e.g. --model FOLDER --reward pickscore --updates 300. "
                    "`python -m tmpo_trainer --help` lists them.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="lora_path", tooltip="For Load TMPO LoRA."),
                io.String.Output(display_name="report", tooltip="The run's report, as Markdown."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, output_dir, flags) -> Any:
        # Run again if its LoRA is gone, or another run has written one.
        file = inside(output_dir, "output_dir") / FILE_NAME
        return file.stat().st_mtime_ns if file.exists() else float("nan")

    @classmethod
    def execute(cls, output_dir, flags) -> io.NodeOutput:
        # No input of the node: a workflow from elsewhere must not choose a program.
        python = os.environ.get("TMPO_PYTHON", sys.executable)
        missing = missing_packages(python)
        if missing is not None:
            raise ValueError(f"the trainer cannot run with {Path(python).name}: {missing}. Install it: {INSTALL}")
        try:
            words = shlex.split(flags)
        except ValueError as error:
            raise ValueError(f"flags: {error}") from None
        refused = [word for word in words if word.split("=")[0] in REFUSED]
        if refused:
            raise ValueError(f"flags: {refused[0]} is not for this node, which has output_dir for its folder")
        folder = inside(output_dir, "output_dir")
        asked = folder / "flags.txt"
        if any(folder.glob("checkpoint-*")):
            before = asked.read_text(encoding="utf-8") if asked.exists() else ""
            if before != shlex.join(words):
                raise ValueError(f"{folder} holds a run with other flags ({before}): choose another output_dir")
            words = ["--resume", str(folder)]
        else:
            folder.mkdir(parents=True, exist_ok=True)
            asked.write_text(shlex.join(words), encoding="utf-8")
            words += ["--output-dir", str(folder)]
        run(python, words, folder)
        report = folder / "report.md"
        text = report.read_text(encoding="utf-8") if report.exists() else "no report"
        return io.NodeOutput(str(folder / FILE_NAME), text, ui=ui.PreviewText(text))


def run(python: str, words: list[str], folder: Path) -> None:
    """Trains, with progress and cancel. Raises ValueError with the trainer's last line if it fails."""
    # Weights that ComfyUI holds would be in the way.
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    places = [str(PACK), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    bar = comfy.utils.ProgressBar(1)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        windows = os.name == "nt"
        process = subprocess.Popen(
            [python, "-P", "-m", "tmpo_trainer", *words],
            env=environment,
            stderr=errors,
            stdout=subprocess.DEVNULL,
            # Ctrl-Break reaches groups alone.
            creationflags=subprocess.CREATE_NEW_PROCESS_GROUP if windows else 0,  # type: ignore[attr-defined]
        )
        try:
            while process.poll() is None:
                comfy.model_management.throw_exception_if_processing_interrupted()
                done = len(read_metrics(folder / "metrics.jsonl"))
                bar.update_absolute(done, max(planned(folder), 1))
                time.sleep(LOOK)
        except BaseException:
            # It saves a checkpoint and ends.
            process.send_signal(signal.CTRL_BREAK_EVENT if windows else signal.SIGINT)  # type: ignore[attr-defined]
            try:
                process.wait(SAVING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
        errors.seek(0)
        told = [line for line in errors.read().replace("\r", "\n").splitlines() if line.strip()]
    if process.returncode:
        last = next((line for line in reversed(told) if line.startswith("tmpo_trainer:")), (told or ["no message"])[-1])
        raise ValueError(f"training ended with exit code {process.returncode}: {last.removeprefix('tmpo_trainer: ')}")


def planned(folder: Path) -> int:
    """Updates that a run is to have, from its settings; 0 before they are written."""
    for line in (folder / "config.yaml").read_text().splitlines() if (folder / "config.yaml").exists() else []:
        if line.startswith("updates:"):
            return int(line.split(":")[1])
    return 0


class TrainingMonitor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_TrainingMonitor",
            display_name="Training Monitor",
            category=CATEGORY,
            description="Curves and the newest sample grid of a run, also while it trains.",
            inputs=[io.String.Input("run", default="tmpo_run", tooltip=RUN_TIP)],
            outputs=[
                io.Image.Output(display_name="curves", tooltip="Rewards, diversity and gradient over the updates."),
                io.Image.Output(display_name="samples", tooltip="The newest sample grid; black before the first."),
                io.String.Output(display_name="text", tooltip="First and newest values in words."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, run) -> Any:
        folder = inside(run, "run")
        shown = [folder / "metrics.jsonl", *sample_grids(folder)[-1:]]
        return [(str(file), file.stat().st_mtime_ns) for file in shown if file.exists()]

    @classmethod
    def execute(cls, run) -> io.NodeOutput:
        from ..tmpo_trainer.pictures import charts

        folder = inside(run, "run")
        lines = read_metrics(folder / "metrics.jsonl")
        if not lines:
            raise ValueError(f"{folder} holds no run: metrics.jsonl is missing or empty")
        rewards = [key for key in lines[-1] if key.startswith("reward/")]
        series = {key.removeprefix("reward/"): [line[key] for line in lines] for key in rewards}
        series |= {"LGMD": [line["lgmd"] for line in lines], "gradient norm": [line["grad_norm"] for line in lines]}
        curves = charts.draw([line["update"] for line in lines], series)
        grids = sample_grids(folder)
        samples = to_image(Image.open(grids[-1])) if grids else blank()
        text = f"update {lines[-1]['update']} of {planned(folder)}\n" + "\n".join(
            f"{name}: {values[0]:.4f} -> {np.mean(values[-max(1, len(values) // 10) :]):.4f}"
            for name, values in series.items()
        )
        return io.NodeOutput(to_image(curves), samples, text, ui=ui.PreviewText(text))


def sample_grids(folder: Path) -> list[Path]:
    """Of a run, the newest last: their names count the updates."""
    return sorted((folder / "samples").glob("*.png"))


def blank() -> Tensor:
    return torch.zeros(1, 64, 64, 3)
