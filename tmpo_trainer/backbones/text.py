"""Text features of a whole prompt file: computed once, kept on disk, so that the encoders need no memory in training."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

#: Everything that a transformer gets for one prompt: tensors without a batch dimension, under names that only the
#: backbone's own file interprets.
Conditioning = dict[str, Tensor]

#: The names of the parts of a pipeline that are needed only for text begin with these.
TEXT_PARTS = ("text_encoder", "tokenizer")


def stack(features: Sequence[Conditioning]) -> Conditioning:
    """The features of several prompts as one batch, for backbones whose prompts all have the same shapes."""
    return {name: torch.stack([one[name] for one in features]) for name in features[0]}


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/tmpo_trainer/text`, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tmpo_trainer" / "text"


class TextCache:
    """One safetensors file per prompt, named by a hash of model, prompt and settings.

    Args:
        folder: where the files are; it is made when needed.
        model: the pipeline's folder. The hash covers names, sizes and times of its text encoders' files.
        settings: whatever else the features depend on, e.g. precision and length.
    """

    def __init__(self, folder: Path, model: Path, settings: Sequence[str | int]):
        self.folder = folder
        parts = sorted(path for start in TEXT_PARTS for path in model.glob(f"{start}*/*"))
        files = [(str(path.relative_to(model)), path.stat().st_size, path.stat().st_mtime_ns) for path in parts]
        self._key = json.dumps([files, *settings])

    def path(self, prompt: str) -> Path:
        digest = hashlib.sha256(json.dumps([self._key, prompt]).encode()).hexdigest()
        return self.folder / f"{digest}.safetensors"

    def get(self, prompt: str) -> Conditioning | None:
        """The features of a prompt; None if its file is missing or damaged. A damaged one is then overwritten."""
        try:
            return load_file(self.path(prompt))
        except (OSError, SafetensorError):
            return None

    def put(self, prompt: str, features: Conditioning) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(prompt)
        # Several processes may write the same file.
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({name: value.contiguous() for name, value in features.items()}, temporary)
        temporary.replace(path)


@torch.no_grad()
def features_of(
    prompts: Sequence[str],
    cache: TextCache,
    encode: Callable[[list[str]], list[Conditioning]],
    batch: int = 8,
) -> dict[str, Conditioning]:
    """The features of all prompts, on the CPU: those on disk are read, the others are encoded and written.

    Args:
        encode: computes the features of each given prompt. It is not called if all are on disk.
    """
    found: dict[str, Conditioning] = {}
    missing = []
    for prompt in dict.fromkeys(prompts):
        features = cache.get(prompt)
        if features is None:
            missing.append(prompt)
        else:
            found[prompt] = features
    for first in range(0, len(missing), batch):
        chosen = missing[first : first + batch]
        for prompt, features in zip(chosen, encode(chosen), strict=True):
            found[prompt] = {name: value.cpu() for name, value in features.items()}
            cache.put(prompt, found[prompt])
    return found
