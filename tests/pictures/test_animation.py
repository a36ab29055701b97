"""A tree grows from its start to the static picture, in files that Pillow opens again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tmpo_trainer.pictures import animation
from tmpo_trainer.pictures import tree as tree_picture
from tmpo_trainer.tree import TreePlan

RED, GREEN = (220, 30, 30), (30, 200, 60)


def drawn(plan: TreePlan) -> dict[str, Any]:
    """Green leaves, red predictions."""
    return {
        "plan": plan,
        "images": [Image.new("RGB", (48, 48), GREEN)] * plan.leaves,
        "sigmas": [1 - i / plan.num_steps for i in range(plan.num_steps + 1)],
        "scores": [i / plan.leaves for i in range(plan.leaves)],
        "previews": {step: [Image.new("RGB", (8, 8), RED)] * plan.widths[step - 1] for step in plan.fanout},
    }


def count(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.abs(np.asarray(picture.convert("RGB")).astype(int) - colour) < 8).all(-1).sum())


@pytest.mark.parametrize("plan", [TreePlan.tmpo(8, (1, 3, 5), 3), TreePlan.tmpo(8, (2,), 2).forest(2)])
def test_the_tree_grows(plan: TreePlan) -> None:
    """Neither leaves nor predictions at the start; then each only becomes more; the end is the static picture."""
    given = drawn(plan)
    pictures = list(animation.frames(**given, longest=1000))
    times = animation.timeline(plan)
    assert len(pictures) == len(times) == 1 + animation.BETWEEN * (len(plan.fanout) + 1)
    assert len({picture.size for picture in pictures}) == 1
    assert count(pictures[0], GREEN) == count(pictures[0], RED) == 0
    # At the end of each column but the last, all its pictures are there and none of a later one.
    for column, step in enumerate(plan.fanout, 1):
        picture = pictures[animation.BETWEEN * column]
        boxes = [
            b for n, b in zip(tree_picture.layout(plan), places(plan, 1000), strict=True) if n.step == step and n.column
        ]
        assert len(boxes) == plan.widths[step - 1] and count(picture, GREEN) == 0
        assert all(picture.getpixel((box.left + box.width // 2, round(box.middle))) == RED for box in boxes)
    assert (np.asarray(pictures[-1]) == np.asarray(tree_picture.draw(**given, size=leaf_size(plan, 1000)))).all()
    # It is another than the last but one.
    assert count(pictures[-1], GREEN) > 0.9 * plan.leaves * leaf_size(plan, 1000) ** 2


def leaf_size(plan: TreePlan, longest: int) -> int:
    rows = tree_picture.rows(plan)
    fitting = [size for size in range(2, 97) if rows * tree_picture.row_height(size) <= longest - 96]
    return min(max(fitting), tree_picture.thumbnail_height(plan))


def places(plan: TreePlan, longest: int) -> list[tree_picture.Box]:
    return tree_picture.place(plan, 1.0, leaf_size(plan, longest))


def test_on_the_way_a_child_turns_from_its_parents_picture_into_its_own() -> None:
    plan = TreePlan.tmpo(8, (2, 4), 2)
    # From 1 to 2: the leaves' parents are there, and their children on the trunk, then in the fan.
    trunk, fan = (tree_picture.draw(**drawn(plan), progress=share) for share in (2.2, 2.8))
    assert count(trunk, RED) > count(tree_picture.draw(**drawn(plan), progress=2), RED)
    assert count(trunk, GREEN) == count(fan, GREEN) == 0
    mixed = np.asarray(fan).astype(int)
    # Between the two colours: neither's red nor green is reached.
    between = (
        (mixed[..., 0] > 40)
        & (mixed[..., 0] < 150)
        & (mixed[..., 1] > 90)
        & (mixed[..., 1] < 195)
        & (mixed[..., 2] < 70)
    )
    assert between.sum() > 1000


def test_a_large_tree_stays_within_its_size() -> None:
    plan = TreePlan.tmpo(8, (1, 2, 3, 4, 5), 4)
    picture = next(animation.frames(**drawn(plan), longest=600))
    assert plan.leaves == 1024 and max(picture.size) == 600


@pytest.mark.parametrize("ending", ["webp", "gif"])
def test_files(tmp_path: Path, ending: str) -> None:
    plan = TreePlan.tmpo(8, (1, 3), 2)
    pictures = list(animation.frames(**drawn(plan), longest=600))
    counts = [frames for _, frames in animation.timeline(plan)]
    exif = Image.Exif()
    exif[0x0110] = "prompt:{}"
    animation.write(tmp_path / f"a.{ending}", pictures, counts, 40, exif.tobytes())
    assert [file.name for file in tmp_path.iterdir()] == [f"a.{ending}"]
    with Image.open(tmp_path / f"a.{ending}") as opened:
        assert opened.n_frames == len(pictures) and opened.info["loop"] == 0
        seen, times = [], []
        for at in range(opened.n_frames):
            opened.seek(at)
            opened.load()
            times.append(opened.info["duration"])
            seen.append(np.asarray(opened.convert("RGB")).astype(int))
        assert times == [40 * frames for frames in counts]
        assert (opened.getexif().get(0x0110) == "prompt:{}") is (ending == "webp")
    for at in (0, -1):
        assert np.abs(seen[at] - np.asarray(pictures[at])).mean() < 4
    assert count(pictures[0], GREEN) == 0 < count(pictures[-1], GREEN)
