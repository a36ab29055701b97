"""What a model's configs and file headers tell against a run, before anything heavy is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tmpo_trainer.backbones import check_model, load_backbone, load_skeleton
from tmpo_trainer.backbones.base import Backbone, LoadOptions
from tmpo_trainer.commands import main
from tmpo_trainer.settings.errors import ConfigError


@pytest.fixture
def copy(tiny_flux: Callable[[bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny FLUX in a working directory; loading weights fails the test."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_flux(True), "flux")
    (tmp_path / "good.txt").write_text("a red circle\n")

    def heavy(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Backbone, "load", heavy)
    return tmp_path / "flux"


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change(file: Path, name: str, value: torch.Tensor | None) -> None:
    """Replaces a tensor of a file, or leaves it out."""
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors if value is None else {**tensors, name: value}, file, {"format": "pt"})


def split_weights(folder: Path) -> None:
    """Claims a second shard that is not there."""
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("a.safetensors"))
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    weights.with_suffix(".safetensors.index.json").write_text(json.dumps(index))


FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "VAE of SD3": (
        lambda f: edit(f / "vae/config.json", scaling_factor=1.5305, shift_factor=0.0609),
        ["scaling_factor 1.5305, that of SD3", "transformer is FLUX's", "take the VAE of the same model"],
    ),
    "VAE of SDXL": (
        lambda f: edit(f / "vae/config.json", latent_channels=4),
        ["its VAE makes 4 channels, its transformer takes 16"],
    ),
    "VAE without shift": (lambda f: edit(f / "vae/config.json", shift_factor=None), ["lacks scaling_factor or shift"]),
    "another transformer": (
        lambda f: edit(f / "model_index.json", transformer=["diffusers", "SD3Transformer2DModel"]),
        ["names SD3Transformer2DModel as its transformer", "FluxPipeline needs FluxTransformer2DModel"],
    ),
    "more layers than the weights, and an empty quantisation": (
        lambda f: edit(f / "transformer/config.json", num_layers=4, quantization_config=None),
        ["transformer", "is missing in the weights"],
    ),
    "code of the hub": (
        lambda f: edit(f / "text_encoder/config.json", attn_implementation="owner/kernel"),
        ["attn_implementation owner/kernel names code on the hub"],
    ),
    "another scheduler": (
        lambda f: edit(f / "model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
        ["names DDIMScheduler as its scheduler", "needs FlowMatchEulerDiscreteScheduler"],
    ),
    "no transformer": (
        lambda f: edit(f / "model_index.json", transformer=[None, None]),
        ["names None as its transformer"],
    ),
    "no text encoder": (lambda f: shutil.rmtree(f / "text_encoder_2"), ["has no folder text_encoder_2/"]),
    "config that is none": (lambda f: (f / "vae/config.json").write_text("{"), ["vae/config.json is not JSON"]),
    "no weights": (
        lambda f: (f / "transformer/diffusion_pytorch_model.safetensors").unlink(),
        ["has no weights in transformer/ (diffusion_pytorch_model.safetensors or", "the download is not complete"],
    ),
    "a shard is missing": (split_weights, ["b.safetensors is missing: the download is not complete"]),
    "damaged index": (
        lambda f: (f / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text("{}"),
        ["diffusion_pytorch_model.safetensors.index.json is damaged"],
    ),
    "tokenizer without vocabulary": (
        lambda f: (f / "tokenizer_2/tokenizer.json").unlink(),
        ["the tokenizer in flux/tokenizer_2 knows 1 words", "its text encoder 30 words", "download the folder again"],
    ),
    "tokenizer of another model": (
        lambda f: edit(f / "text_encoder_2/config.json", vocab_size=20),
        ["the tokenizer in flux/tokenizer_2 knows 27 words with numbers up to 29", "its text encoder 20 words"],
    ),
    "tokenizer that is too long": (
        lambda f: edit(f / "tokenizer/tokenizer_config.json", model_max_length=77),
        ["tokenizer_config.json: model_max_length 77, but text_encoder takes 12 tokens"],
    ),
    "code of another module": (
        lambda f: edit(f / "model_index.json", text_encoder=["subprocess", "Popen"]),
        ["model_index.json: text_encoder is from 'subprocess'", "only parts of diffusers and transformers are loaded"],
    ),
    "tokenizer as text encoder": (
        lambda f: edit(f / "model_index.json", text_encoder=["transformers", "CLIPTokenizer"]),
        ["names transformers's CLIPTokenizer as its text_encoder, which is not a PreTrainedModel"],
    ),
    "text as number": (
        lambda f: edit(f / "vae/config.json", scaling_factor="x"),
        ['vae/config.json: scaling_factor "x" is not possible: AutoencoderKL takes float'],
    ),
    "a thousand million layers": (
        lambda f: edit(f / "text_encoder_2/config.json", num_layers=10**9),
        ["text_encoder_2/config.json: num_layers 1000000000 is not possible"],
    ),
    "a layer less": (
        lambda f: edit(f / "transformer/config.json", num_layers=1),
        ["transformer: transformer_blocks.1 is in the weights, but not by config.json"],
    ),
    "another width of the heads": (
        lambda f: edit(f / "transformer/config.json", attention_head_dim=8, num_attention_heads=4),
        ["transformer/config.json cannot be loaded"],
    ),
    "transformer without a weight": (
        lambda f: change(f / "transformer/diffusion_pytorch_model.safetensors", "proj_out.bias", None),
        ["transformer: proj_out.bias is missing in the weights"],
    ),
    "text encoder without a weight": (
        lambda f: change(f / "text_encoder_2/model.safetensors", "encoder.final_layer_norm.weight", None),
        ["text_encoder_2: the weights are 7,232 numbers, but 7,264 by config.json"],
    ),
    "weight of another shape": (
        lambda f: change(f / "text_encoder_2/model.safetensors", "encoder.final_layer_norm.weight", torch.ones(31)),
        ["text_encoder_2: encoder.final_layer_norm.weight is [31] in the weights, but [32] by config.json"],
    ),
    "whole numbers": (
        lambda f: change(f / "vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.bias", torch.ones(16).int()),
        ["vae: decoder.conv_in.bias is stored as whole numbers (I32)"],
    ),
    "a torch file in its place": (
        lambda f: torch.save({}, f / "vae/diffusion_pytorch_model.safetensors"),
        ["diffusion_pytorch_model.safetensors is a torch file", "take the model's safetensors file"],
    ),
    "cut short": (
        lambda f: (f / "text_encoder_2/model.safetensors").write_bytes(
            (f / "text_encoder_2/model.safetensors").read_bytes()[:-10]
        ),
        ["text_encoder_2/model.safetensors is damaged or cut short", "download it again"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_before_weights_are_loaded(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    change, blame = FAULTS[fault]
    change(copy)
    flags = "--model flux --prompts good.txt --eval-prompts good.txt --no-report --resolution 32 32 --output-dir out"
    assert main.main(flags.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tmpo_trainer: model flux")
    for part in blame:
        assert part in line
    assert not Path("out").exists()


@pytest.mark.parametrize("lost", [["tokenizer", "tokenizer_2"], ["tokenizer_3"]])
def test_sd3s_tokenizers_without_vocabulary(tiny_sd35: Path, tmp_path: Path, lost: list[str]) -> None:
    shutil.copytree(tiny_sd35, tmp_path / "sd3")
    for name in lost:
        (tmp_path / "sd3" / name / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=f"the tokenizer in .*sd3/{lost[0]} knows . words"):
        check_model(str(tmp_path / "sd3"))


def test_files_that_nobody_reads(copy: Path) -> None:
    """Of a Mac, of a browser, or of another precision: all of them broken."""
    for part in list(copy.iterdir()):
        if part.is_dir():
            for name in ("._model.safetensors", ".DS_Store", "model (1).safetensors", "model.fp16.safetensors",
                         "diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors.index.json"):  # fmt: skip
                (part / name).write_bytes(b"\0\0")
    assert check_model(str(copy)) == copy
    weights = copy / "vae/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(ConfigError, match=r"has no weights in vae/ \(diffusion_pytorch_model.safetensors or"):
        check_model(str(copy))


def test_positions_without_noise_are_told_before_weights_are_loaded(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--model flux --prompts good.txt --eval-prompts good.txt --no-report --resolution 32 32 --output-dir out"
    assert main.main([*flags.split(), "--rollout-steps", "40", "--branch-late", "1", "4", "39"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "branch_late [1, 4, 39]: step 39 of 40" in line


@pytest.mark.parametrize(
    ("module", "shape", "blame"),
    [
        ("transformer_blocks.0.attn.to_q", (32, 48), "32 x 48 and does not fit FluxTransformer2DModel, where it is 32 x 32"),
        ("transformer_blocks.7.attn.to_q", (32, 32), "blocks.7.attn.to_q is no linear layer of FluxTransformer2DModel"),
    ],
)  # fmt: skip
def test_a_lora_of_another_model(
    copy: Path, capsys: pytest.CaptureFixture[str], module: str, shape: tuple[int, int], blame: str
) -> None:
    outputs, inputs = shape
    name = f"transformer.{module}"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(4, inputs), f"{name}.lora_B.weight": torch.ones(outputs, 4)},
        "lora.safetensors",
    )
    flags = "--model flux --prompts good.txt --eval-prompts good.txt --no-report --resolution 32 32 --output-dir out"
    assert main.main([*flags.split(), "--init-lora", "lora.safetensors"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert blame in line


@pytest.fixture(params=["flux-dev", "flux-schnell", "sd35", "sd3"])
def model(request: pytest.FixtureRequest, tiny_flux: Callable[[bool], Path], tiny_sd35: Path, tiny_model: Path) -> Path:
    if request.param.startswith("flux"):
        return tiny_flux(request.param == "flux-dev")
    return tiny_sd35 if request.param == "sd35" else tiny_model


@pytest.mark.parametrize("targets", ["paper", "attention", "text", "all-linear"])
def test_a_skeleton_has_the_geometry_of_its_model(model: Path, tmp_path: Path, targets: Any) -> None:
    skeleton = load_skeleton(str(model), torch.float32, 12)
    options = LoadOptions(torch.float32, torch.device("cpu"), 12, prompts=["a red circle"], text_cache=tmp_path)
    backbone = load_backbone(str(model), options)
    assert skeleton.device.type == "meta"
    assert skeleton.latent_shape(32, 64) == backbone.latent_shape(32, 64)
    assert torch.equal(skeleton.sigmas(6, 32, 64), backbone.sigmas(6, 32, 64))
    assert skeleton.architecture == backbone.architecture
    blank, (real,) = skeleton.blank_conditioning(model), backbone.encode(["a red circle"])
    assert {name: (value.shape, value.dtype) for name, value in blank.items()} == {
        name: (value.shape, value.dtype) for name, value in real.items()
    }
    # The layers that get a LoRA are those that peft finds.
    backbone.transformer.add_adapter(backbone.adapter(targets, 4, 8))
    found = {
        name.removesuffix(".lora_A.default.weight"): (value.shape[1], len(backbone.transformer.get_parameter(up)))
        for name, value in backbone.transformer.named_parameters()
        if name.endswith(".lora_A.default.weight")
        for up in [name.replace("lora_A", "lora_B")]
    }
    assert skeleton.target_shapes(targets) == found
