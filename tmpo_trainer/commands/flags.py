"""Command-line flags: one per setting, and those that commands share."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..settings.config import TrainConfig
from ..settings.errors import ConfigError, one_line, suggest
from ..settings.paths import expanded
from ..settings.presets import (
    all_settings,
    grouped_settings,
    make_config,
    method_preset,
    preset,
    preset_names,
)
from ..settings.yaml_file import read_yaml

#: Flags that are not settings: they choose where settings come from, or what to do with them.
ACTIONS = ("preset", "config", "resume", "dry-run", "print-config", "version")


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError."""

    def error(self, message: str) -> NoReturn:
        # argparse quotes whole values.
        raise ConfigError(re.sub(r"\S{200,}", lambda word: one_line(word[0], 80), message))


def path_flag(text: str) -> Path:
    """The type of flags that take a path: `~` is expanded, also in --flag=~/x, where a shell leaves it."""
    try:
        return Path(expanded(text))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{one_line(text, 80)}: {error}") from None


def _is_tuple(annotation: Any) -> bool:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return any(typing.get_origin(option) is tuple for option in options)


def make_parser() -> argparse.ArgumentParser:
    """A parser with one flag per setting, by the config's names and help texts. The config validates the values."""
    parser = Parser(
        prog="python -m tmpo_trainer",
        description="Trains a LoRA on rewards, with TMPO or one of its rivals. Without flags, it trains the bundled demo model "
        "on a CPU in minutes, with nft.",
        allow_abbrev=False,
        epilog=f"Presets: {', '.join(preset_names())}. Precedence: flags > --config > --preset > defaults. The settings "
        "that come with --method override presets and files that were written for another method. "
        "Other commands, each with --help: evaluate, compare, score, serve, fetch, prompts, inspect, toy, launch.",
    )
    parser.add_argument(
        "--preset",
        nargs="+",
        metavar="NAME",
        help="named sets of settings; later ones override earlier ones. By default, the reward's preset, or demo. A preset "
        "for a GPU's memory (flux-24gb, ...) overrides the reward's (pickscore by default)",
    )
    parser.add_argument("--config", type=path_flag, metavar="FILE", help="a YAML file of settings")
    parser.add_argument(
        "--resume",
        type=lambda text: str(path_flag(text)),
        metavar="latest|PATH",
        help="continue a run from its newest or a given checkpoint",
    )
    parser.add_argument("--dry-run", action="store_true", help="check files, geometry and memory, then stop")
    parser.add_argument("--print-config", action="store_true", help="print all settings as YAML, then stop")
    parser.add_argument("--version", action="version", version=f"tmpo_trainer {__version__}")
    for title, group in grouped_settings().items():
        add_settings(parser.add_argument_group(title.rstrip(".").lower()), {n.replace("_", "-"): n for n in group})
    return parser


def add_settings(parser: argparse._ActionsContainer, flags: Mapping[str, str]) -> None:
    """Adds flags {flag without dashes: setting}, with the settings' own help texts and defaults."""
    known = all_settings()
    for flag, name in flags.items():
        field = known[name]
        text = (field.description or "").replace("%", "%%")
        if not field.is_required():
            default = field.default
            text += f" [{' '.join(map(str, default)) if isinstance(default, tuple) else default}]"
        kind: dict[str, Any] = {"metavar": flag.replace("-", "_").upper()}
        if field.annotation is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif _is_tuple(field.annotation):
            kind["nargs"] = "+"
        parser.add_argument(f"--{flag}", dest=name, default=argparse.SUPPRESS, help=text, **kind)


def refuse_unknown(unknown: Sequence[str], known: Iterable[str]) -> None:
    """Raises ConfigError for the first argument that a parser did not know."""
    if unknown:
        word = unknown[0]
        what = "flag" if word.startswith("-") else "argument"
        hint = suggest(word.split("=")[0], known)
        raise ConfigError(f"unknown {what} {one_line(word, 80)}{hint} (--help lists them)")


def given(namespace: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of the named settings that were given as flags."""
    flags = {name: getattr(namespace, name) for name in names if name in namespace}
    for key, value in flags.items():
        # Only for optional settings: in `--baseline none`, none is a value.
        optional = type(None) in typing.get_args(all_settings()[key].annotation)
        word = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(word, str) and word.lower() == "none" and (optional or word is not value):
            flags[key] = None if optional else []
    return flags


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(actions, settings given as flags). Raises ConfigError."""
    namespace, unknown = make_parser().parse_known_args(arguments)
    known = [*(name.replace("_", "-") for name in all_settings()), *ACTIONS]
    refuse_unknown(unknown, [f"--{name}" for name in known])
    return namespace, given(namespace, all_settings())


def choose_preset(settings: dict[str, Any]) -> str:
    """The preset that belongs to the reward and model given; `demo` is for the demo model alone, which has no other."""
    if settings.get("model") == "demo":
        return "demo"
    reward = settings.get("reward", "shapes")
    names = [reward] if isinstance(reward, str) else reward
    if not isinstance(names, list | tuple) or "shapes" in names:
        return "demo" if settings.get("model", "demo") == "demo" else "defaults"
    return names[0] if len(names) == 1 and names[0] in preset_names() else "joint"


def preset_layers(settings: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The layer of the preset that belongs to the reward and model given, if any."""
    name = choose_preset(settings)
    return [] if name == "defaults" else [(f"preset {name}", preset(name))]


def configure(actions: argparse.Namespace, flags: dict[str, Any], checkpoint: Path | None) -> tuple[TrainConfig, str]:
    """The settings, and the name of the presets that they start from."""
    if checkpoint is not None:
        from . import resuming

        if actions.config or actions.preset:
            raise ConfigError("--resume takes the settings from its run: give flags, but no --config or --preset")
        saved = checkpoint.parent / "config.yaml"
        layer = (str(saved), read_yaml(saved))
        before = make_config([layer])
        # First, because the settings of two methods need not go together.
        resuming.check_same("method", before.method, flags.get("method", before.method))
        config = make_config([layer, ("flags", flags)])
        resuming.check(before, config)
        return config, "resume"
    found = layers(actions, flags, flags)
    named = [name.removeprefix("preset ") for name, _ in found if name.startswith("preset ")]
    return make_config(found), "-".join(named) or "defaults"


def layers(
    actions: argparse.Namespace, flags: Mapping[str, Any], strongest: Mapping[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    """Layers of settings, the weakest first: presets, those of --config, flags.

    Args:
        strongest: settings that override the flags. Together they decide which presets belong to the run.
    """
    from_file = read_yaml(actions.config) if actions.config else {}
    given = {**from_file, **flags, **strongest}
    named = {name: preset(name) for name in actions.preset or []}

    def known() -> dict[str, Any]:
        return dict(item for settings in [*named.values(), given] for item in settings.items())

    if not any("reward" in settings for settings in named.values()):
        # The named presets set no reward, so they come on top of a preset that does.
        first = "pickscore" if named and "reward" not in known() else choose_preset(known())
        named = ({} if first == "defaults" else {first: preset(first)}) | named
    found = [(f"preset {name}", settings) for name, settings in named.items()]
    found.append((str(actions.config), from_file))
    method = known().get("method", "tmpo")
    own = (f"settings of {method}", method_preset(str(method), known().get("model", "demo") == "demo"))
    # The method's general settings lie above the last layer that was written for another method, and below those written for
    # this one. A preset without a method is for that of the preset below it, the lowest for tmpo. A file without one fits any.
    place, written_for = 0, "tmpo"
    for index, (_, settings) in enumerate(found):
        written_for = settings.get("method", written_for if index < len(named) else method)
        if written_for != method:
            place = index + 1
    return [*found[:place], own, *found[place:], ("flags", dict(flags))]


def hush() -> None:
    """Silences the libraries. Call it before they are imported."""
    # The libraries' advice about optional packages would bury our own log lines.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # Pillow warns about damaged metadata, which the picture does not need, and sizes, which have a limit of ours.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # peft imports bitsandbytes where it is installed, which warns if there is no GPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def command_parser(name: str, description: str, epilog: str | None = None) -> Parser:
    return Parser(prog=f"python -m tmpo_trainer {name}", description=description, epilog=epilog, allow_abbrev=False)


def add_scorer_flags(parser: argparse.ArgumentParser, default: Sequence[str] | None = None) -> None:
    more: dict[str, Any] = {"required": True} if default is None else {"default": list(default)}
    parser.add_argument("--reward", nargs="+", metavar="NAME", help="one or more scorers", **more)
    parser.add_argument(
        "--reward-models", nargs="+", default=[], metavar="NAME=PATH", help="where a scorer's weights are"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def exit_code(work: Callable[[], int]) -> int:
    """Runs a command's work. A failure prints one line and gives exit code 1; a ConfigError is raised on."""
    try:
        return work()
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        text = one_line(error)
        if isinstance(error, MemoryError):
            text = f"out of memory: {text}" if text else "out of memory"
        print(f"tmpo_trainer: {text}", file=sys.stderr)
        return 1
