"""How an update grows with leaves, steps and resolution: part of `python -m benchmarks speed --grow`.

Evaluations are counted exactly. Time is that of rollout and replay, as a multiple of one network call for one latent that is
measured in turn with it. The per-leaf implementation and flow-grpo are counted: a forward and backward pass counts as many
calls as it takes in the trainer's own replay.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from tmpo_trainer import flow

from . import models
from .arms import FloorArm, TrainerArm, network_call
from .measuring import table

LEAVES = {3: (2,), 9: (1, 2), 27: (1, 2, 3), 81: (1, 2, 3, 4)}
STEPS = (6, 10, 28)
#: Times the model's own resolution.
RESOLUTIONS = (1, 1.5, 2)
SERIES = ("tmpo", "floor", "per-leaf", "flow-grpo")


def measure(model: models.Model, make: Any, rounds: int, folder: Path) -> dict[str, Any]:
    """`{"growth": {what: [point, ...]}}`."""
    one = {"prompts_per_update": 1, "prompts_per_batch": 1}
    side = make().resolution[0]
    unit = 16

    def points(key: str, values: Any) -> list[dict[str, Any]]:
        return [{key: value} | _point(model, make(**one, **own), rounds, folder) for value, own in values]

    def branches(steps: tuple[int, ...]) -> dict[str, Any]:
        return {"branch_early": steps, "branch_late": steps}

    usual = branches((1, 2, 3))
    sides = [int(side * factor) // unit * unit for factor in RESOLUTIONS]
    return {
        "rounds": rounds,
        "growth": {
            "leaves K": points("leaves K", [(k, branches(steps)) for k, steps in LEAVES.items()]),
            "steps N": points("steps N", [(n, usual | {"rollout_steps": n}) for n in STEPS]),
            "pixels per side": points("pixels per side", [(s, usual | {"resolution": (s, s)}) for s in sides]),
        },
    }


def _point(model: models.Model, config: Any, rounds: int, folder: Path) -> dict[str, Any]:
    arm = TrainerArm("tmpo", model, config, folder)
    floor = FloorArm("floor", arm)
    floor.record()
    call = network_call(model, config)
    call()
    found, bare, calls, cost = [], [], [], []
    for _ in range(rounds):
        seconds, least = arm.run(), floor.run()
        single = min(_timed(call, model.backbone.device) for _ in range(5))
        calls.append(single)
        found.append((seconds["rollout"] + seconds["replay"]) / single)
        bare.append((least["rollout"] + least["replay"]) / single)
        cost.append(least["replay"] / arm.backwards / (least["rollout"] / arm.forwards))
    plan = arm.plan
    transitions = len(plan.fanout)
    backward = statistics.median(cost)
    evaluations = {
        "tmpo": (plan.rollout_evaluations, plan.train_evaluations),
        "per-leaf": (plan.rollout_evaluations, plan.leaves * transitions),
        # Chains with noise at every step that may carry it.
        "flow-grpo": _flow_grpo(model, config),
    }
    return {
        "evaluations": evaluations,
        "seconds of a call": statistics.median(calls),
        "a forward and backward pass, in forward passes": backward,
        "tmpo": statistics.median(found),
        "floor": statistics.median(bare),
        "per-leaf": evaluations["per-leaf"][0] + backward * evaluations["per-leaf"][1],
        "flow-grpo": evaluations["flow-grpo"][0] + backward * evaluations["flow-grpo"][1],
    }


def _flow_grpo(model: models.Model, config: Any) -> tuple[int, int]:
    """Forward, and forward and backward, passes of flow-grpo with as many pictures."""
    last = flow.last_stochastic_step(model.backbone.sigmas(config.rollout_steps, *config.resolution))
    return config.leaves * config.rollout_steps, config.leaves * last


def _timed(call: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def text(result: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [
        [what, str(point[what]), f"{f} F + {g} G", *(f"{point[name]:.0f}" for name in SERIES)]
        for what, points in result["growth"].items()
        for point in points
        for f, g in [point["evaluations"]["tmpo"]]
    ]
    return table(["what grows", "", "evaluations", *(f"{name}, calls" for name in SERIES)], lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel per quantity, both axes logarithmic; what is only counted has a dashed line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    panels = figure.subplots(1, len(result["growth"]), sharey=True)
    styles = {"tmpo": "o-", "floor": "x:", "per-leaf": "s--", "flow-grpo": "^--"}
    names = {
        "tmpo": "TMPO",
        "floor": "its bare network calls",
        "per-leaf": "per leaf (counted)",
        "flow-grpo": "Flow-GRPO (counted)",
    }
    for axes, (what, points) in zip(panels, result["growth"].items(), strict=True):
        x = [point[what] for point in points]
        for series in SERIES:
            axes.plot(x, [point[series] for point in points], styles[series], label=names[series], markersize=4)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(x, [str(value) for value in x])
        axes.minorticks_off()
        axes.set_xlabel(what)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("rollout and replay,\nin calls for one latent")
    panels[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
