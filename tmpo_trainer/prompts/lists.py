"""Prompt files, the lists that come with the package, and the order in which training takes prompts from a list."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..settings.errors import ConfigError
from .split import Split

LISTS = Path(__file__).parent

#: Lengths of the generated lists, which are used if no file is given.
GENERATED: dict[Split, int] = {"train": 1500, "heldout": 240}


@dataclass(frozen=True)
class PromptList:
    """Prompts and what scorers need to know about them.

    where: file or origin, for errors. texts: the prompts, in order. metadata: by prompt, for those that have any.
    """

    where: str
    texts: list[str]
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)

    def first(self, count: int | None) -> PromptList:
        """The first `count` prompts; None takes all."""
        return PromptList(self.where, self.texts[:count], self.metadata)


def as_list(prompts: Sequence[str] | PromptList) -> PromptList:
    """A `PromptList` of bare prompts; one that is given is returned unchanged."""
    return prompts if isinstance(prompts, PromptList) else PromptList("prompts", list(prompts))


def about(metadata: Mapping[str, Any], prompts: Sequence[str]) -> list[Any] | None:
    """The metadata of each prompt, None for a prompt without. Returns None if there is no metadata at all."""
    return [metadata.get(prompt) for prompt in prompts] if metadata else None


def read_prompts(path: Path) -> PromptList:
    """The prompts of a file.

    A .jsonl has one object with `prompt` per line; its other keys are the metadata, such as `target` (ocr) or GenEval's
    `tag`, `include` and `exclude`. Any other file has one prompt per line. Blank lines and lines that start with # are
    skipped.

    Raises:
        ConfigError: the file is missing, unreadable or empty, or a line of a .jsonl is not an object with `prompt`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"prompt file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt file {path} cannot be read as UTF-8 text: {error}") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise ConfigError(f"prompt file {path} is empty: write one prompt per line")
    if path.suffix.lower() == ".jsonl":
        return _objects(path, lines)
    return PromptList(str(path), [line for _, line in lines])


def _objects(path: Path, lines: list[tuple[int, str]]) -> PromptList:
    texts: list[str] = []
    metadata: dict[str, dict[str, Any]] = {}
    for number, line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise ConfigError(f"prompt file {path}, line {number}: not JSON ({reason})") from None
        prompt = entry.pop("prompt", None) if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise ConfigError(
                f'prompt file {path}, line {number}: write an object with a "prompt", e.g. {{"prompt": "a"}}'
            )
        prompt = prompt.strip()
        if not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise ConfigError(f"prompt file {path}, line {number}: half of a surrogate pair is not text: remove it")
        if prompt in metadata and metadata[prompt] != entry:
            raise ConfigError(f"prompt file {path}, line {number}: {prompt!r} already has other metadata: keep one")
        texts.append(prompt)
        metadata[prompt] = entry
    return PromptList(str(path), texts, {prompt: entry for prompt, entry in metadata.items() if entry})


def preference(split: Split) -> PromptList:
    """The hand-written prompts, for any reward that has no list of its own."""
    return read_prompts(LISTS / f"preference-{split}.txt")


def from_entries(where: str, entries: Sequence[Mapping[str, Any]]) -> PromptList:
    """A list from objects as in a .jsonl file."""
    rest = {entry["prompt"]: {k: v for k, v in entry.items() if k != "prompt"} for entry in entries}
    return PromptList(where, [entry["prompt"] for entry in entries], rest)


def prompt_index(position: int, count: int, seed: int) -> int:
    """The index of the prompt at a position of the endless training order, which is shuffled for every pass.

    A pure function, so that a resumed run and any number of ranks agree on the order without keeping state.
    """
    epoch, place = divmod(position, count)
    return _order(epoch, count, seed)[place]


@lru_cache(maxsize=2)
def _order(epoch: int, count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


def drawn(prompts: Sequence[str], first: int, last: int, seed: int) -> list[str]:
    """The different prompts at the positions `first` to `last` - 1 of the training order, see `prompt_index`."""
    # Two passes from any position hold all prompts.
    last = min(last, first + 2 * len(prompts))
    return list(dict.fromkeys(prompts[prompt_index(i, len(prompts), seed)] for i in range(first, last)))
