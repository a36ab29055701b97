"""A stderr that outlives its terminal."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, TextIO


class Lasting:
    """A stream whose reader may go away without an error: progress that nobody reads must not end a run.

    A closed connection takes the terminal away, and Ctrl-C in `... 2>&1 | tee log` also ends `tee`.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
