"""One process at a time in a run's folder."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..settings.errors import ConfigError

#: The file in a run's folder that is locked while it is trained. It stays there; the lock ends with its process.
LOCK = ".lock"

#: A file system without locks, as some network ones are.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
#: Another process holds the lock.
HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}


class Locked(ConfigError):
    """Another process holds the lock."""


def _take(file: IO[bytes]) -> None:
    """Locks an open file without waiting. Raises OSError. The operating system unlocks it when it is closed."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked(path: Path, what: Path) -> Iterator[IO[bytes]]:
    """Holds the lock on the file `path`, which is made, and yields the open file.

    Args:
        what: the run's folder, for messages.

    Raises:
        Locked: another process holds it. ConfigError: the file cannot be made.
    """
    try:
        # Appending keeps what is there, and makes the file if it is missing.
        file = path.open("ab")
    except OSError as error:
        raise ConfigError(f"run folder {what} cannot be written: {error.strerror}") from None
    with file:
        try:
            _take(file)
        except OSError as error:
            if error.errno not in (*NO_LOCKS, *HELD):
                raise ConfigError(f"run folder {what} cannot be locked: {error.strerror}") from None
            if error.errno in HELD:
                raise Locked(
                    f"another process is training in {what}: wait for it, stop it, or give another --output-dir"
                ) from None
            print(f"tmpo_trainer: {what} is on a file system without locks: start no second run in it", file=sys.stderr)
        yield file
