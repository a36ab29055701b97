"""Files of the Hugging Face hub: downloading and checking them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .settings.errors import ConfigError, one_line


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
    wanted = path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", wanted):
        with path.open("rb") as file:
            found, kind = hashlib.file_digest(file, "sha256").hexdigest(), "SHA-256"
    elif re.fullmatch("[0-9a-f]{40}", wanted):
        found, kind = git_blob(path.read_bytes()), "git id"
    else:
        return None
    if found != wanted:
        raise ConfigError(f"{path} is damaged ({kind} {found}, the hub has {wanted}): delete it and fetch again")
    return kind


def hub_file(what: str, repository: str, name: str, flag: str, kind: str | None = None) -> Path:
    """Finds a file of a hub repository in the cache, or downloads it. HF_HOME, HF_TOKEN and HF_HUB_OFFLINE apply.

    Args:
        what: the part that needs the file, for errors. flag: takes a path in its place. kind: `dataset`; None for a model.

    Raises:
        ConfigError: it is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    try:
        return Path(hf_hub_download(repository, name, repo_type=kind))
    except GatedRepoError:
        raise ConfigError(
            f"{what}: {repository} is gated: accept its licence at https://huggingface.co/{repository}, then run "
            "`hf auth login`"
        ) from None
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).split("\n") or [""])[0]
        raise ConfigError(
            f"{what} needs {name} of https://huggingface.co/{repository}, which is not in the hub's cache and cannot be "
            f"downloaded ({reason}): on a machine that can, run `hf download {repository} {name}`, then copy it here and "
            f"give {flag}, or copy its whole cache to {hub_cache()}"
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
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{what}: {path} cannot be loaded: {one_line(error)}") from None
