"""Qwen-Image and Qwen-Image-2512 over diffusers' `QwenImagePipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from peft import LoraConfig
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import tree
from ..settings.config import LoraTargets
from ..settings.errors import ConfigError
from .base import ATTENTION, TEXT_ATTENTION, rows_per_prompt
from .flux import PackedBackbone, pack, unpack
from .text import Conditioning

TEXT_FEED_FORWARD = ("txt_mlp.net.0.proj", "txt_mlp.net.2")
PAPER = (*ATTENTION, "img_mlp.net.0.proj", "img_mlp.net.2", *TEXT_FEED_FORWARD)
#: Layers of the last block that only its text output depends on, which nothing reads: a LoRA there has no gradient.
UNREAD = ("attn.add_q_proj", "attn.to_add_out", *TEXT_FEED_FORWARD)


class QwenImageBackbone(PackedBackbone):
    """Latents are not packed: `[16, H / 8, W / 8]`. The text features are Qwen2.5-VL's tokens `[S, D]`, of any number S up to
    `max_sequence_length`.
    """

    family = "Qwen-Image"
    text_varies = True
    pipeline_class = QwenImagePipeline
    transformer_class = QwenImageTransformer2DModel
    vae_class = AutoencoderKLQwenImage
    #: There are only joint blocks, so `all-linear` adds nothing to `paper`.
    lora_targets: ClassVar = {
        "paper": PAPER,
        "attention": ATTENTION,
        "text": (*TEXT_ATTENTION, *TEXT_FEED_FORWARD),
        "all-linear": PAPER,
    }

    @property
    def architecture(self) -> str:
        """The name that modelspec metadata gives this kind of model."""
        return "qwen-image"

    def check_vae(self, model: str) -> None:
        """Checks that the VAE fits the transformer. Raises a ConfigError that begins with the model's name."""
        config, channels = self.vae.config, self.transformer.config.in_channels // self.patch_channels
        if config.z_dim != channels:
            raise ConfigError(
                f"model {model}: its VAE makes {config.z_dim} channels, its transformer takes {channels}: the VAE belongs to "
                "another model; take both from the same one"
            )
        mean, std = config.latents_mean or [], config.latents_std or []
        if None in (*mean, *std) or not (len(mean) == len(std) == channels and all(value > 0 for value in std)):
            raise ConfigError(
                f"model {model}: vae/config.json needs {channels} numbers in latents_mean and {channels} above 0 in "
                "latents_std: take it from the model"
            )

    def adapter(self, targets: LoraTargets, rank: int, alpha: float) -> LoraConfig:
        """The LoRA of a run, as peft's config. It names each layer, as not all blocks have the same."""
        config = super().adapter(targets, rank, alpha)
        config.target_modules = list(self.target_shapes(targets))
        return config

    def target_shapes(self, targets: LoraTargets) -> dict[str, tuple[int, int]]:
        """{module: (inputs, outputs)} of the linear layers that get a LoRA."""
        last = f"transformer_blocks.{self.transformer.config.num_layers - 1}."
        found = super().target_shapes(targets).items()
        return {name: shape for name, shape in found if not (name.startswith(last) and name.endswith(UNREAD))}

    @staticmethod
    def encode_prompts(
        pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int
    ) -> list[Conditioning]:
        """The features of each prompt, by the pipeline's text encoder. The empty prompt is a space, see `velocity`.

        One prompt at a time: in a batch, features would be rounded in another way beside a longer prompt.
        """
        found = []
        for prompt in prompts:
            tokens, _ = pipeline.encode_prompt(prompt or " ", device=device, max_sequence_length=max_sequence_length)
            found.append({"tokens": tokens[0]})
        return found

    def blank_conditioning(self, folder: Path) -> Conditioning:
        """Made-up features of a prompt, in the precision of real ones and as many as there can be: for the memory estimate."""
        if not self.max_sequence_length:
            raise ConfigError(f"--max-sequence-length 0: {self.family} needs at least one token of text")
        config, dtype = self.transformer.config, self.dtype
        return {"tokens": torch.empty(self.max_sequence_length, config.joint_attention_dim, dtype=dtype)}

    def velocity(self, prompts: Sequence[str], guidance: float) -> tree.Velocity:
        """The velocity for rows whose prompts repeat in the order given: row r belongs to prompts[r % len(prompts)].

        Guidance above 1 is the pipeline's `true_cfg_scale`. It evaluates the negative prompt " " too, which the model's
        authors recommend where there is none: in the same call, or in another with `split_guidance`.
        """
        if self.transformer.config.guidance_embeds:
            raise ValueError("guidance_embeds is true: diffusers cannot compute this distilled kind of Qwen-Image")
        text, none = self.encode(prompts), self.encode([""] * len(prompts)) if guidance > 1 else []
        calls = [pad(none), pad(text)] if none and self.split_guidance else [pad([*none, *text])]
        dtype = self.dtype

        def network(x: Tensor, sigma: Tensor, grid: tuple[int, int, int], text: Conditioning) -> Tensor:
            """The network on tokens `[N, S, 64]`, once for each group of prompts in `text`."""
            times, groups = rows_per_prompt(len(x), len(prompts)), len(text["tokens"]) // len(prompts)
            rows = {
                name: torch.cat([tree.tile(group, times) for group in value.split(len(prompts))])
                for name, value in text.items()
            }
            return self.transformer(
                hidden_states=x.repeat(groups, 1, 1),
                # Qwen-Image takes 0..1 and multiplies by 1000 itself.
                timestep=sigma.repeat(groups),
                encoder_hidden_states=rows["tokens"],
                encoder_hidden_states_mask=rows.get("mask"),
                img_shapes=[[grid]] * (groups * len(x)),
                return_dict=False,
            )[0]

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            rows, columns = x.shape[2] // 2, x.shape[3] // 2
            packed = pack(x).to(dtype)
            output = torch.cat([network(packed, sigma, (1, rows, columns), text) for text in calls])
            if none:
                without, with_text = output.chunk(2)
                output = guide(without, with_text, guidance)
            return unpack(output, rows, columns)

        return velocity

    def unscale(self, latents: Tensor) -> Tensor:
        """Latents `[N, C, h, w]` as the VAE takes them, in its precision: one frame, `[N, C, 1, h, w]`."""
        scaled = latents.to(self.vae.dtype).unsqueeze(2)
        mean, std = self._norm(scaled)
        return scaled * std + mean

    def scale(self, encoded: Tensor) -> Tensor:
        """The inverse of `unscale`: `[N, C, 1, h, w]` -> `[N, C, h, w]`."""
        mean, std = self._norm(encoded)
        return ((encoded - mean) / std).squeeze(2)

    def _norm(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every channel, `[C, 1, 1, 1]` each."""
        config = self.vae.config
        mean, std = (
            like.new_tensor(numbers).view(-1, 1, 1, 1) for numbers in (config.latents_mean, config.latents_std)
        )
        return mean, std

    def vae_latents(self, pixels: Tensor) -> Tensor:
        """What the VAE makes of RGB from -1 to 1, `[N, 3, H, W]`, as one frame: `[N, C, 1, h, w]`."""
        return super().vae_latents(pixels.unsqueeze(2))

    def vae_pixels(self, unscaled: Tensor) -> Tensor:
        """What the VAE makes of `unscale`'s result: RGB, about -1 to 1, `[N, 3, H, W]`.

        `AutoencoderKLQwenImage.decode` also keeps every layer's input for the next frame of a video: in the model itself,
        where two threads would mix them up.
        """
        return self.vae.decoder(self.vae.post_quant_conv(unscaled))[:, :, 0]


def pad(features: Sequence[Conditioning]) -> Conditioning:
    """The features of several prompts as one batch, `tokens` `[N, S, D]`.

    With prompts of different lengths there is also a `mask` `[N, S]`, false where a prompt has ended.
    """
    parts = [one["tokens"] for one in features]
    tokens = pad_sequence(parts, batch_first=True)
    lengths = torch.tensor([len(part) for part in parts], device=tokens.device)
    if all(len(part) == tokens.shape[1] for part in parts):
        return {"tokens": tokens}
    return {"tokens": tokens, "mask": torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]}


def guide(without: Tensor, with_text: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance of tokens `[N, S, D]`, each as long as with the prompt alone, as in the pipeline."""
    combined = without + guidance * (with_text - without)
    return combined * (with_text.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))


PIPELINES = {"QwenImagePipeline": QwenImageBackbone}
