"""Hostile settings and prompt files: every one is read, or refused in one short line, without code being run.

`FUZZ=3000 pytest tests/settings/test_hostile.py` tries 3000 of each kind.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from tmpo_trainer.prompts.lists import read_prompts
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.settings.presets import make_config, read_yaml, to_yaml

EXAMPLES = int(os.environ.get("FUZZ", "150"))
SECONDS, LINE = 10, 1000

#: What mutations insert: what YAML, JSON and CSV give a meaning to, and what text files break on.
SCRAPS = [
    *(b"[", b"]", b"{", b"}", b": ", b"- ", b"&a ", b"*a", b"<<: *a", b"!!python/object/apply:os.system ['touch pwned']"),
    *(b"!!binary ", b"!!set ", b"!!timestamp ", b"? ", b"|\n", b">\n", b"%YAML 1.1\n", b"---\n", b"...\n", b"\t", b"# ", b"'"),
    *(b'"', b"\\", b"\\u0000", b"\\ud800", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xfe\xff", b"\x80", b"\x1b[31m", b"\r"),
    *(b"\n", b",", b";", b"~", b"null", b"NaN", b".nan", b"-.inf", b"1e999", b"-1", b"0", b"true", b"1_000", b"0x7fffffffff"),
    *(b"9" * 5000, b"[" * 3000, b"{a: " * 2000, b"a" * 100_000, b"- " * 2000, b'{"prompt": ' * 1000, b"\xe2\x80\xae"),
    *(b"prompt", b"learning_rate: ", b"reward: ", b"method: ", b"branch_early: ", b"resolution: ", b"~/x", b"../../x"),
]  # fmt: skip


def attempt(read: object, file: Path, data: bytes) -> bool:
    """Whether a file is refused. Fails the test unless the refusal is one short line, and all of it quick."""
    file.write_bytes(data)
    start = time.monotonic()
    try:
        read(file)  # type: ignore[operator]
        refused = False
    except ConfigError as error:
        refused = True
        line = str(error)
        assert len(line) < LINE and line.isprintable(), line[:2000]
    assert time.monotonic() - start < SECONDS
    return refused


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield
    assert not list(Path().iterdir())


def test_settings(tmp_path: Path, mutate: Any) -> None:
    source, file = random.Random(0), tmp_path / "settings.yaml"
    whole = to_yaml(make_config([])).encode()
    short = b"learning_rate: 1e-4\nreward: [shapes, ocr]\nbranch_early: [1, 2]\nmethod: gardo\n"
    refused = sum(
        attempt(
            lambda path: make_config([(str(path), read_yaml(path))]),
            file,
            mutate(source, source.choice([whole, short]), SCRAPS),
        )
        for _ in range(EXAMPLES)
    )
    assert refused > 0


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".csv", ".tsv"])
def test_prompt_files(tmp_path: Path, mutate: Any, ending: str) -> None:
    source, file = random.Random(ending), tmp_path / f"prompts{ending}"
    valid = {
        ".txt": b"# comment\na red circle\ntwo blue squares\n" * 3,
        ".jsonl": b'{"prompt": "a sign", "target": "OPEN"}\n{"prompt": "b", "include": [{"class": "cat", "count": 1}]}\n',
        ".json": b'["a red circle", {"prompt": "a sign", "target": "OPEN"}]',
        ".csv": b'prompt,category\n"a red circle, shiny",shapes\nb,c\n',
        ".tsv": b"Prompt\tCategory\na red circle\tAbstract\n",
    }[ending]
    refused = 0
    for _ in range(max(1, EXAMPLES // 5)):
        refused += attempt(read_prompts, file, mutate(source, valid, SCRAPS))
        file.unlink()
    assert refused > 0 or EXAMPLES < 50
