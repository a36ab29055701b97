"""What `fingerprint_inputs` returns where a node learns only when it runs which file it reads or writes."""

from __future__ import annotations

from pathlib import Path


class Changes:
    """Counts how often something else has changed the files that a node has read or written.

    The count that ComfyUI sees before a run is the one that it sees after it, so that the node itself, and all that follow
    it, stay cached. NaN would have them run at every queue.
    """

    def __init__(self) -> None:
        self._seen: dict[Path, int | None] = {}
        self._count: dict[Path, int] = {}

    def note(self, file: Path) -> None:
        """Called by the node when it has read or written a file."""
        self._seen[file] = _time(file)

    def count(self, file: Path | None = None) -> int:
        """The changes of a file so far, or of all. A file that no node has noted has none."""
        for known, before in self._seen.items():
            if (now := _time(known)) != before:
                self._seen[known] = now
                self._count[known] = self._count.get(known, 0) + 1
        return sum(self._count.values()) if file is None else self._count.get(file, 0)


def _time(file: Path) -> int | None:
    """When a file was changed, in nanoseconds; None if there is none."""
    return file.stat().st_mtime_ns if file.exists() else None
