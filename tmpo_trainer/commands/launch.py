"""`launch`: training on all GPUs of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..settings.errors import ConfigError
from .flags import command_parser, configure, parse

#: Seconds that torch's launcher waits for workers to end after a signal.
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def launch_configs() -> dict[str, Path]:
    """The accelerate configs that come with the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "accelerate").glob("*.yaml"))}


def command(arguments: Sequence[str]) -> int:
    """Runs the command. Returns the exit code."""
    configs = launch_configs()
    parser = command_parser(
        "launch",
        "Trains on several GPUs of this machine, by `accelerate launch` with a bundled config.",
        "All other flags are those of training. On several machines use torchrun, see docs/training.md.",
    )
    parser.add_argument("name", choices=configs, help="ddp: each GPU holds the whole model; fsdp2: the GPUs share it")
    parser.add_argument("--num-processes", type=int, help="number of processes; by default one per GPU")
    namespace, flags = parser.parse_known_args(arguments)
    actions, settings = parse(flags)
    device = settings.get("device", "auto")
    if actions.resume is None:
        device = configure(actions, settings, None)[0].device
    import torch

    count, here = namespace.num_processes, torch.cuda.device_count()
    if count is None:
        count = here
        if count < 2:
            raise ConfigError(
                f"launch {namespace.name} needs two GPUs or more, but torch sees {count}: leave out `launch`"
            )
    if count < 1:
        raise ConfigError(f"--num-processes {count}: give 1 or more")
    if 0 < here < count and device != "cpu" and actions.resume is None:
        raise ConfigError(f"--num-processes {count}: torch sees {here} GPUs, give 1 to {here}")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configs[namespace.name])]
    # accelerate's own port is the same for all runs, of which `compare` may start two at once.
    command += ["--num_processes", str(count), "--main_process_port", str(_free_port())]
    # accelerate's own is one thread, in which the GPU would wait for the preparation of pictures.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // count)))
    return _become([*command, "-m", "tmpo_trainer", *flags])


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _become(command: list[str]) -> int:
    """Runs a command in place of this process, so that it gets the signals that are meant for it."""
    # A signal ends the workers after their update and a checkpoint. By default, and before 2.12 always, torch kills them
    # after half a minute.
    os.environ.setdefault(SHUTDOWN, "3600")
    if os.name == "nt":
        return subprocess.call(command)
    return os.execv(command[0], command)
