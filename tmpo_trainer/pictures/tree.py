"""A tree of pictures: the place of every node, colours by score, and a static picture from seed (left) to leaves.

It needs no model: the caller gives pictures and scores. The interactive view uses the same places and colours.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .. import objectives
from ..tree import NodePath, TreePlan

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

#: Colours from low to high, similar to viridis: brighter at every step, and clear of the background at both ends.
RAMPS: dict[str, tuple[str, ...]] = {
    "dark": ("#5b66b5", "#4585b5", "#2fa0a0", "#3cb588", "#6fc95f", "#b0da3c", "#fde725"),
    "light": ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#3fb070", "#74bd3c"),
}

#: Colours of the static picture: background, text, faint text and missing scores, marks of the best and selected leaf.
THEMES: dict[str, tuple[str, str, str, str]] = {
    "dark": ("#1e1e22", "#e6e6e6", "#8c8c94", "#ffffff"),
    "light": ("#ffffff", "#1f1f23", "#77777f", "#000000"),
}

MARGIN, GAP = 16, 6

#: Edges: a straight piece that carries the label, then the fan to the children.
TRUNK, FAN = 76, 64

#: Title and legend, then the names of the columns.
HEADER = 64

#: Widths to the right of a leaf: colour, score, bar and number of its weight.
SWATCH, SCORE, BAR, PERCENT = 8, 64, 80, 56

#: Height of a thumbnail: about `TARGET` pixels for all rows together, within bounds.
TARGET, SMALLEST, LARGEST = 1800, 28, 96

#: What a picture comes out of if its parent shows none.
NOISE = Image.frombytes("RGB", (32, 32), random.Random(0).randbytes(3 * 32 * 32))

#: The lowest row in which there is room for text.
LOWEST = 13


@dataclass(frozen=True)
class Node:
    """A node of the tree, in depth-first order, so that no edges cross.

    parent: its parent's position in the list; None for the start of a prompt's tree. column: 0 for that start, then one
    for each branch step, then the leaves. row: counted in leaves from the top. leaves: how many are below it, itself
    included. path: from the root; () for the start. index: its row in the batch evaluated at `step`; for a leaf, in the
    batch of leaves; for a start, the prompt. step: 1-based, where its children part; None for a leaf, or a single root.
    """

    parent: int | None
    prompt: int
    column: int
    row: float
    leaves: int
    path: NodePath
    index: int
    step: int | None
    leaf: bool


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def right(self) -> int:
        return self.left + self.width

    @property
    def middle(self) -> float:
        return self.top + self.height / 2


def layout(plan: TreePlan) -> list[Node]:
    """All nodes. The trees of several prompts are stacked, with one free row above each."""
    steps = list(plan.fanout)
    roots = plan.roots // plan.trees
    share = plan.leaves // plan.trees
    nodes: list[Node] = []

    def add(parent: int | None, prompt: int, column: int, first: float, path: NodePath, index: int) -> None:
        leaf = column == len(steps) + 1
        step = None if leaf else steps[column - 1] if column else 1 if roots > 1 else None
        below = share if column == 0 else math.prod(plan.fanout[s] for s in steps[column - 1 :])
        here = len(nodes)
        nodes.append(Node(parent, prompt, column, first + (below - 1) / 2, below, path, index, step, leaf))
        if leaf:
            return
        if column == 0:
            children, width = roots, plan.trees
        else:
            children, width = plan.fanout[steps[column - 1]], plan.widths[steps[column - 1] - 1]
        for child in range(children):
            # Tiled: child c of row r is row c * width + r.
            row = child * width + index
            add(here, prompt, column + 1, first + child * below // children, (*path, child if column else row), row)

    for prompt in range(plan.trees):
        add(None, prompt, 0, prompt * (share + 1) + 1 if plan.trees > 1 else 0, (), prompt)
    return nodes


def rows(plan: TreePlan) -> int:
    """Rows of the layout, free ones included."""
    return plan.leaves + (plan.trees if plan.trees > 1 else 0)


def leaf_weights(scores: Tensor, beta: float, prompts: int) -> Tensor:
    """q = softmax(beta * z-scored score) among the leaves of each prompt: `[K]`, leaf l being of prompt l % prompts.

    A leaf whose score is not finite gets 0 and does not count in the mean.
    """
    weights = torch.zeros(len(scores), dtype=torch.float64)
    for prompt in range(prompts):
        own = torch.arange(prompt, len(scores), prompts)
        own = own[scores[own].isfinite().cpu()]
        if len(own):
            weights[own] = (beta * objectives.zscore(scores[own].double().cpu())).softmax(0)
    return weights


def best_leaves(scores: Sequence[float]) -> list[int]:
    """Indices of the highest finite score: several if leaves share it, none if no score is finite."""
    highest = max(filter(math.isfinite, scores), default=math.nan)
    return [i for i, score in enumerate(scores) if score == highest]


def starred_leaves(scores: Sequence[float]) -> list[int]:
    """Indices of the leaves that are marked as the best. If all leaves are equal, none is marked."""
    best = best_leaves(scores)
    return [] if len(best) == len(scores) > 1 else best


def node_scores(nodes: Sequence[Node], scores: Sequence[float]) -> list[float]:
    """Mean of the finite scores of the leaves below each node; NaN if there is none."""
    total, count = [0.0] * len(nodes), [0] * len(nodes)
    for i, node in reversed(list(enumerate(nodes))):
        if node.leaf and math.isfinite(scores[node.index]):
            total[i], count[i] = scores[node.index], 1
        if node.parent is not None:
            total[node.parent] += total[i]
            count[node.parent] += count[i]
    return [t / c if c else math.nan for t, c in zip(total, count, strict=True)]


def limits(scores: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest finite score, 0 and 0 if there is none."""
    finite = [score for score in scores if math.isfinite(score)]
    return (min(finite), max(finite)) if finite else (0.0, 0.0)


def colour(score: float, low: float, high: float, theme: str) -> str | None:
    """`#rrggbb` of a score between the limits; the middle of the ramp if all are equal, None if it is not finite."""
    if not math.isfinite(score):
        return None
    ramp = RAMPS[theme]
    place = (score - low) / (high - low) if high > low else 0.5
    place = min(max(place, 0.0), 1.0) * (len(ramp) - 1)
    i = min(int(place), len(ramp) - 2)
    ends = [[int(anchor[k : k + 2], 16) for k in (1, 3, 5)] for anchor in ramp[i : i + 2]]
    mixed = [round(a + (b - a) * (place - i)) for a, b in zip(*ends, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def decimals(low: float, high: float) -> int:
    """The number of decimals for scores within these limits."""
    largest = max(abs(low), abs(high))
    return 1 if largest >= 100 else 2 if largest >= 10 else 3


def thumbnail_height(plan: TreePlan) -> int:
    """In pixels; it shrinks with the number of rows."""
    return min(max(TARGET // rows(plan) - GAP, SMALLEST), LARGEST)


def row_height(size: int) -> int:
    """Height of a row of the layout whose thumbnails have `size` pixels. The gap shrinks with small thumbnails."""
    return size + (GAP if size >= SMALLEST else max(1, size // 4))


def place(plan: TreePlan, aspect: float = 1.0, size: int | None = None) -> list[Box]:
    """The box of each node of `layout`, for pictures of width / height `aspect` and thumbnails of height `size`.

    Without a size it is `thumbnail_height`.
    """
    size = thumbnail_height(plan) if size is None else size
    pitch = row_height(size)
    shape = min(max(aspect, 0.5), 2.0)
    inner = round(1.5 * size)
    stride = TRUNK + FAN + round(inner * shape)
    boxes = []
    for node in layout(plan):
        height = min(inner, node.leaves * pitch - (pitch - size)) if node.column else 2 * GAP
        if node.leaf:
            height = size
        width = round(height * shape) if node.column else height
        middle = HEADER + (node.row + 0.5) * pitch
        left = MARGIN + (2 * GAP + TRUNK + FAN + (node.column - 1) * stride if node.column else 0)
        boxes.append(Box(left, round(middle - height / 2), width, height))
    return boxes


def draw(
    plan: TreePlan,
    images: Sequence[Image.Image],
    sigmas: Sequence[float],
    scores: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    previews: Mapping[int, Sequence[Image.Image]] | None = None,
    name: str = "score",
    note: str = "",
    selected: Collection[int] = (),
    group: str = "prompt",
    theme: str = "dark",
    size: int | None = None,
    progress: float = math.inf,
) -> Image.Image:
    """The tree as an RGB picture, one row per leaf.

    Args:
        plan: of K leaves. images: K, in the order of the batch. sigmas: `[num_steps + 1]`.
        scores: K, higher is better; colours run from the lowest to the highest. One that is not finite is missing.
        weights: K, in 0..1, shown as bars.
        previews: {branch step: pictures of the nodes that are evaluated there}; a step that is missing has none.
        name: the score's. note: added to the title. selected: indices of leaves to mark. group: what each of several trees
            is of. theme: `dark` or `light`.
        size: height of a leaf's picture, by default `thumbnail_height`. Rows too low for text have none.
        progress: how many columns beyond the start are there. With a fraction, the pictures of the next column are on their
            way from their parents, and turn from their parent's picture into their own.

    Raises:
        ValueError: a count does not fit the plan.
    """
    for what, given, wanted in (
        ("images", images, plan.leaves),
        ("scores", scores, plan.leaves),
        ("weights", weights, plan.leaves),
        ("sigmas", sigmas, plan.num_steps + 1),
        *(
            (f"previews of step {step}", pictures, plan.widths[step - 1])
            for step, pictures in (previews or {}).items()
        ),
    ):  # fmt: skip
        if given is not None and len(given) != wanted:
            raise ValueError(f"{len(given)} {what}, but this tree has {wanted}")
    background, text, faint, mark = THEMES[theme]
    nodes, boxes = layout(plan), place(plan, images[0].width / images[0].height, size)
    pitch = row_height(thumbnail_height(plan) if size is None else size)
    lefts = {node.column: box.left for node, box in zip(nodes, boxes, strict=True)}

    def there(column: int) -> float:
        """How far the nodes of a column are on their way from their parents, 0..1."""
        return min(max(progress - column + 1, 0.0), 1.0) if column else 1.0

    values = node_scores(nodes, scores) if scores is not None else [math.nan] * len(nodes)
    low, high = limits(scores or [])
    colours = [colour(value, low, high, theme) or faint for value in values]
    stars = starred_leaves(scores or [])
    right = max(box.right for box in boxes) + GAP
    if scores is not None:
        right += SWATCH + SCORE
    if weights is not None:
        right += BAR + PERCENT
    width, height = max(right + MARGIN + 3 * GAP, 560), max(box.top + box.height for box in boxes) + MARGIN

    # Drawn at twice the size and reduced, which makes curves smooth.
    lines = Image.new("RGB", (2 * width, 2 * height), background)
    pen = ImageDraw.Draw(lines)
    thick = min(5, pitch)
    for node, box, shade in zip(nodes, boxes, colours, strict=True):
        if node.parent is not None and there(node.column):
            parent = boxes[node.parent]
            end = parent.right + there(node.column) * (box.left - parent.right)
            curve = [(2 * x, 2 * y) for x, y in _curve(parent, box) if x <= end]
            if len(curve) > 1:
                pen.line(curve, fill=shade, width=thick, joint="curve")
    for node, box, shade in zip(nodes, boxes, colours, strict=True):
        if not node.leaf and there(node.column + 1):
            y = 2 * box.middle
            end = box.right + min(there(node.column + 1) * (lefts[node.column + 1] - box.right), TRUNK)
            pen.line([(2 * box.right, y), (2 * end, y)], fill=shade, width=thick)
        if node.column == 0:
            pen.ellipse(_corners(box, 2), fill=shade)
    picture = lines.reduce(2)

    pen = ImageDraw.Draw(picture)
    small, normal = ImageFont.load_default(12), ImageFont.load_default(14)
    title = f"{plan.leaves} {'leaf' if plan.leaves == 1 else 'leaves'}, {plan.num_steps} steps" + (
        f", {note}" if note else ""
    )
    pen.text((MARGIN, 12), title, text, normal)
    _heads(pen, nodes, boxes, faint, small, name if scores is not None else "", weights is not None)
    if scores is not None:
        _legend(picture, pen, low, high, theme, text, small)
    heaviest = max(weights or [0.0])
    written = pitch >= LOWEST
    for i, (node, box) in enumerate(zip(nodes, boxes, strict=True)):
        share = there(node.column)
        if not share:
            continue
        if node.column == 0 and plan.trees > 1 and written:
            y = HEADER + (node.row - (node.leaves - 1) / 2 - 0.5) * pitch
            pen.text((MARGIN, y), f"{group} {node.prompt + 1}", text, normal, anchor="lm")
        if share < 1:
            before, after = (_shown(each, images, previews) for each in (nodes[node.parent or 0], node))
            if after is not None:
                # On the trunk it still is the parent's picture, from which the children part.
                tip, part = _at_tip(boxes[node.parent or 0], box, share)
                _paste(picture, after, tip, before or NOISE, part)
            continue
        if node.step is not None and written:
            # Pillow's own font has no Greek.
            pen.text((box.right + GAP, box.middle - 3), f"sigma {sigmas[node.step - 1]:.3f}", faint, small, anchor="lb")
        if node.leaf:
            _paste(picture, images[node.index], box)
            _leaf(
                pen, node, box, colours[i], text, faint, small if written else None, scores, weights,
                decimals(low, high), heaviest,
            )  # fmt: skip
            if node.index in selected:
                pen.rectangle(_corners(box, grow=3), outline=mark, width=2)
            if node.index in stars:
                _star(pen, right + MARGIN, box.middle, mark)
        elif node.column:
            shown = _shown(node, images, previews)
            if shown is not None:
                _paste(picture, shown, box)
            pen.rectangle(_corners(box), outline=colours[i])
    return picture


def _curve(parent: Box, child: Box) -> list[tuple[float, float]]:
    """An edge from the end of the parent's trunk, level at both ends so that edges keep their order."""
    bend, end = parent.right + TRUNK, child.left
    points = []
    for k in range(25):
        t = k / 24
        points.append((bend + (end - bend) * t, parent.middle + (child.middle - parent.middle) * t * t * (3 - 2 * t)))
    return points


def _corners(box: Box, times: int = 1, grow: int = 0) -> tuple[int, int, int, int]:
    """The corners as Pillow takes them, with both ends included."""
    return (
        times * (box.left - grow),
        times * (box.top - grow),
        times * (box.right + grow) - 1,
        times * (box.top + box.height + grow) - 1,
    )


def _paste(
    picture: Image.Image, image: Image.Image, box: Box, before: Image.Image | None = None, share: float = 1
) -> None:
    """Pastes the whole image, centred in the box. With an image `before`, it is mixed with that: `share` is the image's."""
    ratio = min(box.width / image.width, box.height / image.height)
    width, height = max(1, round(image.width * ratio)), max(1, round(image.height * ratio))
    fitted = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    if before is not None:
        fitted = Image.blend(before.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), fitted, share)
    picture.paste(fitted, (box.left + (box.width - width) // 2, box.top + (box.height - height) // 2))


def _shown(
    node: Node, images: Sequence[Image.Image], previews: Mapping[int, Sequence[Image.Image]] | None
) -> Image.Image | None:
    """The picture of a node; None for a start, and for a node without a preview."""
    if node.leaf:
        return images[node.index]
    pictures = (previews or {}).get(node.step or 0) if node.column else None
    return None if pictures is None else pictures[node.index]


def _at_tip(parent: Box, child: Box, share: float) -> tuple[Box, float]:
    """The box at the tip of an edge that is drawn to a share, and how far the tip is between the bend and the child, 0..1."""
    end = parent.right + share * (child.left - parent.right)
    part = max(end - parent.right - TRUNK, 0) / (child.left - parent.right - TRUNK)
    middle = parent.middle + (child.middle - parent.middle) * part * part * (3 - 2 * part)
    width, height = (
        round(a + share * (b - a)) for a, b in ((parent.width, child.width), (parent.height, child.height))
    )
    return Box(round(end), round(middle - height / 2), width, height), part


def _heads(
    pen: ImageDraw.ImageDraw, nodes: Sequence[Node], boxes: Sequence[Box], shade: str, font: Font,
    name: str, weighted: bool,
) -> None:  # fmt: skip
    """Writes a name above each column."""
    done = set()
    for node, box in zip(nodes, boxes, strict=True):
        if node.column in done:
            continue
        done.add(node.column)
        word = "" if node.leaf else "start" if node.step is None else f"step {node.step}"
        pen.text((box.left, HEADER - 10), word, shade, font, anchor="ls")
        if node.leaf and name:
            right = box.right + GAP + SWATCH + SCORE
            longest = SCORE + SWATCH + box.width
            while len(name) > 1 and pen.textlength(name, font) > longest:
                name = name[:-1]
            pen.text((right, HEADER - 10), name, shade, font, anchor="rs")
            if weighted:
                pen.text((right + BAR + PERCENT, HEADER - 10), "q", shade, font, anchor="rs")


def _legend(
    picture: Image.Image, pen: ImageDraw.ImageDraw, low: float, high: float, theme: str, shade: str,
    font: Font,
) -> None:  # fmt: skip
    """Draws the ramp with its limits at the top right."""
    width, digits = 120, decimals(low, high)
    right = picture.width - MARGIN - round(pen.textlength(f"{high:.{digits}f}", font))
    pen.text((right, 20), f"{high:.{digits}f}", shade, font, anchor="lm")
    left = right - GAP - width
    for k in range(width):
        pen.line([(left + k, 14), (left + k, 25)], fill=colour(k / (width - 1), 0, 1, theme))
    pen.text((left - GAP, 20), f"{low:.{digits}f}", shade, font, anchor="rm")


def _leaf(
    pen: ImageDraw.ImageDraw, node: Node, box: Box, shade: str, text: str, faint: str,
    font: Font | None, scores: Sequence[float] | None,
    weights: Sequence[float] | None, digits: int, heaviest: float,
) -> None:  # fmt: skip
    """Draws a leaf's colour, score and weight beside it, without a font only colour and bar."""
    x = box.right + GAP
    if scores is not None:
        score = scores[node.index]
        finite = math.isfinite(score)
        pen.rectangle(_corners(Box(x, box.top, SWATCH, box.height)), fill=shade)
        x += SWATCH + SCORE
        word = f"{score:.{digits}f}" if finite else "n/a"
        if font is not None:
            pen.text((x, box.middle), word, text if finite else faint, font, anchor="rm")
    if weights is not None:
        weight = weights[node.index]
        length = round((BAR - 2 * GAP) * weight / heaviest) if heaviest else 0
        if length:
            thick = min(10, box.height)
            pen.rectangle(_corners(Box(x + 2 * GAP, round(box.middle) - thick // 2, length, thick)), fill=shade)
        if font is not None:
            pen.text((x + BAR + PERCENT, box.middle), f"{100 * weight:.1f} %", text, font, anchor="rm")


def _star(pen: ImageDraw.ImageDraw, x: float, y: float, shade: str) -> None:
    points = []
    for k in range(10):
        radius, angle = (8 if k % 2 == 0 else 3.4), math.pi * (k / 5 - 0.5)
        points.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
    pen.polygon(points, fill=shade)
