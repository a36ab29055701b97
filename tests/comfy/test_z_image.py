"""A real ComfyUI that knows Z-Image applies our LoRA of it as diffusers does.

Needs a checkout of ComfyUI from December 2025 or later: COMFYUI_PATH=/path/to/ComfyUI pytest tests/comfy
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from tmpo_trainer.backbones.z_image import ZImageBackbone
from tmpo_trainer.lora.export import FILE_NAME, export_lora

COMFYUI = os.environ.get("COMFYUI_PATH")
pytestmark = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH names no checkout of ComfyUI")
#: The narrowest network that both programs build alike: ComfyUI rounds the feed-forward width up to a multiple of 256.
SHAPE: dict[str, Any] = {
    "dim": 1152, "n_layers": 1, "n_heads": 9, "n_kv_heads": 9, "cap_feat_dim": 64, "axes_dims": [32, 48, 48],
    "axes_lens": [256, 32, 32], "rope_theta": 256.0, "qk_norm": True, "in_channels": 16,
}  # fmt: skip


@pytest.fixture
def comfy_sd() -> Iterator[Any]:
    """ComfyUI's loader, on the CPU."""
    sys.path.insert(0, str(COMFYUI))
    from comfy.cli_args import args  # type: ignore[import-not-found]

    args.cpu = True
    import comfy.sd  # type: ignore[import-not-found]
    import comfy.utils  # type: ignore[import-not-found]

    if "z_image_to_diffusers" not in vars(comfy.utils):
        pytest.skip("this ComfyUI does not know Z-Image")
    yield comfy.sd
    sys.path.remove(str(COMFYUI))


def network(comfy_sd: Any, state: dict[str, Tensor]) -> Any:
    """ComfyUI's model of a state in diffusers' names. Its detection knows Z-Image in its full width alone."""
    import comfy.model_detection  # type: ignore[import-not-found]
    import comfy.model_patcher  # type: ignore[import-not-found]
    import comfy.supported_models  # type: ignore[import-not-found]

    own = {
        "image_model": "lumina2", "patch_size": 2, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True,
        "time_scale": 1000.0, "pad_tokens_multiple": 32,
    }  # fmt: skip
    config = comfy.supported_models.ZImage({**SHAPE, **own})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(state, "")
    named = comfy.model_detection.convert_diffusers_mmdit(state, "")
    assert not model.diffusion_model.load_state_dict(named, strict=False).unexpected_keys
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


@torch.no_grad()
def test_a_lora_for_all_blocks(comfy_sd: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(**SHAPE).eval()
    for pad in (transformer.x_pad_token, transformer.cap_pad_token):
        pad.normal_()
    state = {key: value.clone() for key, value in transformer.state_dict().items()}
    parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None, "vae": AutoencoderKL()}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    backbone = ZImageBackbone(ZImagePipeline(scheduler=scheduler, transformer=transformer, **parts), 64)
    x, sigma, text = torch.randn(2, 16, 6, 8), torch.tensor([0.6, 0.3]), torch.randn(35, 64)
    backbone.keep("a", {"tokens": text})
    without = backbone.velocity(["a"], 0)(x, sigma)
    transformer.add_adapter(backbone.adapter("all-linear", 4, 8))
    for name, value in transformer.named_parameters():
        if "lora_B" in name:
            value.normal_(std=0.05)
    with_lora = backbone.velocity(["a"], 0)(x, sigma)
    assert (with_lora - without).abs().max() > 0.01
    export_lora(backbone, tmp_path, {})
    file = load_file(tmp_path / FILE_NAME)
    patcher = network(comfy_sd, state)

    def theirs() -> Tensor:
        return patcher.model.diffusion_model(x, sigma, text.expand(2, -1, -1), len(text))

    torch.testing.assert_close(theirs(), without, atol=1e-4, rtol=1e-3)
    patched, _ = comfy_sd.load_lora_for_models(patcher, None, file, 1.0, 0.0)
    # Every pair found its weight, or its third of one.
    assert sum(len(value) for value in patched.patches.values()) == len(file) // 2 == 5 * 7
    patched.patch_model()
    torch.testing.assert_close(theirs(), with_lora, atol=1e-4, rtol=1e-3)
