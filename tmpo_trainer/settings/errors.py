"""Errors that a user can fix, each reported in one line."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path


class ConfigError(ValueError):
    """A setting that cannot be used: one line that names the setting and the fix. Exit code 2."""


def suggest(word: str, known: Iterable[str]) -> str:
    """`, did you mean X?` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f", did you mean {near[0]}?" if near else ""


#: Characters of a foreign text, such as a library's error, that one of our lines quotes.
SHOWN = 300


def one_line(text: object, shown: int = SHOWN) -> str:
    """A foreign text or error as a part of one line: at most `shown` characters, and none that a terminal would obey."""
    whole = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return whole if len(whole) <= shown else f"{whole[: shown - 3]}..."


def failure(error: BaseException, file: str | None = None) -> str:
    """An error in code that we called, as a part of one line: its kind, its text, and where it was raised: the innermost line
    of `file`, or without one of all code."""
    # The first frame is our call, which may have failed by itself, for instance by its arguments.
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [frame for frame in frames if frame.filename == file] or frames
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {one_line(error)}{where}"


def quoted(value: object, shown: int = 80) -> str:
    """A value that someone gave, as a part of one line: its `repr`, at most `shown` characters."""
    return one_line(repr(value), shown)
