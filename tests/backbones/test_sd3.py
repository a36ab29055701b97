"""The SD3 backbone against diffusers' own pipeline: same sigmas, same velocities, same pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor

from tmpo_trainer import tree
from tmpo_trainer.backbones import load_backbone
from tmpo_trainer.backbones.base import LoadOptions
from tmpo_trainer.backbones.sd3 import SD3Backbone
from tmpo_trainer.backbones.text import BATCH
from tmpo_trainer.settings.config import LoraTargets

PROMPTS = ["a red circle", "two blue squares", "a pink circle and a cyan square"]
IMAGES, STEPS = 2, 6


@pytest.fixture(scope="module")
def stock(load_stock: Callable[[], StableDiffusion3Pipeline]) -> StableDiffusion3Pipeline:
    return load_stock()


@pytest.fixture(scope="module")
def backbone(load: Callable[..., SD3Backbone]) -> SD3Backbone:
    return load()


class Spy:
    """Keeps the keyword arguments of every call of a transformer."""

    def __init__(self, transformer: torch.nn.Module):
        self.calls: list[dict[str, Any]] = []
        self.hook = transformer.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.calls.append(kwargs)

    def __enter__(self) -> Spy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.hook.remove()


def starts(backbone: SD3Backbone, size: tuple[int, int], count: int = IMAGES * len(PROMPTS)) -> Tensor:
    return torch.randn(count, *backbone.latent_shape(*size), generator=torch.Generator().manual_seed(3))


def rollout(backbone: SD3Backbone, x: Tensor, size: tuple[int, int], guidance: float, steps: int = STEPS) -> Tensor:
    plan = tree.TreePlan(steps, len(x) // len(PROMPTS), {}).forest(len(PROMPTS))
    velocity, sigmas = backbone.velocity(PROMPTS, guidance), backbone.sigmas(steps, *size)
    return tree.rollout(velocity, lambda step, path: x[path[0]], sigmas, plan, kernel="ode").leaves


def sample(pipeline: StableDiffusion3Pipeline, x: Tensor, size: tuple[int, int], guidance: float, **more: Any) -> Any:
    return pipeline(
        prompt=PROMPTS * (len(x) // len(PROMPTS)),
        latents=x,
        height=size[0],
        width=size[1],
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        **more,
    ).images


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (16, 64)], ids=str)
@pytest.mark.parametrize("tokens", [0, 8])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_rollout_without_noise_is_the_pipeline(
    load: Callable[..., SD3Backbone],
    stock: StableDiffusion3Pipeline,
    guidance: float,
    tokens: int,
    size: tuple[int, int],
) -> None:
    backbone = load(tokens)
    x = starts(backbone, size)
    expected = sample(stock, x, size, guidance, max_sequence_length=tokens, output_type="latent")
    torch.testing.assert_close(rollout(backbone, x, size, guidance), expected, atol=1e-4, rtol=0)
    # Not because nothing happens: the prompts tell the rows apart and the latents move.
    assert (expected - x).std() > 0.1
    swapped = rollout(backbone, x.roll(1, 0), size, guidance).roll(-1, 0)
    assert (swapped - expected).abs().max() > 1e-2


def test_max_sequence_length_reaches_the_transformer(load: Callable[..., SD3Backbone]) -> None:
    lengths = []
    for tokens in (0, 8):
        backbone = load(tokens)
        with Spy(backbone.transformer) as spy, torch.no_grad():
            backbone.velocity(PROMPTS, 1.0)(starts(backbone, (32, 32)), torch.full((6,), 0.5))
        lengths.append(spy.calls[0]["encoder_hidden_states"].shape[1])
    assert lengths[1] - lengths[0] == 8


def test_decode_is_the_pipelines(backbone: SD3Backbone, stock: StableDiffusion3Pipeline) -> None:
    x = starts(backbone, (32, 48))
    pictures = sample(stock, x, (32, 48), 1.0, max_sequence_length=0, output_type="pil")
    expected = np.stack([np.asarray(picture) for picture in pictures])
    latents = sample(stock, x, (32, 48), 1.0, max_sequence_length=0, output_type="latent")
    for batch in (64, 4):
        decoded = backbone.decode(latents, batch)
        assert decoded.dtype == np.uint8 and decoded.shape == (6, 32, 48, 3)
        assert np.abs(decoded.astype(int) - expected.astype(int)).max() <= 1
    assert expected.std() > 10


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_timesteps_run_to_1000(backbone: SD3Backbone, guidance: float) -> None:
    with Spy(backbone.transformer) as spy:
        rollout(backbone, starts(backbone, (32, 32)), (32, 32), guidance)
    rows = 6 if guidance == 1 else 12
    sigmas = backbone.sigmas(STEPS, 32, 32)
    assert len(spy.calls) == STEPS
    for call, sigma in zip(spy.calls, sigmas, strict=False):
        torch.testing.assert_close(call["timestep"], torch.full((rows,), 1000 * sigma.item()))
    assert spy.calls[0]["timestep"][0] == 1000


def test_unconditional_half_is_the_empty_prompt(backbone: SD3Backbone, stock: StableDiffusion3Pipeline) -> None:
    with Spy(backbone.transformer) as spy, torch.no_grad():
        backbone.velocity(PROMPTS, 3.5)(starts(backbone, (32, 32)), torch.full((6,), 0.5))
    (call,) = spy.calls
    for prompts, half in ((["" for _ in range(6)], slice(0, 6)), (PROMPTS * 2, slice(6, 12))):
        tokens, _, pooled, _ = stock.encode_prompt(
            prompts, prompts, prompts, max_sequence_length=0, do_classifier_free_guidance=False
        )
        torch.testing.assert_close(call["pooled_projections"][half], pooled)
        torch.testing.assert_close(call["encoder_hidden_states"][half], tokens)
    difference = call["pooled_projections"][:6] - call["pooled_projections"][6:]
    assert difference.abs().amax(1).min() > 1e-3
    torch.testing.assert_close(call["hidden_states"][:6], call["hidden_states"][6:])


def test_each_prompt_is_encoded_once(load: Callable[..., SD3Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load()
    calls: list[list[str]] = []
    original = backbone.pipeline.encode_prompt

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["prompt"])
        return original(*args, **kwargs)

    monkeypatch.setattr(backbone.pipeline, "encode_prompt", spy)
    for _ in range(2):
        rollout(backbone, starts(backbone, (32, 32)), (32, 32), 3.5, steps=2)
    backbone.velocity([PROMPTS[1], PROMPTS[1], "a green circle"], 1.0)
    # Filled up to one size, whatever is missing.
    assert all(len(call) == BATCH for call in calls)
    assert sorted(prompt for call in calls for prompt in set(call)) == sorted([*PROMPTS, "", "a green circle"])
    again = backbone.encode([PROMPTS[2], PROMPTS[0]])
    alone = load().encode([PROMPTS[0]])
    torch.testing.assert_close(again[1], alone[0])


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_row_r_is_of_prompt_r_modulo_p(backbone: SD3Backbone, guidance: float) -> None:
    x, sigma = starts(backbone, (32, 32)), torch.linspace(0.2, 0.9, 6)
    with torch.no_grad():
        together = backbone.velocity(PROMPTS, guidance)(x, sigma)
        for row in range(6):
            alone = backbone.velocity([PROMPTS[row % 3]], guidance)(x[row : row + 1], sigma[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
            other = backbone.velocity([PROMPTS[(row + 1) % 3]], guidance)(x[row : row + 1], sigma[row : row + 1])
            assert (other - alone).abs().max() > 1e-2
        with pytest.raises(ValueError, match="5 rows do not divide into 3 prompts"):
            backbone.velocity(PROMPTS, guidance)(x[:5], sigma[:5])


@pytest.mark.parametrize("steps", [6, 10])
def test_sigmas_are_the_schedulers(backbone: SD3Backbone, stock: StableDiffusion3Pipeline, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(stock.scheduler.config)
    scheduler.set_timesteps(steps)
    assert backbone.sigmas(steps, 64, 64).tolist() == scheduler.sigmas.tolist()
    if steps == 6:
        expected = [1, 0.923, 0.819, 0.668, 0.432, 0.0089, 0]
        assert backbone.sigmas(steps, 64, 64).tolist() == pytest.approx(expected, abs=5e-4)


def test_sigmas_with_dynamic_shifting(
    load: Callable[..., SD3Backbone], load_stock: Callable[[], StableDiffusion3Pipeline]
) -> None:
    """Schedulers whose shift depends on the picture's size."""
    backbone, stock = load(), load_stock()
    seen = []
    for size in ((32, 32), (128, 128)):
        for pipeline in (backbone.pipeline, stock):
            pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4)
        x = starts(backbone, size, 3)
        expected = sample(stock, x, size, 1.0, max_sequence_length=0, output_type="latent")
        assert backbone.sigmas(STEPS, *size).tolist() == stock.scheduler.sigmas.tolist()
        torch.testing.assert_close(rollout(backbone, x, size, 1.0), expected, atol=1e-4, rtol=0)
        seen.append(backbone.sigmas(STEPS, *size).tolist())
    assert seen[0] != seen[1]


def test_latent_shape(backbone: SD3Backbone) -> None:
    assert backbone.latent_shape(32, 48) == (16, 4, 6)
    for size in ((40, 32), (32, 40)):
        with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} must be a multiple of 16"):
            backbone.latent_shape(*size)


@pytest.mark.parametrize("which", get_args(LoraTargets))
def test_every_lora_target_exists(backbone: SD3Backbone, which: LoraTargets) -> None:
    """Both streams of every block, attention and feed-forward; the last block has no text feed-forward."""
    linear = [name for name, part in backbone.transformer.named_modules() if isinstance(part, torch.nn.Linear)]
    matched = {name for name in linear if any(name.endswith(f".{target}") for target in backbone.lora_targets[which])}
    blocks = {name for name in linear if name.startswith("transformer_blocks.") and ".norm1" not in name}
    text = {name for name in blocks if ".attn.add_" in name or ".to_add_out" in name or ".ff_context." in name}
    some = {"attention": {name for name in blocks if ".attn" in name}, "text": text}
    assert matched == some.get(which, blocks)
    assert text
    assert any(".ff" in name for name in blocks)


@pytest.mark.parametrize("size", [(32, 32), (32, 64)], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_sd35_without_noise_is_the_pipeline(
    tiny_sd35: Path, tmp_path: Path, size: tuple[int, int], guidance: float
) -> None:
    options = LoadOptions(torch.float32, torch.device("cpu"), 12, prompts=PROMPTS, text_cache=tmp_path)
    backbone = load_backbone(str(tiny_sd35), options)
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_sd35)
    stock.set_progress_bar_config(disable=True)
    x = torch.randn(6, *backbone.latent_shape(*size), generator=torch.Generator().manual_seed(3))
    plan = tree.TreePlan(STEPS, 2, {}).forest(3)
    velocity, sigmas = backbone.velocity(PROMPTS, guidance), backbone.sigmas(STEPS, *size)
    ours = tree.rollout(velocity, lambda step, path: x[path[0]], sigmas, plan, kernel="ode").leaves
    theirs: Any = stock(
        prompt=PROMPTS * 2,
        latents=x,
        height=size[0],
        width=size[1],
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        max_sequence_length=12,
        output_type="latent",
    )
    torch.testing.assert_close(ours, theirs.images, atol=1e-4, rtol=1e-4)
    assert (ours - x).abs().mean() > 0.1
