"""Checks that need only a pipeline folder's configs and file headers: they take seconds, while loading takes minutes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open

from ..hub import checked_tokenizer, read_json, readable_errors
from ..settings.errors import ConfigError, one_line
from .base import Backbone
from .text import TEXT_PARTS

#: The libraries that a part's class may come from. No other module is ever imported for a folder.
LIBRARIES: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}

#: More layers, a larger whole number or a longer list are a damaged config. They would take the memory or hours.
MOST_LAYERS, MOST, LONGEST = 200, 10_000_000, 1000

#: The fix for a folder whose weights and config differ.
AGAIN = "take both from the same model, or download the folder again"

#: The tensors of the transformer in a file with a whole model begin with this.
WHOLE_MODEL = "model.diffusion_model."

#: Formats that are taken for safetensors, by how a file of theirs begins.
FORMATS = {
    b"GGUF": "is a GGUF file, which cannot be trained",
    b"PK\x03\x04": "is a torch file (.ckpt, .pt, .bin)",
    b"\x80": "is a torch file (.ckpt, .pt, .bin)",
    b"version https://git-lfs": "is only a pointer of Git LFS",
}


def parts(model: str, folder: Path) -> dict[str, tuple[str, str]]:
    """{name: (library, class)} of the parts that model_index.json names. Raises ConfigError for any other content."""
    index = folder / "model_index.json"
    found = {}
    for name, value in read_json(f"model {model}", index).items():
        # Others are settings of the pipeline, or parts that it lacks: [null, null].
        if isinstance(value, list) and any(value):
            if len(value) != 2 or not all(isinstance(word, str) for word in value):
                raise ConfigError(f"model {model}: {index}: {name} must be [library, class]: download it again")
            if value[0] not in LIBRARIES:
                raise ConfigError(
                    f"model {model}: {index}: {name} is from {value[0]!r}: only parts of {' and '.join(LIBRARIES)} are loaded"
                )
            found[name] = (value[0], value[1])
    return found


def skeleton(model: str, folder: Path, kind: type[Backbone], dtype: torch.dtype, max_sequence_length: int) -> Backbone:
    """The model's skeleton, after every check that its configs and tokenizers allow.

    Args:
        model: as the user named it, for messages.

    Raises:
        ConfigError: a part is missing, of another kind, or does not fit the others.
    """
    named = parts(model, folder)
    expected = {"transformer": kind.transformer_class, "vae": kind.vae_class, "scheduler": kind.scheduler_class}
    for name, wanted in expected.items():
        found = named.get(name, (None, None))[1]
        if found != wanted.__name__:
            raise ConfigError(
                f"model {model} names {found} as its {name}: {kind.pipeline_class.__name__} needs {wanted.__name__}"
            )
    for name in named:
        if not (folder / name).is_dir() and name not in kind.optional_parts:
            raise ConfigError(f"model {model} has no folder {name}/, which its model_index.json names: copy it there")
    for name in named:
        config = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        if not name.startswith("tokenizer") and config.parent.is_dir():
            _check_numbers(f"model {model}", config)
    built = kind.skeleton(folder, dtype, max_sequence_length)
    _check_text_parts(model, folder, kind, named)
    built.blank_conditioning(folder)
    built.check_vae(model)
    return built


def _check_numbers(what: str, config: Path) -> None:
    """Raises ConfigError for a config with a number that no model has."""
    left: list[tuple[str, Any]] = list(read_json(what, config).items())
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list) and len(value) <= LONGEST:
            left += ((key, item) for item in value)
        elif isinstance(value, list):
            raise ConfigError(f"{what}: {config}: {key} has {len(value)} entries: download it again")
        elif isinstance(value, (int, float)) and not abs(value) <= (MOST_LAYERS if "layers" in key else MOST):
            raise ConfigError(f"{what}: {config}: {key} {one_line(value, 20)} is not possible: download it again")


def _check_text_parts(model: str, folder: Path, kind: type[Backbone], named: Mapping[str, tuple[str, str]]) -> None:
    """Raises ConfigError for a text encoder that cannot be built, or a tokenizer that is not its own."""
    for encoder in kind.text_parts():
        if not encoder.startswith("text_encoder"):
            continue
        tokenizer = encoder.replace(*TEXT_PARTS)
        here = [name for name in (encoder, tokenizer) if name in named and (folder / name).is_dir()]
        if encoder not in here and encoder in kind.optional_parts:
            continue
        for name in (encoder, tokenizer):
            if name not in here:
                raise ConfigError(
                    f"model {model} has no {name}, which a {kind.pipeline_class.__name__} needs: copy it there"
                )
        built = _text_encoder(model, folder, encoder, named[encoder])
        sizes = built.config.to_dict()
        cls = _class(model, tokenizer, named[tokenizer], transformers.PreTrainedTokenizerBase)
        found = checked_tokenizer(cls, f"model {model}", folder / tokenizer, sizes["vocab_size"])
        # T5 has no learned positions.
        length, most = found.model_max_length, sizes.get("max_position_embeddings", math.inf)
        if not isinstance(length, (int, float)) or not 0 < length <= most:
            raise ConfigError(
                f"model {model}: {folder / tokenizer / 'tokenizer_config.json'}: model_max_length {one_line(length, 20)}, but "
                f"{encoder} takes {most} tokens: take both from the same model"
            )


def _text_encoder(model: str, folder: Path, name: str, entry: tuple[str, str]) -> Any:
    """A text encoder on the meta device, from its config. Raises ConfigError if it cannot be built."""
    kind = _class(model, name, entry, transformers.PreTrainedModel)
    with readable_errors(f"model {model}", folder / name / "config.json"), torch.device("meta"):
        return kind(kind.config_class.from_pretrained(folder / name, local_files_only=True))


def _class(model: str, name: str, entry: tuple[str, str], base: type) -> Any:
    """The class of a part. Raises ConfigError unless it is transformers' and derives from `base`."""
    library, wanted = entry
    found = getattr(LIBRARIES[library], wanted, None)
    if not isinstance(found, type) or not issubclass(found, base):
        raise ConfigError(f"model {model} names {library}'s {wanted} as its {name}, which is not a {base.__name__}")
    return found


def check_weights(model: str, folder: Path, skeleton: Backbone, without: tuple[str, ...] = ()) -> None:
    """Compares the headers of the weight files that will be read with the configs.

    Args:
        without: folders that will not be read.

    Raises:
        ConfigError: a file is missing or cut short, or its tensors are not those of the config.
    """
    for name, entry in parts(model, folder).items():
        config = folder / name / "config.json"
        if name in without or not config.is_file() or not name.startswith(("transformer", "vae", "text_encoder")):
            continue
        files = _weight_files(model, config.parent, entry[0])
        for file in files:
            check_file(file, f"model {model}: ")
        if files and "quantization_config" not in read_json(f"model {model}", config):
            text = name.startswith("text_encoder")
            module = _text_encoder(model, folder, name, entry) if text else skeleton.pipeline.components[name]
            _check_tensors(f"model {model}: {name}", files, module, renamed=text)


def _weight_files(model: str, part: Path, library: str) -> list[Path]:
    """The safetensors files that the part's library would read; none if it would read a .bin file."""
    stem = "model" if library == "transformers" else "diffusion_pytorch_model"
    whole, index = part / f"{stem}.safetensors", part / f"{stem}.safetensors.index.json"
    # With both, diffusers takes the index and transformers the whole file.
    if whole.is_file() and not (library == "diffusers" and index.is_file()):
        return [whole]
    if index.is_file():
        shards = read_json(f"model {model}", index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ConfigError(f"model {model}: {index} is damaged (no weight_map): download it again")
        return sorted({part / shard for shard in shards.values()})
    if not any((part / f"{old}.bin").is_file() for old in (stem, "pytorch_model")):
        raise ConfigError(
            f"model {model} has no weights in {part.name}/ ({whole.name} or {index.name}): the download is not complete"
        )
    return []


def _check_tensors(where: str, files: list[Path], module: torch.nn.Module, renamed: bool) -> None:
    """Raises ConfigError if files do not hold a module's tensors.

    Args:
        renamed: names in the files may differ from the module's, as transformers accepts older ones.
    """
    stored: dict[str, tuple[list[int], str]] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_slice(name)
                stored[name] = tensor.get_shape(), tensor.get_dtype()
    own = {name: list(value.shape) for name, value in module.state_dict().items()}
    for name in sorted(own.keys() & stored.keys()):
        shape, dtype = stored[name]
        if shape != own[name]:
            raise ConfigError(f"{where}: {name} is {shape} in the weights, but {own[name]} by config.json: {AGAIN}")
        if not dtype.startswith(("F", "BF")):
            raise ConfigError(f"{where}: {name} is stored as whole numbers ({dtype}): {AGAIN}")
    missing = [] if renamed else sorted(own.keys() - stored.keys())
    if missing:
        raise ConfigError(f"{where}: {missing[0]} is missing in the weights: {AGAIN}")
    numbers, needed = sum(math.prod(shape) for shape, _ in stored.values()), sum(p.numel() for p in module.parameters())
    if numbers < needed:
        raise ConfigError(f"{where}: the weights are {numbers:,} numbers, but {needed:,} by config.json: {AGAIN}")
    # Libraries ignore what they do not know: with a number of layers that is too small, the last ones.
    stems = {name.rpartition(".")[0] for name in map(_block, own)}
    for name in sorted(stored):
        block = _block(name)
        if block and block not in {*map(_block, own)} and block.rpartition(".")[0] in stems:
            raise ConfigError(f"{where}: {block} is in the weights, but not by config.json: {AGAIN}")


def _block(name: str) -> str:
    """The numbered module that a tensor belongs to: `transformer_blocks.7` or `encoder.block.23`; or nothing."""
    found = re.match(r"[^\d]*?\.\d+(?=\.)", name)
    return found[0] if found else ""


def check_file(file: Path, where: str = "") -> None:
    """Raises ConfigError if a safetensors file is missing, cut short or something else."""
    if not file.is_file():
        raise ConfigError(f"{where}{file} is missing: the download is not complete")
    try:
        with safe_open(file, "pt"):
            return
    except (OSError, SafetensorError) as error:
        reason = one_line(error)
    try:
        with file.open("rb") as opened:
            start = opened.read(32)
    except OSError:
        start = b""
    for begin, kind in FORMATS.items():
        if start.startswith(begin):
            raise ConfigError(f"{where}{file} {kind}: take the model's safetensors file")
    raise ConfigError(f"{where}{file} is damaged or cut short ({reason}): download it again")


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
    # A file with a whole model also holds text encoders and a VAE, which are not read.
    names = [name for name in names if name.startswith(WHOLE_MODEL)] or names
    if any("scale_weight" in name or "scaled_fp8" in name or name.endswith("weight_scale") for name in names):
        raise ConfigError(
            f"{where} has scaled 8-bit weights, which would be read without their scales: take the bf16 file"
        )
    skeleton.check_single_file(where, names)
