"""What a run shows: progress bar, metrics.jsonl, sample grids, and the report at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from ..evaluation import drift, report
from ..evaluation.held_out import Evaluation
from ..evaluation.statistics import summary
from ..files import read_metrics, replacing, write_text
from ..pictures.grids import grid, zoom
from . import trackers


def metrics_lines(run: Path, rewards: Sequence[str]) -> list[dict[str, Any]]:
    """A run's lines of metrics.jsonl that have the figures of the report: a damaged line may lack some."""
    needed = (*(f"reward/{name}" for name in rewards), "lgmd", "latent_std")
    lines = read_metrics(run / "metrics.jsonl")
    return [line for line in lines if all(isinstance(line.get(name), int | float) for name in needed)]


def evaluation_lines(run: Path, target: str) -> list[dict[str, Any]]:
    """A run's lines of evaluations.jsonl that have the gain in a score: a damaged line may lack it, and a run that was resumed
    may have had another reward before."""
    lines = read_metrics(run / "evaluations.jsonl")
    return [line for line in lines if isinstance(line.get("gain"), dict) and isinstance(line["gain"].get(target), dict)]


class Reporter:
    """Progress of one run.

    Args:
        run: the run's folder. updates: in all. done: updates of a resumed run; later lines in metrics.jsonl are dropped.
        rewards: scorer names. draw_samples: gives of the model as it stands (pictures `[P, n, H, W, 3]`, prompts, drift from
            the base; {} shows none).
        compare: measures (base, model as it stands) on the held-out prompts.
        accelerator: of several processes one shows and writes, and feeds the trackers; the others only take part in
            drawing and measuring.
        neutral: the statistics that the run takes out of its reward wholly.
    """

    def __init__(
        self,
        run: Path,
        updates: int,
        done: int,
        rewards: Sequence[str],
        draw_samples: Callable[[], tuple[np.ndarray, list[str], dict[str, drift.Drift]]],
        compare: Callable[[], tuple[Evaluation, Evaluation]],
        accelerator: Accelerator,
        neutral: Sequence[str] = (),
    ):
        self.run, self.rewards, self.draw_samples, self.compare = run, list(rewards), draw_samples, compare
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        self.neutral = tuple(neutral)
        #: Statistics whose drift has been warned of.
        self.warned: set[str] = set()
        self.bar = tqdm(total=updates, initial=done, unit="update", dynamic_ncols=True, disable=not self.main)
        if not self.main:
            return
        run.mkdir(parents=True, exist_ok=True)
        for path in (run / "samples").glob("update-*.png"):
            # Drawn after the checkpoint, in a course that is given up.
            if (number := path.stem.removeprefix("update-")).isdecimal() and int(number) > done:
                # On Windows a picture that is open stays.
                with suppress(OSError):
                    path.unlink()
        for name in ("metrics.jsonl", "evaluations.jsonl", "drift.jsonl"):
            path = run / name
            kept = [line for line in read_metrics(path) if line["update"] <= done]
            # Lines after the checkpoint are about to be written again.
            if path.exists():
                write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.errors = report.velocity_errors(read_metrics(run / "metrics.jsonl"))
        #: Whether a rise of the errors has been warned of; a resumed run has been, before.
        self.warned_of_error = bool(report.error_warning(self.errors))
        self.file = (run / "metrics.jsonl").open("a", encoding="utf-8")

    def update(self, metrics: dict[str, Any]) -> None:
        if not self.main:
            return
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        trackers.log(self.accelerator, {k: v for k, v in metrics.items() if k != "update"}, metrics["update"])
        shown = [f"{name}={metrics[f'reward/{name}']:.3f}" for name in self.rewards]
        # Not every method has ratios.
        more = {"LGMD": "lgmd", "ratio": "ratio_mean"}
        shown += [f"{short}={metrics[name]:.3f}" for short, name in more.items() if name in metrics]
        self.bar.set_postfix_str(", ".join(shown), refresh=False)
        self.bar.update()
        self.errors += report.velocity_errors([metrics])
        if not self.warned_of_error and (text := report.error_warning(self.errors)):
            self.bar.write(f"update {metrics['update']}: {text}", file=sys.stderr)
            self.warned_of_error = True

    def shown(self, update: int) -> set[str]:
        """What a run that is resumed has of an update already: samples, evaluation."""
        found = set()
        if (self.run / "samples" / f"update-{update:06d}.png").exists():
            found.add("samples")
        if any(line["update"] == update for line in read_metrics(self.run / "evaluations.jsonl")):
            found.add("evaluation")
        return found

    def samples(self, update: int) -> None:
        pictures, prompts, moved = self.draw_samples()
        if not self.main:
            return
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        sheet = grid(list(pictures), prompts, zoom(pictures))
        with replacing(folder / f"update-{update:06d}.png") as temporary:
            sheet.save(temporary)
        trackers.log_image(self.accelerator, "samples", sheet, update)
        if moved:
            self._append("drift.jsonl", {"update": update, **drift.content(moved)})
            trackers.log(self.accelerator, drift.figures(moved, "drift"), update)
            self._warn(update, moved, "samples")

    def evaluation(self, update: int) -> None:
        """Measures the model as it stands beside the base; a line in evaluations.jsonl and one above the bar."""
        base, trained = self.compare()
        if not self.main:
            return
        moved = drift.drifts(base.statistics, trained.statistics, base.prompts)
        line = {"update": update, **summary(base, trained), "drift": drift.content(moved)}
        self._append("evaluations.jsonl", line)
        figures = {f"held-out/{name}": value for name, value in line["trained"].items()}
        figures |= drift.figures(moved, "held-out drift")
        trackers.log(self.accelerator, figures | {f"held-out base/{n}": v for n, v in line["base"].items()}, update)
        shown = ", ".join(f"{name} {line['base'][name]:.3f} -> {line['trained'][name]:.3f}" for name in line["base"])
        self.bar.write(f"update {update}, held-out prompts: {shown}", file=sys.stderr)
        self._warn(update, moved, "held-out prompts")

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.run / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _warn(self, update: int, moved: dict[str, drift.Drift], what: str) -> None:
        """A line about drift beyond the thresholds, if it is so in a statistic that has not been warned of."""
        beyond = {name for name, one in moved.items() if one.beyond}
        if beyond - self.warned:
            self.bar.write(f"update {update}, {what}: {drift.warning(moved, self.neutral)}", file=sys.stderr)
            self.warned |= beyond

    def close(self) -> None:
        """May be called twice."""
        self.bar.close()
        if self.main:
            # On a full disk the line that could not be written is tried once more, and its error is known already.
            with suppress(OSError):
                self.file.close()
