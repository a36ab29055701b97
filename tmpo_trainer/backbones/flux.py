"""FLUX.1 over diffusers' `FluxPipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from .. import tree
from .base import ATTENTION, FEED_FORWARD, TEXT_STREAM, Backbone, rows_per_prompt


class FluxBackbone(Backbone):
    pipeline_class = FluxPipeline
    transformer_class = FluxTransformer2DModel
    patch_channels = 4
    t5 = "text_encoder_2"
    #: q, k, v of the single-stream blocks have the names of those of the joint blocks.
    lora_targets: ClassVar = {
        "paper": (*ATTENTION, *FEED_FORWARD),
        "attention": ATTENTION,
        "text": TEXT_STREAM,
        "all-linear": (*ATTENTION, *FEED_FORWARD, "proj_mlp", "proj_out"),
    }
    default_max_shift = 1.15

    @property
    def architecture(self) -> str:
        """The name that modelspec metadata gives this kind of model."""
        return "flux-1-dev" if self.transformer.config.guidance_embeds else "flux-1-schnell"

    @staticmethod
    def _encode(
        pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int
    ) -> tuple[Tensor, Tensor]:
        tokens, pooled, _ = pipeline.encode_prompt(
            prompt=prompts, prompt_2=prompts, device=device, max_sequence_length=max_sequence_length
        )
        return tokens, pooled

    @classmethod
    def text_tokens(cls, folder: Path, max_sequence_length: int) -> int:
        """How many tokens the transformer gets for a prompt: those of T5."""
        return max_sequence_length

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height, width of a picture's latent. Raises ValueError for a size that does not fit."""
        factor = self.pipeline.vae_scale_factor
        if height % (2 * factor) or width % (2 * factor) or min(height, width) <= 0:
            raise ValueError(f"resolution {height}x{width} must be a multiple of {2 * factor} in both directions")
        return self.transformer.config.in_channels // self.patch_channels, height // factor, width // factor

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """`[num_steps + 1]`, from 1 to 0, of the pipeline's own scheduler (FLUX.1-dev: shifted by the picture's size)."""
        return self._sigmas(num_steps, height, width, np.linspace(1.0, 1 / num_steps, num_steps))

    def velocity(self, prompts: Sequence[str], guidance: float) -> tree.Velocity:
        """The velocity for rows whose prompts repeat in the order given: row r is of prompts[r % len(prompts)].

        `guidance` is an input of the network (distilled); FLUX.1-schnell has none.
        """
        text = self.encode(prompts)
        dtype = self.transformer.dtype
        text_ids = torch.zeros(text.tokens.shape[1], 3, device=self.device, dtype=dtype)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            times = rows_per_prompt(len(x), len(prompts))
            rows, columns = x.shape[2] // 2, x.shape[3] // 2
            scale = x.new_full((len(x),), guidance, dtype=torch.float32)
            output = self.transformer(
                hidden_states=pack(x).to(dtype),
                # FLUX takes 0..1 and multiplies by 1000 itself.
                timestep=sigma,
                guidance=scale if self.transformer.config.guidance_embeds else None,
                encoder_hidden_states=tree.tile(text.tokens, times),
                pooled_projections=tree.tile(text.pooled, times),
                txt_ids=text_ids,
                img_ids=image_ids(rows, columns).to(self.device, dtype),
                return_dict=False,
            )[0]
            return unpack(output, rows, columns)

        return velocity


def pack(latents: Tensor) -> Tensor:
    """Latents `[N, C, H, W]` -> tokens of 2x2 patches `[N, H W / 4, 4 C]`."""
    patches = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack`: `[N, rows columns, 4 C]` -> `[N, C, 2 rows, 2 columns]`."""
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, columns))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def image_ids(rows: int, columns: int) -> Tensor:
    """Positions of the patches, `[rows columns, 3]`: 0, row, column."""
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(grid[0]), *grid], -1).flatten(0, 1).float()
