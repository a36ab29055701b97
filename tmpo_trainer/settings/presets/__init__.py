"""Presets and layers of settings: YAML files to one validated configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..config import TrainConfig
from ..errors import ConfigError, suggest

PRESETS = Path(__file__).parent


def one_line(error: ValidationError, where: str) -> str:
    """The first complaint of pydantic as one line that names the key, the value and the mend."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"][:1]) or "settings"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key {key}{suggest(key, TrainConfig.model_fields) or ' (--help lists them)'}"
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return f"{where}: {message}"
    return f"{where}: {key} {first['input']!r}: {message[0].lower()}{message[1:]}"


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping of settings from a YAML file. Raises ConfigError that names the file."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} is not a mapping of settings, e.g. 'learning_rate: 3e-5'")
    return loaded


def method_preset(name: str, demo: bool) -> dict[str, Any]:
    """What a method has over its protocol, or over that of the demo model; often nothing."""
    path = PRESETS / "methods" / f"{'demo-' if demo else ''}{name}.yaml"
    return read_yaml(path) if path.is_file() else {}


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset. Raises ConfigError that lists the presets."""
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        names = preset_names()
        raise ConfigError(f"unknown preset {name}{suggest(name, names)} (presets: {', '.join(names)})")
    return read_yaml(path)


def make_config(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> TrainConfig:
    """Merges layers (name, settings), later ones win, and validates. Raises ConfigError naming the layer to blame."""
    merged: dict[str, Any] = {}
    blame = "defaults"
    for where, settings in layers:
        merged.update(settings)
        blame = where if settings else blame
        try:
            TrainConfig.model_validate(merged)
        except ValidationError as error:
            # A combination may become valid with a later layer; a bad key or value of this one never does.
            if error.errors()[0]["loc"]:
                raise ConfigError(one_line(error, where)) from None
    try:
        return TrainConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(one_line(error, blame)) from None
