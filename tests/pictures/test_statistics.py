"""Statistics of pictures against pictures whose values are known."""

from __future__ import annotations

import numpy as np
import pytest

from tmpo_trainer.pictures.statistics import PICTURE_STATISTICS


def measured(name: str, *pictures: np.ndarray) -> list[float]:
    found = PICTURE_STATISTICS[name](np.stack(pictures))
    assert (found.dtype, found.shape) == (np.float64, (len(pictures),))
    return found.tolist()


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, 2).astype(np.uint8)


BLACK = np.zeros((16, 16, 3), np.uint8)
RED = BLACK + np.array([255, 0, 0], np.uint8)
BOARD = grey(np.indices((16, 16)).sum(0) % 2 * 255)
HALVES = grey((np.indices((16, 16))[1] >= 8) * 255)
RAMP = grey(np.indices((16, 16))[1] * 10)


def test_values_of_pictures_that_can_be_computed_by_hand():
    assert measured("brightness", BLACK, RED, BOARD) == pytest.approx([0, 0.299, 0.5])
    assert measured("contrast", RED, BOARD, HALVES) == pytest.approx([0, 0.5, 0.5])
    assert measured("saturation", BLACK, RED, BOARD) == pytest.approx([0, 1, 0])
    # On a board of single pixels the Laplacian is +-4; a ramp has none.
    assert measured("sharpness", RED, BOARD, RAMP) == pytest.approx([0, 16, 0])
    # Of the 14 inner columns two are beside the border between the halves; central differences do not see the board.
    assert measured("edge_density", RED, BOARD, HALVES, RAMP) == pytest.approx([0, 0, 2 / 14, 0])
    assert measured("high_frequency", RED, BOARD) == pytest.approx([0, 1])
    assert measured("high_frequency", HALVES)[0] < 0.2
    assert measured("colour_entropy", RED, BOARD, HALVES) == pytest.approx([0, 1, 1])
    flat, halves, board = measured("file_size", RED, HALVES, BOARD)
    assert flat < halves < board


def test_a_picture_counts_for_itself_alone():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3)).astype(np.uint8)
    for name in PICTURE_STATISTICS:
        assert measured(name, *pictures) == [measured(name, picture)[0] for picture in pictures]
