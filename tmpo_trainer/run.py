"""A whole run: load, train, export, report. Also `--dry-run`."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import torch
import transformers
from tqdm import tqdm

from tmpo_trainer import __version__, evaluate, export, reporting, tree
from tmpo_trainer.backbones import find_model, load_backbone
from tmpo_trainer.backbones.sd3 import SD3Backbone
from tmpo_trainer.checkpoint import checkpoints
from tmpo_trainer.config import ConfigError, TrainConfig, to_yaml
from tmpo_trainer.features import EfficientNetLite
from tmpo_trainer.prompts import read_prompts
from tmpo_trainer.rewards import Scorer, load_scorer
from tmpo_trainer.rewards.shapes import ShapesScorer
from tmpo_trainer.trainer import Interrupted, Trainer, make_schedule

DEMO_PROMPTS = Path(__file__).parent / "demo" / "prompts"


def prompt_files(config: TrainConfig) -> tuple[Path, Path]:
    """Training and held-out prompt files: the configured ones, or those of the demo domain."""
    files = []
    for given, name in ((config.prompts, "train.txt"), (config.eval_prompts, "heldout.txt")):
        if given is None and "shapes" not in config.reward:
            key = "prompts" if name == "train.txt" else "eval-prompts"
            raise ConfigError(f"reward {' '.join(config.reward)} has no prompt list of its own yet: give --{key} FILE")
        files.append(given or DEMO_PROMPTS / name)
    return files[0], files[1]


def evaluation_scorers(config: TrainConfig, scorers: list[Scorer]) -> list[tuple[str, Scorer]]:
    """What the report measures: the rewards; shapes both strict and partial."""
    pairs: list[tuple[str, Scorer]] = []
    for scorer in scorers:
        if isinstance(scorer, ShapesScorer):
            pairs += [("shapes strict", ShapesScorer("strict")), ("shapes partial", ShapesScorer("partial"))]
        else:
            pairs.append((scorer.name, scorer))
    return pairs


def choose_device(config: TrainConfig) -> torch.device:
    if config.device != "auto":
        try:
            device = torch.device(config.device)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise ConfigError(f"device {config.device}: use auto, cpu, cuda or cuda:N")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device {config.device}: torch sees {torch.cuda.device_count()} CUDA devices here")
        return device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _need_hardware(config: TrainConfig) -> None:
    if config.model == "black-forest-labs/FLUX.1-dev" and not torch.cuda.is_available():
        raise ConfigError(
            "FLUX.1-dev needs a CUDA GPU with 80 GB (24 GB with 4-bit weights) and its weights; none is here. "
            "To train the bundled demo model on this CPU: python -m tmpo_trainer --preset demo"
        )


def environment(device: torch.device) -> dict[str, Any]:
    """What env.json records: versions and hardware, nothing personal."""
    return {
        "tmpo_trainer": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def _check(config: TrainConfig) -> tuple[list[str], list[str]]:
    """Everything that can be refused before anything heavy is loaded. Returns train and held-out prompts."""
    _need_hardware(config)
    find_model(config.model)
    train_file, eval_file = prompt_files(config)
    train, heldout = read_prompts(train_file), read_prompts(eval_file)[: config.eval_limit]
    for name in config.reward:
        load_scorer(name)
    if "shapes" in config.reward:
        from tmpo_trainer.demo.domain import parse

        for file, prompts in ((train_file, train), (eval_file, heldout)):
            for prompt in prompts:
                try:
                    parse(prompt)
                except ValueError as error:
                    raise ConfigError(f"{file}: {error}") from None
    return train, heldout


def load_model(config: TrainConfig, device: torch.device) -> SD3Backbone:
    backbone = load_backbone(config.model, _dtype(config, device), device, config.max_sequence_length)
    try:
        backbone.latent_shape(*config.resolution)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return backbone


def _quiet() -> None:
    """Libraries' progress bars and advice would tear the run's own bar apart."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def dry_run(config: TrainConfig) -> int:
    """Prints what a run would do: prompts, tree geometry, network evaluations, memory."""
    _quiet()
    train_prompts, heldout = _check(config)
    device = choose_device(config)
    backbone = load_model(config, device)
    sigmas = backbone.sigmas(config.rollout_steps, *config.resolution)
    schedule = make_schedule(config, sigmas)
    parameters = sum(p.numel() for p in backbone.transformer.parameters())
    print(f"model {config.model} on {device}: transformer of {parameters / 1e6:.1f} M parameters")
    print(f"prompts: {len(train_prompts)} for training, {len(heldout)} held out")
    print(f"sigmas: {' '.join(f'{sigma:.4f}' for sigma in sigmas.tolist())}")
    for update in sorted({0, config.updates // 2, config.updates - 1}):
        steps = schedule.steps(update)
        plan = tree.TreePlan.tmpo(config.rollout_steps, steps, config.branching)
        print(
            f"update {update + 1}: branch steps {steps}, widths {plan.widths}, {plan.leaves} leaves; per prompt "
            f"{plan.rollout_evaluations} evaluations in the rollout, {plan.train_evaluations} in the replay"
        )
    channels, height, width = backbone.latent_shape(*config.resolution)
    megabyte = channels * height * width * 4 / 2**20
    plan = tree.TreePlan.tmpo(config.rollout_steps, schedule.steps(0), config.branching)
    stored = (plan.leaves + 2 * plan.train_evaluations + plan.leaves) * config.prompts_per_update * megabyte
    weights = parameters * _dtype(config, device).itemsize / 2**20
    print(f"memory: weights of the transformer {weights:.0f} MiB, stored latents of a rollout {stored:.1f} MiB")
    print(f"per update: {config.prompts_per_update * plan.leaves} images; {config.updates} updates in all")
    return 0


def _new_folder(config: TrainConfig, preset: str) -> Path:
    if config.output_dir is not None:
        if (config.output_dir / "metrics.jsonl").exists():
            raise ConfigError(
                f"{config.output_dir} already holds a run: continue it with --resume {config.output_dir} "
                f"or give another --output-dir"
            )
        return config.output_dir
    return Path("outputs") / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"


def train(config: TrainConfig, preset: str, checkpoint: Path | None) -> int:
    """Trains, exports and reports. Returns the exit code."""
    train_prompts, heldout = _check(config)
    folder = checkpoint.parent if checkpoint else _new_folder(config, preset)
    if config.threads:
        torch.set_num_threads(config.threads)
    _quiet()
    device = choose_device(config)
    backbone = load_model(config, device)
    scorers = [load_scorer(name) for name in config.reward]
    trainer = Trainer(config, folder, backbone, scorers, train_prompts)
    if checkpoint:
        trainer.resume(checkpoint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output folder {folder} cannot be made: {error.strerror}") from None
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "env.json").write_text(json.dumps(environment(device), indent=2) + "\n")
    print(f"{'resuming' if checkpoint else 'training'} in {folder}", file=sys.stderr)
    shown = [heldout[i] for i in np.linspace(0, len(heldout) - 1, min(6, len(heldout))).astype(int)]

    def draw_samples() -> tuple[np.ndarray, list[str]]:
        latents = evaluate.sample(backbone, shown, 8, **_sampling(config))
        pictures = backbone.decode(latents.flatten(0, 1), config.decode_batch)
        return pictures.reshape(len(shown), 8, *pictures.shape[1:]), shown

    reporter = reporting.Reporter(
        folder, config.updates, trainer.done, [scorer.name for scorer in scorers], draw_samples
    )
    try:
        trainer.train(reporter)
    except Interrupted as stop:
        reporter.close()
        print(f"tmpo_trainer: {stop}; saved, continue with --resume {folder}", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError) as error:
        reporter.close()
        kept = f"saved, continue with --resume {folder}" if checkpoints(folder) else "nothing saved yet"
        print(f"tmpo_trainer: update {trainer.done + 1} failed: {error} ({kept})", file=sys.stderr)
        return 1
    reporter.close()
    about = {
        "method": config.method,
        "step": str(trainer.done),
        "rewards": " ".join(config.reward),
        "beta": f"{config.beta_start} to {config.beta_end}",
        "base_model": config.model if config.model == "demo" or not Path(config.model).exists() else "local",
    }
    with trainer.averaged():
        changed = export.export_lora(backbone, folder, about)
    if not changed:
        print("tmpo_trainer: the LoRA is zero: nothing was learnt (is the learning rate 0?)", file=sys.stderr)
    if config.report:
        report(config, trainer, heldout, scorers)
    print(f"LoRA: {folder / export.FILE_NAME}", file=sys.stderr)
    return 0


def _sampling(config: TrainConfig) -> dict[str, Any]:
    return {
        "steps": config.eval_steps,
        "seed": config.seed,
        "guidance": config.guidance,
        "resolution": config.resolution,
        "batch": 128,
    }


def report(config: TrainConfig, trainer: Trainer, heldout: list[str], scorers: list[Scorer]) -> None:
    """Base and trained (EMA) model on the held-out prompts with the same noise."""
    backbone, features = trainer.backbone, EfficientNetLite(trainer.device)
    pairs = evaluation_scorers(config, scorers)

    def measure(progress: Callable[[int], Any]) -> evaluate.Evaluation:
        return evaluate.evaluate(
            backbone,
            heldout,
            pairs,
            features,
            images=config.eval_images,
            decode_batch=config.decode_batch,
            progress=progress,
            **_sampling(config),
        )

    with tqdm(total=2 * len(heldout), desc="evaluating base and trained", unit="prompt", dynamic_ncols=True) as bar:
        with trainer.reference():
            base = measure(bar.update)
        with trainer.averaged():
            trained = measure(bar.update)
    about = [
        f"{len(heldout)} held-out prompts x {config.eval_images} images, {config.eval_steps} steps, guidance "
        f"{config.guidance:g}, averaged (EMA) weights after {trainer.done} updates, seed {config.seed}. Base and trained "
        f"model start from the same noise; intervals are bootstraps over prompts. Cosine diversity is on "
        f"{features.name} features.",
    ]
    metrics = reporting.read_metrics(trainer.run / "metrics.jsonl")
    checks = reporting.write_report(trainer.run, base, trained, metrics, [s.name for s in scorers], about, pairs[0][0])
    for name in base.scores:
        print(f"{name}: {base.scores[name].mean():.3f} -> {trained.scores[name].mean():.3f}", file=sys.stderr)
    print(f"LGMD: {base.lgmd.mean():.3f} -> {trained.lgmd.mean():.3f}", file=sys.stderr)
    print(f"cosine diversity: {base.cosine.mean():.3f} -> {trained.cosine.mean():.3f}", file=sys.stderr)
    for claim, holds in checks.items():
        print(f"{'yes' if holds else 'NO '} {claim}", file=sys.stderr)
    print(f"report: {trainer.run / 'report.md'}", file=sys.stderr)
