"""Checks that need only a pipeline folder's configs and file headers: they take seconds, while loading takes minutes."""

from __future__ import annotations

import json
import math
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers.utils.import_utils import DummyObject

from ..hub import checked_tokenizer, read_config, read_json, readable_errors
from ..settings.errors import ConfigError, one_line
from . import PACKAGED
from .base import WHOLE_MODEL, Backbone
from .text import TEXT_PARTS

#: The libraries that a part's class may come from. No other module is ever imported for a folder.
LIBRARIES: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}

#: Configs of parts that are not called config.json.
CONFIGS = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "feature": "preprocessor_config.json",
}

#: Sides of a picture in pixels, of which every model takes one.
SIZES = (64, 32, 16, 128, 256, 512, 1024)

#: Methods of quantisation whose weights diffusers and transformers read.
QUANTISED = ("bitsandbytes", "torchao", "quanto", "modelopt")

#: The fix for a folder whose weights and config differ.
AGAIN = "take both from the same model, or download the folder again"

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
        # Others are about the file, switches of the pipeline, or parts that it lacks.
        if not name.startswith("_") and not isinstance(value, bool) and value not in (None, [None, None]):
            if not isinstance(value, list) or len(value) != 2 or not all(map(_is_name, (name, *value))):
                raise ConfigError(
                    f"model {model}: {index}: {one_line(name, 40)} must be [library, class]: download it again"
                )
            if value[0] not in LIBRARIES:
                raise ConfigError(
                    f"model {model}: {index}: {name} is from {value[0]!r}: only parts of {' and '.join(LIBRARIES)} are loaded"
                )
            found[name] = (value[0], value[1])
    return found


def config_file(part: str) -> str:
    """The name of the config of a pipeline's part."""
    return CONFIGS.get(part.partition("_")[0], "config.json")


def _is_name(word: Any) -> bool:
    return isinstance(word, str) and word.isidentifier()


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
        config = folder / name / config_file(name)
        if config.parent.is_dir():
            found = read_config(f"model {model}", config)
            if name in expected:
                _check_class(f"model {model}: {config}", found, expected[name])
                _check_types(f"model {model}: {config}", found, expected[name])
    built = kind.skeleton(folder, dtype, max_sequence_length)
    built.check_vae(model)
    # The packaged configs come without vocabularies.
    if not folder.is_relative_to(PACKAGED):
        _check_text_parts(model, folder, kind, named)
    _check_network(model, folder, built)
    return built


def _check_class(where: str, config: dict[str, Any], kind: Any) -> None:
    """Raises ConfigError for the config of another class, such as that of another model's VAE."""
    found = config.get("_class_name", kind.__name__)
    # Schedulers of other names read the same config.
    if issubclass(kind, torch.nn.Module) and found != kind.__name__:
        raise ConfigError(
            f"{where} describes {one_line(found, 40)}, not {kind.__name__}: take the folder from the same model"
        )


def _check_types(where: str, config: dict[str, Any], kind: Any) -> None:
    """Raises ConfigError for a value that is not of the type that diffusers' class takes."""
    for key, hint in typing.get_type_hints(kind.__init__).items():
        if not _fits(config.get(key), hint):
            raise ConfigError(
                f"{where}: {key} {one_line(json.dumps(config[key]), 40)} is not possible: {kind.__name__} takes "
                f"{one_line(hint.__name__ if isinstance(hint, type) else hint)}"
            )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of an annotated type. null always is, as diffusers often leaves it out."""
    inner = typing.get_args(hint)
    if value is None or hint in (Any, type(None)):
        return value is None or hint is Any
    if typing.get_origin(hint) in (tuple, list):
        # diffusers writes tuple[int] for any length.
        return (
            isinstance(value, list)
            and (len(inner) == 1 or ... in inner or len(value) == len(inner))
            and all(_fits(item, inner[0]) for item in value)
        )
    if typing.get_origin(hint) is typing.Literal:
        return value in inner
    if inner:
        return any(_fits(value, part) for part in inner)
    return type(value) in ((int, float) if hint is float else (hint,))


def _check_network(model: str, folder: Path, built: Backbone) -> None:
    """Runs everything once without numbers. Raises ConfigError for parts that do not fit each other or themselves."""
    name = f"model {model}"
    with readable_errors(name, folder / "model_index.json"):
        size = next((size for size in SIZES if _takes(built, size)), 0)
        if not size:
            raise ValueError(f"no picture of {SIZES} pixels a side fits")
    with readable_errors(name, folder / "scheduler" / "scheduler_config.json"):
        sigmas = built.sigmas(4, size, size)
        if not ((sigmas[1:] < sigmas[:-1]).all() and sigmas.min() >= 0 and sigmas.max() < 1.001):
            raise ValueError(
                f"sigmas must fall from 1 to 0, not {' '.join(f'{sigma:.3g}' for sigma in sigmas.tolist())}"
            )
    latent = torch.empty(1, *built.latent_shape(size, size), device="meta")
    with readable_errors(name, folder / "transformer" / "config.json"), torch.no_grad():
        built.keep("", built.blank_conditioning(folder))
        output = built.velocity([""], 1.0)(latent, torch.empty(1, device="meta"))
        if output.shape != latent.shape:
            raise ValueError(f"it makes {list(output.shape)} of latents {list(latent.shape)}")
    with readable_errors(name, folder / "vae" / "config.json"), torch.no_grad():
        pixels = built.vae_pixels(built.unscale(latent))
        if pixels.shape != (1, 3, size, size):
            raise ValueError(f"it makes {list(pixels.shape)} of a picture of {size} x {size}")


def _takes(built: Backbone, size: int) -> bool:
    try:
        return bool(built.latent_shape(size, size))
    except ValueError:
        return False


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
        with readable_errors(f"model {model}", folder / encoder / "config.json"), torch.no_grad():
            built(torch.zeros(1, 2, dtype=torch.long, device="meta"))
        # An encoder that also sees pictures keeps the sizes of its text part apart.
        sizes = built.config.get_text_config().to_dict()
        cls = _class(
            model, tokenizer, named[tokenizer], (transformers.PreTrainedTokenizerBase, transformers.ProcessorMixin)
        )
        found = checked_tokenizer(cls, f"model {model}", folder / tokenizer, sizes["vocab_size"])
        # T5 has no learned positions, and rotary ones, as Qwen's, have no table that could be too short.
        rotary = sizes.get("rope_parameters")
        length, most = found.model_max_length, math.inf if rotary else sizes.get("max_position_embeddings", math.inf)
        if not isinstance(length, int) or not 0 < length <= most:
            raise ConfigError(
                f"model {model}: {folder / tokenizer / 'tokenizer_config.json'}: model_max_length {one_line(length, 20)}, but "
                f"{encoder} takes {most} tokens: take both from the same model"
            )


def _text_encoder(model: str, folder: Path, name: str, entry: tuple[str, str]) -> Any:
    """A text encoder on the meta device, from its config. Raises ConfigError if it cannot be built."""
    kind = _class(model, name, entry, (transformers.PreTrainedModel,))
    with readable_errors(f"model {model}", folder / name / "config.json"), torch.device("meta"):
        return kind(kind.config_class.from_pretrained(folder / name, local_files_only=True))


def _class(model: str, name: str, entry: tuple[str, str], bases: tuple[type, ...]) -> Any:
    """The class of a part. Raises ConfigError unless it is transformers' and derives from one of `bases`."""
    library, wanted = entry
    found = getattr(LIBRARIES[library], wanted, None)
    if isinstance(found, DummyObject):
        # transformers has this in the place of a class whose packages are missing.
        packages = " ".join(found._backends or ())
        raise ConfigError(f"model {model}: its {one_line(name, 60)} needs packages: pip install {packages}")
    if not isinstance(found, type) or not issubclass(found, bases):
        given = one_line(wanted, 60)
        raise ConfigError(
            f"model {model} names {library}'s {given} as its {one_line(name, 60)}, which is not a {bases[0].__name__}"
        )
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
        # Quantised weights have other shapes. The entry alone, without a method, must not turn the comparison off.
        quantised = read_json(f"model {model}", config).get("quantization_config")
        if files and not (isinstance(quantised, dict) and quantised.get("quant_method") in QUANTISED):
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
        if not isinstance(shards, dict) or not all(map(_is_file_name, shards.values())):
            raise ConfigError(f"model {model}: {index} is damaged (no weight_map): download it again")
        return sorted({part / shard for shard in shards.values()})
    if not any(
        (part / f"{old}{end}").is_file() for old in (stem, "pytorch_model") for end in (".bin", ".bin.index.json")
    ):
        raise ConfigError(
            f"model {model} has no weights in {part.name}/ ({whole.name} or {index.name}): the download is not complete; of a "
            "hub repository that has only .bin files, give a copy in a folder"
        )
    return []


def _is_file_name(word: Any) -> bool:
    return isinstance(word, str) and word.isprintable() and Path(word).name == word


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
    # Others are counters of batch norms.
    state = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
    own = {name: list(value.shape) for name, value in state.items()}
    for name in sorted(own.keys() & stored.keys()):
        shape, dtype = stored[name]
        if shape != own[name]:
            raise ConfigError(
                f"{where}: {one_line(name)} is {shape} in the weights, but {own[name]} by config.json: {AGAIN}"
            )
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
            raise ConfigError(f"{where}: {one_line(block)} is in the weights, but not by config.json: {AGAIN}")


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
