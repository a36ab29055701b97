"""Reads YAML files of settings. What would end in a traceback or fill the memory is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import yaml

from .errors import ConfigError, one_line, quoted
from .text import decode

#: Bytes of a file, values in it (those behind aliases count each time), digits of an integer.
MOST_BYTES, MOST_VALUES, MOST_DIGITS = 1 << 20, 100_000, 100


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping of settings from a YAML file. Raises ConfigError that names the file and the line."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{path} has more than {MOST_BYTES} bytes: give a file of settings")
    try:
        loaded = _load(path, decode(data))
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{path} is not YAML: {where}{one_line(error.problem or error)}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply for settings") from None
    # The constructors of YAML's types raise whatever int, float and date raise; `!!bool x` is a KeyError.
    except Exception as error:
        raise ConfigError(f"{path} is not YAML: {one_line(error)}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} is not a mapping of settings, e.g. 'learning_rate: 3e-5'")
    return loaded


def _load(path: Path, text: str) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(path, node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count(path: Path, node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values below a node, with those behind aliases counted each time that they are used.

    Raises:
        ConfigError: too many, an alias inside of what it stands for, a key twice, an integer too long to print.
    """

    def refuse(why: str, at: yaml.Node = node) -> NoReturn:
        raise ConfigError(f"{path}, line {at.start_mark.line + 1}: {why}")

    if id(node) in known:
        if not known[id(node)]:
            refuse("an alias stands for something that contains it")
        return known[id(node)]
    known[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[tuple[str, str]] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    refuse(f"key {quoted(key.value)} is there twice: keep one", key)
                seen.add((key.tag, key.value))
            children += [key, value]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    elif node.tag == "tag:yaml.org,2002:int" and len(node.value) > MOST_DIGITS:
        refuse(f"an integer of {len(node.value)} digits")
    total = 1
    for child in children:
        total += _count(path, child, known)
        if total > MOST_VALUES:
            refuse(f"more than {MOST_VALUES} values")
    known[id(node)] = total
    return total
