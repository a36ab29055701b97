"""Latents of pictures, for the diversity measures in latent space."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backbones import find_model, is_hub_id
from ..hub import hub_file, readable_errors
from ..settings.errors import ConfigError

#: The weights of a VAE inside a model's folder or hub repository.
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


class LatentEncoder:
    """Encodes pictures into the latents that a model's denoiser sees. It loads only the model's VAE.

    Args:
        model: `demo`, a diffusers pipeline folder or a hub id. device: where it runs, in float32.

    Raises:
        ConfigError: the model does not exist, or its VAE cannot be loaded.
    """

    def __init__(self, model: str, device: torch.device):
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        folder = find_model(model, weights=False) / "vae"
        if is_hub_id(model):
            folder = hub_file(f"--vae {model}", model, WEIGHTS, "--vae FOLDER").parent
        with readable_errors("--vae", folder):
            settings: Any = AutoencoderKL.load_config(folder, local_files_only=True)
            kind = settings.get("_class_name")
            if kind != AutoencoderKL.__name__:
                raise ConfigError(
                    f"--vae {model} has an {kind}, not an {AutoencoderKL.__name__}: give a FLUX.1 or SD3.5 model"
                )
            vae: Any = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
        self.vae, self.device = vae.eval().requires_grad_(False).to(device), device
        #: Pixels per latent along a side.
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)

    def check_size(self, width: int, height: int) -> None:
        """Raises ConfigError for a picture whose edges would be cut off."""
        if width % self.factor or height % self.factor:
            raise ConfigError(f"the VAE encodes sides that are multiples of {self.factor}, not {width}x{height}")

    @torch.no_grad()
    def __call__(self, images: np.ndarray, batch: int = 4) -> Tensor:
        """uint8 RGB `[N, H, W, 3]` -> the posterior's mean, shifted and scaled, float32 `[N, C, h, w]` on the CPU."""
        parts = []
        for i in range(0, len(images), batch):
            pixels = torch.from_numpy(np.array(images[i : i + batch])).to(self.device).permute(0, 3, 1, 2).float()
            mean = self.vae.encode(pixels / 127.5 - 1).latent_dist.mode()
            parts.append(((mean - self.vae.config.shift_factor) * self.vae.config.scaling_factor).cpu())
        return torch.cat(parts)
