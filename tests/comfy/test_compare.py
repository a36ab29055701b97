"""What Compare reports for its view, and its grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image


def compared(nodes: Any, count: int, pairs: int, scored: bool = True) -> tuple[Any, torch.Tensor, torch.Tensor]:
    from tmpo_pack.nodes.images import thumbs  # type: ignore[import-not-found]
    from tmpo_pack.nodes.types import Scores  # type: ignore[import-not-found]

    base, lora = (torch.rand(count, 32, 48, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    scores = [None, None]
    if scored:
        values = torch.arange(count, dtype=torch.float32)
        values[0] = torch.nan
        scores = [
            Scores({"kept": own, name: own}, ["a"] * count, thumbs(images))
            for own, images, name in ((values, base, "first"), (values + 0.5, lora, "second"))
        ]
    return nodes.lora.Compare.execute(base, lora, pairs, False, *scores), base, lora


def test_every_pair_is_there_with_both_scores(nodes: Any) -> None:
    import folder_paths  # type: ignore[import-not-found]

    made, base, lora = compared(nodes, 7, 3)
    (report,) = made.ui["tmpo_compare"]
    assert report["aspect"] == 1.5 and [pair["index"] for pair in report["pairs"]] == [0, 3, 6]
    for pair in report["pairs"]:
        for side, images in (("base", base), ("lora", lora)):
            assert pair[side]["type"] == "temp"
            with Image.open(Path(folder_paths.get_temp_directory(), pair[side]["filename"])) as picture:
                assert np.abs(np.asarray(picture) - 255 * images[pair["index"]].numpy()).max() <= 1
    # A score that only one side has is left out. What is not finite is null, since JSON has no NaN.
    assert [pair["scores"] for pair in report["pairs"]] == [
        {"kept": [None, None]}, {"kept": [3.0, 3.5]}, {"kept": [6.0, 6.5]}
    ]  # fmt: skip
    assert made.ui["text"] == (made.result[1],) and "| kept |" in made.result[1]
    unscored, *_ = compared(nodes, 3, 3, scored=False)
    assert all(pair["scores"] == {} for pair in unscored.ui["tmpo_compare"][0]["pairs"])


@pytest.mark.parametrize("pairs", [1, 6, 9, 12, 15, 20])
def test_a_grid_has_no_empty_corner(nodes: Any, pairs: int) -> None:
    """Random pictures have hardly any white pixel, unlike places without a picture and the gaps between them."""
    made, *_ = compared(nodes, pairs, pairs, scored=False)
    grid = made.result[0][0]
    for corner in (grid[:20, :20], grid[:20, -20:], grid[-20:, :20], grid[-20:, -20:]):
        assert (corner == 1).all(-1).float().mean() < 0.1
    assert 0.2 < grid.shape[1] / grid.shape[0] < 5
