"""Checks of inputs that name something on this machine: a workflow from elsewhere chooses among what its owner offers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import folder_paths

from ..tmpo_trainer.settings.errors import one_line


def inside(given: str, what: str, more: Sequence[str] = ()) -> Path:
    """Resolves a path against ComfyUI's output folder. It must be inside that folder or one of the other folders.

    A workflow from elsewhere must not read or write anywhere else.

    Raises:
        ValueError: the path is outside of these folders.
    """
    output = Path(folder_paths.get_output_directory()).resolve()
    folders = [Path(folder) for folder in (output, *more)]
    allowed = [*folders, *(folder.resolve() for folder in folders)]
    path = Path(os.path.normpath(output / Path(given).expanduser()))
    # By its text first: on Windows, resolving a path of another machine already connects to that machine.
    if _within(path, allowed):
        path = path.resolve()
        if _within(path, allowed):
            return path
    raise ValueError(f"{what} {one_line(given)} is outside of {output}: choose a path inside it")


def _within(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def one_of(value: str, options: Sequence[str], what: str) -> str:
    """A value that is one of an input's options. ComfyUI checks neither the options of this kind of node nor values that come
    over a link, and a workflow from elsewhere must not have a scorer, a file or a class of its own choice loaded.

    Raises:
        ValueError: it is none of them.
    """
    if value not in options:
        raise ValueError(f"{what}: {one_line(value, 60)} is not in the list: choose another")
    return value
