"""How pictures get into CLIP, and folders that are no CLIP."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tmpo_trainer.rewards import clipscore, pickscore
from tmpo_trainer.rewards.parts import clip
from tmpo_trainer.settings.errors import ConfigError

CPU = torch.device("cpu")


def test_padding_keeps_the_whole_picture() -> None:
    white = Image.new("RGB", (60, 40), "white")
    pixels = clip.pad(24)([white])[0]
    black, full = (-0.48145466 / 0.26862954), (1 - 0.48145466) / 0.26862954
    assert pixels.shape == (3, 24, 24)
    # 60 x 40 becomes 24 x 16, with four black rows above and below.
    assert torch.allclose(pixels[0, :4], torch.tensor(black)) and torch.allclose(pixels[0, 20:], torch.tensor(black))
    assert torch.allclose(pixels[0, 4:20], torch.tensor(full), atol=1e-5)


#: Of a picture (width, height) after preprocessing: mean, standard deviation, and three values of the red channel. The
#: padded ones agree with open_clip's own (test_open_clip.py).
PINNED: dict[str, dict[tuple[int, int], tuple[float, ...]]] = {
    "crop": {
        (224, 224): (0.1625, 1.0751, -0.3908, 0.1785, -1.5003),
        (300, 200): (0.1732, 0.9796, -0.7704, -0.6682, 1.58),
        (90, 401): (0.1733, 1.0063, 0.3391, -1.6755, 1.3902),
    },
    "pad": {
        (224, 224): (0.1625, 1.0751, -0.3908, 0.1785, -1.5003),
        (300, 200): (-0.4538, 1.1487, -0.7266, -1.7923, -1.7923),
        (90, 401): (-1.2657, 0.8784, 0.4413, -1.7923, 1.3902),
    },
}


@pytest.mark.parametrize("kind", PINNED)
@pytest.mark.parametrize("size", [(224, 224), (300, 200), (90, 401)])
def test_preprocessing_is_pinned(kind: str, size: tuple[int, int]) -> None:
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    picture = np.stack([(7 * x + 3 * y) % 256, (x * y) % 251, (5 * x + 11 * y) % 253], -1).astype(np.uint8)
    pixels = getattr(clip, kind)(224)([Image.fromarray(picture)])[0]
    assert pixels.shape == (3, 224, 224)
    found = [pixels.mean(), pixels.std(), pixels[0, 112, 112], pixels[0, 5, 200], pixels[0, 200, 100]]
    assert [value.item() for value in found] == pytest.approx(PINNED[kind][size], abs=2e-4)


def test_a_folder_that_is_no_clip_is_one_line(tmp_path: Path, clip_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    cut = tmp_path / "cut"
    shutil.copytree(clip_folder, cut)
    weights_file = cut / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-10])
    for folder in (tmp_path / "empty", cut):
        for load in (pickscore.load, clipscore.load):
            with pytest.raises(ConfigError, match=folder.name) as caught:
                load(CPU, str(folder))
            assert "\n" not in str(caught.value)


def test_a_folder_whose_vocabulary_or_weight_is_missing(tmp_path: Path, clip_folder: Path) -> None:
    """Every prompt would be the same, or a weight random."""
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    words, file = folder / "tokenizer.json", folder / "model.safetensors"
    words.rename(tmp_path / "words")
    with pytest.raises(ConfigError, match=r"the tokenizer in .*clip knows 0 words.* its text encoder 120 words"):
        pickscore.load(CPU, str(folder))
    (tmp_path / "words").rename(words)
    tensors = load_file(file)
    del tensors["text_projection.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"clip is not a complete CLIPModel .text_projection.weight is missing"):
        pickscore.load(CPU, str(folder))
