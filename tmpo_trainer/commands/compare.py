"""`compare`: trains and evaluates several methods with the same budget."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..settings.errors import ConfigError, one_line
from ..settings.presets import make_config
from ..settings.yaml_file import read_yaml
from .flags import Parser, command_parser, exit_code, hush, parse, path_flag
from .flags import layers as preset_layers_of

#: The methods that are compared by default.
RIVALS = ("tmpo", "flow-grpo", "mix-grpo", "tree-grpo", "gardo")


def make_parser() -> Parser:
    """The flags of the comparison itself."""
    parser = command_parser(
        "compare",
        "Trains methods from the same base with the same prompts and budget, several seeds each, and evaluates all on the same "
        "held-out prompts. Writes tables, Pareto plots, curves and grids. To continue after an interruption, give the same "
        "command again.",
        "All other flags are those of training and apply to every arm: --preset, --reward, --eval-images, ... Without a "
        "budget, each arm trains for the number of updates in its settings; --updates N sets it for all arms.",
    )
    arms = parser.add_mutually_exclusive_group()
    arms.add_argument(
        "--methods", nargs="+", default=list(RIVALS), metavar="NAME", help=f"methods to compare [{' '.join(RIVALS)}]"
    )
    arms.add_argument(
        "--arms", type=path_flag, metavar="FILE", help="a YAML file {arm: {setting: value}} in place of --methods"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="N", help="training seeds, one run each [0]"
    )
    budgets = parser.add_mutually_exclusive_group()
    budgets.add_argument(
        "--evaluations", type=float, metavar="N", help="budget: network evaluations per run and process"
    )
    budgets.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="budget: seconds of training per run; a trial run of each arm measures its speed",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="number of runs at the same time [1]; set --threads too"
    )
    parser.add_argument("--launch", choices=("ddp", "fsdp2"), help="train every run on all GPUs of this machine")
    parser.add_argument(
        "--output-dir",
        type=path_flag,
        default=Path("outputs/compare"),
        metavar="DIR",
        help="folder for all results [outputs/compare]",
    )
    return parser


def check(namespace: argparse.Namespace, actions: argparse.Namespace, flags: Mapping[str, Any]) -> None:
    """Raises ConfigError for flags that do not go together."""
    if actions.resume or actions.dry_run or actions.print_config:
        raise ConfigError(
            "compare has no --resume, --dry-run or --print-config: give the same command again to continue"
        )
    for name, value in (
        ("evaluations", namespace.evaluations),
        ("seconds", namespace.seconds),
        ("jobs", namespace.jobs),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} {value}: must be above 0")
    if len(set(namespace.seeds)) < len(namespace.seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, namespace.seeds))} names a seed twice: give each once")
    if "updates" in flags and (namespace.evaluations or namespace.seconds):
        raise ConfigError(
            "--updates cannot go with --evaluations or --seconds, which set the budget: leave --updates out"
        )
    if namespace.seconds and namespace.jobs > 1:
        raise ConfigError(
            "--seconds cannot go with --jobs, because parallel runs slow each other down: leave --jobs out"
        )


def read_arms(namespace: argparse.Namespace) -> dict[str, Any]:
    """The settings of every arm, by its name. Raises ConfigError for a file that is not written that way."""
    if not namespace.arms:
        return {name: {"method": name} for name in namespace.methods}
    named = read_yaml(namespace.arms)
    if not named:
        raise ConfigError(f"{namespace.arms} names no arms: write NAME: {{setting: value}}")
    for name, settings in named.items():
        if not isinstance(settings, dict) or not re.fullmatch(r"[A-Za-z][\w.+-]*", str(name)) or name == "base":
            raise ConfigError(
                f"{namespace.arms}: arm {name}: write NAME: {{setting: value}}, with a NAME of letters, digits, . + -"
            )
    return named


def command(arguments: Sequence[str]) -> int:
    """Runs the command. Returns the exit code."""
    namespace, rest = make_parser().parse_known_args(arguments)
    actions, flags = parse(rest)
    check(namespace, actions, flags)
    named = read_arms(namespace)
    # --seed sets the evaluation's noise; --seeds sets the training's.
    evaluation_seed = make_config([("flags", {"seed": flags.pop("seed", 0)})]).seed

    places = {entry.partition("=")[0]: entry for entry in flags.get("reward_models", ())}
    used: set[str] = set()

    def layers(name: str, settings: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        if not places:
            return preset_layers_of(actions, flags, settings)
        # Each arm gets the places of its own scorers: only some methods have auxiliary ones.
        others = {key: value for key, value in flags.items() if key != "reward_models"}
        arm = make_config([*preset_layers_of(actions, others, settings), (f"arm {name}", settings)])
        own = [known for known in places if known in (*arm.reward, *arm.extra_rewards)]
        used.update(own if "reward_models" not in settings else ())
        return preset_layers_of(actions, flags | {"reward_models": [places[known] for known in own]}, settings)

    hush()
    from . import arms, comparison

    for key in arms.FIXED.keys() & flags.keys():
        if getattr(make_config([("flags", {key: flags[key]})]), key) != arms.FIXED[key]:
            raise ConfigError(f"--{key.replace('_', '-')} is set by the comparison: leave it out")
    folder = namespace.output_dir
    budget = {k: getattr(namespace, k) for k in ("evaluations", "seconds") if getattr(namespace, k) is not None}
    made = arms.make_arms(named, namespace.seeds, layers, folder.resolve(), budget)
    if unused := [name for name in places if name not in used]:
        raise ConfigError(f"--reward-models {one_line(places[unused[0]], 80)}: {unused[0]} is no reward of any arm")
    return exit_code(
        lambda: comparison.compare(made, folder.resolve(), budget, namespace.jobs, namespace.launch, evaluation_seed)
    )
