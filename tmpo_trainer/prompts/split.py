"""Our own prompts: hand-written ones for preference rewards, generated ones for composition and for text.

Training and held-out prompts never share a scene (`compositional`) or a phrase (`rendering`): which side one is on is a
hash of it, whatever the seed and the length of the list.
"""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "heldout"]

#: One scene or phrase in so many is held out.
HELD_OUT = 6


def side(key: str) -> Split:
    """Which split a scene or phrase belongs to."""
    return "heldout" if int(hashlib.sha256(key.encode()).hexdigest(), 16) % HELD_OUT == 0 else "train"
