"""A whole run: load, train, export, report."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from tqdm import tqdm

from ..backbones import is_hub_id
from ..backbones.base import Backbone
from ..evaluation import appearance, drift, report
from ..evaluation.features import Features
from ..evaluation.held_out import Evaluation, HeldOut, sample
from ..evaluation.statistics import counted
from ..files import write_text
from ..lora import export
from ..methods.base import TransitionSettings
from ..processes import OtherProcessFailed, together
from ..rewards import Scorer
from ..settings.config import TrainConfig, absolute, to_yaml
from ..settings.errors import ConfigError, one_line
from ..training import progress, trackers
from ..training.checkpoint import checkpoints, drop_later, find, number, updates_of
from ..training.loop import Interrupted, Trainer
from ..training.run_folder import agreed_folder, check_free, claim, environment, writing
from ..training.weights import Diverged
from . import loading, resuming


@dataclass
class _Parts:
    """The loaded parts of a run. scorers: by name, those of the rewards and of the method."""

    scorers: dict[str, Scorer]
    features: Features | None
    backbone: Backbone


def train(config: TrainConfig, preset: str, checkpoint: Path | None, named: bool = True) -> int:
    """Trains, exports and reports.

    Args:
        named: whether the user named this checkpoint, and not its run.

    Returns:
        the exit code: 0, 1 for a failure (one line says which), 130 if interrupted.
    """
    # The run's folder stays locked until this closes.
    with ExitStack() as held:
        return _train(config, preset, checkpoint, named, held)


def _train(config: TrainConfig, preset: str, checkpoint: Path | None, named: bool, held: ExitStack) -> int:
    loading.need_gpu(config)
    chosen = loading.choose_device(config.device)
    # A checkpoint has the weights: the file that the run once started from may be gone.
    used = config.model_copy(update={"init_lora": None}) if checkpoint else config
    train_prompts, heldout, skeleton = loading.check(used, chosen)
    done = updates_of(checkpoint) if checkpoint else 0
    if not checkpoint and config.output_dir:
        check_free(config.output_dir)
    if config.threads:
        torch.set_num_threads(config.threads)
    loading.quiet()
    accelerator = Accelerator(cpu=chosen.type == "cpu", **trackers.arguments(config.tracker))
    device = chosen if accelerator.num_processes == 1 else accelerator.device
    if accelerator.is_fsdp2 and isinstance(config, TransitionSettings) and config.reuse_forward:
        raise ConfigError("--reuse-forward cannot be sharded: use `launch ddp`, or leave it out")
    if accelerator.is_fsdp2 and config.quantize == "nf4":
        raise ConfigError("--quantize nf4 cannot be sharded: use `launch ddp`, or leave it out")
    if checkpoint:
        claim(checkpoint.parent, accelerator, held)
        _still_newest(checkpoint, named, accelerator)
    rank, processes = accelerator.process_index, accelerator.num_processes
    texts = loading.drawn_prompts(config, train_prompts, heldout, processes, done)
    together(accelerator, lambda: loading.encode(config, skeleton, device, texts, rank, processes))
    parts = together(accelerator, lambda: _load(config, device, texts, accelerator.is_fsdp2, skeleton))
    folder = checkpoint.parent if checkpoint else agreed_folder(config.output_dir, preset, accelerator)
    if not checkpoint:
        claim(folder, accelerator, held)
    scorers, extra = ([parts.scorers[name] for name in names] for names in (config.reward, config.extra_rewards))
    examples = together(accelerator, lambda: loading.examples(config, parts.backbone))
    trainer = Trainer(
        used, folder, parts.backbone, scorers, train_prompts, accelerator, extra, parts.features, examples
    )
    if checkpoint:
        trainer.resume(checkpoint)
    if accelerator.is_main_process:
        digests = {"training": resuming.digest(train_prompts), "held-out": resuming.digest(heldout)}
        print(f"{'resuming' if checkpoint else 'training'} in {folder}", file=sys.stderr)
        with writing(folder):
            if checkpoint:
                for line in resuming.notices(folder, config, digests):
                    print(line, file=sys.stderr)
                drop_later(folder, trainer.done)
            # With absolute paths, so that `--resume` and `evaluate` find the same files from another folder.
            write_text(folder / "config.yaml", to_yaml(absolute(config)))
            about = {**environment(device), "prompts": digests}
            write_text(folder / "env.json", json.dumps(about, indent=2) + "\n")
    trackers.start(accelerator, config, folder, trainer.done if checkpoint else None)
    held_out = None
    if parts.features and (config.report or config.eval_every):
        held_out = HeldOut(
            parts.backbone,
            loading.evaluation_protocol(config, heldout, scorers, parts.features),
            folder / "base.npz" if config.eval_every else None,
            loading.identity(config),
            trainer.processes,
            trainer.weights.sharded,
        )
    return _run(trainer, held_out, loading.shown_prompts(heldout))


def _still_newest(checkpoint: Path, named: bool, accelerator: Accelerator) -> None:
    """Raises ConfigError on all processes unless they resume the same checkpoint, and a run that was named its newest one.

    The run that held the folder may have saved another one after this one was chosen, and resuming would delete that.
    """

    def check() -> None:
        if named or not accelerator.is_main_process:
            return
        if find(str(checkpoint.parent), checkpoint.parent).name != checkpoint.name:
            raise ConfigError(f"{checkpoint.parent} has got another checkpoint meanwhile: give the command again")

    together(accelerator, check)
    if accelerator.num_processes > 1:
        chosen = sorted(set(gather_object([str(checkpoint)])))
        if len(chosen) > 1:
            raise ConfigError(f"the processes see different checkpoints ({', '.join(chosen)}): give one as --resume")


def _load(config: TrainConfig, device: torch.device, texts: list[str], sharded: bool, skeleton: Backbone) -> _Parts:
    """Loads all parts of a run, so that nothing is found missing after hours of training."""
    names = tuple(dict.fromkeys((*config.reward, *config.extra_rewards)))
    scorers = dict(zip(names, loading.scorers(config, device, names), strict=True))
    measured = config.report or config.eval_every or config.needs_features
    features = loading.features(config, device) if measured else None
    return _Parts(scorers, features, loading.load_model(config, device, texts, sharded, skeleton))


def _run(trainer: Trainer, held_out: HeldOut | None, shown: list[str]) -> int:
    """Trains, exports and reports. Returns the exit code.

    Args:
        shown: the prompts of the sample grids.
    """
    config, folder, main = trainer.config, trainer.run, trainer.processes.main
    names = [scorer.name for scorer in trainer.judges.rewards]

    def draw() -> tuple[np.ndarray, dict[str, np.ndarray]]:
        parts = list(sample(trainer.backbone, shown, 8, loading.sampling(config)))
        latents = torch.cat([latents for latents, _ in parts]).float().cpu().numpy()
        pictures = np.concatenate([pictures for _, pictures in parts])
        found = [appearance.measure(*own) for own in zip(pictures, latents, strict=True)]
        return pictures, {name: np.stack([one[name] for one in found]) for name in appearance.NAMES}

    @cache
    def base_statistics() -> dict[str, np.ndarray]:
        with trainer.weights.pretrained():
            return draw()[1]

    def draw_samples() -> tuple[np.ndarray, list[str], dict[str, drift.Drift]]:
        pictures, found = draw()
        # The grid after the first update shows the base but for a hair, and a short run draws no other.
        return pictures, shown, drift.drifts(base_statistics(), found, shown) if trainer.done > 1 else {}

    def compare() -> tuple[Evaluation, Evaluation]:
        assert held_out is not None
        with trainer.weights.pretrained():
            base = held_out.base()
        return base, held_out.measure()

    accelerator = trainer.accelerator
    with writing(folder):
        reporter = progress.Reporter(
            folder, config.updates, trainer.done, names, draw_samples, compare, accelerator, config.taken_out
        )
    try:
        trainer.train(reporter)
        reporter.close()
        _export(trainer)
        if held_out and config.report:
            _report(trainer, held_out, names)
    except Interrupted as stop:
        reporter.close()
        if main:
            print(f"tmpo_trainer: {stop}; saved, continue with --resume {folder}", file=sys.stderr)
        trackers.end(accelerator)
        return 130
    except KeyboardInterrupt:
        reporter.close()
        if main:
            print(f"tmpo_trainer: interrupted after update {trainer.done} ({_kept(trainer)})", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError, SafetensorError, MemoryError) as error:
        reporter.close()
        if main or not isinstance(error, OtherProcessFailed):
            text = one_line(error) or type(error).__name__
            if isinstance(error, torch.OutOfMemoryError):
                # The replay's own line says what to do there. Elsewhere memory depends on these.
                text += "; a smaller --max-batch or --decode-batch, or --offload-scorers, needs less"
            # Of another process there is only the text.
            kept = _kept(trainer, isinstance(error, Diverged) or f"{Diverged.__name__}: " in str(error))
            print(f"tmpo_trainer: failed after update {trainer.done}: {text} ({kept})", file=sys.stderr)
        return 1
    finally:
        reporter.close()
    trackers.end(accelerator)
    return 0


def _kept(trainer: Trainer, diverged: bool = False) -> str:
    """What a run that failed has left, and what to do with it, as a part of a line."""
    folder = trainer.run
    whole = [path for path in checkpoints(folder) if number(path)]
    if not whole:
        return "nothing saved yet; lower --learning-rate" if diverged else "nothing saved yet"
    kept = f"kept {whole[-1].name}"
    if not diverged:
        return f"{kept}, continue with --resume {folder}"
    before = [path for path in whole if number(path) < trainer.done]
    if before:
        return f"{kept}; the same settings fail again, continue with --resume {before[-1]} and a lower --learning-rate"
    return f"{kept}; the same settings fail again, start a new run with a lower --learning-rate"


def _export(trainer: Trainer) -> None:
    config = trainer.config
    about = {
        "method": config.method,
        "step": str(trainer.done),
        "rewards": " ".join(config.reward),
        **trainer.method.metadata(),
        # The file contains no local paths.
        "base_model": config.model if config.model == "demo" or is_hub_id(config.model) else "local",
    }
    main = trainer.processes.main
    with trainer.weights.averaged():
        changed = export.export_lora(trainer.backbone, trainer.run, about, main)
    if not main:
        return
    if not changed:
        why = "is the learning rate 0?"
        if trainer.done < config.ema_every:
            why = f"the averaged weights move every {config.ema_every} updates, see ema_every"
        print(f"the LoRA is zero: nothing was learnt ({why})", file=sys.stderr)
    print(f"LoRA: {trainer.run / export.FILE_NAME}", file=sys.stderr)


def _report(trainer: Trainer, held_out: HeldOut, rewards: list[str]) -> None:
    """Base and trained (EMA) model on the held-out prompts with the same noise."""
    config, main = trainer.config, trainer.processes.main
    count = len(held_out.protocol.prompts.texts)
    what = "evaluating base and trained"
    with tqdm(total=2 * count, desc=what, unit="prompt", dynamic_ncols=True, disable=not main) as bar:
        with trainer.weights.pretrained():
            base = held_out.base(bar.update)
        with trainer.weights.averaged():
            trained = held_out.measure(bar.update)
    if not main:
        return
    about = [
        f"{counted(held_out.protocol.prompts.texts, 'held-out prompts')} x {config.eval_images} images, "
        f"{held_out.protocol.sampling.about}, guidance {config.guidance:g}, averaged (EMA) weights after "
        f"{trainer.done} updates, seed {config.seed}. Base and trained model start from the same noise; intervals are "
        "bootstraps over prompts. "
        f"Diversity of pictures is measured on {held_out.protocol.features.name} features.",
    ]
    # Before the files, one of which may fail, as on a full disk.
    for name, values in base.measures.items():
        print(f"{name}: {values.mean():.3f} -> {trained.measures[name].mean():.3f}", file=sys.stderr)
    target = next(iter(base.scores))
    metrics, evaluations = progress.metrics_lines(trainer.run, rewards), progress.evaluation_lines(trainer.run, target)
    if not metrics:
        raise ValueError(f"{trainer.run / 'metrics.jsonl'} has no line for the curves of the report")
    checks = report.write_report(
        trainer.run, base, trained, metrics, evaluations, rewards, about, target, config.taken_out
    )
    for statement, holds in checks.items():
        print(f"{'yes' if holds else 'NO '} {statement}", file=sys.stderr)
    warning = drift.warning(drift.drifts(base.statistics, trained.statistics, base.prompts), config.taken_out)
    if warning:
        print(warning, file=sys.stderr)
    print(f"report: {trainer.run / 'report.md'}", file=sys.stderr)
