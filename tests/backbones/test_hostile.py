"""A damaged or made-up config never ends in a traceback: FUZZ changes at random places, by default 100."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tmpo_trainer.backbones import check_model
from tmpo_trainer.settings.errors import ConfigError

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 1000, 10**9, 10**30, -(10**12), 0.5, 1e308, float("nan"), float("inf"), "", "12", "x",
    "\x1b[31mred", "../../etc/passwd", "é" * 1000, [], [1], [None], [[1]], ["os", "system"], ["diffusers", "UNet2DModel"],
    list(range(5000)), {}, {"a": 1},
]  # fmt: skip
FILES = [b"", b"null", b"[1]", b"{", b"\xff\xfe{}", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to the first values inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*at, key)
        yield from places(item, (*at, key))


def damage(file: Path, chance: random.Random) -> object:
    """Changes a file and returns what was changed."""
    if chance.random() < 0.1:
        content = chance.choice([None, *FILES])
        file.unlink() if content is None else file.write_bytes(content)
        return content and content[:20]
    whole = json.loads(file.read_text())
    *path, last = chance.choice(list(places(whole)))
    value = whole
    for key in path:
        value = value[key]
    new = chance.choice([*VALUES, "gone"])
    if new == "gone":
        del value[last]
    else:
        value[last] = new
    file.write_text(json.dumps(whole))
    return *path, last, new


def test_a_damaged_config_is_one_line(
    tiny_flux: Callable[[bool], Path], tiny_sd35: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chance = random.Random(0)
    refused = 0
    count = int(os.environ.get("FUZZ", "100"))
    for _ in range(count):
        shutil.rmtree("model", ignore_errors=True)
        shutil.copytree(chance.choice([tiny_flux(True), tiny_sd35]), "model")
        # A change of one among hundreds of words is less interesting.
        files = [file for file in sorted(Path("model").rglob("*.json")) if file.name != "tokenizer.json"]
        file = chance.choice(files)
        changed = damage(file, chance)
        try:
            check_model("model")
        except ConfigError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 1000, (file, changed, str(error))
        except Exception as error:
            raise AssertionError(f"{file}: {changed} gives {error!r}") from error
    assert refused > count / 2
    assert torch.get_default_dtype() == torch.float32
