"""Previews of the demo model: what its latents' rough pictures have in common with the decoded ones."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from tmpo_trainer.backbones import DEMO_MODEL
from tmpo_trainer.demo import build, domain, previews


@pytest.fixture(scope="module")
def decoded() -> tuple[torch.Tensor, torch.Tensor]:
    """The network's latents of scenes that were not fitted, and their pictures `[48, 3, 64, 64]`, -1..1."""
    vae = AutoencoderKL.from_pretrained(DEMO_MODEL / "vae").float().eval()
    rng = np.random.default_rng(1)
    families = [*build.FAMILY_WEIGHTS] * 10
    latents = build.encode(
        vae, np.stack([domain.render(domain.sample_scene(rng, each), rng) for each in families[:48]])
    )
    with torch.no_grad():
        return (latents - build.SD3_SHIFT) * build.SD3_SCALE, vae.decode(latents).sample


def test_the_network_shows_most_of_a_picture(decoded: tuple[torch.Tensor, torch.Tensor]):
    latents, pictures = decoded
    found = previews.load()[0](latents)
    assert found.shape == (48, 3, 32, 32)
    assert previews.explained(found, torch.nn.functional.avg_pool2d(pictures, 2)) > 0.85


def test_the_linear_map_is_that_of_least_squares(decoded: tuple[torch.Tensor, torch.Tensor]):
    """It explains far less: the latents are not linear in the colours. No other linear map explains much more."""
    latents, pictures = decoded
    small = torch.nn.functional.avg_pool2d(pictures, 8)

    def share(factors: torch.Tensor, bias: torch.Tensor) -> float:
        return previews.explained(torch.einsum("nchw,cd->ndhw", latents, factors) + bias[:, None, None], small)

    fitted, best = share(*previews.load()[1:]), share(*previews.linear_map(latents, pictures))
    assert best - 0.03 < fitted < best and fitted > 0.2
