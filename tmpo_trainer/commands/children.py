"""Training runs in separate processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import IO, Any

from tqdm import tqdm

from ..lora import export
from ..settings.errors import ConfigError
from ..settings.presets import current
from ..settings.yaml_file import read_yaml
from ..training.checkpoint import checkpoints


class Training:
    """Runs training commands in separate processes, several at a time, and passes signals on to them.

    Args:
        launch: `ddp` or `fsdp2` starts each run with `launch`, on all GPUs of this machine.
    """

    def __init__(self, jobs: int, launch: str | None):
        self.jobs, self.command = jobs, [sys.executable, "-m", "tmpo_trainer", *(["launch", launch] if launch else [])]
        self.stopped: int | None = None
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, runs: Sequence[tuple[Path, Path]], bar: tqdm[Any]) -> list[Path]:
        """Trains every unfinished (settings file, run folder). Returns the folders that failed; see their `log.txt`."""
        numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
        handlers = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                done = list(pool.map(lambda run: self._one(run[0], run[1], bar), runs))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return [folder for (_, folder), ok in zip(runs, done, strict=True) if not ok]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = number
        with self._lock:
            for process in self._running:
                if os.name == "nt":
                    process.terminate()
                else:
                    # With a launcher, its workers must get the signal too, so that they save.
                    os.killpg(process.pid, signal.SIGTERM)

    def _one(self, settings: Path, folder: Path, bar: tqdm[Any]) -> bool:
        """Starts or continues one run. Returns False if it failed, or if it must be left alone; a log line then says why."""
        if self.stopped:
            return False
        with settings.with_suffix(".lock").open("w") as lock:
            if not _locked(lock):
                bar.write(f"tmpo_trainer: {folder.name} is still being trained by another process", file=sys.stderr)
                return False
            known = folder / "config.yaml"
            try:
                other = known.exists() and _comparable(known) != _comparable(settings)
            except ConfigError as error:
                bar.write(f"tmpo_trainer: {error}", file=sys.stderr)
                return False
            if other:
                bar.write(f"tmpo_trainer: {folder} holds a run with other settings: move it away", file=sys.stderr)
                return False
            if (folder / export.FILE_NAME).exists():
                bar.update()
                return True
            if checkpoints(folder):
                asked = read_yaml(settings)
                flags = ["--resume", str(folder), "--device", str(asked["device"]), "--threads", str(asked["threads"])]
            else:
                for path in folder.glob("*"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                flags = ["--config", str(settings)]
            folder.mkdir(parents=True, exist_ok=True)
            if self.start(flags, folder / "log.txt", lock) != 0:
                return False
            bar.update()
            return True

    def start(self, flags: Sequence[str], log: Path, lock: IO[str] | None = None) -> int:
        """Runs training to its end. The child keeps `lock` while it or anything it started lives, even if we die."""
        with log.open("ab") as out:
            with self._lock:
                if self.stopped:
                    return 130
                # A session of its own, because the terminal's Ctrl-C would otherwise reach the child too.
                process = subprocess.Popen(
                    [*self.command, *flags],
                    stdout=out,
                    stderr=out,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=() if lock is None or os.name == "nt" else (lock.fileno(),),
                )
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
        return code


def _locked(file: IO[str]) -> bool:
    """Takes the lock on a file. Returns whether this process has it; always True on Windows, which has no flock."""
    if os.name == "nt":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _comparable(file: Path) -> dict[str, Any]:
    settings = current(str(file), read_yaml(file))
    return {key: value for key, value in settings.items() if key not in ("threads", "device", "output_dir")}
