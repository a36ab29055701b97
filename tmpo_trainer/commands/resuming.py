"""What `--resume` may change: the settings that must stay, and log lines about all others and about changed prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..backbones import is_hub_id
from ..prompts.lists import PromptList
from ..settings.config import TrainConfig, absolute
from ..settings.errors import ConfigError, one_line
from ..settings.presets import make_config
from ..settings.yaml_file import read_yaml

#: A checkpoint depends on these, beside the method: rank and targets give its tensors their names and shapes, alpha is a factor
#: that its weights were trained with, and the seed decides which prompts come next. Other settings may change in a run.
FIXED = ("seed", "lora_rank", "lora_targets", "lora_alpha")


def check_same(name: str, before: object, now: object) -> None:
    """Raises ConfigError if a setting differs that must not."""
    if before != now:
        raise ConfigError(
            f"--resume continues with {name} {_shown(before)}: for {_shown(now)}, start a new run with --init-lora"
        )


def check(before: TrainConfig, now: TrainConfig) -> None:
    """Raises ConfigError if a checkpoint of the settings `before` means nothing with those of `now`."""
    before, now = absolute(before), absolute(now)
    for name in FIXED:
        check_same(name, getattr(before, name), getattr(now, name))
    # A path may change, because the same model may have been moved; its layers are compared when it is loaded.
    if _is_name(before.model) and _is_name(now.model):
        check_same("model", before.model, now.model)
    if before.transformer is None or now.transformer is None:
        check_same("transformer", before.transformer, now.transformer)
    # It has no effect on a resumed run. None is for a file that is no longer there.
    if now.init_lora not in (before.init_lora, None):
        raise ConfigError("--resume continues with the checkpoint's weights: leave out --init-lora, or start a new run")


def changes(before: TrainConfig, now: TrainConfig) -> list[str]:
    """The settings that differ, each as `kernel cps -> flow_sde`. The output folder may have been moved and is left out."""
    old, new = dict(absolute(before)), dict(absolute(now))
    differing = [name for name in new if new[name] != old[name] and name != "output_dir"]
    return [f"{name} {_shown(old[name])} -> {_shown(new[name])}" for name in differing]


def digest(prompts: PromptList) -> str:
    """A hash of prompts and metadata, the same for the same list in another file or format."""
    return hashlib.sha256(json.dumps([prompts.texts, prompts.metadata], sort_keys=True).encode()).hexdigest()


def notices(run: Path, now: TrainConfig, prompts: Mapping[str, str]) -> list[str]:
    """Log lines about what has changed since a run was last started.

    Args:
        run: its folder, with config.yaml and env.json as they were written then. prompts: digests as in env.json, whose
            files of earlier versions have none.
    """
    saved = run / "config.yaml"
    different = changes(make_config([(str(saved), read_yaml(saved))]), now)
    lines = [f"settings that differ from the run's config.yaml: {', '.join(different)}"] if different else []
    known = _recorded(run / "env.json")
    kinds = [kind for kind in prompts if known.get(kind, prompts[kind]) != prompts[kind]]
    if kinds:
        lines.append(f"the {' and '.join(kinds)} prompts are not those that the run was started with")
    if not known:
        lines += _other_meaning(now)
    return lines


def _other_meaning(now: TrainConfig) -> list[str]:
    """Log lines about settings that mean something else than in earlier versions, whose env.json has no digests."""
    lines = []
    if len(now.reward) > 1 and now.reward_weights is None:
        ones = " ".join("1" for _ in now.reward)
        lines.append(f"several rewards are averaged now: --reward-weights {ones} gives the sum of earlier versions")
    if now.method == "mix-grpo":
        lines.append("the window of mix-grpo starts again at the first step now, after its last place")
    return lines


def _recorded(environment: Path) -> Mapping[str, Any]:
    """The digests of an env.json; none if the file is missing or was damaged, because no run depends on it."""
    try:
        return dict(json.loads(environment.read_text(encoding="utf-8"))["prompts"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_name(model: str) -> bool:
    return model == "demo" or is_hub_id(model)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return one_line(" ".join(map(str, value))) or "none"
    return "none" if value is None else one_line(value)
