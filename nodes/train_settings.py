"""What the Train node may ask of the trainer.

A workflow comes from anywhere, so it only chooses among what this machine's owner has: models in ComfyUI's folders and in the
owner's own file, rewards by name, numbers and choices of an allow list. It cannot name files, hosts, programs or commands.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths
import yaml

from ..tmpo_trainer.settings import discovery
from ..tmpo_trainer.settings.errors import one_line, suggest
from .inputs import one_of

PRESETS = Path(__file__).parents[1] / "tmpo_trainer" / "settings" / "presets"
#: The choices that leave a setting as the preset has it.
AS_PRESET, NO_LORA, NO_LAYER, OWN = "(preset)", "(none)", "(none)", "(model's own)"
#: Settings that a workflow may give as text. None of them names a file, a host, a program or a package.
MORE = (
    "reward_weights", "pickscore_scale", "reward_norm", "prompts_per_update", "prompts_per_batch", "rollout_steps",
    "solver", "leaf_steps", "reuse_forward", "branching", "branch_early", "branch_late", "kappa", "schedule", "tree",
    "balance", "kernel", "eta", "guidance", "resolution", "max_sequence_length", "max_batch", "replay_batch",
    "gradient_checkpointing", "split_guidance", "decode_batch", "logp_reduce", "inner_updates", "beta_start", "beta_end",
    "beta_warmup", "baseline", "anchor", "anchor_weight", "clip", "kl_weight", "window", "window_every", "lr_min_ratio",
    "weight_decay", "adam_betas", "max_grad_norm", "ema_decay", "ema_every", "lora_targets", "lora_alpha", "eval_images",
    "eval_limit", "eval_steps", "eval_solver", "eval_every", "sample_every", "checkpoint_every", "checkpoints_kept",
    "report", "dtype", "quantize", "attention", "offload_scorers", "compile", "threads", "neutral", "neutral_share",
    "diversity_weight", "diversity", "data_weight", "data_images", "draws", "noise_shift", "noise_weight",
    "level_importance", "leaf_importance", "negative_limit", "reference_share", "rollout", "strength", "reward_range",
    "adaptive_weight", "old_decay_rise", "old_decay_max", "tilt_weight",
)  # fmt: skip
#: A word of a value: a number, a choice, true or false.
WORD = re.compile(r"[A-Za-z0-9_.+-]{1,40}")


def presets() -> tuple[list[str], list[str]]:
    """The names of the presets that set a reward, and of those that are laid over one of them."""
    protocols, layers = [], []
    for file in sorted(PRESETS.glob("*.yaml")):
        (protocols if "reward" in _preset(file.stem) else layers).append(file.stem)
    return protocols, layers


def _preset(name: str) -> dict[str, Any]:
    return yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))


def owner_file() -> Path:
    """The file in which the owner of this machine names models and reward servers: TMPO_COMFYUI_SETTINGS, by default
    ~/.config/tmpo_trainer/comfyui.yaml."""
    given = os.environ.get("TMPO_COMFYUI_SETTINGS")
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(given).expanduser() if given else home / "tmpo_trainer" / "comfyui.yaml"


def owned() -> dict[str, Any]:
    """The owner's file: `models` {name: folder or hub id}, `reward_models` {reward: path or address}, `remote_hosts` [host].
    Each is empty if the file lacks it.

    Raises:
        ValueError: it is not such a file.
    """
    found: dict[str, Any] = {"models": {}, "reward_models": {}, "remote_hosts": []}
    file = owner_file()
    if not file.is_file():
        return found
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as YAML: {one_line(error)}") from None
    for key, value in loaded.items() if isinstance(loaded, dict) else [(one_line(loaded), None)]:
        if key in found and value is None:
            # A header with nothing below it.
            continue
        texts = value.items() if isinstance(value, dict) else value if isinstance(value, list) else [0]
        if key not in found or type(value) is not type(found[key]) or not all(_texts(each) for each in texts):
            raise ValueError(
                f"{file}: {one_line(key)} must be one of models and reward_models, each with lines of name: place, and "
                "remote_hosts, a list of hosts"
            )
        found[key] = value
    return found


def _texts(value: Any) -> bool:
    return all(isinstance(each, str) for each in (value if isinstance(value, tuple) else (value,)))


def choices() -> dict[str, list[str]]:
    """The options of the node's inputs that have a list. Without the owner's models if that file is wrong: ComfyUI drops nodes
    that cannot say their inputs, and this one says what is wrong when it is run."""
    protocols, layers = presets()
    try:
        named = owned()["models"]
    except ValueError as error:
        logging.warning("Train TMPO LoRA: %s", error)
        named = {}
    return {
        "preset": protocols,
        "layer": [NO_LAYER, *layers],
        "model": [AS_PRESET, *models(named)],
        "transformer": [OWN, *folder_paths.get_filename_list("diffusion_models")],
        "method": [AS_PRESET, *discovery.names("methods")],
        "init_lora": [NO_LORA, *folder_paths.get_filename_list("loras")],
    }


def _auxiliary(inputs: Mapping[str, Any]) -> list[str]:
    """The scorers that a method needs beside the rewards."""
    model = inputs["model"] if inputs["model"] != AS_PRESET else _preset(inputs["preset"])["model"]
    file = PRESETS / "methods" / f"{'demo-' if model == 'demo' else ''}{inputs['method']}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")).get("auxiliary", []) if file.is_file() else []


def models(named: Mapping[str, str]) -> dict[str, str]:
    """The models that can be trained, by the name that the node shows: the bundled one, pipeline folders in ComfyUI's
    models/diffusers, and those that the owner has named."""
    found = {"demo": "demo"}
    for folder in folder_paths.get_folder_paths("diffusers"):
        for index in sorted(Path(folder).glob("*/model_index.json")):
            found.setdefault(index.parent.name, str(index.parent))
    return found | dict(named)


def rewards_of(text: str, known: list[str]) -> list[str]:
    """The rewards that a text names, separated by commas or spaces. Raises ValueError for one that is not known."""
    names = text.replace(",", " ").split()
    for name in names:
        if name not in known:
            more = " (a remote reward's server is named in the file of this machine's owner, see the node's help)"
            raise ValueError(
                f"reward: {one_line(name, 40)} is not known{suggest(name, known)}: choose among {', '.join(known)}"
                f"{more if name == 'remote' else ''}"
            )
    return names


def more_settings(text: str) -> dict[str, Any]:
    """The settings of a text with a line `name: value` each. Raises ValueError for a name that is not in `MORE`, or a value
    other than plain words."""
    found: dict[str, Any] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, colon, value = (part.strip() for part in line.partition(":"))
        name = name.replace("-", "_")
        if not colon or name not in MORE:
            raise ValueError(
                f"settings: {one_line(line, 60)} is not a line `name: value` with a name that workflows may set"
                f"{suggest(name, MORE)} (the node's help lists them)"
            )
        words = value.strip("[]").replace(",", " ").split()
        if not words or not all(WORD.fullmatch(word) for word in words):
            raise ValueError(
                f"settings: {name} is {one_line(value, 60)!r}: write numbers or words, separated by spaces"
            )
        values = [yaml.safe_load(word) for word in words]
        found[name] = values if len(values) > 1 or "[" in value else values[0]
    return found


def asked(inputs: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """What the node's inputs ask for.

    Returns:
        the settings, the presets below them, and the prompt files {name: text} that must be written into `folder`.

    Raises:
        ValueError: an input that cannot be used; it names the input.
    """
    mine = owned()
    for name, options in choices().items():
        one_of(inputs[name], options, name)
    names = [inputs["preset"]] + ([inputs["layer"]] if inputs["layer"] != NO_LAYER else [])
    known = [name for name in discovery.names("rewards") if name != "remote" or name in mine["reward_models"]]
    rewards = rewards_of(inputs["reward"], known)
    settings = more_settings(inputs["settings"])
    if rewards:
        settings["reward"] = rewards
    settings["seed"] = inputs["seed"]
    settings |= {name: inputs[name] for name in ("updates", "learning_rate", "lora_rank") if inputs[name]}
    if inputs["method"] != AS_PRESET:
        settings["method"] = inputs["method"]
    if inputs["model"] != AS_PRESET:
        settings["model"] = models(mine["models"])[inputs["model"]]
    if inputs["transformer"] != OWN:
        settings["transformer"] = folder_paths.get_full_path_or_raise("diffusion_models", inputs["transformer"])
    if inputs["init_lora"] != NO_LORA:
        settings["init_lora"] = folder_paths.get_full_path_or_raise("loras", inputs["init_lora"])
    used = [*(rewards or _preset(inputs["preset"])["reward"]), *_auxiliary(inputs)]
    places = [f"{name}={place}" for name, place in mine["reward_models"].items() if name in used]
    if places:
        settings["reward_models"] = places
    if "remote" in used:
        settings["remote_hosts"] = mine["remote_hosts"]
    files: dict[str, str] = {}
    for name in ("prompts", "eval_prompts"):
        lines = [line.strip() for line in inputs[name].splitlines() if line.strip()]
        if lines:
            files[f"{name}.txt"] = "\n".join(lines) + "\n"
            settings[name] = str(folder / f"{name}.txt")
    return settings, names, files
