"""`evaluate`: base model and LoRA in the columns of the paper's Table 1, with bootstrap intervals over prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..settings.config import TrainConfig
from ..settings.errors import ConfigError
from ..settings.presets import make_config, preset_names, read_yaml
from .flags import add_settings, command_parser, exit_code, given, hush, preset_layers, refuse_unknown

#: Flags of `evaluate` and the settings they are. What only training knows is none of them.
EVALUATION = {
    "model": "model", "transformer": "transformer", "reward": "reward", "reward-models": "reward_models",
    "remote-hosts": "remote_hosts", "remote-timeout": "remote_timeout", "prompts": "eval_prompts", "limit": "eval_limit",
    "images": "eval_images", "steps": "eval_steps", "features": "features", "guidance": "guidance",
    "resolution": "resolution", "max-sequence-length": "max_sequence_length", "text-cache": "text_cache", "seed": "seed",
    "output-dir": "output_dir", "max-batch": "max_batch", "split-guidance": "split_guidance",
    "decode-batch": "decode_batch", "device": "device", "dtype": "dtype", "quantize": "quantize",
    "offload-scorers": "offload_scorers", "threads": "threads",
}  # fmt: skip

#: Pictures per prompt where neither a run nor a preset says more.
IMAGES = 10

#: Measured beside a run's own rewards, as in the paper's tables, unless the model is the demo's.
PREFERENCE = ("hpsv2", "imagereward", "pickscore")


def command(arguments: Sequence[str]) -> int:
    """Runs the command. Returns the exit code."""
    parser = command_parser(
        "evaluate",
        "Base model and LoRA on held-out prompts, the same noise for both: scores and diversity in the columns of the "
        "paper's Table 1, with 95% bootstrap intervals over prompts; markdown, json and pictures.",
        f"Settings not given come from the run's config.yaml, else from the reward's preset ({', '.join(preset_names())}).",
    )
    parser.add_argument("lora", nargs="?", type=Path, help="a run's folder or a LoRA file; without, the base alone")
    parser.add_argument(
        "--preference-prompts",
        type=Path,
        metavar="FILE",
        help="other prompts for all rewards but the first and for diversity (the paper: DrawBench)",
    )
    add_settings(parser, EVALUATION)
    namespace, unknown = parser.parse_known_args(arguments)
    refuse_unknown(unknown, [f"--{name}" for name in (*EVALUATION, "preference-prompts")])
    flags = given(namespace, EVALUATION.values())
    saved = namespace.lora / "config.yaml" if namespace.lora else None
    layers: list[tuple[str, dict[str, Any]]] = [("defaults", {"eval_images": IMAGES})]
    if saved is not None and saved.is_file():
        settings = read_yaml(saved)
        # Where it was trained is not where it is evaluated, and a run's folder keeps its own files.
        kept = {key: value for key, value in settings.items() if key in EVALUATION.values() and key != "output_dir"}
        if "reward" not in flags and kept.get("model", "demo") != "demo":
            own = [name for name in kept.get("reward", ()) if name not in PREFERENCE]
            kept["reward"] = [*own, *PREFERENCE]
        layers.append((str(saved), kept))
    else:
        measured = {} if flags.get("model", "demo") == "demo" else {"reward": list(PREFERENCE)}
        layers += [*preset_layers(measured | flags), ("measures", measured)]
    config = make_config([*layers, ("flags", flags)])
    if namespace.preference_prompts and len(config.reward) < 2:
        raise ConfigError("--preference-prompts is for the rewards after the first: give two or more")
    hush()
    return exit_code(lambda: run(config, namespace.lora, namespace.preference_prompts))


def run(config: TrainConfig, file: Path | None, preference: Path | None) -> int:
    """Evaluates the base model and, if a file is given, the LoRA in it; writes table.md, table.json and pictures.

    Args:
        config: what to evaluate: model, held-out prompts, scorers (`reward`), images, steps, guidance, features.
        preference: prompts for all but the first score and for diversity, as in the paper; by default the same prompts.

    Raises:
        ConfigError: before anything is drawn.
    """
    import torch
    from accelerate import Accelerator
    from tqdm import tqdm

    from ..backbones import is_hub_id
    from ..evaluation import held_out, report
    from ..files import write_text
    from ..lora.attach import attach, check_lora
    from ..pictures.grids import grid, zoom
    from ..processes import together
    from ..prompts.lists import PromptList, read_prompts
    from ..training.run_folder import agreed_folder
    from . import loading

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

    def load() -> tuple[list[Any], Any, Any]:
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
    models: dict[str, list[held_out.Evaluation]] = {"base": []}
    if file is not None:
        models["LoRA"] = []
    total = len(models) * sum(len(prompts.texts) for _, prompts, _ in parts)
    with tqdm(total=total, unit="prompt", dynamic_ncols=True, disable=not accelerator.is_main_process) as bar:
        for name, prompts, some in parts:
            held = held_out.HeldOut(
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
    text, content = report.rows(models)
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
            report.side_by_side(base, models["LoRA"][i], path)
        else:
            labels = [prompts.texts[j] for j in base.shown]
            grid(list(base.images), labels, zoom(base.images[0])).save(path)
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
