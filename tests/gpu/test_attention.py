"""On a GPU: the gradient that training takes through attention is that of torch's plain implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import random_model
from tmpo_trainer.backbones.base import Backbone
from tmpo_trainer.backbones.flux import FluxBackbone
from tmpo_trainer.backbones.sd3 import SD3Backbone
from tmpo_trainer.lora import adapter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
TOKENS, SIDE, BATCH = 256, 32, 4


def inputs(flux: bool) -> dict[str, Any]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    time = torch.full((BATCH,), 0.5, device="cuda", dtype=torch.bfloat16)
    if not flux:
        latents, text, pooled = (
            normal(BATCH, 16, 2 * SIDE, 2 * SIDE),
            normal(BATCH, TOKENS + 77, 4096),
            normal(BATCH, 2048),
        )
        return {"hidden_states": latents, "encoder_hidden_states": text, "pooled_projections": pooled, "timestep": time}
    ids = torch.cartesian_prod(torch.zeros(1), *[torch.arange(float(SIDE))] * 2).cuda()
    return {
        "hidden_states": normal(BATCH, SIDE * SIDE, 64), "encoder_hidden_states": normal(BATCH, TOKENS, 4096),
        "pooled_projections": normal(BATCH, 768), "timestep": time, "guidance": torch.full((BATCH,), 3.5, device="cuda"),
        "img_ids": ids, "txt_ids": torch.zeros(TOKENS, 3, device="cuda"),
    }  # fmt: skip


@pytest.mark.parametrize("family", [FluxBackbone, SD3Backbone])
def test_gradients_are_those_of_plain_attention(family: type[Backbone]) -> None:
    """Sequences and heads of the real models, few blocks."""
    flux = family is FluxBackbone
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            network = random_model.flux_transformer([1, 2], 24) if flux else random_model.sd35m_transformer([2], 24)
    finally:
        torch.set_default_dtype(torch.float32)
    network.requires_grad_(False)
    targets = list(family.lora_targets["paper"])
    adapter.attach(network, adapter.LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False))
    given, into = inputs(flux), None

    def gradient() -> torch.Tensor:
        nonlocal into
        output = network(**given, return_dict=False)[0]
        into = torch.randn_like(output) if into is None else into
        output.backward(into)
        parts = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        network.zero_grad()
        return torch.cat(parts)

    own = gradient()
    with sdpa_kernel(SDPBackend.MATH):
        plain = gradient()
    assert (own - plain).norm() < 0.05 * plain.norm()
