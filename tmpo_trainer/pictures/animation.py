"""A tree of pictures as an animation: it grows from its start to its leaves and ends as `tree.draw` draws it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import replacing
from ..tree import TreePlan
from . import tree

#: Frames from one column of the tree to the next.
BETWEEN = 8
#: Frames for which the tree rests when a column is there, and when all are.
REST, LAST = 4, 24


def timeline(plan: TreePlan) -> list[tuple[float, int]]:
    """The progress of the tree in each picture, and for how many frames the picture stays."""
    columns = len(plan.fanout) + 1
    times = [(0.0, REST)]
    for column in range(columns):
        for k in range(1, BETWEEN + 1):
            share = k / BETWEEN
            # Slow at both ends.
            share = share * share * (3 - 2 * share)
            times.append((column + share, 1 if k < BETWEEN else REST))
    return [*times[:-1], (float(columns), LAST)]


def frames(
    plan: TreePlan, images: Sequence[Image.Image], *drawn: Any, longest: int, **more: Any
) -> Iterator[Image.Image]:
    """The pictures of `timeline`, with neither side above `longest` pixels. Other arguments are those of `tree.draw`.

    The thumbnails have the height for which the tree fits, or that of the static picture if it is lower. A tree with more
    leaves than fit in two pixels each is scaled down.
    """
    room = (longest - tree.HEADER - 2 * tree.MARGIN) // tree.rows(plan)
    fitting = max(size for size in range(2, tree.LARGEST + 1) if size == 2 or tree.row_height(size) <= room)
    size = min(fitting, tree.thumbnail_height(plan))
    for progress, _ in timeline(plan):
        picture = tree.draw(plan, images, *drawn, size=size, progress=progress, **more)
        if max(picture.size) > longest:
            picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        yield picture


def write(
    file: Path, pictures: Sequence[Image.Image], counts: Sequence[int], frame_time: int, exif: bytes = b""
) -> None:
    """Writes an animation that repeats, as the name's ending says: `.webp`, or `.gif` with the colours of its last picture.

    Args:
        pictures: at least one, of the same size. counts: for how many frames each stays. frame_time: ms of a frame.
        exif: metadata of a WebP file.
    """
    durations = [frame_time * count for count in counts]
    if file.suffix == ".gif":
        # One palette for all, so that what does not move does not flicker.
        palette = pictures[-1].quantize(256)
        pictures = [picture.quantize(palette=palette) for picture in pictures]
    more = {"exif": exif, "quality": 85, "method": 3} if file.suffix == ".webp" else {"optimize": False}
    with replacing(file) as temporary:
        pictures[0].save(
            temporary, file.suffix[1:].upper(), save_all=True, append_images=list(pictures[1:]), duration=durations,
            loop=0, **more,
        )  # fmt: skip
