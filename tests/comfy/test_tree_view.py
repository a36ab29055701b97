"""The Tree View over HTTP: what it reports for its view, and its outputs."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
import torch

from tmpo_trainer.tree import TreePlan

SAMPLER = {"branch_steps": "1, 4, 5", "branching": 3, "kernel": "cps", "eta": 0.7, "max_batch": 0}
VIEW = {"theme": "dark", "beta": 2.0, "selected": ""}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def graph(
    view: dict[str, Any], prompts: int = 1, text: str = "two red circles and a blue square", **changes: Any
) -> dict[str, dict[str, Any]]:
    """7 is the view, 8 its picture, 9 those of the chosen leaves, 10 the first index, 11 all leaves, 12 the choice."""
    return {
        "1": node("TMPO_DemoModelLoader"),
        "2": node("CLIPTextEncode", clip=["1", 1], text=text),
        "3": node("EmptySD3LatentImage", width=64, height=64, batch_size=prompts),
        "4": node("TMPO_TreeSampler", model=["1", 0], positive=["2", 0], negative=["2", 0], latent_image=["3", 0],
                  cfg=1.0, scheduler="normal", **{"seed": 2**63 + 1, "steps": 10, **SAMPLER, **changes}),
        "5": node("VAEDecode", samples=["4", 0], vae=["1", 2]),
        "6": node("TMPO_ScoreImages", images=["5", 0], prompt="two red circles and a blue square", reward="shapes",
                  model="(hub)"),
        "7": node("TMPO_TreeView", tree=["4", 1], images=["5", 0], **{**VIEW, **view}),
        "8": node("PreviewImage", images=["7", 0]),
        "9": node("PreviewImage", images=["7", 2]),
        "10": node("PreviewAny", source=["7", 1]),
        "11": node("PreviewImage", images=["5", 0]),
        "12": node("PreviewAny", source=["7", 3]),
    }  # fmt: skip


def test_the_report_of_a_scored_tree(comfy: Any) -> None:
    found = comfy.run(graph({"scores": ["6", 0], "vae": ["1", 2]}))
    (tree,) = found["7"]["tmpo_tree"]
    assert tree["seed"] == str(2**63 + 1) and tree["steps"] == 10 and tree["prompts"] == 1
    assert tree["rows"] == 27 and tree["columns"] == 4 and tree["score"] == "shapes"
    leaves, nodes = tree["leaves"], tree["nodes"]
    assert len(leaves) == 27 and len(nodes) == 1 + 3 + 9
    assert [leaf["row"] for leaf in leaves] == list(range(27))
    assert [leaf["path"] for leaf in leaves] == sorted(leaf["path"] for leaf in leaves)
    # Tiled: the root is what a row leaves when divided by the roots.
    assert all(leaf["index"] == leaf["path"][0] + 3 * leaf["path"][1] + 9 * leaf["path"][2] for leaf in leaves)
    steps = [(entry["step"], entry["image"] is None) for entry in nodes]
    assert sorted(steps) == [(1, True)] + [(4, False)] * 3 + [(5, False)] * 9
    sigmas = {entry["step"]: entry["sigma"] for entry in nodes}
    assert sigmas[1] == pytest.approx(1.0) and 1 > sigmas[4] > sigmas[5] > 0
    by_id = {entry["id"]: entry for entry in nodes}
    for entry in [*leaves, *nodes]:
        if entry["parent"] is not None:
            assert by_id[entry["parent"]]["path"] == entry["path"][:-1]

    scores = np.array([leaf["scores"]["shapes"] for leaf in leaves])
    weights = np.exp(2 * (scores - scores.mean()) / scores.std())
    np.testing.assert_allclose([leaf["q"] for leaf in leaves], weights / weights.sum(), rtol=1e-4)
    assert tree["low"] == scores.min() and tree["high"] == scores.max()
    best = min((leaf for leaf in leaves if leaf["scores"]["shapes"] == scores.max()), key=lambda leaf: leaf["index"])
    assert tree["best"] == best["index"] and found["10"]["text"] == [str(best["index"])]
    assert tree["stars"] == sorted(leaf["index"] for leaf in leaves if leaf["scores"]["shapes"] == scores.max())

    # The files are the pictures of the same places in the batch; the chosen one comes out.
    for leaf in leaves:
        whole = comfy.image(found["11"]["images"][leaf["index"]])
        assert (np.abs(comfy.image(leaf["image"]).astype(int) - whole) <= 1).all()
    assert (comfy.image(found["9"]["images"][0]) == comfy.image(found["11"]["images"][best["index"]])).all()
    previews = [comfy.image(entry["image"]) for entry in nodes if entry["image"]]
    assert all(preview.shape == (64, 64, 3) for preview in previews)
    assert len({preview.tobytes() for preview in previews}) == 12
    picture = comfy.image(found["8"]["images"][0])
    assert picture.shape[0] > 27 * 28 and picture[-3:].mean() < 60


def test_a_choice_and_no_scores(comfy: Any) -> None:
    # Old workflows have a number here.
    found = comfy.run(graph({"selected": 5, "theme": "light"}))
    (tree,) = found["7"]["tmpo_tree"]
    assert tree["score"] is None and tree["best"] is None and found["10"]["text"] == ["5"]
    assert all(leaf["q"] is None and leaf["scores"] == {} for leaf in tree["leaves"])
    assert (comfy.image(found["9"]["images"][0]) == comfy.image(found["11"]["images"][5])).all()
    assert comfy.image(found["8"]["images"][0])[-3:].mean() > 200
    # Without a VAE the previews are rough ones from the latents.
    assert comfy.image(next(entry["image"] for entry in tree["nodes"] if entry["image"])).shape == (32, 32, 3)
    assert comfy.run(graph({"selected": -1}))["10"]["text"] == ["0"]


def test_prompts_stand_below_one_another(comfy: Any) -> None:
    (tree,) = comfy.run(graph({"scores": ["6", 0]}, prompts=2, branch_steps="3, 5"))["7"]["tmpo_tree"]
    # Both latents have the same prompt.
    assert tree["group"] == "latent" and tree["prompts"] == 2 and tree["rows"] == 20
    for prompt in range(2):
        own = [leaf for leaf in tree["leaves"] if leaf["prompt"] == prompt]
        assert len(own) == 9 and all(leaf["index"] % 2 == prompt and leaf["path"][0] == 0 for leaf in own)
        assert math.isclose(sum(leaf["q"] for leaf in own), 1, rel_tol=1e-6)
    start = [entry for entry in tree["nodes"] if entry["parent"] is None]
    assert [entry["step"] for entry in start] == [None, None]


def test_a_choice_remembers_its_tree(comfy: Any) -> None:
    small = {"branch_steps": "4", "steps": 6}
    (tree,) = comfy.run(graph({"selected": "2, 0"}, **small))["7"]["tmpo_tree"]
    choice = f"2, 0 @ {tree['fingerprints'][0]}"
    found = comfy.run(graph({"selected": choice}, **small))
    assert (
        found["7"]["tmpo_tree"][0]["notice"] == "" and found["10"]["text"] == ["2"] and found["12"]["text"] == ["2, 0"]
    )
    for reference, leaf in zip(found["9"]["images"], (2, 0), strict=True):
        assert (comfy.image(reference) == comfy.image(found["11"]["images"][leaf])).all()
    # Another seed or prompt makes another tree: its best leaf counts, with a notice.
    for changes in ({"seed": 5}, {"text": "three green circles"}):
        found = comfy.run(graph({"selected": choice}, **small, **changes))
        assert "chosen in another tree" in found["7"]["tmpo_tree"][0]["notice"] and found["12"]["text"] == ["0"]


def test_a_choice_that_does_not_fit(comfy: Any) -> None:
    found = comfy.run(graph({"selected": 3}, branch_steps="4", steps=6))
    assert "leaf 3 is beyond the 3 leaves" in found["7"]["tmpo_tree"][0]["notice"] and found["10"]["text"] == ["0"]
    with pytest.raises(Exception, match="selected is 'twelve': write places of leaves"):
        # ComfyUI still runs what does not depend on the node, so nothing else may be there to run.
        comfy.run({key: each for key, each in graph({"selected": "twelve"}).items() if key != "11"})


def test_a_text_is_read_as_a_choice_at_once(nodes: Any) -> None:
    from tmpo_pack.nodes.choice import Choice  # type: ignore[import-not-found]

    for text, leaves, tree in (
        (" ", (), ""), ("-1", (), ""), ("12", (12,), ""), (" 12 ,3, 12 @ 4f2a91c0 ", (12, 3), "4f2a91c0"), ("@4f", (), "4f"),
    ):  # fmt: skip
        assert Choice.parse(text) == Choice(leaves, tree)
    # The server answers nobody while it reads the text of a workflow.
    long = " " * 2000
    start = time.perf_counter()
    for text in (f"{long}x", f"1{long}x", "1,", "1 2", "-2", "1 @", "1 @ x", "1 @ 4f @ 4f", "1234567890"):
        with pytest.raises(ValueError, match="write places of leaves"):
            Choice.parse(text)
    assert time.perf_counter() - start < 1


def test_a_fingerprint_stands_small_differences(nodes: Any) -> None:
    """Another batch size or device changes the pixels a little."""
    types = nodes.tree_view
    torch.manual_seed(0)
    plan = TreePlan.tmpo(4, (1, 2), 2)

    def tree(first: torch.Tensor, seed: int = 1, eta: float = 0.7) -> Any:
        return types.Tree(plan, "sde", eta, [1.0, 0.7, 0.4, 0.2, 0.0], torch.zeros(1), seed, 1, {}, {}, first)

    first = torch.randn(3, 16, 8, 8)
    own = tree(first)
    assert own.looks_like(tree(first + 0.01 * torch.randn_like(first)).fingerprint)
    assert not own.looks_like(tree(torch.randn_like(first)).fingerprint)
    assert not own.looks_like(tree(first, seed=2).fingerprint) and not own.looks_like(tree(first, eta=0.5).fingerprint)
    assert not own.looks_like("4f2a91c0")


def test_suggestions(nodes: Any) -> None:
    values = torch.tensor([0.5, math.nan, 1.0, 1.0, 0.2, 0.9, 1.0])
    images = torch.linspace(0, 1, 7)[:, None, None, None].expand(7, 8, 8, 3)
    scores = nodes.tree_view.Scores({"s": values}, ["a"] * 7, torch.zeros(7, 3, 8, 8))
    found = {each["name"]: each["leaves"] for each in nodes.tree_view.suggestions(images, scores)}
    # Diverse are the best, then the farthest; 0.9 is the median.
    assert found == {"top 4": [2, 3, 6, 5], "4 diverse": [2, 6, 5, 3], "all 3 best": [2, 3, 6]}
    assert [len(each["leaves"]) for each in nodes.tree_view.suggestions(images, None)] == [4]
    # More than half are wrong, and 0 is their median: a wrong one is the farthest, and is not offered.
    few = nodes.tree_view.Scores(
        {"s": torch.tensor([0.0, 0.0, 0.0] + [1.0] * 4 + [0.0, 0.0])}, ["a"] * 9, torch.zeros(9, 3, 8, 8)
    )
    images = torch.linspace(0, 1, 9)[:, None, None, None].expand(9, 8, 8, 3)
    diverse = nodes.tree_view.suggestions(images, few)[1]["leaves"]
    assert sorted(diverse) == [3, 4, 5, 6]
    images = images[:7]
    equal = nodes.tree_view.Scores({"s": torch.ones(7)}, ["a"] * 7, torch.zeros(7, 3, 8, 8))
    assert [each["name"] for each in nodes.tree_view.suggestions(images, equal)] == ["top 4", "4 diverse"]
