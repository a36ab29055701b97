"""Scores that the original projects print in their READMEs, with the published weights: `pytest -m slow` where there is a hub.

Downloads 2.4 GB, once. HPS and PickScore publish no score of a picture that can be had.
"""

from __future__ import annotations

import io
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from huggingface_hub.constants import ENDPOINT
from PIL import Image

from tmpo_trainer.commands.fetch import GitFile
from tmpo_trainer.hub import git_blob
from tmpo_trainer.rewards import load_scorer
from tmpo_trainer.rewards.parts.weights import hub_folder

pytestmark = pytest.mark.slow

IMAGE_REWARD = ("THUDM/ImageReward", "c1392c6dd0fd6ecd6d416c96959ab744a6d0a8fb")
PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
#: Of assets/images/1.webp and so on: git's id of the file, and its reward.
OCEANS = (
    ("dc4eb5ba76db95fe46265b71c2e224d0b8544683", 0.5811622738838196),
    ("ce63393f897b523aef909978997c634eacbcfb31", 0.2745276093482971),
    ("eb2c966cf5d605cbd2b7a704464373028e5a21e1", -1.4131819009780884),
    ("73bda58054517ec4d21dfa36127e64be04a1a528", -2.029569625854492),
)
DIAGRAM = GitFile(
    "openai/CLIP", "d05afc436d78f1c48dc0dbf8e5980a9d471f35f6", "CLIP.png", "a1b5ec9171fd7a51e36e845a02304eb837142ba1"
)


@pytest.fixture(scope="module", autouse=True)
def hub() -> None:
    """Asked once; without it nothing here runs."""
    try:
        urllib.request.urlopen(ENDPOINT, timeout=2).close()
    except OSError as error:
        pytest.skip(f"{ENDPOINT} cannot be reached: {error}")


def picture(source: GitFile) -> Image.Image:
    try:
        with urllib.request.urlopen(source.url, timeout=20) as reply:
            content = reply.read()
    except OSError as error:
        pytest.skip(f"{source.url} cannot be downloaded: {error}")
    assert git_blob(content) == source.blob
    return Image.open(io.BytesIO(content))


def test_imagereward_of_its_readme() -> None:
    """They say that figures differ a little between devices."""
    pictures = [
        picture(GitFile(*IMAGE_REWARD, f"assets/images/{number}.webp", blob))
        for number, (blob, _) in enumerate(OCEANS, 1)
    ]
    images = np.stack([np.asarray(image.convert("RGB")) for image in pictures])
    scores = load_scorer("imagereward").score(images, [PROMPT] * len(images))
    assert scores.tolist() == pytest.approx([reward for _, reward in OCEANS], abs=0.02)


def test_clips_readme() -> None:
    """ViT-B/32's probabilities of three captions, there from float16 on a GPU: a tenth of a logit is a tenth of them."""
    image = picture(DIAGRAM)
    # As there, transparency is dropped last.
    wide = image.resize((int(224 * image.width / image.height), 224), Image.Resampling.BICUBIC)
    left = round((wide.width - 224) / 2)
    pixels = np.asarray(wide.crop((left, 0, left + 224, 224)).convert("RGB"))
    folder = hub_folder("clipscore", ("openai/clip-vit-base-patch32", ("config.json", "pytorch_model.bin")))
    captions = ["a diagram", "a dog", "a cat"]
    scores = load_scorer("clipscore", path=str(folder)).score(np.stack([pixels] * 3), captions)
    odds = torch.softmax(30 * scores, 0).tolist()
    assert odds == pytest.approx([0.9927937, 0.00421068, 0.00299572], rel=0.15)
