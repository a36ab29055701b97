"""Training runs in separate processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from tqdm import tqdm

from ..lora import export
from ..settings.errors import ConfigError
from ..settings.presets import current
from ..settings.yaml_file import read_yaml
from ..training.checkpoint import checkpoints
from ..training.lock import LOCK, Locked, locked
from ..training.stopping import stopping


class Training:
    """Runs training commands in separate processes, several at a time, and passes signals on to them.

    Args:
        launch: `ddp` or `fsdp2` starts each run with `launch`, on all GPUs of this machine.
    """

    def __init__(self, jobs: int, launch: str | None):
        self.jobs, self.command = jobs, [sys.executable, "-m", "tmpo_trainer", *(["launch", launch] if launch else [])]
        self.stopped: int | None = None
        self._running: set[subprocess.Popen[bytes]] = set()
        # The signal handler runs in the main thread, which may hold it.
        self._lock = threading.RLock()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Passes signals on meanwhile: the children, in sessions of their own, would get none."""
        handlers = {number: signal.signal(number, self._stop) for number in stopping()}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def run(self, runs: Sequence[tuple[Path, Path]], bar: tqdm[Any]) -> list[Path]:
        """Trains every unfinished (settings file, run folder). Returns the folders that failed; see their `log.txt`."""
        with ThreadPoolExecutor(self.jobs) as pool:
            done = list(pool.map(lambda run: self._one(run[0], run[1], bar), runs))
        return [folder for (_, folder), ok in zip(runs, done, strict=True) if not ok]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = number
        with self._lock:
            for process in list(self._running):
                # One that has just ended must not keep the signal from the others.
                with suppress(OSError):
                    if os.name == "nt":
                        process.send_signal(signal.CTRL_BREAK_EVENT)  # type: ignore[attr-defined]
                    else:
                        # With a launcher, its workers must get the signal too, so that they save.
                        os.killpg(process.pid, signal.SIGTERM)

    def _one(self, settings: Path, folder: Path, bar: tqdm[Any]) -> bool:
        """Starts or continues one run. Returns False if it failed, or if it must be left alone; a log line then says why."""
        if self.stopped:
            return False
        try:
            with locked(settings.with_suffix(".lock"), folder) as lock:
                return self._train(settings, folder, bar, lock)
        except Locked:
            bar.write(f"tmpo_trainer: {folder.name} is still being trained by another process", file=sys.stderr)
        except ConfigError as error:
            bar.write(f"tmpo_trainer: {error}", file=sys.stderr)
        return False

    def _train(self, settings: Path, folder: Path, bar: tqdm[Any], lock: IO[bytes]) -> bool:
        """`_one` with the lock. Raises ConfigError if the run must be left alone."""
        known = folder / "config.yaml"
        if known.exists() and _comparable(known) != _comparable(settings):
            raise ConfigError(f"{folder} holds a run with other settings: move it away")
        if (folder / export.FILE_NAME).exists():
            bar.update()
            return True
        folder.mkdir(parents=True, exist_ok=True)
        # A run of its own, or on Windows one whose comparison has died, has this lock alone.
        with locked(folder / LOCK, folder):
            resumed = bool(checkpoints(folder))
            if not resumed:
                for path in folder.glob("*"):
                    if path.name != LOCK:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
        flags = ["--config", str(settings)]
        if resumed:
            asked = read_yaml(settings)
            flags = ["--resume", str(folder), "--device", str(asked["device"]), "--threads", str(asked["threads"])]
        if self.start(flags, folder / "log.txt", lock) != 0:
            return False
        bar.update()
        return True

    def start(self, flags: Sequence[str], log: Path, lock: IO[bytes] | None = None) -> int:
        """Runs training to its end. The child keeps `lock` while it or anything it started lives, even if we die."""
        with log.open("ab") as out:
            with self._lock:
                if self.stopped:
                    return 130
                windows = os.name == "nt"
                # A session of its own, on Windows a group, because the terminal's Ctrl-C would otherwise reach the child too.
                process = subprocess.Popen(
                    [*self.command, *flags],
                    stdout=out,
                    stderr=out,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    creationflags=subprocess.CREATE_NEW_PROCESS_GROUP if windows else 0,  # type: ignore[attr-defined]
                    pass_fds=() if lock is None or windows else (lock.fileno(),),
                )
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
        return code


def _comparable(file: Path) -> dict[str, Any]:
    settings = current(str(file), read_yaml(file))
    return {key: value for key, value in settings.items() if key not in ("threads", "device", "output_dir")}
