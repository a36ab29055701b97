"""The Z-Image backbone against diffusers' own `ZImagePipeline` with random weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tmpo_trainer import methods, tree
from tmpo_trainer.backbones import load_backbone, load_skeleton
from tmpo_trainer.backbones.base import Backbone, LoadOptions
from tmpo_trainer.commands import main
from tmpo_trainer.lora.export import FILE_NAME, export_lora
from tmpo_trainer.settings.config import LoraTargets
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.settings.presets import make_config
from tmpo_trainer.training import memory
from tmpo_trainer.training.loop import Trainer

#: 31 and 35 tokens: the network fills them up to 32 and 64.
PROMPTS = ["a red circle", "two blue squares"]
STEPS, TOKENS = 4, 64

Folders = Callable[[bool], Path]


def load(folder: Path, **options: Any) -> Backbone:
    return load_backbone(str(folder), LoadOptions(torch.float32, torch.device("cpu"), TOKENS, **options))


def load_stock(folder: Path) -> ZImagePipeline:
    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def backbone(tiny_z_image: Folders) -> Backbone:
    return load(tiny_z_image(False))


@pytest.fixture(scope="module")
def stock(tiny_z_image: Folders) -> ZImagePipeline:
    return load_stock(tiny_z_image(False))


def starts(backbone: Backbone, size: tuple[int, int], count: int = 4) -> Tensor:
    return torch.randn(count, *backbone.latent_shape(*size), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def rollout(backbone: Backbone, x: Tensor, size: tuple[int, int], guidance: float) -> Tensor:
    plan = tree.TreePlan(STEPS, len(x) // len(PROMPTS), {}).forest(len(PROMPTS))
    velocity, sigmas = backbone.velocity(PROMPTS, guidance), backbone.sigmas(STEPS, *size)
    return tree.rollout(velocity, lambda step, path: x[path[0]], sigmas, plan, kernel="ode").leaves


def sample(pipeline: ZImagePipeline, x: Tensor, size: tuple[int, int], guidance: float, output: str = "latent") -> Any:
    result: Any = pipeline(
        prompt=PROMPTS * (len(x) // len(PROMPTS)),
        latents=x,
        height=size[0],
        width=size[1],
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        max_sequence_length=TOKENS,
        output_type=output,
    )
    return result.images


@pytest.mark.parametrize("guidance", [0.0, 3.0])
@pytest.mark.parametrize("size", [(32, 32), (48, 80)], ids=str)
def test_rollout_without_noise_is_the_pipeline(
    backbone: Backbone, stock: ZImagePipeline, size: tuple[int, int], guidance: float
) -> None:
    x = starts(backbone, size)
    expected = sample(stock, x, size, guidance)
    actual = rollout(backbone, x, size, guidance)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    # Not because nothing happens: the latents move, the prompts tell the rows apart, guidance is heard.
    assert (expected - x).std() > 0.1
    assert (rollout(backbone, x.roll(1, 0), size, guidance).roll(-1, 0) - expected).abs().max() > 1e-2
    assert (rollout(backbone, x, size, guidance + 1) - actual).abs().max() > 1e-2
    backbone.split_guidance = True
    torch.testing.assert_close(rollout(backbone, x, size, guidance), actual, atol=1e-4, rtol=0)
    backbone.split_guidance = False


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_prompts_of_different_lengths_in_a_batch_are_those_one_by_one(backbone: Backbone, guidance: float) -> None:
    x, sigma = starts(backbone, (48, 32)), torch.tensor([0.9, 0.7, 0.5, 0.2])
    together = backbone.velocity(PROMPTS, guidance)(x, sigma)
    for row in range(len(x)):
        alone = backbone.velocity([PROMPTS[row % 2]], guidance)(x[row : row + 1], sigma[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)


def test_sigmas_are_the_pipelines_for_a_fixed_shift_and_one_by_size(tiny_z_image: Folders, tmp_path: Path) -> None:
    shutil.copytree(tiny_z_image(True), tmp_path / "model")
    assert load(tmp_path / "model").sigmas(4, 32, 32).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-6)
    edit(tmp_path / "model/scheduler/scheduler_config.json", use_dynamic_shifting=True, max_shift=1.3)
    backbone, stock = load(tmp_path / "model"), load_stock(tmp_path / "model")
    x = starts(backbone, (96, 64))
    torch.testing.assert_close(rollout(backbone, x, (96, 64), 0), sample(stock, x, (96, 64), 0), atol=1e-4, rtol=0)
    torch.testing.assert_close(backbone.sigmas(STEPS, 96, 64), stock.scheduler.sigmas)


def test_decode_is_the_pipelines(backbone: Backbone, stock: ZImagePipeline) -> None:
    x = starts(backbone, (32, 48), 2)
    expected = np.stack([np.asarray(picture) for picture in sample(stock, x, (32, 48), 3.0, "pil")])
    decoded = backbone.decode(rollout(backbone, x, (32, 48), 3.0), 3)
    assert decoded.shape == expected.shape == (2, 32, 48, 3)
    assert np.abs(decoded.astype(int) - expected.astype(int)).max() <= 1
    assert expected.std() > 10


def test_sizes(backbone: Backbone) -> None:
    assert backbone.latent_shape(32, 48) == (16, 4, 6)
    for size in ((40, 32), (32, 40)):
        with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} must be a multiple of 16"):
            backbone.latent_shape(*size)
    for size in ((0, 32), (32, 272)):
        with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} must lie in 16..256 and 16..256"):
            backbone.latent_shape(*size)


@pytest.mark.parametrize("which", get_args(LoraTargets))
def test_lora_targets(
    backbone: Backbone, make_trainer: Callable[..., Trainer], tiny_z_image: Folders, which: str
) -> None:
    """All blocks but their modulation; for `text`, the blocks that see the text alone."""
    trainer = make_trainer(folder=tiny_z_image(False), max_sequence_length=TOKENS, lora_targets=which)
    found = {name.split(".lora_")[0] for name in trainer.weights.lora}
    layer = {"attention": r"attention\.to_.*"}.get(which, r"(attention\.to_|feed_forward).*")
    block = "context_refiner" if which == "text" else "(layers|noise_refiner|context_refiner)"
    linear = [n for n, part in backbone.transformer.named_modules() if isinstance(part, torch.nn.Linear)]
    expected = {name for name in linear if re.fullmatch(rf"{block}\.\d\.{layer}", name)}
    assert found == expected == backbone.target_shapes(which).keys()  # type: ignore[arg-type]
    assert len(found) == {"attention": 4 * 4, "text": 7}.get(which, 4 * 7)


def test_an_update_trains_and_replays_exactly(tiny_z_image: Folders, make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(folder=tiny_z_image(False), max_sequence_length=TOKENS, guidance=2.0, prompts_per_batch=2)
    before = {name: value.detach().clone() for name, value in trainer.weights.lora.items()}
    assert trainer.update()["replay_ratio_error"] < 1e-4
    # lora_A gets no gradient while lora_B is zero. Every lora_B moves, those of the refiners included.
    still = {name for name, value in trainer.weights.lora.items() if torch.equal(value, before[name])}
    assert all(".lora_A." in name for name in still)


def test_gradients_are_the_same_with_checkpointing(
    tiny_z_image: Folders, make_trainer: Callable[..., Trainer], shake: Callable[..., None]
) -> None:
    found = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            folder=tiny_z_image(False), max_sequence_length=TOKENS, gradient_checkpointing=checkpointing
        )
        shake(trainer)
        backbone = trainer.backbone
        velocity = backbone.velocity(PROMPTS, 2.0)
        velocity(starts(backbone, (32, 32)), torch.full((4,), 0.6)).square().sum().backward()
        found.append({name: value.grad for name, value in trainer.weights.lora.items()})
    for name, gradient in found[0].items():
        assert gradient is not None and gradient.any()
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("which", ["all-linear", "text"])
def test_a_stock_pipeline_gives_the_trainers_pictures(
    tiny_z_image: Folders, make_trainer: Callable[..., Trainer], shake: Callable[..., None], tmp_path: Path, which: str
) -> None:
    folder, size = tiny_z_image(True), (32, 48)
    trainer = make_trainer(folder=folder, max_sequence_length=TOKENS, lora_targets=which)
    shake(trainer, 0.2)
    x = starts(trainer.backbone, size)
    expected = rollout(trainer.backbone, x, size, 3.0)
    assert export_lora(trainer.backbone, tmp_path, {})
    pipeline = load_stock(folder)
    base = sample(pipeline, x, size, 3.0)
    assert (expected - base).abs().max() > 0.02
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(sample(pipeline, x, size, 3.0), expected, atol=1e-3, rtol=0)
    with safe_open(tmp_path / FILE_NAME, "pt") as file:
        metadata = file.metadata()
        # The names under which newer ComfyUI knows them, see tests/comfy.
        block = r"transformer\.(layers|noise_refiner|context_refiner)\.\d\."
        layer = r"(attention\.to_[qkv]|attention\.to_out\.0|feed_forward\.w[123])\.lora_[AB]\.weight"
        assert all(re.fullmatch(block + layer, key) for key in file.keys())  # noqa: SIM118
    assert metadata["modelspec.architecture"] == "z-image/lora" and metadata["tmpo.model"] == "Z-Image-Turbo"


def test_a_transformer_in_comfyuis_names(backbone: Backbone, tiny_z_image: Folders, tmp_path: Path) -> None:
    own = load_file(tiny_z_image(False) / "transformer" / "diffusion_pytorch_model.safetensors")
    names = {
        r"all_(final_layer|x_embedder)\.2-1": r"\1",
        r"attention\.to_out\.0": "attention.out",
        r"attention\.norm_([qk])": r"attention.\1_norm",
    }
    written = {}
    for name, value in own.items():
        for old, new in names.items():
            name = re.sub(old, new, name)
        written[name] = value
    for name in [name for name in written if ".to_q." in name]:
        parts = [written.pop(name.replace("to_q", f"to_{which}")) for which in "qkv"]
        written[name.replace("to_q", "qkv")] = torch.cat(parts)
    save_file(written, tmp_path / "z_image.safetensors")
    found = load(tiny_z_image(False), transformer=tmp_path / "z_image.safetensors")
    assert found.transformer.state_dict().keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in found.transformer.state_dict().items())


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "the VAE of SD3": (
        lambda f: edit(f / "vae/config.json", scaling_factor=1.5305, shift_factor=0.0609),
        "scaling_factor 1.5305, that of SD3, but the transformer is Z-Image's",
    ),
    "the VAE of FLUX.2": (
        lambda f: edit(f / "vae/config.json", latent_channels=32),
        "its VAE makes 32 channels, its transformer takes 16",
    ),
    "no text encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "has no folder text_encoder/"),
    "no vocabulary": (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "the vocabulary .* is missing"),
    "another text encoder": (
        lambda f: edit(f / "model_index.json", text_encoder=["transformers", "Qwen3Config"]),
        "Qwen3Config as its text_encoder",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_trained_is_refused_in_one_line(
    tiny_z_image: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    shutil.copytree(tiny_z_image(False), tmp_path / "model")
    change, message = FAULTS[fault]
    change(tmp_path / "model")
    monkeypatch.setattr(Backbone, "load", lambda *arguments: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path / "model")
    assert "\n" not in str(error.value)


def test_turbo_takes_no_guidance_and_no_score(
    tiny_z_image: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dry-run", "--model", str(tiny_z_image(True)), "--resolution", "32", "32", "--max-sequence-length", "12"]
    for more, told in (
        (["--guidance", "3.5"], "--guidance 3.5: Z-Image-Turbo has its guidance built in, give --guidance 0"),
        (["--guidance", "0", "--kernel", "flow_sde", "--eta", "0.7"], "which was distilled to a few steps"),
    ):
        assert main.main([*flags, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line
    assert main.main([*flags, "--guidance", "0"]) == 0
    # Chains of NFT have no stochastic step.
    assert main.main([*flags, "--guidance", "0", "--method", "nft", "--kernel", "flow_sde", "--eta", "0.7"]) == 0


def test_no_text_tokens_are_refused(tiny_z_image: Folders) -> None:
    with pytest.raises(ConfigError, match="--max-sequence-length 0: Z-Image needs the prompt's tokens"):
        load_skeleton(str(tiny_z_image(False)), torch.float32, 0)


def test_the_memory_estimate_is_what_a_replay_takes(
    tiny_z_image: Folders, make_trainer: Callable[..., Trainer]
) -> None:
    """With texts of 32 tokens, to which the network fills up this prompt and the empty one."""
    changes = {
        "max_sequence_length": 32,
        "guidance": 2.0,
        "resolution": (64, 64),
        "replay_batch": 3,
        "max_batch": 3,
        "decode_batch": 1,
        "gradient_checkpointing": True,
    }
    config = make_config([("settings", {**changes, "lora_rank": 4, "lora_alpha": 8})])
    skeleton = load_skeleton(str(tiny_z_image(False)), torch.float32, 32)
    method = methods.make(config, skeleton.sigmas(6, 64, 64))
    plan = tree.TreePlan.tmpo(6, (1, 2, 3), 3)
    phases = memory.estimate(skeleton, tiny_z_image(False), config, method, [plan], torch.device("cuda"))
    (estimated,) = (parts["forward and backward"] for title, parts in phases.items() if title.startswith("replay, 3"))
    trainer = make_trainer(folder=tiny_z_image(False), **changes)
    network = trainer.backbone.velocity(PROMPTS[:1], config.guidance)
    x, sigma = starts(trainer.backbone, (64, 64), 3), torch.full((3,), 0.5)
    real = memory.peak_bytes(
        trainer.backbone.transformer, lambda: network(x + 0, sigma + 0).sum().backward(), gradient=True
    )
    assert estimated == pytest.approx(real, rel=0.02)


def test_a_run_is_resumed_bit_for_bit(
    tiny_z_image: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole run through the command line, and its second half again from the checkpoint in the middle."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    run = f"""--model {tiny_z_image(False)} --prompts p.txt --eval-prompts p.txt --reward sharpness --updates 2 --sample-every 0
        --rollout-steps 4 --branching 2 --branch-early 1 2 --branch-late 1 2 --resolution 32 48 --output-dir out --lora-rank 4
        --learning-rate 1e-2 --ema-every 1 --max-sequence-length {TOKENS} --text-cache text --no-report --checkpoint-every 1
        --guidance 2 --prompts-per-update 2 --prompts-per-batch 2 --gradient-checkpointing --device cpu"""
    assert main.main(run.split()) == 0
    whole = load_file(tmp_path / "out" / FILE_NAME)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["replay_ratio_error"] < 1e-4 for line in lines)
    (tmp_path / "out" / FILE_NAME).unlink()
    assert main.main(["--resume", "out/checkpoint-1"]) == 0
    again = load_file(tmp_path / "out" / FILE_NAME)
    assert any(value.any() for name, value in whole.items() if ".lora_B." in name)
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)
    capsys.readouterr()
    assert main.main(["inspect", "out"]) == 0
    assert re.search(r"^model +Z-Image$", capsys.readouterr().out, re.M)
