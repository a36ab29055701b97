"""Prompt files, the lists that come with the package, and the order in which training takes prompts from a list."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ..settings.errors import ConfigError, one_line, quoted
from ..settings.text import decode
from .split import Split

LISTS = Path(__file__).parent

#: Characters of a prompt: many times what the longest text encoder reads (512 tokens).
LONGEST = 10_000
#: Control characters, which terminals obey and text encoders do not know, and halves of surrogate pairs. Tabs and ends of
#: lines may be part of a prompt. So may the direction marks of Arabic and Hebrew, which are not control characters in Unicode.
NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")

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
    """The prompts of a file, by its ending.

    - `.txt`, or no ending (a number is none): one prompt per line. Blank lines and lines that start with # are skipped.
    - `.jsonl`: an object with `prompt` per line, with blank lines and # as above.
    - `.json`: a list of prompts, or of objects with `prompt`.
    - `.csv`, `.tsv`: a table whose first line names a column `prompt` or `prompts`, in any case. A cell with the separator,
      a newline or quotes in it stands between double quotes.

    The objects' other keys, or the table's other columns, are the metadata, such as `target` (ocr) or GenEval's `tag`,
    `include` and `exclude`. Those of a table are strings, and an empty cell is left out.

    Raises:
        ConfigError: the file is missing, unreadable, empty, not what its ending says, or has a prompt that is no text. It
            names the file, the line or item, and the fix.
    """
    kind = "" if path.suffix[1:].isdigit() else path.suffix.lower()
    if kind not in READERS:
        raise ConfigError(f"prompt file {path}: {kind} is not read, give a .txt, .jsonl, .json, .csv or .tsv")
    try:
        text = decode(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"prompt file {path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"prompt file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"prompt file {path} cannot be read as UTF-8 text: {error}") from None
    texts: list[str] = []
    metadata: dict[str, dict[str, Any]] = {}
    try:
        for where, entry in READERS[kind](text):
            prompt = _prompt(where, entry.pop("prompt", None))
            if metadata.setdefault(prompt, entry) != entry:
                raise ValueError(f"{where}: {quoted(prompt)} already has other metadata: keep one")
            texts.append(prompt)
    except ValueError as error:
        raise ConfigError(f"prompt file {path}, {error}") from None
    if not texts:
        raise ConfigError(f"prompt file {path} is empty: write one prompt per line")
    return PromptList(str(path), texts, {prompt: entry for prompt, entry in metadata.items() if entry})


def _prompt(where: str, given: Any) -> str:
    """A prompt without the white space around it. Raises ValueError for what is none."""
    if not isinstance(given, str) or not given.strip():
        raise ValueError(f'{where}: write an object with a "prompt", e.g. {{"prompt": "a"}}')
    prompt = given.strip()
    if len(prompt) > LONGEST:
        raise ValueError(f"{where}: a prompt of {len(prompt)} characters: at most {LONGEST}")
    found = NOT_TEXT.search(prompt)
    if found:
        raise ValueError(f"{where}: the character U+{ord(found[0]):04X} is not text: remove it")
    return prompt


#: What a file yields: where it is in the file, for errors, and the object with `prompt`.
Entries = Iterator[tuple[str, dict[str, Any]]]


def _lines(text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"line {number}", line.strip()


def _from_text(text: str) -> Entries:
    lines = list(_lines(text))
    # The first lines show what else it may be. A prompt such as [photo] or {{dog}} is neither.
    if lines and (_is_json(lines[0][1]) or _is_json(text)):
        raise ValueError(f"{lines[0][0]}: this is JSON: name the file .json, or .jsonl if every line is an object")
    for kind, separator in SEPARATORS.items() if len(lines) > 1 else ():
        (where, first), (_, second) = lines[:2]
        named = any(cell.strip(' "').casefold() in COLUMN for cell in first.split(separator))
        if named and second.count(separator) >= first.count(separator):
            raise ValueError(f"{where}: this is the first line of a table: name the file {kind}")
    for where, line in lines:
        yield where, {"prompt": line}


def _is_json(text: str) -> bool:
    """Whether a text is a list or an object of JSON, or the first line of one that has more lines."""
    if not text.lstrip().startswith(("[", "{")):
        return False
    # Also if the rest of it is broken.
    if re.match(r'[\[{]\s*($|\{?\s*"\w+"\s*:|"[^"]*",\s*$)', text):
        return True
    try:
        return isinstance(json.loads(text), (list, dict))
    except (ValueError, RecursionError):
        return False


def _from_lines_of_json(text: str) -> Entries:
    for where, line in _lines(text):
        entry = _json(line, where)
        yield where, entry if isinstance(entry, dict) else {}


def _from_json(text: str) -> Entries:
    if not text.strip():
        return
    found = _json(text)
    if not isinstance(found, list):
        raise ValueError('line 1: write a list of prompts or of objects with a "prompt", or name the file .jsonl')
    for i, entry in enumerate(found, 1):
        yield f"item {i}", {"prompt": entry} if isinstance(entry, str) else entry if isinstance(entry, dict) else {}


def _json(text: str, where: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = ", is it a .jsonl?" if error.msg == "Extra data" and not where else ""
        raise ValueError(f"{where or f'line {error.lineno}'}: not JSON ({error.msg}{hint})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where or 'line 1'}: not JSON ({one_line(error)})") from None


def _from_table(text: str, separator: str) -> Entries:
    # Strict, because otherwise the quotes around the first words of a cell would vanish: they say what ocr shall read.
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header = [name.strip() for name in next((row for row in rows if any(row)), [])]
        if not header:
            return
        named = [name for name in header if name]
        places = [i for i, name in enumerate(header) if name.casefold() in COLUMN]
        if len(places) != 1 or len(set(named)) < len(named):
            shown = one_line(", ".join(named), 80)
            raise ValueError(f"line {rows.line_num}: name one column `prompt` and no two alike, not {shown}")
        for row in rows:
            where = f"line {rows.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if len(row) > len(header):
                raise ValueError(
                    f"{where}: {len(row)} cells for {len(header)} columns: put text with a separator in quotes"
                )
            cells = {name: cell for name, cell in zip(header, row, strict=False) if name and cell.strip()}
            prompt = cells.pop(header[places[0]], None)
            if prompt is None:
                raise ValueError(f"{where}: the prompt is empty")
            yield where, {**cells, "prompt": prompt}
    except csv.Error as error:
        raise ValueError(f'line {rows.line_num}: {error}: write a cell with quotes as "a ""red"" dog"') from None


#: The names of a table's column of prompts, folded: DrawBench writes Prompts, PartiPrompts writes Prompt.
COLUMN = ("prompt", "prompts")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
READERS: dict[str, Callable[[str], Entries]] = {
    "": _from_text,
    ".txt": _from_text,
    ".jsonl": _from_lines_of_json,
    ".json": _from_json,
    **{kind: partial(_from_table, separator=separator) for kind, separator in SEPARATORS.items()},
}


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
