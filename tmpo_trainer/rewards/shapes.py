"""The rule-based scorer of the demo domain: a GenEval for coloured shapes.

`detect` lists the coloured shapes in a picture, `judge` compares the list with what a prompt asks for, and
`ShapesScorer` does both for a batch. There is no learned model. Colours are distinguished by distance in CIE Lab, shapes by
how well the smallest enclosing circle, rectangle and triangle fit them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
PACKAGES = {"cv2": "opencv-python-headless"}

#: Components smaller than this, in pixels, are specks and not objects (the smallest object drawn has about 175).
MIN_AREA = 20
#: Largest CIE76 distance to a palette colour; the palette's nearest two are 37 apart.
MAX_DELTA_E = 28.0
#: Least area, as a share of the convex hull's, for a component to be a single shape.
MIN_SOLIDITY = 0.8
#: log of area over the area of the smallest enclosing (circle, rectangle, triangle), as measured on 64x64 renders.
PROTOTYPES = {
    shape: np.log(ratios)
    for shape, ratios in {
        "circle": (0.97, 0.785, 0.62),
        "square": (0.66, 0.97, 0.50),
        "triangle": (0.44, 0.52, 0.93),
    }.items()
}

#: A component less solid or less uniform in colour than this may be several objects that touch.
WHOLE_SOLIDITY = 0.9
WHOLE_UNIFORMITY = 0.95
#: What each part of a split component needs to count as an object: solidity, and area of part and core in pixels.
PART_SOLIDITY = 0.85
PART_AREA = 60
PART_CORE = 6
#: Erosions tried in a split. The last one cuts necks of up to ten pixels.
SPLIT_EROSIONS = 5

#: GenEval's position rule: share of the sizes that is subtracted from the offset, and the cosine that makes it a relation.
POSITION_SLACK = 0.1
POSITION_COSINE = 0.5

MODES = ("strict", "partial")


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
        ImportError: without OpenCV.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError('the shapes scorer needs OpenCV: run `pip install -e ".[train]"`') from error

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected a uint8 RGB image [H, W, 3], got {image.dtype} {list(image.shape)}")
    lab = _to_lab(cv2.medianBlur(np.ascontiguousarray(image), 3))
    border = np.concatenate([lab[0], lab[-1], lab[1:-1, 0], lab[1:-1, -1]])
    background = np.median(border, axis=0)
    to_palette = _squared_distances(lab, _palette_lab())
    to_background = _squared_distances(lab, background[None])[..., 0]
    foreground = _fill_holes((to_palette.min(-1) < to_background).astype(np.uint8))
    nearest = to_palette.argmin(-1)

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
            parts = _split(mask, nearest[box], lab[box], left, top)
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


class ShapesScorer:
    """Scores pictures of the demo domain against their prompts, without any model.

    Args:
        mode: what `score` returns: "strict" (0 or 1, for training) or "partial" (0..1, for evaluation); see `judge`.

    Raises:
        ValueError: for another mode.
    """

    name = "shapes"

    def __init__(self, mode: str = "strict") -> None:
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r} of the shapes scorer: one of {', '.join(MODES)}")
        self.mode = mode

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
        # OpenCV and numpy release the interpreter lock for most of the time that a picture takes.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            found = list(pool.map(detect, map(_to_array, images)))
        scores = [judge(scene, shapes) for scene, shapes in zip(scenes, found, strict=True)]
        table = torch.tensor(scores, dtype=torch.float32).reshape(-1, 2)
        return table[:, 0].contiguous(), table[:, 1].contiguous()

    def variants(self) -> list[tuple[str, Scorer]]:
        """Both modes, whichever one is trained on."""
        return [(f"shapes {mode}", ShapesScorer(mode)) for mode in MODES]


def _holds(relation: str, a: Found, b: Found) -> bool:
    """GenEval's rule: is `a` in `relation` to `b`, with some slack for their sizes?"""
    offset = np.array([a.x - b.x, a.y - b.y])
    slack = POSITION_SLACK * np.array([a.width + b.width, a.height + b.height])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - slack, 0.0)
    # The norm is that of the unshrunk offset, so that objects too close to call are in no relation.
    return bool(shrunk @ np.array(domain.DIRECTIONS[relation]) > POSITION_COSINE * np.hypot(*offset))


def _describe(mask: np.ndarray, lab: np.ndarray, left: int, top: int) -> _Blob:
    """Colour and shape of one object: mask uint8 0/1 `[h, w]` and Lab `[h, w, 3]` of a box at `(left, top)`."""
    import cv2

    core = _erode(mask, 1).astype(bool)
    colors = lab[core] if core.any() else lab[mask.astype(bool)]
    median = np.median(colors, axis=0)
    to_palette = np.sqrt(_squared_distances(median, _palette_lab()))
    nearest = int(to_palette.argmin())
    color = list(domain.PALETTE)[nearest] if to_palette[nearest] < MAX_DELTA_E else None
    uniformity = float((_squared_distances(colors, median[None]) < MAX_DELTA_E**2).mean())

    ys, xs = np.nonzero(mask)
    # The hull goes round the corners of pixels. Through their centres it would be half a pixel too small on all sides.
    corners = np.concatenate([np.stack([xs + dx, ys + dy], 1) for dx in (0, 1) for dy in (0, 1)])
    hull = cv2.convexHull(corners.astype(np.float32))
    area = len(xs)
    solidity = area / cv2.contourArea(hull)
    shape = None
    if solidity > MIN_SOLIDITY:
        _, radius = cv2.minEnclosingCircle(hull)
        _, (side, other), _ = cv2.minAreaRect(hull)
        triangle, _ = cv2.minEnclosingTriangle(hull)
        ratios = np.log([area / (np.pi * radius**2), area / (side * other), area / triangle])
        shape = min(PROTOTYPES, key=lambda name: float(np.sum((PROTOTYPES[name] - ratios) ** 2)))

    x0, x1, y0, y1 = int(xs.min()), int(xs.max()) + 1, int(ys.min()), int(ys.max()) + 1
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
    import cv2

    layers = [mask * (nearest == index).astype(np.uint8) for index in np.unique(nearest[mask.astype(bool)])]
    for erosions in range(1, SPLIT_EROSIONS + 1):
        cores: list[np.ndarray] = []
        for layer in layers:
            count, labels, stats, _ = cv2.connectedComponentsWithStats(_erode(layer, erosions), connectivity=4)
            cores += [labels == index for index in range(1, count) if stats[index, cv2.CC_STAT_AREA] >= PART_CORE]
        if len(cores) < 2:
            continue
        to_core = [cv2.distanceTransform((~core).astype(np.uint8), cv2.DIST_L2, 5) for core in cores]
        owner = np.argmin(to_core, axis=0)
        parts = [mask * (owner == index).astype(np.uint8) for index in range(len(cores))]
        if min(int(part.sum()) for part in parts) < PART_AREA:
            continue
        blobs = [_describe(part, lab, left, top) for part in parts]
        if all(blob.found.color and blob.found.shape and blob.solidity > PART_SOLIDITY for blob in blobs):
            return blobs
    return []


def _erode(mask: np.ndarray, times: int) -> np.ndarray:
    """A uint8 mask with `times` pixels removed on all sides. The area outside the array counts as empty."""
    import cv2

    kernel = np.ones((3, 3), np.uint8)
    return cv2.erode(mask, kernel, iterations=times, borderType=cv2.BORDER_CONSTANT, borderValue=(0,))


def _fill_holes(mask: np.ndarray) -> np.ndarray:
    """A uint8 0/1 mask in which everything that the (4-connected) outside does not reach is set to 1."""
    import cv2

    # The margin joins all parts of the outside, so that one fill from a corner reaches them.
    outside = np.pad(mask, 1)
    cv2.floodFill(outside, None, (0, 0), (2,), flags=4)
    return (outside[1:-1, 1:-1] != 2).astype(np.uint8)


def _to_lab(image: np.ndarray) -> np.ndarray:
    """CIE Lab (D65, L in 0..100), float32, of a uint8 sRGB image; the same shape."""
    import cv2

    return cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def _palette_lab() -> np.ndarray:
    """The palette in CIE Lab, `[8, 3]`, in the order of `domain.PALETTE`."""
    return _to_lab(np.array([list(domain.PALETTE.values())], np.uint8))[0]


def _squared_distances(points: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Squared distances `[..., M]` of points `[..., 3]` to references `[M, 3]`."""
    difference = points[..., None, :] - references
    return np.einsum("...i,...i->...", difference, difference)


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
