"""Checks of inputs before anything is computed. Where an input names something on this machine, a workflow from elsewhere
chooses among what its owner offers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths

from ..tmpo_trainer.settings.errors import one_line
from ..tmpo_trainer.settings.paths import expanded

if TYPE_CHECKING:
    from comfy_api.latest import io


def inside(given: str, what: str, more: Sequence[str] = ()) -> Path:
    """Resolves a path against ComfyUI's output folder. It must be inside that folder or one of the other folders.

    A workflow from elsewhere must not read or write anywhere else.

    Raises:
        ValueError: the path is outside of these folders.
    """
    output = Path(folder_paths.get_output_directory()).resolve()
    folders = [Path(folder) for folder in (output, *more)]
    allowed = [*folders, *(folder.resolve() for folder in folders)]
    path = Path(os.path.normpath(output / expanded(given)))
    # By its text first: on Windows, resolving a path of another machine already connects to that machine.
    if _within(path, allowed):
        path = path.resolve()
        if _within(path, allowed):
            return path
    raise ValueError(f"{what} {one_line(given)} is outside of {output}: choose a path inside it")


def _within(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def one_of(value: str, options: Sequence[str], what: str) -> str:
    """A value that is one of an input's options. ComfyUI checks neither the options of this kind of node nor values that come
    over a link, and a workflow from elsewhere must not have a scorer, a file or a class of its own choice loaded.

    Raises:
        ValueError: it is none of them.
    """
    if value not in options:
        raise ValueError(f"{what}: {one_line(value, 60)} is not in the list: choose another")
    return value


def verdict(check: Callable[..., object], *given: Any) -> bool | str:
    """What `validate_inputs` of a node returns: True, or the message of the ValueError that a check raises."""
    try:
        check(*given)
    except ValueError as error:
        return str(error)
    return True


def notice(text: str | None) -> dict[str, list[str]]:
    """What a node says about its result, for its page (web/tmpo_select.js) and the log."""
    if text:
        logging.warning(text)
    return {"tmpo_notice": [text] if text else []}


def workflow_id(node: type[io.ComfyNode]) -> str | None:
    """The id of the workflow that has queued this run; None if a script has. The node has the hidden input `extra_pnginfo`."""
    # Called without a graph, as in tests, there is nothing hidden.
    about = (node.hidden.extra_pnginfo if node.hidden else None) or {}
    return (about.get("workflow") or {}).get("id")


def prompt_texts(graph: Mapping[str, Any], node: str, name: str) -> dict[str, str]:
    """The texts that encoders gave the samplers from which an input comes, by the encoder's id.

    Only links with a `positive` or a `conditioning` prompt are followed to encoders. A text that a node computes is left out.

    Args:
        graph: the API prompt. node: the id of the node that has the input. name: the input's.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, bool]] = set()
    left = [(link[0], False) for link in _links(graph, node, (name,))]
    while left:
        here, encoding = place = left.pop()
        if place in seen:
            continue
        seen.add(place)
        inputs = graph[here]["inputs"]
        texts = [_text(graph, inputs[key]) for key in ("text", "t5xxl", "clip_g") if key in inputs]
        if encoding and any(texts):
            found[here] = next(text for text in texts if text)
            continue
        for key in inputs:
            own = encoding or key in ("positive", "conditioning")
            if key not in ("negative", "clip", "vae"):
                left += [(link[0], own) for link in _links(graph, here, (key,))]
    return found


def _links(graph: Mapping[str, Any], node: str, names: Sequence[str]) -> list[list[Any]]:
    given = [graph[node]["inputs"].get(name) for name in names]
    return [link for link in given if _is_link(graph, link)]


def _is_link(graph: Mapping[str, Any], value: Any) -> bool:
    """Whether an input's value is a link to a node of the graph. The value of a widget may be a list as well."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in graph


def _text(graph: Mapping[str, Any], value: Any) -> str | None:
    """A text, or the only text of the node from which it comes; None if that node has none or several."""
    for _ in range(len(graph)):
        if not _is_link(graph, value):
            break
        given = [each for each in graph[value[0]]["inputs"].values() if isinstance(each, (str, list))]
        value = given[0] if len(given) == 1 else None
    return value if isinstance(value, str) else None
