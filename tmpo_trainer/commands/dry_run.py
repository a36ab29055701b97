"""`--dry-run`: describes a run from its settings and the model's configs alone."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from .. import methods
from ..backbones import find_configs, is_hub_id
from ..backbones.base import KEPT, Backbone
from ..backbones.check import check_weights
from ..backbones.text import BATCH, default_folder
from ..evaluation.statistics import counted
from ..prompts.lists import PromptList
from ..settings.config import TrainConfig
from ..settings.errors import ConfigError
from ..training import memory
from ..training.run_folder import check_free
from . import loading
from .loading import check, choose_device, quiet


def dry_run(config: TrainConfig, resumed: bool) -> int:
    """Prints what a run would do: prompts, tree geometry, network evaluations, memory. Loads no weights."""
    quiet()
    if resumed:
        # As in the run itself: a checkpoint has the weights.
        config = config.model_copy(update={"init_lora": None})
    elif config.output_dir:
        check_free(config.output_dir)
    device = choose_device(config.device)
    here = ""
    if config.device == "auto" and config.model != "demo" and device.type == "cpu":
        device, here = torch.device("cuda"), " (none here)"
    model, folder = config.model, find_configs(config.model)
    if is_hub_id(model):
        config = config.model_copy(update={"model": str(folder)})
    try:
        train_prompts, heldout, skeleton = check(config, device)
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(folder), model)) from None
    if not is_hub_id(model):
        check_weights(model, folder, skeleton, ("transformer",) if config.transformer else ())
    sigmas = skeleton.sigmas(config.rollout_steps, *config.resolution)
    method = methods.make(config, sigmas)
    parameters = sum(p.numel() for p in skeleton.transformer.parameters())
    print(f"model {model} on {device}{here}: transformer of {parameters / 1e6:.1f} M parameters")
    targets = skeleton.target_shapes(config.lora_targets)
    numbers = config.lora_rank * sum(inputs + outputs for inputs, outputs in targets.values())
    print(f"LoRA of rank {config.lora_rank} on {len(targets)} linear layers: {numbers / 1e6:.1f} M parameters")
    print(f"prompts: {len(train_prompts.texts)} for training, {counted(heldout.texts, 'held out')}")
    print(f"text features: {_text_features(config, skeleton, folder, device, train_prompts, heldout)}")
    print(f"sigmas: {' '.join(f'{sigma:.4f}' for sigma in sigmas.tolist())}")
    for update in sorted({0, config.updates // 2, config.updates - 1}):
        plan = method.shape(update)
        counts = ", ".join(f"{n} {phase}" for phase, n in methods.evaluations(method, plan).items() if n)
        print(
            f"update {update + 1}: noise at steps {tuple(plan.fanout)}, {plan.roots} seeds, widths {plan.widths}, "
            f"{plan.leaves} leaves; network evaluations per prompt: {counts}"
        )
    shapes, plans = Counter[tuple[Any, ...]](), {}
    for update in range(config.updates):
        plan = method.shape(update)
        kind = plan.roots, tuple(plan.fanout.items())
        shapes[kind] += 1
        plans.setdefault(kind, plan)
    each = {kind: methods.cost(methods.evaluations(method, plan)) for kind, plan in plans.items()}
    total = config.prompts_per_update * sum(count * each[kind] for kind, count in shapes.items())
    print(
        f"per update: {config.prompts_per_update * next(iter(plans.values())).leaves} images; {config.updates} updates in "
        f"all, {total:,} network evaluations (forward and backward pass count one each)"
    )
    if config.report:
        count = len(heldout.texts)
        print(
            f"report: {count} prompts x {config.eval_images} images x {config.eval_steps} steps, base and trained: "
            f"{2 * count * config.eval_images * config.eval_steps:,} network evaluations (fewer with --eval-limit or "
            "--eval-images, none with --no-report)"
        )
    print("memory by phase, from the model's configs (plus about 0.5 GiB for CUDA, and scorers):")
    for phase, parts in memory.estimate(skeleton, folder, config, method, list(plans.values()), device).items():
        listed = ", ".join(f"{part} {size / memory.GIB:.2f}" for part, size in parts.items())
        print(f"  {phase}: {sum(parts.values()) / memory.GIB:.2f} GiB ({listed})")
    return 0


def _text_features(
    config: TrainConfig,
    skeleton: Backbone,
    folder: Path,
    device: torch.device,
    train_prompts: PromptList,
    heldout: PromptList,
) -> str:
    """How many prompts a run encodes, and the disk space and memory that their features take. Raises ConfigError."""
    # `launch` sets the number of processes, each with its own prompts.
    texts = loading.drawn_prompts(config, train_prompts, heldout, int(os.environ.get("WORLD_SIZE", "1")))
    each = skeleton.text_bytes(folder) / memory.GIB
    count = len(set(texts) | {""})
    # Those of an update, of an evaluation's call or of the text encoders', and the empty prompt.
    evaluated = loading.sampling(config).batch // config.eval_images
    together = min(1 + max(config.prompts_per_update, evaluated, BATCH), count)
    if not skeleton.frees_text_encoders(folder):
        kept = min(count * each, KEPT / memory.GIB)
        return f"{count:,} prompts will be drawn; none on disk, at most {kept:.3f} GiB in memory"
    missing = loading.check_text(config, skeleton, device, texts)
    most = "at most " if skeleton.text_varies else ""
    return (
        f"{count:,} prompts will be drawn, {missing:,} of them have to be encoded; {most}{count * each:.3f} GiB on disk in "
        f"{config.text_cache or default_folder()}, {most}{missing * each:.3f} GiB of that to be written; at most "
        f"{together * each:.3f} GiB in memory"
    )
