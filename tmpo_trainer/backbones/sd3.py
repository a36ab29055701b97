"""Stable Diffusion 3 and 3.5, and the bundled demo model, over diffusers' `StableDiffusion3Pipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from tmpo_trainer import tree


@dataclass
class Encoded:
    """Text features of prompts: tokens `[P, S, D]`, pooled `[P, C]`."""

    tokens: Tensor
    pooled: Tensor


class SD3Backbone:
    """A frozen pipeline; a LoRA, if any, lives in its transformer.

    Args:
        pipeline: the loaded pipeline.
        max_sequence_length: T5 tokens (or the zero tokens that stand for them), as in the pipeline's call.
    """

    #: All attention and feed-forward projections of both streams (and of SD3.5-Medium's second attention).
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip

    def __init__(self, pipeline: StableDiffusion3Pipeline, max_sequence_length: int):
        self.pipeline = pipeline
        self.max_sequence_length = max_sequence_length
        self.transformer = pipeline.transformer
        self._encoded: dict[str, tuple[Tensor, Tensor]] = {}

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: torch.device, max_sequence_length: int) -> SD3Backbone:
        missing = [n for n in ("text_encoder_3", "tokenizer_3") if not (folder / n).is_dir()]
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            folder, dtype=dtype, local_files_only=True, **dict.fromkeys(missing)
        )
        pipeline.to(device)
        if device.type == "cpu":
            # Convolutions on a CPU are about 1.4 times faster in this layout.
            pipeline.vae.to(memory_format=torch.channels_last)
        for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            part.requires_grad_(False).eval()
        if pipeline.text_encoder_3 is not None:
            pipeline.text_encoder_3.requires_grad_(False).eval()
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline, max_sequence_length)

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Text features, computed once per prompt and kept."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        if missing:
            tokens: Tensor
            pooled: Tensor
            tokens, _, pooled, _ = self.pipeline.encode_prompt(  # pyright: ignore[reportAssignmentType]
                prompt=missing,
                prompt_2=missing,
                prompt_3=missing,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
                device=self.device,
            )
            for i, prompt in enumerate(missing):
                self._encoded[prompt] = (tokens[i], pooled[i])
        pairs = [self._encoded[prompt] for prompt in prompts]
        return Encoded(torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs]))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height, width of a picture's latent. Raises ValueError for a size that does not fit."""
        unit = self.pipeline.vae_scale_factor * self.pipeline.patch_size
        if height % unit or width % unit:
            raise ValueError(f"resolution {height}x{width} must be a multiple of {unit} in both directions")
        most = unit * self.transformer.config.pos_embed_max_size
        if not (0 < height <= most and 0 < width <= most):
            raise ValueError(
                f"resolution {height}x{width} must lie in {unit}..{most} in both directions for this model"
            )
        factor = self.pipeline.vae_scale_factor
        return self.transformer.config.in_channels, height // factor, width // factor

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """`[num_steps + 1]`, from 1 to 0, of the pipeline's own scheduler (SD3: shift 3)."""
        config = self.pipeline.scheduler.config
        scheduler = self.pipeline.scheduler.from_config(config)
        arguments: dict[str, Any] = {}
        if config.get("use_dynamic_shifting"):
            _, rows, columns = self.latent_shape(height, width)
            tokens = (rows // self.pipeline.patch_size) * (columns // self.pipeline.patch_size)
            arguments["mu"] = calculate_shift(
                tokens,
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.16),
            )
        scheduler.set_timesteps(num_steps, **arguments)
        return scheduler.sigmas.float().cpu()

    def velocity(self, prompts: Sequence[str], guidance: float) -> tree.Velocity:
        """The velocity for rows whose prompts repeat in the order given: row r is of prompts[r % len(prompts)].

        Guidance above 1 evaluates the empty prompt too, with its own pooled vector, in the same call.
        """
        text = self.encode(prompts)
        empty = self.encode([""]) if guidance > 1 else None
        dtype = self.pipeline.transformer.dtype

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            if len(x) % len(prompts):
                raise ValueError(f"{len(x)} rows do not divide into {len(prompts)} prompts")
            tokens = tree.tile(text.tokens, len(x) // len(prompts))
            pooled = tree.tile(text.pooled, len(x) // len(prompts))
            if empty is not None:
                tokens = torch.cat([empty.tokens.expand_as(tokens), tokens])
                pooled = torch.cat([empty.pooled.expand_as(pooled), pooled])
                x, sigma = torch.cat([x, x]), torch.cat([sigma, sigma])
            output = self.transformer(
                hidden_states=x.to(dtype),
                # SD3 takes 0..1000, not 0..1.
                timestep=1000 * sigma,
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
            if empty is None:
                return output
            without, with_text = output.chunk(2)
            return without + guidance * (with_text - without)

        return velocity

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int) -> np.ndarray:
        """Scaled latents `[N, C, h, w]` -> uint8 RGB `[N, H, W, 3]`, rounded as diffusers does."""
        vae = self.pipeline.vae
        images = []
        for part in latents.split(batch):
            z = part.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
            pixels = vae.decode(z, return_dict=False)[0].float()
            images.append(((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
        return torch.cat(images).numpy()
