"""What the tests of whole runs share: settings that fit the tiny model, a made-up reward, trainers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from tmpo_trainer.backbones import load_backbone
from tmpo_trainer.backbones.base import Backbone
from tmpo_trainer.config import TrainConfig
from tmpo_trainer.trainer import Trainer

PROMPTS = ("a red circle", "two blue squares", "a green triangle", "a pink circle and a cyan square")


class RedScorer:
    """Mean red less mean blue of a picture, about -0.1..0.1. Deterministic and blind to the prompt."""

    name = "red"

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None = None) -> torch.Tensor:
        assert len(images) == len(prompts)
        means = torch.from_numpy(images.astype(np.float32) / 255).mean((1, 2))
        return means[:, 0] - means[:, 2]


@pytest.fixture(scope="session")
def red_scorer() -> RedScorer:
    return RedScorer()


@pytest.fixture(scope="session")
def load(tiny_model: Path) -> Callable[..., Backbone]:
    """A fresh backbone of the tiny model."""

    def load(max_sequence_length: int = 0) -> Backbone:
        return load_backbone(str(tiny_model), torch.float32, torch.device("cpu"), max_sequence_length)

    return load


@pytest.fixture(scope="session")
def load_stock(tiny_model: Path) -> Callable[[], StableDiffusion3Pipeline]:
    """A fresh diffusers pipeline of the tiny model. That it has no T5 must be said, or diffusers refuses the folder."""

    def load() -> StableDiffusion3Pipeline:
        pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_model, text_encoder_3=None, tokenizer_3=None)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


def load_folder(folder: Path, config: TrainConfig) -> Backbone:
    return load_backbone(str(folder), torch.float32, torch.device("cpu"), config.max_sequence_length)


@pytest.fixture
def make_trainer(load: Callable[..., Backbone], red_scorer: RedScorer, tmp_path: Path) -> Callable[..., Trainer]:
    """`make_trainer(setting=value, ...)`: a trainer of a fresh tiny model, or of `folder`, in `tmp_path`.

    The tree branches at steps 1, 2 and 3 of 6 unless told otherwise: 96 evaluations in a rollout, 12 in a replay.
    """

    def make(
        scorer: Any = red_scorer, prompts: Sequence[str] = PROMPTS, folder: Path | None = None, **changes: Any
    ) -> Trainer:
        settings: dict[str, Any] = {
            "prompts_per_update": 2,
            "branch_late": (1, 2, 3),
            # So large that the Beta distribution is its mean.
            "kappa": 1e9,
            "guidance": 1.0,
            "resolution": (32, 32),
            "max_sequence_length": 0,
            "lora_rank": 4,
            "lora_alpha": 8,
            "updates": 20,
            "learning_rate": 1e-3,
        }
        config = TrainConfig(**{**settings, **changes})
        backbone = load(config.max_sequence_length) if folder is None else load_folder(folder, config)
        return Trainer(config, tmp_path, backbone, [scorer], prompts)

    return make


@pytest.fixture
def shake() -> Callable[[Trainer, float], None]:
    """Moves the LoRA of a trainer away from zero, so that A and B both have gradients."""

    def shake(trainer: Trainer, scale: float = 0.05) -> None:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in trainer.lora.values():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))

    return shake
