"""CLIP score against PickScore, which has the same formula, on tiny random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tmpo_trainer.rewards import clipscore, pickscore

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a red circle", "a green triangle"]


def test_clipscore_is_a_thirtieth_of_the_formula(clip_folder: Path, images: np.ndarray) -> None:
    folder = str(clip_folder)
    torch.testing.assert_close(
        30 * clipscore.load(CPU, folder).score(images, PROMPTS), pickscore.load(CPU, folder).score(images, PROMPTS)
    )
