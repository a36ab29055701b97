"""Sheets of pictures, and the heat map of distances: its colours, and that its text can be read where it stands."""

from __future__ import annotations

import numpy as np
import pytest

from tmpo_trainer.pictures import grids


def matrix(count: int) -> np.ndarray:
    """Distances of points on a line, the largest of them 1."""
    points = np.linspace(0, 1, count)
    return np.abs(points[:, None] - points)


def cells(values: np.ndarray) -> np.ndarray:
    """The picture's cells, `[K, K, side, side, 3]`."""
    count = len(values)
    side = grids.MAP_SIDE // count
    picture = np.asarray(grids.heat_map(values))[56 : 56 + count * side, 56 : 56 + count * side]
    return picture.reshape(count, side, count, side, 3).swapaxes(1, 2)


def test_colours_follow_the_values() -> None:
    values = np.array([[0.0, 0.5, 1.0], [0.5, -1e-9, 0.25], [1.0, 0.25, 0.0]])
    corners = cells(values)[:, :, 2, 2].astype(int)
    assert (corners[0, 0] == grids.RAMP[0]).all() and (corners[0, 2] == grids.RAMP[-1]).all()
    light = [corners[0, 0].sum(), corners[1, 2].sum(), corners[0, 1].sum(), corners[0, 2].sum()]
    assert light == sorted(light)
    # Copies of one another: no division by 0.
    assert (cells(np.zeros((4, 4)))[:, :, 2, 2] == grids.RAMP[0]).all()


def test_cells_hold_numbers_only_if_they_can_be_read() -> None:
    """27 pictures were the case in which they could not. Text has 20 of about 700 pixels at any count."""
    for count, numbers in ((9, True), (27, False), (81, False), (300, False)):
        first = cells(matrix(count))[0]
        assert any((cell != cell[:1, :1]).any() for cell in first) is numbers
        size = grids.heat_map(matrix(count)).size
        assert min(size) > 400 and max(size) < 850


def test_the_scale_has_its_label_and_ends() -> None:
    plain, labelled = (np.asarray(grids.heat_map(matrix(27), label)) for label in ("", "1 - cosine"))
    assert (plain != labelled).any()
    # The strip right of the cells runs from the largest value down to 0.
    strip = plain[56:-8, 56 + 27 * (grids.MAP_SIDE // 27) + 30]
    assert (strip[0] == grids.RAMP[-1]).all() and (strip[-1] == grids.RAMP[0]).all()


@pytest.mark.parametrize("colour", [*grids.RAMP, (118, 118, 118), (120, 120, 120)])
def test_ink_is_the_one_with_more_contrast(colour: np.ndarray) -> None:
    """At least 4.5 to 1, which WCAG asks of text, is always possible with black or white."""
    linear = (np.asarray(colour) / 255.0) ** 2.2 @ (0.2126, 0.7152, 0.0722)
    ink = grids.readable(np.asarray(colour))
    contrast = (linear + 0.05) / 0.05 if ink == "black" else 1.05 / (linear + 0.05)
    assert contrast >= 4.5


def test_a_sheet_of_large_pictures_can_be_opened_and_read() -> None:
    """They are shrunk, small ones are enlarged by a whole number, and labels grow with them."""
    for side, tile, text in ((32, 128, 11), (64, 128, 11), (200, 200, 16), (256, 256, 21), (1024, 256, 21)):
        row = np.zeros((12, side, side, 3), np.uint8)
        sheet = grids.grid([row, row], ["a", "b"], grids.zoom(row))
        assert sheet.size == (12 * (tile + 2) - 2, 2 * (tile + 2 + text + 3) - 2)
    wide = np.zeros((1, 512, 1024, 3), np.uint8)
    assert grids.grid([wide], (), grids.zoom(wide)).size == (256, 128)
