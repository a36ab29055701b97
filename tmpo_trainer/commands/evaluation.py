"""`evaluate`: measures base model and LoRA on the same held-out prompts and noise, and writes the results."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..backbones import is_hub_id
from ..backbones.base import Backbone
from ..evaluation import drift, limit, report
from ..evaluation.features import Features
from ..evaluation.held_out import Evaluation, HeldOut
from ..evaluation.statistics import counted, markdown_table, paired_gain
from ..files import write_text
from ..lora.attach import attach, check_lora
from ..pictures.grids import grid, zoom
from ..processes import Processes, together
from ..prompts.lists import PromptList, read_prompts
from ..rewards import Scorer
from ..rewards.geneval import TAGS
from ..settings.config import TrainConfig, taken_out_wholly
from ..settings.presets import valid
from ..settings.yaml_file import read_yaml
from ..training.run_folder import agreed_folder
from . import loading


@dataclass
class Part:
    """A list of held-out prompts and its measurements.

    name: of the file that keeps the base's evaluation. rewards: those measured on these prompts. evaluations: by model, the
    base first.
    """

    name: str
    prompts: PromptList
    rewards: Sequence[str]
    evaluations: dict[str, Evaluation] = field(default_factory=dict)


def run(config: TrainConfig, lora: Path | None, preference: Path | None) -> int:
    """Evaluates the base model and, if one is given, a LoRA; writes table.md, table.json and pictures.

    Args:
        config: what to evaluate: model, held-out prompts, scorers (`reward`), images, steps, guidance, features.
        lora: a run's folder or a LoRA file.
        preference: prompts for diversity and all scores except the first, as in the paper; by default the same prompts.

    Raises:
        ConfigError: the settings cannot be evaluated. It is raised before any picture is drawn.
    """
    taken_out = _taken_out(lora)
    loading.need_gpu(config)
    chosen = loading.choose_device(config.device)
    loading.check_rewards(config)
    parts = read_parts(config, preference)
    loading.check_features(config.features)
    skeleton = loading.skeleton(config, chosen)
    if lora is not None:
        loading.say_left_out(check_lora(lora, skeleton))
    if config.threads:
        torch.set_num_threads(config.threads)
    loading.quiet()
    accelerator = Accelerator(cpu=chosen.type == "cpu")
    device = chosen if accelerator.num_processes == 1 else accelerator.device
    texts = [text for part in parts for text in part.prompts.texts]
    rank, processes = accelerator.process_index, accelerator.num_processes
    together(accelerator, lambda: loading.encode(config, skeleton, device, texts, rank, processes))

    def load() -> tuple[list[Scorer], Features, Backbone]:
        backbone = loading.load_model(config, device, texts, skeleton=skeleton)
        if lora is not None:
            attach(backbone, lora)
        return loading.scorers(config, device), loading.features(config, device), backbone

    folder = agreed_folder(config.output_dir, "evaluate", accelerator, train=False)
    scorers, features, backbone = together(accelerator, load)
    assert features is not None
    by_name = dict(zip(config.reward, scorers, strict=True))
    evaluate(config, parts, by_name, features, backbone, lora is not None, folder, accelerator)
    if accelerator.is_main_process:
        write(config, parts, features.name, folder, taken_out)
    return 0


def read_parts(config: TrainConfig, preference: Path | None) -> list[Part]:
    """One part, or two as in the paper: the first reward on its own prompts, the others and diversity on `preference`.

    Raises:
        ConfigError: the prompts cannot be read or do not suit the rewards.
    """
    if preference is None:
        return [Part("base", loading.heldout_prompts(config, "prompts"), config.reward)]
    others = read_prompts(preference).first(config.eval_limit)
    loading.check_prompts(config.reward[1:], others, loading.reward_paths(config))
    task = config.model_copy(update={"reward": config.reward[:1]})
    return [
        Part("base-task", loading.heldout_prompts(task, "prompts"), config.reward[:1]),
        Part("base-preference", others, config.reward[1:]),
    ]


def evaluate(
    config: TrainConfig,
    parts: Sequence[Part],
    scorers: dict[str, Scorer],
    features: Features,
    backbone: Backbone,
    with_lora: bool,
    folder: Path,
    accelerator: Accelerator,
) -> None:
    """Fills in each part's evaluations: that of the base, and with `with_lora` that of the LoRA."""
    total = (2 if with_lora else 1) * sum(len(part.prompts.texts) for part in parts)
    with tqdm(total=total, unit="prompt", dynamic_ncols=True, disable=not accelerator.is_main_process) as bar:
        for part in parts:
            own = [scorers[name] for name in part.rewards]
            protocol = loading.evaluation_protocol(config, part.prompts, own, features)
            identity = loading.identity(config)
            held_out = HeldOut(backbone, protocol, folder / f"{part.name}.npz", identity, Processes(accelerator))
            if with_lora:
                backbone.transformer.disable_adapters()
            part.evaluations["base"] = held_out.base(bar.update)
            if with_lora:
                backbone.transformer.enable_adapters()
                part.evaluations["LoRA"] = held_out.measure(bar.update)


def _taken_out(lora: Path | None) -> tuple[str, ...]:
    """What the run of a LoRA took out of its reward wholly; nothing is known of a LoRA without its run's folder."""
    saved = lora / "config.yaml" if lora else None
    if saved is None or not saved.is_file():
        return ()
    settings = valid(str(saved), read_yaml(saved), ["neutral", "neutral_share"])
    return taken_out_wholly(settings.get("neutral", ()), settings.get("neutral_share", (1.0,)))


def by_task(part: Part) -> tuple[str, dict[str, Any]]:
    """GenEval's overall score, which is the mean over its tasks and not over pictures: a table, and the same for JSON.

    Empty unless the prompts are of several of its tasks, by the `tag` of their metadata, and have a score of `geneval`, or
    without one of a server or class, which may be another form of it.
    """
    texts, metadata = part.prompts.texts, part.prompts.metadata
    tags = [str(metadata.get(text, {}).get("tag", "")) for text in texts]
    sizes = Counter(tags)
    names = list(part.evaluations["base"].scores)
    scores = [name for name in names if name.split()[0] == "geneval"]
    scores = scores or [name for name in names if re.match(r"remote\b|\S+:", name)]
    if len(sizes) < 2 or not sizes.keys() <= set(TAGS) or not scores:
        return "", {}
    weights = np.array([1 / sizes[tag] for tag in tags])
    content: dict[str, Any] = {}
    rows = []
    for score in scores:
        means = {label: one.scores[score].mean(1) for label, one in part.evaluations.items()}
        found = {
            tag: {label: float(own[[t == tag for t in tags]].mean()) for label, own in means.items()} for tag in sizes
        }
        overall = {label: float(np.average(own, weights=weights)) for label, own in means.items()}
        change = ""
        content[score] = {"tasks": found, "mean of the tasks": overall}
        if "LoRA" in means:
            gain = paired_gain(means["base"], means["LoRA"], texts, weights=weights)
            change, content[score]["gain"] = gain.text("+.3f"), gain.finite()
        for tag, own in found.items():
            rows.append([score, tag, str(sizes[tag]), *(f"{value:.3f}" for value in own.values()), ""])
        values = [f"{value:.3f}" for value in overall.values()]
        what = "mean of the tasks" + (" (GenEval's overall score)" if score.split()[0] == "geneval" else "")
        rows.append([score, what, str(len(texts)), *values, change])
    return markdown_table(["", "task", "prompts", *part.evaluations, "change"], rows), content


def write(
    config: TrainConfig, parts: Sequence[Part], features: str, folder: Path, taken_out: Sequence[str] = ()
) -> None:
    """Writes table.md, table.json and the pictures, and prints the table.

    Args:
        taken_out: the statistics that the LoRA's run took out of its reward wholly.
    """
    models = {label: [part.evaluations[label] for part in parts] for label in parts[0].evaluations}
    intervals = report.Intervals.of(models)
    pictures = [folder / "samples.png", folder / "samples-preference.png"][: len(parts)]
    # Results contain no local paths.
    model = config.model if config.model == "demo" or is_hub_id(config.model) else "local"
    text = intervals.markdown()
    # As diversity, drift is measured on the last list of prompts. The limit is about the reward of the first.
    last = parts[-1].evaluations
    base, lora = last["base"], last.get("LoRA")
    moved = {} if lora is None else drift.drifts(base.statistics, lora.statistics, base.prompts)
    sections = [
        f"# {model}",
        about(config, parts, features),
        text,
        *([drift.section(moved, taken_out)] if moved else []),
    ]
    tasks, by_tag = by_task(parts[0])
    if tasks:
        sections.append(tasks)
    first = parts[0].evaluations["base"]
    trained = {label: own for label, own in parts[0].evaluations.items() if label != "base"}
    curve, table, costs = limit.front(first), "", {}
    if curve is not None:
        about_limit, table, costs = report.limit_section(curve, first, {name: [own] for name, own in trained.items()})
        sections += [about_limit, table, "![limit](pareto.png)"]
    sections += [f"![pictures]({path.name})" for path in pictures]
    settings: dict[str, Any] = {
        "model": model,
        "images": config.eval_images,
        "steps": config.eval_steps,
        "solver": config.eval_solver,
        "guidance": config.guidance,
        "seed": config.seed,
        "resolution": list(config.resolution),
        "rewards": list(config.reward),
        "prompts": len(parts[0].prompts.texts),
        "preference_prompts": len(parts[1].prompts.texts) if len(parts) > 1 else 0,
        "features": features,
    }
    content = {"settings": settings, **intervals.content(), "limit": costs}
    if tasks:
        content["geneval"] = by_tag
    if moved:
        content["drift"] = drift.content(moved)
    # If one of these fails, as on a full disk or into a closed pipe, the others still hold the figures.
    try:
        print("\n\n".join(filter(None, (text, tasks, table))))
        warning = drift.warning(moved, taken_out)
        if warning:
            print(warning, file=sys.stderr)
    finally:
        write_text(folder / "table.md", "\n\n".join(sections) + "\n")
        write_text(folder / "table.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    for part, path in zip(parts, pictures, strict=True):
        show(part, path)
    if curve is not None:
        limit.plot(folder / "pareto.png", curve, first, trained)
    print(f"table: {folder / 'table.md'}", file=sys.stderr)


def about(config: TrainConfig, parts: Sequence[Part], features: str) -> str:
    """A few sentences about how the figures were made."""
    others = f" and {counted(parts[1].prompts.texts)} for preference and diversity" if len(parts) > 1 else ""
    return (
        f"{counted(parts[0].prompts.texts)}{others} x {config.eval_images} images, {loading.sampling(config).about}, guidance "
        f"{config.guidance:g}, {config.resolution[0]}x{config.resolution[1]}, seed {config.seed}; the same noise for every "
        "model. The brackets hold 95% bootstrap intervals over prompts. Diversity of pictures is measured on "
        f"{features} features."
    )


def show(part: Part, path: Path) -> None:
    """Writes a part's pictures: base and LoRA side by side, or the base alone."""
    base = part.evaluations["base"]
    if "LoRA" in part.evaluations:
        report.side_by_side(base, part.evaluations["LoRA"], path)
    else:
        grid(list(base.images), [base.prompts[i] for i in base.shown], zoom(base.images[0])).save(path)
