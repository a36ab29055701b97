"""The FLUX backbone against diffusers' own `FluxPipeline` with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file
from torch import Tensor

from tmpo_trainer import tree
from tmpo_trainer.backbones import load_backbone
from tmpo_trainer.backbones.base import Backbone, LoadOptions
from tmpo_trainer.backbones.flux import FluxBackbone, image_ids, pack, unpack
from tmpo_trainer.settings.config import LoraTargets
from tmpo_trainer.training.loop import Trainer

PROMPTS = ["a red circle", "two blue squares"]
STEPS, TOKENS = 6, 12


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def folder(request: pytest.FixtureRequest, tiny_flux: Callable[[bool], Path]) -> Path:
    """A tiny FLUX: with guidance input and shifted sigmas as FLUX.1-dev, without as FLUX.1-schnell."""
    return tiny_flux(request.param)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load_backbone(str(folder), LoadOptions(torch.float32, torch.device("cpu"), TOKENS))


@pytest.fixture(scope="module")
def stock(folder: Path) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def starts(backbone: Backbone, size: tuple[int, int], count: int = 4) -> Tensor:
    return torch.randn(count, *backbone.latent_shape(*size), generator=torch.Generator().manual_seed(3))


def rollout(backbone: Backbone, x: Tensor, size: tuple[int, int], guidance: float) -> Tensor:
    plan = tree.TreePlan(STEPS, len(x) // len(PROMPTS), {}).forest(len(PROMPTS))
    velocity, sigmas = backbone.velocity(PROMPTS, guidance), backbone.sigmas(STEPS, *size)
    return tree.rollout(velocity, lambda step, path: x[path[0]], sigmas, plan, kernel="ode").leaves


def sample(pipeline: FluxPipeline, x: Tensor, size: tuple[int, int], guidance: float, output: str) -> Any:
    result: Any = pipeline(
        prompt=PROMPTS * (len(x) // len(PROMPTS)),
        latents=FluxPipeline._pack_latents(x, *x.shape),
        height=size[0],
        width=size[1],
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        max_sequence_length=TOKENS,
        output_type=output,
    )
    return result.images


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (16, 64)], ids=str)
def test_rollout_without_noise_is_the_pipeline(backbone: Backbone, stock: FluxPipeline, size: tuple[int, int]) -> None:
    x = starts(backbone, size)
    expected = FluxPipeline._unpack_latents(sample(stock, x, size, 3.5, "latent"), *size, 8)
    actual = rollout(backbone, x, size, 3.5)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    # Not because nothing happens: the prompts tell the rows apart, the latents move, guidance is heard where there is any.
    assert (expected - x).std() > 0.1
    assert (rollout(backbone, x.roll(1, 0), size, 3.5).roll(-1, 0) - expected).abs().max() > 1e-2
    heard = (rollout(backbone, x, size, 1.0) - actual).abs().max() > 1e-3
    assert heard == backbone.transformer.config.guidance_embeds


def test_decode_is_the_pipelines(backbone: Backbone, stock: FluxPipeline) -> None:
    x = starts(backbone, (32, 48))
    expected = np.stack([np.asarray(picture) for picture in sample(stock, x, (32, 48), 3.5, "pil")])
    decoded = backbone.decode(rollout(backbone, x, (32, 48), 3.5), 3)
    assert decoded.shape == expected.shape == (4, 32, 48, 3)
    assert np.abs(decoded.astype(int) - expected.astype(int)).max() <= 1
    assert expected.std() > 10


def test_sigmas_of_flux_dev_at_512(backbone: Backbone) -> None:
    if backbone.transformer.config.guidance_embeds:
        expected = [1, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0]
        assert backbone.sigmas(6, 512, 512).tolist() == pytest.approx(expected, abs=5e-5)
    else:
        assert backbone.sigmas(6, 512, 512).tolist() == pytest.approx([1 - i / 6 for i in range(7)])


def test_packing_is_the_pipelines() -> None:
    x = torch.randn(2, 16, 6, 4)
    packed = FluxPipeline._pack_latents(x, *x.shape)
    assert torch.equal(pack(x), packed)
    assert torch.equal(unpack(packed, 3, 2), x)
    ids = FluxPipeline._prepare_latent_image_ids(1, 3, 2, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(3, 2), ids)


def test_latent_shape(backbone: Backbone) -> None:
    assert backbone.latent_shape(32, 48) == (16, 4, 6)
    for size in ((40, 32), (32, 40), (0, 32)):
        with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} must be a multiple of 16"):
            backbone.latent_shape(*size)


@pytest.mark.parametrize("which", get_args(LoraTargets))
def test_lora_targets(folder: Path, make_trainer: Callable[..., Trainer], which: LoraTargets) -> None:
    """What gets a LoRA: in the joint blocks all but modulation, in the single ones q, k, v or all but modulation."""
    trainer = make_trainer(folder=folder, max_sequence_length=TOKENS, lora_targets=which)
    parts = trainer.backbone.transformer.named_modules()
    linear = {
        n.removesuffix(".base_layer") for n, part in parts if isinstance(part, torch.nn.Linear) and "lora_" not in n
    }
    found = {name.split(".lora_")[0] for name in trainer.weights.lora}
    attention = {name for name in linear if ".attn." in name}
    double = {name for name in linear if name.startswith("transformer_blocks.") and ".norm1" not in name}
    single = {name for name in linear if name.startswith("single_transformer_blocks.") and ".norm." not in name}
    assert len(attention) == 2 * 8 + 2 * 3 and len(single) == 2 * 5
    text = {name for name in double if ".attn.add_" in name or ".to_add_out" in name or ".ff_context." in name}
    expected = {"attention": attention, "text": text, "paper": attention | double, "all-linear": double | single}
    assert found == expected[which]


def test_an_update_trains_and_replays_exactly(folder: Path, make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(folder=folder, max_sequence_length=TOKENS, guidance=3.5)
    before = {name: value.detach().clone() for name, value in trainer.weights.lora.items()}
    metrics = trainer.update()
    assert metrics["replay_ratio_error"] < 1e-4
    assert metrics["evaluations/rollout"] == 96 and metrics["evaluations/replay"] == 12
    assert any((value - before[name]).abs().max() > 0 for name, value in trainer.weights.lora.items())


def test_names_of_newer_comfyui_become_the_original_ones(tmp_path: Path) -> None:
    """End to end in tests/comfy, with ComfyUI's own file of FLUX."""
    file = tmp_path / "flux.safetensors"
    names = ["double_blocks.0.img_attn.norm.query_norm", "single_blocks.0.norm.key_norm"]
    written = {f"{name}.weight": torch.full((2,), float(i)) for i, name in enumerate(names)}
    save_file({**written, "final_layer.linear.weight": torch.ones(2, 2)}, file)
    found = FluxBackbone.single_file(file)
    assert isinstance(found, dict)
    assert found.keys() == {f"{names[0]}.scale", f"{names[1]}.scale", "final_layer.linear.weight"}
    assert found[f"{names[1]}.scale"].tolist() == [1, 1]
    save_file({f"{name}.scale": torch.ones(2) for name in names}, file)
    assert FluxBackbone.single_file(file) == str(file)


def test_positions_are_made_once_per_size(backbone: Backbone) -> None:
    seen: list[Tensor] = []

    def watch(module: Any, arguments: Any, options: Any) -> None:
        seen.append(options["img_ids"])

    velocity = backbone.velocity(PROMPTS, 3.5)
    hook = backbone.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    with torch.no_grad():
        for rows, size in ((2, (32, 32)), (4, (32, 32)), (2, (16, 64)), (2, (32, 32))):
            velocity(starts(backbone, size, rows), torch.full((rows,), 0.7))
    hook.remove()
    assert seen[0] is seen[1] is seen[3]
    assert [ids[-1].tolist() for ids in seen] == [[0, 1, 1], [0, 1, 1], [0, 0, 3], [0, 1, 1]]
