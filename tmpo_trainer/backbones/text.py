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

#: Tokens `[S, D]` and pooled `[C]` of one prompt.
Features = tuple[Tensor, Tensor]


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/tmpo_trainer/text`, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tmpo_trainer" / "text"


class TextCache:
    """One safetensors file per prompt, named by a hash of model, prompt and settings.

    Args:
        folder: where the files are; made when needed.
        model: the pipeline's folder. Its text encoders and tokenizers count by names, sizes and times of their files.
        settings: whatever else the features depend on, e.g. precision and length.
    """

    def __init__(self, folder: Path, model: Path, settings: Sequence[str | int]):
        self.folder = folder
        parts = sorted(path for pattern in ("text_encoder*", "tokenizer*") for path in model.glob(f"{pattern}/*"))
        files = [(str(path.relative_to(model)), path.stat().st_size, path.stat().st_mtime_ns) for path in parts]
        self._key = json.dumps([files, *settings])

    def path(self, prompt: str) -> Path:
        digest = hashlib.sha256(json.dumps([self._key, prompt]).encode()).hexdigest()
        return self.folder / f"{digest}.safetensors"

    def get(self, prompt: str) -> Features | None:
        """The features of a prompt, or None if they are not there (or the file is damaged: then they are made anew)."""
        try:
            stored = load_file(self.path(prompt))
            return stored["tokens"], stored["pooled"]
        except (OSError, SafetensorError, KeyError):
            return None

    def put(self, prompt: str, features: Features) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(prompt)
        # Several processes may write the same file.
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"tokens": features[0].contiguous(), "pooled": features[1].contiguous()}, temporary)
        temporary.replace(path)


@torch.no_grad()
def features_of(
    prompts: Sequence[str],
    cache: TextCache,
    encode: Callable[[list[str]], tuple[Tensor, Tensor]],
    batch: int = 8,
) -> dict[str, Features]:
    """The features of all prompts, on the CPU: those on disk are read, the others encoded and written.

    Args:
        encode: prompts -> tokens `[P, S, D]` and pooled `[P, C]`; not called if all are on disk.
    """
    found: dict[str, Features] = {}
    missing = []
    for prompt in dict.fromkeys(prompts):
        features = cache.get(prompt)
        if features is None:
            missing.append(prompt)
        else:
            found[prompt] = features
    for first in range(0, len(missing), batch):
        chosen = missing[first : first + batch]
        tokens, pooled = encode(chosen)
        for i, prompt in enumerate(chosen):
            found[prompt] = (tokens[i].cpu(), pooled[i].cpu())
            cache.put(prompt, found[prompt])
    return found
