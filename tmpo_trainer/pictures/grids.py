"""Grids of pictures with labels, and heat maps. It needs only numpy and Pillow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .fonts import font_for

#: Colours of a heat map from 0 to its largest value: dark blue, teal, yellow. They differ in lightness too.
RAMP = np.array([(32, 24, 72), (38, 96, 134), (60, 168, 132), (250, 230, 80)], float)


def grid(rows: Sequence[np.ndarray], labels: Sequence[str] = (), scale: int = 1) -> Image.Image:
    """Pictures in rows, a label above each row. rows: uint8 `[n, H, W, 3]` each."""
    height, width = rows[0].shape[1] * scale, rows[0].shape[2] * scale
    gap, head = 2, 14 if labels else 0
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + gap + head) - gap), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        top = y * (height + gap + head)
        if labels:
            # All fonts have their baseline in the same place.
            draw.text((2, top + 11), labels[y], fill="black", font=font_for(labels[y], 11), anchor="ls")
        for x, picture in enumerate(row):
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(tile, (x * (width + gap), top + head))
    return sheet


def zoom(pictures: np.ndarray) -> int:
    """The factor by which to enlarge small pictures so that a person can see them."""
    return max(1, 128 // pictures.shape[-2])


def heat_map(values: np.ndarray, cell: int = 24, digits: int | None = 2) -> Image.Image:
    """A matrix `[K, K]` as coloured cells, rows and columns numbered from 0.

    Args:
        cell: side of a cell in pixels. digits: decimals written into each cell, None for none; left out where they do not fit.
    """
    count, head = len(values), 30
    largest = float(values.max()) or 1.0
    place = np.clip(values / largest, 0, 1) * (len(RAMP) - 1)
    low = np.minimum(place.astype(int), len(RAMP) - 2)
    share = (place - low)[..., None]
    colours = ((1 - share) * RAMP[low] + share * RAMP[low + 1]).round().astype(np.uint8)
    cells = np.repeat(np.repeat(colours, cell, 0), cell, 1)
    sheet = Image.new("RGB", (head + count * cell, head + count * cell), "white")
    sheet.paste(Image.fromarray(cells), (head, head))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(max(8, cell // 3))
    for i in range(count):
        middle = head + i * cell + cell / 2
        draw.text((middle, head / 2), str(i), "black", font, anchor="mm")
        draw.text((head / 2, middle), str(i), "black", font, anchor="mm")
    if digits is not None and draw.textlength(f"{largest:.{digits}f}", font) < cell - 2:
        for row in range(count):
            for column in range(count):
                centre = (head + (column + 0.5) * cell, head + (row + 0.5) * cell)
                ink = "black" if place[row, column] > 1.7 else "white"
                draw.text(centre, f"{values[row, column]:.{digits}f}", ink, font, anchor="mm")
    return sheet
