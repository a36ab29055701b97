"""What differs between image models: text encoding, velocity, sigmas, decoding, LoRA targets.

Every file here is a backbone, except those in `SHARED`. It declares the class for each pipeline that it trains, by the
`_class_name` in the pipeline's model_index.json: `PIPELINES = {"FluxPipeline": FluxBackbone}`. A new backbone needs no
other change, see `settings.discovery`.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..hub import read_json, readable_errors
from ..settings import discovery
from ..settings.errors import ConfigError, one_line
from ..settings.paths import expanded

if TYPE_CHECKING:
    import torch

    from .base import Backbone, LoadOptions

#: Files that are not backbones, see `settings.discovery`.
SHARED = ("base", "check", "decoder", "text")
#: The files that are taken of a tokenizer or scheduler on the hub: configs, vocabulary and chat template.
HUB_CONFIGS = ("*.json", "*.txt", "*.model", "*.jinja")
#: How the names of parts with weights begin, and the configs that are taken of them.
MODELS = ("transformer", "vae", "text_encoder")
MODEL_CONFIGS = ("config.json", "model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")
#: Their weights, without other precisions (`model.fp16.safetensors`), which nothing reads.
HUB_WEIGHTS = tuple(
    f"{stem}{ending}"
    for stem in ("model", "diffusion_pytorch_model")
    for ending in (".safetensors", "-*-of-*.safetensors")
)
DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"
#: The configs of the models in docs/models.md, a folder `owner--name` each: as on the hub, without what only weights need.
PACKAGED = Path(__file__).parent / "configs"


def is_hub_id(model: str) -> bool:
    """Whether a model setting is `owner/name` and not an existing path."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", model)) and not Path(model).expanduser().exists()


def find_model(model: str, weights: bool = True, transformer: bool = True) -> Path:
    """The local pipeline folder of a model setting; a hub id is looked up in the cache, or downloaded.

    Args:
        weights: without them, only the configs of a hub repository are downloaded: kilobytes.
        transformer: whether its weights are among them.

    Raises:
        ConfigError: the model cannot be found or trained. It is raised before anything large is loaded.
    """
    folder = DEMO_MODEL if model == "demo" else Path(expanded(model))
    if is_hub_id(model):
        folder = _from_hub(model, weights, transformer)
    index = folder / "model_index.json"
    if not index.is_file():
        what = "is a folder without model_index.json" if folder.is_dir() else "is not a folder"
        raise ConfigError(
            f"model {model} {what}: give `demo`, a local diffusers pipeline folder or a hub id owner/name"
        )
    _backbone(model, folder)
    return folder


def find_configs(model: str) -> Path:
    """A local folder with the configs of a model setting, for what needs no weights.

    Those of a hub id come from the hub's cache, otherwise from this package, and are downloaded only if neither has them.

    Raises:
        ConfigError: the model cannot be found or trained.
    """
    folder = _cached(model) or packaged(model) if is_hub_id(model) else None
    return find_model(str(folder or model), weights=False)


def packaged(model: str) -> Path | None:
    """The folder with the configs of a hub id that travel with this package, if they do."""
    folder = PACKAGED / model.replace("/", "--")
    return folder if folder.is_dir() else None


def _cached(model: str) -> Path | None:
    """The snapshot folder of a hub repository, if the hub's cache has the configs of all its parts."""
    from huggingface_hub import try_to_load_from_cache

    from .check import config_file, parts

    index = try_to_load_from_cache(model, "model_index.json")
    if not isinstance(index, str):
        return None
    folder = Path(index).parent
    complete = all((folder / part / config_file(part)).is_file() for part in parts(model, folder))
    return folder if complete else None


def _from_hub(model: str, weights: bool, transformer: bool) -> Path:
    """The snapshot folder of a hub repository. HF_HOME, HF_TOKEN and HF_HUB_OFFLINE apply."""
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        index = Path(hf_hub_download(model, "model_index.json"))
        folder = Path(snapshot_download(model, allow_patterns=hub_files(model, index.parent, weights, transformer)))
        # A run would notice only when it loads them. Every model's VAE has weights.
        if constants.HF_HUB_OFFLINE and not any((folder / "vae").glob("diffusion_pytorch_model*")):
            raise _not_here(f"the weights of model {model} are", model, "HF_HUB_OFFLINE is set")
        return folder
    except ConfigError:
        raise
    except GatedRepoError:
        raise ConfigError(
            f"model {model} is gated: accept its licence at https://huggingface.co/{model}, then run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"model {model} is neither a folder nor a repository on the hub; a private one needs `hf auth login`"
        ) from None
    # A transfer that breaks off is a RuntimeError of hf_xet, or an HTTPError.
    except (OSError, ValueError, EntryNotFoundError, RuntimeError, HTTPError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise ConfigError(
                f"model {model} has no model_index.json on the hub: give a repository with a diffusers pipeline"
            ) from None
        raise _not_here(f"model {model} is", model, one_line(str(error).partition("\n")[0])) from None


def _not_here(what: str, model: str, reason: str) -> ConfigError:
    without = "; --dry-run needs no download" if packaged(model) else ""
    return ConfigError(
        f"{what} not in the hub cache and cannot be downloaded ({reason}): on a machine that can, run "
        f"`hf download {model} --local-dir DIR`, then give --model DIR{without}"
    )


def hub_files(model: str, folder: Path, weights: bool, transformer: bool) -> list[str]:
    """Patterns of the files that a pipeline needs of its hub repository.

    Repositories also hold the same weights in other precisions and in single files for other programs.

    Args:
        folder: holds the repository's model_index.json. weights, transformer: see `find_model`.
    """
    from .check import parts

    found = ["model_index.json"]
    for part in parts(model, folder):
        with_weights = weights and (transformer or part != "transformer")
        # Of a model nothing else is read, and a cache that diffusers has filled does not hold it.
        configs = MODEL_CONFIGS if part.startswith(MODELS) else HUB_CONFIGS
        found += [f"{part}/{pattern}" for pattern in (*configs, *(HUB_WEIGHTS if with_weights else ()))]
    return found


def _backbone(model: str, folder: Path) -> type[Backbone]:
    """The class that trains a pipeline folder. Raises ConfigError if there is none."""
    index = folder / "model_index.json"
    pipeline = read_json(f"model {model}", index).get("_class_name")
    if not isinstance(pipeline, str):
        raise ConfigError(f"{index} has no _class_name: give a diffusers pipeline folder")
    for name in discovery.names("backbones"):
        spec = importlib.util.find_spec(f"{__name__}.{name.replace('-', '_')}")
        # A file that never mentions the pipeline does not train it and is not imported.
        if spec is not None and spec.origin and pipeline in Path(spec.origin).read_text(encoding="utf-8"):
            declared: dict[str, type[Backbone]] = discovery.load("backbones", name).PIPELINES
            if pipeline in declared:
                return declared[pipeline]
    known = [kind for name in discovery.names("backbones") for kind in discovery.load("backbones", name).PIPELINES]
    *others, last = known
    raise ConfigError(
        f"model {model} is a {one_line(pipeline)}: this version trains {', '.join(others)} and {last} models"
    )


def load_skeleton(model: str, dtype: torch.dtype, max_sequence_length: int) -> Backbone:
    """A model without its weights, see `Backbone.skeleton`. Raises ConfigError for one that cannot be trained."""
    from . import check

    folder = find_model(model, weights=False)
    return check.skeleton(model, folder, _backbone(model, folder), dtype, max_sequence_length)


def check_model(model: str) -> Path:
    """Downloads a model if it is on the hub, and checks its files. Raises ConfigError for one that cannot be trained.

    Returns:
        its folder.
    """
    import torch

    from . import check

    folder = find_model(model)
    # Some models refuse a length of 0.
    check.check_weights(model, folder, load_skeleton(model, torch.float32, 1))
    return folder


def load_backbone(model: str, options: LoadOptions, skeleton: Backbone | None = None) -> Backbone:
    """Loads a model, after the checks that need no weights. Raises ConfigError for one that cannot be loaded.

    Args:
        skeleton: of the same model and options, where there is one already: making it takes about a second.
    """
    from . import check

    skeleton = skeleton or load_skeleton(model, options.dtype, options.max_sequence_length)
    if options.transformer is not None:
        check.check_transformer(options.transformer, skeleton, options.nf4)
    encode_text(model, skeleton, options)
    folder = _with_weights(model, skeleton, options)
    with readable_errors("model", folder):
        return type(skeleton).load(folder, options)


def encode_text(model: str, skeleton: Backbone, options: LoadOptions, share: slice = slice(None)) -> None:
    """Encodes the prompts of `options` that the text cache lacks, for a model that frees its text encoders.

    Args:
        share: of the prompts, those that this process encodes.

    Raises:
        ConfigError: the text cache cannot be written, which is checked first, or the text encoders cannot be loaded.
    """
    if check_text_cache(model, skeleton, options):
        folder = _with_weights(model, skeleton, options)
        with readable_errors("model", folder):
            skeleton.encode_text(_texts(options)[share], folder, options)


def check_text_cache(model: str, skeleton: Backbone, options: LoadOptions) -> int:
    """Checks that the text features of the prompts of `options` can be written; nothing is loaded or made.

    Returns:
        the number of prompts that must be encoded before the model is loaded: 0 for one that keeps its text encoders.

    Raises:
        ConfigError: the features cannot be written, or need more room than the disk has.
    """
    folder = find_model(model, weights=False)
    cache = skeleton.text_cache(folder, options)
    if cache is None:
        return 0
    missing = len(cache.missing(_texts(options)))
    # How much features that vary in length take is known only afterwards, and less than the most.
    cache.check_room(missing, 0 if skeleton.text_varies else skeleton.text_bytes(folder))
    return missing


def _texts(options: LoadOptions) -> list[str]:
    """The different prompts of a run, and the empty one, which guidance may need."""
    return list(dict.fromkeys([*(options.prompts or ()), ""]))


def _with_weights(model: str, skeleton: Backbone, options: LoadOptions) -> Path:
    """The model's folder, with the weights that it needs. Raises ConfigError if any are missing."""
    from . import check

    own = options.transformer is None
    folder = find_model(model, transformer=own)
    check.check_weights(model, folder, skeleton, () if own else ("transformer",))
    return folder
