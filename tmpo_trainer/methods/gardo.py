"""GARDO's regularisation (arXiv:2512.24138): which samples the KL penalty holds, and what it holds them to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

#: The share of suspicious samples that is held: at the start, its bounds, and the factor by which it moves.
SHARE, SHARE_MIN, SHARE_MAX, SHARE_STEP = 0.1, 0.02, 0.2, 0.1

#: Updates whose mean suspicion is remembered.
MEMORY = 20

#: The reference becomes the current policy when the KL exceeds the first, or after so many updates.
KL_LIMIT, UPDATES_LIMIT = 3e-4, 15


def win_rate(scores: np.ndarray) -> np.ndarray:
    """The share of samples that each one beats, ties counting half: `[n]` -> `[n]` in 0..1."""
    ordered = np.sort(scores)
    below = np.searchsorted(ordered, scores, "left")
    return (below + np.searchsorted(ordered, scores, "right")) / (2 * len(scores))


class Gate:
    """State of the adaptive gate and of the reference's age. Everything in it is part of a checkpoint."""

    def __init__(self) -> None:
        self.share, self.memory, self.age, self.kl = SHARE, [], 0, 0.0

    def held(self, reward: np.ndarray, auxiliary: Sequence[np.ndarray]) -> np.ndarray:
        """Which samples of an update the KL penalty holds: `[n]` bool.

        A sample is suspicious if it wins more by the reward than by the auxiliary scores; of those the most suspicious
        `share` are held. The share grows when suspicion is above all that is remembered, and shrinks below it.

        Args:
            reward: `[n]`, over all prompts. auxiliary: `[n]` each.
        """
        suspicion = win_rate(reward) - np.mean([win_rate(scores) for scores in auxiliary], axis=0)
        positive = suspicion[suspicion > 0]
        if not len(positive):
            return np.zeros(len(reward), dtype=bool)
        mean = float(positive.mean())
        if self.memory and mean > max(self.memory):
            self.share *= 1 + SHARE_STEP
        elif self.memory and mean < min(self.memory):
            self.share *= 1 - SHARE_STEP
        self.share = min(max(self.share, SHARE_MIN), SHARE_MAX)
        self.memory = [*self.memory, mean][-MEMORY:]
        return (suspicion > 0) & (suspicion >= np.quantile(positive, 1 - self.share))

    def renew(self) -> bool:
        """To be called before every update: whether the reference is to become the current policy."""
        self.age += 1
        if self.kl <= KL_LIMIT and self.age <= UPDATES_LIMIT:
            return False
        self.age, self.kl = 1, 0.0
        return True

    def state(self) -> dict[str, Any]:
        return {"share": self.share, "memory": self.memory, "age": self.age, "kl": self.kl}

    def load(self, state: Mapping[str, Any]) -> None:
        self.share, self.memory, self.age, self.kl = state["share"], list(state["memory"]), state["age"], state["kl"]
