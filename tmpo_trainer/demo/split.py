"""Writes the demo's prompt lists: `python -m tmpo_trainer.demo.split`. Frozen: the model card has their hashes.

Compositional families only, disjoint; a single object leaves nothing to learn. Families alternate, so that the first n
prompts are a fair sample.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from tmpo_trainer.demo import domain

FOLDER = Path(__file__).parent / "prompts"
TRAIN = {"count": 36, "pair": 108, "relation": 108, "mixed": 108}
HELDOUT = {"count": 12, "pair": 16, "relation": 16, "mixed": 16}


def split(seed: int = 0) -> tuple[list[str], list[str]]:
    """Training and held-out prompts."""
    generator = random.Random(seed)
    lists: tuple[list[tuple[float, str]], list[tuple[float, str]]] = ([], [])
    for family in domain.COMPOSITIONAL:
        texts = [scene.text() for scene in domain.all_scenes(family)]
        generator.shuffle(texts)
        first = 0
        for chosen, size in zip(lists, (TRAIN[family], HELDOUT[family]), strict=True):
            # Spread each family evenly over the list.
            chosen += [((i + 0.5) / size, text) for i, text in enumerate(texts[first : first + size])]
            first += size
    return [text for _, text in sorted(lists[0])], [text for _, text in sorted(lists[1])]


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for name, prompts in zip(("train", "heldout"), split(), strict=True):
        (FOLDER / f"{name}.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
        print(f"{FOLDER / name}.txt: {len(prompts)} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
