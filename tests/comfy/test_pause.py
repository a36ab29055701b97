"""Tree View's pause over HTTP: a run that waits for a choice, without a page."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

GRAPH = {
    "1": {"class_type": "TMPO_DemoModelLoader", "inputs": {}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "two red circles"}},
    "3": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "4": {
        "class_type": "TMPO_TreeSampler",
        "inputs": {
            "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0], "seed": 5, "steps": 4,
            "cfg": 1.0, "scheduler": "normal", "branch_steps": "1, 2", "branching": 2, "kernel": "cps", "eta": 0.7,
            "max_batch": 0,
        },
    },
    "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
    "6": {
        "class_type": "TMPO_TreeView",
        "inputs": {"tree": ["4", 1], "images": ["5", 0], "theme": "dark", "beta": 1.0, "selected": "", "pause": True},
    },
    "7": {"class_type": "PreviewAny", "inputs": {"source": ["6", 3]}},
    "8": {"class_type": "PreviewImage", "inputs": {"images": ["6", 2]}},
}  # fmt: skip


def changed(**inputs: Any) -> dict[str, Any]:
    return {**GRAPH, "6": {"class_type": "TMPO_TreeView", "inputs": {**GRAPH["6"]["inputs"], **inputs}}}


def waiting(comfy: Any) -> list[dict[str, Any]]:
    return json.loads(comfy.get("/tmpo/waiting"))


def the_one_that_waits(comfy: Any) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while not (found := waiting(comfy)):
        assert time.monotonic() < deadline, comfy.log.read_text()[-3000:]
        time.sleep(0.05)
    (one,) = found
    return one


def test_a_run_goes_on_with_the_leaves_that_are_chosen_while_it_waits(comfy: Any) -> None:
    prompt = comfy.queue(GRAPH)
    one = the_one_that_waits(comfy)
    assert one["node"] == "6" and len(one["tree"]["leaves"]) == 4
    assert one["id"] in comfy.log.read_text()
    # What is no choice of this tree is refused, and the run still waits.
    for choice, fault in [("first", "selected is 'first'"), ("4", "leaf 4 is beyond the 4 leaves"), (3, "send JSON")]:
        with pytest.raises(Exception, match=fault):
            comfy.post("/tmpo/continue", {"id": one["id"], "choice": choice})
    assert [each["id"] for each in waiting(comfy)] == [one["id"]]
    comfy.post("/tmpo/continue", {"id": one["id"], "choice": "3, 1"})
    found = comfy.wait(prompt)
    assert found["7"]["text"] == ["3, 1"] and len(found["8"]["images"]) == 2
    with pytest.raises(Exception, match="does not wait any more"):
        comfy.post("/tmpo/continue", {"id": one["id"], "choice": "0"})
    # A choice that stands already is not asked for again.
    assert comfy.run(changed(selected="2"))["7"]["text"] == ["2"]


def test_a_choice_that_was_cleared_is_asked_for_again(comfy: Any) -> None:
    """The queue is that of the first run, whose choice is in ComfyUI's cache."""
    graph = changed(beta=3.0)
    for choice in ("3", "0, 1"):
        prompt = comfy.queue(graph)
        comfy.post("/tmpo/continue", {"id": the_one_that_waits(comfy)["id"], "choice": choice})
        assert comfy.wait(prompt)["7"]["text"] == [choice]


def test_a_run_that_waits_can_be_cancelled(comfy: Any) -> None:
    prompt = comfy.queue(changed(beta=2.0))
    the_one_that_waits(comfy)
    comfy.post("/interrupt", {})
    with pytest.raises(Exception, match="interrupted"):
        comfy.wait(prompt, 20)
    assert waiting(comfy) == []
