"""The Qwen-Image backbone against diffusers' own `QwenImagePipeline` with random weights."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from torch import Tensor

from tmpo_trainer import tree
from tmpo_trainer.backbones import base, check_model, check_text_cache, load_backbone, load_skeleton
from tmpo_trainer.backbones.base import Backbone, LoadOptions
from tmpo_trainer.lora.export import export_lora
from tmpo_trainer.settings.config import LoraTargets
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.training.loop import Trainer

#: 8, 17 and more tokens with the template's end, of which TOKENS are kept.
PROMPTS = ["a red circle", "two blue squares", "the quick brown fox and the dog"]
STEPS, TOKENS = 6, 20


@pytest.fixture(scope="module")
def backbone(tiny_qwen: Path) -> Backbone:
    return load_backbone(str(tiny_qwen), LoadOptions(torch.float32, torch.device("cpu"), TOKENS))


@pytest.fixture(scope="module")
def stock(tiny_qwen: Path) -> QwenImagePipeline:
    pipeline = QwenImagePipeline.from_pretrained(tiny_qwen)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def starts(backbone: Backbone, size: tuple[int, int], count: int = 6) -> Tensor:
    return torch.randn(count, *backbone.latent_shape(*size), generator=torch.Generator().manual_seed(3))


def rollout(backbone: Backbone, x: Tensor, size: tuple[int, int], guidance: float) -> Tensor:
    plan = tree.TreePlan(STEPS, len(x) // len(PROMPTS), {}).forest(len(PROMPTS))
    velocity, sigmas = backbone.velocity(PROMPTS, guidance), backbone.sigmas(STEPS, *size)
    return tree.rollout(velocity, lambda step, path: x[path[0]], sigmas, plan, kernel="ode").leaves


def sample(pipeline: QwenImagePipeline, x: Tensor, size: tuple[int, int], guidance: float, output: str) -> Any:
    result: Any = pipeline(
        prompt=PROMPTS * (len(x) // len(PROMPTS)),
        negative_prompt=[" "] * len(x),
        latents=QwenImagePipeline._pack_latents(x, *x.shape),
        height=size[0],
        width=size[1],
        true_cfg_scale=guidance,
        num_inference_steps=STEPS,
        max_sequence_length=TOKENS,
        output_type=output,
    )
    return result.images


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (16, 64)], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_rollout_without_noise_is_the_pipeline(
    backbone: Backbone, stock: QwenImagePipeline, size: tuple[int, int], guidance: float
) -> None:
    x = starts(backbone, size)
    expected = QwenImagePipeline._unpack_latents(sample(stock, x, size, guidance, "latent"), *size, 8)[:, :, 0]
    actual = rollout(backbone, x, size, guidance)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert backbone.sigmas(STEPS, *size).tolist() == stock.scheduler.sigmas.tolist()
    # Not because nothing happens: the prompts tell the rows apart, the latents move, guidance is heard.
    assert (expected - x).std() > 0.1
    assert (rollout(backbone, x.roll(1, 0), size, guidance).roll(-1, 0) - expected).abs().max() > 1e-2
    assert (rollout(backbone, x, size, guidance + 1) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("split", [False, True])
def test_prompts_of_different_lengths_together_are_those_alone(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, guidance: float, split: bool
) -> None:
    lengths = [len(features["tokens"]) for features in backbone.encode([*PROMPTS, ""])]
    assert lengths == [8, 17, TOKENS, 6]
    monkeypatch.setattr(backbone, "split_guidance", split)
    x, sigma = starts(backbone, (32, 48)), torch.linspace(0.2, 0.9, 6)
    calls: list[int] = []
    hook = backbone.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    with torch.no_grad():
        together = backbone.velocity(PROMPTS, guidance)(x, sigma)
        hook.remove()
        for row in range(6):
            alone = backbone.velocity([PROMPTS[row % 3]], guidance)(x[row : row + 1], sigma[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="5 rows do not divide into 3 prompts"):
            backbone.velocity(PROMPTS, guidance)(x[:5], sigma[:5])
    assert calls == ([6] if guidance == 1 else [6, 6] if split else [12])


def test_decode_is_the_pipelines(backbone: Backbone, stock: QwenImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    x = starts(backbone, (32, 48))
    expected = np.stack([np.asarray(picture) for picture in sample(stock, x, (32, 48), 3.5, "pil")])
    latents = rollout(backbone, x, (32, 48), 3.5)
    decoded = backbone.decode(latents, 4)
    assert np.abs(decoded.astype(int) - expected.astype(int)).max() <= 1
    # Two threads decode one latent each.
    monkeypatch.setattr(base, "CACHED", latents[0].numel())
    torch.set_num_threads(2)
    try:
        assert np.abs(backbone.decode(latents, 2).astype(int) - decoded.astype(int)).max() <= 1
    finally:
        torch.set_num_threads(1)
    assert expected.shape == (6, 32, 48, 3) and expected.std() > 10


def test_sigmas_at_1328(backbone: Backbone) -> None:
    """Between the shifts of the scheduler's config, with its last sigma but one at 0.02."""
    sigmas = backbone.sigmas(4, 1328, 1328)
    mu = 0.5 + 0.4 * (83 * 83 - 256) / (8192 - 256)
    shifted = [np.exp(mu) / (np.exp(mu) + 1 / t - 1) for t in (1, 0.75, 0.5, 0.25)]
    stretch = (1 - shifted[-1]) / 0.98
    assert sigmas.tolist() == pytest.approx([1 - (1 - t) / stretch for t in shifted] + [0], abs=1e-5)


@pytest.mark.parametrize("which", get_args(LoraTargets))
def test_lora_targets(tiny_qwen: Path, make_trainer: Callable[..., Trainer], which: LoraTargets) -> None:
    """Both streams of every block, but not what only the last block's text would show; all have a gradient."""
    shapes = load_skeleton(str(tiny_qwen), torch.float32, TOKENS).target_shapes(which)
    trainer = make_trainer(folder=tiny_qwen, max_sequence_length=TOKENS, lora_targets=which, guidance=3.5)
    parts = trainer.backbone.transformer.named_modules()
    linear = {
        n.removesuffix(".base_layer") for n, part in parts if isinstance(part, torch.nn.Linear) and "lora_" not in n
    }
    last = [f"transformer_blocks.1.{n}" for n in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.")]
    blocks = {n for n in linear if n.startswith("transformer_blocks.") and "_mod." not in n}
    blocks = {n for n in blocks if not n.startswith(tuple(last))}
    text = {n for n in blocks if ".attn.add_" in n or ".to_add_out" in n or ".txt_mlp." in n}
    assert len(blocks) == 2 * 12 - 4 and len(text) == 2 * 6 - 4
    some = {"attention": {n for n in blocks if ".attn." in n}, "text": text}
    found = {name.split(".lora_")[0] for name in trainer.weights.lora}
    assert found == some.get(which, blocks) == shapes.keys()
    before = {name: value.detach().clone() for name, value in trainer.weights.lora.items()}
    metrics = trainer.update()
    assert metrics["replay_ratio_error"] < 1e-4
    changed = {n.split(".lora_")[0] for n, value in trainer.weights.lora.items() if (value != before[n]).any()}
    assert changed == found


@torch.no_grad()
def test_diffusers_draws_the_trainers_pictures_with_the_exported_lora(tiny_qwen: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(tiny_qwen), LoadOptions(torch.float32, torch.device("cpu"), TOKENS))
    backbone.transformer.add_adapter(backbone.adapter("all-linear", 4, 8))
    for name, value in backbone.transformer.named_parameters():
        if "lora_B" in name:
            value.normal_(std=0.1)
    assert export_lora(backbone, tmp_path, {})
    stock: Any = QwenImagePipeline.from_pretrained(tiny_qwen)
    stock.set_progress_bar_config(disable=True)
    x, size = starts(backbone, (32, 48)), (32, 48)
    without = sample(stock, x, size, 3.5, "latent")
    with warnings.catch_warnings():
        # peft warns where the layers of the file and those in its metadata differ.
        warnings.filterwarnings("error", message=".*(exclude_modules|inconsistency)")
        stock.load_lora_weights(tmp_path)
    expected = sample(stock, x, size, 3.5, "latent")
    actual = QwenImagePipeline._pack_latents(rollout(backbone, x, size, 3.5), *x.shape)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)
    assert (expected - without).abs().max() > 0.1


def test_the_text_encoder_is_freed(tiny_qwen: Path, tmp_path: Path, backbone: Backbone) -> None:
    options = LoadOptions(torch.float32, torch.device("cpu"), TOKENS, prompts=PROMPTS[:2], text_cache=tmp_path)
    freed = load_backbone(str(tiny_qwen), options)
    assert freed.pipeline.text_encoder is None and len(list(tmp_path.iterdir())) == 3
    pairs = zip(freed.encode([PROMPTS[1], ""]), backbone.encode([PROMPTS[1], ""]), strict=True)
    assert all(torch.equal(mine["tokens"], kept["tokens"]) for mine, kept in pairs)


def test_room_for_features_of_any_length_is_not_asked_for_in_advance(
    tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are at most as long as the limit, and mostly much shorter."""
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    options = LoadOptions(torch.float32, torch.device("cpu"), TOKENS, prompts=PROMPTS[:2], text_cache=tmp_path)
    assert check_text_cache(str(tiny_qwen), load_skeleton(str(tiny_qwen), torch.float32, TOKENS), options) == 3


def changed(folder: Path, tmp_path: Path, part: str, **changes: Any) -> str:
    """A copy of a model with other values in a part's config."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return str(copy)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vae", {"_class_name": "AutoencoderKLWan"}, "describes AutoencoderKLWan, not AutoencoderKLQwenImage"),
        ("vae", {"z_dim": 48}, "its VAE makes 48 channels, its transformer takes 16"),
        ("vae", {"latents_std": [1.0] * 15}, "vae/config.json needs 16 numbers in latents_mean"),
        ("vae", {"latents_std": [None] * 16}, "vae/config.json needs 16 numbers in latents_mean"),
        ("vae", {"latents_std": None}, "vae/config.json needs 16 numbers in latents_mean"),
        ("vae", {"input_channels": 4}, r"it makes \[1, 4, 64, 64\] of a picture of 64 x 64"),
        ("vae", {"dim_mult": "1244"}, 'dim_mult "1244" is not possible'),
        ("transformer", {"guidance_embeds": True}, "guidance_embeds is true"),
        ("transformer", {"joint_attention_dim": 48}, "transformer: txt_in.weight is"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_weights_load(
    tiny_qwen: Path, tmp_path: Path, part: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_model(changed(tiny_qwen, tmp_path, part, **changes))
    assert "\n" not in str(caught.value)


def test_a_model_without_its_text_encoder_is_refused(tiny_qwen: Path, tmp_path: Path) -> None:
    copy = Path(changed(tiny_qwen, tmp_path, "vae"))
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(ConfigError, match="has no folder text_encoder/"):
        load_skeleton(str(copy), torch.float32, TOKENS)
    with pytest.raises(ConfigError, match="--max-sequence-length 0: Qwen-Image needs at least one token"):
        load_skeleton(str(tiny_qwen), torch.float32, 0)


def test_latent_shape(backbone: Backbone) -> None:
    assert backbone.latent_shape(32, 48) == (16, 4, 6)
    for size in ((40, 32), (32, 40), (0, 32)):
        with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} must be a multiple of 16"):
            backbone.latent_shape(*size)
