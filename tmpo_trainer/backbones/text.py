"""Text features of prompts: computed once, kept on disk and read when needed; training holds neither encoders nor features."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import let_read
from ..settings.errors import ConfigError, one_line

#: Everything that a transformer gets for one prompt: tensors without a batch dimension, under names that only the
#: backbone's own file interprets.
Conditioning = dict[str, Tensor]

#: The names of the parts of a pipeline that are needed only for text begin with these.
TEXT_PARTS = ("text_encoder", "tokenizer")

#: Changes with what this package makes of the encoders' output.
FORMAT = 1

#: Prompts in one call of the text encoders.
BATCH = 8

GIB = 2**30


def stack(features: Sequence[Conditioning]) -> Conditioning:
    """The features of several prompts as one batch, for backbones whose prompts all have the same shapes."""
    return {name: torch.stack([one[name] for one in features]) for name in features[0]}


def size(features: Conditioning) -> int:
    """Bytes of the features of a prompt."""
    return sum(value.numel() * value.element_size() for value in features.values())


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/tmpo_trainer/text`, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tmpo_trainer" / "text"


class TextCache:
    """One safetensors file per prompt, named by a hash of model, prompt and settings.

    Args:
        folder: where the files are; it is made when needed.
        model: the pipeline's folder. The hash covers names, sizes and times of its text encoders' files, and the versions of
            the libraries.
        settings: whatever else the features depend on, e.g. precision and length.
    """

    def __init__(self, folder: Path, model: Path, settings: Sequence[str | int]):
        self.folder = folder
        parts = sorted(path for start in TEXT_PARTS for path in model.glob(f"{start}*/*"))
        files = [(str(path.relative_to(model)), path.stat().st_size, path.stat().st_mtime_ns) for path in parts]
        # diffusers' pipelines decide on templates and layers, and this package on what it does with their output.
        versions = [f"{name} {version(name)}" for name in ("diffusers", "transformers")]
        self._key = json.dumps([FORMAT, files, versions, *settings])

    def path(self, prompt: str) -> Path:
        digest = hashlib.sha256(json.dumps([self._key, prompt]).encode()).hexdigest()
        return self.folder / f"{digest}.safetensors"

    def get(self, prompt: str) -> Conditioning | None:
        """The features of a prompt, mapped into memory; None if its file is missing or damaged."""
        try:
            return load_file(self.path(prompt))
        except (OSError, SafetensorError):
            return None

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """The different prompts whose files are missing or cut short."""
        return [prompt for prompt in dict.fromkeys(prompts) if not self._whole(prompt)]

    def _whole(self, prompt: str) -> bool:
        try:
            # It compares the file's size with its header.
            with safe_open(self.path(prompt), "pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def check_room(self, count: int, size: int) -> None:
        """Checks that the features of `count` more prompts, at least `size` bytes each, can be written. It makes no folder.

        Raises:
            ConfigError: the folder cannot be written, or its disk is too small.
        """
        if not count:
            return
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                free = shutil.disk_usage(existing).free
        except OSError as error:
            raise ConfigError(
                f"--text-cache {self.folder}: text features cannot be written there ({error.strerror}): give a folder that "
                "can be written"
            ) from None
        if count * size > free:
            raise ConfigError(
                f"--text-cache {self.folder}: the text features of {count:,} prompts need {count * size / GIB:.2f} GiB, and "
                f"its disk has {free / GIB:.2f} GiB free: give a folder on a larger disk, or fewer prompts"
            )

    def put(self, prompt: str, features: Conditioning) -> None:
        """Writes the features of a prompt; a failure leaves no file. Raises ConfigError."""
        path = self.path(prompt)
        # Several processes may write the same file, also of other machines, or containers, in which all have the same number.
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({name: value.cpu().contiguous() for name, value in features.items()}, temporary)
            # Other users may share the folder.
            let_read(temporary)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            if self._whole(prompt):
                # Another user's, in a folder where only its owner may replace a file.
                return
            raise ConfigError(
                f"--text-cache {self.folder}: text features cannot be written ({one_line(error)}): make room or give another "
                "folder; the prompts that are done need not be encoded again"
            ) from None
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def say_cut(pipeline: Any, prompts: Sequence[str], most: int) -> None:
    """One line, by one process of a machine, about prompts with more than `most` tokens: the model does not see their end.

    The tokens of a chat template, which some models put around a prompt, are not counted.
    """
    # Of several tokenizers the last is that of the long texts. CLIP always sees 77 tokens.
    tokenizer = pipeline.components[max(name for name in pipeline.components if name.startswith("tokenizer"))]
    if tokenizer is None or not most or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    different = set(prompts)
    count = sum(len(tokenizer(prompt)["input_ids"]) > most for prompt in different)
    if count:
        print(
            f"tmpo_trainer: {count} of {len(different)} prompts have more than {most} tokens, and the model does not see their "
            "end (--max-sequence-length; rewards see all of it)",
            file=sys.stderr,
        )


@torch.no_grad()
def fill(
    cache: TextCache, prompts: Sequence[str], encode: Callable[[list[str]], list[Conditioning]], batch: int = BATCH
) -> None:
    """Encodes the prompts whose features are not on disk, and writes them.

    Args:
        encode: computes the features of each given prompt. It is not called if all are on disk.

    Raises:
        ConfigError: the features cannot be written. Those of earlier prompts stay.
    """
    for prompt, features in in_batches(cache.missing(prompts), encode, batch):
        cache.put(prompt, features)


def in_batches(
    prompts: Sequence[str], encode: Callable[[list[str]], list[Conditioning]], batch: int = BATCH
) -> Iterator[tuple[str, Conditioning]]:
    """Each prompt with its features, from batches of one size.

    Batches of other sizes are rounded otherwise, and features must not depend on how many prompts are missing: a resumed run
    misses others.
    """
    for first in range(0, len(prompts), batch):
        chosen = list(prompts[first : first + batch])
        yield from zip(chosen, encode(chosen + chosen[-1:] * (batch - len(chosen))), strict=False)
