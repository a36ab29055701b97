"""Measures FLUX.1-dev and SD3.5-Medium at full size with random weights on one GPU of 80 GB, in under nine minutes.

    python -m benchmarks gpu --json gpu.json

Nothing is downloaded, no weights are written to a disk, and nobody has to be present. Every part runs in a process of its own
with its own limit of time. A part that fails leaves one line in the result and all that it printed in gpu.log, and the others
go on. Both files are written after every part. The packages needed are torch, diffusers, transformers, peft, accelerate, and
what tmpo_trainer needs to import; bitsandbytes for NF4 and pytest for the tests are used where they are installed. `--tiny`
runs the same code on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from tmpo_trainer.commands import flags as trainer_flags
from tmpo_trainer.commands import loading
from tmpo_trainer.settings.errors import ConfigError, one_line

from . import models, products
from .arms import FloorArm, TrainerArm, configure, measured_memory, positions
from .measuring import PHASES, machine, table

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Part:
    """seconds: its limit. backbone, presets, own: what is measured, in updates of one prompt that branches as the paper's last
    updates do."""

    seconds: int
    backbone: str = "flux"
    presets: tuple[str, ...] = ()
    own: dict[str, Any] = field(default_factory=dict)


#: A part takes about 70 seconds on an H100, half of them for the start of its process; the limits together are above
#: `SECONDS`, because not all need theirs.
PARTS = {
    "pickscore": Part(90, presets=("pickscore",)),
    "flux-80gb": Part(90, presets=("pickscore", "flux-80gb")),
    "flux-24gb": Part(120, presets=("pickscore", "flux-24gb")),
    "tests": Part(170),
    "sd35m": Part(90, "sd35m", ("pickscore", "sd35m-24gb")),
    "compile": Part(170, presets=("pickscore", "flux-80gb"), own={"compile": True}),
    "products": Part(60),
    "reuse-forward": Part(90, presets=("pickscore",), own={"reuse_forward": True}),
}
#: Of all parts, with the start of their processes: a margin below nine minutes.
SECONDS = 525
#: A part that has less than this left is not begun.
LEAST = 20
ROUNDS = 2


def main(arguments: list[str]) -> int:
    parser = trainer_flags.Parser(
        prog="python -m benchmarks gpu", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--json", type=trainer_flags.path_flag, default=Path("gpu.json"), metavar="FILE")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of all parts together")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="updates of each part")
    parser.add_argument("--tiny", action="store_true", help="the same code on tiny models, on a CPU too")
    # Of the processes that this one starts.
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if not args.tiny and not torch.cuda.is_available():
        raise ConfigError("this measures full-size models and needs a CUDA GPU: --tiny runs the same code on a CPU")
    if args.rounds < 1:
        raise ConfigError(f"--rounds {args.rounds}: at least 1")
    if args.only:
        work(args.only, args.tiny, args.json, time.monotonic() + args.seconds, args.rounds)
        return 0
    return run(args.parts, args.tiny, args.json, args.seconds, args.rounds)


def run(parts: list[str], tiny: bool, file: Path, seconds: float, rounds: int) -> int:
    """Runs the parts one after another. Returns 1 if one failed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {"machine": machine(device), "tiny": tiny, "parts": {}}
    end, log = time.monotonic() + seconds, file.with_suffix(".log")
    log.unlink(missing_ok=True)
    for name in parts:
        begun, limit = time.monotonic(), min(PARTS[name].seconds, end - time.monotonic())
        found = {"error": "no time was left"} if limit < LEAST else part(name, tiny, limit, rounds, log)
        found["wall seconds"] = round(time.monotonic() - begun, 1)
        result["parts"][name] = found
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {found.get('error', 'done')} ({found['wall seconds']} s)", file=sys.stderr, flush=True)
    print(text(result))
    return int(any("error" in found for found in result["parts"].values()))


def part(name: str, tiny: bool, limit: float, rounds: int, log: Path) -> dict[str, Any]:
    """A part's figures from a process of its own; what it had measured, and an error, if it fails or takes too long.

    log: what the process prints is added to it.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.json"
        command = [sys.executable, "-m", "benchmarks", "gpu", "--only", name, "--json", str(file)]
        # The process stops by itself before it is killed.
        command += ["--seconds", f"{limit - 10:.0f}", "--rounds", str(rounds), *(["--tiny"] if tiny else [])]
        error = None
        with log.open("a+", encoding="utf-8", errors="replace") as output:
            begin = output.tell()
            code = finished(command, limit, output)
            if code is None:
                error = f"it took longer than its {limit:.0f} seconds"
            elif code:
                output.seek(begin)
                lines = [line for line in output if line.strip()]
                error = one_line(lines[-1]) if lines else f"exit code {code}"
        found = json.loads(file.read_text()) if file.exists() else {}
    return found | ({} if error is None else {"error": error})


def finished(command: list[str], limit: float, output: IO[str]) -> int | None:
    """Runs a command. Returns its exit code, or None if it was killed after `limit` seconds with all that it had started:
    what outlives it would keep the GPU's memory and time from the next part."""
    # torch's launcher gives its workers process groups of their own. It ends them itself when it is told to stop.
    environment = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        end = time.monotonic() + 8
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            # The launcher may outlive the process that has started it.
            while time.monotonic() < end:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.1)
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def work(name: str, tiny: bool, file: Path, end: float, rounds: int = ROUNDS) -> None:
    """Measures one part, and writes its figures after every step. end: of `time.monotonic`, after which no round begins."""
    if name == "tests":
        write(file, run_tests(end))
        return
    if name == "products":
        if not tiny:
            write(file, {"products": products.products(), "forward passes": products.forward_passes()})
        return
    chosen = PARTS[name]
    with tempfile.TemporaryDirectory() as folder:
        measure(chosen, "tiny" if tiny else "full", file, Path(folder), end, rounds)


def write(file: Path, found: dict[str, Any]) -> None:
    aside = file.with_suffix(".new")
    aside.write_text(json.dumps(found))
    aside.replace(file)


def run_tests(end: float) -> dict[str, Any]:
    """The tests that need a GPU."""
    if importlib.util.find_spec("pytest") is None:
        return {"error": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "-p", "no:warnings"]
    limit = end - time.monotonic()
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=limit)
    print(done.stdout, done.stderr, sep="\n")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    failed = [one_line(line) for line in lines if line.startswith(("FAILED", "ERROR"))]
    found: dict[str, Any] = {"summary": one_line(lines[-1]) if lines else "", "failed": failed}
    return found if done.returncode == 0 else found | {"error": "; ".join(failed) or f"exit code {done.returncode}"}


def measure(chosen: Part, size: str, file: Path, folder: Path, end: float, rounds: int) -> None:
    """Seconds, ratios to the floor and memory of a part's settings."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = dict(chosen.own)
    config = configure(chosen.backbone, size, list(chosen.presets), {}, **own)
    if config.quantize == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        write(file, {"error": "bitsandbytes is not installed, so nothing was measured in NF4"})
        return
    loading.quiet()
    begun = time.perf_counter()
    model = models.make(chosen.backbone, size, config, device, folder)
    own |= positions(model, config, "late")
    config = configure(chosen.backbone, size, list(chosen.presets), {}, **own)
    arm = TrainerArm("tmpo", model, config, folder)
    floor = FloorArm("floor", arm)
    found: dict[str, Any] = {
        "presets": chosen.presets,
        "settings": config.model_dump(mode="json"),
        "weights": sum(p.numel() for p in model.backbone.transformer.parameters()),
        "branch steps": config.branch_late,
        "seconds to build": time.perf_counter() - begun,
    }
    write(file, found)
    begun = time.perf_counter()
    floor.record()
    found |= {"seconds of the first update": time.perf_counter() - begun}
    found |= {"forwards": arm.forwards, "forwards and backwards": arm.backwards, "updates": [], "floors": []}
    write(file, found)
    slowest = 0.0
    for _ in range(rounds):
        if time.monotonic() + slowest > end:
            break
        begun = time.monotonic()
        found["updates"].append(arm.run())
        found["floors"].append(floor.run())
        slowest = time.monotonic() - begun
        write(file, found)
    # It keeps the inputs of all calls.
    del floor
    if time.monotonic() + slowest < end:
        try:
            found["memory"] = measured_memory(arm)
        except (ValueError, RuntimeError, TypeError) as error:
            found["error"] = f"memory: {one_line(error)}"
        write(file, found)


def ratio(found: dict[str, Any], phases: tuple[str, ...] = PHASES) -> float:
    """The median of update over floor."""

    def seconds(one: dict[str, float]) -> float:
        return sum(one.get(phase, 0.0) for phase in phases)

    return statistics.median(seconds(a) / seconds(b) for a, b in zip(found["updates"], found["floors"], strict=False))


def measured(rows: list[dict[str, Any]]) -> str:
    """A table of numbers with names."""
    cells = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    return table(list(rows[0]), cells)


def text(result: dict[str, Any]) -> str:
    """The tables of a result."""
    about = result["machine"]
    lines, memory, notes = [], [], []
    for name, found in result["parts"].items():
        if found.get("floors"):
            seconds = {p: statistics.median(one.get(p, 0.0) for one in found["updates"]) for p in PHASES}
            evaluations = f"{found['forwards']:g} F + {found['forwards and backwards']:g} G"
            ratios = [f"{ratio(found, ('rollout', 'replay')):.3f}", f"{ratio(found):.3f}"]
            cells = [f"{value:.2f}" for value in (*seconds.values(), sum(seconds.values()))]
            lines.append([name, evaluations, *cells, *ratios])
        for phase, own in found.get("memory", {}).items():
            sizes = [f"{own[key] / 2**30:.2f}" for key in ("predicted", "measured")]
            memory.append([name, phase, *sizes, f"{own['ratio']:.2f}"])
        notes += [f"{name}: {found[key]}" for key in ("error", "summary") if key in found]
        notes += [measured(found[key]) for key in ("products", "forward passes") if key in found]
    header = ["part", "evaluations", *PHASES, "total", "rollout and replay / floor", "all / floor"]
    return "\n\n".join(
        [
            f"{about['device']}, torch {about['torch']}, diffusers {about['diffusers']}, transformers "
            f"{about['transformers']}, seed 0; seconds per update of one prompt",
            table(header, lines),
            table(["part", "phase", "predicted, GiB", "measured, GiB", "ratio"], memory),
            *notes,
        ]
    )
