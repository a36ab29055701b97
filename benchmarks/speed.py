"""Compares an update of the trainer with its bare network calls, other methods and settings, and a per-leaf implementation.

    python -m benchmarks speed --backbone flux --rounds 5 --json speed.json
    python -m benchmarks speed --variant "compiled: --compile" --variant "nine: --max-batch 9"

The arms are measured in turn, in `--rounds` rounds; ratios are medians over the rounds. FLUX and SD3.5-Medium have random
weights: in full size on a GPU, on a CPU in a size that is still limited by arithmetic. `--model` takes a model with weights
instead. All other flags are those of `python -m tmpo_trainer` and apply to every arm; those of a `--variant` apply to one arm
more for each position.

- floor: the calls of transformer, VAE decoder and scorer that the trainer makes, on prepared inputs, with nothing around them.
- per-leaf: the same update with batch 1 and nothing shared between leaves (per_leaf.py).
- flow-grpo, mix-grpo, tree-grpo, gardo: the other methods in the same trainer, with the same number of pictures.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tmpo_trainer.commands import flags as trainer_flags
from tmpo_trainer.commands import loading
from tmpo_trainer.settings.errors import ConfigError

from . import growth, models
from .arms import POSITIONS, RIVALS, Arm, FloorArm, PerLeafArm, TrainerArm, configure, measured_memory, positions
from .measuring import PHASES, machine, medians, table
from .per_leaf import relative_error

ARMS = ("floor", "per-leaf", *RIVALS)
#: K = 27 and 81. The replay's batch is then the same, and so its memory has to be.
MEMORY_STEPS, MEMORY_BATCH = {"27": (1, 2, 3), "81": (1, 2, 3, 4)}, 6

Rounds = dict[str, list[dict[str, float]]]


def measure(arms: Sequence[Arm], rounds: int) -> Rounds:
    """Seconds by phase of every arm in every round. The order is reversed in every other round."""
    found: Rounds = {arm.name: [] for arm in arms}
    for number in range(rounds):
        for arm in arms if number % 2 == 0 else reversed(arms):
            found[arm.name].append(arm.run())
            print(f"round {number + 1}: {arm.name} {sum(found[arm.name][-1].values()):.2f} s", file=sys.stderr)
    return found


def ratio(found: Rounds, over: str, under: str, phases: Sequence[str] = PHASES) -> float:
    """The median over the rounds of one arm's seconds over another's in some phases."""

    def seconds(one: dict[str, float]) -> float:
        return sum(one.get(phase, 0.0) for phase in phases)

    return statistics.median(seconds(a) / seconds(b) for a, b in zip(found[over], found[under], strict=True))


def variant(text: str) -> tuple[str, list[str], dict[str, Any]]:
    """(name, presets, settings) of `NAME: FLAGS`. Raises ConfigError."""
    name, colon, flags = text.partition(":")
    if not colon or not name or not flags.strip():
        raise ConfigError(f'--variant {text}: write "NAME: FLAGS", for example "nine: --max-batch 9"')
    actions, given = trainer_flags.parse(shlex.split(flags))
    check_flags(f"--variant {name}: ", actions, given)
    return name, actions.preset or [], given


def check_flags(where: str, actions: argparse.Namespace, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for a flag of the trainer that would do nothing here."""
    if actions.config or actions.resume or actions.dry_run or actions.print_config:
        raise ConfigError(
            f"{where}speed has no --config, --resume, --dry-run or --print-config: give presets and flags"
        )
    for key in ("branch_early", "branch_late"):
        if key in settings:
            raise ConfigError(f"{where}--{key.replace('_', '-')} is set by the benchmark: leave it out")


def build(args: argparse.Namespace, model: models.Model, make: Any, folder: Path) -> tuple[list[Arm], dict[str, float]]:
    """The arms after an update of each, and the relative difference of the per-leaf gradient by position."""
    arms: list[Arm] = []
    differences = {}

    def trainer(name: str, **own: Any) -> TrainerArm:
        return TrainerArm(name, model, make(**own), folder)

    for place in POSITIONS:
        steps = positions(model, make(), place)
        arm = trainer(f"tmpo {place}", method="tmpo", **steps)
        arms.append(arm)
        if "floor" in args.arms:
            floor = FloorArm(f"floor {place}", arm)
            floor.record()
            arms.append(floor)
        else:
            arm.run()
        if "per-leaf" in args.arms:
            single = PerLeafArm(f"per-leaf {place}", trainer("", method="tmpo", **steps))
            single.run(arm.rewards)
            differences[place] = relative_error(single.gradient(), arm.gradient())
            arms.append(single)
        for name, presets, given in args.variants:
            changed = make(presets, **({"method": "tmpo"} | given), **steps)
            if changed.quantize != make().quantize:
                raise ConfigError(
                    f"--variant {name}: all arms share the frozen weights: give --quantize to all of them"
                )
            arms.append(TrainerArm(f"{name} {place}", model, changed, folder))
            arms[-1].run()
    for method, own in RIVALS.items():
        if method in args.arms:
            arms.append(trainer(method, method=method, **({"kl_weight": 0} | own)))
            arms[-1].run()
    return arms, differences


def ratios(found: Rounds) -> dict[str, dict[str, dict[str, float]]]:
    """By arm and position: over the floor in rollout and replay and in all phases, and over the trainer in these two."""
    network = ("rollout", "replay")
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name in found:
        for place in POSITIONS:
            if name.endswith(tuple(POSITIONS)) and not name.endswith(place):
                continue
            own = {}
            if f"floor {place}" in found:
                own["rollout and replay / floor"] = ratio(found, name, f"floor {place}", network)
                own["all / floor"] = ratio(found, name, f"floor {place}")
            own["rollout and replay / tmpo"] = ratio(found, name, f"tmpo {place}", network)
            own["all / tmpo"] = ratio(found, name, f"tmpo {place}")
            result.setdefault(name, {})[place] = own
    return result


def rows(arms: Sequence[Arm], found: Rounds, compared: dict[str, Any]) -> list[list[str]]:
    """The lines of the table, one per arm."""
    lines = []
    for arm in arms:
        seconds = medians(found[arm.name])

        def cell(key: str, name: str = arm.name) -> str:
            return " / ".join(f"{own[key]:.2f}" for own in compared[name].values() if key in own)

        lines.append(
            [arm.name, f"{arm.forwards:g} F + {arm.backwards:g} G", *(f"{seconds[phase]:.3f}" for phase in PHASES)]
            + [f"{sum(seconds.values()):.3f}"]
            + [cell(f"{what} / {base}") for base in ("floor", "tmpo") for what in ("rollout and replay", "all")]
        )
    return lines


def memory_by_leaves(model: models.Model, make: Any, folder: Path) -> dict[str, Any]:
    """Predicted and measured bytes by phase for K = 27 and 81 with the same replay batch."""
    together = min(make().prompts_per_batch, make().prompts_per_update)
    found: dict[str, Any] = {}
    for leaves, steps in MEMORY_STEPS.items():
        own = {"branch_early": steps, "branch_late": steps, "replay_batch": MEMORY_BATCH * together}
        arm = TrainerArm(leaves, model, make(**own), folder)
        arm.run()
        found[leaves] = measured_memory(arm)
    found["replay, 81 / 27 leaves"] = (
        found["81"]["replay"]["beyond its start"] / found["27"]["replay"]["beyond its start"]
    )
    return found


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str], dict[str, Any]]:
    """(own flags, presets, settings of the trainer). Raises ConfigError."""
    parser = trainer_flags.Parser(
        prog="python -m benchmarks speed", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--backbone", choices=models.KINDS, default="demo")
    parser.add_argument(
        "--size", choices=("full", "reduced", "tiny"), help="by default full on a GPU, reduced on a CPU"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS, metavar="ARM", help=f"of {' '.join(ARMS)}")
    parser.add_argument(
        "--variant", action="append", default=[], metavar='"NAME: FLAGS"', help="may be given repeatedly"
    )
    parser.add_argument("--json", type=trainer_flags.path_flag, metavar="FILE", help="also write all figures here")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory for 27 and 81 leaves")
    parser.add_argument(
        "--grow", type=trainer_flags.path_flag, metavar="PICTURE",
        help="instead, measure growth with leaves, steps and resolution, and draw it (docs/images/growth.png)",
    )  # fmt: skip
    args, rest = parser.parse_known_args(arguments)
    args.variants = [variant(text) for text in args.variant]
    actions, settings = trainer_flags.parse(rest)
    check_flags("", actions, settings)
    if args.rounds < 1:
        raise ConfigError(f"--rounds {args.rounds}: at least 1")
    return args, actions.preset or [], settings


def main(arguments: list[str]) -> int:
    args, presets, settings = parse(arguments)
    device = loading.choose_device(settings.get("device", "auto"))
    kind = "own" if "model" in settings else args.backbone
    size = args.size or ("full" if device.type == "cuda" else "reduced")

    def make(more: Sequence[str] = (), **own: Any) -> Any:
        return configure(kind, size, [*presets, *more], settings, **own)

    config = make()
    if config.threads:
        torch.set_num_threads(config.threads)
    loading.quiet()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = models.make(kind, size, config, device, place)
        about = {
            "machine": machine(device), "backbone": kind, "size": size, "seed": config.seed,
            "settings": config.model_dump(mode="json"), "variants": args.variant,
        }  # fmt: skip
        if args.grow:
            result = about | growth.measure(model, make, args.rounds, place)
            growth.draw(result, args.grow)
            print(growth.text(result))
        else:
            result = about | _compare(args, model, make, place)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _compare(args: argparse.Namespace, model: models.Model, make: Any, folder: Path) -> dict[str, Any]:
    """Measures and prints. Returns what goes into the JSON file."""
    arms, differences = build(args, model, make, folder)
    found = measure(arms, args.rounds)
    compared = ratios(found)
    result: dict[str, Any] = {
        "rounds": args.rounds,
        "positions": {place: positions(model, make(), place)["branch_early"] for place in POSITIONS},
        "arms": {
            arm.name: {
                "forwards": arm.forwards,
                "forwards and backwards": arm.backwards,
                "seconds": medians(found[arm.name]),
                "rounds": found[arm.name],
                "ratios": compared[arm.name],
            }
            for arm in arms
        },
        "per-leaf gradient, relative difference": differences,
    }
    header = ["arm", "evaluations", *PHASES, "total", "/ floor", "all / floor", "/ tmpo", "all / tmpo"]
    print(describe(model, make(), result))
    print(table(header, rows(arms, found, compared)))
    for place, difference in differences.items():
        print(f"per-leaf gradient, {place}: relative difference {difference:.1e}")
    if not args.no_memory:
        result["memory"] = memory_by_leaves(model, make, folder)
        print(memory_text(result["memory"]))
    return result


def describe(model: models.Model, config: Any, result: dict[str, Any]) -> str:
    about = machine(model.backbone.device)
    weights = sum(p.numel() for p in model.backbone.transformer.parameters()) / 1e6
    height, width = config.resolution
    places = ", ".join(f"{name} {steps}" for name, steps in result["positions"].items())
    return (
        f"{type(model.backbone).__name__}, {weights:.1f} M weights, {height}x{width}, LoRA rank {config.lora_rank}, branches "
        f"{places}\n{about['device']} ({about['processor']}), {about['threads']} threads, torch {about['torch']}, diffusers "
        f"{about['diffusers']}, seed {config.seed}\nmedians of {result['rounds']} interleaved rounds; seconds per update; F "
        "forward, G forward and backward passes per prompt; ratios of rollout and replay, or of all"
    )


def memory_text(found: dict[str, Any]) -> str:
    """The lines about memory."""
    lines = [
        [leaves, phase, *(f"{own[key] / 2**20:.1f}" for key in ("predicted", "measured")), f"{own['ratio']:.2f}"]
        for leaves in MEMORY_STEPS
        for phase, own in found[leaves].items()
    ]
    same = found["replay, 81 / 27 leaves"]
    header = ["leaves", "phase", "predicted, MiB", "measured, MiB", "ratio"]
    return f"{table(header, lines)}\nreplay memory beyond what the rollout leaves, 81 over 27 leaves: {same:.3f}"
