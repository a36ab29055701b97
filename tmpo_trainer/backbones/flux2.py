"""FLUX.2: [dev] over diffusers' `Flux2Pipeline`, [klein] and its base models over `Flux2KleinPipeline`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from peft import LoraConfig
from torch import Tensor
from transformers import AutoConfig

from .. import tree
from ..settings.config import LoraTargets
from ..settings.errors import ConfigError
from .base import ATTENTION, TEXT_ATTENTION, Backbone, rows_per_prompt
from .text import Conditioning, stack

#: The double-stream blocks' feed-forward layers. The attention's names are those of FLUX.1.
TEXT_FEED_FORWARD = ("ff_context.linear_in", "ff_context.linear_out")
FEED_FORWARD = ("ff.linear_in", "ff.linear_out", *TEXT_FEED_FORWARD)
#: A single-stream block has two layers: q, k, v and the feed-forward's input in one, both outputs in the other.
SINGLE_IN, SINGLE_OUT = "attn.to_qkv_mlp_proj", "attn.to_out"
#: Layers of the text encoder whose outputs are the features of a token, side by side.
TEXT_LAYERS = 3


class Flux2Backbone(Backbone):
    """FLUX.2 [dev]. Latents are what the ODE moves, in ComfyUI's layout: patches of 2x2, normalised, `[128, H / 16, W / 16]`.

    The text features are tokens `[S, D]`, padded to the same length for every prompt. The network reads the padding, too.
    """

    family = "FLUX.2"
    pipeline_class = Flux2Pipeline
    transformer_class = Flux2Transformer2DModel
    vae_class = AutoencoderKLFlux2
    chooses_attention = True
    #: As for FLUX.1, `attention` and `paper` include q, k, v of the single-stream blocks. Here they come with the
    #: feed-forward's input, which is in the same layer.
    lora_targets: ClassVar = {
        "paper": (*ATTENTION, SINGLE_IN, *FEED_FORWARD),
        "attention": (*ATTENTION, SINGLE_IN),
        "text": (*TEXT_ATTENTION, *TEXT_FEED_FORWARD),
        "all-linear": (*ATTENTION, SINGLE_IN, SINGLE_OUT, *FEED_FORWARD),
    }

    @property
    def architecture(self) -> str:
        """The name that modelspec metadata gives this kind of model."""
        return "Flux.2-dev"

    @property
    def classifier_free(self) -> bool:
        """Whether guidance takes a second evaluation, of the empty prompt. In [dev] it is an input of the network."""
        return False

    def check_vae(self, model: str) -> None:
        """Checks that the VAE fits the transformer. Raises a ConfigError that begins with the model's name."""
        config, wanted = self.vae.config, self.transformer.config.in_channels
        patch = math.prod(config.patch_size)
        if patch != 4 or config.latent_channels * patch != wanted:
            raise ConfigError(
                f"model {model}: its VAE makes {config.latent_channels} channels in patches of "
                f"{'x'.join(map(str, config.patch_size))}, its transformer takes {wanted / 4:g} in patches of 2x2: the VAE "
                "belongs to another model; take both from the same one"
            )

    def adapter(self, targets: LoraTargets, rank: int, alpha: float) -> LoraConfig:
        """The LoRA of a run, as peft's config."""
        config = super().adapter(targets, rank, alpha)
        if SINGLE_OUT in self.lora_targets[targets]:
            # In the double-stream blocks a list of layers has the same name, which peft would refuse.
            others = [name for name in self.lora_targets[targets] if name != SINGLE_OUT]
            blocks = range(self.transformer.config.num_single_layers)
            config.target_modules = [*others, *(f"single_transformer_blocks.{i}.{SINGLE_OUT}" for i in blocks)]
        return config

    @staticmethod
    def encode_prompts(
        pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int
    ) -> list[Conditioning]:
        """The features of each prompt, by the pipeline's text encoder."""
        tokens, _ = pipeline.encode_prompt(prompt=prompts, device=device, max_sequence_length=max_sequence_length)
        return [{"tokens": row} for row in tokens]

    def blank_conditioning(self, folder: Path) -> Conditioning:
        """Made-up features of a prompt, in the shapes and precision of real ones: for the memory estimate.

        Raises:
            ConfigError: the text encoder is that of another model.
        """
        if not self.max_sequence_length:
            raise ConfigError(f"--max-sequence-length 0: {self.family} needs the prompt's tokens, give 512")
        encoder = folder / "text_encoder"
        width = TEXT_LAYERS * AutoConfig.from_pretrained(encoder, local_files_only=True).get_text_config().hidden_size
        wanted = self.transformer.config.joint_attention_dim
        if width != wanted:
            raise ConfigError(
                f"model: {encoder} makes features of {width} numbers, the transformer takes {wanted}: the text encoder belongs "
                "to another model; take both from the same one"
            )
        return {"tokens": torch.empty(self.max_sequence_length, width, dtype=self.dtype)}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height, width of a picture's latent. Raises ValueError for a size that does not fit."""
        unit = 2 * self.pipeline.vae_scale_factor
        if height % unit or width % unit or min(height, width) <= 0:
            raise ValueError(f"resolution {height}x{width} must be a multiple of {unit} in both directions")
        return self.transformer.config.in_channels, height // unit, width // unit

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """Sigmas `[num_steps + 1]` from 1 to 0, by the pipeline's own scheduler, shifted by picture size and steps."""
        _, rows, columns = self.latent_shape(height, width)
        scheduler = self.pipeline.scheduler.from_config(self.pipeline.scheduler.config)
        shift = compute_empirical_mu(rows * columns, num_steps)
        scheduler.set_timesteps(num_steps, sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=shift)
        return scheduler.sigmas.float().cpu()

    def velocity(self, prompts: Sequence[str], guidance: float) -> tree.Velocity:
        """The velocity for rows whose prompts repeat in the order given: row r belongs to prompts[r % len(prompts)].

        With `classifier_free`, guidance above 1 evaluates the empty prompt too: in the same call, or in another with
        `split_guidance`.
        """
        text = stack(self.encode(prompts))["tokens"]
        empty = stack(self.encode([""]))["tokens"] if self.classifier_free and guidance > 1 else None
        dtype, guided = self.dtype, self.transformer.config.guidance_embeds
        text_ids = positions(1, 1, text.shape[1]).to(self.device)

        @cache
        def ids(rows: int, columns: int) -> Tensor:
            return positions(rows, columns, 1).to(self.device)

        def network(x: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
            rows, columns = x.shape[2:]
            output = self.transformer(
                hidden_states=x.flatten(2).transpose(1, 2).to(dtype),
                # FLUX takes 0..1 and multiplies by 1000 itself.
                timestep=sigma,
                guidance=x.new_full((len(x),), guidance, dtype=torch.float32) if guided else None,
                encoder_hidden_states=tokens,
                txt_ids=text_ids,
                img_ids=ids(rows, columns),
                return_dict=False,
            )[0]
            return output.transpose(1, 2).unflatten(2, (rows, columns))

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            tokens = tree.tile(text, rows_per_prompt(len(x), len(prompts)))
            if empty is None:
                return network(x, sigma, tokens)
            none = empty.expand_as(tokens)
            if self.split_guidance:
                without, with_text = network(x, sigma, none), network(x, sigma, tokens)
            else:
                both = torch.cat([none, tokens])
                without, with_text = network(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
            return without + guidance * (with_text - without)

        return velocity

    def scale(self, encoded: Tensor) -> Tensor:
        """The inverse of `unscale`: `[N, 32, 2 h, 2 w]` -> `[N, 128, h, w]`."""
        mean, std = self._norm()
        patches = encoded.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
        return (patches - mean) / std

    def unscale(self, latents: Tensor) -> Tensor:
        """Latents `[N, 128, h, w]` as the VAE takes them, in its precision: `[N, 32, 2 h, 2 w]`."""
        mean, std = self._norm()
        patches = (latents.to(self.vae.dtype) * std + mean).unflatten(1, (-1, 2, 2))
        return patches.permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)

    def _norm(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every channel of a patch, from the VAE's batch norm: `[1, 128, 1, 1]` each."""
        norm = self.vae.bn
        return norm.running_mean.view(1, -1, 1, 1), torch.sqrt(norm.running_var + norm.eps).view(1, -1, 1, 1)


class Flux2KleinBackbone(Flux2Backbone):
    """FLUX.2 [klein] in both sizes: the base models, and those distilled to a few steps, which take no guidance."""

    pipeline_class = Flux2KleinPipeline

    @property
    def architecture(self) -> str:
        """The name that modelspec metadata gives this kind of model: the base models have that of the distilled ones."""
        return "Flux.2-klein-9b" if self.transformer.config.num_layers == 8 else "Flux.2-klein-4b"

    @property
    def classifier_free(self) -> bool:
        """Whether guidance takes a second evaluation, of the empty prompt."""
        return not self.few_steps

    @property
    def few_steps(self) -> bool:
        """Whether the model was distilled to draw in a few steps, see `Backbone`."""
        return self.pipeline.config.is_distilled


def positions(rows: int, columns: int, layers: int) -> Tensor:
    """Positions of tokens on FLUX.2's four axes, `[rows columns layers, 4]`: 0, row, column, place in the text."""
    grid = torch.meshgrid(
        torch.arange(1), torch.arange(rows), torch.arange(columns), torch.arange(layers), indexing="ij"
    )
    return torch.stack(grid, -1).flatten(0, 3)


PIPELINES = {"Flux2KleinPipeline": Flux2KleinBackbone, "Flux2Pipeline": Flux2Backbone}
