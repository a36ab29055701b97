"""Paths in settings and flags: `~`, and what makes them independent of the current folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from .errors import ConfigError

#: Values of `model` and `features` that are never a path, even if a folder has that name.
NAMES = ("demo", "efficientnet-lite0")
#: What file systems allow: bytes of a name, characters of a path.
LONGEST_NAME, LONGEST_PATH = 255, 4096


def expanded(text: str) -> str:
    """A path as typed, with `~` and `~user` replaced by the home folder.

    A shell expands only a word that begins with `~`: neither `--flag=~/x` nor `NAME=~/x`, nor anything in YAML.

    Raises:
        ConfigError: there is no such home folder, or no file can have such a path.
    """
    found = os.path.expanduser(text)
    if found.startswith("~"):
        name = re.split(r"[/\\]", found)[0]
        raise ConfigError(f"the home folder {name[:50]} is not known: if {name[:50]} is a file, write ./{name[:50]}")
    long = len(found) > LONGEST_PATH or any(_length(part) > LONGEST_NAME for part in Path(found).parts)
    if long or "\0" in found:
        raise ConfigError(f"a path has no NUL character and no name of more than {LONGEST_NAME} bytes")
    return found


def _length(name: str) -> int:
    """The length of a file's name as its file system counts: in bytes, on Windows in units of UTF-16."""
    return len(name.encode("utf-16-le", "replace")) // 2 if os.name == "nt" else len(name.encode(errors="replace"))


def absolute(text: str) -> str:
    """A name or path as an absolute path if it exists; a name, a hub id or an address is returned unchanged."""
    return text if text in NAMES or not Path(text).exists() else str(Path(text).absolute())


def in_entry(change: Callable[[str], str], entry: str) -> str:
    """NAME=PATH with a function applied to PATH."""
    name, equals, path = entry.partition("=")
    return f"{name}{equals}{change(path)}" if path else entry


def _expanded(value: Any) -> Any:
    # Before pydantic makes it a Path: as a Path, ./~ is the same as ~.
    return expanded(value) if isinstance(value, str) else value


#: Types of settings: a path; a name, hub id or path; NAME=PATH.
LocalPath = Annotated[Path, BeforeValidator(_expanded)]
Place = Annotated[str, AfterValidator(expanded)]
NamedPlace = Annotated[str, AfterValidator(lambda entry: in_entry(expanded, entry))]
