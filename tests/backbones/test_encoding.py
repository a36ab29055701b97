"""Pictures become latents in the space in which every backbone's ODE runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline

from tmpo_trainer.backbones import load_backbone
from tmpo_trainer.backbones.base import Backbone, LoadOptions

SIZE = (64, 96)


@pytest.fixture(params=["flux", "sd35", "flux2", "qwen", "z-image"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    made: dict[str, Any] = {
        "flux": lambda: request.getfixturevalue("tiny_flux")(True),
        "sd35": lambda: request.getfixturevalue("tiny_sd35"),
        "flux2": lambda: request.getfixturevalue("tiny_flux2")("base"),
        "qwen": lambda: request.getfixturevalue("tiny_qwen"),
        "z-image": lambda: request.getfixturevalue("tiny_z_image")(False),
    }
    folder: Path = made[request.param]()
    return load_backbone(str(folder), LoadOptions(torch.float32, torch.device("cpu"), 12))


@torch.no_grad()
def test_encoding_is_what_decoding_undoes(backbone: Backbone) -> None:
    latents = torch.randn(2, *backbone.latent_shape(*SIZE))
    torch.testing.assert_close(backbone.scale(backbone.unscale(latents)), latents, atol=1e-5, rtol=1e-5)
    pictures = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
    found = backbone.encode_pictures(pictures)
    assert found.shape == latents.shape and found.dtype == torch.float32
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    expected = backbone.vae_latents(pixels)
    torch.testing.assert_close(backbone.unscale(found), expected, atol=1e-5, rtol=1e-4)
    # The picture matters: its mean and another's differ.
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_it_encodes_where_the_vae_is(tiny_sd35: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With FSDP2 the transformer is elsewhere until training begins."""
    backbone = load_backbone(str(tiny_sd35), LoadOptions(torch.float32, torch.device("cpu"), 12))
    monkeypatch.setattr(type(backbone), "device", property(lambda self: torch.device("meta")))
    assert backbone.encode_pictures(np.zeros((1, *SIZE, 3), np.uint8)).device.type == "cpu"


@torch.no_grad()
def test_flux2_encodes_as_its_pipeline_does_reference_pictures(tiny_flux2: Any) -> None:
    folder = tiny_flux2("dev")
    backbone = load_backbone(str(folder), LoadOptions(torch.float32, torch.device("cpu"), 12))
    pictures = np.random.default_rng(0).integers(0, 256, (1, *SIZE, 3), np.uint8)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    expected = Flux2Pipeline.from_pretrained(folder)._encode_vae_image(pixels, torch.Generator())
    torch.testing.assert_close(backbone.encode_pictures(pictures), expected, atol=1e-5, rtol=1e-5)
