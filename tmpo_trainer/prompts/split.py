"""Splits generated prompts into training and held-out ones.

The two never share a scene (`compositional`) or a phrase (`rendering`): a hash of it decides the split, whatever the seed
and the length of the list.
"""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "heldout"]

#: One scene or phrase in this many is held out.
HELD_OUT = 6


def side(key: str) -> Split:
    """Which split a scene or phrase belongs to."""
    return "heldout" if int(hashlib.sha256(key.encode()).hexdigest(), 16) % HELD_OUT == 0 else "train"
