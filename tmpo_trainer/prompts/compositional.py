"""GenEval-style prompts with their metadata: objects, counts, colours, places. Ghosh et al. 2023, arXiv:2310.11513.

The six tags and the metadata are GenEval's; the phrasing and the choice of scenes are our own.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .split import Split, side

#: COCO's classes, named as GenEval's prompts name them, in the order of the outputs of the detector in `rewards`.
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

#: Shares of the tags. In training, hard ones are more frequent.
SHARES: dict[Split, dict[str, int]] = {
    "train": {"single_object": 1, "two_object": 2, "counting": 5, "colors": 2, "position": 7, "color_attr": 5},
    "heldout": {"single_object": 1, "two_object": 1, "counting": 1, "colors": 1, "position": 1, "color_attr": 1},
}

FRAMES = (
    "a photo of {}",
    "a photograph showing {}",
    "a clear picture of {}",
    "an everyday scene with {}",
    "{}, photographed in daylight",
    "{}",
)

NUMBERS = {2: "two", 3: "three", 4: "four"}

PLURALS = {"person": "people", "sheep": "sheep", "knife": "knives", "computer mouse": "computer mice"}

#: Left out of counting, because they are hard to count in words and in pictures.
UNCOUNTED = ("skis", "scissors", "broccoli")

#: "a left of b" and "b right of a" are one scene.
OPPOSITE = {"right of": "left of", "below": "above"}

Entry = dict[str, Any]


def scene(entry: Mapping[str, Any]) -> str:
    """A key for the scene in GenEval's metadata, equal for equal scenes however the prompt is phrased."""
    objects = [f"{o.get('count', 1)} {o.get('color', '')} {o['class']}" for o in entry["include"]]
    for i, item in enumerate(entry["include"]):
        if "position" in item:
            word, other = item["position"]
            pair = (objects[i], objects[other])
            return f"{pair[0]} {word} {pair[1]}" if word not in OPPOSITE else f"{pair[1]} {OPPOSITE[word]} {pair[0]}"
    return " + ".join(sorted(objects))


def generate(split: Split, count: int, seed: int = 0, exclude: Iterable[Mapping[str, Any]] = ()) -> list[Entry]:
    """Different prompts of one split, as lines of a .jsonl file. Tags take turns by their shares.

    Args:
        exclude: metadata of prompts whose scenes are left out, such as GenEval's own evaluation list.

    Raises:
        ValueError: there are fewer than `count`.
    """
    generator = random.Random(f"{split}:{seed}")
    seen = {scene(entry) for entry in exclude}
    shares = SHARES[split]
    drawn = {tag: _draw(tag, split, seen, generator) for tag in shares}
    entries: list[Entry] = []
    # Where in the list the next prompt of a tag is due.
    due = {tag: 0.5 / share for tag, share in shares.items()}
    while len(entries) < count:
        tag = min(due, key=lambda name: due[name])
        due[tag] += 1 / shares[tag]
        entry = next(drawn[tag], None)
        if entry is None:
            raise ValueError(f"there are fewer than {count} {split} prompts: {tag} has no more after {len(entries)}")
        entries.append(entry)
    return entries


def _draw(tag: str, split: Split, left_out: set[str], generator: random.Random) -> Iterator[Entry]:
    """Prompts of a tag: all scenes in one phrasing, then all in the next."""
    scenes = [entry for entry in SCENES[tag]() if side(scene(entry)) == split and scene(entry) not in left_out]
    generator.shuffle(scenes)
    for turn in range(len(FRAMES)):
        for i, entry in enumerate(scenes):
            frame = FRAMES[(i + turn) % len(FRAMES)]
            yield {"tag": tag, **entry, "prompt": frame.format(_words(entry))}


def _words(entry: Entry) -> str:
    first, *rest = entry["include"]
    if not rest:
        return _noun(first)
    if "position" in rest[0]:
        return f"{_noun(rest[0])} {rest[0]['position'][0]} {_noun(first)}"
    return f"{_noun(first)} and {_noun(rest[0])}"


def _noun(item: Mapping[str, Any]) -> str:
    words = f"{item['color']} {item['class']}" if "color" in item else item["class"]
    if item["count"] > 1:
        return f"{NUMBERS[item['count']]} {plural(words)}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(noun: str) -> str:
    if noun in PLURALS:
        return PLURALS[noun]
    return noun + ("es" if noun.endswith(("s", "ch", "sh", "x")) else "s")


def _item(name: str, **more: Any) -> Entry:
    return {"class": name, "count": 1, **more}


def _single() -> list[Entry]:
    return [{"include": [_item(name)]} for name in CLASSES]


def _two() -> list[Entry]:
    return [{"include": [_item(a), _item(b)]} for a, b in itertools.combinations(CLASSES, 2)]


def _counting() -> list[Entry]:
    return [
        {"include": [{"class": name, "count": n}], "exclude": [{"class": name, "count": n + 1}]}
        for name in CLASSES
        if name not in UNCOUNTED
        for n in NUMBERS
    ]


def _colors() -> list[Entry]:
    return [{"include": [_item(name, color=color)]} for name in CLASSES if name != "person" for color in COLORS]


def _position() -> list[Entry]:
    return [
        {"include": [_item(b), _item(a, position=[word, 0])]}
        for a, b in itertools.permutations(CLASSES, 2)
        for word in ("left of", "right of", "above", "below")
    ]


def _color_attr() -> list[Entry]:
    """A part of the half million scenes: every pair of classes, each with the next pair of colours in turn."""
    things = [name for name in CLASSES if name != "person"]
    pairs = itertools.cycle(random.Random(0).sample(list(itertools.permutations(COLORS, 2)), 89))
    return [
        {"include": [_item(a, color=one), _item(b, color=other)]}
        for (a, b), (one, other) in zip(itertools.combinations(things, 2), pairs, strict=False)
    ]


SCENES = {
    "single_object": _single,
    "two_object": _two,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}
