"""Experiment trackers, all of them through accelerate: figures, sample grids, settings."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from PIL import Image

from ..files import write_text
from ..settings.config import TrainConfig
from ..settings.errors import ConfigError, one_line

PROJECT = "tmpo"

#: Settings that may hold local paths beside names. No tracker gets them.
PLACES = ("model", "features", "reward_models")


def check(tracker: str) -> None:
    """Raises ConfigError, with the line that helps, if the tracker's package or its login is not there."""
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ConfigError(f"tracker {tracker} is not installed: pip install {tracker}")
    offline = os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled")
    # One process alone sends figures.
    if tracker == "wandb" and not offline and os.environ.get("RANK", "0") == "0":
        import wandb  # type: ignore[import-not-found]

        try:
            # In a terminal it asks for the key.
            wandb.login()
        except Exception as error:
            raise ConfigError(
                "tracker wandb is not logged in: run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline "
                f"({one_line(error, 120)})"
            ) from None


def arguments(tracker: str) -> dict[str, Any]:
    """What `Accelerator` is to be made with. The run's folder is known only later, see `start`."""
    if tracker == "none":
        return {}
    return {"log_with": tracker, "project_config": ProjectConfiguration(logging_dir="")}


def start(accelerator: Accelerator, config: TrainConfig, folder: Path, resumed: int | None) -> None:
    """Begins a tracked run named like its folder, or goes on with it. Settings go along; paths do not.

    Args:
        resumed: updates done, if the run goes on.

    Raises:
        ConfigError: the tracker cannot start.
    """
    if config.tracker == "none":
        return
    accelerator.project_configuration.logging_dir = str(folder)
    settings: dict[str, Any] | None = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in config.model_dump().items()
        if value is not None and not isinstance(value, Path) and name not in PLACES
    }
    more: dict[str, Any] = {}
    try:
        if config.tracker == "wandb" and accelerator.is_main_process:
            more = {"name": folder.name, "dir": str(folder), "id": _run_id(folder, resumed), "resume": "allow"}
        elif config.tracker == "trackio":
            more = {"name": folder.name, "resume": "never" if resumed is None else "allow"}
        elif config.tracker == "tensorboard" and resumed is not None:
            # Figures after the checkpoint are sent again. Settings would become another run.
            more, settings = {"purge_step": resumed + 1}, None
        threading.excepthook = _hush_writer
        accelerator.init_trackers(PROJECT, settings, {config.tracker: more})
    except Exception as error:
        raise ConfigError(f"tracker {config.tracker} cannot start: {one_line(error)}") from None


def _hush_writer(failed: threading.ExceptHookArgs) -> None:
    """Prints no traceback of the thread in which tensorboard writes: its next call raises the same error, see `_send`."""
    if not type(failed.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failed)


def _run_id(folder: Path, resumed: int | None) -> str:
    """wandb's id of a run, which the run's folder keeps so that a resumed run goes on under it."""
    file = folder / "wandb-id.txt"
    known = file.read_text(encoding="utf-8", errors="replace").strip() if resumed is not None and file.exists() else ""
    if re.fullmatch(r"[a-z0-9]{8}", known):
        return known
    made = uuid.uuid4().hex[:8]
    write_text(file, made + "\n")
    return made


def _send(accelerator: Accelerator, send: Callable[[Any], None]) -> None:
    """Calls `send` with each tracker. One that fails is left out from then on: training does not depend on it."""
    for tracker in list(accelerator.trackers):
        try:
            send(tracker)
        except Exception as error:
            accelerator.trackers.remove(tracker)
            print(
                f"\ntmpo_trainer: tracker {tracker.name} failed, training goes on without it: {one_line(error)}",
                file=sys.stderr,
            )


def end(accelerator: Accelerator) -> None:
    """Ends the tracked run and the process group."""
    _send(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers.clear()
    accelerator.end_training()


def log(accelerator: Accelerator, metrics: dict[str, Any], update: int) -> None:
    """The numbers of an update; nested ones as `group/name`."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": number for key, number in value.items() if isinstance(number, int | float)}
        elif isinstance(value, int | float):
            flat[name] = value
    _send(accelerator, lambda tracker: tracker.log(flat, step=update))


def log_image(accelerator: Accelerator, name: str, picture: Image.Image, update: int) -> None:
    """A sample grid."""
    pixels = np.asarray(picture.convert("RGB"))

    def send(tracker: Any) -> None:
        if tracker.name == "tensorboard":
            tracker.log_images({name: pixels[None]}, step=update, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [pixels]}, step=update)
        else:
            import trackio  # type: ignore[import-not-found]

            tracker.log({name: trackio.Image(pixels)}, step=update)

    _send(accelerator, send)
