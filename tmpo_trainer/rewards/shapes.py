"""The rule-based scorer of the demo domain: a GenEval for coloured shapes.

`detect` lists the coloured shapes in a picture, `judge` compares the list with what a prompt asks for, and
`ShapesScorer` does both for a batch. There is no learned model. Colours are distinguished by distance in CIE Lab, shapes by
how well the smallest enclosing circle, rectangle and triangle fit them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..demo import domain
from ..demo import split as demo_lists
from ..prompts.lists import PromptList, read_prompts
from ..prompts.split import Split
from . import Scorer

if TYPE_CHECKING:
    from PIL import Image

WEIGHTS = "none"

#: Components smaller than this, in pixels, are specks and not objects (the smallest object drawn has about 175).
MIN_AREA = 20
#: Largest CIE76 distance to a palette colour; the palette's nearest two are 37 apart.
MAX_DELTA_E = 28.0
#: Least area, as a share of the convex hull's, for a component to be a single shape.
MIN_SOLIDITY = 0.8
#: log of area over the area of the smallest enclosing (circle, rectangle, triangle), as measured on 64x64 renders, for each
#: of `domain.SHAPES`.
PROTOTYPES = np.log(
    [
        (0.97, 0.785, 0.62),  # circle
        (0.66, 0.97, 0.50),  # square
        (0.44, 0.52, 0.93),  # triangle
    ]
)

#: A component less solid or less uniform in colour than this may be several objects that touch.
WHOLE_SOLIDITY = 0.9
WHOLE_UNIFORMITY = 0.95
#: What each part of a split component needs to count as an object: solidity, and area of part and core in pixels.
PART_SOLIDITY = 0.85
PART_AREA = 60
PART_CORE = 6
#: A component with more cores is no scene of a few objects.
MOST_PARTS = 64
#: Erosions tried in a split. The last one cuts necks of up to ten pixels.
SPLIT_EROSIONS = 5

#: GenEval's position rule: share of the sizes that is subtracted from the offset, and the cosine that makes it a relation.
POSITION_SLACK = 0.1
POSITION_COSINE = 0.5

MODES = ("strict", "partial")

#: The names of `ShapesScorer.factors`.
FACTORS = ("background lightness", "position x", "position y", "size")


@dataclass(frozen=True)
class Found:
    """A detected object. Pixels, y downwards; `x`, `y`, `width`, `height` are those of the bounding box."""

    color: str | None
    """Name in `domain.PALETTE`; None if no palette colour is near."""
    shape: str | None
    """One of `domain.SHAPES`; None if the outline is not convex enough for any."""
    x: float
    y: float
    width: float
    height: float
    area: float


@dataclass(frozen=True)
class _Blob:
    """A detected object, and how likely it is a single one."""

    found: Found
    solidity: float
    uniformity: float
    """Share of the core within MAX_DELTA_E of its median colour."""


def detect(image: np.ndarray) -> list[Found]:
    """The coloured shapes in a picture, in no meaningful order.

    The background is the median colour of the border. Pixels that are nearer to a palette colour than to it are foreground.
    Holes are filled, and 8-connected components are formed. A component that is not convex or not of one colour is split if
    every part is then a clean object; otherwise it stays whole.

    Args:
        image: uint8 RGB `[H, W, 3]`.

    Raises:
        ValueError: for another dtype or shape.
    """
    cv2 = opencv()
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected a uint8 RGB image [H, W, 3], got {image.dtype} {list(image.shape)}")
    lab = _to_lab(cv2.medianBlur(np.ascontiguousarray(image), 3))
    to_palette = _squared_distances(lab, _palette_lab())
    to_background = _squared_distances(lab, _median(_border(lab))[None])[0]
    foreground = _fill_holes((to_palette.min(0) < to_background).astype(np.uint8))

    found: list[Found] = []
    count, labels, stats, _ = cv2.connectedComponentsWithStats(foreground, connectivity=8)
    for index in range(1, count):
        left, top, width, height, area = (int(value) for value in stats[index])
        if area < MIN_AREA:
            continue
        box = slice(top, top + height), slice(left, left + width)
        mask = (labels[box] == index).astype(np.uint8)
        blob = _describe(mask, lab[box], left, top)
        parts: list[_Blob] = []
        if blob.solidity < WHOLE_SOLIDITY or blob.uniformity < WHOLE_UNIFORMITY:
            parts = _split(mask, to_palette[:, *box].argmin(0), lab[box], left, top)
        found += [part.found for part in parts or [blob]]
    return found


def judge(scene: domain.Scene, found: Sequence[Found]) -> tuple[float, float]:
    """How well detected objects match a scene: `(strict, partial)`, each in 0..1.

    strict is 1 if the objects are exactly those asked for, with nothing else and nothing unknown, and the relation
    holds; else 0. partial is the mean of its clauses: `max(0, 1 - |n - found| / n)` for each kind asked for, 1 or 0 for
    the relation, if any, and 1 or 0 for "nothing else", which fails if there are objects of other kinds. Clauses of the
    same kind count as one. The relation holds if it does for any pair of the kinds it names.
    """
    asked: Counter[tuple[str | None, str | None]] = Counter()
    for clause in scene.clauses:
        asked[clause.color, clause.shape] += clause.count
    seen = Counter((item.color, item.shape) for item in found)

    terms = [max(0.0, 1.0 - abs(n - seen[kind]) / n) for kind, n in asked.items()]
    related = True
    if scene.relation is not None:
        first, second = ((clause.color, clause.shape) for clause in scene.clauses)
        related = any(
            _holds(scene.relation, a, b)
            for a, b in permutations(found, 2)
            if (a.color, a.shape) == first and (b.color, b.shape) == second
        )
        terms.append(float(related))
    terms.append(float(all(kind in asked for kind in seen)))
    return float(seen == asked and related), sum(terms) / len(terms)


class Detector:
    """Detects shapes in pictures. Keeps the result of the last call and reuses it for the same pictures."""

    def __init__(self) -> None:
        self._last: tuple[bytes, list[list[Found]]] | None = None

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Found]]:
        """The shapes in every picture, see `detect`."""
        key = hashlib.sha256()
        for image in images:
            key.update(repr((image.shape, image.dtype)).encode())
            key.update(np.ascontiguousarray(image).data)
        last = self._last
        if last is None or last[0] != key.digest():
            last = self._last = (key.digest(), [detect(image) for image in images])
        return last[1]


class ShapesScorer:
    """Scores pictures of the demo domain against their prompts, without any model.

    Args:
        mode: what `score` returns: "strict" (0 or 1, for training) or "partial" (0..1, for evaluation); see `judge`.
        detector: may be shared. If scorers get the same pictures one after the other, they are searched only once.

    Raises:
        ValueError: for another mode.
    """

    name = "shapes"

    def __init__(self, mode: str = "strict", detector: Detector | None = None) -> None:
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r} of the shapes scorer: one of {', '.join(MODES)}")
        self.mode, self.detector = mode, detector or Detector()

    def score(
        self,
        images: Sequence[Image.Image] | np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Tensor:
        """Scores in 0..1, float32 `[N]`, on the CPU.

        Args:
            images: N PIL images, or uint8 RGB `[N, H, W, 3]`.
            prompts: N prompts of the demo domain.
            metadata: not used; the prompt says everything.

        Raises:
            ValueError: a prompt is outside the domain (the error names it), or images and prompts differ in number.
        """
        strict, partial = self.score_both(images, prompts)
        return strict if self.mode == "strict" else partial

    def score_both(self, images: Sequence[Image.Image] | np.ndarray, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Strict and partial scores, each float32 `[N]`, from one detection; arguments and errors as in `score`."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        scenes = [domain.parse(prompt) for prompt in prompts]
        found = self.detector([_to_array(image) for image in images])
        scores = [judge(scene, shapes) for scene, shapes in zip(scenes, found, strict=True)]
        table = torch.tensor(scores, dtype=torch.float32).reshape(-1, 2)
        return table[:, 0].contiguous(), table[:, 1].contiguous()

    def factors(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """What prompts leave open, float `[N]` each: lightness of the background, place and size of the object named first.

        The lightness is CIE L, 0 to 100. Place and size are means over the detected objects of the first clause's colour and
        shape, in pixels: centres of bounding boxes, square roots of areas. They are NaN if no such object was detected.

        Args:
            images: uint8 RGB `[N, H, W, 3]`. prompts: N prompts of the demo domain.
        """
        rows = []
        for image, prompt, found in zip(images, prompts, self.detector(list(images)), strict=True):
            asked = domain.parse(prompt).clauses[0]
            own = [(f.x, f.y, f.area**0.5) for f in found if (f.color, f.shape) == (asked.color, asked.shape)]
            rows.append([_background_lightness(image), *(np.mean(own, 0) if own else [np.nan] * 3)])
        return dict(zip(FACTORS, np.array(rows).reshape(-1, len(FACTORS)).T, strict=True))

    def variants(self) -> list[tuple[str, Scorer]]:
        """Both modes, its own first. They share the detector, which searches each picture once."""
        modes = sorted(MODES, key=lambda mode: mode != self.mode)
        return [(f"shapes {mode}", ShapesScorer(mode, self.detector)) for mode in modes]


@cache
def opencv() -> Any:
    """OpenCV, or the same functions in numpy, which are slower.

    ComfyUI comes without OpenCV, and its users must not have to install it for the demo.
    """
    try:
        import cv2
    except ImportError:
        from .parts import without_opencv as cv2
    return cv2


def _holds(relation: str, a: Found, b: Found) -> bool:
    """GenEval's rule: is `a` in `relation` to `b`, with some slack for their sizes?"""
    offset = np.array([a.x - b.x, a.y - b.y])
    slack = POSITION_SLACK * np.array([a.width + b.width, a.height + b.height])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - slack, 0.0)
    # The norm is that of the unshrunk offset, so that objects too close to call are in no relation.
    return bool(shrunk @ np.array(domain.DIRECTIONS[relation]) > POSITION_COSINE * np.hypot(*offset))


def _describe(mask: np.ndarray, lab: np.ndarray, left: int, top: int) -> _Blob:
    """Colour and shape of one object: mask uint8 0/1 `[h, w]` and Lab `[h, w, 3]` of a box at `(left, top)`."""
    cv2 = opencv()

    core = _erode(mask, 1).astype(bool)
    colors = lab[core] if core.any() else lab[mask.astype(bool)]
    median = _median(colors)
    to_palette = np.sqrt(_squared_distances(median, _palette_lab()))
    nearest = int(to_palette.argmin())
    color = list(domain.PALETTE)[nearest] if to_palette[nearest] < MAX_DELTA_E else None
    uniformity = float((_squared_distances(colors, median[None])[0] < MAX_DELTA_E**2).mean())

    # The hull goes round the corners of pixels. Through their centres it would be half a pixel too small on all sides.
    # Of each row only the first and last pixel can touch it.
    rows = np.flatnonzero(mask.any(1))
    first = mask[rows].argmax(1)
    last = mask.shape[1] - mask[rows, ::-1].argmax(1)
    xs, ys = np.concatenate([first, last, first, last]), np.concatenate([rows, rows, rows + 1, rows + 1])
    hull = cv2.convexHull(np.stack([xs, ys], 1).astype(np.float32))
    area = int(np.count_nonzero(mask))
    solidity = area / cv2.contourArea(hull)
    shape = None
    if solidity > MIN_SOLIDITY:
        _, radius = cv2.minEnclosingCircle(hull)
        _, (side, other), _ = cv2.minAreaRect(hull)
        triangle, _ = cv2.minEnclosingTriangle(hull)
        ratios = np.log([area / (np.pi * radius**2), area / (side * other), area / triangle])
        shape = domain.SHAPES[int(np.square(PROTOTYPES - ratios).sum(1).argmin())]

    x0, x1, y0, y1 = int(first.min()), int(last.max()), int(rows[0]), int(rows[-1]) + 1
    found = Found(color, shape, left + (x0 + x1) / 2, top + (y0 + y1) / 2, x1 - x0, y1 - y0, area)
    return _Blob(found, float(solidity), uniformity)


def _split(mask: np.ndarray, nearest: np.ndarray, lab: np.ndarray, left: int, top: int) -> list[_Blob]:
    """The objects of a component in which several touch; empty if it does not split into clean ones.

    Each palette colour is eroded on its own until the component has several cores. A pixel then goes to the nearest core.

    Args:
        mask: uint8 0/1 `[h, w]`, the component in a box at `(left, top)`.
        nearest: index of the nearest palette colour, `[h, w]`.
        lab: `[h, w, 3]`.
    """
    cv2 = opencv()

    layers = [mask * (nearest == index).astype(np.uint8) for index in np.unique(nearest[mask.astype(bool)])]
    for erosions in range(1, SPLIT_EROSIONS + 1):
        cores: list[tuple[np.ndarray, int]] = []
        for layer in layers:
            count, labels, stats, _ = cv2.connectedComponentsWithStats(_erode(layer, erosions), connectivity=4)
            large = [index for index in range(1, count) if stats[index, cv2.CC_STAT_AREA] >= PART_CORE]
            cores += [(labels, index) for index in large]
        # Every part must have PART_AREA pixels. A photograph has thousands of cores, whose maps would fill the memory.
        if not 2 <= len(cores) <= min(MOST_PARTS, int(mask.sum()) // PART_AREA):
            continue
        owner, nearest_core = np.zeros(mask.shape, np.intp), np.full(mask.shape, np.inf, np.float32)
        for place, (labels, index) in enumerate(cores):
            to_core = cv2.distanceTransform((labels != index).astype(np.uint8), cv2.DIST_L2, 5)
            closer = to_core < nearest_core
            owner[closer], nearest_core[closer] = place, to_core[closer]
        parts = [mask * (owner == index).astype(np.uint8) for index in range(len(cores))]
        if min(int(part.sum()) for part in parts) < PART_AREA:
            continue
        blobs = [_describe(part, lab, left, top) for part in parts]
        if all(blob.found.color and blob.found.shape and blob.solidity > PART_SOLIDITY for blob in blobs):
            return blobs
    return []


def _erode(mask: np.ndarray, times: int) -> np.ndarray:
    """A uint8 mask with `times` pixels removed on all sides. The area outside the array counts as empty."""
    cv2 = opencv()

    kernel = np.ones((3, 3), np.uint8)
    return cv2.erode(mask, kernel, iterations=times, borderType=cv2.BORDER_CONSTANT, borderValue=(0,))


def _fill_holes(mask: np.ndarray) -> np.ndarray:
    """A uint8 0/1 mask in which everything that the (4-connected) outside does not reach is set to 1."""
    cv2 = opencv()

    # The margin joins all parts of the outside, so that one fill from a corner reaches them.
    outside = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=(0,))
    cv2.floodFill(outside, None, (0, 0), (2,), flags=4)
    return (outside[1:-1, 1:-1] != 2).astype(np.uint8)


def _border(image: np.ndarray) -> np.ndarray:
    """The outermost pixels of `[H, W, 3]`: `[M, 3]`."""
    return np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])


def _background_lightness(image: np.ndarray) -> float:
    """L of the background as `detect` sees it, 0 to 100; uint8 RGB `[H, W, 3]`."""
    cv2 = opencv()

    return float(_median(_to_lab(_border(cv2.medianBlur(np.ascontiguousarray(image), 3))[None])[0])[0])


def _to_lab(image: np.ndarray) -> np.ndarray:
    """CIE Lab (D65, L in 0..100), float32, of a uint8 sRGB image; the same shape."""
    cv2 = opencv()

    return cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


@cache
def _palette_lab() -> np.ndarray:
    """The palette in CIE Lab, `[8, 3]`, in the order of `domain.PALETTE`."""
    return _to_lab(np.array([list(domain.PALETTE.values())], np.uint8))[0]


def _squared_distances(points: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Squared distances `[M, ...]` of points `[..., 3]` to references `[M, 3]`."""
    # One channel at a time over whole arrays: sums over a last axis of three are many times slower.
    total = np.zeros((), np.float32)
    for channel in range(3):
        column = references[:, channel].reshape(-1, *[1] * (points.ndim - 1))
        difference = np.ascontiguousarray(points[..., channel]) - column
        total = total + np.square(difference, out=difference)
    return total


def _median(points: np.ndarray) -> np.ndarray:
    """The median `[3]` of each column of `[N, 3]`, as `np.median`, which takes several times as long for so few."""
    columns = np.sort(points.T)
    return (columns[:, (len(points) - 1) // 2] + columns[:, len(points) // 2]) / 2


def _to_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """A picture as an RGB array `[H, W, 3]`."""
    return image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB"))


def check(prompt: str, metadata: Mapping[str, Any] | None, path: str | None = None) -> None:
    """Raises ValueError for a prompt outside the demo domain."""
    domain.parse(prompt)


def default_prompts(split: Split) -> PromptList:
    """The demo's lists."""
    return read_prompts(demo_lists.FOLDER / f"{split}.txt")


def load(device: torch.device, path: str | None = None) -> ShapesScorer:
    """The scorer in strict mode, which runs on the CPU."""
    return ShapesScorer()
