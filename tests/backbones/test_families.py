"""The members of the FLUX.1 and SD3 families: each is its own stock pipeline, also with a LoRA, and is named in the file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from safetensors import safe_open
from torch import Tensor

from tmpo_trainer import tree
from tmpo_trainer.backbones import load_skeleton
from tmpo_trainer.backbones.base import Backbone
from tmpo_trainer.commands import main
from tmpo_trainer.lora.export import FILE_NAME, export_lora
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.training.loop import Trainer

PROMPTS = ["a red circle", "two blue squares"]
STEPS, TOKENS, GUIDANCE = 4, 12, 3.5
#: {model: (what `inspect` calls it, modelspec's architecture)}
NAMES = {
    "flux-dev": ("FLUX.1-dev", "flux-1-dev"),
    "flux-schnell": ("FLUX.1-schnell", "flux-1-schnell"),
    "kontext": ("FLUX.1-Kontext-dev", "flux-1-dev"),
    "sd35-medium": ("SD3.5-Medium", "stable-diffusion-v3.5-medium"),
    "sd35-large": ("SD3.5-Large", "stable-diffusion-v3.5-large"),
}


@pytest.fixture
def folders(
    tiny_flux: Callable[[bool], Path], tiny_kontext: Path, tiny_sd35: Path, tiny_sd35_large: Path
) -> dict[str, Path]:
    models = tiny_flux(True), tiny_flux(False), tiny_kontext, tiny_sd35, tiny_sd35_large
    return dict(zip(NAMES, models, strict=True))


@torch.no_grad()
def rollout(backbone: Backbone, x: Tensor, size: tuple[int, int]) -> Tensor:
    plan = tree.TreePlan(STEPS, len(x) // len(PROMPTS), {}).forest(len(PROMPTS))
    velocity, sigmas = backbone.velocity(PROMPTS, GUIDANCE), backbone.sigmas(STEPS, *size)
    return tree.rollout(velocity, lambda step, path: x[path[0]], sigmas, plan, kernel="ode").leaves


def sample(pipeline: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
    """By the stock pipeline. Kontext scales any size to an area, by default that of its training."""
    flux = type(pipeline).__name__.startswith("Flux")
    latents = pipeline(
        prompt=PROMPTS * (len(x) // len(PROMPTS)),
        latents=FluxPipeline._pack_latents(x, *x.shape) if flux else x,
        height=size[0],
        width=size[1],
        guidance_scale=GUIDANCE,
        num_inference_steps=STEPS,
        max_sequence_length=TOKENS,
        output_type="latent",
        **({"max_area": size[0] * size[1]} if "Kontext" in type(pipeline).__name__ else {}),
    ).images
    return FluxPipeline._unpack_latents(latents, *size, 8) if flux else latents


@pytest.mark.parametrize("model", NAMES)
def test_a_stock_pipeline_gives_the_trainers_pictures(
    folders: dict[str, Path],
    make_trainer: Callable[..., Trainer],
    shake: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folders[model])
    pipeline.set_progress_bar_config(disable=True)
    trainer = make_trainer(folder=folders[model], max_sequence_length=TOKENS, lora_targets="all-linear")
    x = torch.randn(4, *trainer.backbone.latent_shape(32, 48), generator=torch.Generator().manual_seed(3))
    base = sample(pipeline, x, (32, 48))
    # A new LoRA is zero.
    torch.testing.assert_close(rollout(trainer.backbone, x, (32, 48)), base, atol=1e-4, rtol=0)
    shake(trainer, 0.1)
    expected = rollout(trainer.backbone, x, (32, 48))
    assert (expected - base).abs().max() > 0.02
    assert export_lora(trainer.backbone, tmp_path, {})
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(sample(pipeline, x, (32, 48)), expected, atol=1e-3, rtol=0)
    name, architecture = NAMES[model]
    with safe_open(tmp_path / FILE_NAME, "pt") as file:
        assert file.metadata()["modelspec.architecture"] == f"{architecture}/lora"
    assert main.main(["inspect", str(tmp_path)]) == 0
    assert re.search(rf"^model +{re.escape(name)}$", capsys.readouterr().out, re.M)


def test_sd35_large_has_no_second_attention(folders: dict[str, Path]) -> None:
    names = load_skeleton(str(folders["sd35-large"]), torch.float32, TOKENS).target_shapes("paper")
    # The last block has no text to hand on: its text stream ends at its keys and values.
    assert len(names) == 37 * (8 + 4) + (4 + 2 + 3) and not any("attn2" in name for name in names)


def test_a_file_of_schnell_is_not_one_of_kontext(folders: dict[str, Path]) -> None:
    backbone = load_skeleton(str(folders["kontext"]), torch.float32, TOKENS)
    backbone.check_single_file("--transformer x", ["guidance_in.in_layer.weight"])
    with pytest.raises(ConfigError, match=r"x is from FLUX\.1-schnell, but the model is FLUX\.1-Kontext-dev"):
        backbone.check_single_file("--transformer x", ["img_in.weight"])
