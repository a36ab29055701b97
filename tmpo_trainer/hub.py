"""Files of the Hugging Face hub: downloading and checking them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .settings.errors import ConfigError, one_line

#: More layers, a larger whole number or a longer list are a damaged config. They would take the memory or hours.
MOST_LAYERS, MOST, LONGEST = 200, 10_000_000, 1000

#: Other limits. A tokenizer's length is checked against its text encoder.
LIMITS = {"extra_ids": LONGEST, "model_max_length": math.inf, "rope_theta": math.inf}

#: Entries by which transformers loads code from a repository, if they name one.
CODE = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")

#: The numbers of layers that cannot be 0.
DEPTH = ("num_layers", "num_hidden_layers")


def git_blob(content: bytes) -> str:
    """The id that git gives a file with this content (SHA-1)."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def verify(path: Path) -> str | None:
    """Checks a cached file against the hash that the hub gave: SHA-256 for large files, git's id for small ones.

    Returns:
        the kind of hash, or None if the cache keeps no hash (without symbolic links).

    Raises:
        ConfigError: the file has another hash.
    """
    # The name of the first link's target: the blob may itself be a link, to a store that names files by another hash.
    wanted = Path(os.readlink(path)).name if path.is_symlink() else path.name
    if re.fullmatch("[0-9a-f]{64}", wanted):
        with path.open("rb") as file:
            found, kind = hashlib.file_digest(file, "sha256").hexdigest(), "SHA-256"
    elif re.fullmatch("[0-9a-f]{40}", wanted):
        found, kind = git_blob(path.read_bytes()), "git id"
    else:
        return None
    if found != wanted:
        raise ConfigError(f"{path} is damaged ({kind} {found}, the hub has {wanted}): {_again(path)}")
    return kind


def _again(path: Path) -> str:
    """How to download a cached file anew. If it is deleted, the hub's library links to the same content again."""
    for place, folder in enumerate(path.parts):
        kind, _, repository = folder.partition("--")
        if kind in ("models", "datasets") and path.parts[place + 1 : place + 2] == ("snapshots",):
            name = "/".join(path.parts[place + 3 :])
            more = " --repo-type dataset" if kind == "datasets" else ""
            return f"run `hf download {repository.replace('--', '/')} {name} --force-download{more}`"
    return "delete it and fetch again"


def hub_file(what: str, repository: str, name: str, flag: str, kind: str | None = None) -> Path:
    """Finds a file of a hub repository in the cache, or downloads it. HF_HOME, HF_TOKEN and HF_HUB_OFFLINE apply.

    Args:
        what: the part that needs the file, for errors. flag: takes a path in its place. kind: `dataset`; None for a model.

    Raises:
        ConfigError: it is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HTTPError

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
    more = " --repo-type dataset" if kind == "dataset" else ""
    try:
        return Path(hf_hub_download(repository, name, repo_type=kind))
    except GatedRepoError:
        raise ConfigError(
            f"{what}: {repository} is gated: accept its licence at {page}, then run `hf auth login`"
        ) from None
    # A transfer that breaks off is a RuntimeError of hf_xet, or an HTTPError.
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        reason = one_line(str(error).partition("\n")[0])
        raise ConfigError(
            f"{what} needs {name} of {page}, which is not in the hub's cache and cannot be downloaded ({reason}): on a "
            f"machine that can, run `hf download {repository} {name}{more}`, then copy it here and give {flag}, or copy its "
            f"whole cache to {hub_cache()}"
        ) from None


def hub_cache() -> Path:
    """Where the hub's files are kept: under HF_HOME, or HF_HUB_CACHE."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


@contextmanager
def readable_errors(what: str, path: Path) -> Iterator[None]:
    """Turns a library's error about a path into a ConfigError of one line."""
    try:
        yield
    except ConfigError:
        raise
    # tokenizers raises bare Exceptions, and the errors of transformers' configs derive from nothing narrower.
    except Exception as error:
        unclear = isinstance(error, LookupError) or not str(error)
        raise ConfigError(f"{what}: {path} cannot be loaded: {one_line(repr(error) if unclear else error)}") from None


def read_json(what: str, path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError if the file is missing or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{what}: {path} cannot be read ({error.strerror}): download it again") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what}: {path} is not JSON ({one_line(error)}): download it again") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{what}: {path} does not hold a JSON object: download it again")
    return found


def read_config(what: str, path: Path) -> dict[str, Any]:
    """The object in a config. Raises ConfigError if it cannot be read, or has a number that no model has."""
    found = read_json(what, path)
    left: list[tuple[str, Any]] = list(found.items())
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += ((key, item) for item in value[: LONGEST + 1])
        if key in CODE and isinstance(value, str) and "/" in value:
            raise ConfigError(f"{what}: {path}: {key} {one_line(value, 40)} names code on the hub: remove the entry")
        many = isinstance(value, list) and len(value) > LONGEST
        least, most = (int(key in DEPTH), MOST_LAYERS) if "layers" in key else (-MOST, LIMITS.get(key, MOST))
        if many or (isinstance(value, (int, float)) and not least <= value <= most):
            raise ConfigError(
                f"{what}: {path}: {one_line(key, 40)} {one_line(value, 40)} is not possible: download it again"
            )
    return found


def checked_tokenizer(kind: Any, what: str, folder: Path, rows: int) -> Any:
    """A tokenizer in a folder, whose vocabulary has been checked.

    Args:
        kind: transformers' class, which may be that of a processor of text and pictures. rows: see `check_vocabulary`.

    Raises:
        ConfigError: it cannot be loaded, or its vocabulary is not the text encoder's.
    """
    from transformers import ProcessorMixin

    with readable_errors(what, folder):
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = tokenizer.tokenizer
    check_vocabulary(what, folder, tokenizer, rows)
    return tokenizer


def check_vocabulary(what: str, folder: Path, tokenizer: Any, rows: int) -> None:
    """Checks that a tokenizer knows the text encoder's words.

    Without the file of the vocabulary, transformers makes a tokenizer that knows no word, and says nothing. All prompts
    would then be the same.

    Args:
        rows: of the text encoder's embedding. Some encoders have a few rows more than words: T5 32,128 for 32,100.

    Raises:
        ConfigError: the vocabulary is missing, is not complete, or is another model's.
    """
    with readable_errors(what, folder):
        added = tokenizer.get_added_vocab()
        numbers = [number for word, number in tokenizer.get_vocab().items() if word not in added]
        # Begin, end and padding alone.
        marks = tokenizer("", padding="max_length", truncation=True, max_length=4)["input_ids"]
    if len(numbers) < 0.8 * rows or max([*numbers, *marks]) >= rows:
        raise ConfigError(
            f"{what}: the tokenizer in {folder} knows {len(numbers)} words with numbers up to {max([*numbers, *marks])}, its "
            f"text encoder {rows} words: the vocabulary (tokenizer.json, or vocab.json and merges.txt, spiece.model, "
            "vocab.txt) is missing or is another model's: download the folder again"
        )


def checked_model(kind: Any, what: str, folder: Path, **options: Any) -> Any:
    """A transformers model in a folder. Weights that its file lacks would be random.

    Args:
        kind: transformers' class. options: for its `from_pretrained`.

    Raises:
        ConfigError: it cannot be loaded, is of another kind, or a weight is missing.
    """
    own = kind.config_class.model_type
    given = read_config(what, folder / "config.json").get("model_type", own)
    if given != own:
        # transformers would leave out what the class does not know, and only say so in its log.
        raise ConfigError(f"{what}: {folder} holds a model of type {one_line(given, 40)}, not {own}: give another one")
    with readable_errors(what, folder):
        model, report = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    missing = sorted(report["missing_keys"] & dict(model.named_parameters()).keys())
    if missing:
        raise ConfigError(f"{what}: {folder} is not a complete {kind.__name__} ({missing[0]} is missing)")
    return model
