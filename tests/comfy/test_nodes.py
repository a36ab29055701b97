"""The nodes in a real ComfyUI."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

NODES = {
    "TMPO_DemoModelLoader", "TMPO_TreeSampler", "TMPO_TreeSamplerAdvanced", "TMPO_TreeSamplerSelect", "TMPO_BranchSchedule",
    "TMPO_ScoreImages", "TMPO_CombineScores", "TMPO_BoltzmannWeights", "TMPO_Diversity", "TMPO_SelectBranches",
    "TMPO_LoadLora", "TMPO_Compare", "TMPO_Train", "TMPO_TrainingMonitor",
}  # fmt: skip
TREE = {"branch_steps": "1, 4, 5", "branching": 3, "kernel": "cps", "eta": 0.7, "max_batch": 0}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def graph(prompt: str = "two red circles", **changes: Any) -> dict[str, dict[str, Any]]:
    """The demo model and a tree of 27: 4 is the sampler, 5 its pictures."""
    return {
        "1": node("TMPO_DemoModelLoader"),
        "2": node("CLIPTextEncode", clip=["1", 1], text=prompt),
        "3": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "4": node("TMPO_TreeSampler", model=["1", 0], positive=["2", 0], negative=["2", 0], latent_image=["3", 0], seed=5,
                  steps=10, cfg=1.0, scheduler="normal", **{**TREE, **changes}),
        "5": node("VAEDecode", samples=["4", 0], vae=["1", 2]),
    }  # fmt: skip


def test_all_nodes_load_and_explain_themselves(comfy: Any) -> None:
    info = json.loads(comfy.get("/object_info"))
    ours = {name for name in info if name.startswith("TMPO_")}
    assert ours >= NODES
    for name in ours:
        assert info[name]["category"] == "TMPO" and info[name]["description"]
        for kind in ("required", "optional"):
            for key, value in info[name]["input"].get(kind, {}).items():
                assert value[1].get("tooltip"), f"{name}.{key} has no tooltip"
    lines = [line for line in comfy.log.read_text().splitlines() if "tmpo" in line.lower()]
    assert not [line for line in lines if "fail" in line.lower() or "warning" in line.lower()], lines


def test_a_tree_is_scored_weighed_and_chosen_from(comfy: Any) -> None:
    found = comfy.run({
        **graph(),
        "6": node("TMPO_ScoreImages", images=["5", 0], prompt="two red circles", reward="shapes", model="(hub)"),
        "7": node("TMPO_BoltzmannWeights", scores=["6", 0], tree=["4", 1], beta=2.0),
        "8": node("TMPO_SelectBranches", images=["5", 0], latent=["4", 0], scores=["6", 0], mode="best by score", count=4,
                  min_score=0.0, beta=2.0, seed=0, index=0),
        "9": node("PreviewImage", images=["8", 0]),
        "10": node("TMPO_Diversity", images=["5", 0], latent=["4", 0], model=["1", 0], features="efficientnet-lite0"),
        "11": node("PreviewImage", images=["10", 3]),
        "12": node("PreviewAny", source=["6", 1]),
        "13": node("PreviewAny", source=["7", 2]),
        "14": node("PreviewAny", source=["8", 3]),
        "15": node("PreviewAny", source=["10", 4]),
        "16": node("PreviewImage", images=["5", 0]),
        "17": node("TMPO_CombineScores", first=["6", 0], second=["6", 0], weights="1, 0.5", zscore=True),
        "18": node("PreviewAny", source=["17", 1]),
    })  # fmt: skip
    assert len(found["16"]["images"]) == 27 and len(found["9"]["images"]) == 4
    text = {key: found[key]["text"][0] for key in ("12", "13", "14", "15", "18")}
    assert text["12"].startswith("shapes: mean 0.") and "best 1.0000" in text["12"]
    assert "q spread over" in text["13"] and "of 27 leaves" in text["13"]
    pictures = np.stack([comfy.image(reference) for reference in found["16"]["images"]])
    chosen = [int(word) for word in text["14"].split(",")]
    for reference, index in zip(found["9"]["images"], chosen, strict=True):
        assert (comfy.image(reference) == pictures[index]).all()
    assert "LGMD" in text["15"] and "cosine diversity 0." in text["15"]
    assert text["18"].startswith("combined: mean")


BAD = [
    ({"branch_steps": "1, 4, 12"}, "branch step 12 lies beyond the 10 steps"),
    ({"branch_steps": "4, 1"}, "must increase"),
    ({"branch_steps": "a"}, "write numbers"),
    ({"branch_steps": ""}, "must increase"),
    ({"eta": 1.5}, "too large for kernel cps"),
    ({"branch_steps": "1, 2, 3, 4, 5, 6", "branching": 4}, "4096 leaves"),
    ({"branch_steps": "1, 10"}, "branch at step"),
]


@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_input_is_told_in_the_node_and_the_queue_goes_on(comfy: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        comfy.run({**graph(**changes), "16": node("PreviewImage", images=["5", 0])})
    assert comfy.process.poll() is None
