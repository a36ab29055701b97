"""`compare`: methods trained from one base with the same prompts and budget, and measured on the same held-out prompts.

All results are kept in one folder and none is computed twice. After an interruption, the same command continues with the
missing ones. Arms and seeds can be added later.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from ..evaluation import comparison as compare_report
from ..evaluation.held_out import HeldOut
from ..files import read_metrics, write_text
from ..lora import export
from ..lora.attach import attach
from ..rewards.pickscore import DIVISORS, Scale
from ..settings.config import to_yaml
from ..settings.errors import ConfigError
from ..settings.presets import current
from ..settings.yaml_file import read_yaml
from . import loading
from .arms import Arm, describe, fronts, plan
from .children import Training


def compare(
    arms: Sequence[Arm], folder: Path, budget: Mapping[str, float], jobs: int, launch: str | None, evaluation_seed: int
) -> int:
    """Trains and measures the missing runs and writes the report. Returns the exit code, 130 if interrupted.

    Raises:
        ConfigError: the folder holds another comparison, or an arm's settings cannot be trained.
    """
    stored = folder / "compare.yaml"
    settings = {arm.name: describe(arm) for arm in arms}
    known = read_known(stored, settings, budget)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    training = Training(jobs, launch)
    try:
        with training.listening():
            planned = plan(folder, [a for a in arms if a.name not in known["arms"]], budget, training)
    except ConfigError:
        if training.stopped:
            return _stopped(folder)
        if new:
            with suppress(OSError):
                # If nothing is in it.
                folder.rmdir()
        raise
    for name, updates in planned.items():
        known["arms"][name] = {"updates": updates, "settings": settings[name]}
    write_text(stored, yaml.safe_dump(known, sort_keys=False))
    runs = []
    (folder / "settings").mkdir(exist_ok=True)
    for arm in arms:
        for seed, config in arm.runs.items():
            arm.runs[seed] = config = config.model_copy(update={"updates": known["arms"][arm.name]["updates"]})
            assert config.output_dir is not None
            file = folder / "settings" / f"{config.output_dir.name}.yaml"
            write_text(file, to_yaml(config))
            runs.append((file, config.output_dir))
    # Seed by seed, so that the first results of all arms come early.
    runs = [runs[a * len(arms[0].runs) + s] for s in range(len(arms[0].runs)) for a in range(len(arms))]
    with tqdm(total=len(runs), unit="run", desc="training", dynamic_ncols=True) as bar, training.listening():
        failed = training.run(runs, bar)
    if training.stopped:
        return _stopped(folder)
    for path in failed:
        print(f"tmpo_trainer: {path.name} failed, see {path / 'log.txt'}", file=sys.stderr)
    lost = {path.name for path in failed}
    measured = measure(arms, folder, evaluation_seed, lost, jobs == 1)
    if any(measured[arm.name] for arm in arms):
        compare_report.write(folder, measured, budget, fronts(settings), sorted(lost))
    return 1 if lost else 0


def _on_scale(metrics: list[dict[str, Any]], scale: Scale, wanted: Scale) -> list[dict[str, Any]]:
    """A run's metrics with PickScore on the comparison's scale: GARDO's protocol trains on another one."""
    if scale == wanted:
        return metrics
    key, factor = "reward/pickscore", DIVISORS[scale] / DIVISORS[wanted]
    return [line | ({key: line[key] * factor} if key in line else {}) for line in metrics]


def _stopped(folder: Path) -> int:
    print(f"tmpo_trainer: stopped; give the same command again to continue in {folder}", file=sys.stderr)
    return 130


def read_known(stored: Path, settings: Mapping[str, Mapping[str, Any]], budget: Mapping[str, float]) -> dict[str, Any]:
    """The content of compare.yaml: {"budget": ..., "arms": {name: {"updates", "settings"}}}; without the file, no arms.

    Args:
        settings: by name, of the requested arms. budget: the requested one.

    Raises:
        ConfigError: the file is not from `compare`, or has another budget or other settings of an arm.
    """
    known = read_yaml(stored) if stored.exists() else {"budget": dict(budget), "arms": {}}
    if not {"budget", "arms"} <= known.keys():
        raise ConfigError(f"{stored} was not written by compare: give another --output-dir")
    if known["budget"] != dict(budget):
        raise ConfigError(
            f"{stored} has budget {known['budget'] or 'none'}, not {dict(budget) or 'none'}: give another --output-dir"
        )
    for name, own in settings.items():
        before = current(str(stored), known["arms"][name]["settings"]) if name in known["arms"] else own
        for key in own:
            if own[key] != before.get(key):
                raise ConfigError(
                    f"{stored}: arm {name} has {key} {before.get(key)}, not {own[key]}: give another name or --output-dir"
                )
    return known


def measure(
    arms: Sequence[Arm], folder: Path, seed: int, without: set[str], timed: bool
) -> dict[str, list[compare_report.Measured]]:
    """Evaluates the base model and every run with the same noise: {arm: its runs}, with the base as the arm `base`.

    Args:
        without: names of the runs that failed; a run that cannot be measured is added. timed: see `Course`.
    """
    config = arms[0].first.model_copy(update={"seed": seed})
    device = loading.choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    loading.quiet()
    heldout = loading.heldout_prompts(config)
    backbone = loading.load_model(config, device, heldout.texts)
    scorers, features = loading.scorers(config, device), loading.features(config, device)
    protocol = loading.evaluation_protocol(config, heldout, scorers, features)
    held_out = HeldOut(backbone, protocol, folder / "base.npz", loading.identity(config))
    found: dict[str, list[compare_report.Measured]] = {}
    count = 1 + sum(len(arm.runs) for arm in arms) - len(without)
    with tqdm(total=count * len(heldout.texts), unit="prompt", desc="evaluating", dynamic_ncols=True) as bar:
        found["base"] = [compare_report.Measured(held_out.base(bar.update), compare_report.Course([], 0))]
        for arm in arms:
            found[arm.name] = []
            for run in arm.runs.values():
                path = run.output_dir
                assert path is not None
                if path.name in without:
                    continue
                try:
                    attach(backbone, path)
                    evaluation = held_out.stored(path / "evaluation.npz", bar.update, path / export.FILE_NAME)
                except (ConfigError, ValueError) as error:
                    bar.write(f"tmpo_trainer: {path.name} cannot be measured: {error}", file=sys.stderr)
                    without.add(path.name)
                    continue
                finally:
                    backbone.pipeline.unload_lora_weights()
                metrics = _on_scale(read_metrics(path / "metrics.jsonl"), run.pickscore_scale, config.pickscore_scale)
                course = compare_report.Course(metrics, run.prompts_per_update, timed)
                found[arm.name].append(compare_report.Measured(evaluation, course))
    return found
