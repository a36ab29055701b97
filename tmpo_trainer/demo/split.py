"""Writes the demo's prompt lists: `python -m tmpo_trainer.demo.split`.

The lists are frozen: the model card has their hashes. They are disjoint and hold only compositional families, because a
single object leaves nothing to learn. Families alternate, so that the first n prompts are a fair sample.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from . import domain

FOLDER = Path(__file__).parent / "prompts"
TRAIN = {"count": 36, "pair": 108, "relation": 108, "mixed": 108}
HELDOUT = {"count": 12, "pair": 16, "relation": 16, "mixed": 16}
#: For choosing settings, so that the held-out list stays unseen. The other two lists use up the `count` family.
VALIDATION = {"pair": 20, "relation": 20, "mixed": 20}
LISTS = {"train": TRAIN, "heldout": HELDOUT, "validation": VALIDATION}


def split(seed: int = 0) -> dict[str, list[str]]:
    """{name of a list: its prompts}."""
    generator = random.Random(seed)
    lists: dict[str, list[tuple[float, str]]] = {name: [] for name in LISTS}
    for family in domain.COMPOSITIONAL:
        texts = [scene.text() for scene in domain.all_scenes(family)]
        generator.shuffle(texts)
        first = 0
        for name, sizes in LISTS.items():
            # Spread each family evenly over the list.
            size = sizes.get(family, 0)
            lists[name] += [((i + 0.5) / size, text) for i, text in enumerate(texts[first : first + size])]
            first += size
    return {name: [text for _, text in sorted(chosen)] for name, chosen in lists.items()}


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for name, prompts in split().items():
        (FOLDER / f"{name}.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
        print(f"{FOLDER / name}.txt: {len(prompts)} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
