"""`evaluate`: base model and LoRA in the columns of the paper's Table 1, with bootstrap intervals over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..settings.errors import ConfigError, one_line, quoted
from ..settings.presets import make_config, preset_names, valid
from ..settings.yaml_file import read_yaml
from .flags import add_settings, command_parser, exit_code, given, hush, path_flag, preset_layers, refuse_unknown

#: {flag of `evaluate`: the setting that it sets}. Settings that only training uses are left out.
EVALUATION = {
    "model": "model", "transformer": "transformer", "reward": "reward", "reward-models": "reward_models",
    "remote-hosts": "remote_hosts", "remote-timeout": "remote_timeout", "prompts": "eval_prompts", "limit": "eval_limit",
    "images": "eval_images", "steps": "eval_steps", "solver": "eval_solver", "features": "features", "guidance": "guidance",
    "resolution": "resolution", "max-sequence-length": "max_sequence_length", "text-cache": "text_cache", "seed": "seed",
    "output-dir": "output_dir", "max-batch": "max_batch", "split-guidance": "split_guidance",
    "decode-batch": "decode_batch", "device": "device", "dtype": "dtype", "quantize": "quantize",
    "attention": "attention", "offload-scorers": "offload_scorers", "threads": "threads",
}  # fmt: skip

#: Pictures per prompt by default. A run's config.yaml or a preset overrides it.
IMAGES = 10

#: Rewards measured in addition to a run's own, as in the paper's tables, unless the model is the demo's.
PREFERENCE = ("hpsv2", "imagereward", "pickscore")


def command(arguments: Sequence[str]) -> int:
    """Runs the command. Returns the exit code."""
    parser = command_parser(
        "evaluate",
        "Evaluates the base model and a LoRA on held-out prompts with the same noise. Writes scores and diversity in the "
        "columns of the paper's Table 1, with 95% bootstrap intervals over prompts, as Markdown and JSON, and pictures.",
        "Settings that are not given come from the run's config.yaml, or without one from the reward's preset "
        f"({', '.join(preset_names())}).",
    )
    parser.add_argument(
        "lora",
        nargs="?",
        type=path_flag,
        help="a run's folder or a LoRA file; without it, only the base model is evaluated",
    )
    parser.add_argument(
        "--preference-prompts",
        type=path_flag,
        metavar="FILE",
        help="prompts for diversity and for all rewards except the first (the paper uses DrawBench)",
    )
    add_settings(parser, EVALUATION)
    namespace, unknown = parser.parse_known_args(arguments)
    refuse_unknown(unknown, [f"--{name}" for name in (*EVALUATION, "preference-prompts")])
    flags = given(namespace, EVALUATION.values())
    try:
        config = make_config([*_layers(namespace.lora, flags), ("flags", flags)])
    except ConfigError as error:
        raise ConfigError(_by_flag(str(error))) from None
    if namespace.preference_prompts and len(config.reward) < 2:
        raise ConfigError("--preference-prompts is for the rewards after the first: give two rewards or more")
    hush()
    from . import evaluation

    return exit_code(lambda: evaluation.run(config, namespace.lora, namespace.preference_prompts))


def _by_flag(message: str) -> str:
    """A message about a flag under the flag's name here, which may differ from its setting's."""
    setting = message.removeprefix("flags: ").split(" ")[0]
    flag = next((flag for flag, name in EVALUATION.items() if name == setting), None)
    return message.replace(f"flags: {setting} ", f"--{flag} ", 1) if flag else message


def _layers(lora: Path | None, flags: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Layers of settings that the flags override, weakest first: defaults, then the run's or the reward preset's."""
    defaults = ("defaults", {"eval_images": IMAGES})
    saved = lora / "config.yaml" if lora else None
    if saved is None or not saved.is_file():
        measured = {} if flags.get("model", "demo") == "demo" else {"reward": list(PREFERENCE)}
        return [defaults, *preset_layers(measured | flags), ("measures", measured)]
    # The evaluation gets an output folder of its own; the run's folder keeps only the run's files. Where this machine keeps
    # text features, and where it sends pictures, is not a stranger's choice.
    settings = valid(str(saved), read_yaml(saved), set(EVALUATION.values()) - {"output_dir", "text_cache"})
    _refuse_foreign(saved, settings, flags)
    kept = {key: value for key, value in settings.items() if key != "remote_hosts"}
    if "reward" not in flags and kept.get("model", "demo") != "demo":
        # The first one is what the run was trained for: the limit is about it.
        own = kept.get("reward", ())
        kept["reward"] = (*own, *(name for name in PREFERENCE if name not in own))
    # Training may have used scorers that are not evaluated.
    names = flags.get("reward", kept.get("reward", ()))
    models = [entry for entry in kept.get("reward_models", ()) if entry.partition("=")[0] in names]
    kept["reward_models"] = models
    return [defaults, (str(saved), kept)]


def _refuse_foreign(saved: Path, settings: dict[str, Any], flags: dict[str, Any]) -> None:
    """Raises ConfigError if a run's settings would have code of its own run, or send pictures and prompts to other machines.

    A run's folder may come from somebody else, to be judged. What it may make this machine do must be asked for by flags.
    """
    rewards = flags.get("reward", settings.get("reward", ()))
    code = [name for name in rewards if isinstance(name, str) and ":" in name]
    if code and "reward" not in flags:
        words = " ".join(map(str, rewards))
        raise ConfigError(
            f"{saved} has the reward {quoted(code[0])}, which is code: if you trust it, give --reward {words}"
        )
    hosts = settings.get("remote_hosts", ())
    named = any(isinstance(name, str) and name.partition("-")[0] == "remote" for name in rewards)
    if hosts and named and "remote_hosts" not in flags:
        words = one_line(" ".join(map(str, hosts)), 80)
        raise ConfigError(f"{saved} sends pictures to other machines: if you trust them, give --remote-hosts {words}")
