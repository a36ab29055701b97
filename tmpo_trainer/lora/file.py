"""Reads LoRA files: their contents, their training metadata, their soundness. It needs only torch and safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..settings.errors import ConfigError, one_line

FILE_NAME = "pytorch_lora_weights.safetensors"

#: Endings of the two halves: lora_A and lora_B in diffusers and peft, lora_down and lora_up elsewhere.
DOWN, UP = (".lora_A.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_up.weight")


@dataclass(frozen=True)
class LoraFile:
    """The contents of a LoRA file.

    layers: {module: (down `[r, in]`, up `[out, r]`)}. alphas: {module: alpha}, where the file has that key: the
    strength is then alpha / r. loose: keys that belong to no pair. metadata: of the safetensors header.
    """

    layers: dict[str, tuple[Tensor, Tensor]]
    alphas: dict[str, float]
    loose: list[str]
    metadata: dict[str, str]

    @property
    def ranks(self) -> list[int]:
        return sorted({len(down) for down, _ in self.layers.values()})

    @property
    def scale(self) -> float:
        """The factor of up @ down that diffusers reads from the file's metadata; 1 without one."""
        try:
            adapter = json.loads(self.metadata.get("lora_adapter_metadata", "{}"))
            alpha, rank = adapter.get("transformer.lora_alpha"), adapter.get("transformer.r")
            return alpha / rank if alpha and rank else 1.0
        except (ValueError, AttributeError, TypeError):
            return 1.0


def split(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> LoraFile:
    """Pairs up the keys of a LoRA's state."""
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    loose: list[str] = []
    for key, value in state.items():
        for ending in (*DOWN, *UP, ".alpha"):
            if key.endswith(ending):
                module = key.removesuffix(ending)
                if ending == ".alpha" and value.numel() == 1:
                    alphas[module] = float(value)
                elif ending == ".alpha":
                    loose.append(key)
                else:
                    (downs if ending in DOWN else ups)[module] = value
                break
        else:
            loose.append(key)
    both = sorted(downs.keys() & ups.keys())
    loose += [f"{module} (half of a pair)" for module in downs.keys() ^ ups.keys()]
    return LoraFile({m: (downs[m], ups[m]) for m in both}, alphas, sorted(loose), dict(metadata or {}))


def read(path: Path) -> LoraFile:
    """Reads a LoRA file, or the one in a run's folder. Raises a ConfigError that names the file."""
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{file} does not exist: give a LoRA's safetensors file or a run's folder")
    try:
        with safe_open(file, "pt") as opened:
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            found = split(state, opened.metadata())
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read as safetensors: {one_line(error)}") from None
    if not found.layers:
        raise ConfigError(f"{file} holds no LoRA: no pairs of lora_A and lora_B among its {len(state)} keys")
    return found


def delta_norm(down: Tensor, up: Tensor) -> float:
    """Frobenius norm of up @ down, without the product: sqrt(trace((up^T up)(down down^T)))."""
    down, up = down.flatten(1).double(), up.flatten(1).double()
    return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt())


def checks(lora: LoraFile) -> dict[str, bool]:
    """The properties of a sound LoRA file, each true or false."""
    pairs = list(lora.layers.values())
    finite = all(bool(torch.isfinite(half).all()) for pair in pairs for half in pair)
    return {
        "every lora_A has its lora_B, of the same rank, and there is nothing else": (
            not lora.loose and all(len(down) == up.shape[1] for down, up in pairs)
        ),
        "all numbers are finite": finite,
        "it differs from zero": any(bool(up.any()) and bool(down.any()) for down, up in pairs),
        "alpha is folded in: diffusers and ComfyUI apply it at the same strength": lora.scale == 1,
        "module names are those of a transformer's blocks": any(
            re.search(r"blocks[._]\d", name) for name in lora.layers
        ),
    }


def describe(path: Path) -> tuple[str, bool]:
    """What `inspect` prints, and whether all checks hold. Raises ConfigError for a file that is not a LoRA."""
    lora = read(path)
    trained = {key.removeprefix("tmpo."): value for key, value in lora.metadata.items() if key.startswith("tmpo.")}
    numbers = sum(half.numel() for pair in lora.layers.values() for half in pair)
    dtypes = sorted({str(half.dtype).removeprefix("torch.") for pair in lora.layers.values() for half in pair})
    rows = [("trained", "by tmpo_trainer" if trained else "not by tmpo_trainer (no tmpo.* metadata)")]
    rows += [(key.replace("_", " "), value) for key, value in sorted(trained.items())]
    rows += [
        ("architecture", lora.metadata.get("modelspec.architecture", "not stated")),
        ("rank", " ".join(map(str, lora.ranks))),
        ("modules", f"{len(lora.layers)}, {numbers / 1e6:.2f} M numbers, {' '.join(dtypes)}"),
    ]
    norms = sorted(((delta_norm(*pair), name) for name, pair in lora.layers.items()), reverse=True)
    rows += [("largest change" if i == 0 else "", f"{norm:.3g} {name}") for i, (norm, name) in enumerate(norms[:3])]
    # Keys, values and names are the file's, and may hold anything.
    rows = [(one_line(key), one_line(value, 1000)) for key, value in rows]
    width = max(len(key) for key, _ in rows)
    lines = [f"{key:{width}}  {value}" for key, value in rows]
    verdict = checks(lora)
    lines += [f"{'yes' if holds else 'NO '}{'':{width - 1}}{claim}" for claim, holds in verdict.items()]
    return "\n".join(lines), all(verdict.values())
