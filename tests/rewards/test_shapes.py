"""The shapes scorer against the renderer it was made for, and against lists of objects made by hand."""

from __future__ import annotations

import sys
import tracemalloc
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from tmpo_trainer.demo import domain
from tmpo_trainer.demo.domain import Clause, Object, Scene
from tmpo_trainer.rewards import shapes
from tmpo_trainer.rewards.parts import without_opencv
from tmpo_trainer.rewards.shapes import Found, ShapesScorer, detect, judge

GREY = np.array([0.5, 0.52, 0.48])


def renders(per_family: int, seed: int) -> tuple[np.ndarray, list[Scene]]:
    """`per_family` random renders of every family, uint8 `[5 * per_family, 64, 64, 3]`, and their scenes."""
    rng = np.random.default_rng(seed)
    scenes = [domain.sample_scene(rng, family) for family in domain.FAMILIES for _ in range(per_family)]
    return np.stack([domain.render(scene, rng) for scene in scenes]), scenes


def texts(scenes: list[Scene]) -> list[str]:
    return [scene.text() for scene in scenes]


def kinds(found: list[Found]) -> list[tuple[str | None, str | None]]:
    return sorted(((item.color, item.shape) for item in found), key=str)


def paint(*boxes: tuple[int, int, int, int, tuple[int, int, int]]) -> np.ndarray:
    """A grey picture with rectangles `(left, top, width, height, rgb)`."""
    image = np.full((64, 64, 3), 128, np.uint8)
    for left, top, width, height, rgb in boxes:
        image[top : top + height, left : left + width] = rgb
    return image


def put(color: str | None, shape: str | None, x: float = 32.0, y: float = 32.0, size: float = 10.0) -> Found:
    return Found(color, shape, x, y, size, size, size * size)


# Renders


def test_every_clean_render_scores_one():
    images, scenes = renders(125, seed=3)
    strict, partial = ShapesScorer().score_both(images, texts(scenes))
    missed = [scene.text() for scene, score in zip(scenes, strict.tolist(), strict=True) if score != 1]
    assert missed == []
    assert torch.equal(partial, torch.ones(625))


def test_noise_and_blur_change_little():
    images, scenes = renders(60, seed=4)
    rng = np.random.default_rng(5)
    noisy = images + rng.normal(0.0, 6.0, images.shape)
    padded = np.pad(images.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    blurred = (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4
    for changed in (noisy, blurred):
        strict = ShapesScorer().score(np.clip(changed, 0, 255).round().astype(np.uint8), texts(scenes))
        assert strict.mean() >= 0.99


def wrong_scenes(scene: Scene) -> dict[str, list[Scene]]:
    """Scenes that differ from one in one respect, and are not the same scene put another way."""
    first, *rest = scene.clauses
    taken = {(clause.color, clause.shape) for clause in scene.clauses}
    colors = [c for c in domain.PALETTE if (c, first.shape) not in taken]
    shapes = [s for s in domain.SHAPES if (first.color, s) not in taken]
    wrong = {
        "color": [Scene((replace(first, color=color), *rest), scene.relation) for color in colors],
        "shape": [Scene((replace(first, shape=shape), *rest), scene.relation) for shape in shapes],
        "count": [Scene((replace(first, count=n), *rest), scene.relation) for n in (1, 2, 3) if n != first.count],
    }
    if scene.relation:
        wrong["relation"] = [replace(scene, relation=r) for r in domain.RELATIONS if r != scene.relation]
    return wrong


@pytest.mark.parametrize("respect", ["color", "shape", "count", "relation"])
def test_a_wrong_prompt_scores_zero(respect: str):
    images, scenes = renders(24, seed=6)
    judged = 0
    for image, scene in zip(images, scenes, strict=True):
        found = detect(image)
        assert judge(scene, found)[0] == 1.0
        for other in wrong_scenes(scene).get(respect, []):
            strict, partial = judge(other, found)
            assert strict == 0.0 and partial < 1.0, f"{other.text()!r} for a picture of {scene.text()!r}"
            judged += 1
    assert judged >= 72


def test_an_extra_object_scores_zero():
    red, same, blue = (
        Object(18.0, 18.0, 9.0, "red", "circle"),
        Object(46.0, 44.0, 9.0, "red", "circle"),
        Object(46.0, 44.0, 9.0, "blue", "square"),
    )
    scene = domain.parse("a red circle")
    assert judge(scene, detect(domain.draw([red], GREY))) == (1.0, 1.0)
    assert judge(scene, detect(domain.draw([red, blue], GREY))) == (0.0, 0.5)
    assert judge(scene, detect(domain.draw([red, same], GREY))) == (0.0, 0.5)


# detect


@pytest.mark.parametrize("shape", domain.SHAPES)
def test_place_and_size_are_those_drawn(shape: str):
    drawn = Object(25.0, 36.0, 11.0, "green", shape)
    (found,) = detect(domain.draw([drawn], GREY))
    assert (found.color, found.shape) == ("green", shape)
    assert found.x == pytest.approx(25.0, abs=1.0) and found.y == pytest.approx(36.0, abs=1.0)
    assert max(found.width, found.height) == pytest.approx(2 * 11.0 * domain.REACH[shape], abs=2.0)
    assert found.area == pytest.approx(np.pi * 11.0**2, rel=0.06)


def test_an_empty_picture_holds_nothing():
    for level in (0, 128, 255):
        assert detect(np.full((64, 64, 3), level, np.uint8)) == []


def test_a_blob_of_no_palette_colour_is_an_unknown_extra():
    maroon = (110, 10, 60)
    red = (8, 8, 18, 18, domain.PALETTE["red"])
    found = detect(paint(red, (36, 36, 18, 18, maroon)))
    assert kinds(found) == [("red", "square"), (None, "square")]
    assert judge(domain.parse("a red square"), found) == (0.0, 0.5)


@pytest.mark.parametrize(
    ("rgb", "color"),
    # Delta E to the nearest palette colour: 15 and 34, both on the other side of 28 if the channels were swapped.
    [((90, 45, 195), "blue"), ((195, 105, 60), None)],
    ids=["indigo", "brown"],
)
def test_colours_have_a_reach(rgb: tuple[int, int, int], color: str | None):
    assert kinds(detect(paint((20, 20, 20, 20, rgb)))) == [(color, "square")]


def test_hairlines_are_ignored():
    red = domain.PALETTE["red"]
    found = detect(paint((8, 22, 16, 16, red), (40, 22, 16, 16, red), (24, 30, 16, 1, red)))
    assert kinds(found) == [("red", "square")] * 2


def test_a_ragged_outline_is_no_shape():
    red = domain.PALETTE["red"]
    cross = detect(paint((28, 8, 8, 48, red), (8, 28, 48, 8, red)))
    assert kinds(cross) == [("red", None)]


def test_specks_are_ignored_and_small_objects_are_not():
    red = domain.PALETTE["red"]
    assert detect(paint((20, 20, 4, 4, red))) == []
    assert kinds(detect(paint((20, 20, 8, 8, red)))) == [("red", "square")]


def test_holes_are_filled():
    image = paint((20, 20, 24, 24, domain.PALETTE["red"]), (30, 30, 4, 4, (128, 128, 128)))
    (found,) = detect(image)
    assert (found.color, found.shape, found.area) == ("red", "square", pytest.approx(576, abs=4))


@pytest.mark.parametrize("other", ["blue", "red"])
def test_touching_objects_are_told_apart(other: str):
    red, second = domain.PALETTE["red"], domain.PALETTE[other]
    corner_to_corner = detect(paint((12, 12, 18, 18, red), (29, 29, 18, 18, second)))
    assert kinds(corner_to_corner) == sorted([("red", "square"), (other, "square")])
    for item in corner_to_corner:
        assert min(abs(item.x - 21), abs(item.x - 38)) <= 1 and item.width == pytest.approx(18, abs=1)


def test_side_by_side_colours_are_two_objects():
    found = detect(paint((12, 20, 18, 18, domain.PALETTE["red"]), (30, 20, 18, 18, domain.PALETTE["blue"])))
    assert kinds(found) == [("blue", "square"), ("red", "square")]


@pytest.mark.parametrize(("side", "objects"), [(7, 1), (10, 2)])
def test_a_stain_is_no_object_of_its_own(side: int, objects: int):
    red, blue = domain.PALETTE["red"], domain.PALETTE["blue"]
    found = detect(paint((12, 12, 16, 16, red), (28 - side, 28, side, side, blue)))
    assert len(found) == objects
    assert ("red", "square") in kinds(found)


def test_the_colour_is_that_of_the_core_and_not_of_the_rim():
    found = detect(paint((20, 20, 6, 6, domain.PALETTE["pink"]), (21, 21, 4, 4, domain.PALETTE["red"])))
    assert [item.color for item in found] == ["red"]


@pytest.mark.parametrize(
    "image",
    [np.zeros((64, 64, 3), np.float32), np.zeros((64, 64), np.uint8), np.zeros((3, 64, 64), np.uint8)],
    ids=["float", "grey", "channels first"],
)
def test_other_arrays_are_refused(image: np.ndarray):
    with pytest.raises(ValueError, match=r"uint8 RGB image \[H, W, 3\]"):
        detect(image)


def test_without_opencv_the_same_objects_are_found(monkeypatch: pytest.MonkeyPatch):
    """Renders, the same with noise, and pairs of them laid over each other, whose objects touch."""
    images, _ = renders(12, seed=9)
    noisy = np.clip(images + np.random.default_rng(10).normal(0, 25, images.shape), 0, 255).astype(np.uint8)
    over = np.abs(images - images[:, :1, :1].astype(int)).sum(-1, keepdims=True) > 60
    pictures = [*images, *noisy, *np.where(over, images, images[::-1])]
    with_it = [detect(picture) for picture in pictures]
    assert shapes.opencv().__name__ == "cv2" and any(len(found) > 3 for found in with_it)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cv2", None)
        shapes.opencv.cache_clear()
        assert shapes.opencv().__name__.endswith("without_opencv")
        without = [detect(picture) for picture in pictures]
    shapes.opencv.cache_clear()
    assert [sorted(found, key=str) for found in without] == [sorted(found, key=str) for found in with_it]


def test_distances_without_opencv_need_little_memory():
    mask = np.ones((250, 300), np.uint8)
    mask[20:230, 30:280] = 0
    expected = cv2.distanceTransform(mask, cv2.DIST_L2, 5)
    tracemalloc.start()
    found = without_opencv.distanceTransform(mask, without_opencv.DIST_L2, 5)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.abs(found - expected).max() < 1e-5 and most < 64 * 2**20


# judge

RED, BLUE = ("red", "circle"), ("blue", "square")


@pytest.mark.parametrize(
    ("prompt", "found", "strict", "partial"),
    [
        ("a red circle", [], 0, (0 + 1) / 2),
        ("a red circle", [put(*RED)], 1, 1),
        ("a red circle", [put(*RED)] * 2, 0, (0 + 1) / 2),
        ("a red circle", [put("red", None)], 0, 0),
        ("a red circle", [put(None, "circle")], 0, 0),
        ("a red circle", [put(*RED), put(None, None)], 0, (1 + 0) / 2),
        ("three red circles", [put(*RED)] * 2, 0, (2 / 3 + 1) / 2),
        ("three red circles", [put(*RED)] * 4, 0, (2 / 3 + 1) / 2),
        ("three red circles", [put(*RED)] * 7, 0, (0 + 1) / 2),
        ("two red circles and a blue square", [put(*RED), put(*BLUE)], 0, (1 / 2 + 1 + 1) / 3),
        ("two red circles and a blue square", [put(*RED), put("pink", "square")], 0, (1 / 2 + 0 + 0) / 3),
        ("a red circle and a red circle", [put(*RED)] * 2, 1, 1),
        ("a red circle and a red circle", [put(*RED)], 0, (1 / 2 + 1) / 2),
        ("a red circle left of a blue square", [put(*RED, x=12), put(*BLUE, x=50)], 1, 1),
        ("a red circle left of a blue square", [put(*RED, x=50), put(*BLUE, x=12)], 0, (1 + 1 + 0 + 1) / 4),
        ("a red circle left of a blue square", [put(*RED, x=12)], 0, (1 + 0 + 0 + 1) / 4),
        (
            "a red circle left of a blue square",
            [put(*RED, x=60), put(*RED, x=12), put(*BLUE, x=40), put("green", "square")],
            0,
            (0 + 1 + 1 + 0) / 4,
        ),
        ("a red circle left of a red circle", [put(*RED, x=50), put(*RED, x=12)], 1, 1),
        ("a red circle left of a red circle", [put(*RED, x=50)], 0, (1 / 2 + 0 + 1) / 3),
    ],
)
def test_partial_is_the_mean_of_clauses(prompt: str, found: list[Found], strict: float, partial: float):
    assert judge(domain.parse(prompt), found) == (strict, pytest.approx(partial, abs=1e-12))


@pytest.mark.parametrize(
    ("relation", "x", "y", "holds"),
    [
        # Sizes 10 and 10 take 2 off each axis of the offset; the norm stays that of the whole offset.
        ("left of", -20, 0, True),
        ("right of", 20, 0, True),
        ("above", 0, -20, True),
        ("below", 0, 20, True),
        ("above", 0, 20, False),
        ("left of", -3.9, 0, False),  # 1.9 / 3.9 < 0.5
        ("left of", -4.1, 0, True),  # 2.1 / 4.1 > 0.5
        ("left of", -12, -16, False),  # 10 / 20: not more than 0.5
        ("above", -12, -16, True),  # 14 / 20
        ("left of", -12.2, -16, True),  # 10.2 / 20.12
        ("left of", -1.5, 0, False),
        ("left of", 0, 0, False),
    ],
)
def test_relation_follows_genevals_rule(relation: str, x: float, y: float, holds: bool):
    scene = Scene((Clause(1, *RED), Clause(1, *BLUE)), relation)
    strict, partial = judge(scene, [put(*RED, x=32 + x, y=32 + y), put(*BLUE)])
    assert (strict, partial) == ((1.0, 1.0) if holds else (0.0, 0.75))


# ShapesScorer


def test_modes_and_kinds_of_image_agree():
    images, scenes = renders(2, seed=7)
    images[0] = domain.draw([Object(30.0, 30.0, 10.0, "red", "circle")], GREY)
    prompts = ["two red circles", *texts(scenes[1:])]
    strict, partial = ShapesScorer().score_both(images, prompts)
    assert strict.tolist() == [0.0] + [1.0] * 9
    assert partial.tolist() == [0.75] + [1.0] * 9
    assert strict.dtype == partial.dtype == torch.float32
    assert torch.equal(ShapesScorer().score(images, prompts), strict)
    pictures = [Image.fromarray(image).convert("RGBA") for image in images]
    assert torch.equal(ShapesScorer("partial").score(pictures, prompts, [{}] * 10), partial)


def test_both_modes_search_a_picture_once(monkeypatch: pytest.MonkeyPatch):
    images, scenes = renders(1, seed=8)
    searched: list[int] = []

    def counted(image: np.ndarray) -> list[Found]:
        searched.append(image.sum())
        return detect(image)

    monkeypatch.setattr(shapes, "detect", counted)
    parts = [part for _, part in ShapesScorer().variants()]
    for images_now in (images, images[::-1]):
        prompts = texts(scenes if images_now is images else scenes[::-1])
        assert [part.score(images_now, prompts).sum().item() for part in parts] == [5, 5]
    assert len(searched) == 10


def test_no_images_give_no_scores():
    assert ShapesScorer().score([], []).shape == (0,)


def test_a_prompt_outside_the_domain_is_named():
    with pytest.raises(ValueError, match="a photo of a cat"):
        ShapesScorer().score(paint()[None], ["a photo of a cat"])


def test_an_article_before_a_vowel_is_read():
    """The frozen lists have "a orange circle"; people write "an"."""
    image = domain.draw([Object(30.0, 30.0, 10.0, "orange", "circle")], GREY)[None]
    assert domain.parse("an orange circle") == domain.parse("a orange circle")
    for prompt in ("a orange circle", "an orange circle", "An orange circle."):
        assert ShapesScorer().score(image, [prompt]).tolist() == [1]


def test_as_many_prompts_as_images():
    with pytest.raises(ValueError, match="1 images but 2 prompts"):
        ShapesScorer().score(paint()[None], ["a red circle"] * 2)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"'lenient'.*strict, partial"):
        ShapesScorer("lenient")
    assert ShapesScorer.name == "shapes"


def test_factors_are_what_the_picture_was_drawn_with() -> None:
    """Background, and place and size of the object named first, not of the other one; NaN for what is not there."""
    scene = domain.parse("a blue square and a red circle")
    images, expected = [], []
    for seed in range(6):
        generator = np.random.default_rng(seed)
        objects, grey = domain.layout(scene, generator), generator.uniform(0.1, 0.9)
        images.append(domain.draw(objects, np.full(3, grey)))
        linear = ((grey + 0.055) / 1.055) ** 2.4
        lightness = 116 * linear ** (1 / 3) - 16
        expected.append([lightness, objects[0].x, objects[0].y, objects[0].radius * np.pi**0.5])
    found = shapes.ShapesScorer().factors(np.stack(images), [scene.text()] * 6)
    np.testing.assert_allclose(np.array([*found.values()]).T, expected, atol=1.0)
    missing = shapes.ShapesScorer().factors(np.stack(images), ["a green circle"] * 6)
    assert (
        np.isnan(missing["position x"]).all()
        and (missing["background lightness"] == found["background lightness"]).all()
    )


def test_a_photograph_is_judged_in_little_memory() -> None:
    """It has thousands of cores, as large as the picture each: they would take gigabytes."""
    small = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    picture = np.asarray(Image.fromarray(small).resize((480, 480), Image.Resampling.BICUBIC))
    tracemalloc.start()
    try:
        detect(picture)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 150e6, most
