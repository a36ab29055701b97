"""Sharpness against pictures whose Laplacian is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tmpo_trainer.rewards import load_scorer


def test_a_single_bright_pixel_by_hand() -> None:
    """Its luma of 255 has the Laplacian -4 * 255; its four neighbours have 255, the other four of the inner 3 x 3 have 0."""
    images = np.zeros((2, 5, 5, 3), np.uint8)
    images[0, 2, 2] = 255
    values = np.array([-4, 1, 1, 1, 1, 0, 0, 0, 0]) * 255.0
    scores = load_scorer("sharpness").score(images, ["", ""])
    assert scores.tolist() == pytest.approx([values.var(), 0])
    assert scores.dtype == torch.float32


def test_a_slope_is_not_sharp_and_colours_count_by_their_luma() -> None:
    slope = np.broadcast_to(np.arange(0, 160, 10, dtype=np.uint8)[:, None, None], (16, 16, 3))
    noise = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    green, blue = (np.zeros((16, 16, 3), np.uint8) for _ in range(2))
    green[..., 1], blue[..., 2] = noise, noise
    flat, first, second = load_scorer("sharpness").score(np.stack([slope, green, blue]), [""] * 3).tolist()
    assert flat == pytest.approx(0, abs=1e-6)
    assert first / second == pytest.approx((0.587 / 0.114) ** 2)
