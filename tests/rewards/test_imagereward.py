"""ImageReward against its definition, on tiny random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tmpo_trainer.rewards import imagereward
from tmpo_trainer.settings.errors import ConfigError

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a red circle", "a green triangle"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + (1 - mask[:, None, None].float()) * -1e9
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def original_forward(w: dict[str, Tensor], pixels: Tensor, tokens: Tensor, mask: Tensor, heads: int) -> Tensor:
    """ImageReward from its definition, over a checkpoint in the original names."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    v = "blip.visual_encoder"
    patch = w[f"{v}.patch_embed.proj.weight"]
    x = F.conv2d(pixels, patch, w[f"{v}.patch_embed.proj.bias"], stride=patch.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([w[f"{v}.cls_token"].expand(len(x), -1, -1), x], 1) + w[f"{v}.pos_embed"]
    for i in range(2):
        b = f"{v}.blocks.{i}"
        x = x + linear(
            attend(*linear(norm(x, f"{b}.norm1", 1e-6), f"{b}.attn.qkv").chunk(3, -1), heads), f"{b}.attn.proj"
        )
        x = x + linear(F.gelu(linear(norm(x, f"{b}.norm2", 1e-6), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
    seen = norm(x, f"{v}.norm", 1e-6)
    t = "blip.text_encoder"
    y = (
        w[f"{t}.embeddings.word_embeddings.weight"][tokens]
        + w[f"{t}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    )
    y = norm(y, f"{t}.embeddings.LayerNorm", 1e-12)
    for i in range(2):
        b = f"{t}.encoder.layer.{i}"
        for kind, source, m in (("attention", None, mask), ("crossattention", seen, None)):
            s = y if source is None else source
            q, k, v = (
                linear(y, f"{b}.{kind}.self.query"),
                linear(s, f"{b}.{kind}.self.key"),
                linear(s, f"{b}.{kind}.self.value"),
            )
            got = attend(q, k, v, heads, m)
            y = norm(linear(got, f"{b}.{kind}.output.dense") + y, f"{b}.{kind}.output.LayerNorm", 1e-12)
        inner = F.gelu(linear(y, f"{b}.intermediate.dense"))
        y = norm(linear(inner, f"{b}.output.dense") + y, f"{b}.output.LayerNorm", 1e-12)
    z = y[:, 0]
    for i in (0, 2, 4, 6, 7):
        z = linear(z, f"mlp.layers.{i}")
    return (z.squeeze(-1) - 0.16717362830052426) / 1.0333394966054072


def original_names(network: imagereward.ImageReward) -> dict[str, Tensor]:
    """A checkpoint as the authors name it, from ours."""
    back = {ours: theirs for theirs, ours in imagereward.VISION.items()}
    found: dict[str, Tensor] = {"blip.text_encoder.embeddings.position_ids": torch.arange(64)[None]}
    for key, value in network.state_dict().items():
        part, _, name = key.partition(".")
        if part == "vision":
            name = name.replace("post_layernorm", "norm")
            for ours, theirs in back.items():
                name = name.replace(ours, theirs)
        prefix = {"vision": "blip.visual_encoder.", "text": "blip.text_encoder.", "head": "mlp.layers."}[part]
        found[prefix + name] = value
    return found


@torch.no_grad()
def test_imagereward_is_its_definition(
    network: imagereward.ImageReward, bert: Any, images: np.ndarray, prepared: Any
) -> None:
    scorer = imagereward.ImageRewardScorer(network, bert, CPU)
    scores = scorer.score(images, PROMPTS)
    text = bert(PROMPTS, padding="max_length", max_length=35, truncation=True, return_tensors="pt")
    assert text["input_ids"].shape == (4, 35)
    expected = original_forward(
        original_names(network), prepared(images, 32), text["input_ids"], text["attention_mask"], heads=2
    )
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    assert scores.std() > 1e-3
    alone = torch.cat([scorer.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, scores, atol=1e-5, rtol=1e-5)


def test_imagereward_key_map_is_complete(network: imagereward.ImageReward) -> None:
    mapped = imagereward.from_original(original_names(network))
    own = network.state_dict()
    assert mapped.keys() == own.keys() and all(torch.equal(mapped[key], own[key]) for key in own)


def test_a_tokenizer_without_vocabulary_is_refused(tmp_path: Path) -> None:
    save_file({"blip.text_encoder.x": torch.zeros(1)}, tmp_path / "ImageReward.safetensors")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"reward imagereward: the tokenizer in .* knows 0 words"):
        imagereward.load(CPU, str(tmp_path / "ImageReward.safetensors"))
