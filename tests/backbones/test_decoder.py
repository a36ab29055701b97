"""The decoder that a CPU uses, against diffusers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tmpo_trainer.backbones.base import Backbone


@torch.no_grad()
def counted(decode: Callable[[Tensor], Any], latents: Tensor) -> tuple[Any, int]:
    with FlopCounterMode(display=False) as counter:
        return decode(latents), counter.get_total_flops()


def test_the_same_pictures_for_less_arithmetic(load: Callable[[], Backbone], tiny_model: Path) -> None:
    latents = torch.randn(3, 16, 6, 4, generator=torch.Generator().manual_seed(0))
    backbone, own = load(), AutoencoderKL.from_pretrained(tiny_model, subfolder="vae")
    expected, whole = counted(lambda z: own.decode(z).sample, backbone.unscale(latents))
    found, less = counted(backbone.vae_pixels, backbone.unscale(latents))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert less < 0.9 * whole
    # The network's own numbers are not those of a constant picture, where all sums of weights would do.
    assert expected.std() > 0.01
    rounded = ((expected / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(backbone.decode(latents, 2) - rounded).max() <= 1


def test_a_cpu_decodes_few_pictures_at_once(load: Callable[[], Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, sizes = load(), []
    whole = backbone.vae_pixels

    def counted_pixels(unscaled: Tensor) -> Tensor:
        sizes.append(len(unscaled))
        return whole(unscaled)

    monkeypatch.setattr(backbone, "vae_pixels", counted_pixels)
    assert backbone.decode(torch.zeros(11, 16, 8, 8), 64).shape == (11, 64, 64, 3)
    backbone.decode(torch.zeros(3, 16, 8, 8), 2)
    assert sorted(sizes) == [1, 2, 3, 8]


def test_threads_share_the_parts_and_are_as_many_as_before(
    load: Callable[[], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, latents = load(), torch.randn(20, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, before, counts = backbone.vae_pixels, torch.get_num_threads(), []

    def counted_pixels(unscaled: Tensor) -> Tensor:
        counts.append(torch.get_num_threads())
        return whole(unscaled)

    try:
        torch.set_num_threads(1)
        alone = backbone.decode(latents, 8)
        torch.set_num_threads(2)
        monkeypatch.setattr(backbone, "vae_pixels", counted_pixels)
        assert (backbone.decode(latents, 16) == alone).all()
        assert counts == [1, 1, 1] and torch.get_num_threads() == 2
        # Two calls at once would be more than the caller allows.
        backbone.decode(latents, 8)
        assert counts[3:] == [2, 2, 2]
        with pytest.raises(ValueError, match="not finite"):
            backbone.decode(latents * torch.inf, 16)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
