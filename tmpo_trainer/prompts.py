"""Prompt files and the order in which training takes prompts from them."""

from __future__ import annotations

import random
from pathlib import Path

from tmpo_trainer.config import ConfigError


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file: one per line, blank lines and lines that start with # are skipped.

    Raises:
        ConfigError: the file is missing, unreadable or holds no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"prompt file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt file {path} cannot be read as UTF-8 text: {error}") from None
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ConfigError(f"prompt file {path} is empty: write one prompt per line")
    return prompts


def prompt_index(position: int, count: int, seed: int) -> int:
    """Which of `count` prompts comes at a position of the endless training order: a new shuffle for every pass.

    A pure function, so that a resumed run and any number of ranks agree on the order without keeping state.
    """
    epoch, place = divmod(position, count)
    order = list(range(count))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order[place]
