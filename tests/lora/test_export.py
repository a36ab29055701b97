"""The exported LoRA gives the trainer's own pictures in a stock pipeline, and with ComfyUI's reading of the file."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tmpo_trainer import __version__
from tmpo_trainer.backbones import load_backbone
from tmpo_trainer.backbones.base import LoadOptions
from tmpo_trainer.evaluation import held_out
from tmpo_trainer.lora.adapter import attach
from tmpo_trainer.lora.export import FILE_NAME, export_lora
from tmpo_trainer.training.loop import Trainer

ABOUT = {"method": "tmpo", "step": "4", "rewards": "red", "base_model": "local"}
PROMPTS = ["a red circle", "two blue squares"]
STEPS, SEED, GUIDANCE, TOLERANCE = 6, 5, 2.0, 1e-3


@pytest.fixture(params=[16, 4], ids=["alpha-16-rank-4", "alpha-4-rank-4"])
def trained(request: pytest.FixtureRequest, make_trainer: Callable[..., Trainer]) -> Trainer:
    """After four updates: long enough for the averaged weights to differ from both the start and the last ones."""
    trainer = make_trainer(
        lora_rank=4, lora_alpha=request.param, learning_rate=0.05, branching=2, ema_every=2, ema_decay=0.5
    )
    for _ in range(4):
        trainer.update()
    return trainer


def own(trainer: Trainer) -> Tensor:
    """The trainer's latents `[4, ...]` with the weights as they stand."""
    how = held_out.Sampling(STEPS, SEED, GUIDANCE, (32, 32), batch=4)
    return torch.cat([latents.flatten(0, 1) for latents, _ in held_out.sample(trainer.backbone, PROMPTS, 2, how)])


def stock_latents(trainer: Trainer, pipeline: StableDiffusion3Pipeline) -> Tensor:
    """The same by diffusers, from the same noise."""
    from tmpo_trainer.tree import keyed_noise

    shape = trainer.backbone.latent_shape(32, 32)
    noise = [keyed_noise((SEED, "evaluate", prompt), shape)(0, (i,)) for prompt in PROMPTS for i in range(2)]
    return pipeline(
        prompt=[prompt for prompt in PROMPTS for _ in range(2)],
        latents=torch.stack(noise),
        height=32,
        width=32,
        guidance_scale=GUIDANCE,
        num_inference_steps=STEPS,
        max_sequence_length=0,
        output_type="latent",
    ).images


def apart(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def test_a_stock_pipeline_gives_the_trainers_pictures(
    trained: Trainer, load_stock: Callable[[], StableDiffusion3Pipeline], tmp_path: Path
) -> None:
    with trained.weights.averaged():
        expected = own(trained)
        assert export_lora(trained.backbone, tmp_path / "out", ABOUT)
    # As any file that a user makes, whatever safetensors thinks.
    (tmp_path / "plain").touch()
    modes = [
        path.stat().st_mode for path in (tmp_path / "plain", tmp_path / "out" / "pytorch_lora_weights.safetensors")
    ]
    assert modes[0] == modes[1]
    pipeline = load_stock()
    base = stock_latents(trained, pipeline)
    with trained.weights.pretrained():
        assert apart(own(trained), base) < TOLERANCE
    pipeline.load_lora_weights(tmp_path / "out")
    found = stock_latents(trained, pipeline)
    assert apart(found, expected) < TOLERANCE
    pictures = [trained.backbone.decode(latents, 8).astype(int) for latents in (found, expected)]
    assert abs(pictures[0] - pictures[1]).max() <= 1
    # The LoRA does something, and the average is neither the base nor the last weights.
    assert apart(expected, base) > 20 * TOLERANCE
    assert apart(expected, own(trained)) > 20 * TOLERANCE


def test_comfyuis_reading_gives_the_trainers_pictures(
    trained: Trainer, load_stock: Callable[[], StableDiffusion3Pipeline], tmp_path: Path
) -> None:
    """ComfyUI adds B A to each weight with a scale of 1, whatever the metadata says. Any other strength would show."""
    with trained.weights.averaged():
        expected = own(trained)
        export_lora(trained.backbone, tmp_path, ABOUT)
    state = load_file(tmp_path / FILE_NAME)
    modules = {key.rpartition(".lora_")[0] for key in state}
    for strength, same in ((1.0, True), (2.0, False), (0.5, False)):
        pipeline = load_stock()
        parts = dict(pipeline.transformer.named_modules())
        with torch.no_grad():
            for module in modules:
                delta = state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]
                parts[module.removeprefix("transformer.")].weight += strength * delta
        assert (apart(stock_latents(trained, pipeline), expected) < TOLERANCE) == same


def test_a_file_of_twice_the_strength_is_told_apart(
    trained: Trainer, load_stock: Callable[[], StableDiffusion3Pipeline], tmp_path: Path
) -> None:
    with trained.weights.averaged():
        expected = own(trained)
        export_lora(trained.backbone, tmp_path, ABOUT)
    file = tmp_path / FILE_NAME
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({k: v * (2 if ".lora_B." in k else 1) for k, v in load_file(file).items()}, file, metadata)
    pipeline = load_stock()
    pipeline.load_lora_weights(tmp_path)
    assert apart(stock_latents(trained, pipeline), expected) > 10 * TOLERANCE


def test_keys_and_metadata(trained: Trainer, tiny_model: Path, tmp_path: Path) -> None:
    export_lora(trained.backbone, tmp_path, ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    with safe_open(tmp_path / FILE_NAME, "pt") as file:
        keys, metadata = list(file.keys()), file.metadata()
    layer = r"transformer\.transformer_blocks\.\d+\.(attn|ff|ff_context)\.[a-z0-9_.]+\.lora_[AB]\.weight"
    assert len(keys) == len(trained.weights.lora)
    for key in keys:
        assert re.fullmatch(layer, key) and "base_model" not in key and "default" not in key
    adapter = json.loads(metadata["lora_adapter_metadata"])
    # What every version of peft knows: diffusers hands on all that is there.
    assert adapter.keys() == {f"transformer.{name}" for name in ("r", "lora_alpha", "target_modules")}
    assert adapter["transformer.r"] == adapter["transformer.lora_alpha"] == 4
    assert adapter["transformer.target_modules"] == sorted(trained.backbone.lora_targets["paper"])
    assert metadata["modelspec.sai_model_spec"] and metadata["modelspec.title"] == "TMPO LoRA (red)"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v3-medium/lora"
    assert {key: metadata[f"tmpo.{key}"] for key in ABOUT} == ABOUT
    assert metadata["tmpo.version"] == __version__
    everything = json.dumps(metadata)
    for secret in (str(tiny_model), str(tmp_path), str(Path.home()), "/tmp", socket.gethostname(), *trained.prompts):
        assert secret not in everything


def test_a_layer_that_was_left_out_is_not_claimed(
    tiny_flux: Callable[[bool], Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """FLUX's last layer is named like one of each single-stream block: peft would miss it in the file."""
    model = str(tiny_flux(True))
    options = LoadOptions(torch.float32, torch.device("cpu"), 8, prompts=PROMPTS)
    backbone = load_backbone(model, options)
    attach(backbone.transformer, backbone.adapter("all-linear", 2, 2))
    export_lora(backbone, tmp_path, ABOUT)
    with safe_open(tmp_path / FILE_NAME, "pt") as file:
        adapter = json.loads(file.metadata()["lora_adapter_metadata"])
    targets = adapter["transformer.target_modules"]
    assert "single_transformer_blocks.0.proj_out" in targets and not {"proj_out", "to_q"} & {*targets}
    stock = load_backbone(model, options).pipeline
    recwarn.clear()
    stock.load_lora_weights(tmp_path)
    assert not [str(one.message) for one in recwarn if "inconsistency" in str(one.message)]


def test_a_lora_that_is_zero_is_reported(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = make_trainer(learning_rate=0.0, branching=2)
    trainer.update()
    assert export_lora(trainer.backbone, tmp_path, ABOUT) is False
    assert (tmp_path / FILE_NAME).is_file()


def test_exporting_again_replaces_the_file(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = make_trainer(branching=2)
    export_lora(trainer.backbone, tmp_path, ABOUT)
    trainer.update()
    assert export_lora(trainer.backbone, tmp_path, {**ABOUT, "step": "1"}) is True
    with safe_open(tmp_path / FILE_NAME, "pt") as file:
        assert file.metadata()["tmpo.step"] == "1"
