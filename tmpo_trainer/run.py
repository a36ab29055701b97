"""A whole run: load, train, export, report. Also `--dry-run`."""

from __future__ import annotations

import importlib.util
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
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from tqdm import tqdm

from tmpo_trainer import __version__, evaluate, export, lora, memory, reporting, trackers, tree
from tmpo_trainer.backbones import find_model, is_hub_id, load_backbone, load_skeleton
from tmpo_trainer.backbones.base import Backbone
from tmpo_trainer.backbones.check import check_transformer, check_weights
from tmpo_trainer.checkpoint import checkpoints, drop_later, write_text
from tmpo_trainer.config import ConfigError, TrainConfig, to_yaml
from tmpo_trainer.features import EfficientNetLite
from tmpo_trainer.prompts import read_prompts
from tmpo_trainer.rewards import Parked, Scorer, check_name, load_scorer
from tmpo_trainer.rewards.shapes import ShapesScorer
from tmpo_trainer.trainer import Interrupted, OtherProcessFailed, Trainer, make_schedule

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


def evaluation_scorers(scorers: list[Scorer]) -> list[tuple[str, Scorer]]:
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


def _need_gpu(config: TrainConfig) -> None:
    """Refuses to download many gigabytes to a machine that cannot train them."""
    if is_hub_id(config.model) and config.device == "auto" and not torch.cuda.is_available():
        raise ConfigError(
            f"model {config.model} needs a CUDA GPU, and none is here (--device cpu to try all the same). To train the "
            "bundled demo model on a CPU: python -m tmpo_trainer --preset demo"
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


def _check(config: TrainConfig, device: torch.device) -> tuple[list[str], list[str], Backbone]:
    """Everything that can be refused before the model is loaded.

    Returns:
        training and held-out prompts, and the model's skeleton.
    """
    trackers.check(config.tracker)
    for name in config.reward:
        check_name(name)
    train_file, eval_file = prompt_files(config)
    train, heldout = read_prompts(train_file), read_prompts(eval_file)[: config.eval_limit]
    if "shapes" in config.reward:
        from tmpo_trainer.demo.domain import parse

        for file, prompts in ((train_file, train), (eval_file, heldout)):
            for prompt in prompts:
                try:
                    parse(prompt)
                except ValueError as error:
                    raise ConfigError(f"{file}: {error}") from None
    return train, heldout, _skeleton(config, device)


def _scorers(config: TrainConfig, device: torch.device) -> list[Scorer]:
    """The scorers of a run. Raises ConfigError for weights that cannot be had."""
    paths = dict(entry.split("=", 1) for entry in config.reward_models)
    scorers = [load_scorer(name, device, paths.get(name)) for name in config.reward]
    if config.offload_scorers:
        return [Parked(scorer, device) if hasattr(scorer, "to") else scorer for scorer in scorers]
    return scorers


def load_model(
    config: TrainConfig, device: torch.device, prompts: list[str] | None = None, sharded: bool = False
) -> Backbone:
    """The model of a run; `prompts` are all that it will be asked for, see `Backbone.load`."""
    backbone = load_backbone(
        config.model,
        _dtype(config, device),
        device,
        config.max_sequence_length,
        prompts,
        config.text_cache,
        config.transformer,
        config.quantize == "nf4",
        sharded,
    )
    backbone.split_guidance = config.split_guidance
    return backbone


def _skeleton(config: TrainConfig, device: torch.device) -> Backbone:
    """The model without its weights, after every check that needs no more. Raises ConfigError."""
    skeleton = load_skeleton(config.model, _dtype(config, device), config.max_sequence_length)
    skeleton.split_guidance = config.split_guidance
    try:
        skeleton.latent_shape(*config.resolution)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    make_schedule(config, skeleton.sigmas(config.rollout_steps, *config.resolution))
    if config.init_lora:
        lora.check_fits(config.init_lora, skeleton.target_shapes(config.lora_targets), config.lora_rank)
    if config.transformer:
        check_transformer(config.transformer, skeleton, config.quantize == "nf4")
    if config.quantize == "nf4":
        if device.type == "cpu":
            raise ConfigError("--quantize nf4 needs a CUDA GPU: leave it out")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError('--quantize nf4 needs bitsandbytes: pip install -c constraints.txt -e ".[train,nf4]"')
    return skeleton


def _quiet() -> None:
    """Libraries' progress bars and advice would tear the run's own bar apart."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def dry_run(config: TrainConfig) -> int:
    """Prints what a run would do: prompts, tree geometry, network evaluations, memory. Loads no weights."""
    _quiet()
    device = choose_device(config)
    here = ""
    if config.device == "auto" and config.model != "demo" and device.type == "cpu":
        device, here = torch.device("cuda"), " (none here)"
    train_prompts, heldout, skeleton = _check(config, device)
    folder = find_model(config.model, weights=False)
    sigmas = skeleton.sigmas(config.rollout_steps, *config.resolution)
    schedule = make_schedule(config, sigmas)
    parameters = sum(p.numel() for p in skeleton.transformer.parameters())
    print(f"model {config.model} on {device}{here}: transformer of {parameters / 1e6:.1f} M parameters")
    targets = skeleton.target_shapes(config.lora_targets)
    numbers = config.lora_rank * sum(inputs + outputs for inputs, outputs in targets.values())
    print(f"LoRA of rank {config.lora_rank} on {len(targets)} linear layers: {numbers / 1e6:.1f} M parameters")
    print(f"prompts: {len(train_prompts)} for training, {len(heldout)} held out")
    print(f"sigmas: {' '.join(f'{sigma:.4f}' for sigma in sigmas.tolist())}")
    for update in sorted({0, config.updates // 2, config.updates - 1}):
        steps = schedule.steps(update)
        plan = tree.TreePlan.tmpo(config.rollout_steps, steps, config.branching)
        print(
            f"update {update + 1}: branch steps {steps}, widths {plan.widths}, {plan.leaves} leaves; per prompt "
            f"{plan.rollout_evaluations} evaluations in the rollout, {plan.train_evaluations} in the replay"
        )
    every = sorted({schedule.steps(update) for update in range(config.updates)})
    plans = [tree.TreePlan.tmpo(config.rollout_steps, steps, config.branching) for steps in every]
    print(f"per update: {config.prompts_per_update * plans[0].leaves} images; {config.updates} updates in all")
    tokens = skeleton.text_tokens(folder, config.max_sequence_length)
    # Only models with T5 encode all prompts first.
    alone = (folder / skeleton.t5).is_dir()
    text = memory.text_encoder_bytes(folder, skeleton.transformer.dtype)
    phases = memory.estimate(skeleton, config, plans, tokens, text if alone else 0)
    kept = {} if alone else {"text encoders": text}
    print("memory by phase, from the model's configs (plus about 0.5 GiB for CUDA, and scorers):")
    for phase, parts in phases.items():
        parts = kept | parts
        listed = ", ".join(f"{part} {size / memory.GIB:.2f}" for part, size in parts.items())
        print(f"  {phase}: {sum(parts.values()) / memory.GIB:.2f} GiB ({listed})")
    if not is_hub_id(config.model):
        check_weights(config.model, folder, ("transformer",) if config.transformer else ())
    return 0


def _make_folder(config: TrainConfig, preset: str) -> Path:
    """The folder of a new run, made. Raises ConfigError if it cannot be, or holds a run already."""
    folder = config.output_dir or Path("outputs") / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    if config.output_dir and (folder / "metrics.jsonl").exists():
        mend = f"continue it with --resume {folder} or " if checkpoints(folder) else ""
        raise ConfigError(f"{folder} already holds a run: {mend}give another --output-dir")
    name = folder.name
    for attempt in range(2, 100):
        try:
            folder.mkdir(parents=True, exist_ok=config.output_dir is not None)
            return folder
        except FileExistsError:
            if config.output_dir:
                raise ConfigError(f"output folder {folder} is a file") from None
            # Another run began in the same second.
            folder = folder.with_name(f"{name}-{attempt}")
        except OSError as error:
            raise ConfigError(f"output folder {folder} cannot be made: {error.strerror}") from None
    raise ConfigError(f"output folder {folder} exists already")


def _agreed_folder(config: TrainConfig, preset: str, accelerator: Accelerator) -> Path:
    """The new run's folder, made by the first process and told to the others. Raises ConfigError on all of them."""
    if accelerator.num_processes == 1:
        return _make_folder(config, preset)
    told: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            told = [_make_folder(config, preset)]
        except ConfigError as error:
            told = [error]
    broadcast_object_list(told)
    if isinstance(told[0], ConfigError):
        raise told[0]
    return told[0]


def _together(
    accelerator: Accelerator, load: Callable[[], tuple[list[Scorer], Backbone]]
) -> tuple[list[Scorer], Backbone]:
    """What all processes load. A ConfigError of one is raised on all, so that the first can print it."""
    if accelerator.num_processes == 1:
        return load()
    loaded: list[tuple[list[Scorer], Backbone]] = []
    own = None
    try:
        loaded.append(load())
    except ConfigError as error:
        own = f"process {accelerator.process_index}: {error}"
    for text in gather_object([own]):
        if text is not None:
            raise ConfigError(text)
    return loaded[0]


def _sampling(config: TrainConfig) -> evaluate.Sampling:
    # No more at once than the rollout has.
    leaves = config.branching ** len(config.branch_early) * min(config.prompts_per_batch, config.prompts_per_update)
    return evaluate.Sampling(
        steps=config.eval_steps,
        seed=config.seed,
        guidance=config.guidance,
        resolution=config.resolution,
        batch=config.max_batch or min(leaves, 128),
        decode_batch=config.decode_batch,
    )


def train(config: TrainConfig, preset: str, checkpoint: Path | None) -> int:
    """Trains, exports and reports. Returns the exit code: 0, 1 for a failure (one line says which), 130 if interrupted."""
    _need_gpu(config)
    train_prompts, heldout, _ = _check(config, choose_device(config))
    if config.threads:
        torch.set_num_threads(config.threads)
    _quiet()
    accelerator = Accelerator(cpu=choose_device(config).type == "cpu", **trackers.arguments(config.tracker))
    device = choose_device(config) if accelerator.num_processes == 1 else accelerator.device
    main = accelerator.is_main_process
    if accelerator.is_fsdp2 and config.quantize == "nf4":
        raise ConfigError("--quantize nf4 cannot be sharded: use `launch ddp`, or leave it out")

    def say(text: str) -> None:
        if main:
            print(text, file=sys.stderr)

    # What the rewards and the report need is loaded first: it must not be found missing after hours of training.
    features = EfficientNetLite(device) if config.report or config.eval_every else None
    scorers, backbone = _together(
        accelerator,
        lambda: (
            _scorers(config, device),
            load_model(config, device, train_prompts + heldout, accelerator.is_fsdp2),
        ),
    )
    folder = checkpoint.parent if checkpoint else _agreed_folder(config, preset, accelerator)
    trainer = Trainer(config, folder, backbone, scorers, train_prompts, accelerator)
    if checkpoint:
        trainer.resume(checkpoint)
    if main:
        if checkpoint:
            drop_later(folder, trainer.done)
        write_text(folder / "config.yaml", to_yaml(config))
        write_text(folder / "env.json", json.dumps(environment(device), indent=2) + "\n")
    trackers.start(accelerator, config, folder)
    say(f"{'resuming' if checkpoint else 'training'} in {folder}")
    shown = [heldout[i] for i in np.linspace(0, len(heldout) - 1, min(6, len(heldout))).astype(int)]

    def draw_samples() -> tuple[np.ndarray, list[str]]:
        parts = [pictures for _, pictures in evaluate.sample(backbone, shown, 8, _sampling(config))]
        return np.concatenate(parts), shown

    held_out = None
    if features:
        held_out = evaluate.HeldOut(
            folder / "base.npz" if config.eval_every else None,
            backbone,
            heldout,
            evaluation_scorers(scorers),
            features,
            config.eval_images,
            _sampling(config),
            accelerator,
        )

    def compare() -> tuple[evaluate.Evaluation, evaluate.Evaluation]:
        assert held_out is not None
        with trainer.reference():
            base = held_out.base()
        return base, held_out.measure()

    names = [scorer.name for scorer in scorers]
    reporter = reporting.Reporter(folder, config.updates, trainer.done, names, draw_samples, compare, accelerator)
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
        "beta": f"{config.beta_start} to {config.beta_end}",
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


def _report(config: TrainConfig, trainer: Trainer, held_out: evaluate.HeldOut, rewards: list[str]) -> None:
    """Base and trained (EMA) model on the held-out prompts with the same noise."""
    count = len(held_out.prompts)
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
        f"model start from the same noise; intervals are bootstraps over prompts. Cosine diversity is on "
        f"{held_out.features.name} features.",
    ]
    metrics = reporting.read_metrics(trainer.run / "metrics.jsonl")
    evaluations = reporting.read_metrics(trainer.run / "evaluations.jsonl")
    target = next(iter(base.scores))
    checks = reporting.write_report(trainer.run, base, trained, metrics, evaluations, rewards, about, target)
    for name in base.scores:
        print(f"{name}: {base.scores[name].mean():.3f} -> {trained.scores[name].mean():.3f}", file=sys.stderr)
    print(f"LGMD: {base.lgmd.mean():.3f} -> {trained.lgmd.mean():.3f}", file=sys.stderr)
    print(f"cosine diversity: {base.cosine.mean():.3f} -> {trained.cosine.mean():.3f}", file=sys.stderr)
    for claim, holds in checks.items():
        print(f"{'yes' if holds else 'NO '} {claim}", file=sys.stderr)
    print(f"report: {trainer.run / 'report.md'}", file=sys.stderr)
