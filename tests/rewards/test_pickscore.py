"""PickScore against its definition, on tiny random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from tmpo_trainer.commands import loading
from tmpo_trainer.demo.build import make_tokenizer
from tmpo_trainer.rewards import pickscore
from tmpo_trainer.settings.config import TrainConfig

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a red circle", "a green triangle"]


@torch.no_grad()
def test_pickscore_is_the_formula(clip_folder: Path, images: np.ndarray, prepared: Any) -> None:
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = make_tokenizer()(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
    image = model.visual_projection(model.vision_model(prepared(images, 32)).pooler_output)
    text = model.text_projection(model.text_model(tokens["input_ids"], tokens["attention_mask"]).pooler_output)
    expected = model.logit_scale.exp() * F.cosine_similarity(image, text)
    scorer = pickscore.load(CPU, str(clip_folder))
    scores = scorer.score(images, PROMPTS)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    assert scores.dtype == torch.float32 and scores.std() > 1e-3
    # One by one, and in small batches, the same.
    alone = torch.cat([scorer.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, scores, atol=1e-5, rtol=1e-5)
    scorer.towers.batch = 3
    torch.testing.assert_close(scorer.score(images, PROMPTS), scores, atol=1e-5, rtol=1e-5)


def test_a_prompt_is_encoded_once(clip_folder: Path, images: np.ndarray) -> None:
    scorer = pickscore.load(CPU, str(clip_folder))
    rows: list[int] = []
    scorer.towers.model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs.get("input_ids", args[0] if args else ()))),
        with_kwargs=True,
    )
    for _ in range(2):
        scorer.score(images, PROMPTS)
    assert rows == [3]


def test_half_precision_weights_score_in_float32(clip_folder: Path, images: np.ndarray, tmp_path: Path) -> None:
    """On a CPU; transformers would otherwise compute in whatever the file has."""
    shutil.copytree(clip_folder, tmp_path / "half")
    CLIPModel.from_pretrained(clip_folder).half().save_pretrained(tmp_path / "half")
    scorer = pickscore.load(CPU, str(tmp_path / "half"))
    assert all(value.dtype == torch.float32 for value in scorer.towers.model.parameters())
    full = pickscore.load(CPU, str(clip_folder)).score(images, PROMPTS)
    torch.testing.assert_close(scorer.score(images, PROMPTS), full, atol=2e-2, rtol=2e-3)


def test_pickscores_scale_is_a_setting(clip_folder: Path, images: np.ndarray) -> None:
    raw = pickscore.load(CPU, str(clip_folder)).score(images, PROMPTS)
    settings: dict[str, Any] = {"reward": ("pickscore",), "reward_models": (f"pickscore={clip_folder}",)}
    for scale, divisor in (("raw", 1), ("flow", 26)):
        (scorer,) = loading.scorers(TrainConfig(**settings, pickscore_scale=scale), CPU)
        torch.testing.assert_close(divisor * scorer.score(images, PROMPTS), raw)
