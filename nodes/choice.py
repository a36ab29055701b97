"""The choice of leaves in a Tree View: a text such as `12, 3 @ 4f2a91c05b1e77aa`, the leaves and their tree."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tmpo_trainer import selection
from ..tmpo_trainer.pictures import tree as tree_picture
from ..tmpo_trainer.settings.errors import one_line
from .types import Scores, Tree

#: How many leaves a button chooses.
SUGGESTED = 4

LEAF, FINGERPRINT = re.compile(r"\d{1,9}"), re.compile(r"[0-9a-f]+")


@dataclass(frozen=True)
class Choice:
    """leaves: places in the batch, in the order in which they were chosen. tree: its fingerprint; "" for any tree."""

    leaves: tuple[int, ...]
    tree: str

    @classmethod
    def parse(cls, text: str) -> Choice:
        """An empty text, or -1, chooses nothing.

        Raises:
            ValueError: it is not a choice.
        """
        # One pattern for the whole text would take hours for a hostile one, and the server answers nobody meanwhile.
        places, at, tree = (part.strip() for part in text.partition("@"))
        words = [word.strip() for word in places.split(",")] if places not in ("", "-1") else []
        if not all(map(LEAF.fullmatch, words)) or (at and not FINGERPRINT.fullmatch(tree)):
            raise ValueError(
                f"selected is {one_line(text, 60)!r}: write places of leaves, e.g. 12, 3, or nothing for the best leaf"
            )
        return cls(tuple(dict.fromkeys(map(int, words))), tree)


def chosen_leaves(text: str, tree: Tree) -> tuple[list[int], str]:
    """The chosen leaves of this tree, and why there are none if the choice does not fit.

    It is no error: the tree has been sampled, and that may have taken long.
    """
    try:
        choice = Choice.parse(text)
    except ValueError as error:
        return [], str(error)
    if choice.leaves and choice.tree and not tree.looks_like(choice.tree):
        return [], "the leaves were chosen in another tree, so the best leaf of this tree is passed on"
    if choice.leaves and max(choice.leaves) >= tree.leaves:
        return (
            [],
            f"leaf {max(choice.leaves)} is beyond the {tree.leaves} leaves of this tree, so the best is passed on",
        )
    return list(choice.leaves), ""


def check_choice(text: str, tree: Tree) -> None:
    """Raises ValueError for a text that is no choice, or whose leaves this tree cannot have.

    Leaves of another tree are none of this one, and no error: a page may still hold them when its next tree waits.
    """
    if not Choice.parse(text).tree and (fault := chosen_leaves(text, tree)[1]):
        raise ValueError(fault)


def suggestions(images: Tensor, scores: Scores | None) -> list[dict[str, Any]]:
    """Sets of leaves that the view offers, each by a button: its name, a tip and the leaves in their order."""
    found = []

    def add(name: str, tip: str, leaves: list[int]) -> None:
        found.append({"name": name, "tip": tip, "leaves": leaves})

    values = torch.zeros(len(images)) if scores is None else scores.first().cpu()
    finite = values.isfinite()
    values = values.where(finite, -torch.inf)
    count = min(SUGGESTED, int(finite.sum()))
    if scores is not None and count > 1:
        add(f"top {count}", f"Choose the {count} leaves with the highest scores", selection.best(values, count))
    if count > 1:
        median = values[finite].median()
        # Where more than half share the lowest score, all leaves are at the median or above it.
        better = values[values > median]
        least = (better.min() if len(better) >= count else median).item()
        leaves = selection.most_diverse(selection.pixel_distances(images).cpu(), values, least, count)
        among = "" if scores is None else " among the better half"
        add(f"{len(leaves)} diverse", f"Choose {len(leaves)} leaves that look as different as possible{among}", leaves)
    stars = tree_picture.starred_leaves(values.tolist()) if scores is not None else []
    if len(stars) > 1:
        add(f"all {len(stars)} best", f"Choose the {len(stars)} leaves that share the highest score", stars)
    return found
