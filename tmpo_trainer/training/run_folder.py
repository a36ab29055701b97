"""The folder of a run, and what env.json records."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .. import __version__
from ..files import has_metrics
from ..lora import export
from ..processes import together
from ..settings.errors import ConfigError, one_line
from .checkpoint import checkpoints
from .lock import LOCK, locked


def environment(device: torch.device) -> dict[str, Any]:
    """What env.json records: versions and hardware, nothing personal."""
    return {
        "tmpo_trainer": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns an error of the file system into a ConfigError that names the run's folder."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"run folder {folder} cannot be written: {one_line(error)}") from None


def check_free(folder: Path) -> None:
    """Raises ConfigError if the folder of a new run holds a run already, or cannot be made.

    A run that failed in its first update has left nothing to keep.
    """
    if (folder / export.FILE_NAME).exists() and not (folder / "metrics.jsonl").exists():
        raise ConfigError(f"{folder} already holds a LoRA: give another --output-dir")
    kept = checkpoints(folder)
    if kept or (folder / export.FILE_NAME).exists() or has_metrics(folder):
        resume = f"continue it with --resume {folder} or " if kept else ""
        raise ConfigError(f"{folder} already holds a run: {resume}give another --output-dir")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output folder {folder} is a file")
    place = next((each for each in (folder, *folder.absolute().parents) if each.exists()), None)
    if place is None:
        raise ConfigError(f"output folder {folder} cannot be made: {folder.absolute().anchor} does not exist")
    if not place.is_dir():
        raise ConfigError(f"output folder {folder} cannot be made: {place} is a file")
    if not os.access(place, os.W_OK):
        raise ConfigError(f"output folder {folder} cannot be made: {place} is not writable")


def _make_folder(given: Path | None, preset: str, train: bool) -> Path:
    """The folder of a new run, made. Raises ConfigError if it cannot be, or holds a run already."""
    folder = given or Path("outputs") / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    name = folder.name
    for attempt in range(2, 100):
        try:
            if given and train:
                # Another run may have come since the first check.
                check_free(folder)
            elif given and (folder / "metrics.jsonl").exists():
                raise ConfigError(f"{folder} already holds a run: give another --output-dir")
            folder.mkdir(parents=True, exist_ok=given is not None)
            return folder
        except FileExistsError:
            if given:
                raise ConfigError(f"output folder {folder} is a file") from None
            # Another run began in the same second.
            folder = folder.with_name(f"{name}-{attempt}")
        except OSError as error:
            raise ConfigError(f"output folder {one_line(folder)} cannot be made: {error.strerror}") from None
    raise ConfigError(f"output folder {folder} exists already")


def agreed_folder(given: Path | None, preset: str, accelerator: Accelerator, train: bool = True) -> Path:
    """The new run's folder, made by the first process and announced to the others. Raises ConfigError on all of them.

    Args:
        train: False for a folder of figures, which may lie beside a LoRA.
    """
    if accelerator.num_processes == 1:
        return _make_folder(given, preset, train)
    shared: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            shared = [_make_folder(given, preset, train)]
        except ConfigError as error:
            shared = [error]
    broadcast_object_list(shared)
    if isinstance(shared[0], ConfigError):
        raise shared[0]
    return shared[0]


def claim(folder: Path, accelerator: Accelerator, held: ExitStack) -> None:
    """Locks a run's folder, on the first process, until `held` closes.

    Raises:
        ConfigError: on all processes, if another run has the folder or it cannot be written.
    """
    main = accelerator.is_main_process
    together(accelerator, lambda: held.enter_context(locked(folder / LOCK, folder)) if main else None)
