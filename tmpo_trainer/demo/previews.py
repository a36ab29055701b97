"""Rough pictures from the demo model's latents, for live previews: `python -m tmpo_trainer.demo.previews` fits the weights.

A step of the demo model takes less time than its VAE, so previews need something cheaper. Stable Diffusion 3's linear map from
latents to colours shows lilac noise here, because the demo VAE's latents mean something else. They are also far from linear:
the fitted linear map explains 28% of the variance of other pictures, the small network 92%.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE = Path(__file__).with_name("previews.safetensors")
#: Pixels of a preview along one latent, half of the VAE's eight.
SCALE = 4
SCENES, STEPS, BATCH, LR, SEED = 1536, 3000, 32, 4e-3, 0


class PreviewDecoder(nn.Sequential):
    """The network's latents `[n, 16, h, w]` -> colours `[n, 3, 4h, 4w]`, about -1..1."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(16, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 1),
            nn.ReLU(),
            nn.Conv2d(64, 3 * SCALE**2, 1),
            nn.PixelShuffle(SCALE),
        )


def load() -> tuple[PreviewDecoder, Tensor, Tensor]:
    """The network, and the best linear map for a ComfyUI that takes nothing else: factors `[16, 3]` and bias `[3]`."""
    state = {name: value.float() for name, value in load_file(FILE).items()}
    factors, bias = state.pop("linear.factors"), state.pop("linear.bias")
    decoder = PreviewDecoder()
    decoder.load_state_dict(state)
    return decoder.eval().requires_grad_(False), factors, bias


def linear_map(latents: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares from latents `[N, 16, h, w]` to the mean colours of their places in `pictures [N, 3, H, W]`."""
    small = nn.functional.adaptive_avg_pool2d(pictures, (latents.shape[2], latents.shape[3]))
    x, y = (each.movedim(1, -1).flatten(0, -2).double() for each in (latents, small))
    # Latents that the VAE does not use are constant. The driver gives them 0.
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    solution = torch.linalg.lstsq(torch.cat([x, ones], 1), y, rcond=1e-6, driver="gelsd").solution
    return solution[:-1].float(), solution[-1].float()


def explained(found: Tensor, expected: Tensor) -> float:
    """The share of the variance of `expected [N, 3, h, w]` within each channel that `found` explains."""
    mean = expected.mean((0, 2, 3), keepdim=True)
    return 1 - ((found - expected).square().sum() / (expected - mean).square().sum()).item()


def main() -> None:
    import numpy as np
    from diffusers import AutoencoderKL

    from . import build, domain

    vae = AutoencoderKL.from_pretrained(FILE.with_name("model") / "vae").float().eval()
    rng = np.random.default_rng(SEED)
    families = rng.choice(list(build.FAMILY_WEIGHTS), SCENES, p=list(build.FAMILY_WEIGHTS.values()))
    drawn = np.stack([domain.render(domain.sample_scene(rng, str(family)), rng) for family in families])
    latents = (build.encode(vae, drawn) - build.SD3_SHIFT) * build.SD3_SCALE
    pictures = nn.functional.avg_pool2d(build.to_tensor(drawn), 8 // SCALE)
    factors, bias = linear_map(latents, pictures)

    torch.manual_seed(SEED)
    decoder = PreviewDecoder()
    optimizer = torch.optim.Adam(decoder.parameters(), LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, STEPS)
    for step in range(STEPS):
        rows = torch.from_numpy(build.batch_indices(SEED, step, BATCH, SCENES))
        loss = (decoder(latents[rows]) - pictures[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"step {step}: {loss.item():.4f}", flush=True)
    state = {**decoder.state_dict(), "linear.factors": factors, "linear.bias": bias}
    save_file({name: value.half().contiguous() for name, value in state.items()}, FILE)


if __name__ == "__main__":
    main()
