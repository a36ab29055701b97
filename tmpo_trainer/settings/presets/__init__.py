"""Presets and layers of settings: from YAML files and flags to one validated configuration.

Precedence: flags > `--config run.yaml` > `--preset NAME` > defaults. The settings that come with a method (`methods/*.yaml`)
override presets and files that were written for another method. Flags, YAML and presets go through the same validation;
an unknown key or a value of the wrong kind is an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from .. import discovery
from ..config import TrainConfig, absolute, to_yaml
from ..errors import ConfigError, one_line, quoted, suggest
from ..yaml_file import read_yaml

PRESETS = Path(__file__).parent


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def method_preset(name: str, demo: bool) -> dict[str, Any]:
    """What a method has over its protocol, or over that of the demo model; often nothing. A variant gets its method's, then
    its own. Where a method has a file, `base.yaml` or `demo-base.yaml` lies below it."""
    kept = {path.stem: path for path in (PRESETS / "methods").glob("*.yaml")}
    prefix = "demo-" if demo else ""
    own = [f"{prefix}{known}" for known in dict.fromkeys((method_file(name), name)) if f"{prefix}{known}" in kept]
    found: dict[str, Any] = {}
    for stem in [f"{prefix}base", *own] if own else []:
        found |= read_yaml(kept[stem])
    return found | {"method": name} if own else {}


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset. Raises ConfigError that lists the presets."""
    names = preset_names()
    if name not in names:
        raise ConfigError(f"unknown preset {one_line(name, 80)}{suggest(name, names)} (presets: {', '.join(names)})")
    return read_yaml(PRESETS / f"{name}.yaml")


def method_names() -> list[str]:
    """All names that `--method` takes: a file in `methods/` each, and their variants."""
    return [name for file in discovery.names("methods") for name in (file, *_settings(file).variants)]


def method_file(method: str) -> str:
    """The file, as `discovery` names it, of a method or of one of its variants. Raises ConfigError with a suggestion."""
    files = discovery.names("methods")
    if method in files:
        return method
    # A variant's name begins with its method's. A file is imported only if it may be meant.
    for file in files:
        if method.startswith(f"{file}-") and method in _settings(file).variants:
            return file
    names = method_names()
    raise ConfigError(f"method {quoted(method)} is not known{suggest(method, names)} (methods: {', '.join(names)})")


def _settings(file: str) -> type[TrainConfig]:
    return discovery.load("methods", file).Settings


def grouped_settings() -> dict[str, dict[str, FieldInfo]]:
    """Every setting of every method, by the first line about the class that defines it: the common ones first."""
    groups: dict[str, dict[str, FieldInfo]] = {}
    seen: set[str] = set()
    for kind in (TrainConfig, *(_settings(file) for file in discovery.names("methods"))):
        for owner in reversed(kind.__mro__):
            if not issubclass(owner, TrainConfig):
                continue
            own = {n: f for n, f in owner.model_fields.items() if n in owner.__annotations__ and n not in seen}
            if own:
                # Two files may describe theirs in the same words.
                groups.setdefault((owner.__doc__ or owner.__module__).splitlines()[0], {}).update(own)
                seen |= own.keys()
    return groups


def all_settings() -> dict[str, FieldInfo]:
    """Every setting of every method by name. Each is a flag and a key in YAML."""
    return {name: field for group in grouped_settings().values() for name, field in group.items()}


def make_config(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> TrainConfig:
    """Merges layers (name, settings), later ones win, and validates. Raises ConfigError that names the layer to blame."""
    merged: dict[str, Any] = {}
    blame, named = "defaults", ("", {})
    for where, settings in layers:
        merged.update(settings)
        blame = where if settings else blame
        named = (where, settings) if "method" in settings else named
        try:
            made = _validated(merged, where)
            if where == "flags":
                _check_fixed(where, settings, made)
        except ValidationError as error:
            # A combination may become valid with a later layer; a bad key or value of this one never does.
            if error.errors()[0]["loc"]:
                raise ConfigError(_one_line(error, where)) from None
        except _OtherMethods:
            # Likewise.
            continue
    try:
        made = _validated(merged, blame)
        # The layer that names the method. Others, such as a preset's, may be meant for another method. Earlier versions wrote
        # the defaults of what a variant fixes.
        where, settings = named
        defaults = {name: field.default for name, field in type(made).model_fields.items()}
        _check_fixed(where, {k: merged[k] for k in settings if k in defaults and merged[k] != defaults[k]}, made)
        return made
    except ValidationError as error:
        raise ConfigError(_one_line(error, blame)) from None
    except _OtherMethods as error:
        raise ConfigError(f"{blame}: {error}") from None


def current(where: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from a file that an earlier version may have written, with all keys of this one and absolute paths.

    Raises:
        ConfigError: they are not valid.
    """
    return yaml.safe_load(to_yaml(absolute(make_config([(where, settings)]))))


def valid(where: str, settings: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Those of the named settings that a file has, each checked by itself, as in a configuration.

    Raises:
        ConfigError: a value is not valid; the line names the file and the key.
    """
    known, found = all_settings(), {}
    for key in keys:
        if key in settings:
            try:
                found[key] = TypeAdapter(known[key].rebuild_annotation()).validate_python(settings[key])
            except ValidationError as error:
                raise ConfigError(_one_line(error, where, key)) from None
    return found


def _check_fixed(where: str, settings: Mapping[str, Any], made: TrainConfig) -> None:
    """Raises ConfigError for a setting that asks for another value than the one that the method's name fixes."""
    for key in made.variants.get(made.method, {}).keys() & settings.keys():
        given = TypeAdapter(type(made).model_fields[key].rebuild_annotation()).validate_python(settings[key])
        if given != getattr(made, key):
            fixed = getattr(made, key)
            raise ConfigError(
                f"{where}: {key} {one_line(settings[key], 80)} with method {made.method}, which fixes it at {fixed}: give "
                f"method {method_file(made.method)} and the settings you want"
            )


class _OtherMethods(ValueError):
    """A setting is given that belongs to another method alone."""


def _validated(settings: Mapping[str, Any], where: str) -> TrainConfig:
    """The settings as the class of their method; those of other methods are checked and left out.

    Raises:
        ValidationError, _OtherMethods: values that do not go together. ConfigError: a key or method that is not known.
    """
    method = settings.get("method", "tmpo")
    kind = _settings(method_file(method)) if isinstance(method, str) else TrainConfig
    known = all_settings()
    for key in settings:
        if key not in known:
            hint = suggest(str(key), known) or " (--help lists them)"
            raise ConfigError(f"{where}: unknown key {one_line(key, 80)}{hint}")
    own = {key: value for key, value in settings.items() if key in kind.model_fields}
    made = kind.model_validate(own | kind.variants.get(str(method), {}))
    for key in settings.keys() - own.keys():
        _check_foreign(key, known[key], settings[key], where, str(method))
    return made


def _check_foreign(key: str, field: FieldInfo, value: Any, where: str, method: str) -> None:
    """Raises ConfigError for a value of another method's setting that would not be valid there, _OtherMethods for an
    exclusive one."""
    try:
        given = TypeAdapter(field.rebuild_annotation()).validate_python(value)
    except ValidationError as error:
        raise ConfigError(_one_line(error, where, key)) from None
    for file in discovery.names("methods"):
        if key in _settings(file).exclusive and given != field.default:
            words = one_line(" ".join(map(str, given)) if isinstance(given, tuple) else given, 80)
            raise _OtherMethods(
                f"{key} {words} belongs to method {file}, not to {method}: leave it at its default, or give --method {file}"
            )


def _one_line(error: ValidationError, where: str, key: str = "") -> str:
    """pydantic's first complaint as one line that names the key, the value and the fix."""
    first = error.errors()[0]
    message = one_line(first["msg"].removeprefix("Value error, "))
    key = key or ".".join(str(part) for part in first["loc"][:1])
    if not key:
        return f"{where}: {message}"
    return f"{where}: {key} {quoted(first['input'])}: {message[0].lower()}{message[1:]}"
