"""The arms of a comparison: their settings and budgets."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from .. import methods
from ..evaluation.comparison import Course
from ..files import read_metrics, write_text
from ..settings.config import TrainConfig, absolute, to_yaml
from ..settings.errors import ConfigError
from ..settings.presets import make_config
from ..training.lock import Locked, locked
from . import loading
from .children import Training

#: Settings that all arms must share to be comparable. The scale of PickScore is not one of them, because GARDO's protocol has
#: its own: the first arm's is that of the evaluation.
SHARED = (
    "model", "transformer", "quantize", "dtype", "reward", "reward_weights", "reward_models", "prompts",
    "eval_prompts", "eval_images", "eval_limit", "eval_steps", "eval_solver", "features", "guidance", "resolution",
    "max_sequence_length",
)  # fmt: skip

#: Settings that the comparison fixes for every run. It measures final weights: averages lag more in runs of few updates.
FIXED = {"report": False, "sample_every": 0, "checkpoints_kept": 1, "ema_every": 1, "ema_decay": 0.0}

#: Weights that hold a policy to its pretrained model, or to data: arms that differ in nothing else lie along one front.
HOLDING = ("kl_weight", "anchor_weight", "tilt_weight", "data_weight")

#: Updates of a trial run; the first is not counted.
TRIAL = 4

#: The largest number of updates in a run.
MOST = 1 << 20


@dataclass
class Arm:
    """One side of a comparison: its name, and the settings of its runs by seed."""

    name: str
    runs: dict[int, TrainConfig] = field(default_factory=dict)

    @property
    def first(self) -> TrainConfig:
        return next(iter(self.runs.values()))


def updates_within(config: TrainConfig, sigmas: Tensor, budget: float) -> int:
    """The largest number of updates whose network evaluations (`methods.cost`, one process) fit a budget."""

    def total(updates: int) -> float:
        method = methods.make(config.model_copy(update={"updates": updates}), sigmas)
        return config.prompts_per_update * sum(
            methods.cost(methods.evaluations(method, method.shape(update))) for update in range(updates)
        )

    if total(1) > budget:
        return 0
    low, high = 1, 2
    while total(high) <= budget and high < MOST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(middle) <= budget else (low, middle)
    return low


def plan(folder: Path, arms: Sequence[Arm], budget: Mapping[str, float], training: Training) -> dict[str, int]:
    """The number of updates of each arm: from its settings, or the largest that the budget allows for every seed.

    Args:
        budget: of one run: empty, {"evaluations": network evaluations} or {"seconds": seconds of training}. For seconds, a
            trial run of each arm measures its network evaluations per second.

    Raises:
        ConfigError: an arm's settings cannot be trained.
    """
    updates: dict[str, int] = {}
    for arm in arms:
        config = arm.first
        loading.need_gpu(config)
        device = loading.choose_device(config.device)
        train, heldout, skeleton = loading.check(config, device)
        # Checked now, because the evaluation that needs both comes after hours of training.
        loading.check_features(config.features)
        importlib.import_module("matplotlib")
        calls = budget.get("evaluations")
        if "seconds" in budget:
            calls = budget["seconds"] * _calls_per_second(arm, folder / "trials" / arm.name, training)
        if calls is None:
            updates[arm.name] = config.updates
        else:
            sigmas = skeleton.sigmas(config.rollout_steps, *config.resolution)
            most = min(updates_within(run, sigmas, calls) for run in arm.runs.values())
            if not most and "evaluations" in budget:
                raise ConfigError(f"--evaluations {calls:g}: not even one update of {arm.name} costs as few, give more")
            updates[arm.name] = max(most, 1)
        run = config.model_copy(update={"updates": updates[arm.name]})
        loading.check_text(run, skeleton, device, loading.drawn_prompts(run, train, heldout) + heldout.texts)
    return updates


def _calls_per_second(arm: Arm, trial: Path, training: Training) -> float:
    """Network evaluations per second of an arm's training, measured by a short run in the folder `trial`.

    Raises:
        ConfigError: the run failed, or one that was started before still goes on.
    """
    config = arm.first
    text = to_yaml(config.model_copy(update={"updates": TRIAL, "output_dir": trial, "eval_every": 0}))
    settings, metrics = trial / "settings.yaml", trial / "metrics.jsonl"
    done = settings.exists() and settings.read_text(encoding="utf-8") == text
    if not done or len(read_metrics(metrics)) < TRIAL:
        trial.parent.mkdir(parents=True, exist_ok=True)
        try:
            # The run keeps the lock while it lives. Beside another one the speed would be wrong.
            with locked(trial.with_name(f"{trial.name}.lock"), trial) as lock:
                shutil.rmtree(trial, ignore_errors=True)
                trial.mkdir()
                write_text(settings, text)
                failed = training.start(["--config", str(settings)], trial / "log.txt", lock)
        except Locked:
            raise ConfigError(f"a trial run of {arm.name} still goes on: end it, and give the command again") from None
        if failed:
            raise ConfigError(f"the trial run of {arm.name} failed, see {trial / 'log.txt'}")
    course = Course(read_metrics(metrics), config.prompts_per_update)
    return (course.calls[-1] - course.calls[0]) / (course.seconds[-1] - course.seconds[0])


def make_arms(
    named: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], layers: Any, folder: Path, budget: Mapping[str, float]
) -> list[Arm]:
    """The arms with the settings of every run.

    Args:
        named: {name: its own settings}. layers: (name, settings) -> layers of settings for `make_config`, presets
            included.

    Raises:
        ConfigError: settings contradict each other, or the arms cannot be compared.
    """
    arms = []
    for name, settings in named.items():
        arm = Arm(name)
        for key in settings:
            if key in FIXED or key in ("seed", "output_dir") or (budget and key == "updates"):
                raise ConfigError(f"arm {name}: {key} is set by the comparison: leave it out")
        for seed in seeds:
            own = {"seed": seed, "output_dir": folder / f"{name}-seed{seed}", **FIXED}
            # Absolute, because the same command may be given again from another folder.
            arm.runs[seed] = absolute(
                make_config([*layers(name, settings), (f"arm {name}", settings), ("compare", own)])
            )
        arms.append(arm)
    for arm in arms[1:]:
        for key in SHARED:
            one, other = _shared(arms[0].first, key), _shared(arm.first, key)
            if one != other:
                raise ConfigError(
                    f"{key} differs between {arms[0].name} ({one}) and {arm.name} ({other}): all need the same"
                )
    return arms


def _shared(config: TrainConfig, key: str) -> Any:
    value = getattr(config, key)
    if key != "reward_models":
        return value
    # Where a method's auxiliary scorers are is its own matter.
    return tuple(entry for entry in value if entry.partition("=")[0] in config.reward)


def describe(arm: Arm) -> dict[str, Any]:
    """An arm's settings as plain values, without those that may differ between its runs or between starts."""
    apart = ("seed", "output_dir", "threads", "device")
    return {key: value for key, value in yaml.safe_load(to_yaml(arm.first)).items() if key not in apart}


def fronts(settings: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The names of arms, grouped where they differ in one weight of `HOLDING` alone, in its order; any other arm is alone.

    An arm that belongs to two groups, as in a grid of weights, is in that of the weight which `HOLDING` names first.

    Args:
        settings: by name, as `describe` gives them.
    """
    groups: dict[str, list[str]] = {name: [name] for name in settings}
    for key in HOLDING:
        alike: dict[str, list[str]] = {}
        for name, own in settings.items():
            if len(groups[name]) == 1 and key in own:
                alike.setdefault(repr({k: v for k, v in own.items() if k != key}), []).append(name)
        for names in alike.values():
            front = sorted(names, key=lambda name: settings[name][key])
            groups |= dict.fromkeys(front, front) if len(front) > 1 else {}
    return list({id(front): front for front in groups.values()}.values())
