"""Z-Image and Z-Image-Turbo over diffusers' `ZImagePipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from peft import LoraConfig
from torch import Tensor

from .. import tree
from ..settings.config import LoraTargets
from ..settings.errors import ConfigError
from .base import Backbone, rows_per_prompt
from .text import Conditioning

ATTENTION = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
#: The blocks that see only the text, before it joins the picture.
TEXT_BLOCKS = "context_refiner."


class ZImageBackbone(Backbone):
    """Latents are `[16, H / 8, W / 8]`. The text features are Qwen3's tokens `[S, D]`, as many as the prompt has."""

    family = "Z-Image"
    text_varies = True
    pipeline_class = ZImagePipeline
    transformer_class = ZImageTransformer2DModel
    other_scaling_factors: ClassVar = {"SD3": 1.5305}
    #: There is one stream, whose blocks have the names of the refiners' blocks before it. All have the same layers.
    lora_targets: ClassVar = {
        "paper": (*ATTENTION, *FEED_FORWARD),
        "attention": ATTENTION,
        "text": (*ATTENTION, *FEED_FORWARD),
        "all-linear": (*ATTENTION, *FEED_FORWARD),
    }

    @property
    def architecture(self) -> str:
        """The name that modelspec metadata gives this kind of model."""
        return "z-image"

    @property
    def name(self) -> str:
        """What kind of model it is, for people."""
        return "Z-Image-Turbo" if self.few_steps else "Z-Image"

    @property
    def few_steps(self) -> bool:
        """Whether it is Turbo, which is distilled to eight steps. Its scheduler shifts by 3, that of the base model by 6.

        Nothing else in the configs differs.
        """
        return self.pipeline.scheduler.config.shift <= 3

    def check_guidance(self, guidance: float) -> None:
        """Raises ValueError for a guidance scale that the model cannot take."""
        if self.few_steps and guidance:
            raise ValueError(f"--guidance {guidance:g}: {self.name} has its guidance built in, give --guidance 0")

    def adapter(self, targets: LoraTargets, rank: int, alpha: float) -> LoraConfig:
        """The LoRA of a run, as peft's config."""
        config = super().adapter(targets, rank, alpha)
        if targets == "text":
            # By whole names: the other blocks have the same endings.
            config.target_modules = set(self.target_shapes(targets))  # type: ignore[assignment]
        return config

    def target_shapes(self, targets: LoraTargets) -> dict[str, tuple[int, int]]:
        """{module: (inputs, outputs)} of the linear layers that get a LoRA."""
        shapes = super().target_shapes(targets)
        return {name: shape for name, shape in shapes.items() if targets != "text" or name.startswith(TEXT_BLOCKS)}

    @staticmethod
    def encode_prompts(
        pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int
    ) -> list[Conditioning]:
        """The features of each prompt, by the pipeline's text encoder."""
        # The pipeline writes its chat template into the list that it gets.
        tokens, _ = pipeline.encode_prompt(
            prompt=list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
            device=device,
        )
        return [{"tokens": one} for one in tokens]

    def blank_conditioning(self, folder: Path) -> Conditioning:
        """Made-up features of a prompt, in the shapes and precision of real ones: for the memory estimate.

        Raises:
            ConfigError: they would have no tokens.
        """
        if not self.max_sequence_length:
            raise ConfigError("--max-sequence-length 0: Z-Image needs the prompt's tokens, give 512")
        width, dtype = self.transformer.config.cap_feat_dim, self.dtype
        return {"tokens": torch.empty(self.max_sequence_length, width, dtype=dtype)}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height, width of a picture's latent. Raises ValueError for a size that does not fit."""
        factor = self.pipeline.vae_scale_factor
        unit = 2 * factor
        if height % unit or width % unit:
            raise ValueError(f"resolution {height}x{width} must be a multiple of {unit} in both directions")
        _, rows, columns = self.transformer.config.axes_lens
        if not (0 < height <= unit * rows and 0 < width <= unit * columns):
            raise ValueError(
                f"resolution {height}x{width} must lie in {unit}..{unit * rows} and {unit}..{unit * columns} for this model"
            )
        return self.transformer.config.in_channels, height // factor, width // factor

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """Sigmas `[num_steps + 1]` from 1 to 0, by the pipeline's own scheduler (Z-Image: shift 6, Turbo: 3)."""
        _, rows, columns = self.latent_shape(height, width)
        start = np.linspace(1.0, 1 / num_steps, num_steps)
        return self.shifted_sigmas(num_steps, (rows // 2) * (columns // 2), 1.15, start)

    def velocity(self, prompts: Sequence[str], guidance: float) -> tree.Velocity:
        """The velocity for rows whose prompts repeat in the order given: row r belongs to prompts[r % len(prompts)].

        `guidance` counts as the pipeline's `guidance_scale`: above 0 it evaluates the empty prompt too, in the same call or
        in another with `split_guidance`, and the difference is added that many times to the velocity with the prompt. The
        usual scale, ComfyUI's `cfg`, is larger by 1.
        """
        text = [features["tokens"] for features in self.encode(prompts)]
        empty = [features["tokens"] for features in self.encode([""])] if guidance > 0 else []
        dtype = self.dtype
        # The table of positions that the last caller used may be on another device, or have no numbers (see `skeleton`).
        self.transformer.rope_embedder.freqs_cis = None

        def network(x: Tensor, sigma: Tensor, rows: list[Tensor]) -> Tensor:
            # A picture is a video of one frame, time runs from noise to picture, and the output is x0 - noise.
            pictures = list(x.to(dtype).unsqueeze(2).unbind())
            output = self.transformer(pictures, 1 - sigma, rows, return_dict=False)[0]
            return -torch.stack(output).squeeze(2).float()

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            # Texts have different lengths, and the network takes them as a list.
            rows, none = text * rows_per_prompt(len(x), len(prompts)), empty * len(x)
            if not none:
                return network(x, sigma, rows)
            if self.split_guidance:
                with_text, without = network(x, sigma, rows), network(x, sigma, none)
            else:
                both = network(torch.cat([x, x]), torch.cat([sigma, sigma]), rows + none)
                with_text, without = both.chunk(2)
            return with_text + guidance * (with_text - without)

        return velocity


PIPELINES = {"ZImagePipeline": ZImageBackbone}
