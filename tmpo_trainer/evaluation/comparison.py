"""What `compare` writes: a table in the shape of the paper's Tables 1 and 2, and pictures in that of Fig. 4 and 6 to 9."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_text
from ..methods import cost
from ..pictures.grids import grid, zoom
from .held_out import Evaluation
from .statistics import measures, numbers, paired_gain

PHASES = ("rollout", "reference", "ratio", "replay")

#: Prompts and pictures of each that are shown.
PROMPTS, PICTURES = 4, 4


@dataclass
class Measured:
    """One run: its model on the held-out prompts, and its metrics.jsonl. Without metrics it is the base, and a trial has no
    evaluation."""

    evaluation: Any
    metrics: list[dict[str, Any]]
    prompts_per_update: int

    def counts(self, line: Mapping[str, Any]) -> dict[str, float]:
        """Network evaluations of one update and prompt."""
        return {phase: line.get(f"evaluations/{phase}", 0.0) for phase in PHASES}

    @property
    def spent(self) -> np.ndarray:
        """Network evaluations after each update, see `methods.cost`: `[updates]`."""
        return np.cumsum([cost(self.counts(line)) for line in self.metrics]) * self.prompts_per_update

    @property
    def seconds(self) -> np.ndarray:
        """Seconds of training after each update: `[updates]`."""
        return np.cumsum([line["seconds"]["total"] for line in self.metrics])


def figures(runs: Sequence[Measured], base: Evaluation) -> dict[str, Any]:
    """Of one arm: mean and spread (standard deviation over seeds, 0 for one) of everything in the table."""
    values: dict[str, list[float]] = {}
    for run in runs:
        own = {name: float(v.mean()) for name, v in measures(run.evaluation).items()}
        own["latent std, change"] = run.evaluation.latent_std / base.latent_std - 1
        if run.metrics:
            own |= {
                "updates": len(run.metrics),
                "s/update": run.seconds[-1] / len(run.metrics),
                "evaluations/update": run.spent[-1] / len(run.metrics),
                "evaluations": run.spent[-1],
            }
        for name, value in own.items():
            values.setdefault(name, []).append(value)
    found: dict[str, Any] = {
        name: {
            "mean": float(np.mean(v)),
            "spread": float(np.std(v, ddof=1)) if len(v) > 1 else 0.0,
            "runs": [float(x) for x in v],
        }
        for name, v in values.items()
    }
    # Paired over prompts, each the mean over seeds.
    found["gain"] = {}
    for name, before in measures(base).items():
        after = np.mean([measures(run.evaluation)[name] for run in runs], axis=0)
        found["gain"][name] = paired_gain(before, after)
    return found


def table(found: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
    """Markdown: a row per arm. In the cells mean +- spread over seeds."""
    head = ["", "runs", "updates", "evaluations per update", "s per update", *names, "latent std"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]

    def cell(values: Mapping[str, Any] | None, form: str) -> str:
        if values is None:
            return ""
        spread = f" ± {values['spread']:{form.lstrip('+')}}" if len(values["runs"]) > 1 else ""
        return f"{values['mean']:{form}}{spread}"

    for arm, row in found.items():
        cells = [
            str(len(row["updates"]["runs"])) if "updates" in row else "",
            f"{row['updates']['mean']:.0f}" if "updates" in row else "",
            f"{row['evaluations/update']['mean']:,.0f}" if "updates" in row else "",
            f"{row['s/update']['mean']:.2f}" if "updates" in row else "",
            *(cell(row[name], ".3f") for name in names),
            cell(row["latent std, change"], "+.1%") if arm != "base" else "",
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(
    folder: Path, runs: Mapping[str, Sequence[Measured]], budget: Mapping[str, float], failed: Sequence[str] = ()
) -> None:
    """table.md, table.json, pareto.png, curves.png, samples.png; prints the table. `failed`: runs that are not in it."""
    base = runs["base"][0].evaluation
    runs = {name: group for name, group in runs.items() if group}
    names = list(measures(base))
    found = {name: figures(group, base) for name, group in runs.items()}
    text = table(found, names)
    target = next(iter(base.scores))
    gains = [
        f"| {arm} | " + " | ".join("{:+.3f} [{:+.3f}, {:+.3f}]".format(*row["gain"][name]) for name in names) + " |"
        for arm, row in found.items()
        if arm != "base"
    ]
    spent = (
        ", ".join(f"{value:,.0f} {name} per run" for name, value in budget.items())
        or "as many updates as the settings say"
    )
    about = (
        f"{len(base.prompts)} held-out prompts x {base.scores[target].shape[1]} pictures, the same noise for all; final "
        f"weights. Budget: {spent}. Mean ± standard deviation over training seeds. Network evaluations are of one process, "
        "forward and backward pass counting one each."
    )
    if failed:
        about += f" Failed and not in the table: {', '.join(failed)}."
    head = ["", *(f"{name}, change" for name in names)]
    sections = [
        "# Comparison", about, text,
        "Change against the base, with 95% bootstrap intervals over prompts of the mean over seeds:",
        "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *gains]),
        "![reward, diversity, time](pareto.png)", "![training curves](curves.png)", "![pictures](samples.png)",
    ]  # fmt: skip
    write_text(folder / "table.md", "\n\n".join(sections) + "\n")
    arms = {arm: row | {"gain": {n: numbers(gain) for n, gain in row["gain"].items()}} for arm, row in found.items()}
    content = {"budget": dict(budget), "failed": list(failed), "arms": arms}
    write_text(folder / "table.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    plots(folder, runs, found, target)
    samples(folder / "samples.png", runs)
    print(text)


def plots(
    folder: Path, runs: Mapping[str, Sequence[Measured]], found: Mapping[str, Mapping[str, Any]], target: str
) -> None:
    """pareto.png: the target against diversity and time. curves.png: reward in the rollouts over evaluations and seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {name: f"C{i % 10}" for i, name in enumerate(name for name in runs if name != "base")} | {"base": "black"}
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, key in zip(axes, ("cosine diversity", "LGMD", "s/update"), strict=True):
        for name, row in found.items():
            if key not in row:
                continue
            style = {"color": colours[name], "marker": "X" if name == "base" else "o"}
            axis.scatter(row[key]["runs"], row[target]["runs"], s=14, alpha=0.5, linewidths=0, **style)
            axis.scatter(row[key]["mean"], row[target]["mean"], s=70, label=name, **style)
        axis.set_xlabel({"s/update": "seconds per update"}.get(key, key))
        axis.set_ylabel(f"{target}, held out")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(folder / "pareto.png", dpi=110)
    pyplot.close(figure)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, group in runs.items():
        if name == "base":
            continue
        rewards = [key for key in group[0].metrics[0] if key.startswith("reward/")]
        updates = min(len(run.metrics) for run in group)
        values = np.mean([[line[rewards[0]] for line in run.metrics[:updates]] for run in group], 0)
        window = max(1, updates // 10)
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        for axis, key in zip(axes, ("spent", "seconds"), strict=True):
            x = np.mean([getattr(run, key)[:updates] for run in group], 0)[window - 1 :]
            axis.plot(x, smooth, label=name, color=colours[name])
            axis.set_xlabel({"spent": "network evaluations", "seconds": "seconds of training"}[key])
            axis.set_ylabel(f"{rewards[0].removeprefix('reward/')} in rollouts")
            axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(folder / "curves.png", dpi=110)
    pyplot.close(figure)


def samples(path: Path, runs: Mapping[str, Sequence[Measured]]) -> None:
    """The same seeds for every arm, of the first run of each: a block of rows per prompt, a row per arm."""
    base = runs["base"][0].evaluation
    chosen = np.linspace(0, len(base.shown) - 1, min(PROMPTS, len(base.shown))).astype(int)
    rows, labels = [], []
    for i in chosen:
        for name, group in runs.items():
            rows.append(group[0].evaluation.images[i][:PICTURES])
            labels.append(f"{name}: {base.prompts[base.shown[i]]}" if name == "base" else name)
    # Blocks side by side keep the picture from growing tall.
    height = len(runs)
    blocks = [grid(rows[k : k + height], labels[k : k + height], zoom(rows[0])) for k in range(0, len(rows), height)]
    from PIL import Image

    sheet = Image.new("RGB", (sum(b.width for b in blocks) + 12 * (len(blocks) - 1), blocks[0].height), "white")
    for k, block in enumerate(blocks):
        sheet.paste(block, (k * (block.width + 12), 0))
    sheet.save(path)
