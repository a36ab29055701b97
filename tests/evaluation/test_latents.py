"""Latents of pictures, as the denoiser sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import constants

from tmpo_trainer import diversity
from tmpo_trainer.backbones import DEMO_MODEL
from tmpo_trainer.backbones.base import LoadOptions
from tmpo_trainer.backbones.sd3 import SD3Backbone
from tmpo_trainer.evaluation.held_out import Sampling, sample
from tmpo_trainer.evaluation.latents import LatentEncoder
from tmpo_trainer.settings.errors import ConfigError

CPU = torch.device("cpu")


def test_decoded_latents_come_back() -> None:
    """Latents that the demo model drew, as pictures of 8 bits, encoded again: nearly the same ones with nearly their LGMD.

    On another scale LGMD would be off by the log of it, .43.
    """
    backbone = SD3Backbone.load(DEMO_MODEL, LoadOptions(torch.float32, CPU, 0))
    how = Sampling(12, 0, 1.0, (64, 64))
    ((latents, pictures),) = sample(backbone, ["two red circles"], 6, how)
    found = LatentEncoder("demo", CPU)(pictures[0])
    assert found.shape == latents[0].shape and found.dtype == torch.float32
    assert (found - latents[0]).std() < 0.5 * latents[0].std()
    assert diversity.lgmd(found).item() == pytest.approx(diversity.lgmd(latents[0]).item(), abs=0.08)


@pytest.mark.parametrize("dev", [True, False])
def test_shift_and_scale_are_the_models(tiny_flux: Callable[[bool], Path], dev: bool) -> None:
    """And pictures are encoded as one by one, whatever their number."""
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    folder = tiny_flux(dev)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        expected = (vae.encode(pixels).latent_dist.mean - 0.1159) * 0.3611
    found = LatentEncoder(str(folder), CPU)(images, batch=2)
    assert found.shape == (5, 16, 4, 6)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_what_cannot_be_had_is_one_line(
    tiny_flux2: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="model owner/name is not in the hub cache"):
        LatentEncoder("owner/name", CPU)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ConfigError, match=r"--vae: .* cannot be loaded"):
        LatentEncoder(str(tmp_path), CPU)
    with pytest.raises(ConfigError, match="has an AutoencoderKLFlux2, not an AutoencoderKL"):
        LatentEncoder(str(tiny_flux2("base")), CPU)
    with pytest.raises(ConfigError, match="multiples of 8, not 60x64"):
        LatentEncoder("demo", CPU).check_size(60, 64)
