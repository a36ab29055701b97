"""Experiment trackers, all of them through accelerate: figures, sample grids, settings."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from PIL import Image

from ..settings.config import TrainConfig
from ..settings.errors import ConfigError

PROJECT = "tmpo"

#: Settings that may hold local paths beside names. No tracker gets them.
PLACES = ("model", "features", "reward_models")


def check(tracker: str) -> None:
    """Raises ConfigError, with the install line, if the tracker's package is not there."""
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ConfigError(f"tracker {tracker} is not installed: pip install {tracker}")


def arguments(tracker: str) -> dict[str, Any]:
    """What `Accelerator` is to be made with. The run's folder is known only later, see `start`."""
    if tracker == "none":
        return {}
    return {"log_with": tracker, "project_config": ProjectConfiguration(logging_dir="")}


def start(accelerator: Accelerator, config: TrainConfig, folder: Path) -> None:
    """Begins a tracked run named like its folder. Settings go along; paths do not."""
    if config.tracker == "none":
        return
    accelerator.project_configuration.logging_dir = str(folder)
    settings = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in config.model_dump().items()
        if value is not None and not isinstance(value, Path) and name not in PLACES
    }
    named = {"wandb": {"name": folder.name, "dir": str(folder)}, "trackio": {"name": folder.name}}
    accelerator.init_trackers(PROJECT, settings, {key: value for key, value in named.items() if key == config.tracker})


def log(accelerator: Accelerator, metrics: dict[str, Any], update: int) -> None:
    """The numbers of an update; nested ones as `group/name`."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": number for key, number in value.items() if isinstance(number, int | float)}
        elif isinstance(value, int | float):
            flat[name] = value
    for tracker in accelerator.trackers:
        tracker.log(flat, step=update)


def log_image(accelerator: Accelerator, name: str, picture: Image.Image, update: int) -> None:
    """A sample grid."""
    pixels = np.asarray(picture.convert("RGB"))
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: pixels[None]}, step=update, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [pixels]}, step=update)
        else:
            import trackio  # type: ignore[import-not-found]

            tracker.log({name: trackio.Image(pixels)}, step=update)
