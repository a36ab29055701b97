"""Where a scorer's weights are: a path that the user gives, or the hub's cache, which is filled if there is a network."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...hub import hub_file
from ...settings.errors import ConfigError, one_line

#: A hub repository and the names of the files that are needed from it.
Source = tuple[str, tuple[str, ...]]


def hub_folder(scorer: str, source: Source) -> Path:
    """The folder of a scorer's files from a hub repository. Raises ConfigError for the first that is not available."""
    repository, names = source
    files = [hub_file(f"reward {scorer}", repository, name, f"--reward-models {scorer}=PATH") for name in names]
    return files[0].parent


def existing(scorer: str, path: str) -> Path:
    """A path given by the user. Raises ConfigError if it does not exist."""
    found = Path(path).expanduser()
    if not found.exists():
        raise ConfigError(f"--reward-models {scorer}={path}: {found} does not exist")
    return found


def read_tensors(scorer: str, file: Path, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file. Nothing but tensors is ever unpickled from a torch file.

    Args:
        key: the entry that holds the tensors, if they are inside another dictionary.
    """
    if file.is_dir():
        raise ConfigError(f"reward {scorer}: {file} is a folder: give the checkpoint's file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        found = dict(found[key] if key is not None and key in found else found)
        if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()):
            raise ValueError("it holds more than named tensors")
        if any(value.untyped_storage().nbytes() < value.numel() * value.element_size() for value in found.values()):
            # A tensor that repeats a few numbers would take its whole size when it is converted.
            raise ValueError("a tensor is larger than its numbers in the file")
        return found
    # Damaged bytes make torch's unpickler raise anything, and its own error is not public.
    except Exception as error:
        more = type(error).__name__ == "UnpicklingError"
        reason = "it holds more than tensors, or is damaged" if more else one_line(error)
        raise ConfigError(f"reward {scorer}: {file} cannot be read ({reason}): download it again") from None


def fill(scorer: str, file: Path, module: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads tensors into a module. Raises ConfigError if a key is missing or unknown, or a tensor has another shape."""
    own = module.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys()) or [k for k, v in own.items() if v.shape != tensors[k].shape]
    if wrong:
        raise ConfigError(f"reward {scorer}: {file} is not its checkpoint (at {wrong[0]})")
    module.load_state_dict(dict(tensors))
