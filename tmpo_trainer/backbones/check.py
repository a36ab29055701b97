"""Checks that need only a pipeline folder's configs and file headers: they take seconds, while loading takes minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..settings.errors import ConfigError, one_line
from .base import Backbone


def _class_name(entry: Any) -> str | None:
    """The class of a part in model_index.json, which has [library, class], or [null, null] for a missing part."""
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def skeleton(model: str, folder: Path, kind: type[Backbone], dtype: torch.dtype, max_sequence_length: int) -> Backbone:
    """The model's skeleton, after every check that its configs allow.

    Args:
        model: as the user named it, for messages.

    Raises:
        ConfigError: a part is missing, of another kind, or does not fit the others.
    """
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text())
    expected = {"transformer": kind.transformer_class, "vae": kind.vae_class, "scheduler": kind.scheduler_class}
    for name, wanted in expected.items():
        found = _class_name(index.get(name))
        if found != wanted.__name__:
            raise ConfigError(
                f"model {model} names {found} as its {name}: {kind.pipeline_class.__name__} needs {wanted.__name__}"
            )
    for name, value in index.items():
        if _class_name(value) is None or (folder / name).is_dir():
            continue
        if name not in kind.optional_parts:
            raise ConfigError(f"model {model} has no folder {name}/, which its model_index.json names: copy it there")
    try:
        built = kind.skeleton(folder, dtype, max_sequence_length)
        built.blank_conditioning(folder)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ConfigError(f"model {model} cannot be loaded: {one_line(error)}") from None
    built.check_vae(model)
    return built


def check_weights(model: str, folder: Path, without: tuple[str, ...] = ()) -> None:
    """Opens every weight file's header. Raises ConfigError for a file that is missing or cut short.

    Args:
        without: folders that will not be read.
    """
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text())
    for name, value in index.items():
        part = folder / name
        if name in without or _class_name(value) is None or not (part / "config.json").is_file():
            continue
        files = set(part.glob("*.safetensors"))
        for shards in part.glob("*.safetensors.index.json"):
            try:
                files |= {part / shard for shard in json.loads(shards.read_text())["weight_map"].values()}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ConfigError(f"model {model}: {shards} is damaged: download it again") from None
        if not files and not list(part.glob("*.bin")):
            raise ConfigError(f"model {model} has no weights in {name}/: the download is not complete")
        for file in sorted(files):
            check_file(file, f"model {model}: ")


def check_file(file: Path, where: str = "") -> None:
    """Raises ConfigError if a safetensors file is missing, cut short or something else."""
    if not file.is_file():
        raise ConfigError(f"{where}{file} is missing: the download is not complete")
    try:
        with safe_open(file, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        reason = one_line(error)
        raise ConfigError(f"{where}{file} is damaged or cut short ({reason}): download it again") from None


def check_transformer(file: Path, skeleton: Backbone, nf4: bool) -> None:
    """Raises ConfigError for a single-file transformer whose names show that it would load wrongly."""
    where = f"--transformer {file}"
    check_file(file, "--transformer ")
    if nf4:
        # diffusers loads a single file in four bits only if it was saved so.
        kind = type(skeleton.transformer).__name__
        raise ConfigError(
            f"{where} cannot be quantised while it is loaded: save {kind}.from_single_file(...).save_pretrained(DIR) once with "
            "diffusers, put DIR in the place of the model's transformer/, and leave out --transformer"
        )
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
    if any("scale_weight" in name or "scaled_fp8" in name or name.endswith("weight_scale") for name in names):
        raise ConfigError(
            f"{where} has scaled 8-bit weights, which would be read without their scales: take the bf16 file"
        )
    skeleton.check_single_file(where, names)
