"""What a report shows: tables, curves, pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..pictures.grids import grid, zoom
from . import held_out, statistics
from .held_out import Evaluation
from .statistics import interval, numbers, summary, verdict


def _figures(parts: list[held_out.Evaluation]) -> dict[str, np.ndarray]:
    """Measures by name. With two lists of prompts the task's scores are on the first, all else on the last."""
    scores = {name: values for part in parts for name, values in part.scores.items()}
    return {**scores, "LGMD": parts[-1].lgmd, "cosine diversity": parts[-1].cosine}


def rows(models: Mapping[str, list[held_out.Evaluation]]) -> tuple[str, dict[str, Any]]:
    """The table in markdown, and the same as an object: per model and measure mean, low and high; gains if there are two.

    Args:
        models: {label: its evaluations}, the base first.
    """
    measured = {label: _figures(parts) for label, parts in models.items()}
    names = list(next(iter(measured.values())))
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    content: dict[str, Any] = {"models": {}}
    for label, values in measured.items():
        found = {name: interval(values[name]) for name in names}
        content["models"][label] = {name: numbers(values) for name, values in found.items()}
        cells = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in found.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    if len(measured) == 2:
        base, trained = measured.values()
        gains = {name: statistics.paired_gain(base[name], trained[name]) for name in names}
        content["gain"] = {name: numbers(gain) for name, gain in gains.items()}
        cells = [f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in gains.values()]
        lines.append(f"| change, paired | {' | '.join(cells)} |")
    return "\n".join(lines), content


def curves(
    metrics: Sequence[dict[str, Any]],
    evaluations: Sequence[dict[str, Any]],
    rewards: Sequence[str],
    target: str,
    path: Path,
) -> None:
    """Reward, diversity and distance from the base over updates, with a running mean, as a PNG.

    Evaluations on the way, if there were any, get a panel of their own.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = [(f"reward/{name}", f"reward: {name}") for name in rewards]
    series += [("lgmd", "LGMD of the leaves"), ("latent_std", "latent standard deviation")]
    # Without a penalty there is no KL, and with one optimiser step per rollout the ratio is 1 by construction.
    if all("kl_reference" in line for line in metrics):
        series.append(("kl_reference", "KL to the reference, per dimension"))
    if any(line.get("ratio_mean", 1) != 1 for line in metrics):
        series.append(("ratio_mean", "mean ratio"))
    panels = len(series) + bool(evaluations)
    figure, axes = pyplot.subplots(1, panels, figsize=(3.6 * panels, 3), layout="constrained")
    updates = [line["update"] for line in metrics]
    if evaluations:
        axis = axes[-1]
        gains = [line["gain"][target] for line in evaluations]
        centre = np.array([gain["mean"] for gain in gains])
        ends = [centre - [gain["low"] for gain in gains], [gain["high"] for gain in gains] - centre]
        axis.errorbar([line["update"] for line in evaluations], centre, ends, marker="o", capsize=3, color="tab:green")
        axis.axhline(0, color="grey", linewidth=1)
        axis.set_title(f"gain on held-out prompts: {target}", fontsize=10)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    for axis, (key, title) in zip(axes, series, strict=False):
        values = np.array([line[key] for line in metrics])
        window = max(1, len(values) // 12)
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        axis.plot(updates, values, color="tab:blue", alpha=0.3, linewidth=1)
        axis.plot(updates[window - 1 :], smooth, color="tab:blue", linewidth=2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update")
        axis.ticklabel_format(useOffset=False)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def side_by_side(base: Evaluation, trained: Evaluation, path: Path, images: int = 6) -> None:
    """Base left, trained right, the same seeds: prompts spread over the held-out list."""
    gap = np.full((1, *base.images.shape[2:]), 255, np.uint8)
    pairs = zip(base.images, trained.images, strict=True)
    rows = [np.concatenate([before[:images], gap, after[:images]]) for before, after in pairs]
    labels = [f"{base.prompts[i]}   (left: base, right: trained, same seeds)" for i in base.shown]
    grid(rows, labels, zoom(base.images[0])).save(path)


def write_report(
    run: Path,
    base: Evaluation,
    trained: Evaluation,
    metrics: Sequence[dict[str, Any]],
    evaluations: Sequence[dict[str, Any]],
    rewards: Sequence[str],
    about: Sequence[str],
    target: str,
) -> dict[str, bool]:
    """Writes report.md, report.json, curves.png and samples.png. Returns the verdict.

    Args:
        target: the score whose rise is claimed. about: lines on how the figures were made.
    """
    figures = summary(base, trained)
    after_last = {"update": metrics[-1]["update"], **figures}
    curves(metrics, [*evaluations, after_last] if evaluations else [], rewards, target, run / "curves.png")
    side_by_side(base, trained, run / "samples.png")
    table = [
        f"| {name} | {figures['base'][name]:.3f} | {figures['trained'][name]:.3f} | {gain['mean']:+.3f} "
        f"[{gain['low']:+.3f}, {gain['high']:+.3f}] |"
        for name, gain in figures["gain"].items()
    ]
    checks = verdict(base, trained, target)
    text = [
        "# Report",
        "",
        *about,
        "",
        "| held-out prompts | base | trained | change, 95% paired interval |",
        "|---|---|---|---|",
        *table,
        f"| latent standard deviation | {base.latent_std:.3f} | {trained.latent_std:.3f} | "
        f"{trained.latent_std / base.latent_std - 1:+.1%} |",
        "",
        *[f"- [{'x' if holds else ' '}] {claim}" for claim, holds in checks.items()],
        "",
        "![curves](curves.png)",
        "",
        "![base and trained](samples.png)",
        "",
    ]
    (run / "report.md").write_text("\n".join(text), encoding="utf-8")
    content = {"prompts": len(base.prompts), **figures, "verdict": checks}
    (run / "report.json").write_text(json.dumps(content, indent=2) + "\n")
    return checks
