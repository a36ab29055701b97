"""What a run shows: progress bar, metrics.jsonl, sample grids, and the report at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from . import trackers
from .checkpoint import read_metrics, write_text
from .evaluate import Evaluation, paired_gain, verdict
from .grids import grid, zoom


class Reporter:
    """Progress of one run.

    Args:
        run: the run's folder. updates: in all. done: updates of a resumed run; later lines in metrics.jsonl are dropped.
        rewards: scorer names. draw_samples: gives (pictures `[P, n, H, W, 3]`, prompts) of the model as it stands.
        compare: measures (base, model as it stands) on the held-out prompts.
        accelerator: of several processes one shows and writes, and feeds the trackers; the others only take part in
            drawing and measuring.
    """

    def __init__(
        self,
        run: Path,
        updates: int,
        done: int,
        rewards: Sequence[str],
        draw_samples: Callable[[], tuple[np.ndarray, list[str]]],
        compare: Callable[[], tuple[Evaluation, Evaluation]],
        accelerator: Accelerator,
    ):
        self.run, self.rewards, self.draw_samples, self.compare = run, list(rewards), draw_samples, compare
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        self.bar = tqdm(total=updates, initial=done, unit="update", dynamic_ncols=True, disable=not self.main)
        if not self.main:
            return
        run.mkdir(parents=True, exist_ok=True)
        for path in (run / "metrics.jsonl", run / "evaluations.jsonl"):
            kept = [line for line in read_metrics(path) if line["update"] <= done]
            # Lines after the checkpoint are about to be written again.
            if path.exists():
                write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = (run / "metrics.jsonl").open("a", encoding="utf-8")

    def update(self, metrics: dict[str, Any]) -> None:
        if not self.main:
            return
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        trackers.log(self.accelerator, {k: v for k, v in metrics.items() if k != "update"}, metrics["update"])
        shown = [f"{name}={metrics[f'reward/{name}']:.3f}" for name in self.rewards]
        shown += [f"LGMD={metrics['lgmd']:.3f}", f"ratio={metrics['ratio_mean']:.3f}"]
        self.bar.set_postfix_str(", ".join(shown), refresh=False)
        self.bar.update()

    def samples(self, update: int) -> None:
        pictures, prompts = self.draw_samples()
        if not self.main:
            return
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        sheet = grid(list(pictures), prompts, zoom(pictures))
        sheet.save(folder / f"update-{update:06d}.png")
        trackers.log_image(self.accelerator, "samples", sheet, update)

    def evaluation(self, update: int) -> None:
        """Measures the model as it stands beside the base; a line in evaluations.jsonl and one above the bar."""
        base, trained = self.compare()
        if not self.main:
            return
        line = {"update": update, **summary(base, trained)}
        with (self.run / "evaluations.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        figures = {f"held-out/{name}": value for name, value in line["trained"].items()}
        trackers.log(self.accelerator, figures | {f"held-out base/{n}": v for n, v in line["base"].items()}, update)
        shown = ", ".join(f"{name} {line['base'][name]:.3f} -> {line['trained'][name]:.3f}" for name in line["base"])
        self.bar.write(f"update {update}, held-out prompts: {shown}", file=sys.stderr)

    def close(self) -> None:
        """May be called twice."""
        self.bar.close()
        if self.main:
            self.file.close()


def measures(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """Scores `[P, n]` and diversities `[P]` of an evaluation, by the names that reports give them."""
    return {**evaluation.scores, "LGMD": evaluation.lgmd, "cosine diversity": evaluation.cosine}


def summary(base: Evaluation, trained: Evaluation) -> dict[str, Any]:
    """Means of base and trained model, and the gains with their 95% paired intervals."""
    before, after = measures(base), measures(trained)
    return {
        "base": {name: float(values.mean()) for name, values in before.items()} | {"latent_std": base.latent_std},
        "trained": {name: float(values.mean()) for name, values in after.items()} | {"latent_std": trained.latent_std},
        "gain": {
            name: dict(zip(("mean", "low", "high"), paired_gain(before[name], after[name]), strict=True))
            for name in before
        },
    }


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
    if any(line["ratio_mean"] != 1 for line in metrics):
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
