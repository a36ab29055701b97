"""What differs between image models: text encoding, velocity, sigmas, decoding, LoRA targets."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..settings.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from .base import Backbone

#: Files that are no backbones, see `settings.discovery`.
SHARED = ("base", "check", "text")
#: The pipelines that can be trained.
PIPELINES = ("StableDiffusion3Pipeline", "FluxPipeline")
#: What a pipeline needs of a hub repository; single-file checkpoints at the top are as large again.
HUB_FILES = ("model_index.json", "*/*")
#: What tells everything but the weights.
HUB_CONFIGS = ("model_index.json", "*/*.json")
DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"


def is_hub_id(model: str) -> bool:
    """Whether a model setting is `owner/name` and no path that exists."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", model)) and not Path(model).expanduser().exists()


def find_model(model: str, weights: bool = True, transformer: bool = True) -> Path:
    """The local pipeline folder of a model setting; a hub id is looked up in the cache, or downloaded.

    Args:
        weights: without them, only the configs of a hub repository are downloaded: kilobytes.
        transformer: whether its weights are among them.

    Raises:
        ConfigError: before anything heavy is loaded.
    """
    folder = DEMO_MODEL if model == "demo" else Path(model).expanduser()
    if is_hub_id(model):
        folder = _from_hub(
            model, HUB_FILES if weights else HUB_CONFIGS, () if transformer else ("transformer/*.safetensors",)
        )
    index = folder / "model_index.json"
    if not index.is_file():
        what = "is a folder without model_index.json" if folder.is_dir() else "is not a folder"
        raise ConfigError(
            f"model {model} {what}: give `demo`, a local diffusers pipeline folder or a hub id owner/name"
        )
    try:
        name = json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{index} names no _class_name: not a diffusers pipeline folder") from None
    if name not in PIPELINES:
        raise ConfigError(f"model {model} is a {name}: this version trains {' and '.join(PIPELINES)} models")
    return folder


def _from_hub(model: str, files: Sequence[str], without: Sequence[str]) -> Path:
    """The snapshot folder of a hub repository. HF_HOME, HF_TOKEN and HF_HUB_OFFLINE count."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(files), ignore_patterns=list(without)))
    except GatedRepoError:
        raise ConfigError(
            f"model {model} is gated: accept its licence at https://huggingface.co/{model}, then run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"model {model} is neither a folder nor a repository on the hub; a private one needs `hf auth login`"
        ) from None
    except (OSError, ValueError) as error:
        reason = (str(error).split("\n") or [""])[0]
        raise ConfigError(
            f"model {model} is not in the hub cache and cannot be downloaded ({reason}): on a machine that can, run "
            f"`hf download {model} --local-dir DIR`, then give --model DIR"
        ) from None


def _kind(folder: Path) -> type[Backbone]:
    from .flux import FluxBackbone
    from .sd3 import SD3Backbone

    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return FluxBackbone if name == "FluxPipeline" else SD3Backbone


def load_skeleton(model: str, dtype: torch.dtype, max_sequence_length: int) -> Backbone:
    """A model without its weights, see `Backbone.skeleton`. Raises ConfigError for one that cannot be trained."""
    from . import check

    folder = find_model(model, weights=False)
    return check.skeleton(model, folder, _kind(folder), dtype, max_sequence_length)


def load_backbone(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    max_sequence_length: int,
    prompts: Sequence[str] | None = None,
    text_cache: Path | None = None,
    transformer: Path | None = None,
    nf4: bool = False,
    sharded: bool = False,
) -> Backbone:
    """Loads a pipeline folder; see `Backbone.load`. Raises ConfigError for anything that is none."""
    from safetensors import SafetensorError

    from . import check

    skeleton = load_skeleton(model, dtype, max_sequence_length)
    if transformer is not None:
        check.check_transformer(transformer, skeleton, nf4)
    folder = find_model(model, transformer=transformer is None)
    check.check_weights(model, folder, () if transformer is None else ("transformer",))
    try:
        return _kind(folder).load(
            folder, dtype, device, max_sequence_length, prompts, text_cache, transformer, nf4, sharded
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"model {model} cannot be loaded: {' '.join(str(error).split())}") from None
