"""`compare`: several methods at one budget."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..settings.errors import ConfigError
from ..settings.presets import make_config, read_yaml
from .flags import command_parser, exit_code, hush, parse
from .flags import layers as preset_layers_of

#: Compared unless others are named.
RIVALS = ("tmpo", "flow-grpo", "mix-grpo", "tree-grpo", "gardo")


def command(arguments: Sequence[str]) -> int:
    """Runs the command. Returns the exit code."""
    parser = command_parser(
        "compare",
        "Trains methods from the same base with the same prompts and budget, several seeds each, and evaluates all on the same "
        "held-out prompts: tables, Pareto pictures, curves, grids. After a kill the same command goes on.",
        "All other flags are those of training and hold for every arm: --preset, --reward, --eval-images, ... Without a budget "
        "every arm has the updates of its settings; --updates N gives all the same.",
    )
    arms = parser.add_mutually_exclusive_group()
    arms.add_argument(
        "--methods", nargs="+", default=list(RIVALS), metavar="NAME", help=f"what is compared [{' '.join(RIVALS)}]"
    )
    arms.add_argument(
        "--arms", type=Path, metavar="FILE", help="YAML, {name of an arm: {setting: value}}, instead of methods"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="N", help="seeds of training; one run each [0]"
    )
    budgets = parser.add_mutually_exclusive_group()
    budgets.add_argument(
        "--evaluations", type=float, metavar="N", help="budget: network evaluations of a run, per process"
    )
    budgets.add_argument(
        "--seconds", type=float, metavar="S", help="budget: seconds of training, by a trial run of each arm"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="how many runs go on at a time [1]; use it with --threads"
    )
    parser.add_argument("--launch", choices=("ddp", "fsdp2"), help="every run over all GPUs of this machine")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("outputs/compare"),
        metavar="DIR",
        help="where everything is written [outputs/compare]",
    )
    namespace, rest = parser.parse_known_args(arguments)
    actions, flags = parse(rest)
    if actions.resume or actions.dry_run or actions.print_config:
        raise ConfigError("compare has no --resume, --dry-run or --print-config: the same command goes on by itself")
    for name, value in (
        ("evaluations", namespace.evaluations),
        ("seconds", namespace.seconds),
        ("jobs", namespace.jobs),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} {value}: must be above 0")
    if len(set(namespace.seeds)) < len(namespace.seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, namespace.seeds))} names one twice")
    named: dict[str, Any] = {name: {"method": name} for name in namespace.methods}
    if namespace.arms:
        named = read_yaml(namespace.arms)
        for name, settings in named.items():
            if not isinstance(settings, dict) or not re.fullmatch(r"[A-Za-z][\w.+-]*", str(name)) or name == "base":
                raise ConfigError(
                    f"{namespace.arms}: arm {name}: write NAME: {{setting: value}}, names of letters, digits, . + -"
                )
    if not named:
        raise ConfigError(f"{namespace.arms} names no arms: write NAME: {{setting: value}}")
    if "updates" in flags and (namespace.evaluations or namespace.seconds):
        raise ConfigError("--updates beside --evaluations or --seconds: there is one budget: leave --updates out")
    if namespace.seconds and namespace.jobs > 1:
        raise ConfigError("--seconds with --jobs: runs at the same time slow each other down; leave --jobs out")
    # --seed is that of the evaluation's noise; training has --seeds.
    evaluation_seed = make_config([("flags", {"seed": flags.pop("seed", 0)})]).seed

    def layers(settings: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        return preset_layers_of(actions, flags, settings)

    hush()
    from . import arms, comparison

    folder = namespace.output_dir
    budget = {k: getattr(namespace, k) for k in ("evaluations", "seconds") if getattr(namespace, k) is not None}
    made = arms.make_arms(named, namespace.seeds, layers, folder.resolve(), budget)
    return exit_code(
        lambda: comparison.compare(made, folder.resolve(), budget, namespace.jobs, namespace.launch, evaluation_seed)
    )
