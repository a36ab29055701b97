"""A whole run: load, train, export, report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from tqdm import tqdm

from ..backbones import is_hub_id
from ..evaluation import report
from ..evaluation.held_out import Evaluation, HeldOut, sample
from ..files import read_metrics, write_text
from ..lora import export
from ..settings.config import TrainConfig, to_yaml
from ..settings.errors import ConfigError
from ..training import progress, trackers
from ..training.checkpoint import checkpoints, drop_later
from ..training.loop import Interrupted, OtherProcessFailed, Trainer
from ..training.run_folder import agreed_folder, environment
from . import loading
from .loading import together


def train(config: TrainConfig, preset: str, checkpoint: Path | None) -> int:
    """Trains, exports and reports. Returns the exit code: 0, 1 for a failure (one line says which), 130 if interrupted."""
    loading.need_gpu(config)
    chosen = loading.choose_device(config.device)
    train_prompts, heldout, _ = loading.check(config, chosen)
    if config.threads:
        torch.set_num_threads(config.threads)
    loading.quiet()
    accelerator = Accelerator(cpu=chosen.type == "cpu", **trackers.arguments(config.tracker))
    device = chosen if accelerator.num_processes == 1 else accelerator.device
    main = accelerator.is_main_process
    if accelerator.is_fsdp2 and config.quantize == "nf4":
        raise ConfigError("--quantize nf4 cannot be sharded: use `launch ddp`, or leave it out")

    def say(text: str) -> None:
        if main:
            print(text, file=sys.stderr)

    # What the rewards and the report need is loaded first: it must not be found missing after hours of training.
    texts = train_prompts.texts + heldout.texts
    everything, features, backbone = together(
        accelerator,
        lambda: (
            loading.scorers(config, device, tuple(dict.fromkeys((*config.reward, *config.auxiliary)))),
            loading.features(config, device) if config.report or config.eval_every or config.auxiliary else None,
            loading.load_model(config, device, texts, accelerator.is_fsdp2),
        ),
    )
    folder = checkpoint.parent if checkpoint else agreed_folder(config.output_dir, preset, accelerator)
    by_name = dict(zip(dict.fromkeys((*config.reward, *config.auxiliary)), everything, strict=True))
    scorers, auxiliary = ([by_name[name] for name in names] for names in (config.reward, config.auxiliary))
    trainer = Trainer(config, folder, backbone, scorers, train_prompts, accelerator, auxiliary, features)
    if checkpoint:
        trainer.resume(checkpoint)
    if main:
        if checkpoint:
            drop_later(folder, trainer.done)
        write_text(folder / "config.yaml", to_yaml(config))
        write_text(folder / "env.json", json.dumps(environment(device), indent=2) + "\n")
    trackers.start(accelerator, config, folder)
    say(f"{'resuming' if checkpoint else 'training'} in {folder}")
    count = len(heldout.texts)
    shown = [heldout.texts[i] for i in np.linspace(0, count - 1, min(6, count)).astype(int)]

    def draw_samples() -> tuple[np.ndarray, list[str]]:
        parts = [pictures for _, pictures in sample(backbone, shown, 8, loading.sampling(config))]
        return np.concatenate(parts), shown

    held_out = None
    if features and (config.report or config.eval_every):
        held_out = HeldOut(
            backbone,
            loading.evaluation_protocol(config, heldout, scorers, features),
            folder / "base.npz" if config.eval_every else None,
            loading.identity(config),
            accelerator,
        )

    def compare() -> tuple[Evaluation, Evaluation]:
        assert held_out is not None
        with trainer.reference():
            base = held_out.base()
        return base, held_out.measure()

    names = [scorer.name for scorer in scorers]
    reporter = progress.Reporter(folder, config.updates, trainer.done, names, draw_samples, compare, accelerator)
    try:
        trainer.train(reporter)
        reporter.close()
        _export(config, trainer)
        if held_out and config.report:
            _report(config, trainer, held_out, names)
    except Interrupted as stop:
        reporter.close()
        say(f"tmpo_trainer: {stop}; saved, continue with --resume {folder}")
        accelerator.end_training()
        return 130
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        whole = checkpoints(folder)
        kept = f"kept {whole[-1].name}, continue with --resume {folder}" if whole else "nothing saved yet"
        text = " ".join(str(error).split())
        reporter.close()
        if main or not isinstance(error, OtherProcessFailed):
            print(f"tmpo_trainer: failed after update {trainer.done}: {text} ({kept})", file=sys.stderr)
        return 1
    finally:
        reporter.close()
    accelerator.end_training()
    return 0


def _export(config: TrainConfig, trainer: Trainer) -> None:
    about = {
        "method": config.method,
        "step": str(trainer.done),
        "rewards": " ".join(config.reward),
        **({"beta": f"{config.beta(0)} to {config.beta_end}"} if config.method.startswith("tmpo") else {}),
        # No paths in the file.
        "base_model": config.model if config.model == "demo" or is_hub_id(config.model) else "local",
    }
    main = trainer.accelerator.is_main_process
    with trainer.averaged():
        changed = export.export_lora(trainer.backbone, trainer.run, about, main)
    if not main:
        return
    if not changed:
        why = "is the learning rate 0?"
        if trainer.done < config.ema_every:
            why = f"the averaged weights move every {config.ema_every} updates, see ema_every"
        print(f"the LoRA is zero: nothing was learnt ({why})", file=sys.stderr)
    print(f"LoRA: {trainer.run / export.FILE_NAME}", file=sys.stderr)


def _report(config: TrainConfig, trainer: Trainer, held_out: HeldOut, rewards: list[str]) -> None:
    """Base and trained (EMA) model on the held-out prompts with the same noise."""
    count = len(held_out.protocol.prompts.texts)
    main = trainer.accelerator.is_main_process
    what = "evaluating base and trained"
    with tqdm(total=2 * count, desc=what, unit="prompt", dynamic_ncols=True, disable=not main) as bar:
        with trainer.reference():
            base = held_out.base(bar.update)
        with trainer.averaged():
            trained = held_out.measure(bar.update)
    if not main:
        return
    about = [
        f"{count} held-out prompts x {config.eval_images} images, {config.eval_steps} steps, guidance "
        f"{config.guidance:g}, averaged (EMA) weights after {trainer.done} updates, seed {config.seed}. Base and trained "
        f"model start from the same noise; intervals are bootstraps over prompts. Diversity of "
        f"pictures is measured on {held_out.protocol.features.name} features.",
    ]
    metrics = read_metrics(trainer.run / "metrics.jsonl")
    evaluations = read_metrics(trainer.run / "evaluations.jsonl")
    target = next(iter(base.scores))
    checks = report.write_report(trainer.run, base, trained, metrics, evaluations, rewards, about, target)
    for name, values in base.measures.items():
        print(f"{name}: {values.mean():.3f} -> {trained.measures[name].mean():.3f}", file=sys.stderr)
    for claim, holds in checks.items():
        print(f"{'yes' if holds else 'NO '} {claim}", file=sys.stderr)
    print(f"report: {trainer.run / 'report.md'}", file=sys.stderr)
