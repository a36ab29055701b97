"""`python -m tmpo_trainer`: flags, dispatch and exit codes (0 done, 1 failed, 2 usage, 130 interrupted and saved)."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tmpo_trainer import __version__
from tmpo_trainer.config import ConfigError, TrainConfig, make_config, preset, preset_names, read_yaml, suggest, to_yaml

#: Flags that say where the settings come from, or what to do with them, rather than being settings.
ACTIONS = ("preset", "config", "resume", "dry-run", "print-config", "version")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _is_tuple(annotation: Any) -> bool:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return any(typing.get_origin(option) is tuple for option in options)


def make_parser() -> argparse.ArgumentParser:
    """One flag per setting, from the config's own names and help texts; values are validated there, not here."""
    parser = _Parser(
        prog="python -m tmpo_trainer",
        description="Trains a LoRA by reward with TMPO. Without flags: the bundled demo model, on a CPU, in minutes.",
        allow_abbrev=False,
        epilog=f"Presets: {', '.join(preset_names())}. Precedence: flags > --config > --preset > defaults. "
        "Other commands: `inspect FILE` prints what a LoRA was trained on and checks it; `launch ddp|fsdp2 [flags]` trains "
        "on all GPUs of this machine.",
    )
    parser.add_argument(
        "--preset",
        nargs="+",
        metavar="NAME",
        help="named sets of settings, later ones win; by default that of the reward, or demo. One for a GPU's memory "
        "(flux-24gb, ...) is laid over that of the reward, or pickscore",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file of settings")
    parser.add_argument("--resume", metavar="latest|PATH", help="continue a run from its newest or a given checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="check files, geometry and memory, then stop")
    parser.add_argument("--print-config", action="store_true", help="print all settings as YAML, then stop")
    parser.add_argument("--version", action="version", version=f"tmpo_trainer {__version__}")
    for name, field in TrainConfig.model_fields.items():
        flag = "--" + name.replace("_", "-")
        text = (field.description or "").replace("%", "%%")
        if not field.is_required():
            default = field.default
            text += f" [{' '.join(map(str, default)) if isinstance(default, tuple) else default}]"
        kind: dict[str, Any] = {"metavar": name.upper()}
        if field.annotation is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif _is_tuple(field.annotation):
            kind["nargs"] = "+"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)
    return parser


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(actions, settings given as flags). Raises ConfigError."""
    namespace, unknown = make_parser().parse_known_args(arguments)
    if unknown:
        word = unknown[0]
        known = ["--" + name.replace("_", "-") for name in TrainConfig.model_fields] + [f"--{name}" for name in ACTIONS]
        what = "flag" if word.startswith("-") else "argument"
        raise ConfigError(f"unknown {what} {word}{suggest(word.split('=')[0], known)} (--help lists them)")
    flags = {key: value for key, value in vars(namespace).items() if key in TrainConfig.model_fields}
    for key, value in flags.items():
        # Only where a setting may be left out: `--baseline none` is a value.
        optional = type(None) in typing.get_args(TrainConfig.model_fields[key].annotation)
        if optional and isinstance(value, str) and value.lower() == "none":
            flags[key] = None
    return namespace, flags


def choose_preset(settings: dict[str, Any]) -> str:
    """The preset that belongs to the reward and model given; `demo` is for the demo model alone."""
    reward = settings.get("reward", "shapes")
    names = [reward] if isinstance(reward, str) else reward
    if not isinstance(names, list | tuple) or "shapes" in names:
        return "demo" if settings.get("model", "demo") == "demo" else "defaults"
    return names[0] if len(names) == 1 and names[0] in preset_names() else "joint"


def configure(actions: argparse.Namespace, flags: dict[str, Any], checkpoint: Path | None) -> tuple[TrainConfig, str]:
    """The settings and the name of what they started from."""
    if checkpoint is not None:
        saved = checkpoint.parent / "config.yaml"
        layers = [(str(saved), read_yaml(saved))]
        if actions.config or actions.preset:
            raise ConfigError("--resume takes the settings from its run: give flags, but no --config or --preset")
        return make_config([*layers, ("flags", flags)]), "resume"
    from_file = read_yaml(actions.config) if actions.config else {}
    given = [(str(actions.config), from_file), ("flags", flags)]
    named = {name: preset(name) for name in actions.preset or []}
    if not any("reward" in settings for settings in named.values()):
        # What they leave open: the protocol.
        known = dict(item for settings in [*named.values(), from_file, flags] for item in settings.items())
        first = "pickscore" if named and "reward" not in known else choose_preset(known)
        named = ({} if first == "defaults" else {first: preset(first)}) | named
    layers = [(f"preset {name}", settings) for name, settings in named.items()]
    return make_config([*layers, *given]), "-".join(named) or "defaults"


def _inspect(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="python -m tmpo_trainer inspect", description="Prints what a LoRA was trained on and checks it."
    )
    parser.add_argument("file", type=Path, help="a LoRA's safetensors file, or a run's folder")
    file = parser.parse_args(arguments).file
    from tmpo_trainer import lora

    text, sound = lora.describe(file)
    print(text)
    return 0 if sound else 1


def launch_configs() -> dict[str, Path]:
    """The accelerate configs that come with the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "accelerate").glob("*.yaml"))}


def _launch(arguments: Sequence[str]) -> int:
    configs = launch_configs()
    parser = _Parser(
        prog="python -m tmpo_trainer launch",
        description="Trains on several GPUs of this machine: accelerate launch with a config of this package.",
        epilog="All other flags are those of training. On several machines use torchrun, see docs/training.md.",
        allow_abbrev=False,
    )
    parser.add_argument("name", choices=configs, help="ddp: a whole model per GPU; fsdp2: its weights shared")
    parser.add_argument("--num-processes", type=int, help="by default one per GPU")
    namespace, flags = parser.parse_known_args(arguments)
    actions, settings = parse(flags)
    if actions.resume is None:
        configure(actions, settings, None)
    count = namespace.num_processes
    if count is None:
        import torch

        count = torch.cuda.device_count()
        if count < 2:
            raise ConfigError(
                f"launch {namespace.name} is for two GPUs or more, torch sees {count}: leave out `launch`"
            )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configs[namespace.name])]
    return subprocess.call([*command, "--num_processes", str(count), "-m", "tmpo_trainer", *flags])


def _run(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] == "launch":
        return _launch(arguments[1:])
    if arguments and arguments[0] == "inspect":
        return _inspect(arguments[1:])
    actions, flags = parse(arguments)
    checkpoint = None
    if actions.resume is not None:
        from tmpo_trainer.checkpoint import find

        checkpoint = find(actions.resume, Path(flags.get("output_dir") or "outputs"))
        if (
            actions.resume != "latest"
            and Path(flags.get("output_dir", checkpoint.parent)).resolve() != checkpoint.parent
        ):
            raise ConfigError(f"--resume continues in {checkpoint.parent}: leave out --output-dir")
        flags["output_dir"] = str(checkpoint.parent)
    config, name = configure(actions, flags, checkpoint)
    if actions.print_config:
        print(to_yaml(config), end="")
        return 0
    # Advice of the libraries about optional packages would bury our own lines.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # peft imports it where it is installed, and without a GPU it complains.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from tmpo_trainer import run

    if actions.dry_run:
        return run.dry_run(config)
    return run.train(config, name, checkpoint)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Every error that a user can mend is one line on stderr."""
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        # One line per machine, not one per process.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"tmpo_trainer: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("tmpo_trainer"):
            raise
        print(f'tmpo_trainer: {error}: pip install -c constraints.txt -e ".[train]"', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tmpo_trainer: interrupted", file=sys.stderr)
        return 130
