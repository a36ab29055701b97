"""Stable Diffusion 3 and 3.5, and the bundled demo model, over diffusers' `StableDiffusion3Pipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from .. import tree
from ..hub import read_json
from .base import ATTENTION, FEED_FORWARD, TEXT_STREAM, Backbone, rows_per_prompt
from .text import Conditioning, stack

#: The second attention in the first blocks of SD3.5-Medium.
SECOND_ATTENTION = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")


class SD3Backbone(Backbone):
    """Latents are `[16, H / 8, W / 8]`. The text features are tokens `[S, D]` and pooled `[C]`, the latter from CLIP alone."""

    family = "SD3"
    pipeline_class = StableDiffusion3Pipeline
    transformer_class = SD3Transformer2DModel
    other_scaling_factors: ClassVar = {"FLUX": 0.3611}
    #: T5 and its tokenizer.
    optional_parts = ("text_encoder_3", "tokenizer_3")
    #: SD3 has only joint blocks, so `all-linear` adds nothing to `paper`.
    lora_targets: ClassVar = {
        "paper": (*ATTENTION, *SECOND_ATTENTION, *FEED_FORWARD),
        "attention": (*ATTENTION, *SECOND_ATTENTION),
        "text": TEXT_STREAM,
        "all-linear": (*ATTENTION, *SECOND_ATTENTION, *FEED_FORWARD),
    }

    @property
    def name(self) -> str:
        """What kind of model it is, for people. Others than Stability AI's have other numbers of blocks."""
        config = self.transformer.config
        if config.dual_attention_layers:
            return "SD3.5-Medium"
        return {24: "SD3-Medium", 38: "SD3.5-Large"}.get(config.num_layers, self.family)

    @property
    def architecture(self) -> str:
        """The name that modelspec metadata gives this kind of model."""
        known = {"SD3.5-Medium": "stable-diffusion-v3.5-medium", "SD3.5-Large": "stable-diffusion-v3.5-large"}
        return known.get(self.name, "stable-diffusion-v3-medium")

    @classmethod
    def frees_text_encoders(cls, folder: Path) -> bool:
        """True with T5, which can be as large as the transformer itself. CLIP is small and stays loaded."""
        return (folder / "text_encoder_3").is_dir()

    @staticmethod
    def encode_prompts(
        pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int
    ) -> list[Conditioning]:
        """The features of each prompt, by the pipeline's text encoders."""
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=prompts,
            prompt_3=prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
            device=device,
        )
        return [{"tokens": tokens[i], "pooled": pooled[i]} for i in range(len(prompts))]

    def blank_conditioning(self, folder: Path) -> Conditioning:
        """Made-up features of a prompt, in the shapes and precision of real ones: for the memory estimate."""
        config, dtype = self.transformer.config, self.dtype
        settings = read_json("model", folder / "tokenizer" / "tokenizer_config.json")
        # CLIP's tokens, then T5's, or zeros in their place.
        tokens = settings["model_max_length"] + self.max_sequence_length
        return {
            "tokens": torch.empty(tokens, config.joint_attention_dim, dtype=dtype),
            "pooled": torch.empty(config.pooled_projection_dim, dtype=dtype),
        }

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
        """Sigmas `[num_steps + 1]` from 1 to 0, by the pipeline's own scheduler (SD3: shift 3)."""
        _, rows, columns = self.latent_shape(height, width)
        return self.shifted_sigmas(num_steps, (rows // 2) * (columns // 2), 1.16)

    def velocity(self, prompts: Sequence[str], guidance: float) -> tree.Velocity:
        """The velocity for rows whose prompts repeat in the order given: row r belongs to prompts[r % len(prompts)].

        Guidance above 1 evaluates the empty prompt too, with its own pooled vector: in the same call, or in another
        with `split_guidance`.
        """
        text = stack(self.encode(prompts))
        empty = stack(self.encode([""])) if guidance > 1 else None
        dtype = self.dtype

        def network(x: Tensor, sigma: Tensor, rows: Conditioning) -> Tensor:
            return self.transformer(
                hidden_states=x.to(dtype),
                # SD3 takes 0..1000, not 0..1.
                timestep=1000 * sigma,
                encoder_hidden_states=rows["tokens"],
                pooled_projections=rows["pooled"],
                return_dict=False,
            )[0]

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            times = rows_per_prompt(len(x), len(prompts))
            rows = {name: tree.tile(value, times) for name, value in text.items()}
            if empty is None:
                return network(x, sigma, rows)
            none = {name: empty[name].expand_as(value) for name, value in rows.items()}
            if self.split_guidance:
                without, with_text = network(x, sigma, none), network(x, sigma, rows)
            else:
                both = {name: torch.cat([none[name], value]) for name, value in rows.items()}
                without, with_text = network(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
            return without + guidance * (with_text - without)

        return velocity


PIPELINES = {"StableDiffusion3Pipeline": SD3Backbone}
