"""Grids of pictures with labels, and heat maps. It needs only numpy and Pillow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .fonts import font_for

#: Colours of a heat map from 0 to its largest value: dark blue, teal, yellow. They differ in lightness too.
RAMP = np.array([(32, 24, 72), (38, 96, 134), (60, 168, 132), (250, 230, 80)], float)
#: Most pixels across a picture of a sheet.
TILE = 256
#: Pixels: side of all cells of a heat map together, and its text.
MAP_SIDE, MAP_TEXT = 640, 20


def grid(rows: Sequence[np.ndarray], labels: Sequence[str] = (), scale: float = 1) -> Image.Image:
    """Pictures in rows, a label above each row. rows: uint8 `[n, H, W, 3]` each. scale: see `zoom`."""
    height, width = (max(1, round(side * scale)) for side in rows[0].shape[1:3])
    # It can be read at the size at which the pictures can be seen.
    text = max(11, width // 12)
    gap, head = 2, text + 3 if labels else 0
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + gap + head) - gap), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        top = y * (height + gap + head)
        if labels:
            # All fonts have their baseline in the same place.
            draw.text((2, top + text), labels[y], fill="black", font=font_for(labels[y], text), anchor="ls")
        for x, picture in enumerate(row):
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(tile, (x * (width + gap), top + head))
    return sheet


def zoom(pictures: np.ndarray) -> float:
    """The factor for the pictures of a sheet: small ones are enlarged, by a whole number, so that a person can see them, and
    large ones shrunk to `TILE` pixels, so that a sheet of dozens can be opened."""
    width = pictures.shape[-2]
    return max(1, 128 // width) if width <= TILE else TILE / width


def heat_map(values: np.ndarray, label: str = "") -> Image.Image:
    """A matrix `[K, K]` as coloured cells, rows and columns numbered from 0, with a scale from 0 to its largest value.

    The picture keeps about the same size and its text can be read when a preview shows it at half that size. So cells hold
    their values only if there is room for them, and with many rows only some are numbered.

    Args:
        label: what the values are, written above the scale.
    """
    count, head = len(values), 56
    cell = max(1, MAP_SIDE // count)
    side = count * cell
    # By rounding, the distance of a picture to itself may be below 0.
    values = values.clip(min=0)
    largest = float(values.max()) or 1.0
    colours = ramp(np.clip(values / largest, 0, 1))
    font = ImageFont.load_default(MAP_TEXT)
    sheet = Image.new("RGB", (head + side + 120, head + max(side, 200) + 8), "white")
    sheet.paste(Image.fromarray(np.repeat(np.repeat(colours, cell, 0), cell, 1)), (head, head))
    pen = ImageDraw.Draw(sheet)
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if step * cell >= 1.6 * MAP_TEXT)
    for i in range(0, count, every):
        middle = head + (i + 0.5) * cell
        pen.text((middle, head - 6), str(i), "black", font, anchor="mb")
        pen.text((head - 8, middle), str(i), "black", font, anchor="rm")
    if pen.textlength(f"{largest:.2f}", font) <= cell - 6:
        for row in range(count):
            for column in range(count):
                centre = (head + (column + 0.5) * cell, head + (row + 0.5) * cell)
                ink = readable(colours[row, column])
                pen.text(centre, f"{values[row, column]:.2f}", ink, font, anchor="mm")
    left, height = head + side + 24, max(side, 200)
    scale = ramp(np.linspace(1, 0, height))[:, None].repeat(24, 1)
    sheet.paste(Image.fromarray(scale), (left, head))
    pen.text((sheet.width - 6, head - 14), label, "black", font, anchor="rb")
    for share in (0.0, 0.5, 1.0):
        y = head + (1 - share) * (height - 1)
        anchor = "lt" if share == 1 else "lb" if share == 0 else "lm"
        pen.text((left + 32, y), f"{share * largest:.3g}", "black", font, anchor=anchor)
    return sheet


def ramp(places: np.ndarray) -> np.ndarray:
    """Colours uint8 `[..., 3]` of `RAMP` for places `[...]` in 0..1."""
    anchors = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(places, anchors, RAMP[:, k]) for k in range(3)], -1).round().astype(np.uint8)


def readable(colour: np.ndarray) -> str:
    """`black` or `white`, whichever has more contrast with a colour `[3]` in 0..255, by relative luminance."""
    linear = (colour / 255.0) ** 2.2
    # Above this both contrasts of the WCAG are equal: (L + .05)^2 = 1.05 * .05.
    return "black" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "white"
