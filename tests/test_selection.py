"""Choosing pictures, heat maps and charts: what the nodes compute."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tmpo_trainer import selection
from tmpo_trainer.pictures import charts


def test_boltzmann_by_hand() -> None:
    """Scores 1, 2, 3 have z-scores -sqrt(1.5), 0, sqrt(1.5)."""
    q = selection.boltzmann(torch.tensor([1.0, 2.0, 3.0]), 2.0)
    weights = [math.exp(-2 * math.sqrt(1.5)), 1, math.exp(2 * math.sqrt(1.5))]
    assert q.tolist() == pytest.approx([weight / sum(weights) for weight in weights])
    assert selection.boltzmann(torch.tensor([1.0, 2.0, 3.0]), 0.0).tolist() == pytest.approx([1 / 3] * 3)
    assert selection.boltzmann(torch.full((4,), 7.0), 5.0).tolist() == pytest.approx([0.25] * 4)


def test_best_is_stable() -> None:
    scores = torch.tensor([0.0, 1.0, 1.0, 0.5, 1.0])
    assert selection.best(scores, 2) == [1, 2]
    assert selection.best(scores, 9) == [1, 2, 4, 3, 0]


def test_most_diverse_is_greedy_max_min() -> None:
    """Points on a line at 0, 1, 5, 6, 10: from 0 comes 10, then 5; of those allowed only."""
    points = torch.tensor([0.0, 1.0, 5.0, 6.0, 10.0])
    distances = (points[:, None] - points).abs()
    assert selection.most_diverse(distances, torch.tensor([9.0, 1, 2, 3, 4]), 0.0, 3) == [0, 4, 2]
    assert selection.most_diverse(distances, torch.tensor([9.0, 1, -1, 3, -2]), 0.0, 3) == [0, 3, 1]
    assert selection.most_diverse(distances, torch.tensor([-1.0, 1, -1, 3, -1]), 0.0, 9) == [3, 1]
    with pytest.raises(ValueError, match="no score is 5 or more: the best is 3"):
        selection.most_diverse(distances, torch.tensor([1.0, 2, 3, 0, 0]), 5.0, 2)


def test_pixel_distances() -> None:
    """Of pictures that differ by a constant, whatever their size: that times the root of 32 * 32 * 3."""
    grey = torch.full((3, 40, 64, 3), 0.25) + torch.tensor([0.0, 0.5, 0.0])[:, None, None, None]
    distance = 0.5 * math.sqrt(32 * 32 * 3)
    expected = torch.tensor([[0, distance, 0], [distance, 0, distance], [0, distance, 0]], dtype=torch.float64)
    torch.testing.assert_close(selection.pixel_distances(grey), expected, atol=1e-4, rtol=0)


def test_every_group_has_a_boltzmann_distribution_of_its_own() -> None:
    scores = torch.tensor([1.0, 10.0, 2.0, 20.0, 3.0])
    weights = selection.boltzmann_by_group(scores, [[0, 2, 4], [1, 3]], 2.0)
    assert weights[[0, 2, 4]].tolist() == selection.boltzmann(scores[[0, 2, 4]], 2.0).tolist()
    assert weights[[1, 3]].tolist() == selection.boltzmann(scores[[1, 3]], 2.0).tolist()


def test_sample_follows_the_weights() -> None:
    weights = torch.tensor([0.6, 0.3, 0.1, 0.0])
    draws = [selection.sample(weights, 1, seed)[0] for seed in range(2000)]
    shares = np.bincount(draws, minlength=4) / 2000
    assert shares == pytest.approx([0.6, 0.3, 0.1, 0.0], abs=0.04)
    assert selection.sample(weights, 3, 5) == selection.sample(weights, 3, 5)
    assert all(sorted(selection.sample(weights, 3, seed)) == [0, 1, 2] for seed in range(20))
    assert sorted(selection.sample(weights, 4, 0)) == [0, 1, 2, 3]


def test_charts_draw_every_series() -> None:
    x = list(range(1, 41))
    rising = [0.01 * i for i in x]
    picture = charts.draw(x, {"a": rising, "b": [1.0] * 40, "c": rising[::-1]})
    assert picture.size == (2 * charts.PANEL[0], 2 * charts.PANEL[1])
    panels = np.asarray(picture).reshape(2, charts.PANEL[1], 2, charts.PANEL[0], 3)
    blue = (panels == (0x1F, 0x77, 0xB4)).all(-1)
    # The strong line of a rising series is higher on the right (rows count from the top), of a falling one on the left.
    for (row, column), rises in (((0, 0), True), ((1, 0), False)):
        rows, columns = np.nonzero(blue[row, :, column])
        left, right = rows[columns < 200].mean(), rows[columns > 300].mean()
        assert (right < left) == rises
    assert blue[0, :, 1].any() and not blue[1, :, 1].any()
    assert charts.draw([1], {"a": [2.0]}).size == charts.PANEL
