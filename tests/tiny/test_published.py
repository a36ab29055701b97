"""Scores that the original projects publish, on their own weights: `pytest -m slow`, where the hub can be reached.

Gigabytes are downloaded. Left out of the default run by pyproject.toml.
"""

from __future__ import annotations

import io
import socket
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from tmpo_trainer.rewards import load_scorer

pytestmark = pytest.mark.slow

#: The example on ImageReward's model card (huggingface.co/THUDM/ImageReward): prompt, pictures, rewards.
PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
PICTURES = "https://raw.githubusercontent.com/THUDM/ImageReward/main/assets/images/{}.webp"
REWARDS = (0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    try:
        socket.create_connection(("huggingface.co", 443), timeout=2).close()
        found = []
        for number in range(1, 5):
            with urllib.request.urlopen(PICTURES.format(number), timeout=20) as reply:
                found.append(np.asarray(Image.open(io.BytesIO(reply.read())).convert("RGB")))
        return found
    except OSError as error:
        pytest.skip(f"the hub or the pictures cannot be reached: {error}")


def test_imagereward_gives_the_rewards_of_its_model_card(pictures: list[np.ndarray]) -> None:
    scorer = load_scorer("imagereward")
    found = torch.cat([scorer.score(picture[None], [PROMPT]) for picture in pictures])
    # WebP decoders and resampling differ in the last bits.
    torch.testing.assert_close(found, torch.tensor(REWARDS), atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("pickscore", 18, 25), ("hpsv2", 0.15, 0.4), ("clipscore", 0.5, 1.3)]
)
def test_others_are_in_their_published_range_and_prefer_the_same(
    pictures: list[np.ndarray], name: str, low: float, high: float
) -> None:
    """They publish no example to compare with; the better two of the card's ranking must beat the worse two."""
    scorer = load_scorer(name)
    found = torch.cat([scorer.score(picture[None], [PROMPT]) for picture in pictures])
    assert low < found.min() and found.max() < high
    assert found[:2].mean() > found[2:].mean()
