"""Atomic checkpoints and exact resume.

A checkpoint folder holds `lora.safetensors` and `ema.safetensors` (float32 masters), `optimizer.pt` and `state.json`, and
`method.safetensors` if the training method keeps copies of the adapter. `SHA256SUMS` has their checksums, in the format of the
command `sha256sum -c`. The folder is written under another name, flushed to disk and renamed, so a kill at any moment leaves
only whole checkpoints. Noise, branch steps and prompt order are functions of (seed, update): no generator state has to
survive for them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import flush, let_read
from ..settings.errors import ConfigError, one_line

FILES = ("lora.safetensors", "ema.safetensors", "optimizer.pt", "state.json")

#: The checksums of a checkpoint's files. Earlier versions wrote none.
SUMS = "SHA256SUMS"

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

    def moments(self, path: Path, lora: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """The optimiser's state by the number of the parameter.

        Raises:
            ConfigError: names or shapes are not those of this LoRA and its optimiser.
        """
        for part in (self.lora, self.ema, self.tensors or self.lora):
            for name, parameter in lora.items():
                if name not in part or part[name].shape != parameter.shape or len(part) != len(lora):
                    raise ConfigError(f"checkpoint {path} is of another model or LoRA rank (at {name})")
        moments = self.optimizer["state"]
        for key, values in moments.items():
            shapes = {name: value.shape for name, value in values.items()}
            if not 0 <= key < len(lora) or shapes != _shapes(list(lora.values())[key]):
                raise ConfigError(
                    f"checkpoint file {path / FILES[2]} is not of this LoRA's optimiser (parameter {key})"
                )
        return moments


def _shapes(parameter: Tensor) -> dict[str, torch.Size]:
    """The shapes of AdamW's state of a parameter."""
    return {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints that have all their files, oldest first. The files are not read, see `damage`."""
    return [path for path in _numbered(run) if all((path / name).is_file() for name in FILES)]


def number(path: Path) -> int:
    """The updates done at a checkpoint, from its folder's name."""
    return int(path.name.removeprefix("checkpoint-"))


def _numbered(run: Path) -> list[Path]:
    return sorted((p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)), key=number)


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
    """Writes `run/checkpoint-<update>` and deletes all but the last `keep` up to it. `tensors`: of the method.

    Raises:
        OSError, RuntimeError, SafetensorError: it cannot be written; then nothing of it is left.
    """
    final, temporary = run / f"checkpoint-{update}", run / f".checkpoint-{update}.tmp"
    _clean(run)
    try:
        _write(
            temporary, {FILES[0]: lora, FILES[1]: ema, TENSORS: tensors or {}}, optimizer, {"update": update, **state}
        )
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():
        _remove(final)
    temporary.rename(final)
    flush(run)
    # Later ones are there after resuming from an older one: of a run that no longer is.
    whole = checkpoints(run)
    last = whole.index(final) + 1
    for old in whole[: max(last - keep, 0)] + whole[last:]:
        _remove(old)
    return final


def _write(
    folder: Path, tensors: dict[str, dict[str, Tensor]], optimizer: dict[str, Any], state: dict[str, Any]
) -> None:
    folder.mkdir(parents=True)
    for name, values in tensors.items():
        if values:
            save_file({key: value.detach().cpu().contiguous() for key, value in values.items()}, folder / name)
            let_read(folder / name)
    try:
        torch.save(optimizer, folder / "optimizer.pt")
    except RuntimeError as error:
        # torch reports a full disk as an unexpected position in the file.
        raise OSError(f"optimizer.pt cannot be written, is the disk full? ({one_line(error, 120)})") from None
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    written = sorted(folder.iterdir())
    # What was just written is still in memory: this reads nothing from the disk.
    (folder / SUMS).write_bytes("".join(f"{_sha256(path)}  {path.name}\n" for path in written).encode())
    for path in (*written, folder / SUMS, folder):
        flush(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    """Deletes a checkpoint so that a kill half-way does not leave a part of it under its name."""
    doomed = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    # What cannot be deleted, such as a file that Windows has open, is no reason to end the run.
    with suppress(OSError):
        path.rename(doomed)
        shutil.rmtree(doomed)


def _clean(run: Path) -> None:
    """Deletes what a kill left while a checkpoint was written or deleted."""
    for leftover in run.glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def drop_later(run: Path, update: int) -> None:
    """Deletes checkpoints after an update: resuming from it abandons them, and they must not be found again."""
    _clean(run)
    for path in _numbered(run):
        if number(path) > update:
            _remove(path)
            if path.exists():
                raise ConfigError(f"{path} is of an abandoned course and cannot be deleted: close what uses it")


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint folder. Raises ConfigError that names the file to blame."""

    def read(name: str, reader: Callable[[Path], Any]) -> Any:
        try:
            return reader(path / name)
        except MemoryError:
            raise
        except Exception as error:
            raise ConfigError(f"checkpoint file {path / name} cannot be read: {one_line(error)}") from None

    lora, ema = read(FILES[0], _tensors), read(FILES[1], _tensors)
    tensors = next((read(name, _tensors) for name in (TENSORS, OLD_TENSORS) if (path / name).is_file()), {})
    return Checkpoint(lora, ema, read(FILES[2], _optimizer), tensors, read(FILES[3], _state))


def _tensors(file: Path) -> dict[str, Tensor]:
    tensors = load_file(file)
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} is not finite")
    return tensors


def _optimizer(file: Path) -> dict[str, Any]:
    """Reads the optimiser's state as data: neither code in the pickle nor a compressed zeros-filled part is accepted."""
    with zipfile.ZipFile(file) as parts:
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
            raise ValueError("it has compressed parts, which torch.save does not write")
    read = torch.load(file, map_location="cpu", weights_only=True)
    for key, values in read["state"].items():
        if type(key) is not int or not all(isinstance(value, Tensor) for value in values.values()):
            raise ValueError("it is not an optimiser's state")
    return read


def _state(file: Path) -> dict[str, Any]:
    state = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(state, dict) or any(type(state.get(key)) is not int for key in ("update", "seed")):
        raise ValueError("it has no whole numbers update and seed")
    return state


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint folder, as a part of a line; None if they are as they were written.

    A checkpoint of an earlier version has no checksums: it counts as whole if it can be read and is finite.
    """
    try:
        expected = _read_sums(path / SUMS)
        for name in (*FILES, *expected):
            if not (path / name).is_file():
                return f"{name} is missing"
        if not expected:
            load(path)
        for name in expected:
            if _sha256(path / name) != expected[name]:
                return f"{name} differs from its checksum"
    except (FileNotFoundError, ValueError) as error:
        # ConfigError is a ValueError. A file that could not be read just now may be whole: OSError goes on.
        return one_line(error)
    return None


def _read_sums(file: Path) -> dict[str, str]:
    """{file name: SHA-256}; empty if there is no such file. Raises ValueError if it is damaged."""
    if not file.exists():
        return {}
    lines = [line.split() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    sums = {line[1]: line[0] for line in lines if len(line) == 2 and re.fullmatch(r"[a-z]+\.[a-z]+", line[1])}
    if len(sums) != len(lines) or not sums.keys() >= set(FILES):
        raise ValueError(f"{SUMS} is damaged")
    return sums


def updates_of(path: Path) -> int:
    """The number of updates of a checkpoint folder. Raises ConfigError."""
    file = path / "state.json"
    try:
        return int(json.loads(file.read_text())["update"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"checkpoint file {file} cannot be read: {one_line(error)}") from None


def find(resume: str, outputs: Path) -> Path:
    """The checkpoint that `--resume` means: a checkpoint folder, a run's newest, or `latest` of all runs in `outputs`.

    Of a run, damaged checkpoints are passed over with a log line. A damaged checkpoint that was named is an error.

    Raises:
        ConfigError: there is none, or none that is whole.
    """
    try:
        return _find(resume, outputs)
    except OSError as error:
        raise ConfigError(f"--resume {one_line(resume)}: {error.strerror}") from None


def _find(resume: str, outputs: Path) -> Path:
    if resume == "latest":
        every = [
            path for run in ([outputs, *outputs.glob("*")] if outputs.is_dir() else []) for path in checkpoints(run)
        ]
        if not every:
            raise ConfigError(f"--resume latest: no checkpoint under {outputs}")
        return _newest(max(every, key=lambda path: (path / "state.json").stat().st_mtime_ns).parent)
    path = Path(resume).resolve()
    if (re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()) or all((path / name).is_file() for name in FILES):
        wrong = damage(path)
        if wrong is not None:
            raise ConfigError(
                f"checkpoint {path} is damaged ({wrong}): --resume {path.parent} takes the run's last whole one"
            )
        return path
    if not checkpoints(path):
        raise ConfigError(f"--resume {resume}: not a checkpoint nor a run folder that holds one (latest finds one)")
    return _newest(path)


def _newest(run: Path) -> Path:
    """A run's newest whole checkpoint. Raises ConfigError if all are damaged."""
    passed: list[str] = []
    for path in reversed(_numbered(run)):
        wrong = damage(path)
        if wrong is None:
            # Several processes look for it; one says what it found.
            if passed and os.environ.get("RANK", "0") == "0":
                print(f"tmpo_trainer: {'; '.join(passed)}: continuing from {path.name}", file=sys.stderr)
            return path
        passed.append(f"{path.name} of {run} is damaged ({wrong})")
    raise ConfigError(f"{'; '.join(passed)}: {run} has no whole checkpoint, start a new run")
