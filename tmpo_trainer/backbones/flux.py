"""FLUX.1 over diffusers' `FluxPipeline`: dev, Krea-dev and schnell; and Kontext-dev, which then gets no picture to edit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from .. import tree
from ..settings.config import LoraTargets
from ..settings.errors import ConfigError
from .base import ATTENTION, FEED_FORWARD, TEXT_STREAM, Backbone, rows_per_prompt
from .text import Conditioning, stack


class PackedBackbone(Backbone):
    """A model whose network takes a latent in patches of 2x2, with sigmas that are shifted by the number of patches.

    Latents are not packed: `[C, H / 8, W / 8]`.
    """

    patch_channels = 4

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height, width of a picture's latent. Raises ValueError for a size that does not fit."""
        factor = self.pipeline.vae_scale_factor
        if height % (2 * factor) or width % (2 * factor) or min(height, width) <= 0:
            raise ValueError(f"resolution {height}x{width} must be a multiple of {2 * factor} in both directions")
        return self.transformer.config.in_channels // self.patch_channels, height // factor, width // factor

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """Sigmas `[num_steps + 1]` from 1 to 0, by the pipeline's own scheduler (FLUX.1-schnell's does not shift them)."""
        _, rows, columns = self.latent_shape(height, width)
        start = np.linspace(1.0, 1 / num_steps, num_steps)
        return self.shifted_sigmas(num_steps, (rows // 2) * (columns // 2), 1.15, start)


class FluxBackbone(PackedBackbone):
    """Latents are not packed: `[16, H / 8, W / 8]`. The text features are T5's tokens `[S, D]` and CLIP's pooled `[C]`."""

    family = "FLUX"
    pipeline_class = FluxPipeline
    transformer_class = FluxTransformer2DModel
    chooses_attention = True
    other_scaling_factors: ClassVar = {"SD3": 1.5305}
    #: q, k, v have the same names in the single-stream blocks as in the joint blocks.
    lora_targets: ClassVar = {
        "paper": (*ATTENTION, *FEED_FORWARD),
        "attention": ATTENTION,
        "text": TEXT_STREAM,
        "all-linear": (*ATTENTION, *FEED_FORWARD, "proj_mlp", "proj_out"),
    }

    @property
    def name(self) -> str:
        """What kind of model it is, for people. FLUX.1-Krea-dev has the configs of FLUX.1-dev."""
        return "FLUX.1-dev" if self.transformer.config.guidance_embeds else "FLUX.1-schnell"

    @property
    def architecture(self) -> str:
        """The name that modelspec metadata gives this kind of model. Those derived from FLUX.1-dev share its name."""
        return "flux-1-dev" if self.transformer.config.guidance_embeds else "flux-1-schnell"

    @property
    def few_steps(self) -> bool:
        """Whether the model was distilled to draw in a few steps, see `Backbone`: FLUX.1-schnell."""
        return not self.transformer.config.guidance_embeds

    @classmethod
    def single_file(cls, file: Path) -> str | dict[str, Tensor]:
        """What diffusers' `from_single_file` takes: a path, or the tensors if names must change first.

        Newer ComfyUI (0.33) names the query and key norms `weight` in the files it saves; diffusers knows `scale`.
        """
        with safe_open(file, "pt") as opened:
            if not any(name.endswith("query_norm.weight") for name in opened.keys()):  # noqa: SIM118
                return super().single_file(file)
        return {re.sub(r"(query|key)_norm\.weight$", r"\1_norm.scale", k): v for k, v in load_file(file).items()}

    def check_single_file(self, where: str, names: Sequence[str]) -> None:
        """FLUX.1-dev has weights for guidance, FLUX.1-schnell has none. Raises ConfigError if model and file differ."""
        guided = any("guidance_in." in name or "guidance_embedder." in name for name in names)
        if guided != self.transformer.config.guidance_embeds:
            kind = "FLUX.1-dev" if guided else "FLUX.1-schnell"
            raise ConfigError(
                f"{where} is from {kind}, but the model is {self.name}: give the model that it belongs to"
            )

    def adapter(self, targets: LoraTargets, rank: int, alpha: float) -> LoraConfig:
        """The LoRA of a run, as peft's config."""
        config = super().adapter(targets, rank, alpha)
        if "proj_out" in self.lora_targets[targets]:
            # The model's last layer has the same name as one in the single blocks. peft matches patterns with whole names.
            config.exclude_modules = "proj_out"
        return config

    @staticmethod
    def encode_prompts(
        pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int
    ) -> list[Conditioning]:
        """The features of each prompt, by the pipeline's text encoders."""
        tokens, pooled, _ = pipeline.encode_prompt(
            prompt=prompts, prompt_2=prompts, device=device, max_sequence_length=max_sequence_length
        )
        return [{"tokens": tokens[i], "pooled": pooled[i]} for i in range(len(prompts))]

    def blank_conditioning(self, folder: Path) -> Conditioning:
        """Made-up features of a prompt, in the shapes and precision of real ones: for the memory estimate."""
        config, dtype = self.transformer.config, self.dtype
        return {
            "tokens": torch.empty(self.max_sequence_length, config.joint_attention_dim, dtype=dtype),
            "pooled": torch.empty(config.pooled_projection_dim, dtype=dtype),
        }

    def velocity(self, prompts: Sequence[str], guidance: float) -> tree.Velocity:
        """The velocity for rows whose prompts repeat in the order given: row r belongs to prompts[r % len(prompts)].

        `guidance` is an input of the network (distilled); FLUX.1-schnell has none.
        """
        text = stack(self.encode(prompts))
        dtype = self.dtype
        text_ids = torch.zeros(text["tokens"].shape[1], 3, device=self.device, dtype=dtype)

        @cache
        def ids(rows: int, columns: int) -> Tensor:
            return image_ids(rows, columns).to(self.device, dtype)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            times = rows_per_prompt(len(x), len(prompts))
            rows, columns = x.shape[2] // 2, x.shape[3] // 2
            scale = x.new_full((len(x),), guidance, dtype=torch.float32)
            output = self.transformer(
                hidden_states=pack(x).to(dtype),
                # FLUX takes 0..1 and multiplies by 1000 itself.
                timestep=sigma,
                guidance=scale if self.transformer.config.guidance_embeds else None,
                encoder_hidden_states=tree.tile(text["tokens"], times),
                pooled_projections=tree.tile(text["pooled"], times),
                txt_ids=text_ids,
                img_ids=ids(rows, columns),
                return_dict=False,
            )[0]
            return unpack(output, rows, columns)

        return velocity


class KontextBackbone(FluxBackbone):
    """FLUX.1-Kontext-dev, a FLUX.1-dev that may also get a picture. Here it gets none and draws from the prompt alone."""

    pipeline_class = FluxKontextPipeline

    @property
    def name(self) -> str:
        """What kind of model it is, for people."""
        return "FLUX.1-Kontext-dev"


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


PIPELINES = {"FluxPipeline": FluxBackbone, "FluxKontextPipeline": KontextBackbone}
