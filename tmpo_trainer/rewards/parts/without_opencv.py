"""The functions of OpenCV that the shapes scorer calls, in numpy, for where OpenCV is not installed.

They take what that scorer gives and return what it reads, under OpenCV's names. Masks are the same to the bit, distances and
areas to rounding, colours to 1/64 of a unit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

COLOR_RGB2LAB = DIST_L2 = BORDER_CONSTANT = 0
CC_STAT_AREA = 4

#: `cvtColor` interpolates linearly between this many values of each channel, in whole numbers.
GRID = 33
#: The whole number that stands for 1 there, and the steps between two values of the grid.
UNIT, STEPS = 1 << 14, 16
#: The 5x5 chamfer distance: the lengths of a diagonal step and of a knight's move.
DIAGONAL, KNIGHT = np.float32(1.4), np.float32(2.1969)
#: Distances that are compared at once. Those of a large picture would take gigabytes.
BLOCK = 1 << 20


def medianBlur(image: np.ndarray, size: int) -> np.ndarray:
    """The median of every pixel's 3x3 neighbours, by channel: uint8 `[H, W, C]`. The outermost pixels count twice."""
    wide = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    # Each column of three is sorted once. The median of nine is then the median of three numbers: the largest of the three
    # smallest, the median of the three middle ones, and the smallest of the three largest.
    above, here, below = wide[:-2], wide[1:-1], wide[2:]
    low, high = np.minimum(above, here), np.maximum(above, here)
    smallest, rest = np.minimum(low, below), np.maximum(low, below)
    middle, largest = np.minimum(high, rest), np.maximum(high, rest)
    first = np.maximum(np.maximum(smallest[:, :-2], smallest[:, 1:-1]), smallest[:, 2:])
    second = _median_of_three(middle[:, :-2], middle[:, 1:-1], middle[:, 2:])
    third = np.minimum(np.minimum(largest[:, :-2], largest[:, 1:-1]), largest[:, 2:])
    return _median_of_three(first, second, third)


def _median_of_three(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


def cvtColor(image: np.ndarray, code: int) -> np.ndarray:
    """CIE Lab (D65, L in 0..100), float32, of sRGB `[H, W, 3]` in 0..1, which must be multiples of 1/255."""
    tables, place, part = _lab_tables()
    levels = np.rint(image.reshape(-1, 3) * 255).astype(np.int32)
    red, green, blue = levels.T
    corners = (place[blue] * GRID + place[green]) * 256 + red
    corners = corners + np.array([0, 256, GRID * 256, (GRID + 1) * 256], np.int32)[:, None]
    up, over = part[green], part[blue]
    weights = np.stack([STEPS - up, up, STEPS - up, up])
    weights[:2] *= STEPS - over
    weights[2:] *= over
    found = np.empty(levels.shape, np.float32)
    for channel, (table, unit, low) in enumerate(zip(tables, (100, 256, 256), (0, 128, 128), strict=True)):
        total = (table.take(corners) * weights).sum(0, dtype=np.int32) + STEPS**3 // 2 >> 12
        found[:, channel] = total.astype(np.float32) * np.float32(unit / UNIT) - np.float32(low)
    return found.reshape(image.shape)


@cache
def _lab_tables() -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The grid's L, a and b, each already interpolated in red, int32 `[blue * green * 256 + padding]`; and for each value of
    another channel the place in the grid below it, and the sixteenths above that, int32 `[256]`."""
    level = np.linspace(0, 1, GRID)
    linear = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    blue, green, red = np.meshgrid(linear, linear, linear, indexing="ij")
    to_xyz = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
    xyz = np.stack([red, green, blue], -1) @ (to_xyz / [[0.950456], [1], [1.088754]]).T
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), xyz * (841 / 108) + 16 / 116)
    fx, fy, fz = np.moveaxis(f, -1, 0)
    light = np.where(xyz[..., 1] > 216 / 24389, 116 * fy - 16, xyz[..., 1] * (24389 / 27))
    lab = np.stack([light / 100, (500 * (fx - fy) + 128) / 256, (200 * (fy - fz) + 128) / 256], -1)
    grid = np.rint(lab * UNIT).astype(np.int32)

    value = np.rint(np.arange(256, dtype=np.float32) / np.float32(255) * UNIT).astype(np.int32)
    place, part = value >> 9, (value >> 5) & (STEPS - 1)
    after = np.minimum(place + 1, GRID - 1)
    table = grid[:, :, place] * (STEPS - part)[:, None] + grid[:, :, after] * part[:, None]
    # What lies behind the grid's end gets the weight 0.
    padding = np.zeros((GRID + 1) * 256, np.int32)
    return [np.concatenate([table[..., channel].ravel(), padding]) for channel in range(3)], place, part


def connectedComponentsWithStats(mask: np.ndarray, connectivity: int) -> tuple[int, np.ndarray, np.ndarray, None]:
    """Connected components of a uint8 0/1 mask `[H, W]`, in the order of their first pixels.

    Returns:
        their number with the outside, labels `[H, W]` (0 outside), and `[number, 5]`: left, top, width, height, area.
    """
    rows, starts, ends = runs = _runs(mask)
    tops, numbers = np.unique(_first_runs(*runs, mask.shape[1], connectivity == 8), return_inverse=True)
    labels = np.zeros(mask.shape, np.int64)
    labels[mask.view(bool)] = np.repeat(numbers + 1, ends - starts)
    stats = np.zeros((len(tops) + 1, 5), np.int64)
    left, right, bottom = np.zeros((3, len(tops)), np.int64)
    left += mask.shape[1]
    np.minimum.at(left, numbers, starts)
    np.maximum.at(right, numbers, ends)
    np.maximum.at(bottom, numbers, rows + 1)
    area = np.bincount(numbers, ends - starts, len(tops))
    stats[1:] = np.stack([left, rows[tops], right - left, bottom - rows[tops], area], 1)
    return len(stats), labels, stats, None


def _runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The runs of pixels in the rows of a mask, in their order: row, first pixel, last pixel + 1."""
    height, width = mask.shape
    wide = np.zeros((height, width + 2), np.int8)
    wide[:, 1:-1] = mask
    edges = wide[:, 1:] - wide[:, :-1]
    rows, starts = np.nonzero(edges == 1)
    return rows, starts, np.nonzero(edges == -1)[1]


def _first_runs(rows: np.ndarray, starts: np.ndarray, ends: np.ndarray, width: int, diagonal: bool) -> np.ndarray:
    """For every run the first one of its component. diagonal: whether runs that touch at a corner are connected."""
    # Two runs touch if they overlap and one is a row below the other. The keys count through all rows.
    reach, stride = int(diagonal), width + 2
    above = rows * stride
    low = np.searchsorted(above + stride + ends, above + starts - reach, "right")
    high = np.searchsorted(above + stride + starts, above + ends + reach, "left")
    counts = np.maximum(high - low, 0)
    here = np.repeat(np.arange(len(rows)), counts)
    there = np.arange(len(here)) + np.repeat(low - np.cumsum(counts) + counts, counts)
    roots = np.arange(len(rows))
    while (roots[here] != roots[there]).any():
        a, b = roots[here], roots[there]
        np.minimum.at(roots, np.maximum(a, b), np.minimum(a, b))
        while (roots[roots] != roots).any():
            roots = roots[roots]
    return roots


def copyMakeBorder(mask: np.ndarray, top: int, *others: Any, value: Any) -> np.ndarray:
    """A mask `[H, W]` with a margin of zeros."""
    return np.pad(mask, top)


def floodFill(mask: np.ndarray, none: None, start: tuple[int, int], value: tuple[int], flags: int) -> None:
    """Sets the pixels that are 0 and connected with the first one, in place."""
    empty = mask == 0
    _, starts, ends = runs = _runs(empty)
    mask[empty] = np.repeat(np.where(_first_runs(*runs, mask.shape[1], False) == 0, value[0], 0), ends - starts)


def erode(mask: np.ndarray, kernel: np.ndarray, iterations: int, **border: Any) -> np.ndarray:
    """A uint8 0/1 mask with some pixels removed on all sides. The area outside the array counts as empty."""
    for _ in range(iterations):
        rows = np.zeros_like(mask)
        rows[1:-1] = mask[:-2] & mask[1:-1] & mask[2:]
        mask = np.zeros_like(mask)
        mask[:, 1:-1] = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return mask


def distanceTransform(mask: np.ndarray, kind: int, size: int) -> np.ndarray:
    """The 5x5 chamfer distance of every pixel from the nearest one that is 0, float32 `[H, W]`."""
    height, width = mask.shape
    longest, columns, empty = max(height, width), np.arange(width), mask == 0
    # Of each row only the nearest pixel counts.
    before = np.maximum.accumulate(np.where(empty, columns, -longest), 1)
    after = np.minimum.accumulate(np.where(empty, columns, 2 * longest)[:, ::-1], 1)[:, ::-1]
    rows = np.flatnonzero(empty.any(1))
    across = np.minimum(columns - before, after - columns)[rows]
    down = np.abs(np.arange(height)[:, None] - rows)
    found = np.empty((height, width), np.float32)
    block = max(1, BLOCK // across.size)
    for first in range(0, height, block):
        places = down[first : first + block, :, None] * longest + across
        found[first : first + block] = _chamfer(longest).take(places).min(1)
    return found


@cache
def _chamfer(size: int) -> np.ndarray:
    """The distance of a pixel from another one that is y rows and x columns away: float32 `[size * size]`."""
    found = np.full((size, size), np.inf, np.float32)
    found[0, 0] = 0
    for y in range(1, size):
        # Rounded at every step, as in a pass over the picture: equal distances from two masks must stay equal.
        found[y, :y] = found[y - 1, :y] + np.float32(1)
        found[y, 1 : y + 1] = np.minimum(found[y, 1 : y + 1], found[y - 1, :y] + DIAGONAL)
        if y > 1:
            found[y, 1:y] = np.minimum(found[y, 1:y], found[y - 2, : y - 1] + KNIGHT)
    return np.minimum(found, found.T).ravel()


def convexHull(points: np.ndarray) -> np.ndarray:
    """The corners of the convex hull of points with whole coordinates `[N, 2]`, in order: float64 `[n, 2]`."""
    xs, ys = points.astype(np.int64).T
    left, right = np.full((2, ys.max() + 1), [[xs.max() + 1], [-1]])
    np.minimum.at(left, ys, xs)
    np.maximum.at(right, ys, xs)
    levels = np.flatnonzero(left <= right)
    down = _bends(left[levels].tolist(), levels.tolist())
    up = _bends(right[levels][::-1].tolist(), levels[::-1].tolist())
    return np.array(down + up, float)


def _bends(xs: list[int], ys: list[int]) -> list[tuple[int, int]]:
    """The points at which the hull of one side bends, with both ends."""
    chain: list[tuple[int, int]] = []
    for x, y in zip(xs, ys, strict=True):
        while len(chain) > 1:
            (x0, y0), (x1, y1) = chain[-2:]
            if (x1 - x0) * (y - y0) < (y1 - y0) * (x - x0):
                break
            chain.pop()
        chain.append((x, y))
    return chain


def _next(corners: np.ndarray) -> np.ndarray:
    return np.concatenate([corners[1:], corners[:1]])


def contourArea(corners: np.ndarray) -> float:
    """The area of a polygon `[n, 2]`."""
    x, y = corners.T
    after_x, after_y = _next(corners).T
    return abs(float(x @ after_y - y @ after_x)) / 2


def minEnclosingCircle(corners: np.ndarray) -> tuple[None, float]:
    """The radius of the smallest circle round a hull `[n, 2]`, by Welzl's algorithm."""
    points = [complex(x, y) for x, y in corners.tolist()]
    centre, radius = points[0], 0.0
    # A point outside of the circle round those before it lies on the circle round all of them.
    for i, p in enumerate(points):
        if abs(p - centre) <= radius + 1e-9:
            continue
        centre, radius = p, 0.0
        for j, q in enumerate(points[:i]):
            if abs(q - centre) <= radius + 1e-9:
                continue
            centre, radius = (p + q) / 2, abs(p - q) / 2
            for r in points[:j]:
                if abs(r - centre) > radius + 1e-9:
                    centre = p + _circumcentre(q - p, r - p)
                    radius = abs(p - centre)
    return None, radius


def _circumcentre(q: complex, r: complex) -> complex:
    """The centre of the circle through 0 and two points, which are not in a line with it."""
    return (abs(q) ** 2 * r - abs(r) ** 2 * q) / (2j * (q.conjugate() * r).imag)


def minAreaRect(corners: np.ndarray) -> tuple[None, tuple[float, float], None]:
    """The sides of the smallest rectangle round a hull `[n, 2]`, one of which lies along one of the hull's."""
    along = _directions(corners)
    a, b = along @ corners.T, along @ QUARTER @ corners.T
    sides = np.stack([np.ptp(a, 1), np.ptp(b, 1)], 1)
    first, second = sides[sides.prod(1).argmin()].tolist()
    return None, (first, second), None


def minEnclosingTriangle(corners: np.ndarray) -> tuple[float, None]:
    """The area of the smallest triangle round a hull `[n, 2]`.

    Two of its sides lie along two of the hull's, and the middle of the third touches the hull (O'Rourke et al., An optimal
    algorithm for finding minimal enclosing triangles, 1986). For two such lines, with u and v the distances of a point from
    them, the third line cuts off twice the largest u * v on the hull, divided by the sine of their angle.
    """
    along = _directions(corners)
    normal = along @ QUARTER
    # The distance of corner k from line i, and its change towards the next corner.
    far = normal @ corners.T - (normal * corners).sum(1)[:, None]
    change = np.concatenate([far[:, 1:], far[:, :1]], 1) - far
    sine = normal @ along.T
    i, j = np.nonzero(sine > 1e-9)
    u, v, du, dv = far[i], far[j], change[i], change[j]
    # On a side of the hull u * v is a parabola, whose top is inside the side, or at one of its ends.
    bend, slope = du * dv, u * dv + v * du
    top = np.divide(slope, -2 * bend, out=np.zeros_like(bend), where=bend < 0).clip(0, 1)
    most = ((u + top * du) * (v + top * dv)).max(1)
    return float((2 * most / sine[i, j]).min()), None


#: A quarter turn of rows (x, y).
QUARTER = np.array([[0.0, 1.0], [-1.0, 0.0]])


def _directions(corners: np.ndarray) -> np.ndarray:
    """The directions of a hull's sides, `[n, 2]`, each of length 1; side k begins at corner k."""
    along = _next(corners) - corners
    return along / np.hypot(*along.T)[:, None]
