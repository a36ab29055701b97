"""`python -m benchmarks SUBCOMMAND [flags]`: one file per subcommand, imported only when it is chosen."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

from tmpo_trainer.commands.flags import hush
from tmpo_trainer.settings.errors import ConfigError, one_line, suggest

COMMANDS = (
    "speed",
    "gpu",
    "solvers",
    "limit",
    "random-model",
    "card",
    "sweep",
    "gradient-signal",
    "faults",
    "readme-picture",
    "workflows",
)


def module(command: str) -> str:
    return command.replace("-", "_")


def summary(command: str) -> str:
    """The first line of a subcommand's docstring, read without importing the file."""
    source = Path(__file__).with_name(f"{module(command)}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]


def usage() -> str:
    lines = "\n".join(f"  {command:16}{summary(command)}" for command in COMMANDS)
    return f"usage: python -m benchmarks SUBCOMMAND [flags]\n\n{lines}\n\nSUBCOMMAND --help lists its flags."


def main(arguments: list[str]) -> int:
    """Runs a subcommand. Returns the exit code: 0 done, 1 failed, 2 usage."""
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(usage())
        return 0 if arguments else 2
    command, *flags = arguments
    try:
        if command not in COMMANDS:
            hint = suggest(command, COMMANDS)
            raise ConfigError(f"unknown subcommand {one_line(command, 80)}{hint} (--help lists them)")
        hush()
        return importlib.import_module(f"benchmarks.{module(command)}").main(flags)
    except ConfigError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
