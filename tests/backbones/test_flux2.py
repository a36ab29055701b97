"""The FLUX.2 backbone against diffusers' own pipelines with random weights."""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from tmpo_trainer import tree
from tmpo_trainer.backbones import check_model, load_backbone, load_skeleton
from tmpo_trainer.backbones.base import Backbone, LoadOptions
from tmpo_trainer.backbones.flux2 import PIPELINES
from tmpo_trainer.commands import loading, main
from tmpo_trainer.lora import adapter, layers
from tmpo_trainer.lora.export import FILE_NAME, export_lora
from tmpo_trainer.settings.config import LoraTargets
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.training.loop import Trainer

PROMPTS = ["a red circle", "two blue squares"]
STEPS, TOKENS, CPU = 6, 20, torch.device("cpu")


@pytest.fixture(scope="module", params=["dev", "base", "distilled"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tiny_flux2: Callable[[str], Path]) -> Path:
    return tiny_flux2(kind)


def load_stock(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    return load_stock(folder)


@pytest.fixture(scope="module")
def backbone(stock: Any) -> Backbone:
    return PIPELINES[type(stock).__name__](stock, TOKENS)


def starts(backbone: Backbone, size: tuple[int, int], count: int = 4) -> Tensor:
    return torch.randn(count, *backbone.latent_shape(*size), generator=torch.Generator().manual_seed(3))


def rollout(
    backbone: Backbone, x: Tensor, size: tuple[int, int], guidance: float, prompts: list[str] = PROMPTS
) -> Tensor:
    plan = tree.TreePlan(STEPS, len(x) // len(prompts), {}).forest(len(prompts))
    velocity, sigmas = backbone.velocity(prompts, guidance), backbone.sigmas(STEPS, *size)
    return tree.rollout(velocity, lambda step, path: x[path[0]], sigmas, plan, kernel="ode").leaves


def sample(pipeline: Any, x: Tensor, size: tuple[int, int], guidance: float, output: str = "latent") -> Any:
    return pipeline(
        prompt=PROMPTS * (len(x) // len(PROMPTS)),
        latents=x,
        height=size[0],
        width=size[1],
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        max_sequence_length=TOKENS,
        output_type=output,
    ).images


def as_stock(backbone: Backbone, latents: Tensor) -> Tensor:
    """Our latents as the pipeline returns its own: [dev] leaves them packed, [klein] takes them apart for the VAE."""
    dev = backbone.pipeline_class is Flux2Pipeline
    return latents.flatten(2).transpose(1, 2) if dev else backbone.unscale(latents)


@pytest.mark.parametrize("guidance", [3.5, 1.0])
@pytest.mark.parametrize("size", [(32, 32), (48, 32), (16, 64)], ids=str)
def test_rollout_without_noise_is_the_pipeline(
    kind: str, backbone: Backbone, stock: Any, size: tuple[int, int], guidance: float
) -> None:
    x = starts(backbone, size)
    latents = rollout(backbone, x, size, guidance)
    expected = sample(stock, x, size, guidance)
    torch.testing.assert_close(as_stock(backbone, latents), expected, atol=1e-4, rtol=0)
    # Not because nothing happens: the prompts tell the rows apart, the latents move, guidance is heard where there is any.
    assert (latents - x).std() > 0.1
    assert (rollout(backbone, x.roll(1, 0), size, guidance).roll(-1, 0) - latents).abs().max() > 1e-2
    heard = (rollout(backbone, x, size, 2.0) - latents).abs().max() > 1e-3
    assert heard == (kind != "distilled")


def test_prompts_of_different_lengths_in_a_batch_are_as_one_by_one(backbone: Backbone) -> None:
    x, size = starts(backbone, (32, 32), 2), (32, 32)
    together = rollout(backbone, x, size, 3.5)
    alone = [rollout(backbone, x[i : i + 1], size, 3.5, [prompt]) for i, prompt in enumerate(PROMPTS)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    backbone.split_guidance = True
    torch.testing.assert_close(rollout(backbone, x, size, 3.5), together, atol=1e-5, rtol=1e-5)
    backbone.split_guidance = False


def test_decode_is_the_pipelines(backbone: Backbone, stock: Any) -> None:
    x = starts(backbone, (32, 48))
    expected = np.stack([np.asarray(picture) for picture in sample(stock, x, (32, 48), 3.5, "pil")])
    decoded = backbone.decode(rollout(backbone, x, (32, 48), 3.5), 3)
    assert decoded.shape == expected.shape == (4, 32, 48, 3)
    assert np.abs(decoded.astype(int) - expected.astype(int)).max() <= 1
    assert expected.std() > 10


def test_sigmas_at_1024(backbone: Backbone) -> None:
    """mu is 2.2912 for 4 steps and 2.0234 for 50: t -> 1 / (1 + exp(-mu) (1 / t - 1))."""
    expected = [1, 0.967382, 0.908139, 0.767177, 0]
    assert backbone.sigmas(4, 1024, 1024).tolist() == pytest.approx(expected, abs=5e-5)
    assert backbone.sigmas(50, 1024, 1024)[25].item() == pytest.approx(0.883227, abs=5e-5)


def test_latent_shape(backbone: Backbone) -> None:
    assert backbone.latent_shape(32, 48) == (128, 2, 3)
    for size in ((40, 32), (32, 40), (0, 32)):
        with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} must be a multiple of 16"):
            backbone.latent_shape(*size)


@pytest.mark.parametrize("which", get_args(LoraTargets))
def test_lora_targets(tiny_flux2: Callable[[str], Path], which: LoraTargets) -> None:
    """In the single-stream blocks `attention` and `paper` have the layer with q, k, v, `all-linear` also the other one."""
    skeleton = load_skeleton(str(tiny_flux2("base")), torch.float32, TOKENS)
    parts = [n for n, part in skeleton.transformer.named_modules() if isinstance(part, torch.nn.Linear)]
    double = {name for name in parts if name.startswith("transformer_blocks.")}
    single = {name for name in parts if name.startswith("single_transformer_blocks.")}
    attention = {name for name in double if ".attn." in name} | {name for name in single if "to_qkv_mlp_proj" in name}
    text = {name for name in double if ".attn.add_" in name or ".to_add_out" in name or ".ff_context." in name}
    assert (len(double), len(single), len(attention), len(text)) == (2 * 12, 2 * 2, 2 * 8 + 2, 2 * 6)
    expected = {"attention": attention, "text": text, "paper": attention | double, "all-linear": double | single}
    shapes = skeleton.target_shapes(which)
    with torch.device("meta"):
        skeleton.transformer.add_adapter(skeleton.adapter(which, 4, 8))
    found = {n.split(".lora_A.")[0] for n, _ in skeleton.transformer.named_parameters() if ".lora_A." in n}
    assert found == shapes.keys() == expected[which]


def test_a_skeleton_has_the_geometry_of_its_model(tiny_flux2: Callable[[str], Path]) -> None:
    folder = check_model(str(tiny_flux2("dev")))
    backbone = load_backbone(str(folder), LoadOptions(torch.float32, CPU, TOKENS))
    skeleton = load_skeleton(str(folder), torch.float32, TOKENS)
    assert skeleton.device.type == "meta"
    assert torch.equal(skeleton.sigmas(6, 32, 64), backbone.sigmas(6, 32, 64))
    blank, (real,) = skeleton.blank_conditioning(folder), backbone.encode(["a red circle"])
    assert blank.keys() == real.keys() == {"tokens"}
    assert blank["tokens"].shape == real["tokens"].shape and blank["tokens"].dtype == real["tokens"].dtype
    encoder = sum(p.numel() for p in backbone.pipeline.text_encoder.parameters())
    assert skeleton.text_encoder_bytes(folder, torch.bfloat16) == 2 * encoder


@pytest.mark.parametrize(("which", "targets"), [("dev", "all-linear"), ("base", "paper")])
def test_a_stock_pipeline_with_the_lora_gives_the_trainers_pictures(
    which: str,
    targets: str,
    tiny_flux2: Callable[[str], Path],
    make_trainer: Callable[..., Trainer],
    shake: Callable[..., None],
    tmp_path: Path,
) -> None:
    trainer = make_trainer(folder=tiny_flux2(which), max_sequence_length=TOKENS, lora_targets=targets)
    shake(trainer, 0.1)
    assert export_lora(trainer.backbone, tmp_path, {})
    x, size = starts(trainer.backbone, (32, 32), 2), (32, 32)
    ours = as_stock(trainer.backbone, rollout(trainer.backbone, x, size, 2.0))
    pipeline = load_stock(tiny_flux2(which))
    base = sample(pipeline, x, size, 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.load_lora_weights(tmp_path)
    found = sample(pipeline, x, size, 2.0)
    assert (found - ours).abs().max() < 1e-3 < 0.02 < (found - base).abs().max()


def test_a_lora_in_the_original_names_is_read(tmp_path: Path) -> None:
    """Other trainers write these, and diffusers converts them at any width."""
    sizes = {"single_blocks.0.linear1": 288, "double_blocks.0.txt_attn.qkv": 96}
    state = {f"diffusion_model.{name}.lora_A.weight": torch.ones(4, 32) for name in sizes}
    state |= {f"diffusion_model.{name}.lora_B.weight": torch.ones(size, 4) for name, size in sizes.items()}
    save_file(state, tmp_path / "lora.safetensors")
    pairs = layers.read(tmp_path / "lora.safetensors", Flux2KleinPipeline).pairs
    text = {f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"}
    assert pairs.keys() == {"single_transformer_blocks.0.attn.to_qkv_mlp_proj", *text}


def flags(folder: Path | str, *more: str) -> list[str]:
    text = f"""--model {folder} --prompts good.txt --eval-prompts good.txt --updates 2 --sample-every 0 --eval-images 2
        --eval-steps 2 --rollout-steps 6 --branch-early 1 2 3 --branch-late 1 3 4 --resolution 32 48 --output-dir out
        --lora-rank 4 --learning-rate 1e-2 --ema-every 1 --max-sequence-length {TOKENS} --text-cache text --no-report
        --checkpoint-every 1 --branching 2 --device cpu"""
    return [*text.split(), *more]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, red_scorer: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_scorer", lambda name, *more, **rest: red_scorer)
    (tmp_path / "good.txt").write_text("\n".join(PROMPTS))
    return tmp_path


@pytest.mark.parametrize(("which", "architecture"), [("dev", "Flux.2-dev"), ("base", "Flux.2-klein-4b")])
def test_a_run_that_is_stopped_and_resumed_is_the_same(
    place: Path,
    tiny_flux2: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    which: str,
    architecture: str,
) -> None:
    assert main.main(flags(tiny_flux2(which))) == 0
    whole = load_file(place / "out" / FILE_NAME)
    assert any(value.any() for name, value in whole.items() if ".lora_B." in name)
    # Two prompts and the empty one; the text encoder is freed.
    assert len(list((place / "text").iterdir())) == 3
    lines = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["replay_ratio_error"] < 1e-4 for line in lines)
    (place / "out" / FILE_NAME).unlink()
    assert main.main(["--resume", "out/checkpoint-1"]) == 0
    resumed = load_file(place / "out" / FILE_NAME)
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    capsys.readouterr()
    assert main.main(["inspect", "out"]) == 0
    assert f"{architecture}/lora" in capsys.readouterr().out


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


FAULTS: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "VAE of FLUX.1": (
        lambda f: edit(f / "model_index.json", vae=["diffusers", "AutoencoderKL"]),
        [],
        "names AutoencoderKL as its vae: Flux2KleinPipeline needs AutoencoderKLFlux2",
    ),
    "VAE of 16 channels": (
        lambda f: edit(f / "vae/config.json", latent_channels=16),
        [],
        "its VAE makes 16 channels in patches of 2x2, its transformer takes 32 in patches of 2x2: the VAE belongs to another",
    ),
    "text encoder of the other size": (
        lambda f: edit(f / "text_encoder/config.json", hidden_size=24),
        [],
        "text_encoder makes features of 72 numbers, the transformer takes 48: the text encoder belongs to another model",
    ),
    "no text encoder": (lambda f: shutil.rmtree(f / "text_encoder"), [], "has no folder text_encoder/"),
    "no tokenizer": (lambda f: edit(f / "model_index.json", tokenizer=[None, None]), [], "has no tokenizer, which a"),
    "size": (lambda f: None, ["--resolution", "40", "32"], "resolution 40x32 must be a multiple of 16"),
    "kernel": (
        lambda f: edit(f / "model_index.json", is_distilled=True),
        ["--kernel", "flow_sde"],
        "--kernel flow_sde is not for model model, which was distilled to a few steps",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_before_weights_are_loaded(
    place: Path,
    tiny_flux2: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    monkeypatch.setattr(Backbone, "load", lambda *arguments: pytest.fail("loaded"))
    monkeypatch.setattr(Backbone, "encode_text", lambda *arguments: pytest.fail("encoded"))
    shutil.copytree(tiny_flux2("base"), "model")
    spoil, more, blame = FAULTS[fault]
    spoil(Path("model"))
    assert main.main(flags("model", *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert blame in line


def test_the_networks_input_keeps_its_precision_beside_a_lora(
    tiny_flux2: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights in four bits the LoRA's are the first that diffusers' `dtype` finds."""
    backbone = load_backbone(str(tiny_flux2("base")), LoadOptions(torch.bfloat16, CPU, TOKENS))
    adapter.attach(backbone.transformer, backbone.adapter("paper", 2, 2))
    monkeypatch.setattr(type(backbone.transformer), "dtype", property(lambda self: torch.float32))
    seen = []
    backbone.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].dtype), with_kwargs=True
    )
    backbone.velocity(PROMPTS[:1], 1.0)(torch.randn(1, *backbone.latent_shape(32, 32)), torch.full((1,), 0.5))
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("kind", ["flux2", "qwen"])
def test_a_transformer_saved_with_its_prefix(
    tiny_flux2: Callable[[str], Path], tiny_qwen: Path, tmp_path: Path, kind: str
) -> None:
    """As ComfyUI saves one together with other parts."""
    folder = tiny_flux2("base") if kind == "flux2" else tiny_qwen
    family = type(load_skeleton(str(folder), torch.float32, TOKENS))
    file = tmp_path / "whole.safetensors"
    save_file({"model.diffusion_model.img_in.weight": torch.ones(2), "vae.x": torch.zeros(1)}, file)
    found = family.single_file(file)
    assert isinstance(found, dict) and list(found) == ["img_in.weight"]
    save_file({"img_in.weight": torch.ones(2)}, file)
    assert family.single_file(file) == str(file)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is there")
def test_a_processor_whose_packages_are_missing(tiny_flux2: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_flux2("dev"), tmp_path / "model")
    edit(tmp_path / "model" / "model_index.json", tokenizer=["transformers", "PixtralProcessor"])
    with pytest.raises(ConfigError, match=r"its tokenizer needs packages: pip install .*torchvision"):
        load_skeleton(str(tmp_path / "model"), torch.float32, TOKENS)


def test_a_processor_in_the_tokenizers_place(tiny_flux2: Callable[[str], Path], tmp_path: Path) -> None:
    """As FLUX.2 [dev] has it. Its features are those of its tokenizer."""
    pytest.importorskip("torchvision", reason="transformers' PixtralProcessor needs torchvision")
    from transformers import PixtralImageProcessorPil, PixtralProcessor

    words = AutoTokenizer.from_pretrained(tiny_flux2("dev") / "tokenizer")
    shutil.copytree(tiny_flux2("dev"), tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "tokenizer")
    processor = PixtralProcessor(PixtralImageProcessorPil(), words, patch_size=14, chat_template=words.chat_template)
    processor.save_pretrained(tmp_path / "model" / "tokenizer")
    edit(tmp_path / "model" / "model_index.json", tokenizer=["transformers", "PixtralProcessor"])
    options = LoadOptions(torch.float32, CPU, TOKENS)
    expected, found = (
        load_backbone(str(model), options).encode(PROMPTS) for model in (tiny_flux2("dev"), tmp_path / "model")
    )
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(expected, found, strict=True))
