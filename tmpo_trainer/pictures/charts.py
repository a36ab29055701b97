"""Line charts that need only Pillow, for use where matplotlib is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .fonts import font_for

PANEL, MARGIN = (420, 220), (52, 30, 14, 26)

INK, GRID, FAINT, LINE = "#222222", "#e2e2e2", "#b9d4ea", "#1f77b4"


def draw(x: Sequence[float], series: Mapping[str, Sequence[float]], columns: int = 2) -> Image.Image:
    """A panel per series over the same x: values as a faint line, their running mean over a twelfth as a strong one."""
    rows = -(-len(series) // columns)
    columns = min(columns, len(series))
    sheet = Image.new("RGB", (columns * PANEL[0], rows * PANEL[1]), "white")
    for i, (name, values) in enumerate(series.items()):
        panel = _panel(np.asarray(x, float), np.asarray(values, float), name)
        sheet.paste(panel, (i % columns * PANEL[0], i // columns * PANEL[1]))
    return sheet


def _panel(x: np.ndarray, y: np.ndarray, name: str) -> Image.Image:
    panel = Image.new("RGB", PANEL, "white")
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(12)
    left, top, right, bottom = MARGIN[0], MARGIN[1], PANEL[0] - MARGIN[2], PANEL[1] - MARGIN[3]
    low, high = float(y.min()), float(y.max())
    room = 0.05 * (high - low) or 0.5
    low, high = low - room, high + room
    first, last = float(x.min()), max(float(x.max()), float(x.min()) + 1)

    def place(px: np.ndarray, py: np.ndarray) -> list[tuple[float, float]]:
        across = left + (px - first) / (last - first) * (right - left)
        down = bottom - (py - low) / (high - low) * (bottom - top)
        return list(zip(across.tolist(), down.tolist(), strict=True))

    for share in (0, 0.25, 0.5, 0.75, 1):
        level = bottom - share * (bottom - top)
        pen.line([(left, level), (right, level)], GRID)
        pen.text((left - 6, level), f"{low + share * (high - low):.3g}", INK, font, anchor="rm")
    pen.text((left, top - 10), name, INK, font_for(name, 14), anchor="ls")
    for value, anchor in ((first, "lt"), (last, "rt")):
        pen.text((left if anchor == "lt" else right, bottom + 6), f"{value:g}", INK, font, anchor=anchor)
    window = max(1, len(y) // 12)
    smooth = np.convolve(y, np.ones(window) / window, "valid")
    for points, colour, width in ((place(x, y), FAINT, 1), (place(x[window - 1 :], smooth), LINE, 2)):
        if len(points) > 1:
            pen.line(points, colour, width, joint="curve")
        else:
            (point,) = points
            pen.ellipse([point[0] - 2, point[1] - 2, point[0] + 2, point[1] + 2], LINE)
    return panel
