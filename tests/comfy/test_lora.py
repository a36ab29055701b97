"""A real ComfyUI applies our LoRA as diffusers does: the same network output with it, for SD3, SD3.5, FLUX.1, FLUX.2 and
Qwen-Image. And we read a transformer that it has written.

Needs a checkout of ComfyUI: COMFYUI_PATH=/path/to/ComfyUI pytest tests/comfy
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from tmpo_trainer.backbones.base import Backbone, LoadOptions
from tmpo_trainer.backbones.flux import FluxBackbone, image_ids, pack, unpack
from tmpo_trainer.backbones.flux2 import Flux2Backbone, positions
from tmpo_trainer.backbones.qwen import QwenImageBackbone
from tmpo_trainer.backbones.sd3 import SD3Backbone
from tmpo_trainer.lora.export import export_lora

COMFYUI = os.environ.get("COMFYUI_PATH")
pytestmark = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH names no checkout of ComfyUI")
TARGETS = ["paper", "all-linear"]


@pytest.fixture(scope="module")
def comfy_sd() -> Iterator[Any]:
    """ComfyUI's loader, on the CPU."""
    sys.path.insert(0, str(COMFYUI))
    from comfy.cli_args import args  # type: ignore[import-not-found]

    args.cpu = True
    import comfy.sd  # type: ignore[import-not-found]

    yield comfy.sd
    sys.path.remove(str(COMFYUI))


def sd3(dual: tuple[int, ...]) -> SD3Transformer2DModel:
    """Two blocks and two heads: ComfyUI takes the one from the other."""
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=64,
        caption_projection_dim=128,
        joint_attention_dim=48,
        pooled_projection_dim=40,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=dual,
        in_channels=16,
        out_channels=16,
    )


def flux() -> FluxTransformer2DModel:
    """ComfyUI knows FLUX in its full width alone: one block of each kind, half a billion weights."""
    return FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, guidance_embeds=True, joint_attention_dim=4096, pooled_projection_dim=768
    )


def flux2(guidance: bool) -> Flux2Transformer2DModel:
    """ComfyUI takes the number of heads from the width. Its own files have other names than diffusers', see `original`."""
    return Flux2Transformer2DModel(
        num_layers=2, num_single_layers=2, num_attention_heads=2, joint_attention_dim=48, guidance_embeds=guidance
    )


#: FLUX.2's names in diffusers and in the files that ComfyUI reads.
RENAMED = {
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "time_guidance_embed.timestep_embedder": "time_in",
    "time_guidance_embed.guidance_embedder": "guidance_in",
    "linear_1": "in_layer",
    "linear_2": "out_layer",
    "modulation.linear": "modulation.lin",
    "modulation_img.linear": "modulation_img.lin",
    "modulation_txt.linear": "modulation_txt.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    "single_transformer_blocks": "single_blocks",
    "transformer_blocks": "double_blocks",
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out.weight": "linear2.weight",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
FUSED = {"img_attn": ("to_q", "to_k", "to_v"), "txt_attn": ("add_q_proj", "add_k_proj", "add_v_proj")}


def original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """FLUX.2's weights in the original names, with q, k, v of the double-stream blocks in one layer."""
    state, found = dict(state), {}
    for name in [name for name in state if ".attn.to_q." in name]:
        block = name.partition(".attn.")[0]
        for stream, parts in FUSED.items():
            found[f"{block}.{stream}.qkv.weight"] = torch.cat([state.pop(f"{block}.attn.{x}.weight") for x in parts])
    # Shift and scale change places.
    state["norm_out.linear.weight"] = torch.cat(state["norm_out.linear.weight"].chunk(2)[::-1])
    for name, value in {**found, **state}.items():
        new = name
        for old, replacement in RENAMED.items():
            new = new.replace(old, replacement)
        found[new.replace("img_attn.norm", "norm") if new.startswith("single") else new] = value
    return {name: value for name, value in found.items() if "transformer_blocks" not in name}


class Holder:
    """As much of a pipeline as the export asks for."""

    def __init__(self, kind: type[Backbone], transformer: Any):
        self.transformer, self.kind = transformer, kind
        self.vae = AutoencoderKL()

    def save_lora_weights(self, *arguments: Any, **options: Any) -> None:
        cast(Any, self.kind.pipeline_class).save_lora_weights(*arguments, **options)


def make(kind: type[Backbone], transformer: Any, targets: Any) -> Backbone:
    """A backbone with a random LoRA of alpha twice its rank."""
    transformer.requires_grad_(False).eval()
    backbone = kind(Holder(kind, transformer), 0)
    transformer.add_adapter(backbone.adapter(targets, 4, 8))
    with torch.no_grad():
        for name, value in transformer.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.05)
    return backbone


@torch.no_grad()
def test_sd3(comfy_sd: Any, tmp_path: Path, subtests: Any) -> None:
    x, sigma = torch.randn(2, 16, 8, 8), torch.full((2,), 0.6)
    context, pooled = torch.randn(2, 7, 48), torch.randn(2, 40)
    for dual in ((), (0,)):
        for targets in TARGETS:
            with subtests.test(dual=dual, targets=targets):
                torch.manual_seed(0)
                transformer = sd3(dual)
                plain = {key: value.clone() for key, value in transformer.state_dict().items()}
                backbone = make(SD3Backbone, transformer, targets)

                def ours(network: Any = transformer) -> Tensor:
                    return network(x, context, pooled, 1000 * sigma, return_dict=False)[0]

                def theirs(network: Any) -> Tensor:
                    return network(x, timesteps=1000 * sigma, context=context, y=pooled)

                compare(comfy_sd, backbone, plain, ours, theirs, tmp_path / f"{targets}{len(dual)}")


@pytest.mark.parametrize("targets", TARGETS)
@torch.no_grad()
def test_flux(comfy_sd: Any, tmp_path: Path, targets: str) -> None:
    torch.manual_seed(0)
    transformer = flux()
    plain = {key: value.clone() for key, value in transformer.state_dict().items()}
    backbone = make(FluxBackbone, transformer, targets)
    x, sigma = torch.randn(1, 16, 8, 8), torch.full((1,), 0.6)
    context, pooled, guidance = torch.randn(1, 7, 4096), torch.randn(1, 768), torch.full((1,), 3.5)

    def ours() -> Tensor:
        output = transformer(
            hidden_states=pack(x),
            timestep=sigma,
            guidance=guidance,
            encoder_hidden_states=context,
            pooled_projections=pooled,
            txt_ids=torch.zeros(7, 3),
            img_ids=image_ids(4, 4),
            return_dict=False,
        )[0]
        return unpack(output, 4, 4)

    def theirs(network: Any) -> Tensor:
        return network(x, timestep=sigma, context=context, y=pooled, guidance=guidance)

    compare(comfy_sd, backbone, plain, ours, theirs, tmp_path)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "klein"])
@torch.no_grad()
def test_flux2(comfy_sd: Any, tmp_path: Path, targets: str, guidance: bool) -> None:
    """The two keys of a layer in diffusers' names become a slice of ComfyUI's fused q, k, v."""
    from comfy import model_base  # type: ignore[import-not-found]

    if not hasattr(model_base, "Flux2"):
        pytest.skip("this ComfyUI does not know FLUX.2")
    torch.manual_seed(0)
    transformer = flux2(guidance)
    plain = {key: value.clone() for key, value in transformer.state_dict().items()}
    backbone = make(Flux2Backbone, transformer, targets)
    x, sigma = torch.randn(1, 128, 4, 6), torch.full((1,), 0.6)
    context, scale = torch.randn(1, 7, 48), torch.full((1,), 3.5) if guidance else None

    def ours() -> Tensor:
        output = transformer(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=sigma,
            guidance=scale,
            encoder_hidden_states=context,
            txt_ids=positions(1, 1, 7),
            img_ids=positions(4, 6, 1),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).unflatten(2, (4, 6))

    def theirs(network: Any) -> Tensor:
        return network(x, timestep=sigma, context=context, guidance=scale)

    compare(comfy_sd, backbone, plain, ours, theirs, tmp_path, original(plain))


@pytest.mark.parametrize("targets", TARGETS)
@torch.no_grad()
def test_qwen(comfy_sd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: str) -> None:
    import comfy.supported_models  # type: ignore[import-not-found]

    # ComfyUI takes the number of blocks alone from a file; these are otherwise its defaults.
    sizes = {
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)
    }  # fmt: skip
    monkeypatch.setattr(comfy.supported_models.QwenImage, "unet_extra_config", sizes)
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(num_layers=2, **cast(Any, sizes))
    plain = {key: value.clone() for key, value in transformer.state_dict().items()}
    backbone = make(QwenImageBackbone, transformer, targets)
    x, sigma, context = torch.randn(2, 16, 8, 8), torch.full((2,), 0.6), torch.randn(2, 7, 32)

    def ours() -> Tensor:
        output = transformer(
            hidden_states=pack(x),
            timestep=sigma,
            encoder_hidden_states=context,
            img_shapes=[[(1, 4, 4)]] * 2,
            return_dict=False,
        )[0]
        return unpack(output, 4, 4)

    def theirs(network: Any) -> Tensor:
        return network(x[:, :, None], sigma, context)[:, :, 0]

    compare(comfy_sd, backbone, plain, ours, theirs, tmp_path)


def compare(
    comfy_sd: Any,
    backbone: Backbone,
    plain: dict[str, Tensor],
    ours: Any,
    theirs: Any,
    folder: Path,
    readable: dict[str, Tensor] | None = None,
) -> None:
    """The base alike in both, ComfyUI's own file of it read back, and with the exported LoRA alike again.

    `readable` are the base's weights as ComfyUI reads them, if it cannot read them in diffusers' names.
    """
    assert export_lora(backbone, folder, {})
    with_lora = ours()
    backbone.transformer.disable_adapters()
    without = ours()
    # The loader changes tensors in place.
    weights = {key: value.clone() for key, value in (readable or plain).items()}
    patcher = comfy_sd.load_diffusion_model_state_dict(weights)
    assert patcher is not None
    patcher.model.diffusion_model.float()
    torch.testing.assert_close(theirs(patcher.model.diffusion_model), without, atol=1e-4, rtol=1e-3)
    single = folder / "single.safetensors"
    written = {key: value.contiguous() for key, value in patcher.model.diffusion_model.state_dict().items()}
    save_file(written, single)
    backbone.transformer.save_config(folder / "transformer")
    options = LoadOptions(torch.float32, torch.device("cpu"), 0, transformer=single)
    read = backbone.load_transformer(folder, options).state_dict()
    assert read.keys() == plain.keys() and all(torch.equal(read[key], plain[key]) for key in read)
    single.unlink()
    file = load_file(folder / "pytorch_lora_weights.safetensors")
    patched, _ = comfy_sd.load_lora_for_models(patcher, None, file, 1.0, 0.0)
    # Every pair found its weight.
    assert sum(len(value) for value in patched.patches.values()) == len(file) // 2
    patched.patch_model()
    torch.testing.assert_close(theirs(patched.model.diffusion_model), with_lora, atol=1e-4, rtol=1e-3)
    assert (with_lora - without).abs().max() > 0.01
