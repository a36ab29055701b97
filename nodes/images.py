"""ComfyUI's IMAGE, float `[N, H, W, C]` in 0..1, to and from what the trainer takes, and telling one batch from another."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Side of the small copies that batches are told apart by.
SIDE = 8
#: Most difference of two batches of the same pictures, see `unlike`. On the demo model resized ones or JPEGs have .03, brighter
#: or blurred ones or those of more contrast .16, grey ones .26; other seeds or another order .58 and more.
SAME = 0.4


def pixels(images: Tensor) -> np.ndarray:
    """As uint8 `[N, H, W, 3]`, rounded."""
    return (images[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def to_image(picture: Any) -> Tensor:
    """A PIL picture as ComfyUI's IMAGE `[1, H, W, 3]`."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255)[None]


def thumbs(images: Tensor) -> Tensor:
    """`[N, 3, SIDE, SIDE]`: what is left of pictures when they are shrunk, less the mean of each channel."""
    small = torch.nn.functional.interpolate(images[..., :3].movedim(-1, 1).float().cpu(), (SIDE, SIDE), mode="area")
    return small - small.mean((2, 3), keepdim=True)


def unlike(first: Tensor, second: Tensor) -> bool:
    """Whether two batches of `thumbs`, as many each, are of other pictures.

    Pixels may differ: who upscales, sharpens or corrects pictures still has the same ones. So it is no hash but the
    difference as a share of what is there, 0 for equal batches and about .7 for independent ones.
    """
    there = (first.abs() + second.abs()).sum().item()
    return (first - second).abs().sum().item() > SAME * there
