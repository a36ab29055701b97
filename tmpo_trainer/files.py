"""Reads and writes small files that survive a kill at any moment."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path, with the same suffix, for the new content of `path`, and renames it at the end.

    A kill or a full disk leaves either the old file or the new one.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a small file so that a kill leaves either the old or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def has_metrics(run: Path) -> bool:
    """Whether a folder has lines of a run. A run that failed in its first update has left an empty file."""
    file = run / "metrics.jsonl"
    return file.exists() and file.stat().st_size > 0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. A line that is cut short or damaged, or has no whole number `update`, is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    metrics = []
    for line in lines:
        try:
            read = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(read, dict) and type(read.get("update")) is int:
            metrics.append(read)
    return metrics


@cache
def _mode() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def let_read(path: Path) -> None:
    """Gives a file the mode that the user's umask says. safetensors creates files that only their owner may read."""
    # Some file systems have no modes.
    with suppress(OSError):
        path.chmod(_mode())


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":
        # Windows can neither open a folder nor sync a read-only handle.
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems sync no folders.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)
