"""The node Leaf: one path of a tree, sampled alone."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(not os.environ.get("COMFYUI_PATH"), reason="COMFYUI_PATH names no checkout of ComfyUI")
STEPS, SEED = 8, 5
TREE = {"branch_steps": "1, 3, 4", "kernel": "cps", "eta": 0.7}


@pytest.fixture(scope="module")
def pack(nodes: Any) -> Any:
    """The nodes with the demo model, and `sample` for the latents and the tree of two prompts."""
    from tmpo_pack.nodes import leaf  # type: ignore[import-not-found]

    model, clip = nodes.demo_model.load_model(), nodes.demo_model.load_clip()
    texts = ("two red circles", "a blue square left of a green triangle")
    parts = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for text in texts]
    pooled = torch.cat([part[1]["pooled_output"] for part in parts])
    prompts = [[torch.cat([part[0] for part in parts]), {"pooled_output": pooled}]]
    start = (model, prompts, prompts, {"samples": torch.zeros(2, 16, 8, 8)}, SEED, STEPS, 2.0, "normal")

    def sample(**changes: Any) -> tuple[Tensor, Any]:
        found = nodes.sampling.TreeSamplerNode.execute(*start, **{"branching": 3, "max_batch": 0, **TREE, **changes})
        return found.result[0]["samples"], found.result[1]

    def alone(path: str, last_steps: int = 0, **changes: Any) -> Tensor:
        return leaf.Leaf.execute(*start, **{**TREE, **changes}, path=path, last_steps=last_steps).result[0]["samples"]

    return SimpleNamespace(sample=sample, alone=alone, leaf=leaf, nodes=nodes, prompts=prompts, model=model)


def path_of(tree: Any, leaf: int) -> str:
    """As Tree View shows it: the root among those of its prompt."""
    root, *children = tree.paths()[leaf]
    return ", ".join(map(str, (root // tree.prompts, *children)))


@pytest.mark.parametrize(
    ("kernel", "solver", "denoise"), [("cps", "euler", 1.0), ("flow_sde", "ab2", 1.0), ("cps", "euler", 0.7)]
)
def test_a_leaf_alone_is_that_of_the_tree(pack: Any, kernel: str, solver: str, denoise: float) -> None:
    leaves, tree = pack.sample(kernel=kernel, solver=solver, denoise=denoise)
    assert tree.sigmas[0] == 1 if denoise == 1 else tree.sigmas[0] < 0.95
    for leaf in (0, 14, 52):
        found = pack.alone(path_of(tree, leaf), kernel=kernel, solver=solver, denoise=denoise)
        torch.testing.assert_close(found, leaves[leaf : leaf + 2], atol=2e-5, rtol=0)


def test_more_steps_make_the_same_leaf_finer(pack: Any) -> None:
    """It is nearer to the picture of very many steps, and nearer to its leaf than to any other of the tree."""
    leaves, tree = pack.sample()
    path, own = path_of(tree, 14), leaves[14:16]
    exact, finer = pack.alone(path, 64), pack.alone(path, 16)
    assert (finer - exact).norm() < (own - exact).norm() / 2
    distances = (finer[:1] - leaves[::2]).flatten(1).norm(dim=1)
    assert distances.argmin() == 7
    # As many steps as the tree has are the tree's.
    torch.testing.assert_close(pack.alone(path, STEPS - 4), own, atol=5e-6, rtol=0)
    # A tree of seeds alone, of which all steps are the last ones.
    seeds, _ = pack.sample(branch_steps="1")
    torch.testing.assert_close(pack.alone("2", STEPS, branch_steps="1"), seeds[4:6], atol=5e-6, rtol=0)


def test_a_number_beyond_the_tree_is_another_leaf(pack: Any) -> None:
    leaves, _ = pack.sample()
    found = pack.alone("0, 0, 7")
    assert (found[:1] - leaves[::2]).flatten(1).norm(dim=1).min() > 0.5


def test_the_advanced_leaf(pack: Any) -> None:
    guider = pack.nodes.comfy.samplers.CFGGuider(pack.model)
    guider.set_conds(pack.prompts, pack.prompts)
    guider.set_cfg(2.0)
    sigmas = pack.nodes.comfy.samplers.calculate_sigmas(pack.model.get_model_object("model_sampling"), "normal", STEPS)
    latent = {"samples": torch.zeros(2, 16, 8, 8)}
    found = pack.leaf.LeafAdvanced.execute(
        pack.nodes.sampling.Seeded(SEED), guider, sigmas, latent, **TREE, path="1 \u2192 2 \u2192 0", last_steps=0
    ).result[0]["samples"]
    torch.testing.assert_close(found, pack.alone("1, 2, 0"), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("path", "steps", "message"),
    [
        ("", "1, 3", "path '': write whole numbers from 0"),
        ("0, -1", "1, 3", "path '0, -1': write whole numbers from 0"),
        (
            "0, 1",
            "1, 3, 4",
            "path '0, 1' has 2 numbers, but it needs 3: the seed, then the child at each of steps 3, 4",
        ),
        ("1, 1", "3", "begins with seed 1, but without branch step 1 there is only seed 0"),
        ("0", "x", "branch steps 'x': write numbers"),
    ],
)
def test_a_path_that_does_not_fit_is_refused_before_the_run(pack: Any, path: str, steps: str, message: str) -> None:
    assert message in pack.leaf.Leaf.validate_inputs(path=path, branch_steps=steps)
    with pytest.raises(ValueError, match=r"write|needs|only seed"):
        pack.alone(path, branch_steps=steps)


def test_no_steps_are_left_to_change(pack: Any) -> None:
    with pytest.raises(ValueError, match="last_steps: no steps follow branch step 8, so leave it at 0"):
        pack.alone("0, 0", 4, branch_steps="1, 8", eta=0.0)
    with pytest.raises(ValueError, match="branch step 9 is beyond the 8 steps"):
        pack.alone("0, 0", 4, branch_steps="1, 9")
