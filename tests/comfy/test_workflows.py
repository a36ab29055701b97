"""The shipped workflows: the first three run as they are, the others ask for their models in ComfyUI's usual words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "workflows"
OFFLINE = ["01 demo tree", "02 score and select", "03 base and LoRA"]
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def as_prompt(workflow: dict[str, Any], info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A workflow as the page would queue it: links by name, widgets' values by their order."""
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for entry in workflow["nodes"]:
        if entry["type"] == "MarkdownNote":
            continue
        declared = info[entry["type"]]["input"]
        inputs: dict[str, Any] = {}
        values = iter(entry["widgets_values"])
        for name, spec in {**declared.get("required", {}), **declared.get("optional", {})}.items():
            if isinstance(spec[0], list) or spec[0] in WIDGETS:
                inputs[name] = next(values)
                # The page adds one of its own to seeds.
                if name in ("seed", "noise_seed") or (len(spec) > 1 and spec[1].get("control_after_generate")):
                    assert next(values) in ("fixed", "increment", "decrement", "randomize")
        assert next(values, None) is None, f"{entry['type']} has more values than widgets"
        for slot in entry["inputs"]:
            if slot["link"] is not None:
                _, source, output, target, _, kind = links[slot["link"]]
                assert target == entry["id"] and kind == info_of(workflow, source, info)["output"][output]
                inputs[slot["name"]] = [str(source), output]
        prompt[str(entry["id"])] = {"class_type": entry["type"], "inputs": inputs}
    return prompt


def info_of(workflow: dict[str, Any], node: int, info: dict[str, Any]) -> dict[str, Any]:
    return next(info[entry["type"]] for entry in workflow["nodes"] if entry["id"] == node)


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


@pytest.fixture
def info(comfy: Any) -> dict[str, Any]:
    return json.loads(comfy.get("/object_info"))


@pytest.mark.parametrize("name", OFFLINE)
def test_a_demo_workflow_runs_as_it_is(comfy: Any, info: dict[str, Any], name: str) -> None:
    workflow = load(name)
    found = comfy.run(as_prompt(workflow, info))
    shown = [entry for entry in workflow["nodes"] if info.get(entry["type"], {}).get("output_node")]
    assert shown and all(str(entry["id"]) in found for entry in shown)
    if name == OFFLINE[2]:
        (text,) = [out["text"][0] for key, out in found.items() if "| shapes |" in str(out.get("text"))]
        base, trained = (float(cell) for cell in text.splitlines()[2].split("|")[2:4])
        # The LoRA that comes along does what it was trained for.
        assert trained > base


@pytest.mark.parametrize("name", ["04 FLUX.1-dev tree", "05 SD3.5 tree"])
def test_a_workflow_without_its_models_says_which(comfy: Any, info: dict[str, Any], name: str) -> None:
    with pytest.raises(Exception, match="not in") as error:
        comfy.queue(as_prompt(load(name), info))
    said = json.loads(str(error.value))["node_errors"]
    kinds = {problem["type"] for node in said.values() for problem in node["errors"]}
    assert kinds == {"value_not_in_list"}
    assert {node["class_type"] for node in said.values()} <= {
        "UNETLoader",
        "DualCLIPLoader",
        "VAELoader",
        "CheckpointLoaderSimple",
    }


def test_every_shipped_workflow_is_tried() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {*OFFLINE, "04 FLUX.1-dev tree", "05 SD3.5 tree"}
    for path in FOLDER.glob("*.json"):
        workflow = json.loads(path.read_text())
        identities = [entry["id"] for entry in workflow["nodes"]]
        assert len(set(identities)) == len(identities) and workflow["last_node_id"] == max(identities)
