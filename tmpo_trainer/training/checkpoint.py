"""Atomic checkpoints and exact resume.

A checkpoint folder holds `lora.safetensors` and `ema.safetensors` (float32 masters), `optimizer.pt` and `state.json`, and
`method.safetensors` if the training method keeps copies of the adapter. It is written under another name, flushed to disk and
renamed, so a kill at any moment leaves only whole checkpoints. Noise, branch steps and prompt order are functions of (seed,
update): no generator state has to survive for them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import flush
from ..settings.errors import ConfigError, one_line

FILES = ("lora.safetensors", "ema.safetensors", "optimizer.pt", "state.json")

#: Copies of the adapter that a method keeps, and the name that earlier versions gave to GARDO's.
TENSORS, OLD_TENSORS = "method.safetensors", "reference.safetensors"


@dataclass
class Checkpoint:
    """What a checkpoint folder holds: LoRA and its average, the optimiser's state, the method's copies, and state.json."""

    lora: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def checkpoints(run: Path) -> list[Path]:
    """A run's whole checkpoints, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(
        (path for path in found if all((path / name).is_file() for name in FILES)), key=lambda p: int(p.name[11:])
    )


def save(
    run: Path,
    update: int,
    lora: dict[str, Tensor],
    ema: dict[str, Tensor],
    optimizer: dict[str, Any],
    state: dict[str, Any],
    keep: int,
    tensors: dict[str, Tensor] | None = None,
) -> Path:
    """Writes `run/checkpoint-<update>` and deletes all but the last `keep` up to it. `tensors`: of the method."""
    final, temporary = run / f"checkpoint-{update}", run / f".checkpoint-{update}.tmp"
    for leftover in run.glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in lora.items()}, temporary / "lora.safetensors")
    save_file({k: v.detach().cpu().contiguous() for k, v in ema.items()}, temporary / "ema.safetensors")
    if tensors:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / TENSORS)
        flush(temporary / TENSORS)
    torch.save(optimizer, temporary / "optimizer.pt")
    (temporary / "state.json").write_text(json.dumps({"update": update, **state}, indent=2))
    for name in FILES:
        flush(temporary / name)
    flush(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    flush(run)
    # Later ones are there after resuming from an older one: of a run that no longer is.
    whole = checkpoints(run)
    last = whole.index(final) + 1
    for old in whole[: max(last - keep, 0)] + whole[last:]:
        shutil.rmtree(old)
    return final


def drop_later(run: Path, update: int) -> None:
    """Deletes checkpoints after an update: resuming from it abandons them, and they must not be found again."""
    for path in checkpoints(run):
        if int(path.name[11:]) > update:
            shutil.rmtree(path)


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint folder. Raises ConfigError that names the file to blame."""

    def optimizer(file: Path) -> Any:
        return torch.load(file, map_location="cpu", weights_only=True)

    def read(name: str, reader: Callable[[Path], Any]) -> Any:
        try:
            return reader(path / name)
        except Exception as error:
            raise ConfigError(f"checkpoint file {path / name} cannot be read: {one_line(error)}") from None

    lora, ema = read(FILES[0], load_file), read(FILES[1], load_file)
    tensors = next((read(name, load_file) for name in (TENSORS, OLD_TENSORS) if (path / name).is_file()), {})
    return Checkpoint(
        lora, ema, read(FILES[2], optimizer), tensors, read(FILES[3], lambda file: json.loads(file.read_text()))
    )


def updates_of(path: Path) -> int:
    """The number of updates of a checkpoint folder. Raises ConfigError."""
    file = path / "state.json"
    try:
        return int(json.loads(file.read_text())["update"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"checkpoint file {file} cannot be read: {one_line(error)}") from None


def find(resume: str, outputs: Path) -> Path:
    """The checkpoint that `--resume` means: a checkpoint folder, a run's newest, or `latest` of all runs in `outputs`."""
    if resume == "latest":
        every = [
            path for run in ([outputs, *outputs.glob("*")] if outputs.is_dir() else []) for path in checkpoints(run)
        ]
        if not every:
            raise ConfigError(f"--resume latest: no checkpoint under {outputs}")
        return max(every, key=lambda path: (path / "state.json").stat().st_mtime_ns)
    path = Path(resume).resolve()
    if all((path / name).is_file() for name in FILES):
        return path
    inside = checkpoints(path)
    if not inside:
        raise ConfigError(f"--resume {resume}: not a checkpoint nor a run folder that holds one (latest finds one)")
    return inside[-1]
