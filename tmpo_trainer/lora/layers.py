"""A LoRA file's layers as diffusers reads them: in the names of a model's transformer and at diffusers' strength."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from diffusers.loaders import FluxLoraLoaderMixin, lora_conversion_utils
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor

from ..settings import discovery
from ..settings.errors import ConfigError, one_line
from . import file as lora_file
from .file import LoraFile, by, named

#: diffusers' conversion for FLUX.1 splits this layer of kohya's at fixed widths.
KOHYA_FUSED, KOHYA_SHAPE = re.compile(r"single_blocks[_.]\d+[_.]linear1$"), (21504, 3072)
PREFIX = "transformer."


@dataclass(frozen=True)
class Layers:
    """The layers of a transformer's LoRA, each computing up @ down at strength 1.

    file: where they are from. pairs: {module: (down `[r, in]`, up `[out, r]`)}, named as in the transformer. biases:
    {module: the bias `[out]` of up}. magnitudes: {module: DoRA's magnitudes `[out]`}. left_out: a sentence about the layers
    that are not the transformer's, or "".
    """

    file: Path
    pairs: dict[str, tuple[Tensor, Tensor]]
    biases: dict[str, Tensor]
    magnitudes: dict[str, Tensor]
    left_out: str

    def check(self, shapes: Mapping[str, tuple[int, int]], model: str) -> None:
        """Checks the layers against {module: (inputs, outputs)} of a model. Raises ConfigError."""
        for module, (down, up) in self.pairs.items():
            if module not in shapes:
                raise ConfigError(
                    f"{self.file}: {one_line(module)} is no linear layer of {model}: give a LoRA of the same model"
                )
            wanted, found = shapes[module][::-1], (len(up), *down.shape[1:])
            if wanted != found:
                raise ConfigError(
                    f"{self.file}: {one_line(module)} is {by(found)} and does not fit {model}, where it is {by(wanted)}: "
                    "give a LoRA of the same model"
                )

    def state(self) -> dict[str, Tensor]:
        """The layers under diffusers' names."""
        found: dict[str, Tensor] = {}
        for module, (down, up) in self.pairs.items():
            found |= {f"{PREFIX}{module}.lora_A.weight": down, f"{PREFIX}{module}.lora_B.weight": up}
        for module, bias in self.biases.items():
            found[f"{PREFIX}{module}.lora_B.bias"] = bias
        for module, magnitude in self.magnitudes.items():
            found[f"{PREFIX}{module}.lora_magnitude_vector"] = magnitude
        return found


def read(path: Path, pipeline_class: Any) -> Layers:
    """The layers of a file, named by the converters of a diffusers pipeline class.

    Raises:
        ConfigError: diffusers cannot read it, or not at a strength that is beyond doubt, or it has numbers that are not
            finite. The text names the file.
    """
    lora = lora_file.read(path)
    lora.check_finite()
    return convert(lora, pipeline_class)


def convert(lora: LoraFile, pipeline_class: Any) -> Layers:
    """As `read`, without the check for finite numbers in the file."""
    file, strength = lora.file, lora.strength
    dora = [key for key in lora.loose if key.endswith(".dora_scale")]
    if dora:
        raise ConfigError(
            f"{file} is a DoRA, and diffusers would drop its magnitudes ({named(dora, 1)}): give a plain LoRA"
        )
    state, alphas, unplaced = _diffusers_names(lora, pipeline_class)
    own = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    downs = {k.removesuffix(".lora_A.weight"): v for k, v in own.items() if k.endswith(".lora_A.weight")}
    ups = {k.removesuffix(".lora_B.weight"): v for k, v in own.items() if k.endswith(".lora_B.weight")}
    biases = {k.removesuffix(".lora_B.bias"): v for k, v in own.items() if k.endswith(".lora_B.bias")}
    magnitudes = {
        k.removesuffix(".lora_magnitude_vector"): v for k, v in own.items() if k.endswith(".lora_magnitude_vector")
    }
    known = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_magnitude_vector")
    other = [key for key in own if not key.endswith(known)]
    other += sorted((downs.keys() ^ ups.keys()) | (biases.keys() | magnitudes.keys()) - downs.keys())
    if other:
        raise ConfigError(f"{file} holds more than the pairs of a LoRA: {named(sorted(other))}")
    said = {key.removeprefix(PREFIX).removesuffix(".alpha"): float(value) for key, value in alphas.items()}
    said = {module: alpha for module, alpha in said.items() if module in downs}
    if said and (strength.given or said.keys() != downs.keys()):
        # diffusers refuses the first, and gives modules without an alpha that of another one.
        reason = "also in its metadata" if strength.given else f"but not of {named(sorted(downs.keys() - said.keys()))}"
        raise ConfigError(f"{file} has the strength of {named(sorted(said))} in alpha keys, {reason}")
    pairs = {}
    for module, down in sorted(downs.items()):
        up = ups[module]
        if down.dim() != 2 or up.dim() != 2 or up.shape[1] != len(down):
            raise ConfigError(
                f"{file}: {one_line(module)} is {by(down.shape)} and {by(up.shape)}: it is no linear layer's"
            )
        try:
            factor = strength.of(module, len(down))
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
        factor *= said.get(module, len(down)) / len(down)
        pairs[module] = (down, up if factor == 1 else up.float() * factor)
        if factor != 1 and module in biases:
            biases[module] = biases[module].float() * factor
    found = Layers(file, pairs, biases, magnitudes, _left_out(lora, state, unplaced, len(pairs)))
    lora_file.check_finite(file, found.state())
    return found


def readers(lora: LoraFile) -> list[str]:
    """The kinds of models for which diffusers converts a file's names, to names of layers that these models have.

    The converters of some kinds take any name.
    """
    found = {}
    for name in discovery.names("backbones"):
        for kind in discovery.load("backbones", name).PIPELINES.values():
            layers = tuple(f".{ending}.lora_A.weight" for ending in kind.lora_targets["all-linear"])
            with contextlib.suppress(ConfigError):
                state, *_ = _diffusers_names(lora, kind.pipeline_class)
                if any(key.startswith(PREFIX) and key.endswith(layers) for key in state):
                    found[kind.family] = None
    return list(found)


def _check_kohya(lora: LoraFile) -> None:
    for module, (down, up) in lora.layers.items():
        found = (len(up), down.shape[1])
        if KOHYA_FUSED.search(module) and found[0] != KOHYA_SHAPE[0]:
            raise ConfigError(
                f"{lora.file}: {one_line(module)} is {by(found)}, but diffusers converts such names only for FLUX.1, where it "
                f"is {by(KOHYA_SHAPE)}: give a LoRA of the same model, or one in diffusers' names"
            )


class _Unplaced(logging.Handler):
    """Notes the layers that diffusers' converters drop, which they say in a warning alone."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.layers: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("Unsupported keys"):
            self.layers |= {re.split(r"\.(?:lora_|alpha)", key)[0] for key in re.findall(r"'([^']+)'", text)}


@contextlib.contextmanager
def _converting() -> Iterator[set[str]]:
    """Diffusers without its messages. Yields the layers that its converters drop, which are known afterwards."""
    logger, handler = logging.getLogger(lora_conversion_utils.__name__), _Unplaced()
    verbosity, level, propagate = diffusers.utils.logging.get_verbosity(), logger.level, logger.propagate
    diffusers.utils.logging.set_verbosity_error()
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield handler.layers
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        diffusers.utils.logging.set_verbosity(verbosity)


def _diffusers_names(lora: LoraFile, pipeline_class: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], set[str]]:
    """The tensors under the names that diffusers makes of them, the alphas that it has not folded in, and the layers that its
    converter has dropped.

    Raises:
        ConfigError: diffusers cannot, or finds no layers of a transformer.
    """
    if issubclass(pipeline_class, FluxLoraLoaderMixin):
        _check_kohya(lora)
    try:
        # FLUX's function returns alphas, SD3's leaves them among the tensors.
        with _converting() as unplaced:
            state, *alphas, _ = pipeline_class.lora_state_dict(
                dict(lora.state), return_alphas=True, return_lora_metadata=True
            )
        state = {**state, **(alphas[0] or {})} if alphas else state
        folded = {key: value for key, value in state.items() if key.endswith(".alpha") and value.numel() == 1}
        state = {key: value for key, value in state.items() if key not in folded}
        own = {key: value for key, value in state.items() if key.startswith(PREFIX)}
        # As diffusers' load_lora_adapter does.
        if own and "lora_A" not in next(iter(own)):
            state = {**{k: v for k, v in state.items() if k not in own}, **convert_unet_state_dict_to_peft(own)}
    except Exception as error:
        # The converters raise all kinds of errors for names and shapes that they do not expect.
        raise ConfigError(
            f"{lora.file} cannot be converted by diffusers ({type(error).__name__}: {one_line(error)}): give a LoRA of the "
            "same model, or rename its keys as diffusers does"
        ) from None
    if not any(key.startswith(PREFIX) and ".lora_A." in key for key in state):
        raise ConfigError(
            f"{lora.file}: {pipeline_class.__name__} of diffusers finds no layers of a transformer among its names, such as "
            f"{named(list(lora.layers), 1)}: rename its keys as diffusers does"
        )
    return {key: value.contiguous() for key, value in state.items()}, folded, unplaced


def _left_out(lora: LoraFile, state: Mapping[str, Tensor], unplaced: set[str], applied: int) -> str:
    """What of a file is not applied."""
    text = len(lora.text)
    others = [
        key.rpartition(".lora_")[0]
        for key in state
        if ".lora_A." in key and not key.startswith((PREFIX, *lora_file.TEXT))
    ]
    others += sorted(unplaced - set(lora.text))
    parts = [f"{text} of text encoders"] if text else []
    parts += [f"{len(others)} that diffusers does not place ({named(others)})"] if others else []
    if not parts:
        return ""
    return f"{lora.file}: {applied} layers of the transformer are applied; {' and '.join(parts)} are left out"
