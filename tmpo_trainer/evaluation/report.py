"""Writes a report: tables, curves, pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import replacing, write_text
from ..pictures.grids import grid, zoom
from . import drift, limit
from .held_out import Evaluation
from .statistics import Interval, interval, markdown_table, paired_gain, summary, verdict

#: Updates at a run's beginning and end whose velocity errors are compared, and the rise that is warned of.
WINDOW, RISE = 20, 2.0


@dataclass
class Intervals:
    """Intervals over prompts for every measure: by model, and for the paired gain if there are two models."""

    models: dict[str, dict[str, Interval]]
    gain: dict[str, Interval]

    @classmethod
    def of(cls, models: Mapping[str, Sequence[Evaluation]]) -> Intervals:
        """Computes them from {model: its evaluations, one per list of prompts}, with the base first.

        With two lists, scores are measured on the prompts of their own list, and diversity on those of the last.
        """
        measured = {label: _figures(parts) for label, parts in models.items()}
        gain = {}
        if len(measured) == 2:
            base, trained = measured.values()
            gain = {name: paired_gain(values, trained[name][0], prompts) for name, (values, prompts) in base.items()}
        return cls({label: {n: interval(*v) for n, v in found.items()} for label, found in measured.items()}, gain)

    def markdown(self) -> str:
        """A table with a row per model and one for the gain."""
        names = list(next(iter(self.models.values())))
        rows = [[label, *(found[name].text() for name in names)] for label, found in self.models.items()]
        if self.gain:
            rows.append(["change, paired", *(self.gain[name].text("+.3f") for name in names)])
        return markdown_table(["", *names], rows)

    def content(self) -> dict[str, Any]:
        """The same figures for JSON."""
        models = {label: {n: v.finite() for n, v in found.items()} for label, found in self.models.items()}
        gain = {"gain": {name: values.finite() for name, values in self.gain.items()}} if self.gain else {}
        return {"models": models, **gain}


def _figures(parts: Sequence[Evaluation]) -> dict[str, tuple[np.ndarray, list[str]]]:
    """The values of every measure, and the prompts that they belong to."""
    scores = {name: (values, part.prompts) for part in parts for name, values in part.scores.items()}
    return scores | {name: (values, parts[-1].prompts) for name, values in parts[-1].diversity.items()}


def curves(
    metrics: Sequence[dict[str, Any]],
    evaluations: Sequence[dict[str, Any]],
    rewards: Sequence[str],
    target: str,
    path: Path,
) -> None:
    """Reward, diversity and distance from the base over updates, with a running mean, as a PNG.

    If the model was evaluated during training, an extra panel shows the gains.
    """
    from matplotlib.figure import Figure

    series = [(f"reward/{name}", f"reward: {name}") for name in rewards]
    series += [("lgmd", "LGMD of the leaves"), ("latent_std", "latent standard deviation")]
    # Without a penalty there is no KL, and with one optimiser step per rollout the ratio is 1 by construction.
    if all("kl_reference" in line for line in metrics):
        series.append(("kl_reference", "KL penalty, before its weight"))
    if all("velocity_mse" in line for line in metrics):
        series.append(("velocity_mse", "error of the velocity on the leaves"))
    if any(line.get("ratio_mean", 1) != 1 for line in metrics):
        series.append(("ratio_mean", "mean ratio"))
    panels = len(series) + bool(evaluations)
    figure = Figure(figsize=(3.6 * panels, 3), layout="constrained")
    axes = figure.subplots(1, panels)
    updates = [line["update"] for line in metrics]
    for axis, (key, title) in zip(axes, series, strict=False):
        _plot_series(axis, updates, np.array([line[key] for line in metrics]))
        axis.set_title(title, fontsize=10)
    if evaluations:
        _plot_gains(axes[-1], [line["update"] for line in evaluations], [line["gain"][target] for line in evaluations])
        axes[-1].set_title(f"gain on held-out prompts: {target}", fontsize=10)
    for axis in axes:
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def velocity_errors(metrics: Sequence[Mapping[str, Any]]) -> list[float]:
    """The errors of the network on its own leaves in lines of metrics.jsonl; methods on transitions have none."""
    return [line["velocity_mse"] for line in metrics if isinstance(line.get("velocity_mse"), int | float)]


def error_warning(errors: Sequence[float]) -> str:
    """A line if `velocity_errors` are by now far above those of the first updates, or ""."""
    if len(errors) < 2 * WINDOW:
        return ""
    rise = float(np.mean(errors[-WINDOW:]) / np.mean(errors[:WINDOW]))
    if not rise > RISE:
        return ""
    return (
        f"velocity_mse, the network's error on the pictures that it is trained on, is {rise:.1f} times that of the first "
        f"{WINDOW} updates: it goes on drawing what it is pushed away from, and the reward may stop rising. It is held by "
        "a `negative_limit`, such as 2 (with `reference_share` 1), or a larger `kl_weight`."
    )


def running_mean(values: np.ndarray, share: int) -> np.ndarray:
    """Running means of `values [N]` over windows of N // share values: `[M]`, for the last M of the N."""
    window = max(1, len(values) // share)
    return np.convolve(values, np.ones(window) / window, "valid")


def _plot_series(axis: Any, updates: Sequence[int], values: np.ndarray) -> None:
    smooth = running_mean(values, 12)
    # A line of one point is nothing.
    marker = "o" if len(values) == 1 else None
    axis.plot(updates, values, color="tab:blue", alpha=0.3, linewidth=1)
    axis.plot(updates[-len(smooth) :], smooth, color="tab:blue", linewidth=2, marker=marker)
    axis.ticklabel_format(useOffset=False)


def _plot_gains(axis: Any, updates: Sequence[int], gains: Sequence[Mapping[str, float | None]]) -> None:
    found = [Interval.of(gain) for gain in gains]
    # The interval of a single prompt has no ends to draw.
    ends = [(one.mean - one.low, one.high - one.mean) if np.isfinite(one.high) else (0, 0) for one in found]
    axis.errorbar(updates, [one.mean for one in found], np.transpose(ends), marker="o", capsize=3, color="tab:green")
    axis.axhline(0, color="grey", linewidth=1)


def side_by_side(base: Evaluation, trained: Evaluation, path: Path, images: int = 6) -> None:
    """Base left, trained right, the same seeds: prompts spread over the held-out list."""
    gap = np.full((1, *base.images.shape[2:]), 255, np.uint8)
    pairs = zip(base.images, trained.images, strict=True)
    rows = [np.concatenate([before[:images], gap, after[:images]]) for before, after in pairs]
    labels = [f"{base.prompts[i]}   (left: base, right: trained, same seeds)" for i in base.shown]
    with replacing(path) as temporary:
        grid(rows, labels, zoom(base.images[0])).save(temporary)


def limit_section(
    curve: limit.Front, base: Evaluation, runs: Mapping[str, Sequence[Evaluation]]
) -> tuple[str, str, dict[str, Any]]:
    """What a report says about the limit: a sentence on it, the table, and the figures for JSON.

    Args:
        runs: {label: one arm's models}. Without any, the table shows points of the front.
    """
    found = {label: limit.compared(curve, base, group) for label, group in runs.items()}
    table = markdown_table(limit.POINTS_HEAD, limit.point_rows(curve))
    if found:
        table = markdown_table(limit.HEAD, [row for label, own in found.items() for row in limit.rows(label, own)])
    models = {label: {name: cost.content() for name, cost in own.items()} for label, own in found.items()}
    about = limit.about(next(iter(base.scores)), len(set(base.prompts)) == 1)
    return about, table, {"front": limit.content(curve), "models": models}


def write_report(
    run: Path,
    base: Evaluation,
    trained: Evaluation,
    metrics: Sequence[dict[str, Any]],
    evaluations: Sequence[dict[str, Any]],
    rewards: Sequence[str],
    about: Sequence[str],
    target: str,
    neutral: Sequence[str] = (),
) -> dict[str, bool]:
    """Writes report.md, report.json, curves.png, pareto.png and samples.png. Returns the verdict.

    Args:
        metrics: lines of metrics.jsonl. evaluations: lines of evaluations.jsonl. rewards: names of the run's rewards.
        about: lines on how the figures were made. target: the score that should have risen.
        neutral: the statistics that the run takes out of its reward wholly.
    """
    figures = summary(base, trained)
    after_last = {"update": metrics[-1]["update"], **figures}
    checks = verdict(base, trained, target)
    moved = drift.drifts(base.statistics, trained.statistics, base.prompts)
    content = {"prompts": len(base.prompts), **figures, "drift": drift.content(moved), "verdict": checks}
    parts = drift.section(moved, neutral), error_warning(velocity_errors(metrics))
    sections = [_markdown(figures, checks, about, "\n\n".join(part for part in parts if part))]
    curve = limit.front(base)
    if curve is not None:
        text, table, content["limit"] = limit_section(curve, base, {"trained": [trained]})
        sections.append(f"{text}\n\n{table}\n\n![limit](pareto.png)\n")
    # The figures first: a picture that cannot be written does not take them along.
    write_text(run / "report.json", json.dumps(content, indent=2) + "\n")
    curves(metrics, [*evaluations, after_last] if evaluations else [], rewards, target, run / "curves.png")
    side_by_side(base, trained, run / "samples.png")
    if curve is not None:
        limit.plot(run / "pareto.png", curve, base, {"trained": trained})
    # Last: it marks a run that is done.
    write_text(run / "report.md", "\n".join(sections))
    return checks


def _markdown(figures: Mapping[str, Any], checks: Mapping[str, bool], about: Sequence[str], moved: str) -> str:
    before, after = figures["base"], figures["trained"]
    rows = [
        [name, f"{before[name]:.3f}", f"{after[name]:.3f}", Interval.of(gain).text("+.3f")]
        for name, gain in figures["gain"].items()
    ]
    stds = before["latent_std"], after["latent_std"]
    rows.append(["latent standard deviation", *(f"{std:.3f}" for std in stds), f"{stds[1] / stds[0] - 1:+.1%}"])
    sections = [
        "# Report",
        "\n".join(about),
        markdown_table(["held-out prompts", "base", "trained", "change, 95% paired interval"], rows),
        "\n".join(f"- [{'x' if holds else ' '}] {claim}" for claim, holds in checks.items()),
        moved,
        "![curves](curves.png)",
        "![base and trained](samples.png)",
    ]
    return "\n\n".join(sections) + "\n"
