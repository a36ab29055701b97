"""Ways to load a transformer, and to run it: a single file, four bits, two calls for guidance, compiled blocks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from tmpo_trainer.backbones import check, load_backbone, load_skeleton
from tmpo_trainer.backbones.base import Backbone, LoadOptions
from tmpo_trainer.commands import loading
from tmpo_trainer.lora import export
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.settings.presets import make_config

TOKENS = 12
PROMPTS = ["a red circle", "two blue squares"]
CPU = torch.device("cpu")


def velocity(backbone: Backbone, guidance: float = 3.5) -> Tensor:
    x = torch.randn(4, *backbone.latent_shape(32, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return backbone.velocity(PROMPTS, guidance)(x, torch.full((4,), 0.7))


def load(folder: Path, **options: Any) -> Backbone:
    return load_backbone(str(folder), LoadOptions(torch.float32, CPU, TOKENS, **options))


def test_the_device_is_found_without_a_walk_through_the_modules(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load(tiny_model)
    visited: list[str] = []
    original = torch.nn.Module.named_modules

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        for name, module in original(self, *arguments, **options):
            visited.append(name)
            yield name, module

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    assert backbone.device == CPU
    # Those up to the first parameter, once per level.
    met = len(visited)
    assert met < 10 < 50 < len(list(backbone.transformer.modules()))


def test_a_skeleton_is_made_once(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = load_skeleton(str(tiny_model), torch.float32, TOKENS)
    monkeypatch.setattr(check, "skeleton", lambda *arguments: pytest.fail("made again"))
    backbone = load_backbone(str(tiny_model), LoadOptions(torch.float32, CPU, TOKENS), skeleton)
    assert backbone is not skeleton and backbone.device == CPU


# A single file


def halves_swapped(value: Tensor) -> Tensor:
    first, second = value.chunk(2)
    return torch.cat([second, first])


def original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stability's names for diffusers' SD3 transformer, which ComfyUI keeps. Queries, keys and values are one tensor."""
    outside = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    streams = {
        "x_block": {
            "norm1.linear": "adaLN_modulation.1",
            "attn.norm_q": "attn.ln_q",
            "attn.norm_k": "attn.ln_k",
            "attn.to_out.0": "attn.proj",
            "attn2.norm_q": "attn2.ln_q",
            "attn2.norm_k": "attn2.ln_k",
            "attn2.to_out.0": "attn2.proj",
            "ff.net.0.proj": "mlp.fc1",
            "ff.net.2": "mlp.fc2",
        },
        "context_block": {
            "norm1_context.linear": "adaLN_modulation.1",
            "attn.norm_added_q": "attn.ln_q",
            "attn.norm_added_k": "attn.ln_k",
            "attn.to_add_out": "attn.proj",
            "ff_context.net.0.proj": "mlp.fc1",
            "ff_context.net.2": "mlp.fc2",
        },
    }
    fused = {
        ("x_block", "attn"): ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("x_block", "attn2"): ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        ("context_block", "attn"): ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    }
    blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("transformer_blocks."))
    found: dict[str, Tensor] = {"pos_embed": state["pos_embed.pos_embed"]}
    for ending in (".weight", ".bias"):
        for ours, theirs in outside.items():
            if ours + ending in state:
                value = state[ours + ending]
                found[theirs + ending] = halves_swapped(value) if ours == "norm_out.linear" else value
        for i in range(blocks):
            for stream, names in streams.items():
                for ours, theirs in names.items():
                    key = f"transformer_blocks.{i}.{ours}{ending}"
                    if key in state:
                        # The last block's text modulation is of the continuous kind, with its halves the other way round.
                        swap = ours == "norm1_context.linear" and i == blocks - 1
                        value = halves_swapped(state[key]) if swap else state[key]
                        found[f"joint_blocks.{i}.{stream}.{theirs}{ending}"] = value
            for (stream, attention), names3 in fused.items():
                keys = [f"transformer_blocks.{i}.{name}{ending}" for name in names3]
                if keys[0] in state:
                    value = torch.cat([state[key] for key in keys])
                    found[f"joint_blocks.{i}.{stream}.{attention}.qkv{ending}"] = value
    return found


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["bare", "prefixed"])
def test_a_single_file_takes_the_place_of_the_transformer(tiny_sd35: Path, tmp_path: Path, prefix: str) -> None:
    state = load_file(tiny_sd35 / "transformer" / "diffusion_pytorch_model.safetensors")
    # Not the folder's own weights, or nothing would be shown.
    state = {key: value * 1.1 if "ff" in key else value for key, value in state.items()}
    file = tmp_path / "transformer.safetensors"
    save_file({prefix + key: value.contiguous() for key, value in original_names(state).items()}, file)
    backbone = load(tiny_sd35, transformer=file)
    loaded = backbone.transformer.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert not torch.allclose(velocity(backbone), velocity(load(tiny_sd35)), atol=1e-3)


@pytest.mark.parametrize(
    ("names", "options", "blame"),
    [
        ({"a.weight": torch.float32, "a.scale_weight": torch.float32}, {}, "has scaled 8-bit weights"),
        ({"scaled_fp8": torch.float32}, {}, "has scaled 8-bit weights"),
        ({"guidance_in.x": torch.float32}, {"nf4": True}, "cannot be quantised while it is loaded"),
        ({"double_blocks.0.x": torch.float32}, {}, "is from FLUX.1-schnell, but the model is FLUX.1-dev"),
    ],
)
def test_a_single_file_that_would_load_wrongly_is_refused(
    tiny_flux: Callable[[bool], Path], tmp_path: Path, names: dict[str, Any], options: dict[str, Any], blame: str
) -> None:
    file = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(4).to(dtype) for name, dtype in names.items()}, file)
    with pytest.raises(ConfigError, match=r"--transformer .*other\.safetensors") as caught:
        load(tiny_flux(True), transformer=file, **options)
    assert blame in str(caught.value)


@pytest.mark.parametrize("lacking", ["joint_blocks.1.x_block.attn.ln_q.weight", "joint_blocks.2."])
def test_a_single_file_that_lacks_something_is_refused(tiny_sd35: Path, tmp_path: Path, lacking: str) -> None:
    """A weight, or a whole block: then diffusers' conversion finds nothing amiss."""
    state = load_file(tiny_sd35 / "transformer" / "diffusion_pytorch_model.safetensors")
    names = {key: value for key, value in original_names(state).items() if not key.startswith(lacking)}
    assert len(names) < len(original_names(state))
    file = tmp_path / "less.safetensors"
    save_file({key: value.contiguous() for key, value in names.items()}, file)
    with pytest.raises(ConfigError, match=r"--transformer .*less\.safetensors"):
        load(tiny_sd35, transformer=file)


@pytest.mark.parametrize("name", ["transformer.sft", "whole.safetensors"])
def test_a_single_file_as_comfyui_has_it(tiny_sd35: Path, tmp_path: Path, name: str) -> None:
    """Another ending, or a whole model whose T5 alone is in scaled 8 bits."""
    state = load_file(tiny_sd35 / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors = {key: value.contiguous() for key, value in original_names(state).items()}
    if name.startswith("whole"):
        tensors = {f"model.diffusion_model.{key}": value for key, value in tensors.items()}
        for key in ("x.weight", "x.scale_weight", "scaled_fp8"):
            tensors[f"text_encoders.t5xxl.transformer.{key}"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / name)
    loaded = load(tiny_sd35, transformer=tmp_path / name).transformer.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("name", "kind"), [("q8.gguf", "a GGUF file"), ("bare.ckpt", "a torch file"), ("lfs.safetensors", "only a pointer")]
)
def test_a_single_file_of_another_format_is_named(tiny_sd35: Path, tmp_path: Path, name: str, kind: str) -> None:
    file = tmp_path / name
    torch.save({"x": torch.zeros(2)}, file)
    if not name.endswith("ckpt"):
        file.write_bytes(b"GGUF\3" if name.endswith("gguf") else b"version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(ConfigError, match=f"{name} is {kind}.*: take the model's safetensors file"):
        load(tiny_sd35, transformer=file)


def test_a_single_file_of_another_model_is_one_line(tiny_sd35: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, file)
    with pytest.raises(ConfigError, match=r"other\.safetensors") as caught:
        load(tiny_sd35, transformer=file)
    assert "\n" not in str(caught.value)


# Numbers that are none


def test_weights_that_are_not_finite(tiny_sd35: Path, tmp_path: Path) -> None:
    """Its pictures would be black."""
    shutil.copytree(tiny_sd35, tmp_path / "model")
    file = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "decoder.conv_in.bias": torch.full((16,), torch.nan)}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"model/vae: decoder\.conv_in\.bias is not finite"):
        load(tmp_path / "model")


def test_text_encoders_that_are_not_finite(tiny_sd35: Path, tmp_path: Path) -> None:
    """They are freed before anything is drawn, so that nothing else would name them."""
    shutil.copytree(tiny_sd35, tmp_path / "model")
    file = tmp_path / "model" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("final_layer_norm.bias"))
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"model/text_encoder: .*final_layer_norm\.bias is not finite"):
        load(tmp_path / "model", prompts=["a"], text_cache=tmp_path / "text")


def test_pixels_that_are_not_finite(tiny_sd35: Path) -> None:
    backbone = load(tiny_sd35)
    with pytest.raises(ValueError, match="pixels that are not finite"):
        backbone.decode(torch.full((1, 16, 4, 4), torch.inf), 1)


# Guidance in two calls


def test_guidance_in_two_calls_is_the_same(tiny_sd35: Path) -> None:
    backbone = load(tiny_sd35)
    rows: list[int] = []
    backbone.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    together = velocity(backbone)
    backbone.split_guidance = True
    apart = velocity(backbone)
    assert rows == [8, 4, 4]
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=1e-5)


# Four bits


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes quantises on a CPU as well; diffusers asks for a GPU before it tries."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda self, *args, **kwargs: None)


@pytest.fixture(params=["flux", "sd35"])
def model(request: pytest.FixtureRequest, tiny_flux: Callable[[bool], Path], tiny_sd35: Path) -> Path:
    return tiny_flux(True) if request.param == "flux" else tiny_sd35


def test_nf4_is_a_rough_copy_that_trains(
    without_gpu: None, model: Path, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    import bitsandbytes

    exact = velocity(load(model))
    backbone = load(model, nf4=True)
    linear = [part for part in backbone.transformer.modules() if isinstance(part, torch.nn.Linear)]
    assert linear and all(isinstance(part, bitsandbytes.nn.Linear4bit) for part in linear)
    for part in linear:
        # A layout for some processors, which wants wider layers than these.
        part.support_avx512bf16_for_cpu = False
    assert {part.weight.quant_type for part in linear} == {"nf4"}
    error = (velocity(backbone) - exact).norm() / exact.norm()
    # Random weights take it worse than trained ones; another model would be further off than 1.
    assert 0.005 < error < 0.5
    before = [part.weight.clone() for part in linear]
    settings = {"max_sequence_length": TOKENS, "guidance": 3.5, "resolution": (32, 48), "learning_rate": 1e-2}
    trainer = make_trainer(backbone=backbone, prompts=PROMPTS, **settings)
    figures = [trainer.update() for _ in range(2)]
    assert all(line["replay_ratio_error"] < 1e-4 for line in figures)
    # The adapter has learnt, the four bits have not moved.
    assert all(value.dtype == torch.float32 for value in trainer.weights.lora.values())
    assert any(value.any() for name, value in trainer.weights.lora.items() if "lora_B" in name)
    assert all(torch.equal(part.weight, old) for part, old in zip(linear, before, strict=True))
    assert export.export_lora(backbone, tmp_path, {})
    assert {value.dtype for value in load_file(tmp_path / "pytorch_lora_weights.safetensors").values()} == {
        torch.float32
    }


# Compiled blocks


def test_compiled_blocks_train_alike(
    tiny_flux: Callable[[bool], Path], make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's tracer alone: its code generator would take minutes."""
    compiled: list[str] = []

    def compile_eagerly(self: Any, *arguments: Any, **options: Any) -> None:
        compiled.append(type(self).__name__)
        original(self, *arguments, **options, backend="eager")

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    losses = {}
    for compile in (False, True):
        trainer = make_trainer(
            folder=tiny_flux(True),
            max_sequence_length=TOKENS,
            resolution=(32, 48),
            prompts_per_update=1,
            rollout_steps=3,
            branch_early=(1, 2),
            branch_late=(1, 2),
            branching=2,
            compile=compile,
        )
        figures = trainer.update()
        losses[compile] = figures["grad_norm"]
        assert figures["replay_ratio_error"] < 1e-4
    assert set(compiled) == {"FluxTransformerBlock", "FluxSingleTransformerBlock"}
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


# Attention


def test_flash_attention_is_refused_where_it_cannot_be(tiny_flux: Callable[[bool], Path], tmp_path: Path) -> None:
    settings = {"model": str(tiny_flux(True)), "attention": "flash", "text_cache": str(tmp_path)}
    for device, more, message in (
        ("cpu", {}, "needs a CUDA GPU and bfloat16"),
        ("cuda", {"dtype": "float32"}, "needs a CUDA GPU and bfloat16"),
        ("cuda", {}, "needs a package: pip install flash-attn"),
    ):
        config = make_config([("settings", settings | more)])
        with pytest.raises(ConfigError, match=f"^--attention flash {message}"):
            loading.skeleton(config, torch.device(device))
    # What diffusers says of a version that is too old.
    with pytest.raises(ConfigError, match=r"^--attention flash: .*flash-attn>="):
        loading.load_model(make_config([("settings", settings)]), CPU, PROMPTS)


def test_native_attention_is_the_default(tiny_flux: Callable[[bool], Path]) -> None:
    backbone = load(tiny_flux(True))
    default = velocity(backbone)
    backbone.transformer.set_attention_backend("native")
    assert torch.equal(velocity(backbone), default)
