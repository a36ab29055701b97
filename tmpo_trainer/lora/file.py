"""Reads LoRA files: their contents, their strength, their soundness. It needs only torch and safetensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..settings.errors import ConfigError, one_line

FILE_NAME = "pytorch_lora_weights.safetensors"

#: Endings of the two halves: diffusers' and peft's, kohya's, peft's own files', XLabs' and old diffusers'.
PAIRS = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_down.weight": ".lora_up.weight",
    ".lora_A.default.weight": ".lora_B.default.weight",
    ".down.weight": ".up.weight",
}
#: How the names of text encoders' layers begin.
TEXT = ("text_encoder", "lora_te")
#: The dtypes of safetensors that hold a LoRA's numbers. Integers serve for alphas.
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
INTEGERS = {"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"}
#: peft's settings under which a layer computes something else than base + strength * up @ down.
CHANGING = (
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication", "modules_to_save", "target_parameters",
    "trainable_token_indices", "velora_config", "monteclora_config", "kasa_config", "arrow_config",
)  # fmt: skip
#: peft's initialisations that change the base's weights, which a LoRA file does not hold.
CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: The most pairs of a pattern and a module that are matched, about a second's work. FLUX needs a quarter of a million.
MATCHES = 500_000
#: The longest name of a tensor, and the most dots in it: a pattern is tried at each of them.
NAME, DOTS = 500, 30


def named(names: list[str], shown: int = 3) -> str:
    """The first of some foreign names, and how many more there are."""
    text = ", ".join(one_line(name, 100) for name in names[:shown])
    return f"{text} and {len(names) - shown} more" if len(names) > shown else text


def by(shape: tuple[int, ...] | torch.Size) -> str:
    return " x ".join(map(str, shape)) or "a single number"


class Strength:
    """The factor of up @ down that diffusers reads from a file's metadata (`lora_adapter_metadata`, peft's config).

    Args:
        metadata: the file's. layers: the number of its layers.

    Raises:
        ConfigError: metadata that cannot be followed. The text does not name the file.
    """

    def __init__(self, metadata: Mapping[str, str], layers: int):
        text = metadata.get("lora_adapter_metadata")
        #: Whether the metadata says anything.
        self.given = bool(text)
        self.rank: int | None = None
        self.alpha, self.rooted = 1.0, False
        self.ranks: list[tuple[re.Pattern[str], float]] = []
        self.alphas: list[tuple[re.Pattern[str], float]] = []
        if not text:
            return
        try:
            found = json.loads(text)
            about = {key.removeprefix("transformer."): v for key, v in found.items() if key.startswith("transformer.")}
        except (ValueError, AttributeError, RecursionError):
            raise ConfigError("its lora_adapter_metadata is not a JSON object") from None
        start = about.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(CHANGING_STARTS):
            raise ConfigError(f"it belongs to a base that its training changed (init_lora_weights {one_line(start)})")
        for name in CHANGING:
            if about.get(name):
                raise ConfigError(f"its lora_adapter_metadata has {name}, which is more than a LoRA")
        self.rank, self.alpha = self._rank(about.get("r"), "r"), self._number(about.get("lora_alpha"), "lora_alpha")
        self.rooted = bool(about.get("use_rslora"))
        self.ranks, self.alphas = (self._patterns(about, name, layers) for name in ("rank_pattern", "alpha_pattern"))

    @staticmethod
    def _number(value: Any, name: str) -> float:
        try:
            if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value) and value >= 0:
                return float(value)
        except OverflowError:
            pass
        raise ConfigError(f"its lora_adapter_metadata has {name} {one_line(value, 50)}: it must be a number")

    @staticmethod
    def _rank(value: Any, name: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise ConfigError(f"its lora_adapter_metadata has {name} {one_line(value, 50)}: it must be a rank")
        return value

    def _patterns(self, about: dict[str, Any], name: str, layers: int) -> list[tuple[re.Pattern[str], float]]:
        given = about.get(name) or {}
        read = self._rank if name == "rank_pattern" else self._number
        if not isinstance(given, dict) or len(given) * layers > MATCHES:
            raise ConfigError(f"its lora_adapter_metadata has a {name} that is not {{module: value}}, or too long")
        patterns = []
        for key, value in given.items():
            # peft takes any regular expression. One from elsewhere may take for ever.
            if not re.fullmatch(r"\^?[\w.-]*\$?", key[: NAME + 1]) or len(key) > NAME:
                raise ConfigError(f"its {name} {one_line(key, 50)!r} is not the name of a module")
            # As peft's get_pattern_key does.
            patterns.append((re.compile(rf"(.*\.)?({key})$"), float(read(value, f"{name} {one_line(key, 50)}"))))
        return patterns

    def of(self, module: str, rank: int) -> float:
        """The factor for a module of the transformer, named as in the transformer.

        Raises:
            ConfigError: the metadata has another rank.
        """
        if self.rank is None:
            return 1.0
        said = next((value for pattern, value in self.ranks if pattern.match(module)), self.rank)
        if said != rank:
            raise ConfigError(f"{one_line(module)} has rank {rank}, but {said:g} in its lora_adapter_metadata")
        alpha = next((value for pattern, value in self.alphas if pattern.match(module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rooted else rank)


@dataclass(frozen=True)
class LoraFile:
    """The contents of a LoRA file. Its layers have the file's own names.

    file: its path. state: all tensors by name, in float32 unless the file has 16-bit floats. types: the dtypes in the file.
    layers: {module: (down `[r, in]`, up `[out, r]`)}; a convolution has two more dimensions. alphas: {module: alpha}, where
    the file has that key: the strength is then alpha / r. loose: keys that belong to no pair. metadata: of the safetensors
    header.
    """

    file: Path
    state: dict[str, Tensor]
    types: list[str]
    layers: dict[str, tuple[Tensor, Tensor]]
    alphas: dict[str, float]
    loose: list[str]
    metadata: dict[str, str]

    @property
    def ranks(self) -> list[int]:
        return sorted({len(down) for down, _ in self.layers.values()})

    @property
    def text(self) -> list[str]:
        """The layers of text encoders."""
        return [module for module in self.layers if module.startswith(TEXT)]

    @cached_property
    def strength(self) -> Strength:
        """The strength in the metadata. Raises ConfigError."""
        try:
            return Strength(self.metadata, len(self.layers))
        except ConfigError as error:
            raise ConfigError(f"{self.file}: {error}") from None

    def check_finite(self) -> None:
        """Raises ConfigError if a number is NaN or infinite."""
        check_finite(self.file, self.state)


def check_finite(file: Path, state: Mapping[str, Tensor]) -> None:
    """Raises a ConfigError that names the file and the key of a tensor with a number that is NaN or infinite."""
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise ConfigError(
                f"{file}: {one_line(key)} has numbers that are not finite: its training had failed by then, give an "
                "earlier one"
            )


def split(header: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, tuple[str, str]], dict[str, str], list[str]]:
    """Pairs up the keys of a LoRA, given with their shapes.

    Returns:
        {module: (key of down, key of up)}; {module: key of alpha}; the other keys.

    Raises:
        ConfigError: two matrices that are no pair. The text does not name the file.
    """
    pairs: dict[str, tuple[str, str]] = {}
    alphas: dict[str, str] = {}
    used: set[str] = set()
    for key, shape in header.items():
        if key.endswith(".alpha") and math.prod(shape) == 1:
            alphas[key.removesuffix(".alpha")] = key
            used.add(key)
        for first, second in PAIRS.items():
            module = key.removesuffix(first)
            if key.endswith(first) and module + second in header:
                if module in pairs:
                    raise ConfigError(f"{one_line(module)} is in it twice")
                pairs[module] = (key, module + second)
                used |= {key, module + second}
                break
    for module, (first, second) in pairs.items():
        down, up = header[first], header[second]
        if len(down) != len(up) or len(down) not in (2, 4) or any(size != 1 for size in up[2:]) or down[0] != up[1]:
            raise ConfigError(
                f"{one_line(module)} is {by(down)} and {by(up)}: these are not the halves of a LoRA's layer"
            )
    return pairs, alphas, sorted(header.keys() - used)


def read(path: Path) -> LoraFile:
    """Reads a LoRA file, or the one in a run's folder. Shapes and types are checked before any number is read.

    Raises:
        ConfigError: it is no LoRA, or broken. The text names the file.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{file} does not exist: give a LoRA's safetensors file or a run's folder")
    try:
        with safe_open(file, "pt") as opened:
            header: dict[str, tuple[int, ...]] = {}
            for key in opened.keys():  # noqa: SIM118
                entry = opened.get_slice(key)
                shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
                if dtype not in FLOATS and not (dtype in INTEGERS and math.prod(shape) == 1):
                    raise ConfigError(f"{one_line(key)} has numbers of type {dtype}: a LoRA has floats")
                if 0 in shape:
                    raise ConfigError(f"{one_line(key)} is {by(shape)}: it is empty")
                if len(key) > NAME or key.count(".") > DOTS:
                    raise ConfigError(f"it has a name of {len(key)} characters or too many dots, {one_line(key, 50)}")
                header[key] = shape
            pairs, alpha_keys, loose = split(header)
            if not pairs:
                raise ConfigError(f"it holds no LoRA: no pairs of lora_A and lora_B among its {len(header)} keys")
            state, types = {}, set()
            for key in header:
                value = opened.get_tensor(key)
                types.add(str(value.dtype).removeprefix("torch."))
                state[key] = _computable(value)
            metadata = dict(opened.metadata() or {})
        alphas = {module: float(state[key]) for module, key in alpha_keys.items()}
        for module, alpha in alphas.items():
            # diffusers' conversion would not end for a negative one.
            if not (math.isfinite(alpha) and alpha >= 0):
                raise ConfigError(f"{one_line(module)} has the alpha {alpha:g}: it must be a number from 0")
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read as safetensors: {one_line(error)}") from None
    layers = {module: (state[down], state[up]) for module, (down, up) in sorted(pairs.items())}
    return LoraFile(file, state, sorted(types), layers, alphas, loose, metadata)


def _computable(value: Tensor) -> Tensor:
    """A tensor in float32 if its type is not a usual one: torch computes hardly anything in float8."""
    return value if value.dtype in (torch.float32, torch.float16, torch.bfloat16) else value.float()


def delta_norm(down: Tensor, up: Tensor) -> float:
    """Frobenius norm of up @ down.

    It is sqrt(trace((up^T up)(down down^T))). The smaller of these products and up @ down is made, which holds no more
    numbers than the two halves.
    """
    down, up = down.flatten(1).double(), up.flatten(1).double()
    if len(down) > min(len(up), down.shape[1]):
        return float((up @ down).norm())
    return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt())


def checks(lora: LoraFile) -> dict[str, bool]:
    """The properties of a sound LoRA file, each true or false."""
    pairs = list(lora.layers.values())
    return {
        "every lora_A has its lora_B, and there is nothing else": not lora.loose,
        "all numbers are finite": all(bool(torch.isfinite(value).all()) for value in lora.state.values()),
        "it differs from zero": any(bool(up.any()) and bool(down.any()) for down, up in pairs),
        "alpha is folded in: diffusers and ComfyUI apply it at the same strength": _strengths(lora)[1],
        "module names are those of a transformer's blocks": any(
            re.search(r"(blocks|layers|refiner)[._]\d", name) for name in lora.layers
        ),
    }


def _strengths(lora: LoraFile) -> tuple[str, bool]:
    """What the file says of its strength, and whether diffusers and ComfyUI, which ignores the metadata, agree."""
    own = [module for module in lora.layers if not module.startswith(TEXT)]
    some = [module for module in own if module in lora.alphas]
    try:
        strength = lora.strength
        factors = [strength.of(m.removeprefix("transformer."), len(lora.layers[m][0])) for m in own]
    except ConfigError as error:
        return f"diffusers cannot tell: {str(error).removeprefix(f'{lora.file}: ')}", False
    if factors and (min(factors), max(factors)) != (1, 1):
        return f"{min(factors):.3g} to {max(factors):.3g} by its metadata, which ComfyUI ignores", False
    if strength.given and some:
        return "in its metadata and in alpha keys, which diffusers refuses", False
    if some and len(some) < len(own):
        return f"in alpha keys of {len(some)} of {len(own)} modules", False
    return "by alpha keys" if some else "", True


def describe(lora: LoraFile, more: Mapping[str, bool] | None = None) -> tuple[str, bool]:
    """What `inspect` prints, and whether all checks hold. `more` are further checks and their results."""
    trained = {key.removeprefix("tmpo."): value for key, value in lora.metadata.items() if key.startswith("tmpo.")}
    numbers = sum(half.numel() for pair in lora.layers.values() for half in pair)
    rows = [("trained", "by tmpo_trainer" if trained else "not by tmpo_trainer (no tmpo.* metadata)")]
    rows += [(key.replace("_", " "), value) for key, value in sorted(trained.items())]
    rows += [
        ("architecture", lora.metadata.get("modelspec.architecture", "not stated")),
        ("rank", " ".join(map(str, lora.ranks))),
        ("modules", f"{len(lora.layers)}, {numbers / 1e6:.2f} M numbers, {' '.join(lora.types)}"),
    ]
    if lora.text:
        rows.append(("text encoders", f"{len(lora.text)} of the modules: tmpo_trainer leaves these out"))
    if lora.loose:
        rows.append(("other keys", f"{len(lora.loose)}: {named(lora.loose)}"))
    said, _ = _strengths(lora)
    if said:
        rows.append(("strength", said))
    norms = sorted(((delta_norm(*pair), name) for name, pair in lora.layers.items()), reverse=True)
    rows += [("largest change" if i == 0 else "", f"{norm:.3g} {name}") for i, (norm, name) in enumerate(norms[:3])]
    # Keys, values and names are the file's, and may hold anything.
    rows = [(one_line(key, 40), one_line(value)) for key, value in rows]
    width = max(len(key) for key, _ in rows)
    lines = [f"{key:{width}}  {value}" for key, value in rows]
    verdict = {**checks(lora), **(more or {})}
    lines += [f"{'yes' if holds else 'NO '}{'':{width - 1}}{claim}" for claim, holds in verdict.items()]
    return "\n".join(lines), all(verdict.values())
