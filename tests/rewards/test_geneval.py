"""The clauses of GenEval on objects made by hand. Expected values come from the definition, on paper."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from tmpo_trainer.prompts.compositional import CLASSES, COLORS
from tmpo_trainer.rewards import geneval
from tmpo_trainer.rewards.geneval import asked_colors, check, judge, keep, relations

Box = tuple[float, float, float, float]


def put(
    name: str,
    x: float = 50,
    y: float = 50,
    size: tuple[float, float] = (10, 10),
    score: float = 0.95,
    color: str | None = None,
) -> geneval.Detection:
    """An object by its centre."""
    box = (x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2)
    return geneval.Detection(name, score, box, color)


def dogs(count: int, score: float = 0.95) -> list[geneval.Detection]:
    return [put("dog", x=20 * i, score=score) for i in range(count)]


def wanted(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def about(tag: str, *include: dict[str, Any], exclude: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    found: dict[str, Any] = {"tag": tag, "include": list(include)}
    return {**found, "exclude": list(exclude)} if exclude else found


def verdict(metadata: dict[str, Any], found: list[geneval.Detection]) -> tuple[float, float]:
    check("a prompt", metadata)
    return judge(metadata, keep(found, metadata["tag"]))


ONE = about("single_object", wanted("dog"))
TWO = about("two_object", wanted("dog"), wanted("cat"))
COUNT = about("counting", wanted("dog", 3), exclude=(wanted("dog", 4),))
RED = about("colors", wanted("dog", color="red"))
LEFT = about("position", wanted("dog"), wanted("cat", position=["left of", 0]))
BOTH = about("color_attr", wanted("dog", color="red"), wanted("cat", color="blue"))


@pytest.mark.parametrize(
    ("metadata", "found", "strict", "partial"),
    [
        (ONE, [put("dog")], 1, 1),
        (ONE, [put("cat")], 0, 0),
        (ONE, [], 0, 0),
        # GenEval allows more objects than asked for; the count term does not.
        (ONE, dogs(2), 1, 0),
        (ONE, dogs(3), 1, 0),
        (TWO, [put("dog"), put("cat")], 1, 1),
        (TWO, [put("dog"), put("bear")], 0, 1 / 2),
        (TWO, [put("cat"), put("cat"), put("dog")], 1, 1 / 2),
        (COUNT, dogs(3), 1, 1),
        (COUNT, dogs(2), 0, 2 / 3),
        (COUNT, dogs(4), 0, 2 / 3),
        (COUNT, dogs(5), 0, 1 / 3),
        (COUNT, dogs(7), 0, 0),
        (COUNT, [*dogs(3), put("cat")], 1, 1),
        # Without an exclude four are three, and more.
        (about("counting", wanted("dog", 3)), dogs(4), 1, 2 / 3),
        (RED, [put("dog", color="red")], 1, 1),
        (RED, [put("dog", color="blue")], 0, 1 / 2),
        (RED, [put("cat", color="red")], 0, 0),
        # Only the better of the two is considered. Too many objects lower only the count term.
        (RED, [put("dog", color="red", score=0.9), put("dog", color="blue", score=0.8)], 1, 1 / 2),
        (RED, [put("dog", color="red", score=0.8), put("dog", color="blue", score=0.9)], 0, 0),
        # All of a group must have the colour.
        (
            about("colors", wanted("dog", 2, color="red")),
            [
                put("dog", color="red", score=0.9),
                put("dog", color="blue", score=0.8),
                put("dog", color="red", score=0.7),
            ],
            0,
            (1 / 2 + 0) / 2,
        ),
        (about("colors", wanted("dog", 2, color="red")), [put("dog", color="red")], 0, (1 / 2 + 0) / 2),
        (BOTH, [put("dog", color="red"), put("cat", color="blue")], 1, 1),
        (BOTH, [put("dog", color="blue"), put("cat", color="red")], 0, 1 / 2),
        (BOTH, [put("dog", color="red"), put("cat", color="red")], 0, 3 / 4),
        (BOTH, [put("dog", color="red")], 0, 1 / 2),
        (LEFT, [put("dog", x=80), put("cat", x=20)], 1, 1),
        (LEFT, [put("dog", x=20), put("cat", x=80)], 0, 2 / 3),
        (LEFT, [put("cat", x=20)], 0, 1 / 3),
        (LEFT, [put("dog", x=80)], 0, 1 / 3),
        # A second dog further left is not the one that counts; the third is better and on the wrong side.
        (LEFT, [put("dog", x=80, score=0.9), put("dog", x=1, score=0.5), put("cat", x=20)], 1, 2 / 3),
        (LEFT, [put("dog", x=80, score=0.9), put("dog", x=1, score=0.95), put("cat", x=20)], 0, 1 / 3),
        # Each of the one group to each of the other.
        (
            about("position", wanted("dog", 2), wanted("cat", 2, position=["left of", 0])),
            [put("dog", x=80), put("dog", x=90), put("cat", x=20), put("cat", x=30)],
            1,
            1,
        ),
        (
            about("position", wanted("dog", 2), wanted("cat", 2, position=["left of", 0])),
            [put("dog", x=80), put("dog", x=90), put("cat", x=20), put("cat", x=85, score=0.4)],
            0,
            2 / 3,
        ),
        (
            about("position", wanted("dog", 2), wanted("cat", position=["left of", 0])),
            [put("dog", x=80), put("dog", x=10, score=0.4), put("cat", x=20)],
            0,
            2 / 3,
        ),
        # A group of the wrong colour is no place to be left of, nor is a cat of the wrong colour left of anything.
        (
            about("position", wanted("dog", color="red"), wanted("cat", position=["left of", 0])),
            [put("dog", x=80, color="blue"), put("cat", x=20)],
            0,
            2 / 4,
        ),
        (
            about("position", wanted("dog"), wanted("cat", color="red", position=["left of", 0])),
            [put("dog", x=80), put("cat", x=20, color="blue")],
            0,
            2 / 4,
        ),
        # The group is the one referred to.
        (
            about("position", wanted("dog"), wanted("bear"), wanted("cat", position=["above", 1])),
            [put("dog", y=10), put("bear", y=90), put("cat", y=50)],
            1,
            1,
        ),
        (
            about("position", wanted("dog"), wanted("bear"), wanted("cat", position=["above", 0])),
            [put("dog", y=10), put("bear", y=90), put("cat", y=50)],
            0,
            3 / 4,
        ),
        # What is excluded and not included is a term of its own.
        (about("two_object", wanted("dog"), exclude=(wanted("cat"),)), [put("dog")], 1, 1),
        (about("two_object", wanted("dog"), exclude=(wanted("cat"),)), [put("dog"), put("cat")], 0, 1 / 2),
        (about("two_object", wanted("dog"), exclude=(wanted("cat", 2),)), [put("dog"), put("cat")], 1, 1),
        # One of two excluded is enough.
        (
            about("two_object", wanted("dog"), exclude=(wanted("cat"), wanted("bear"))),
            [put("dog"), put("cat")],
            0,
            2 / 3,
        ),
    ],
)
def test_verdicts(metadata: dict[str, Any], found: list[geneval.Detection], strict: float, partial: float) -> None:
    assert verdict(metadata, found) == (strict, pytest.approx(partial, abs=1e-12))


def test_thresholds() -> None:
    other = [tag for tag in geneval.TAGS if tag != "counting"]
    assert len(other) == 5
    for tag in other:
        assert keep([put("dog", score=0.3001), put("dog", score=0.3)], tag)["dog"] == [put("dog", score=0.3001)]
    kept = keep([put("dog", score=0.3001), put("dog", score=0.9), put("dog", score=0.9001)], "counting")
    assert kept["dog"] == [put("dog", score=0.9001)]
    # What is too unsure to be counted is not there, for better and for worse.
    assert verdict(COUNT, [*dogs(3), *dogs(2, score=0.89)]) == (1, 1)
    assert verdict(COUNT, dogs(3, score=0.89)) == (0, 0)


def test_at_most_sixteen_of_a_class_the_best_first() -> None:
    scores = [0.5 + i / 100 for i in range(20)]
    found = [put("dog", score=score) for score in scores] + [put("cat", score=0.4)]
    random.Random(0).shuffle(found)
    kept = keep(found, "two_object")
    assert [item.score for item in kept["dog"]] == sorted(scores, reverse=True)[:16]
    assert len(kept["cat"]) == 1
    # Hence a class with seventeen excluded never fails, and sixteen do.
    for count, strict in ((16, 0), (17, 1)):
        assert verdict(about("two_object", wanted("cat"), exclude=(wanted("dog", count),)), found)[0] == strict


def test_equal_scores_stay_in_order() -> None:
    found = [put("dog", x=i, score=0.5) for i in range(20)]
    assert [item.box for item in keep(found, "position")["dog"]] == [item.box for item in found[:16]]


# Positions


@pytest.mark.parametrize(
    ("x", "y", "size", "expected"),
    [
        # Two of 10 x 10 take 2 off each axis: 18 / 20.
        (-20, 0, (10, 10), {"left of"}),
        (20, 0, (10, 10), {"right of"}),
        (0, -20, (10, 10), {"above"}),
        (0, 20, (10, 10), {"below"}),
        # 18 / 28.3 on both axes.
        (-20, -20, (10, 10), {"left of", "above"}),
        (20, -20, (10, 10), {"right of", "above"}),
        (-20, 20, (10, 10), {"left of", "below"}),
        (20, 20, (10, 10), {"right of", "below"}),
        # Of 60 x 60: 8 / 28.3. Of 29 and 30: 14.2 and 14 / 28.28, the half is 14.142.
        (-20, -20, (60, 60), set()),
        (-20, -20, (29, 29), {"left of", "above"}),
        (-20, -20, (30, 30), set()),
        # Width and height count for their own axis: 8 and 18 / 28.3.
        (-20, -20, (60, 10), {"above"}),
        (-20, -20, (10, 60), {"left of"}),
        # 15 / 30 is not more than a half; 15.2 / 30 is.
        (-30, 0, (75, 75), set()),
        (-30, 0, (74, 74), {"left of"}),
        # Points: 10 / 19.7 and 10 / 20.6.
        (-10, 17, (0, 0), {"left of", "below"}),
        (-10, 18, (0, 0), {"below"}),
        # Less than the slack of 2.
        (1.9, 0, (10, 10), set()),
        (0, 0, (10, 10), set()),
        # Below a thousandth of a pixel nothing counts.
        (0.0009, 0, (0, 0), set()),
        (0.0011, 0, (0, 0), {"right of"}),
    ],
)
def test_positions(x: float, y: float, size: tuple[float, float], expected: set[str]) -> None:
    assert relations(put("cat", 50 + x, 50 + y, size).box, put("dog", 50, 50, size).box) == expected


def test_the_sizes_of_both_count() -> None:
    # 10 and 140 take 15 off 30, which leaves no more than the half; 10 and 138 leave 15.2.
    for first, second in ((10, 140), (140, 10)):
        assert relations(put("cat", 0, 0, (first, 10)).box, put("dog", 30, 0, (second, 10)).box) == set()
    for first, second in ((10, 138), (138, 10)):
        assert relations(put("cat", 0, 0, (first, 10)).box, put("dog", 30, 0, (second, 10)).box) == {"left of"}


def slow_relations(a: Box, b: Box) -> set[str]:
    """The rule by projecting the offset on each direction."""
    corners = np.array([a, b]).reshape(2, 2, 2)
    offset = corners[0].mean(0) - corners[1].mean(0)
    extent = np.diff(corners, axis=1).sum((0, 1))
    directions = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    reach = {word: offset @ d - 0.1 * extent @ np.abs(d) for word, d in directions.items()}
    if max(reach.values()) < 1e-3:
        return set()
    return {word for word, value in reach.items() if value > math.dist((0, 0), offset) / 2}


def random_box(generator: random.Random) -> Box:
    left, top = generator.uniform(0, 80), generator.uniform(0, 80)
    return (left, top, left + generator.uniform(1, 60), top + generator.uniform(1, 60))


def test_positions_against_another_way_to_compute_them() -> None:
    generator = random.Random(0)
    seen: set[frozenset[str]] = set()
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for _ in range(3000):
        a, b = random_box(generator), random_box(generator)
        found = relations(a, b)
        assert found == slow_relations(a, b)
        assert relations(b, a) == {opposite[word] for word in found}
        seen.add(frozenset(found))
    # None, four alone, four diagonals.
    assert len(seen) == 9


# Everything together


def rank(item: geneval.Detection, found: list[geneval.Detection], least: float) -> int:
    """How many of the class are better, or 99 if it does not count."""
    better = sum(other.name == item.name and other.score > item.score for other in found)
    return better if item.score > least and better < 16 else 99


def slow_strict(metadata: dict[str, Any], found: list[geneval.Detection]) -> bool:
    """GenEval's verdict by ranks, group by group."""
    least = 0.9 if metadata["tag"] == "counting" else 0.3

    def best(name: str, count: int) -> list[geneval.Detection]:
        return [item for item in found if item.name == name and rank(item, found, least) < count]

    for place, group in enumerate(metadata["include"]):
        chosen = best(group["class"], group["count"])
        if len(chosen) != group["count"] or {item.color for item in chosen} - {
            group.get("color", item.color) for item in chosen
        }:
            return False
        if "position" in group:
            word, other = group["position"]
            assert other < place
            target = metadata["include"][other]
            pairs = itertools.product(chosen, best(target["class"], target["count"]))
            if any(word not in slow_relations(a.box, b.box) for a, b in pairs):
                return False
    return all(len(best(group["class"], group["count"])) < group["count"] for group in metadata.get("exclude", []))


def test_verdicts_against_another_way_to_compute_them() -> None:
    generator = random.Random(1)
    names, verdicts = ("dog", "cat", "bear"), []
    for _ in range(4000):
        found = [
            geneval.Detection(
                generator.choice(names),
                generator.choice((0.2, 0.6, 0.95)) + generator.uniform(-0.05, 0.05),
                random_box(generator),
                generator.choice(COLORS[:2]),
            )
            for _ in range(generator.randrange(8))
        ]
        include = []
        for place in range(generator.randint(1, 3)):
            group = wanted(generator.choice(names), generator.choice((1, 1, 2)))
            if generator.random() < 0.3:
                group["color"] = generator.choice(COLORS[:2])
            if place and generator.random() < 0.5:
                group["position"] = [generator.choice(geneval.POSITIONS), generator.randrange(place)]
            include.append(group)
        exclude = [wanted(generator.choice(names), generator.randint(1, 3))] if generator.random() < 0.5 else []
        metadata = {"tag": generator.choice(geneval.TAGS), "include": include, "exclude": exclude}
        strict, partial = verdict(metadata, found)
        assert strict == slow_strict(metadata, found)
        assert 0 <= partial <= 1
        verdicts.append(strict)
    assert 0.05 < np.mean(verdicts) < 0.5


def test_colours_are_asked_only_of_objects_that_are_looked_at() -> None:
    found = [*dogs(2), put("dog", score=0.99), put("cat"), put("bear")]
    kept = keep(found, "color_attr")
    metadata = about("color_attr", wanted("dog", 2, color="red"), wanted("cat"), wanted("bear", 2, color="blue"))
    # Two dogs of three; no colour for the cat; too few bears for the colour to matter.
    assert asked_colors(metadata, kept) == [("dog", 0), ("dog", 1)]
    again = about("color_attr", wanted("dog", color="red"), wanted("dog", color="blue"), wanted("zebra", color="red"))
    assert asked_colors(again, kept) == [("dog", 0)]


# Metadata


def test_the_names_are_genevals() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert {"computer mouse", "tv remote", "computer keyboard", "hair drier", "potted plant"} < set(CLASSES)
    assert not {"mouse", "remote", "keyboard"} & set(CLASSES)
    # Their places are those of the detector's outputs.
    places = {"person": 0, "truck": 7, "bench": 13, "cat": 15, "dog": 16, "bear": 21, "umbrella": 25, "frisbee": 29}
    places |= {"skis": 30, "kite": 33, "tennis racket": 38, "cup": 41, "banana": 46, "orange": 49, "pizza": 53}
    places |= {"chair": 56, "potted plant": 58, "toilet": 61, "tv": 62, "laptop": 63, "computer mouse": 64}
    places |= {"tv remote": 65, "computer keyboard": 66, "sink": 71, "book": 73, "vase": 75, "toothbrush": 79}
    assert {name: CLASSES.index(name) for name in places} == places
    assert sorted(COLORS) == sorted(
        ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
    )


@pytest.mark.parametrize(
    "metadata",
    [
        ONE,
        TWO,
        COUNT,
        RED,
        LEFT,
        BOTH,
        {**ONE, "prompt": "a photo of a dog"},
        about("counting", wanted("dog", 16), exclude=(wanted("dog", 17),)),
        about("position", wanted("dog"), wanted("cat", position=("left of", 0))),
    ],
)
def test_good_metadata(metadata: dict[str, Any]) -> None:
    check("a prompt", metadata)


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        (None, "geneval needs metadata"),
        ({}, "geneval needs metadata"),
        ("dog", "must be an object"),
        ({"include": [wanted("dog")]}, "tag None is not one of single_object, two_object"),
        (about("animals", wanted("dog")), "tag 'animals' is not one of"),
        ({"tag": "colors"}, 'no "include"'),
        (about("colors"), 'no "include"'),
        ({"tag": "colors", "include": wanted("dog")}, "include must be a list"),
        ({**ONE, "exclude": wanted("dog")}, "exclude must be a list"),
        (about("colors", "dog"), r"include\[0\]: 'dog' is not an object"),
        (about("colors", wanted("unicorn")), r"include\[0\]: class 'unicorn' is not one of COCO's 80"),
        (about("colors", wanted("dgo")), "class 'dgo' .* did you mean dog"),
        (about("colors", wanted("mouse")), "class 'mouse' .* did you mean computer mouse"),
        (about("colors", wanted("keyboard")), "did you mean computer keyboard"),
        (about("colors", wanted("dog"), {"count": 1}), r"include\[1\]: class None"),
        (about("colors", wanted(["dog"])), r"class \['dog'\]"),
        (about("colors", {"class": "dog"}), "count None must be a whole number of at least 1"),
        (about("colors", wanted("dog", 0)), "count 0 must be"),
        (about("colors", wanted("dog", -1)), "count -1 must be"),
        (about("colors", wanted("dog", 1.0)), "count 1.0 must be"),
        (about("colors", wanted("dog", True)), "count True must be"),
        (about("colors", wanted("dog", "2")), "count '2' must be"),
        (about("colors", wanted("dog", 17)), "at most 16"),
        (about("colors", wanted("dog", color="teal")), "color 'teal' is not one of red, orange"),
        (about("colors", wanted("dog", color=None)), "color None"),
        (about("colors", wanted("dog", colour="red")), "unknown key 'colour', did you mean color"),
        (
            about("position", wanted("dog"), wanted("cat", position=["beside", 0])),
            "position 'beside' is not one of left of",
        ),
        (about("position", wanted("dog"), wanted("cat", position="left of")), "position 'left of' must be a pair"),
        (about("position", wanted("dog"), wanted("cat", position=["left of"])), "must be a pair"),
        (
            about("position", wanted("dog"), wanted("cat", position=["left of", 1])),
            r"include\[1\]: .*group 1: .*earlier",
        ),
        (about("position", wanted("dog"), wanted("cat", position=["left of", 2])), "group 2"),
        (about("position", wanted("dog"), wanted("cat", position=["left of", -1])), "group -1"),
        (about("position", wanted("dog", position=["left of", 0]), wanted("cat")), r"include\[0\]: .*group 0"),
        (about("position", wanted("dog"), wanted("cat", position=["left of", "0"])), "group '0'"),
        (about("position", wanted("dog"), wanted("cat", position=["left of", False])), "group False"),
        (about("counting", wanted("dog"), exclude=(wanted("unicorn"),)), r"exclude\[0\]: class 'unicorn'"),
        (about("counting", wanted("dog"), exclude=(wanted("dog", 0),)), r"exclude\[0\]: count 0"),
        (about("counting", wanted("dog"), exclude=(wanted("dog", color="red"),)), r"exclude\[0\]: unknown key 'color'"),
    ],
)
def test_bad_metadata_is_one_line_that_names_the_prompt(metadata: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        check("a photo of something", metadata)
    assert str(caught.value).startswith("prompt 'a photo of something': ") and "\n" not in str(caught.value)


# The scorer, with a detector that knows what it will find


class Fake:
    """A detector of given objects."""

    def __init__(self, *found: list[geneval.Detection]):
        self.found, self.device = list(found), torch.device("cpu")

    def detect(self, images: np.ndarray) -> list[list[geneval.Detection]]:
        return self.found

    def to(self, device: torch.device) -> None:
        self.device = device


class Deaf:
    """A classifier that must not be asked."""

    device = torch.device("cpu")

    def colors(self, cuts: list[np.ndarray], names: list[str]) -> list[str]:
        assert not cuts and not names
        return []

    def to(self, device: torch.device) -> None:
        self.device = device


def scorer(*found: list[geneval.Detection], mode: str = "strict") -> geneval.GenevalScorer:
    detector: Any = Fake(*found)
    classifier: Any = Deaf()
    return geneval.GenevalScorer(detector, classifier, mode)


PICTURES = np.zeros((3, 4, 4, 3), np.uint8)


def test_scores_are_the_verdicts_in_order() -> None:
    found, metadata, prompts = ([dogs(1), dogs(2), [put("cat")]], [ONE, COUNT, ONE], ["a", "b", "c"])
    strict = scorer(*found).score(PICTURES, prompts, metadata)
    partial = scorer(*found, mode="partial").score(PICTURES, prompts, metadata)
    assert strict.tolist() == [1, 0, 0] and partial.tolist() == pytest.approx([1, 2 / 3, 0])
    assert strict.dtype == partial.dtype == torch.float32 and strict.device.type == "cpu"
    assert scorer().score(PICTURES[:0], [], []).shape == (0,)
    # The tag decides what counts.
    unsure, three = dogs(3, score=0.8), about("two_object", wanted("dog", 3))
    assert scorer(unsure, unsure).score(PICTURES[:2], ["a", "b"], [COUNT, three]).tolist() == [0, 1]


def test_a_prompt_without_metadata_is_named() -> None:
    for metadata in (None, [ONE, None, ONE]):
        with pytest.raises(ValueError, match=r"prompt '.': geneval needs metadata"):
            scorer([], [], []).score(PICTURES, ["a", "b", "c"], metadata)
    with pytest.raises(ValueError, match=r"prompt 'b': .*unicorn"):
        scorer([], [], []).score(PICTURES, ["a", "b", "c"], [ONE, about("colors", wanted("unicorn")), ONE])
    with pytest.raises(ValueError, match="3 images, 2 prompts and 2 metadata"):
        scorer([], [], []).score(PICTURES, ["a", "b"], [ONE, ONE])
    with pytest.raises(ValueError, match="3 images, 3 prompts and 2 metadata"):
        scorer([], [], []).score(PICTURES, ["a", "b", "c"], [ONE, ONE])


def test_modes_and_devices() -> None:
    with pytest.raises(ValueError, match=r"'lenient'.*strict, partial"):
        scorer(mode="lenient")
    moved: Any = scorer()
    moved.to(torch.device("meta"))
    assert moved.detector.device.type == moved.classifier.device.type == "meta"
    assert geneval.GenevalScorer.name == "geneval"
