from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from tmpo_trainer.pictures import tree as tree_picture
from tmpo_trainer.tree import TreePlan

PLANS = {
    "1": TreePlan.tmpo(10, (1,), 1),
    "chain": TreePlan.tmpo(10, (2, 4, 6), 1),
    "27": TreePlan.tmpo(10, (1, 4, 5), 3),
    "81": TreePlan.tmpo(10, (1, 3, 5, 7), 3),
    "one root": TreePlan.tmpo(10, (3, 6), 4),
    "prompts": TreePlan.tmpo(10, (1, 4, 5), 2).forest(3),
    "uneven": TreePlan(10, 2, {3: 3, 5: 1, 7: 2}),
}
SIGMAS = [1 - i / 10 for i in range(11)]
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def paths(plan: TreePlan) -> list[tuple[int, ...]]:
    """Of leaves, in the order of the batch."""
    found = [(root,) for root in range(plan.roots)]
    for children in plan.fanout.values():
        found = [(*path, child) for child in range(children) for path in found]
    return found


def picture(plan: TreePlan, size: tuple[int, int] = (64, 64), **changes: object) -> Image.Image:
    images = [Image.new("RGB", size, (200, 30, 30)) for _ in range(plan.leaves)]
    return tree_picture.draw(plan, **{"images": images, "sigmas": SIGMAS, **changes})  # type: ignore[arg-type]


@plans
def test_nodes_are_the_rollouts(plan: TreePlan) -> None:
    """Every leaf once with its own path, every inner node once for each of its rows, parents by path."""
    nodes = tree_picture.layout(plan)
    leaves = {node.index: node.path for node in nodes if node.leaf}
    assert [leaves[i] for i in range(plan.leaves)] == paths(plan)
    assert sum(node.leaf for node in nodes) == plan.leaves
    for step in plan.fanout:
        inner = sorted(node.index for node in nodes if node.step == step and node.column)
        assert inner == list(range(plan.widths[step - 1]))
    for node in nodes:
        if node.parent is None:
            assert node.path == ()
            continue
        parent = nodes[node.parent]
        assert parent.path == node.path[:-1] and parent.column == node.column - 1 and parent.prompt == node.prompt
        assert node.prompt == node.path[0] % plan.trees


@plans
def test_edges_never_cross(plan: TreePlan) -> None:
    """Between two columns, parents and children have the same order."""
    nodes = tree_picture.layout(plan)
    for column in range(1, len(plan.fanout) + 2):
        edges = sorted(
            (node.row, nodes[node.parent].row) for node in nodes if node.column == column and node.parent is not None
        )
        assert [row for _, row in edges] == sorted(row for _, row in edges)
        assert len({row for row, _ in edges}) == len(edges)


@plans
def test_a_parent_stands_in_the_middle_of_its_leaves(plan: TreePlan) -> None:
    nodes = tree_picture.layout(plan)
    for i, node in enumerate(nodes):
        below = [leaf.row for leaf in nodes if leaf.leaf and leaf.path[: len(node.path)] == node.path]
        below = below if i and node.path else [leaf.row for leaf in nodes if leaf.leaf and leaf.prompt == node.prompt]
        assert node.row == (min(below) + max(below)) / 2 and node.leaves == len(below)
    rows = sorted(node.row for node in nodes if node.leaf)
    assert rows[-1] == tree_picture.rows(plan) - 1
    assert all(after - before >= 1 for before, after in pairwise(rows))


@plans
@pytest.mark.parametrize("aspect", [0.3, 1.0, 16 / 9, 4.0])
def test_boxes_do_not_overlap_and_lie_in_the_picture(plan: TreePlan, aspect: float) -> None:
    boxes = tree_picture.place(plan, aspect)
    width, height = picture(plan, (round(100 * aspect), 100)).size
    for i, box in enumerate(boxes):
        assert (
            box.left >= 0 and box.top >= tree_picture.HEADER and box.right <= width and box.top + box.height <= height
        )
        for other in boxes[:i]:
            apart = (
                box.right <= other.left or other.right <= box.left
                or box.top + box.height <= other.top or other.top + other.height <= box.top
            )  # fmt: skip
            assert apart, (box, other)


def test_labels_have_room_beside_their_nodes() -> None:
    """A label is 12 pixels high and stands on the trunk, which ends before the children begin."""
    plan = PLANS["81"]
    nodes, boxes = tree_picture.layout(plan), tree_picture.place(plan)
    for node, box in zip(nodes, boxes, strict=True):
        if node.parent is not None:
            assert box.left >= boxes[node.parent].right + tree_picture.TRUNK
    middles = sorted(box.middle for node, box in zip(nodes, boxes, strict=True) if node.column == len(plan.fanout))
    assert min(after - before for before, after in pairwise(middles)) > 24


@pytest.mark.parametrize("theme", tree_picture.RAMPS)
def test_colours_brighten_with_the_score(theme: str) -> None:
    def brightness(score: float) -> float:
        text = tree_picture.colour(score, -1, 1, theme)
        assert text is not None and len(text) == 7
        red, green, blue = (int(text[k : k + 2], 16) for k in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    values = [brightness(score) for score in np.linspace(-1, 1, 101)]
    assert values == sorted(values) and values[-1] > values[0] + 80
    assert tree_picture.colour(-1, -1, 1, theme) == tree_picture.RAMPS[theme][0]
    assert tree_picture.colour(9, -1, 1, theme) == tree_picture.RAMPS[theme][-1]
    assert tree_picture.colour(math.nan, -1, 1, theme) is None
    assert tree_picture.colour(2, 2, 2, theme) == tree_picture.colour(0, -1, 1, theme)


def test_weights_are_a_softmax_for_each_prompt() -> None:
    scores = torch.tensor([0.1, 5.0, 0.4, 7.0, 0.4, math.nan, 0.9, 6.0])
    weights = tree_picture.leaf_weights(scores, 1.5, 2)
    for prompt in range(2):
        own = scores[prompt::2].double()
        own = own[own.isfinite()]
        expected = (1.5 * (own - own.mean()) / own.std(correction=0)).softmax(0)
        assert torch.allclose(weights[prompt::2][scores[prompt::2].isfinite()], expected)
    assert weights[5] == 0
    assert torch.allclose(tree_picture.leaf_weights(scores[:1].repeat(4), 3.0, 1), torch.full((4,), 0.25).double())
    assert (tree_picture.leaf_weights(torch.full((3,), math.nan), 1.0, 1) == 0).all()


def test_scores_of_nodes_best_and_limits_leave_out_what_was_not_scored() -> None:
    plan = PLANS["uneven"]
    nodes = tree_picture.layout(plan)
    scores = [float(i) for i in range(plan.leaves)]
    scores[3] = math.nan
    means = tree_picture.node_scores(nodes, scores)
    for node, mean in zip(nodes, means, strict=True):
        below = [scores[leaf.index] for leaf in nodes if leaf.leaf and leaf.path[: len(node.path)] == node.path]
        finite = [score for score in below if math.isfinite(score)]
        assert math.isnan(mean) if not finite else mean == pytest.approx(sum(finite) / len(finite))
    some = [1.0, math.nan, 4.0, 4.0]
    assert tree_picture.best_leaves(some) == tree_picture.starred_leaves(some) == [2, 3]
    assert tree_picture.best_leaves([math.nan]) == []
    assert tree_picture.best_leaves([4.0, 4.0]) == [0, 1] and tree_picture.starred_leaves([4.0, 4.0]) == []
    assert tree_picture.limits([math.nan, 2.0, -1.0]) == (-1.0, 2.0) and tree_picture.limits([]) == (0.0, 0.0)


@plans
@pytest.mark.parametrize("theme", tree_picture.THEMES)
def test_a_picture(plan: TreePlan, theme: str) -> None:
    scores = torch.linspace(0, 1, plan.leaves).tolist()
    previews = {step: [Image.new("RGB", (8, 8), (20, 20, 230))] * plan.widths[step - 1] for step in plan.fanout}
    drawn = picture(
        plan, scores=scores, weights=scores, previews=previews, theme=theme, selected=[0], name="a" * 80, note="seed 1"
    )
    pixels = np.asarray(drawn)
    size = tree_picture.thumbnail_height(plan)
    assert drawn.mode == "RGB" and abs(drawn.height - (size + 6) * tree_picture.rows(plan) - 80) <= 16
    for node, box in zip(tree_picture.layout(plan), tree_picture.place(plan), strict=True):
        inside = pixels[round(box.middle), box.left + box.width // 2]
        if node.leaf:
            assert tuple(inside) == (200, 30, 30)
        elif node.column:
            assert tuple(inside) == (20, 20, 230)
    dark = pixels[-2:].mean() < 128
    assert dark == (theme == "dark")
    assert drawn.tobytes() == picture(
        plan, scores=scores, weights=scores, previews=previews, theme=theme, selected=[0], name="a" * 80, note="seed 1"
    ).tobytes()  # fmt: skip


def test_without_scores_and_with_none_that_count() -> None:
    plan = PLANS["27"]
    bare, scored = picture(plan), picture(plan, scores=[math.nan] * 27, weights=[0.0] * 27)
    assert bare.width < scored.width and bare.height == scored.height


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": [Image.new("RGB", (8, 8))]}, "1 images, but this tree has 27"),
        ({"scores": [0.0] * 26}, "26 scores"),
        ({"weights": [0.0] * 28}, "28 weights"),
        ({"sigmas": [1.0, 0.0]}, "2 sigmas, but this tree has 11"),
        ({"previews": {4: []}}, "0 previews of step 4, but this tree has 3"),
    ],
)
def test_counts_that_do_not_fit(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        picture(PLANS["27"], **changes)
