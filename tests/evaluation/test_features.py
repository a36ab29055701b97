"""DINOv2 features against their definition, on tiny random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from tmpo_trainer.evaluation.features import MEAN, STD, DinoV2, check_features, load_features
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
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 10**9}))
    with pytest.raises(ConfigError, match=r"config\.json: num_hidden_layers 1000000000 is not possible"):
        load_features(str(tmp_path / "dino"), CPU)
