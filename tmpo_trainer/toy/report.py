"""The command `toy`: trains every arm of `mixture.py` with every seed, and writes a table and a picture."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .mixture import (
    ARMS,
    CONTROLS,
    MODE_RADIUS,
    NOISED,
    ODE_STEPS,
    REWARDED,
    RING,
    SAMPLES,
    STEPS,
    TARGET_SAMPLES,
    Arm,
    Network,
    Target,
    centres,
    effective_modes,
    kl,
    make_target,
    measure,
    mode_masses,
    pretrain,
    reward,
    run_arm,
    sample,
    tilt,
)

Job = tuple[Arm, Network, Target, int, int, float]

#: The figures of every run, by arm.
Results = dict[str, list[dict[str, Any]]]

#: Columns of the table.
COLUMNS = {
    "reward": "mean reward",
    "effective_modes": "effective modes (of 5)",
    "rare": "rare mode",
    "outside": "outside all modes",
    "kl_to_target": "KL(arm to target)",
    "kl_from_target": "KL(target to arm)",
    "rollout_reward": "reward in rollouts",
    "kl_to_per_root": "rollouts: KL(arm to per-root optimum)",
}


def train_all(jobs: Sequence[Job], workers: int) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """The results of `run_arm` for all jobs, in order, computed in this process or in worker processes."""
    if workers == 1:
        yield from map(run_arm, jobs)
        return
    # Spawned: torch's threads do not survive a fork.
    with ProcessPoolExecutor(workers, get_context("spawn")) as executor:
        yield from executor.map(run_arm, jobs)


def run(seeds: int, updates: int, learning_rate: float, folder: Path, controls: bool, workers: int) -> int:
    """Pretrains, trains every arm with every seed, writes toy.md, toy.json and toy.png. Returns the exit code."""
    # It draws the picture in the end.
    importlib.import_module("matplotlib")
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    base = pretrain(seed=0)
    pool = sample(base, TARGET_SAMPLES, seed=1)
    target = make_target(base, pool)
    print(f"pretrained in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    arms = ARMS + CONTROLS + NOISED if controls else ARMS
    jobs = [(arm, base, target, seed, updates, learning_rate) for arm in arms for seed in range(seeds)]
    results: Results = {arm.name: [] for arm in arms}
    pictures = {"base": sample(base, SAMPLES, seed=3)}
    # With replacement: without it, a large part of a finite pool comes too near to the pool itself.
    drawn = torch.multinomial(tilt(reward(pool)), SAMPLES, replacement=True, generator=torch.Generator().manual_seed(4))
    pictures["target"] = pool[drawn]
    for job, (figures, samples) in zip(jobs, train_all(jobs, workers), strict=True):
        name = job[0].name
        results[name].append(figures)
        pictures.setdefault(name, samples)
        print(
            f"{name}, seed {figures['seed']}: reward {figures['reward']:.3f}, effective modes "
            f"{figures['effective_modes']:.2f} ({figures['seconds']:.0f} s)",
            file=sys.stderr,
        )
    base_figures = measure(base, pictures["base"], target)
    seconds = time.perf_counter() - start
    text = table(base_figures, target, results, (updates, learning_rate), seconds)
    (folder / "toy.md").write_text(text, encoding="utf-8")
    content = {
        "updates": updates,
        "learning_rate": learning_rate,
        "seconds": round(seconds, 1),
        "settings": {arm.name: asdict(arm) for arm in arms},
        "base": base_figures,
        "target": {key: value.tolist() if isinstance(value, Tensor) else value for key, value in vars(target).items()},
        "arms": results,
    }
    (folder / "toy.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(pictures, results, target, folder / "toy.png")
    print(text)
    return 0


def spread(runs: Sequence[dict[str, Any]], key: str) -> str:
    """`mean ± standard deviation` of a figure over runs; for a single run, the figure alone."""
    values = [run[key] for run in runs]
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def table(base: dict[str, Any], target: Target, results: Results, settings: tuple[int, float], seconds: float) -> str:
    """toy.md: the figures of every arm, and the mass of every mode."""
    masses = target.masses
    ideal = {"reward": target.reward, "effective_modes": effective_modes(masses), "rare": masses[RING].item()}
    ideal |= {"outside": masses[-1].item(), "kl_to_target": 0.0, "kl_from_target": 0.0}
    ideal |= {"rollout_reward": target.per_root_reward, "kl_to_per_root": 0.0}

    def row(name: str, cells: Sequence[str]) -> str:
        return f"| {' | '.join([name, *cells])} |"

    def fixed(figures: dict[str, Any]) -> list[str]:
        return [f"{figures[key]:.3f}" if key in figures else "" for key in COLUMNS]

    runs = len(next(iter(results.values())))
    lines = [
        f"{runs} seeds, {settings[0]} updates, learning rate {settings[1]:g}, {seconds:.0f} s; mean ± standard deviation over "
        f"seeds. Samples: {SAMPLES} by {ODE_STEPS} Euler steps of the ODE; the last two columns: stochastic rollouts of "
        f"{STEPS} steps from fixed roots. KL(base tilted over all roots together to per-root optimum): "
        f"{kl(target.pooled, target.per_root, SAMPLES):.3f}.",
        "",
        row("", list(COLUMNS.values())),
        row("---", ["---"] * len(COLUMNS)),
        row("base", fixed(base)),
        row("target", fixed(ideal)),
        *[row(name, [spread(runs, key) for key in COLUMNS]) for name, runs in results.items()],
        "",
        "Mass of every mode, mean over seeds (rewarded: 0, 2, 4, 6 and rare); `largest` is that of the fullest rewarded mode "
        "in each run:",
        "",
        row("", [*map(str, range(RING)), "rare", "outside", "largest"]),
        row("---", ["---"] * (RING + 3)),
    ]
    listed = {"base": [base["masses"]], "target": [masses.tolist()]}
    listed |= {name: [run["masses"] for run in runs] for name, runs in results.items()}
    for name, rows in listed.items():
        largest = statistics.fmean(max(row[k] for k in REWARDED) for row in rows)
        means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
        lines.append(row(name, [f"{value:.3f}" for value in (*means, largest)]))
    return "\n".join(lines) + "\n"


def draw(pictures: dict[str, Tensor], results: Results, target: Target, path: Path) -> None:
    """Draws samples over the modes' discs (seed 0) and curves of reward and effective modes (every seed), as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict(zip([arm.name for arm in ARMS], ("tab:red", "tab:orange", "tab:blue", "tab:green"), strict=True))
    figure, axes = pyplot.subplots(2, 4, figsize=(16, 8.8), layout="constrained")
    for axis, name in zip([*axes[0, :2], *axes[1]], ("base", "target", *colours), strict=True):
        x = pictures[name][:3000]
        axis.scatter(*x.T.tolist(), s=4, alpha=0.35, color=colours.get(name, "black"), linewidths=0)
        for k, centre in enumerate(centres().tolist()):
            style = {"color": "green", "linewidth": 1.5} if k in REWARDED else {"color": "grey", "linestyle": "--"}
            axis.add_patch(pyplot.Circle(centre, MODE_RADIUS, fill=False, **style))
        axis.set(xlim=(-5.9, 5.9), ylim=(-5.9, 5.9), aspect="equal", xticks=[], yticks=[])
        modes = effective_modes(mode_masses(pictures[name]))
        figures = f"reward {reward(pictures[name]).mean():.2f}, effective modes {modes:.2f}"
        axis.set_title(f"{name}\n{figures}", fontsize=11)
    figure.suptitle(f"seed 0, {SAMPLES} ODE samples; circles: green rewarded modes, dashed the others", fontsize=11)
    upper, lower = axes[0, 2:]
    for name, colour in colours.items():
        for run in results[name]:
            update, rewards, modes = (
                [point[key] for point in run["curve"]] for key in ("update", "reward", "effective_modes")
            )
            label = name if run is results[name][0] else None
            upper.plot(update, rewards, color=colour, alpha=0.7, linewidth=1, label=label)
            lower.plot(rewards, modes, color=colour, alpha=0.7, linewidth=1, marker=".", label=label)
    upper.axhline(target.reward, color="black", linestyle=":", label="target")
    lower.plot(target.reward, effective_modes(target.masses), "k*", markersize=13, linestyle="", label="target")
    upper.set(xlabel="update", ylabel="mean reward", title="reward, every seed")
    lower.set(xlabel="mean reward", ylabel="effective modes", title="the way there, every seed", ylim=(0.9, 5.1))
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
