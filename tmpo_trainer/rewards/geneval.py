"""GenEval: are the objects of a prompt there, in number, colour and place? Ghosh et al. 2023, arXiv:2310.11513.

A detector lists objects, CLIP names their colours where a prompt gives one, and rules compare them with the prompt's
metadata. The metadata has GenEval's own format: a tag; `include`, groups of objects that should be there; `exclude`, groups
that should not.

    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}
    {"tag": "position",
     "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import hypot
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..prompts.compositional import CLASSES, COLORS, generate
from ..prompts.lists import GENERATED, PromptList, from_entries
from ..prompts.split import Split
from ..settings.errors import ConfigError, suggest
from . import Scorer, clipscore
from .parts.clip import TOKENIZER, load_clip
from .parts.detect import THRESHOLD, Box, ColorClassifier, Detection, Detector, cut, load_detector
from .parts.weights import Source, existing, hub_folder

SOURCES: tuple[Source, ...] = (
    ("facebook/mask2former-swin-small-coco-instance", ("config.json", "model.safetensors")),
    clipscore.SOURCES[0],
    TOKENIZER,
)
MODES = ("strict", "partial")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
POSITIONS = ("left of", "right of", "above", "below")
#: Under the tag `counting`, only objects with a score above this count.
COUNTING_THRESHOLD = 0.9
#: At most this many objects of a class are considered, best first.
MOST_OBJECTS = 16
#: Share of both sizes that is subtracted from an offset, and the share of its length that the rest must exceed.
POSITION_SLACK = 0.1
POSITION_SHARE = 0.5

#: Objects of a picture by class, best first.
Objects = dict[str, list[Detection]]


def keep(found: Sequence[Detection], tag: str) -> Objects:
    """The objects that count under a tag: those above its threshold, at most MOST_OBJECTS of each class, best first.

    Objects with equal scores keep the order in which they were found.
    """
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    objects: Objects = {}
    for item in sorted(found, key=lambda item: -item.score):
        group = objects.setdefault(item.name, [])
        if item.score > threshold and len(group) < MOST_OBJECTS:
            group.append(item)
    return objects


def relations(a: Box, b: Box) -> set[str]:
    """Where `a` is, seen from `b`: up to two of POSITIONS, none if they are too close to call.

    Per axis, the distance of the centres less POSITION_SLACK of both sizes must exceed POSITION_SHARE of the distance
    of the centres in the plane (before anything is subtracted). A diagonal pair may be in two relations.
    """
    x, y = ((a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1))
    across, down = (
        max(abs(offset) - POSITION_SLACK * (a[i + 2] - a[i] + b[i + 2] - b[i]), 0.0) for i, offset in ((0, x), (1, y))
    )
    least = POSITION_SHARE * hypot(x, y)
    # GenEval's guard: less than a thousandth of a pixel counts as nothing.
    if max(across, down) < 1e-3:
        return set()
    pairs = ((across, "left of" if x < 0 else "right of"), (down, "above" if y < 0 else "below"))
    return {word for length, word in pairs if length > least}


def asked_colors(metadata: Mapping[str, Any], objects: Objects) -> list[tuple[str, int]]:
    """The objects whose colour matters, as class and place in its list: a group's first `count`, if there are that many."""
    asked = [
        (group["class"], place)
        for group in metadata["include"]
        if "color" in group and len(objects.get(group["class"], [])) >= group["count"]
        for place in range(group["count"])
    ]
    return list(dict.fromkeys(asked))


def judge(metadata: Mapping[str, Any], objects: Objects) -> tuple[float, float]:
    """How well a picture's objects match a prompt's metadata: `(strict, partial)`, each in 0..1.

    strict is GenEval's verdict: 1 if all groups are there and nothing excluded is, else 0. A group is there if
        - the picture has at least `count` objects of its class. More are allowed unless `exclude` gives the class a
          count: then there must be fewer than that. The next two rules consider only the `count` best;
        - each of these has the group's colour, if it gives one (another object of that colour does not help);
        - each of these is in the group's position to each object of the group that it refers to, which must be there.
    Groups are judged independently: two groups of one class look at the same objects.

    partial is the mean of these terms of the groups: max(0, 1 - |count - number found| / count), so that too many
    objects lower it too; 1 or 0 for the colour, if any; 1 or 0 for the position, if any. The colour term is 0 if there
    are too few objects, and the position term if the number or colour of either group is wrong. An excluded class adds
    a 1 or 0 only if no group has it, because the groups' terms already count their own classes.

    Args:
        metadata: passes `check`. objects: have colours where `asked_colors` lists them.
    """
    terms: list[float] = []
    groups: list[list[Detection] | None] = []
    for group in metadata["include"]:
        count = group["count"]
        found = objects.get(group["class"], [])
        chosen = found[:count]
        terms.append(max(0.0, 1 - abs(count - len(found)) / count))
        holds = len(chosen) == count
        if "color" in group:
            holds = holds and all(item.color == group["color"] for item in chosen)
            terms.append(float(holds))
        if "position" in group:
            word, other = group["position"]
            targets = groups[other]
            holds = holds and targets is not None
            holds = holds and all(word in relations(a.box, b.box) for a in chosen for b in targets or [])
            terms.append(float(holds))
        groups.append(chosen if holds else None)
    strict = None not in groups
    wanted = {group["class"] for group in metadata["include"]}
    for group in metadata.get("exclude", []):
        absent = len(objects.get(group["class"], [])) < group["count"]
        strict = strict and absent
        if group["class"] not in wanted:
            terms.append(float(absent))
    return float(strict), sum(terms) / len(terms)


def check(prompt: str, metadata: Mapping[str, Any] | None, path: str | None = None) -> None:
    """Raises ValueError unless the metadata has GenEval's format. The error names the prompt and the fix in one line."""
    try:
        _check(metadata)
    except ValueError as error:
        raise ValueError(f"prompt {prompt!r}: {error}") from None


def _check(metadata: Any) -> None:
    if not metadata:
        raise ValueError('geneval needs metadata: give "tag" and "include" beside the prompt, in a .jsonl file')
    if not isinstance(metadata, Mapping):
        raise ValueError(f'the metadata must be an object with "tag" and "include", not {metadata!r}')
    if metadata.get("tag") not in TAGS:
        raise ValueError(f"tag {metadata.get('tag')!r} is not one of {', '.join(TAGS)}")
    for key in ("include", "exclude"):
        groups = metadata.get(key, [])
        if not isinstance(groups, list | tuple):
            raise ValueError(f"{key} must be a list")
        for place, group in enumerate(groups):
            try:
                _check_group(group, place, ("color", "position") if key == "include" else ())
            except ValueError as error:
                raise ValueError(f"{key}[{place}]: {error}") from None
    if not metadata.get("include"):
        raise ValueError('no "include": list at least one group, such as {"class": "dog", "count": 1}')
    for place, group in enumerate(metadata["include"]):
        if group["count"] > MOST_OBJECTS:
            raise ValueError(f"include[{place}]: count {group['count']}: at most {MOST_OBJECTS} of a class are seen")


def _check_group(group: Any, place: int, more: Sequence[str]) -> None:
    if not isinstance(group, Mapping):
        raise ValueError(f'{group!r} is not an object with "class" and "count"')
    known = ("class", "count", *more)
    for key in group:
        if key not in known:
            raise ValueError(f"unknown key {key!r}{suggest(str(key), known)} (known: {', '.join(known)})")
    name, count = group.get("class"), group.get("count")
    if name not in CLASSES:
        # A class that ends in the word is the better hint: COCO's "mouse" is GenEval's "computer mouse".
        ends = [known for known in CLASSES if known.endswith(f" {name}")]
        hint = f", did you mean {ends[0]}?" if ends else suggest(str(name), CLASSES)
        raise ValueError(f"class {name!r} is not one of COCO's 80 as GenEval names them{hint}")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"count {count!r} must be a whole number of at least 1")
    if "color" in group and group["color"] not in COLORS:
        raise ValueError(f"color {group['color']!r} is not one of {', '.join(COLORS)}")
    if "position" in group:
        _check_position(group["position"], place)


def _check_position(position: Any, place: int) -> None:
    if not isinstance(position, list | tuple) or len(position) != 2:
        raise ValueError(f'position {position!r} must be a pair such as ["left of", 0]')
    word, other = position
    if word not in POSITIONS:
        raise ValueError(f"position {word!r} is not one of {', '.join(POSITIONS)}")
    if not isinstance(other, int) or isinstance(other, bool) or not 0 <= other < place:
        raise ValueError(f"position refers to group {other!r}: give the number of an earlier group in include, from 0")


class GenevalScorer:
    """Scores pictures against the metadata of their prompts; see `judge`.

    Args:
        detector: may be shared. If scorers get the same pictures one after the other, it processes them only once.
        mode: what `score` returns, "strict" (0 or 1, for training) or "partial" (0..1, for evaluation).

    Raises:
        ValueError: for another mode.
    """

    name = "geneval"

    def __init__(self, detector: Detector, classifier: ColorClassifier, mode: str = "strict"):
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r} of the geneval scorer: one of {', '.join(MODES)}")
        self.detector, self.classifier, self.mode = detector, classifier, mode

    def to(self, device: torch.device) -> None:
        self.detector.to(device)
        self.classifier.to(device)

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None = None) -> Tensor:
        """Scores in 0..1, float32 `[N]`, on the CPU.

        Args:
            images: uint8 RGB `[N, H, W, 3]`. prompts, metadata: N of each.

        Raises:
            ValueError: the metadata of a prompt is missing or wrong (the error names the prompt), the numbers of images,
                prompts and metadata differ, or a model's output is not finite.
        """
        metadata = metadata or [None] * len(prompts)
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata")
        for prompt, about in zip(prompts, metadata, strict=True):
            check(prompt, about)
        found = self.detector.detect(images)
        kept = [keep(objects, about["tag"]) for objects, about in zip(found, metadata, strict=True)]
        asked = [(i, name, place) for i, about in enumerate(metadata) for name, place in asked_colors(about, kept[i])]
        cuts = [cut(images[i], kept[i][name][place]) for i, name, place in asked]
        colors = self.classifier.colors(cuts, [name for _, name, _ in asked])
        for (i, name, place), color in zip(asked, colors, strict=True):
            kept[i][name][place] = replace(kept[i][name][place], color=color)
        pairs = [judge(about, objects) for about, objects in zip(metadata, kept, strict=True)]
        return torch.tensor([pair[MODES.index(self.mode)] for pair in pairs], dtype=torch.float32)

    def variants(self) -> list[tuple[str, Scorer]]:
        """Both modes, whichever one is trained on. They share the detector, which processes each picture once."""
        return [(f"geneval {mode}", GenevalScorer(self.detector, self.classifier, mode)) for mode in MODES]


def default_prompts(split: Split) -> PromptList:
    """Generated prompts with GenEval's metadata."""
    return from_entries("geneval prompts", generate(split, GENERATED[split]))


def load(device: torch.device, path: str | None = None) -> GenevalScorer:
    """The scorer in strict mode.

    Args:
        path: a folder with the folders `detector` (transformers' Mask2Former for COCO) and `classifier` (CLIP
            ViT-L/14), in place of the hub's.

    Raises:
        ConfigError: the weights cannot be found or downloaded, or are not this scorer's.
    """
    if path:
        folders = [existing("geneval", path) / name for name in ("detector", "classifier")]
        for folder, (repository, _) in zip(folders, SOURCES, strict=False):
            if not folder.is_dir():
                raise ConfigError(
                    f"--reward-models geneval={path}: {folder} does not exist: put the files of "
                    f"https://huggingface.co/{repository} there"
                )
    else:
        folders = [hub_folder("geneval", source) for source in SOURCES[:2]]
    return GenevalScorer(load_detector(folders[0], device), ColorClassifier(load_clip("geneval", folders[1], device)))
