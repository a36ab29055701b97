"""Writes the results of `compare`: a table like the paper's Tables 1 and 2, and pictures like its Fig. 4 and 6 to 9."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..diversity import MEASURES
from ..files import write_text
from ..methods import cost
from ..pictures.grids import grid, zoom
from . import drift, limit
from .held_out import Evaluation
from .report import limit_section, running_mean
from .statistics import counted, markdown_table, paired_gain

PHASES = ("rollout", "reference", "ratio", "replay", "backward")

#: The number of prompts shown, and of pictures of each.
PROMPTS, PICTURES = 4, 4

#: Colours, of which every further round has other markers and lines.
COLOURS = 20
#: Lines of the arms along one front, and markers.
STYLES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^")


@dataclass(frozen=True)
class Course:
    """The course of a run's training, from its metrics.jsonl; it is empty for the base.

    timed: whether its seconds count. Of runs that trained beside each other they say little.
    """

    metrics: Sequence[Mapping[str, Any]]
    prompts_per_update: int
    timed: bool = True

    @property
    def calls(self) -> np.ndarray:
        """Network evaluations after each update, see `methods.cost`: `[updates]`."""
        per_prompt = [cost({phase: line.get(f"evaluations/{phase}", 0.0) for phase in PHASES}) for line in self.metrics]
        return np.cumsum(per_prompt) * self.prompts_per_update

    @property
    def seconds(self) -> np.ndarray:
        """Seconds of training after each update: `[updates]`."""
        return np.cumsum([line["seconds"]["total"] for line in self.metrics])


@dataclass
class Measured:
    """One run: its model on the held-out prompts, and its training."""

    evaluation: Evaluation
    course: Course


def figures(runs: Sequence[Measured], base: Evaluation) -> dict[str, Any]:
    """One arm's mean and spread (standard deviation over seeds, 0 for one) of every figure in the table, and its gains."""
    values: dict[str, list[float]] = {}
    for run in runs:
        for name, value in _figures_of(run, base).items():
            values.setdefault(name, []).append(value)
    found: dict[str, Any] = {
        name: {"mean": float(np.mean(v)), "spread": float(np.std(v, ddof=1)) if len(v) > 1 else 0.0, "runs": v}
        for name, v in values.items()
    }
    # Gains are paired by prompt, after averaging over seeds.
    found["gain"] = {
        name: paired_gain(before, np.mean([run.evaluation.measures[name] for run in runs], axis=0), base.prompts)
        for name, before in base.measures.items()
    }
    return found


def _figures_of(run: Measured, base: Evaluation) -> dict[str, float]:
    own = {name: float(values.mean()) for name, values in run.evaluation.measures.items()}
    own["latent std, change"] = float(run.evaluation.latent_std / base.latent_std - 1)
    updates = len(run.course.metrics)
    if updates:
        calls = float(run.course.calls[-1])
        own |= {
            "updates": updates,
            "network evaluations/update": calls / updates,
            "network evaluations": calls,
        }
        if run.course.timed:
            seconds = float(run.course.seconds[-1])
            own |= {"seconds": seconds, "s/update": seconds / updates}
    return own


def figures_table(found: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
    """A Markdown table with a row per arm; the cells hold mean ± spread over seeds."""

    def cell(values: Mapping[str, Any], form: str) -> str:
        spread = f" ± {values['spread']:{form.lstrip('+')}}" if len(values["runs"]) > 1 else ""
        return f"{values['mean']:{form}}{spread}"

    rows, timed = [], _timed(found)
    for arm, row in found.items():
        training = [""] * (4 if timed else 3)
        if "updates" in row:
            training = [
                str(len(row["updates"]["runs"])),
                f"{row['updates']['mean']:.0f}",
                f"{row['network evaluations/update']['mean']:,.0f}",
                *([f"{row['s/update']['mean']:.2f}"] if timed else []),
            ]
        change = "" if arm == "base" else cell(row["latent std, change"], "+.1%")
        rows.append([arm, *training, *(cell(row[name], ".3f") for name in names), change])
    head = ["", "runs", "updates", "network evaluations per update", *(["s per update"] if timed else [])]
    return markdown_table([*head, *names, "latent std"], rows)


def write(
    folder: Path,
    runs: Mapping[str, Sequence[Measured]],
    budget: Mapping[str, float],
    fronts: Sequence[Sequence[str]],
    failed: Sequence[str] = (),
) -> None:
    """Writes table.md, table.json, pareto.png, curves.png and samples.png, and prints the table.

    Args:
        runs: {arm: its runs}, with the base as the arm `base`. fronts: all arms, those along one line together, in its
            order. failed: names of the missing runs.
    """
    base = runs["base"][0].evaluation
    runs = {name: group for name, group in runs.items() if group}
    names = list(base.measures)
    found = {name: figures(group, base) for name, group in runs.items()}
    text = figures_table(found, names)
    gains = [[arm, *(row["gain"][n].text("+.3f") for n in names)] for arm, row in found.items() if arm != "base"]
    curve = limit.front(base)
    about, table, costs = "", "", {}
    if curve is not None:
        models = {name: [run.evaluation for run in group] for name, group in runs.items() if name != "base"}
        about, table, costs = limit_section(curve, base, models)
    drifts = {
        name: [drift.drifts(base.statistics, run.evaluation.statistics, base.prompts) for run in group]
        for name, group in runs.items()
        if name != "base"
    }
    sections = [
        "# Comparison",
        _about(base, budget, failed, _timed(found)),
        text,
        "Change against the base: means over seeds, with 95% bootstrap intervals over prompts:",
        markdown_table(["", *(f"{name}, change" for name in names)], gains),
        *([about, table] if table else []),
        drift.by_arm(drifts),
        "![reward, diversity, time](pareto.png)",
        "![training curves](curves.png)",
        "![pictures](samples.png)",
    ]
    write_text(folder / "table.md", "\n\n".join(sections) + "\n")
    arms = {arm: row | {"gain": {n: gain.finite() for n, gain in row["gain"].items()}} for arm, row in found.items()}
    for arm, found_drifts in drifts.items():
        arms[arm]["drift"] = [drift.content(one) for one in found_drifts]
    content = {"budget": dict(budget), "failed": list(failed), "arms": arms, "limit": costs}
    write_text(folder / "table.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    # Without the arms whose runs all failed.
    lines = [kept for names in fronts if (kept := [name for name in names if name in runs])]
    pareto(folder / "pareto.png", found, next(iter(base.scores)), lines, curve)
    curves(folder / "curves.png", runs, lines)
    samples(folder / "samples.png", runs)
    print(f"{text}\n\n{table}" if table else text)


def _timed(found: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the figures of the arms have seconds."""
    return any("seconds" in row for row in found.values())


def _about(base: Evaluation, budget: Mapping[str, float], failed: Sequence[str], timed: bool) -> str:
    named = {"evaluations": "network evaluations"}
    limits = [f"{value:,.0f} {named.get(name, name)} per run" for name, value in budget.items()]
    images = next(iter(base.scores.values())).shape[1]
    about = (
        f"{counted(base.prompts, 'held-out prompts')} x {images} pictures, the same noise for all; final weights. Budget: "
        f"{', '.join(limits) or 'the number of updates in the settings'}. Mean ± standard deviation over training seeds. "
        "Network evaluations are those of one process; a forward and a backward pass count one each."
    )
    about += "" if timed else " Without seconds, because runs trained beside each other."
    return about + (f" Failed and not in the table: {', '.join(failed)}." if failed else "")


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    palette = colormaps["tab10" if count <= 10 else f"tab{COLOURS}"]
    return [palette(i % palette.N) for i in range(count)]


def pareto(
    path: Path,
    found: Mapping[str, Mapping[str, Any]],
    target: str,
    fronts: Sequence[Sequence[str]],
    curve: limit.Front | None = None,
) -> None:
    """The target score against every measure of diversity, and if runs are timed against time: a point per run, a larger one
    for their mean.

    The means of a front are joined. Against the cosine diversity also the limit.
    """
    from matplotlib.figure import Figure

    against = {name: name for name in MEASURES} | ({"seconds": "seconds of training"} if _timed(found) else {})
    figure = Figure(figsize=(4.4 * len(against) + 3, _height(2 + sum(map(_lines, fronts)))), layout="constrained")
    axes = figure.subplots(1, len(against), sharey=True)
    palette = _colours(len(fronts))
    styles: list[dict[str, Any]] = [{"color": "black", "marker": "X"}]
    styles += [{"color": colour, "marker": MARKERS[i // COLOURS % len(MARKERS)]} for i, colour in enumerate(palette)]
    for axis, (key, title) in zip(axes, against.items(), strict=True):
        for names, style in zip([["base"], *fronts], styles, strict=True):
            rows = [found[name] for name in names if key in found[name]]
            for row in rows:
                axis.scatter(row[key]["runs"], row[target]["runs"], s=14, alpha=0.5, linewidths=0, **style)
            means = [[row[name]["mean"] for row in rows] for name in (key, target)]
            label = _label(names)
            axis.plot(*means, markersize=8, linewidth=1.5, label=label, **style)
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{target}, held out")
    handles = axes[0].get_lines()
    if curve is not None:
        axis = axes[list(against).index(limit.COSINE)]
        # The limit goes on far beyond what runs reach.
        shown = axis.axis()
        limit.draw(axis, curve)
        axis.axis(shown)
        handles = [*handles, axis.get_lines()[-1]]
    figure.legend(handles=handles, fontsize=8, loc="outside left upper")
    figure.savefig(path, dpi=110)


def _label(names: Sequence[str]) -> str:
    """The entry of the arms of a front in a legend."""
    return textwrap.fill(", ".join(names), 36, break_on_hyphens=False)


def _lines(names: Sequence[str]) -> int:
    return _label(names).count("\n") + 1


def _height(lines: int) -> float:
    """Inches of a picture whose legend has so many lines."""
    return max(4, 0.17 * lines + 0.4)


def curves(path: Path, runs: Mapping[str, Sequence[Measured]], fronts: Sequence[Sequence[str]]) -> None:
    """The first reward in the rollouts, over network evaluations and if runs are timed over seconds: each arm's mean over its
    runs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panels = 2 if any(run.course.timed for names in fronts for name in names for run in runs[name]) else 1
    figure = Figure(figsize=(4.5 * panels + 2, _height(sum(map(len, fronts)))), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    palette = _colours(len(fronts))
    styles = {
        name: {"color": palette[i], "linestyle": STYLES[(k + i // COLOURS) % len(STYLES)]}
        for i, names in enumerate(fronts)
        for k, name in enumerate(names)
    }
    for name, style in styles.items():
        courses = [run.course for run in runs[name]]
        reward = next(key for key in courses[0].metrics[0] if key.startswith("reward/"))
        updates = min(len(course.metrics) for course in courses)
        smooth = running_mean(np.mean([[line[reward] for line in c.metrics[:updates]] for c in courses], 0), 10)
        spent = {
            "network evaluations": [course.calls[:updates] for course in courses],
            "seconds of training": [course.seconds[:updates] for course in courses],
        }
        # A line of one point is nothing.
        marker = "o" if len(smooth) == 1 else None
        for axis, (label, values) in zip(axes, spent.items(), strict=False):
            axis.plot(np.mean(values, 0)[-len(smooth) :], smooth, label=name, marker=marker, **style)
            axis.set_xlabel(label)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.set_ylabel(f"{reward.removeprefix('reward/')} in rollouts")
            axis.grid(alpha=0.3)
    figure.legend(handles=axes[0].get_lines(), fontsize=8, loc="outside left upper")
    figure.savefig(path, dpi=110)


def samples(path: Path, runs: Mapping[str, Sequence[Measured]]) -> None:
    """Pictures by the first run of every arm, from the same seeds: a block of rows per prompt, a row per arm."""
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
    sheet = Image.new("RGB", (sum(b.width for b in blocks) + 12 * (len(blocks) - 1), blocks[0].height), "white")
    for k, block in enumerate(blocks):
        sheet.paste(block, (k * (block.width + 12), 0))
    sheet.save(path)
