"""`python -m tmpo_trainer`: flags, dispatch and exit codes (0 done, 1 failed, 2 usage, 130 interrupted and saved)."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import io
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..settings.config import to_yaml
from ..settings.errors import ConfigError, one_line, suggest
from ..settings.paths import expanded
from .flags import configure, hush, parse

#: The commands other than training, one file each.
COMMANDS = ("evaluate", "compare", "score", "serve", "fetch", "prompts", "inspect", "toy", "launch")

#: Characters of an error's line. What ours quote is cut much shorter; this is for what slips through.
LONGEST = 1000

#: Seconds that a process waits with its error, so that the machine's first process can print it.
PATIENCE = 30

#: glibc's numbers of two settings: from how many bytes (2**25 is its limit) a piece is the system's own, and how many free
#: bytes are kept.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1


def _run(arguments: Sequence[str]) -> int:
    if arguments and not arguments[0].startswith("-"):
        if arguments[0] in COMMANDS:
            return importlib.import_module(f".{arguments[0]}", __package__).command(arguments[1:])
        if arguments[0].isidentifier():
            hint = suggest(arguments[0], COMMANDS)
            raise ConfigError(f"unknown command {one_line(arguments[0], 80)}{hint} (--help lists them)")
    actions, flags = parse(arguments)
    checkpoint = None
    if actions.resume is not None:
        from ..training.checkpoint import find

        given = flags.get("output_dir")
        folder = Path(expanded(given)) if given else None
        checkpoint = find(actions.resume, folder or Path("outputs"))
        if actions.resume != "latest" and folder and folder.resolve() != checkpoint.parent:
            raise ConfigError(f"--resume continues in {checkpoint.parent}: leave out --output-dir")
        flags["output_dir"] = str(checkpoint.parent)
    config, name = configure(actions, flags, checkpoint)
    if actions.print_config:
        if os.environ.get("RANK", "0") == "0":
            print(to_yaml(config), end="")
        return 0
    hush()
    if actions.dry_run:
        if os.environ.get("RANK", "0") != "0":
            # `launch` and torchrun start one process per GPU, and all would print the same.
            return 0
        from . import dry_run

        return dry_run.dry_run(config, checkpoint is not None)
    from . import train

    named = checkpoint is None or Path(actions.resume or "").resolve() == checkpoint
    return train.train(config, name, checkpoint, named)


def broken_torchvision() -> str | None:
    """The import error of an installed torchvision, None if it works. A broken one breaks much of transformers too."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        return one_line(error)
    return None


def keep_freed_memory() -> None:
    """Makes glibc keep the memory of freed tensors for the next ones.

    By default large pieces go back to the system, which then clears every page of the next tensor: on a CPU that takes up
    to a third of the time of convolutions.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Every error that a user can fix is one line on stderr."""
    keep_freed_memory()
    # Prompts and file names may have letters that a terminal or a pipe in another encoding than UTF-8 does not. Python's
    # stderr escapes them; its stdout would raise UnicodeEncodeError.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        # One line per machine, not one per process. A launcher ends all processes when the first of them exits, so the others
        # wait until the one that prints has done so. A process that is still there afterwards is alone with its error.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(PATIENCE)
        print(f"tmpo_trainer: {one_line(error, LONGEST)}", file=sys.stderr)
        return 2
    except (ImportError, RuntimeError) as error:
        if (getattr(error, "name", None) or "").startswith("tmpo_trainer"):
            raise
        if type(error).__name__ == "OutOfMemoryError":
            # What is loaded outside of `readable_errors`: scorers, features, the trainer's own tensors.
            advice = "another program may use the GPU (nvidia-smi); --offload-scorers needs less, see docs/troubleshooting.md"
            print(f"tmpo_trainer: {one_line(error)}; {advice}", file=sys.stderr)
            return 1
        # diffusers raises RuntimeError for a module that it cannot import.
        imports = isinstance(error, ImportError) or "import" in str(error)
        broken = broken_torchvision() if imports else None
        if broken is not None:
            print(
                f"tmpo_trainer: torchvision is installed but broken ({broken}), and so transformers fails: run "
                "pip uninstall torchvision (it is not needed), or install the build for your torch",
                file=sys.stderr,
            )
            return 2
        if not isinstance(error, ModuleNotFoundError):
            raise
        print(f'tmpo_trainer: {error}: pip install -c constraints.txt -e ".[train]"', file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader closed the pipe, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # Such as a path into a folder that one may not enter.
        if error.filename is None:
            raise
        print(f"tmpo_trainer: {one_line(error.filename)}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tmpo_trainer: interrupted", file=sys.stderr)
        return 130
