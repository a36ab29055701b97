"""Names in other languages and help pages know every node with all that it takes and gives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def ours(comfy: Any) -> dict[str, Any]:
    return {k: v for k, v in json.loads(comfy.get("/object_info")).items() if k.startswith("TMPO_")}


def inputs_of(node: dict[str, Any]) -> set[str]:
    return {name for kind in ("required", "optional") for name in node["input"].get(kind, {})}


def test_every_node_and_socket_has_a_chinese_name(comfy: Any, ours: dict[str, Any]) -> None:
    """The names that the server passes on to the page."""
    names = json.loads(comfy.get("/i18n"))["zh"]["nodeDefs"]
    assert not ours.keys() - names.keys()
    for node, declared in ours.items():
        entry = names[node]
        assert entry["display_name"] and entry["description"], node
        given = entry.get("inputs", {})
        assert given.keys() - {"control_after_generate"} == inputs_of(declared), node
        assert all(given[name]["name"] and given[name]["tooltip"] for name in inputs_of(declared)), node
        outputs = entry.get("outputs", {})
        assert [output["name"] != "" for output in outputs.values()] == [True] * len(declared["output"]), node
        assert list(outputs) == [str(place) for place in range(len(declared["output"]))], node


def test_every_node_has_a_help_page_that_names_its_inputs(ours: dict[str, Any]) -> None:
    for node, declared in ours.items():
        page = (REPOSITORY / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
        missing = [name for name in sorted(inputs_of(declared)) if not re.search(rf"\b{name}\b(?!')", page)]
        assert not missing, f"{node}: {', '.join(missing)}"


def test_every_node_is_found_under_other_words(ours: dict[str, Any]) -> None:
    if not any("search_aliases" in node for node in ours.values()):
        pytest.skip("this ComfyUI knows no search aliases")
    assert not [name for name, node in ours.items() if not node["search_aliases"]]
