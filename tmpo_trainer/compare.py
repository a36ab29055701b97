"""`compare`: methods trained from one base with the same prompts and budget, and measured on the same held-out prompts.

Everything is kept in one folder, and what is there is not done again: after a kill the same command goes on with what is
missing, and arms or seeds can be added.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from . import compare_report, evaluate, export, loading
from .checkpoint import checkpoints, read_metrics, write_text
from .config import TrainConfig, make_config, read_yaml, to_yaml
from .errors import ConfigError
from .methods import Planner, cost, evaluations
from .table import attach

#: What arms must share to be comparable.
SHARED = (
    "model", "transformer", "quantize", "dtype", "reward", "reward_weights", "reward_models", "pickscore_scale", "prompts",
    "eval_prompts", "eval_images", "eval_limit", "eval_steps", "features", "guidance", "resolution", "max_sequence_length",
)  # fmt: skip
#: Set by the comparison for every run. Final weights: an average over updates would lag behind the more, the fewer they are.
FIXED = {"report": False, "sample_every": 0, "checkpoints_kept": 1, "ema_every": 1, "ema_decay": 0.0}
#: Settings that hold a path.
PATHS = ("prompts", "eval_prompts", "transformer", "init_lora", "text_cache")
#: Updates of a trial run, of which the first is not counted.
TRIAL = 4
#: Updates of a run, at most.
MOST = 1 << 20


@dataclass
class Arm:
    """What is compared: a name, and the settings of its runs by seed."""

    name: str
    runs: dict[int, TrainConfig] = field(default_factory=dict)

    @property
    def first(self) -> TrainConfig:
        return next(iter(self.runs.values()))


def updates_within(config: TrainConfig, sigmas: Tensor, budget: float) -> int:
    """The most updates whose network evaluations (`methods.cost`, of one process) stay within a budget; at least 1."""

    def total(updates: int) -> float:
        planner = Planner(config.model_copy(update={"updates": updates}), sigmas)
        return config.prompts_per_update * sum(
            cost(evaluations(config, planner.plan(update))) for update in range(updates)
        )

    low, high = 1, 2
    while total(high) <= budget and high < MOST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(middle) <= budget else (low, middle)
    return low


class Training:
    """Runs training commands as processes of their own, several at a time; a signal is passed on to them.

    Args:
        launch: `ddp` or `fsdp2` to start each by `launch`, over all GPUs of the machine.
    """

    def __init__(self, jobs: int, launch: str | None):
        self.jobs, self.command = jobs, [sys.executable, "-m", "tmpo_trainer", *(["launch", launch] if launch else [])]
        self.stopped: int | None = None
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, runs: Sequence[tuple[Path, Path]], bar: tqdm[Any]) -> list[Path]:
        """Trains what is missing of (settings file, run folder). Returns the folders that failed; see their `log.txt`."""
        numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
        handlers = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                done = list(pool.map(lambda run: self._one(run[0], run[1], bar), runs))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return [folder for (_, folder), ok in zip(runs, done, strict=True) if not ok]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = number
        with self._lock:
            for process in self._running:
                if os.name == "nt":
                    process.terminate()
                else:
                    # With a launcher the workers, too, are to save.
                    os.killpg(process.pid, signal.SIGTERM)

    def _one(self, settings: Path, folder: Path, bar: tqdm[Any]) -> bool:
        """Trains one run, or goes on with it. False if it failed or is not ours to touch; then a line says why."""
        if self.stopped:
            return False
        with settings.with_suffix(".lock").open("w") as lock:
            if not _locked(lock):
                bar.write(f"tmpo_trainer: {folder.name} is still being trained by another process", file=sys.stderr)
                return False
            known = folder / "config.yaml"
            if known.exists() and _comparable(read_yaml(known)) != _comparable(read_yaml(settings)):
                bar.write(f"tmpo_trainer: {folder} holds a run with other settings: move it away", file=sys.stderr)
                return False
            if (folder / export.FILE_NAME).exists():
                bar.update()
                return True
            if checkpoints(folder):
                asked = read_yaml(settings)
                flags = ["--resume", str(folder), "--device", str(asked["device"]), "--threads", str(asked["threads"])]
            else:
                for path in folder.glob("*"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                flags = ["--config", str(settings)]
            folder.mkdir(parents=True, exist_ok=True)
            if self.start(flags, folder / "log.txt", lock) != 0:
                return False
            bar.update()
            return True

    def start(self, flags: Sequence[str], log: Path, lock: IO[str] | None = None) -> int:
        """Runs training to its end. A lock is held as long as it or anything it started lives, whatever becomes of us."""
        with log.open("ab") as out:
            with self._lock:
                if self.stopped:
                    return 130
                # In a session of its own: the terminal's Ctrl-C would reach it beside ours.
                process = subprocess.Popen(
                    [*self.command, *flags],
                    stdout=out,
                    stderr=out,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=() if lock is None or os.name == "nt" else (lock.fileno(),),
                )
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
        return code


def _locked(file: IO[str]) -> bool:
    """Whether a lock file is ours now. Where there are no such locks, it always is."""
    if os.name == "nt":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in ("threads", "device", "output_dir")}


def plan(folder: Path, arms: Sequence[Arm], budget: Mapping[str, float], training: Training) -> dict[str, int]:
    """Updates of each arm: as its settings say, or the most that a budget allows with every seed.

    Args:
        budget: empty, {"evaluations": N} or {"seconds": S}; seconds are of training: a trial run of each arm tells how many
            evaluations it does in one.

    Raises:
        ConfigError: settings that cannot be trained.
    """
    updates: dict[str, int] = {}
    for arm in arms:
        config = arm.first
        loading.need_gpu(config)
        _, _, skeleton = loading.check(config, loading.choose_device(config.device))
        # For the measurement, which comes after hours of training.
        loading.check_features(config.features)
        importlib.import_module("matplotlib")
        evaluations = budget.get("evaluations")
        if "seconds" in budget:
            trial = folder / "trials" / arm.name
            text = to_yaml(config.model_copy(update={"updates": TRIAL, "output_dir": trial, "eval_every": 0}))
            settings = trial / "settings.yaml"
            done = settings.exists() and settings.read_text(encoding="utf-8") == text
            if not done or len(read_metrics(trial / "metrics.jsonl")) < TRIAL:
                shutil.rmtree(trial, ignore_errors=True)
                trial.mkdir(parents=True)
                write_text(settings, text)
                if training.start(["--config", str(settings)], trial / "log.txt"):
                    raise ConfigError(f"the trial run of {arm.name} failed, see {trial / 'log.txt'}")
            run = compare_report.Measured(None, read_metrics(trial / "metrics.jsonl"), config.prompts_per_update)
            speed = (run.spent[-1] - run.spent[0]) / (run.seconds[-1] - run.seconds[0])
            evaluations = budget["seconds"] * speed
        if evaluations is None:
            updates[arm.name] = config.updates
        else:
            sigmas = skeleton.sigmas(config.rollout_steps, *config.resolution)
            updates[arm.name] = min(updates_within(run, sigmas, evaluations) for run in arm.runs.values())
    return updates


def make_arms(
    named: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], layers: Any, folder: Path, budget: Mapping[str, float]
) -> list[Arm]:
    """The arms with the settings of every run.

    Args:
        named: {name: its own settings}. layers: settings -> layers of settings for `make_config`, presets included.

    Raises:
        ConfigError: settings that do not go together, or arms that could not be compared.
    """
    arms = []
    for name, settings in named.items():
        arm = Arm(name)
        for key in settings:
            if key in FIXED or key in ("seed", "output_dir") or (budget and key == "updates"):
                raise ConfigError(f"arm {name}: {key} is set by the comparison: leave it out")
        for seed in seeds:
            own = {"seed": seed, "output_dir": folder / f"{name}-seed{seed}", **FIXED}
            config = make_config([*layers(settings), (f"arm {name}", settings), ("compare", own)])
            # Whoever goes on with it may stand elsewhere.
            given = {key: getattr(config, key) for key in PATHS if getattr(config, key) is not None}
            changes: dict[str, Any] = {key: path.absolute() for key, path in given.items()}
            if Path(config.model).is_dir():
                changes["model"] = str(Path(config.model).absolute())
            arm.runs[seed] = config.model_copy(update=changes)
        arms.append(arm)
    for arm in arms[1:]:
        for key in SHARED:
            one, other = getattr(arms[0].first, key), getattr(arm.first, key)
            if one != other:
                raise ConfigError(
                    f"{key} differs between {arms[0].name} ({one}) and {arm.name} ({other}): all need the same"
                )
    return arms


def compare(
    arms: Sequence[Arm], folder: Path, budget: Mapping[str, float], jobs: int, launch: str | None, evaluation_seed: int
) -> int:
    """Trains and measures what is missing and writes the report. Returns the exit code, 130 if interrupted.

    Raises:
        ConfigError: the folder holds another comparison, or settings that cannot be trained.
    """
    stored = folder / "compare.yaml"
    known = read_yaml(stored) if stored.exists() else {"budget": dict(budget), "arms": {}}
    if not {"budget", "arms"} <= known.keys():
        raise ConfigError(f"{stored} is not of a comparison: give another --output-dir")
    if known["budget"] != dict(budget):
        raise ConfigError(
            f"{stored} has budget {known['budget'] or 'none'}, not {dict(budget) or 'none'}: another --output-dir"
        )
    settings = {arm.name: _describe(arm) for arm in arms}
    for name, own in settings.items():
        before = known["arms"].get(name, {}).get("settings", own)
        for key in own:
            if own[key] != before.get(key):
                raise ConfigError(
                    f"{stored}: arm {name} has {key} {before.get(key)}, not {own[key]}: give another name or --output-dir"
                )
    folder.mkdir(parents=True, exist_ok=True)
    training = Training(jobs, launch)
    for name, updates in plan(folder, [a for a in arms if a.name not in known["arms"]], budget, training).items():
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
    # Seed by seed, so that a first picture of all arms is there early.
    runs = [runs[a * len(arms[0].runs) + s] for s in range(len(arms[0].runs)) for a in range(len(arms))]
    with tqdm(total=len(runs), unit="run", desc="training", dynamic_ncols=True) as bar:
        failed = training.run(runs, bar)
    if training.stopped:
        print(f"tmpo_trainer: stopped; the same command goes on with what is missing in {folder}", file=sys.stderr)
        return 130
    for path in failed:
        print(f"tmpo_trainer: {path.name} failed, see {path / 'log.txt'}", file=sys.stderr)
    lost = {path.name for path in failed}
    measured = measure(arms, folder, evaluation_seed, lost)
    if any(measured[arm.name] for arm in arms):
        compare_report.write(folder, measured, budget, sorted(lost))
    return 1 if lost else 0


def _describe(arm: Arm) -> dict[str, Any]:
    """An arm's settings as plain values, without what may differ between its runs or from one start to the next."""
    apart = ("seed", "output_dir", "threads", "device")
    return {key: value for key, value in yaml.safe_load(to_yaml(arm.first)).items() if key not in apart}


def measure(
    arms: Sequence[Arm], folder: Path, seed: int, without: set[str]
) -> dict[str, list[compare_report.Measured]]:
    """{arm: what its runs came to}, the base as a run of its own. The same noise for all.

    Args:
        without: names of the runs that failed; one that cannot be measured is added.
    """
    config = arms[0].first.model_copy(update={"seed": seed})
    device = loading.choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    loading.quiet()
    heldout = loading.heldout_prompts(config)
    backbone = loading.load_model(config, device, heldout.texts)
    held = evaluate.HeldOut(
        folder / "base.npz",
        backbone,
        heldout,
        loading.evaluation_scorers(loading.scorers(config, device)),
        loading.features(config, device),
        config.eval_images,
        loading.sampling(config),
        identity=loading.identity(config),
    )
    found: dict[str, list[compare_report.Measured]] = {}
    count = 1 + sum(len(arm.runs) for arm in arms) - len(without)
    with tqdm(total=count * len(heldout.texts), unit="prompt", desc="evaluating", dynamic_ncols=True) as bar:
        found["base"] = [compare_report.Measured(held.base(bar.update), [], 0)]
        for arm in arms:
            found[arm.name] = []
            for run in arm.runs.values():
                path = run.output_dir
                assert path is not None
                if path.name in without:
                    continue
                try:
                    attach(backbone, path)
                    evaluation = held.stored(path / "evaluation.npz", bar.update, path / export.FILE_NAME)
                except (ConfigError, ValueError) as error:
                    bar.write(f"tmpo_trainer: {path.name} cannot be measured: {error}", file=sys.stderr)
                    without.add(path.name)
                    continue
                finally:
                    backbone.pipeline.unload_lora_weights()
                metrics = read_metrics(path / "metrics.jsonl")
                found[arm.name].append(compare_report.Measured(evaluation, metrics, run.prompts_per_update))
    return found
