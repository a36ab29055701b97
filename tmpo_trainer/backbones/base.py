"""What every backbone shares: a frozen diffusers pipeline, the text features it keeps, decoding."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, BitsAndBytesConfig, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from .. import tree
from ..settings.config import LoraTargets
from .text import Features, TextCache, default_folder, features_of

#: Attention and feed-forward projections of both streams of a joint block, as diffusers names them.
_TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
_TEXT_FEED_FORWARD = ("ff_context.net.0.proj", "ff_context.net.2")
ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", *_TEXT_ATTENTION)
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", *_TEXT_FEED_FORWARD)
TEXT_STREAM = (*_TEXT_ATTENTION, *_TEXT_FEED_FORWARD)


#: The parts of a pipeline that are needed for text alone.
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")


@dataclass
class Encoded:
    """Text features of prompts: tokens `[P, S, D]`, pooled `[P, C]`."""

    tokens: Tensor
    pooled: Tensor


def single_file(file: Path) -> str | dict[str, Tensor]:
    """What diffusers' `from_single_file` takes: a path, or the tensors if names must change first.

    Newer ComfyUI (0.33) calls FLUX's norms of queries and keys `weight`, also in what it saves; they were `scale`.
    """
    if file.suffix != ".safetensors":
        return str(file)
    with safe_open(file, "pt") as opened:
        if not any(name.endswith("query_norm.weight") for name in opened.keys()):  # noqa: SIM118
            return str(file)
    return {re.sub(r"(query|key)_norm\.weight$", r"\1_norm.scale", k): v for k, v in load_file(file).items()}


class Backbone(ABC):
    """A frozen pipeline; a LoRA, if any, lives in its transformer.

    Latents are scaled and not packed, `[N, C, H / 8, W / 8]`, whatever the transformer takes.

    Args:
        pipeline: the loaded pipeline.
        max_sequence_length: T5 tokens (or the zero tokens that stand for them), as in the pipeline's call.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    transformer_class: ClassVar[type[ModelMixin]]
    #: The folder of the T5 encoder.
    t5: ClassVar[str]
    #: Parts that a pipeline folder may lack.
    optional_parts: ClassVar[tuple[str, ...]] = ()
    #: The endings of the names of the modules that get a LoRA, for each setting of `lora_targets`.
    lora_targets: ClassVar[dict[LoraTargets, tuple[str, ...]]]
    #: calculate_shift's last default, which differs between diffusers' pipelines.
    default_max_shift: ClassVar[float]
    #: Channels of the transformer's input per channel of the latent: FLUX takes patches of 2x2.
    patch_channels: ClassVar[int]

    def __init__(self, pipeline: Any, max_sequence_length: int):
        self.pipeline = pipeline
        self.max_sequence_length = max_sequence_length
        self.transformer = pipeline.transformer
        #: Classifier-free guidance in two network calls instead of one of twice the batch.
        self.split_guidance = False
        self._encoded: dict[str, tuple[Tensor, Tensor]] = {}

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        max_sequence_length: int,
        prompts: Sequence[str] | None = None,
        text_cache: Path | None = None,
        transformer: Path | None = None,
        nf4: bool = False,
        sharded: bool = False,
    ) -> Backbone:
        """Loads a pipeline folder and freezes all of it.

        Args:
            prompts: all that will be asked for. With them, a model with T5 (which is as large as many a transformer)
                encodes them first, or finds them in `text_cache`, and the encoders are not kept.
            transformer: a single safetensors file, in ComfyUI's or the original names, in place of the folder's.
            nf4: quantise the transformer's linear layers to four bits while it is loaded.
            sharded: leave the transformer in the computer's memory; FSDP2 puts each device's share there.
        """
        absent = [name for name in cls.optional_parts if not (folder / name).is_dir()]
        features: dict[str, Features] = {}
        left_out = dict.fromkeys(absent)
        if prompts is not None and cls.t5 not in absent:
            encoders = [name for name in TEXT_PARTS if (folder / name).is_dir()]
            settings = [cls.pipeline_class.__name__, str(dtype), max_sequence_length]
            cache = TextCache(text_cache or default_folder(), folder, settings)
            # Guidance may want the empty prompt.
            features = cls._features([*prompts, ""], cache, folder, dtype, device, max_sequence_length)
            left_out |= dict.fromkeys(encoders)
        network = cls._transformer(folder, dtype, transformer, device if nf4 else None)
        pipeline: Any = cls.pipeline_class.from_pretrained(
            folder, dtype=dtype, local_files_only=True, transformer=network, **left_out
        )
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module) and not (sharded and name == "transformer"):
                part.to(device)
        if device.type == "cpu":
            # Convolutions on a CPU are about 1.4 times faster in this layout.
            pipeline.vae.to(memory_format=torch.channels_last)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        pipeline.set_progress_bar_config(disable=True)
        backbone = cls(pipeline, max_sequence_length)
        for prompt, (tokens, pooled) in features.items():
            backbone.keep(prompt, tokens, pooled)
        return backbone

    @classmethod
    def _transformer(cls, folder: Path, dtype: torch.dtype, file: Path | None, nf4: torch.device | None) -> Any:
        """The transformer on the CPU; with `nf4` in four bits, on that device."""
        kind: Any = cls.transformer_class
        how: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True}
        if nf4 is not None:
            how["device_map"] = {"": nf4}
            how["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_use_double_quant=True,
            )
        if file is None:
            return kind.from_pretrained(folder, subfolder="transformer", **how)
        try:
            return kind.from_single_file(single_file(file), config=str(folder), subfolder="transformer", **how)
        except (LookupError, RuntimeError) as error:
            # What diffusers' conversion does with names that it does not find, and with what stays empty for want of them.
            raise ValueError(
                f"--transformer {file} is not this model's {kind.__name__} in ComfyUI's or the original names ({error})"
            ) from None

    @classmethod
    def skeleton(cls, folder: Path, dtype: torch.dtype = torch.float32, max_sequence_length: int = 0) -> Backbone:
        """A backbone from a folder's configs alone, on the meta device: no weights, no text encoders.

        Its geometry, names and sizes are the model's: what can be checked and counted before anything is loaded.
        """

        def build(kind: Any, name: str) -> Any:
            with torch.device("meta"):
                return kind.from_config(kind.load_config(folder, subfolder=name, local_files_only=True)).to(dtype)

        needed = inspect.signature(cls.pipeline_class).parameters
        parts: dict[str, Any] = {name: None for name in TEXT_PARTS if name in needed}
        parts["transformer"] = build(cls.transformer_class, "transformer").requires_grad_(False)
        parts["vae"] = build(AutoencoderKL, "vae").requires_grad_(False)
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler.from_pretrained(
            folder, subfolder="scheduler", local_files_only=True
        )
        return cls(cls.pipeline_class(**parts), max_sequence_length)

    def adapter(self, targets: LoraTargets, rank: int, alpha: float) -> LoraConfig:
        """The LoRA of a run, as peft's config."""
        modules = list(self.lora_targets[targets])
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            target_modules=modules,
            # The model's own last layer has the name of one in FLUX's single blocks. A regex is matched as a whole.
            exclude_modules="proj_out" if "proj_out" in modules else None,
            init_lora_weights="gaussian",
        )

    def target_shapes(self, targets: LoraTargets) -> dict[str, tuple[int, int]]:
        """{module: (inputs, outputs)} of the linear layers that get a LoRA."""
        endings = tuple(f".{ending}" for ending in self.lora_targets[targets])
        return {
            name: (module.in_features, module.out_features)
            for name, module in self.transformer.named_modules()
            if isinstance(module, torch.nn.Linear) and name.endswith(endings)
        }

    @classmethod
    def _features(
        cls,
        prompts: Sequence[str],
        cache: TextCache,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        max_sequence_length: int,
    ) -> dict[str, Features]:
        """Text features from the cache; the encoders are loaded for those that are missing, if any, and freed."""
        loaded: list[Any] = []

        def encode(chosen: list[str]) -> tuple[Tensor, Tensor]:
            if not loaded:
                pipeline: Any = cls.pipeline_class.from_pretrained(
                    folder, dtype=dtype, local_files_only=True, transformer=None, vae=None
                )
                loaded.append(pipeline.to(device))
            return cls._encode(loaded[0], chosen, device, max_sequence_length)

        found = features_of(prompts, cache, encode)
        loaded.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    @abstractmethod
    def architecture(self) -> str:
        """The name that modelspec metadata gives this kind of model."""

    @staticmethod
    @abstractmethod
    def _encode(
        pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens `[P, S, D]` and pooled `[P, C]` of prompts, by the pipeline."""

    @classmethod
    @abstractmethod
    def text_tokens(cls, folder: Path, max_sequence_length: int) -> int:
        """How many tokens the transformer gets for a prompt."""

    def keep(self, prompt: str, tokens: Tensor, pooled: Tensor) -> None:
        """Gives the features of a prompt, tokens `[S, D]` and pooled `[C]`, instead of having them encoded."""
        self._encoded[prompt] = (tokens, pooled)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Text features, computed once per prompt and kept. Raises ValueError if the encoders are gone."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        if missing:
            if self.pipeline.text_encoder is None:
                raise ValueError(f"prompt {missing[0]!r} was not encoded when the model was loaded")
            tokens, pooled = self._encode(self.pipeline, missing, self.device, self.max_sequence_length)
            for i, prompt in enumerate(missing):
                self.keep(prompt, tokens[i], pooled[i])
        pairs = [self._encoded[prompt] for prompt in prompts]
        tokens, pooled = (torch.stack(halves).to(self.device) for halves in zip(*pairs, strict=True))
        return Encoded(tokens, pooled)

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height, width of a picture's latent. Raises ValueError for a size that does not fit."""

    @abstractmethod
    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """`[num_steps + 1]`, from 1 to 0, of the pipeline's own scheduler."""

    def _sigmas(self, num_steps: int, height: int, width: int, start: np.ndarray | None) -> Tensor:
        """The scheduler's sigmas, from `start` or its own, shifted by the number of tokens if it wants that."""
        config = self.pipeline.scheduler.config
        scheduler = self.pipeline.scheduler.from_config(config)
        arguments: dict[str, Any] = {}
        if config.get("use_dynamic_shifting"):
            _, rows, columns = self.latent_shape(height, width)
            arguments["mu"] = calculate_shift(
                (rows // 2) * (columns // 2),
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", self.default_max_shift),
            )
        scheduler.set_timesteps(num_steps, sigmas=start, **arguments)
        return scheduler.sigmas.float().cpu()

    @abstractmethod
    def velocity(self, prompts: Sequence[str], guidance: float) -> tree.Velocity:
        """The velocity for rows whose prompts repeat in the order given: row r is of prompts[r % len(prompts)]."""

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


def rows_per_prompt(rows: int, prompts: int) -> int:
    """How often the prompts repeat in a batch. Raises ValueError if they do not fit."""
    if rows % prompts:
        raise ValueError(f"{rows} rows do not divide into {prompts} prompts")
    return rows // prompts
