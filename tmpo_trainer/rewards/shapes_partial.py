"""The share of a demo prompt's clauses that hold, 0 to 1. The reward `shapes` requires all of them."""

from __future__ import annotations

import torch

from . import shapes

WEIGHTS = shapes.WEIGHTS
check, default_prompts = shapes.check, shapes.default_prompts


def load(device: torch.device, path: str | None = None) -> shapes.ShapesScorer:
    """The scorer, which runs on the CPU."""
    return shapes.ShapesScorer("partial")
