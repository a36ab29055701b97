"""`evaluate`: base model and LoRA in the columns of the paper's Table 1, with bootstrap intervals over prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft.tuners.lora import LoraLayer
from tqdm import tqdm

from . import evaluate, loading, lora_file, reporting
from .backbones import is_hub_id
from .backbones.base import Backbone
from .checkpoint import write_text
from .config import TrainConfig
from .errors import ConfigError
from .prompts import PromptList, read_prompts
from .run import Loaded, agreed_folder, together

#: Prompts whose pictures are shown.
SHOWN = 10


def check_lora(path: Path, transformer: Any) -> None:
    """Raises ConfigError for a file that is no sound LoRA, or one of another model. The transformer may lack its weights."""
    modules = dict(transformer.named_modules())
    for name, (down, up) in lora_file.read(path).layers.items():
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise ConfigError(f"{path}: {name} has numbers that are not finite")
        if name.startswith("transformer."):
            module = modules.get(name.removeprefix("transformer."))
            wanted = (module.out_features, module.in_features) if isinstance(module, torch.nn.Linear) else None
            if down.numel() == 0 or wanted != (len(up), down[0].numel()):
                raise ConfigError(f"{path}: {name} does not fit {type(transformer).__name__}: of another model")


def attach(backbone: Backbone, path: Path) -> None:
    """Loads a LoRA file as diffusers does. Raises ConfigError if it is none or of another model."""
    check_lora(path, backbone.transformer)
    file = path / lora_file.FILE_NAME if path.is_dir() else path
    try:
        backbone.pipeline.load_lora_weights(file.parent, weight_name=file.name)
    except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        # What diffusers' converters do with names that they do not know.
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file} cannot be loaded by diffusers, are its names its own? ({reason})") from None
    if not any(isinstance(module, LoraLayer) for module in backbone.transformer.modules()):
        raise ConfigError(
            f"{file}: none of its modules is in {type(backbone.transformer).__name__}, by diffusers' names"
        )


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over prompts and its 95% bootstrap interval. `[P]` or `[P, n]`."""
    return evaluate.paired_gain(np.zeros_like(values), values)


def _figures(parts: list[evaluate.Evaluation]) -> dict[str, np.ndarray]:
    """Measures by name. With two lists of prompts the task's scores are on the first, all else on the last."""
    scores = {name: values for part in parts for name, values in part.scores.items()}
    return {**scores, "LGMD": parts[-1].lgmd, "cosine diversity": parts[-1].cosine}


def numbers(values: tuple[float, float, float]) -> dict[str, float | None]:
    """For JSON, which has no infinity: that of one prompt is null."""
    return {
        key: value if np.isfinite(value) else None for key, value in zip(("mean", "low", "high"), values, strict=True)
    }


def rows(models: Mapping[str, list[evaluate.Evaluation]]) -> tuple[str, dict[str, Any]]:
    """The table in markdown, and the same as an object: per model and measure mean, low and high; gains if there are two.

    Args:
        models: {label: its evaluations}, the base first.
    """
    measured = {label: _figures(parts) for label, parts in models.items()}
    names = list(next(iter(measured.values())))
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    content: dict[str, Any] = {"models": {}}
    for label, values in measured.items():
        found = {name: interval(values[name]) for name in names}
        content["models"][label] = {name: numbers(values) for name, values in found.items()}
        cells = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in found.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    if len(measured) == 2:
        base, trained = measured.values()
        gains = {name: evaluate.paired_gain(base[name], trained[name]) for name in names}
        content["gain"] = {name: numbers(gain) for name, gain in gains.items()}
        cells = [f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in gains.values()]
        lines.append(f"| change, paired | {' | '.join(cells)} |")
    return "\n".join(lines), content


def run(config: TrainConfig, file: Path | None, preference: Path | None) -> int:
    """Evaluates the base model and, if a file is given, the LoRA in it; writes table.md, table.json and pictures.

    Args:
        config: what to evaluate: model, held-out prompts, scorers (`reward`), images, steps, guidance, features.
        preference: prompts for all but the first score and for diversity, as in the paper; by default the same prompts.

    Raises:
        ConfigError: before anything is drawn.
    """
    loading.need_gpu(config)
    chosen = loading.choose_device(config.device)
    second = None if preference is None else read_prompts(preference).first(config.eval_limit)
    task = config
    if second is not None:
        task = config.model_copy(update={"reward": config.reward[:1]})
        loading.check_prompts(config.reward[1:], second)
    heldout = loading.heldout_prompts(task, "prompts")
    loading.check_rewards(config)
    loading.check_features(config.features)
    skeleton = loading.skeleton(config, chosen)
    if file is not None:
        check_lora(file, skeleton.transformer)
    if config.threads:
        torch.set_num_threads(config.threads)
    loading.quiet()
    accelerator = Accelerator(cpu=chosen.type == "cpu")
    device = chosen if accelerator.num_processes == 1 else accelerator.device
    texts = heldout.texts + (second.texts if second else [])

    def load() -> Loaded:
        backbone = loading.load_model(config, device, texts)
        if file is not None:
            attach(backbone, file)
        return loading.scorers(config, device), loading.features(config, device), backbone

    folder = agreed_folder(config.output_dir, "evaluate", accelerator)
    scorers, features, backbone = together(accelerator, load)
    assert features is not None
    # The paper measures the task on its own prompts, preference and diversity on others.
    parts: list[tuple[str, PromptList, list[loading.Scorer]]] = [("base", heldout, scorers)]
    if second is not None:
        parts = [("base-task", heldout, scorers[:1]), ("base-preference", second, scorers[1:])]
    models: dict[str, list[evaluate.Evaluation]] = {"base": []}
    if file is not None:
        models["LoRA"] = []
    total = len(models) * sum(len(prompts.texts) for _, prompts, _ in parts)
    with tqdm(total=total, unit="prompt", dynamic_ncols=True, disable=not accelerator.is_main_process) as bar:
        for name, prompts, some in parts:
            held = evaluate.HeldOut(
                folder / f"{name}.npz",
                backbone,
                prompts,
                loading.evaluation_scorers(some),
                features,
                config.eval_images,
                loading.sampling(config),
                accelerator,
                loading.identity(config),
            )
            if file is not None:
                backbone.transformer.disable_adapters()
            models["base"].append(held.base(bar.update))
            if file is not None:
                backbone.transformer.enable_adapters()
                models["LoRA"].append(held.measure(bar.update))
    if not accelerator.is_main_process:
        return 0
    text, content = rows(models)
    about = (
        f"{len(heldout.texts)} prompts{f' and {len(second.texts)} for preference and diversity' if second else ''} x "
        f"{config.eval_images} images, {config.eval_steps} steps, guidance {config.guidance:g}, "
        f"{config.resolution[0]}x{config.resolution[1]}, seed {config.seed}; the same noise for every model. In brackets 95% "
        f"bootstrap intervals over prompts. Cosine diversity is on {features.name} features."
    )
    pictures = []
    for i, (_, prompts, _) in enumerate(parts):
        path = folder / ("samples.png" if i == 0 else "samples-preference.png")
        base = models["base"][i]
        if file is not None:
            reporting.side_by_side(base, models["LoRA"][i], path)
        else:
            labels = [prompts.texts[j] for j in base.shown]
            reporting.grid(list(base.images), labels, reporting.zoom(base.images[0])).save(path)
        pictures.append(f"![pictures]({path.name})")
    # No paths of this machine.
    model = config.model if config.model == "demo" or is_hub_id(config.model) else "local"
    write_text(folder / "table.md", "\n\n".join([f"# {model}", about, text, *pictures]) + "\n")
    settings = {
        "model": model,
        "images": config.eval_images,
        "steps": config.eval_steps,
        "guidance": config.guidance,
        "seed": config.seed,
        "resolution": list(config.resolution),
        "rewards": list(config.reward),
        "prompts": len(heldout.texts),
        "preference_prompts": 0 if second is None else len(second.texts),
        "features": features.name,
    }
    write_text(folder / "table.json", json.dumps({"settings": settings, **content}, indent=2, allow_nan=False) + "\n")
    print(text)
    print(f"table: {folder / 'table.md'}", file=sys.stderr)
    return 0
