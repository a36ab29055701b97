"""Disturbs training runs at random points and checks that they go on as if nothing had happened.

Each case is a run of the demo model of a few updates that is killed, interrupted, or loses its disk, its reward server, its
memory or its second process. It is resumed to its end. It survives if

- its LoRA and its figures are bit for bit those of an undisturbed run,
- no file was half-written, and nothing was lost that a checkpoint had to hold,
- what it printed was a line and no traceback.

The process imports the trainer once and forks every run, so a case takes seconds. Results are kept in `--output-dir`: the
same command continues where it stopped. It needs Linux or macOS; the full disk is a tmpfs where this process may mount one
(root on Linux), otherwise a limit on the size of files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

import tmpo_trainer
from tmpo_trainer import tree
from tmpo_trainer.commands import main as command_line
from tmpo_trainer.commands import serve, train  # noqa: F401  (imported before the first fork)
from tmpo_trainer.files import read_metrics
from tmpo_trainer.lora.file import FILE_NAME
from tmpo_trainer.rewards import remote, sharpness  # noqa: F401
from tmpo_trainer.training import checkpoint

UPDATES, EVERY = 6, 2
FLAGS = f"""--preset demo --method tmpo --reward sharpness --updates {UPDATES} --checkpoint-every {EVERY}
    --prompts-per-update 1 --prompts-per-batch 1 --rollout-steps 6 --branching 2 --branch-early 1 2 3 --branch-late 1 3 4
    --resolution 32 32 --lora-rank 4 --lora-alpha 8 --ema-every 1 --sample-every 0 --no-report --threads 1""".split()
REPORT = "--report --eval-images 2 --eval-steps 2 --eval-limit 2 --eval-every 3 --sample-every 3".split()  # noqa: SIM905
#: Seconds after which a run counts as hung.
PATIENCE = 120


class Broken(Exception):
    """A case that did not survive, and why."""


@dataclass
class Run:
    """A run in a process of its own.

    folder: the run's. log: what it printed. flags: of the command line. prepare: is called in the process first.
    """

    folder: Path
    flags: list[str]
    prepare: Callable[[], object] = lambda: None
    environment: Mapping[str, str] = field(default_factory=dict)
    pid: int = 0

    @property
    def log(self) -> Path:
        return self.folder.parent / f"log-{self.pid}.txt"

    def start(self) -> Run:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self.pid = os.getpid()
            code = 70
            try:
                out = os.open(self.log, os.O_WRONLY | os.O_CREAT)
                os.dup2(out, 1)
                os.dup2(out, 2)
                os.environ.update(self.environment)
                self.prepare()
                code = command_line.main(self.flags)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        return self

    def wait(self) -> int:
        """The exit code; a signal is negative. Raises Broken for a traceback or a run that hangs."""
        deadline = time.monotonic() + PATIENCE
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise Broken("hung")
            time.sleep(0.005)
        if "Traceback" in self.said():
            raise Broken(f"traceback: {self.said().splitlines()[-1]}")
        return os.waitstatus_to_exitcode(status)

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def error(self) -> str:
        """Its last line of ours, of which a failure must have one. Raises Broken if there is none."""
        lines = [line for line in re.split(r"[\r\n]", self.said()) if line.startswith("tmpo_trainer: ")]
        if not lines:
            raise Broken(f"ended without a line of its own: {self.said()[-200:]!r}")
        return lines[-1]


@dataclass
class Case:
    """What a kind of disturbance gets: a folder of its own, random numbers, and the flags and the end of its run.

    share: how far the run comes before it is disturbed, 0 to 1. The cases of a kind share the run out evenly.
    """

    place: Path
    draw: random.Random
    share: float
    flags: list[str]
    like: Path

    @property
    def folder(self) -> Path:
        return self.place / "run"

    def new(self, prepare: Callable[[], object] = lambda: None, folder: Path | None = None) -> Run:
        folder = folder or self.folder
        return Run(folder, [*self.flags, "--output-dir", str(folder)], prepare).start()

    def wait_for(self, seconds: float) -> None:
        """Waits until the run has come as far as `share`: by its updates, so that a busy machine changes nothing.

        Args:
            seconds: of a whole run.
        """
        done, part = divmod(self.share * (UPDATES + 1), 1)
        deadline = time.monotonic() + PATIENCE
        while len(read_metrics(self.folder / "metrics.jsonl")) < done and time.monotonic() < deadline:
            time.sleep(0.005)
        # Starting takes about as long as the updates.
        time.sleep(part * seconds / (2 if done == 0 else 2 * UPDATES))

    def resume(self, prepare: Callable[[], object] = lambda: None, folder: Path | None = None) -> Run:
        folder = folder or self.folder
        if self.draw.random() < 0.5:
            return Run(folder, ["--resume", str(folder)], prepare).start()
        return Run(folder, ["--resume", "latest", "--output-dir", str(folder.parent)], prepare).start()

    def finish(self, folder: Path | None = None) -> str:
        """Checks what is there, resumes it, and compares the end. Returns a note."""
        folder = folder or self.folder
        sound(folder)
        done, whole = len(read_metrics(folder / "metrics.jsonl")), checkpoint.checkpoints(folder)
        if not whole:
            if done > EVERY:
                raise Broken(f"no checkpoint after {done} updates")
            shutil.rmtree(folder, ignore_errors=True)
            run, note = self.new(folder=folder), "before the first checkpoint"
        else:
            if checkpoint.number(whole[-1]) < (done - 1) // EVERY * EVERY:
                raise Broken(f"{whole[-1].name} is the last one after {done} updates")
            run, note = self.resume(folder=folder), "resumed"
        if (code := run.wait()) != 0:
            raise Broken(f"resuming ended with {code}: {run.error()}")
        same(folder, self.like)
        return note


def sound(folder: Path) -> None:
    """Raises Broken if a file under its final name is not whole."""
    for path in folder.glob("checkpoint-*"):
        if wrong := checkpoint.damage(path):
            raise Broken(f"{path.name}: {wrong}")
    for path in folder.rglob("[!.]*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".png":
                with Image.open(path) as picture:
                    picture.load()
            elif path.suffix == ".safetensors":
                load_file(path)
        except Exception as error:
            raise Broken(f"{path.name} is half-written: {error}") from None


def same(folder: Path, like: Path) -> None:
    """Raises Broken if LoRA, average or figures differ in a bit, or if something temporary is left."""
    sound(folder)
    for name in (FILE_NAME, f"checkpoint-{UPDATES}/lora.safetensors", f"checkpoint-{UPDATES}/ema.safetensors"):
        ours, theirs = load_file(folder / name), load_file(like / name)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            raise Broken(f"{name} differs from that of an undisturbed run")
    ours, theirs = (
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(path / "metrics.jsonl")]
        for path in (folder, like)
    )
    if ours != theirs:
        raise Broken("metrics.jsonl differs from that of an undisturbed run")
    left = [path.name for path in folder.rglob(".*") if path.name != ".lock"]
    if left:
        raise Broken(f"left behind: {left[0]}")


# -- undisturbed runs ----------------------------------------------------------------------------------------------


@cache
def undisturbed(place: Path, *more: str) -> tuple[Path, float, int]:
    """(folder, seconds, file operations) of a run with these flags on top."""
    folder, counted = place / f"undisturbed-{zlib.crc32(' '.join(more).encode())}" / "run", place / "operations.txt"
    shutil.rmtree(folder.parent, ignore_errors=True)
    start = time.monotonic()
    run = Run(folder, [*FLAGS, *more, "--output-dir", str(folder)], lambda: operations(folder, 0, counted)).start()
    if run.wait() != 0:
        raise SystemExit(f"the undisturbed run failed: {run.said()}")
    if not any(value.any() for name, value in load_file(folder / FILE_NAME).items() if ".lora_B." in name):
        raise SystemExit("the undisturbed run learnt nothing")
    return folder, time.monotonic() - start, len(counted.read_text())


def operations(folder: Path, last: int, counted: Path | None = None) -> None:
    """Counts what this process opens, makes, renames and deletes in a folder, and kills it at number `last`."""
    events = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}
    state = {"done": 0, "busy": False}

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in events or state["busy"] or not str(arguments[0]).startswith(str(folder)):
            return
        state["busy"] = True
        state["done"] += 1
        if counted is not None:
            with counted.open("a") as file:
                file.write(".")
        if state["done"] == last:
            os.kill(os.getpid(), signal.SIGKILL)
        state["busy"] = False

    if counted is not None:
        counted.write_text("")
    sys.addaudithook(hook)


# -- kinds of disturbance: each returns a note ---------------------------------------------------------------------


def signalled(case: Case, *numbers: signal.Signals) -> str:
    """Signals at a random moment of the run."""
    run = case.new()
    case.wait_for(undisturbed(case.place.parent)[1])
    for number in numbers:
        os.kill(run.pid, number)
        time.sleep(0.02)
    code = run.wait()
    if code == 130 and "saved, continue with" in run.error():
        done = len(read_metrics(case.folder / "metrics.jsonl"))
        if not (case.folder / f"checkpoint-{done}").is_dir():
            raise Broken(f"update {done} was not saved")
    elif code not in (0, 130, *(-number for number in numbers)):
        raise Broken(f"ended with {code}: {run.error()}")
    return case.finish()


def killed(case: Case) -> str:
    return signalled(case, signal.SIGKILL)


def terminated(case: Case) -> str:
    return signalled(case, signal.SIGTERM)


def interrupted(case: Case) -> str:
    return signalled(case, signal.SIGINT)


def interrupted_twice(case: Case) -> str:
    return signalled(case, signal.SIGINT, signal.SIGINT)


def killed_while_writing(case: Case) -> str:
    """SIGKILL at a random file operation: in a checkpoint, the export, the report. Then again while resuming."""
    case.like, _, count = undisturbed(case.place.parent, *REPORT)
    case.flags = [*FLAGS, *REPORT]
    last = 1 + int(case.share * count)
    if case.new(lambda: operations(case.folder, last)).wait() != -signal.SIGKILL:
        raise Broken("was not killed")
    sound(case.folder)
    if checkpoint.checkpoints(case.folder):
        case.resume(lambda: operations(case.folder, case.draw.randint(1, count // 3))).wait()
    return case.finish()


def damaged(case: Case) -> str:
    """A byte of the newest checkpoint is flipped, or a file cut: the one before is used."""
    if case.new().wait() != 0:
        raise Broken("did not train")
    older, newest = checkpoint.checkpoints(case.folder)
    file = case.draw.choice([path for path in newest.iterdir() if path.stat().st_size])
    content = bytearray(file.read_bytes())
    place = case.draw.randrange(len(content))
    content[place] ^= 1 << case.draw.randrange(8)
    file.write_bytes(content if case.draw.random() < 0.5 else content[:place])
    run = case.resume()
    if run.wait() != 0 or f"{newest.name} of {case.folder} is damaged" not in run.said():
        raise Broken(f"damage in {file.name}: {run.said()[-300:]}")
    if f"continuing from {older.name}" not in run.said():
        raise Broken("went on from elsewhere")
    same(case.folder, case.like)
    return file.name


def full_disk(case: Case) -> str:
    """The disk is full at a random point. There is room when the run is resumed."""
    with small_disk(case.place / "disk", case.draw.randrange(8, 1900)) as (disk, limit, enlarge):
        run = case.new(limit, disk / "run")
        code = run.wait()
        if code not in (0, 1, 2):
            raise Broken(f"ended with {code}")
        if code and not re.search("No space|File too large|disk full", run.error()):
            raise Broken(run.error())
        enlarge()
        return case.finish(disk / "run")


@contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[tuple[Path, Callable[[], object], Callable[[], object]]]:
    """Yields a folder for few kilobytes, what a process must call that is to feel it, and what makes room."""
    path.mkdir(parents=True, exist_ok=True)

    def mount(*options: str) -> bool:
        return subprocess.run(["mount", *options], capture_output=True).returncode == 0

    if mountable() and mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)):
        try:
            yield path, lambda: None, lambda: mount("-o", "remount,size=64m", str(path))
        finally:
            subprocess.run(["umount", str(path)], check=True)
    else:
        size = kilobytes * 200
        yield path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)), lambda: None


def mountable() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0


def read_only(case: Case) -> str:
    """The run's folder cannot be written when the run is to be resumed."""
    with small_disk(case.place / "disk", 64_000) as (disk, _, _):
        folder = disk / "run"
        run = case.new(folder=folder)
        while len(read_metrics(folder / "metrics.jsonl")) <= EVERY:
            time.sleep(0.005)
        os.kill(run.pid, signal.SIGTERM)
        run.wait()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)] if mountable() else ["chmod", "-R", "a-w", str(folder)])
        try:
            again = Run(folder, ["--resume", str(folder)])
            # Its log cannot be there.
            again.folder = case.place / "elsewhere" / "run"
            code, line = again.start().wait(), again.error()
        finally:
            subprocess.run(
                ["mount", "-o", "remount,rw", str(disk)] if mountable() else ["chmod", "-R", "u+w", str(folder)]
            )
        if code != 2 or "cannot be written" not in line:
            raise Broken(f"ended with {code}: {line}")
        return case.finish(folder)


def server_gone(case: Case) -> str:
    """The reward server dies at a random moment. It is back when the run is resumed."""
    server, port = start_server(case.place / "server")
    more = ["--reward", "sharpness", "remote", "--reward-models", f"remote=http://127.0.0.1:{port}"]
    case.like, seconds, _ = undisturbed(case.place.parent, *more)
    case.flags = [*FLAGS, *more]

    def impatient() -> None:
        remote.PAUSES = (0.05, 0.1)

    run = case.new(impatient)
    case.wait_for(seconds)
    stop(server)
    code = run.wait()
    if code not in (0, 1, 2):
        raise Broken(f"ended with {code}")
    done = len(read_metrics(case.folder / "metrics.jsonl"))
    if code == 1 and done and f"kept checkpoint-{done}, continue" not in run.error():
        raise Broken(run.error())
    server, _ = start_server(case.place / "server", port)
    try:
        return case.finish()
    finally:
        stop(server)


def start_server(place: Path, port: int = 0) -> tuple[Run, int]:
    port = port or free_port()
    run = Run(place / str(time.monotonic_ns()), ["serve", "--reward", "sharpness", "--port", str(port)]).start()
    while f":{port}" not in run.said():
        time.sleep(0.02)
    return run, port


def stop(run: Run) -> None:
    os.kill(run.pid, signal.SIGKILL)
    os.waitpid(run.pid, 0)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def rank_gone(case: Case) -> str:
    """One of two processes dies; a launcher then ends the other."""
    case.like, seconds = two_ranks(case.place.parent)
    pair = ranks(case.folder, [*FLAGS, "--output-dir", str(case.folder)])
    case.wait_for(seconds)
    first = case.draw.randrange(2)
    os.kill(pair[first].pid, signal.SIGKILL)
    pair[first].wait()
    time.sleep(1)
    with_signal = pair[1 - first]
    os.kill(with_signal.pid, signal.SIGTERM)
    if with_signal.wait() not in (0, 1, 2, 130, -signal.SIGTERM):
        raise Broken(with_signal.error())
    sound(case.folder)
    resumed = bool(checkpoint.checkpoints(case.folder))
    if not resumed:
        shutil.rmtree(case.folder, ignore_errors=True)
    flags = ["--resume", str(case.folder)] if resumed else [*FLAGS, "--output-dir", str(case.folder)]
    for run in ranks(case.folder, flags):
        if run.wait() != 0:
            raise Broken(f"resuming failed: {run.error()}")
    same(case.folder, case.like)
    return f"process {first}"


def ranks(folder: Path, flags: list[str]) -> list[Run]:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": "2"}
    flags = [*flags, "--device", "cpu"]
    return [
        Run(folder, flags, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}).start()
        for rank in (0, 1)
    ]


@cache
def two_ranks(place: Path) -> tuple[Path, float]:
    folder, start = place / "undisturbed-ranks" / "run", time.monotonic()
    shutil.rmtree(folder.parent, ignore_errors=True)
    for run in ranks(folder, [*FLAGS, "--output-dir", str(folder)]):
        if run.wait() != 0:
            raise SystemExit(f"two processes fail undisturbed: {run.said()}")
    return folder, time.monotonic() - start


def out_of_memory(case: Case) -> str:
    """The rollout of a random update runs out of memory, once."""
    last = case.draw.randint(1, UPDATES)

    def prepare() -> None:
        original, calls = tree.rollout, []

        def rollout(*arguments: object, **more: object) -> object:
            calls.append(1)
            if len(calls) == last:
                raise torch.OutOfMemoryError("out of memory, by the test")
            return original(*arguments, **more)  # type: ignore[arg-type]

        tree.rollout = rollout  # type: ignore[assignment]

    run = case.new(prepare)
    if run.wait() != 1:
        raise Broken("did not fail")
    kept = "nothing saved yet" if last == 1 else f"kept checkpoint-{last - 1}, continue with --resume"
    if kept not in run.error():
        raise Broken(run.error())
    return case.finish()


def two_at_once(case: Case) -> str:
    """Two new runs in one folder, or two resumptions of one run: the second is refused."""
    resumed = case.draw.random() < 0.5
    if resumed:
        run = case.new()
        while len(read_metrics(case.folder / "metrics.jsonl")) <= EVERY:
            time.sleep(0.005)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    pair = []
    for _ in range(2):
        pair.append(case.resume() if resumed else case.new())
        time.sleep(case.draw.choice([0, 0.05, 0.5]))
    codes = [run.wait() for run in pair]
    if sorted(codes) != [0, 2]:
        raise Broken(f"ended with {codes}")
    line = pair[codes.index(2)].error()
    if not re.search("another process is training in|already holds a run", line):
        raise Broken(line)
    same(case.folder, case.like)
    return "resumed" if resumed else "new"


KINDS: dict[str, tuple[Callable[[Case], str], int]] = {
    # The numbers are cases of a whole turn.
    "SIGKILL": (killed, 8),
    "SIGKILL while writing": (killed_while_writing, 14),
    "SIGTERM": (terminated, 4),
    "SIGINT": (interrupted, 4),
    "SIGINT twice": (interrupted_twice, 4),
    "damaged checkpoint": (damaged, 6),
    "full disk": (full_disk, 8),
    "read-only folder": (read_only, 2),
    "reward server gone": (server_gone, 4),
    "one of two processes gone": (rank_gone, 4),
    "out of memory": (out_of_memory, 3),
    "two runs in one folder": (two_at_once, 4),
}


def tried(kind: str, number: int, total: int, seed: int, place: Path) -> tuple[bool, str]:
    """Tries a case of `total` of its kind. Returns whether it survived, and a note."""
    folder = place / f"case-{seed}-{kind.replace(' ', '-')}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        like = undisturbed(place)[0]
        draw = random.Random(f"{seed} {kind} {number}")
        note = KINDS[kind][0](Case(folder, draw, (number + draw.random()) / total, FLAGS, like))
    except (Broken, OSError, ValueError) as error:
        # The folder stays, to be looked at.
        return False, f"{type(error).__name__}: {error} ({folder})"
    shutil.rmtree(folder, ignore_errors=True)
    return True, note


def code() -> str:
    """A hash of the code that is tried, and of what tries it."""
    files = sorted([*Path(tmpo_trainer.__file__).parent.rglob("*.py"), Path(__file__)])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def table(results: list[dict[str, object]]) -> str:
    rows = ["| kind | tried | survived | note |", "|---|---|---|---|"]
    for kind in KINDS:
        found = [result for result in results if result["kind"] == kind]
        notes: dict[object, int] = {}
        for result in found:
            notes[result["note"]] = notes.get(result["note"], 0) + 1
        text = ", ".join(f"{count} {note}" for note, count in notes.items())
        rows.append(f"| {kind} | {len(found)} | {sum(bool(r['survived']) for r in found)} | {text} |")
    return "\n".join(rows)


def main(flags: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/faults"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="one case of each kind, as in the tests")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    arguments = parser.parse_args(flags)
    torch.set_num_threads(1)
    place = arguments.output_dir.resolve()
    place.mkdir(parents=True, exist_ok=True)
    file = place / f"results-{arguments.seed}.jsonl"
    kept = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    state, results = code(), []
    for kind in arguments.kinds:
        total = 1 if arguments.short else KINDS[kind][1]
        for number in range(total):
            case = {"kind": kind, "number": number, "of": total, "code": state}
            # What failed, or was tried on other code, is tried again.
            if done := [each for each in kept if case.items() <= each.items() and each["survived"]]:
                results.append(done[0])
                continue
            survived, note = tried(kind, number, total, arguments.seed, place)
            results.append(case | {"survived": survived, "note": note})
            with file.open("a") as out:
                out.write(json.dumps(results[-1]) + "\n")
            print(f"{kind} {number}: {'survived' if survived else 'BROKEN'}, {note}", file=sys.stderr, flush=True)
    print(table(results))
    return 0 if all(result["survived"] for result in results) else 1
