"""The demo domain: prompts about coloured shapes and the pictures they describe.

A prompt names one to three objects (circle, square, triangle; eight colours), in one of five families:

    single     a red circle
    count      two red circles                       (two or three of a kind)
    pair       a red circle and a blue square
    relation   a blue square left of a green triangle
    mixed      two red circles and a blue square

Prompts leave position, size and background open, so that a collapse of diversity shows in them.
Everything here needs only numpy and is a pure function of its `numpy.random.Generator`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product

import numpy as np

IMAGE_SIZE = 64

#: sRGB. The nearest two (blue, purple) are 37 apart in CIE Lab, and every chroma is far above a background's.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 38),
    "orange": (250, 135, 15),
    "yellow": (245, 222, 40),
    "green": (40, 155, 60),
    "cyan": (45, 205, 215),
    "blue": (40, 70, 215),
    "purple": (150, 50, 165),
    "pink": (250, 120, 185),
}
SHAPES = ("circle", "square", "triangle")
NUMBERS = {1: "a", 2: "two", 3: "three"}
RELATIONS = ("left of", "right of", "above", "below")
FAMILIES = ("single", "count", "pair", "relation", "mixed")
COMPOSITIONAL = ("count", "pair", "relation", "mixed")

#: Half the larger side of a shape's bounding box, if the shape has the area of a unit circle.
REACH = {"circle": 1.0, "square": 0.887, "triangle": 1.347}

#: Unit vectors from the second object to the first, image coordinates (y grows downwards).
DIRECTIONS = {"left of": (-1.0, 0.0), "right of": (1.0, 0.0), "above": (0.0, -1.0), "below": (0.0, 1.0)}


@dataclass(frozen=True)
class Clause:
    """`count` objects of one colour and shape."""

    count: int
    color: str
    shape: str

    def text(self) -> str:
        """The words that the bundled model was trained on and that its frozen prompt lists hold.

        The article is "a" even before "orange", and must stay so. `parse` accepts "an" as well, and so does the model:
        "an" is one token of its tokenizer (the end of "cyan"), and it drew 30 orange shapes equally well with either.
        """
        return f"{NUMBERS[self.count]} {self.color} {self.shape}{'s' if self.count > 1 else ''}"


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: one or two clauses, and the relation of the first to the second, if any."""

    clauses: tuple[Clause, ...]
    relation: str | None = None

    def text(self) -> str:
        if len(self.clauses) == 1:
            return self.clauses[0].text()
        first, second = self.clauses
        return f"{first.text()} {self.relation or 'and'} {second.text()}"

    @property
    def family(self) -> str:
        if self.relation:
            return "relation"
        if len(self.clauses) == 1:
            return "single" if self.clauses[0].count == 1 else "count"
        return "pair" if all(clause.count == 1 for clause in self.clauses) else "mixed"


@dataclass(frozen=True)
class Object:
    """A drawn object: centre of its bounding box and radius (of the circle of equal area) in pixels."""

    x: float
    y: float
    radius: float
    color: str
    shape: str


def _parse_clause(words: list[str], prompt: str) -> Clause:
    numbers = {text: count for count, text in NUMBERS.items()} | {"one": 1, "an": 1}
    if len(words) == 3 and words[0] in numbers and words[1] in PALETTE:
        count, shape = numbers[words[0]], words[2]
        if count > 1 and shape.endswith("s"):
            shape = shape[:-1]
        if shape in SHAPES:
            return Clause(count, words[1], shape)
    raise ValueError(
        f"not a prompt of the shapes domain: {prompt!r} (at {' '.join(words)!r}); "
        f"write e.g. 'two red circles' or 'a blue square left of a green triangle'"
    )


@lru_cache(4096)
def parse(prompt: str) -> Scene:
    """The scene of a prompt. Raises ValueError, naming the prompt, if it is not one of the domain."""
    text = " ".join(prompt.lower().strip().rstrip(".").split())
    for joint in (*RELATIONS, "and"):
        left, found, right = text.partition(f" {joint} ")
        if found:
            clauses = (_parse_clause(left.split(), prompt), _parse_clause(right.split(), prompt))
            return Scene(clauses, None if joint == "and" else joint)
    return Scene((_parse_clause(text.split(), prompt),))


def all_scenes(family: str) -> list[Scene]:
    """Every scene of a family, in a fixed order."""
    kinds = list(product(PALETTE, SHAPES))
    if family == "single":
        return [Scene((Clause(1, *kind),)) for kind in kinds]
    if family == "count":
        return [Scene((Clause(n, *kind),)) for n in (2, 3) for kind in kinds]
    pairs = list(permutations(kinds, 2))
    if family == "pair":
        return [Scene((Clause(1, *a), Clause(1, *b))) for a, b in pairs]
    if family == "relation":
        return [Scene((Clause(1, *a), Clause(1, *b)), r) for r in RELATIONS for a, b in pairs]
    if family == "mixed":
        return [Scene((Clause(2, *a), Clause(1, *b))) for a, b in pairs]
    raise ValueError(f"unknown family {family!r}: one of {', '.join(FAMILIES)}")


def sample_scene(rng: np.random.Generator, family: str) -> Scene:
    """A uniformly drawn scene of a family."""
    scenes = _SCENES.setdefault(family, all_scenes(family))
    return scenes[rng.integers(len(scenes))]


_SCENES: dict[str, list[Scene]] = {}


def layout(scene: Scene, rng: np.random.Generator) -> list[Object]:
    """Random places and sizes for a scene's objects: disjoint, inside the picture, relation kept."""
    kinds = [(clause.color, clause.shape) for clause in scene.clauses for _ in range(clause.count)]
    largest = {1: 17.0, 2: 13.5, 3: 10.5}[len(kinds)]
    for _ in range(1000):
        radii = rng.uniform(7.5, largest, len(kinds))
        reach = radii * np.array([REACH[shape] for _, shape in kinds])
        low, high = reach + 1.5, IMAGE_SIZE - reach - 1.5
        centres = low[:, None] + (high - low)[:, None] * rng.random((len(kinds), 2))
        if scene.relation:
            offset = centres[0] - centres[1]
            if offset @ np.array(DIRECTIONS[scene.relation]) < 0.85 * np.hypot(*offset):
                continue
        objects = [
            Object(float(x), float(y), float(r), *kind) for (x, y), r, kind in zip(centres, radii, kinds, strict=True)
        ]
        # Disjoint: no pixel within 1.5 px of two objects, so that at least 3 px of background separate them.
        near = sum((_inside(obj) > -1.5).astype(int) for obj in objects)
        if np.max(near) < 2:
            return objects
    raise RuntimeError(f"no layout found for {scene.text()!r}")


_GRID = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] + 0.5


def sample_background(rng: np.random.Generator) -> np.ndarray:
    """A muted background colour, sRGB in 0..1: any lightness, little chroma."""
    grey = rng.uniform(0.08, 0.95)
    return np.clip(grey + rng.uniform(-0.045, 0.045, 3), 0.0, 1.0)


def _inside(obj: Object) -> np.ndarray:
    """How far inside an object's nearest side each pixel centre lies, in pixels (negative outside): `[64, 64]`."""
    x, y = _GRID[1] - obj.x, _GRID[0] - obj.y
    if obj.shape == "circle":
        return obj.radius - np.hypot(x, y)
    if obj.shape == "square":
        return obj.radius * np.sqrt(np.pi) / 2 - np.maximum(np.abs(x), np.abs(y))
    # Upright equilateral triangle of the circle's area, its bounding box centred on (x, y).
    inradius = obj.radius * np.sqrt(np.pi / (3 * np.sqrt(3)))
    y = y - 0.5 * inradius
    return inradius - np.maximum(np.abs(x) * np.sqrt(3) / 2 - y / 2, y)


def draw(objects: list[Object], background: np.ndarray) -> np.ndarray:
    """Draws objects on a plain background: uint8 RGB `[64, 64, 3]`."""
    image = np.broadcast_to(background, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float64)
    for obj in objects:
        alpha = np.clip(_inside(obj) + 0.5, 0.0, 1.0)[..., None]
        image = image * (1 - alpha) + np.array(PALETTE[obj.color]) / 255 * alpha
    return np.round(image * 255).astype(np.uint8)


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A random picture of a scene: uint8 RGB `[64, 64, 3]`."""
    return draw(layout(scene, rng), sample_background(rng))
