"""How pictures get into CLIP, and folders that are no CLIP."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tmpo_trainer.rewards import clipscore, imagereward, pickscore
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


@pytest.mark.parametrize(
    ("size", "apart"), [((832, 1216), True), ((45, 32), True), ((61, 40), False), ((300, 300), False)]
)
def test_the_crop_is_the_originals(size: tuple[int, int], apart: bool) -> None:
    """Where an odd number of pixels is cut off, torchvision rounds its half to even, transformers down."""
    width, height = size
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    scale = 224 / min(size)
    whole = Image.fromarray(picture).resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    (left, odd_x), (top, odd_y) = (divmod(side - 224, 2) for side in whole.size)
    # Half to even: an odd quotient goes up.
    even = (left + (odd_x and left % 2), top + (odd_y and top % 2))
    assert (even != (left, top)) == apart
    for offset, (x, y) in ((round, even), (math.floor, (left, top))):
        pixels = (np.asarray(whole)[y : y + 224, x : x + 224] / 255 - clip.OPENAI_CLIP_MEAN) / clip.OPENAI_CLIP_STD
        found = clip.crop(224, offset=offset)([Image.fromarray(picture)])[0].permute(1, 2, 0)
        np.testing.assert_allclose(found, pixels, atol=1e-5)


def test_each_scorer_crops_as_its_original(clip_folder: Path, network: imagereward.ImageReward, bert: Any) -> None:
    """PickScore and CLIP score with transformers, the others with torchvision; a picture of 47 x 32 tells them apart."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 47, 3), dtype=np.uint8))
    low, even = (clip.crop(32, offset=offset)([picture]) for offset in (math.floor, round))
    assert not torch.equal(low, even)
    for module in (pickscore, clipscore):
        assert torch.equal(module.load(CPU, str(clip_folder)).towers.prepare([picture]), low)
    for prepare in (
        clip.load_clip("geneval", clip_folder, CPU).prepare,
        imagereward.ImageRewardScorer(network, bert, CPU)._prepare,
    ):
        assert torch.equal(prepare([picture]), even)


@pytest.mark.parametrize("wide", [False, True])
def test_hps_resizes_floating_point_pixels(wide: bool) -> None:
    """Its filter overshoots at an edge: below 0 and above 1, between whole numbers of 255ths."""
    picture = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (300, 200, 1)).repeat(3, 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (clip.OPENAI_CLIP_MEAN, clip.OPENAI_CLIP_STD))
    found = (clip.pad(224)([Image.fromarray(picture.swapaxes(0, 1) if wide else picture)])[0] * std + mean)[0]
    found = found.T if wide else found
    # 200 x 300 becomes 149 x 224.
    assert found[:, :37].abs().max() < 1e-6 and found[:, 186:].abs().max() < 1e-6
    expected = keys_filter(300, 224) @ torch.from_numpy(picture[..., 0] / 255.0) @ keys_filter(200, 149).T
    assert expected.min() < -0.03 and expected.max() > 1.03
    torch.testing.assert_close(found[:, 37:186].double(), expected, atol=5e-5, rtol=0)


def keys_filter(before: int, after: int) -> torch.Tensor:
    """The weights `[after, before]` of an antialiased bicubic resize along one axis: Keys' cubic with a = -.5."""
    scale = before / after
    x = (torch.arange(before).double() + 0.5 - scale * (torch.arange(after).double()[:, None] + 0.5)).abs() / scale
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


#: Of a picture (width, height) after cropping: mean, standard deviation, and three values of the red channel.
PINNED: dict[tuple[int, int], tuple[float, ...]] = {
    (224, 224): (0.1625, 1.0751, -0.3908, 0.1785, -1.5003),
    (300, 200): (0.1732, 0.9796, -0.7704, -0.6682, 1.58),
    (90, 401): (0.1733, 1.0063, 0.3391, -1.6755, 1.3902),
}


@pytest.mark.parametrize("size", PINNED)
def test_cropping_is_pinned(size: tuple[int, int]) -> None:
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    picture = np.stack([(7 * x + 3 * y) % 256, (x * y) % 251, (5 * x + 11 * y) % 253], -1).astype(np.uint8)
    pixels = clip.crop(224)([Image.fromarray(picture)])[0]
    assert pixels.shape == (3, 224, 224)
    found = [pixels.mean(), pixels.std(), pixels[0, 112, 112], pixels[0, 5, 200], pixels[0, 200, 100]]
    assert [value.item() for value in found] == pytest.approx(PINNED[size], abs=2e-4)


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


def test_a_transformers_model_has_its_own_mean_and_std(tmp_path: Path, clip_folder: Path) -> None:
    """As LAION's ViT-L/14 does. What else its file asks for must be CLIP's own."""
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    picture = Image.new("RGB", (40, 40), (51, 102, 204))
    size = json.loads((folder / "config.json").read_text())["vision_config"]["image_size"]
    own = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"shortest_edge": size}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(own))
    for name, content in (("preprocessor_config.json", own), ("processor_config.json", {"image_processor": own})):
        (folder / "preprocessor_config.json").unlink(missing_ok=True)
        (folder / name).write_text(json.dumps(content))
        found = clipscore.load(CPU, str(folder)).towers.prepare([picture])[0, :, 0, 0]
        assert found.tolist() == pytest.approx([-1.2, -0.4, 1.2], abs=1e-5)
    for change, fault in (({"resample": 2}, "resample 2 is not supported, only"), ({"size": 7}, "size 7 is not supported"),
                          ({"image_std": [1]}, "need three values each")):  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps({**own, **change}))
        with pytest.raises(ConfigError, match=fault):
            clipscore.load(CPU, str(folder))


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
