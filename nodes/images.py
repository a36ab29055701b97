"""Converts ComfyUI's IMAGE, float `[N, H, W, C]` in 0..1, to the trainer's arrays and back, and recognises batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from torch import Tensor

#: Side of the small copies by which batches are recognised.
SIDE = 8
#: Largest difference between two batches of the same pictures, see `unlike`. On the demo model, resizing or JPEG gives .03,
#: more brightness, blur or contrast .16, and grey .26. Other seeds or another order give .58 or more.
SAME = 0.4


def pixels(images: Tensor, channels: int = 3) -> np.ndarray:
    """Images as uint8 `[N, H, W, 3]`, rounded; with 4 channels `[N, H, W, 4]` for those that have transparency."""
    return (images[..., :channels].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def to_image(picture: Any) -> Tensor:
    """A PIL picture as ComfyUI's IMAGE `[1, H, W, 3]`."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255)[None]


def in_chunks(count: int, size: int, compute: Callable[[slice], Tensor]) -> Tensor:
    """What a function finds for `count` pictures, `size` at a time, with progress. The run can be interrupted in between."""
    bar = comfy.utils.ProgressBar(count)
    found = []
    for first in range(0, count, size):
        comfy.model_management.throw_exception_if_processing_interrupted()
        found.append(compute(slice(first, first + size)))
        bar.update_absolute(min(first + size, count))
    return torch.cat(found)


def thumbs(images: Tensor) -> Tensor:
    """`[N, 3, SIDE, SIDE]`: the pictures shrunk, less the mean of each channel."""
    small = torch.nn.functional.interpolate(images[..., :3].movedim(-1, 1).float().cpu(), (SIDE, SIDE), mode="area")
    return small - small.mean((2, 3), keepdim=True)


def unlike(first: Tensor, second: Tensor) -> bool:
    """Whether two batches of `thumbs` of the same length show different pictures.

    Pixels may differ, because a picture stays the same when it is upscaled, sharpened or corrected. Therefore this is not a
    hash but the relative difference, which is 0 for equal batches and about .7 for independent ones.
    """
    there = (first.abs() + second.abs()).sum().item()
    return (first - second).abs().sum().item() > SAME * there
