"""Training methods, one file each: its settings (`Settings`) and what it does (`Method`).

| method | rollout | advantage | ratio |
|---|---|---|---|
| tmpo | the tree, positions by the schedule | Softmax-TB | per path (per edge with `siblings`) |
| tmpo-beta-1 | the same | the same, beta = 1 throughout | the same |
| tmpo-step-balance | the same | balance at every branch point | per edge |
| tmpo-no-tree | K chains, noise at the same steps | Softmax-TB | per path |
| tmpo-fixed-branching | the tree at `branch_early` | Softmax-TB | as tmpo |
| flow-grpo | K chains, noise at every step but the last | z-score | per step |
| mix-grpo | K chains, noise in a sliding window | z-score | per step |
| tree-grpo | one seed, a tree in a random window | z-score, backed up through the tree | per edge |
| gardo | as flow-grpo | R - mean, times rarity | per step |
| awm | K chains without noise, such that split once, or a tree | z-score, on noised leaves | per leaf |
| nft | the same, by the old policy | z-score as optimality in 0..1, on noised leaves | none |
| crd | as awm | z-score less lambda times the log ratio to the reference, on noised leaves | none |
| tmpo-leaf | as awm | Softmax-TB with the evidence of noised leaves | per leaf |

Several rewards are z-scored one by one and then averaged, with every method. `reward_weights` gives another weighted sum.

Nothing here imports torch when it is loaded: `--help` reads the settings of every method. What computes is imported where it
is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..settings import discovery
from ..settings.presets import method_file

if TYPE_CHECKING:
    from torch import Tensor

    from ..settings.config import TrainConfig
    from ..tree import TreePlan
    from .base import Method

#: Files that are no methods, see `settings.discovery`.
SHARED = ("base", "batch", "data", "leaves", "noised")


def make(config: TrainConfig, sigmas: Tensor) -> Method:
    """The method of a run.

    Args:
        config: an instance of the method's own settings. sigmas: `[N + 1]`, of the rollout.

    Raises:
        ConfigError: positions that cannot carry noise.
    """
    return discovery.load("methods", method_file(config.method)).Method(config, sigmas)


def evaluations(method: Method, plan: TreePlan) -> dict[str, int]:
    """Network evaluations of one prompt in one update, in latents by phase: the method's and those of the anchor on data."""
    from . import data

    more = data.evaluations(method)
    return {phase: count + more.get(phase, 0) for phase, count in ({"reference": 0} | method.evaluations(plan)).items()}


def trained(counts: dict[str, int], steps: int) -> int:
    """Latents with gradient in one of an update's optimiser steps, from its network evaluations."""
    return (counts["replay"] + counts.get("backward", 0)) // steps


def cost(counts: dict[str, float] | dict[str, int]) -> float:
    """Network evaluations as one number: a replay counts as two, since its backward pass takes about as long as its forward
    pass."""
    return sum(counts.values()) + counts["replay"]
