"""What tests of scorers share: pictures, and tiny CLIP and ImageReward models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, CLIPConfig, CLIPModel

from tmpo_trainer.demo.build import make_tokenizer
from tmpo_trainer.rewards import imagereward

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**VISION, "vocab_size": 40, "encoder_hidden_size": 32, "max_position_embeddings": 64, "layer_norm_eps": 1e-12}


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Wide pictures, so that cropping and padding differ."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (4, 40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPModel(
        CLIPConfig(
            projection_dim=16,
            text_config={
                **tower,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": tokenizer.model_max_length,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
            },
            vision_config={**tower, "image_size": 32, "patch_size": 8},
        )
    )
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prepared() -> Callable[[np.ndarray, int], Tensor]:
    """`prepared(images, size)`: CLIP's preprocessing, by hand."""

    def prepared(images: np.ndarray, size: int) -> Tensor:
        """Shortest side to `size`, centre crop, CLIP's mean and std: by hand."""
        mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
        found = []
        for image in images:
            height, width = image.shape[:2]
            scale = size / min(height, width)
            # As torchvision and transformers: the longer side is cut, not rounded.
            whole = Image.fromarray(image).resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
            left, top = (whole.width - size) // 2, (whole.height - size) // 2
            pixels = np.asarray(whole.crop((left, top, left + size, top + size))) / 255
            found.append(((pixels - mean) / std).transpose(2, 0, 1))
        return torch.tensor(np.stack(found), dtype=torch.float32)

    return prepared


@pytest.fixture(scope="session")
def network() -> imagereward.ImageReward:
    torch.manual_seed(2)
    vision = BlipVisionConfig(**VISION, image_size=32, patch_size=8, layer_norm_eps=1e-6, hidden_act="gelu")
    network = imagereward.ImageReward(vision, BlipTextConfig(**TEXT, hidden_act="gelu"))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.15)
    return network


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "two", "blue", "squares", "green"]
    file = tmp_path_factory.mktemp("bert") / "vocab.txt"
    file.write_text("\n".join(words))
    return BertTokenizer(vocab=str(file))
