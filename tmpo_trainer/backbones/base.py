"""What every backbone shares: a frozen diffusers pipeline, the text features it keeps, decoding."""

from __future__ import annotations

import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
from ..hub import readable_errors
from ..settings.config import LoraTargets
from ..settings.errors import ConfigError, one_line
from . import decoder
from .text import TEXT_PARTS, Conditioning, TextCache, default_folder, fill, in_batches, say_cut, size

#: Attention and feed-forward projections of both streams of a joint block, as diffusers names them.
TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
_TEXT_FEED_FORWARD = ("ff_context.net.0.proj", "ff_context.net.2")
ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", *TEXT_ATTENTION)
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", *_TEXT_FEED_FORWARD)
TEXT_STREAM = (*TEXT_ATTENTION, *_TEXT_FEED_FORWARD)

#: The tensors of the transformer in a file with a whole model begin with this.
WHOLE_MODEL = "model.diffusion_model."
#: Numbers of latents that a CPU decodes at once: 8 pictures of 64x64. What the VAE makes of more does not fit into caches.
CACHED = 2**13
#: Bytes of text features that a model with its text encoders keeps in memory.
KEPT = 2**30


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        dtype: precision of the frozen weights. max_sequence_length: text tokens, as in the pipeline's call.
        prompts: every prompt that the model will get. A model that frees its text encoders then encodes those whose
            features are not in `text_cache` first, and does not keep the encoders.
        text_cache: where text features are kept between runs; by default `text.default_folder()`.
        transformer: a single safetensors file, in ComfyUI's or the original names, in place of the folder's.
        nf4: quantise the transformer's linear layers to four bits while it is loaded.
        sharded: leave the transformer in CPU memory; FSDP2 moves each device's share to it.
    """

    dtype: torch.dtype
    device: torch.device
    max_sequence_length: int
    prompts: Sequence[str] | None = None
    text_cache: Path | None = None
    transformer: Path | None = None
    nf4: bool = False
    sharded: bool = False


class Backbone(ABC):
    """A frozen pipeline; a LoRA, if any, lives in its transformer.

    A subclass says what its model's text features, latents and network calls look like; nothing outside its file does.
    Latents are scaled, and have one shape per resolution, see `latent_shape`, whatever layout the transformer takes.

    Args:
        pipeline: the loaded pipeline.
        max_sequence_length: text tokens, as in the pipeline's call.
    """

    #: What the model is called in messages.
    family: ClassVar[str]
    #: Whether the features of a prompt are as long as the prompt. Otherwise all have `max_sequence_length` tokens.
    text_varies: ClassVar[bool] = False
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    transformer_class: ClassVar[type[ModelMixin]]
    vae_class: ClassVar[type[ModelMixin]] = AutoencoderKL
    scheduler_class: ClassVar[Any] = FlowMatchEulerDiscreteScheduler
    #: Parts that a pipeline folder may lack.
    optional_parts: ClassVar[tuple[str, ...]] = ()
    #: The endings of the names of the modules that get a LoRA, for each setting of `lora_targets`.
    lora_targets: ClassVar[dict[LoraTargets, tuple[str, ...]]]
    #: Channels of the transformer's input per channel of the latent: FLUX takes patches of 2x2.
    patch_channels: ClassVar[int] = 1
    #: Whether diffusers lets another package compute its attention.
    chooses_attention: ClassVar[bool] = False
    #: Scaling factors of other families' VAEs of the same shape. A wrong VAE gives grey or garish pictures, but no error.
    other_scaling_factors: ClassVar[dict[str, float]] = {}

    def __init__(self, pipeline: Any, max_sequence_length: int):
        self.pipeline = pipeline
        self.max_sequence_length = max_sequence_length
        self.transformer = pipeline.transformer
        self.vae = pipeline.vae
        #: Of the network's input. With four-bit weights diffusers' own property may give that of the LoRA, once there is one.
        self.dtype = pipeline.transformer.dtype
        #: Classifier-free guidance in two network calls instead of one of twice the batch.
        self.split_guidance = False
        #: Features in memory, the last used at the end, and their bytes.
        self._kept: dict[str, Conditioning] = {}
        self._kept_bytes = 0
        #: Features on disk, if the model has freed its text encoders.
        self._text: TextCache | None = None

    # Loading

    @classmethod
    def load(cls, folder: Path, options: LoadOptions) -> Backbone:
        """Loads a pipeline folder and freezes all of it. With `options.prompts`, see `encode_text`, which comes first."""
        left_out = cls._absent(folder)
        text = cls.text_cache(folder, options)
        if text is not None:
            left_out |= dict.fromkeys(cls.text_parts())
        network = cls.load_transformer(folder, options)
        pipeline: Any = cls.pipeline_class.from_pretrained(
            folder, dtype=options.dtype, local_files_only=True, transformer=network, **left_out
        )
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module) and not (options.sharded and name == "transformer"):
                part.to(options.device)
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module):
                source = options.transformer if name == "transformer" else None
                _check_finite(source or folder / name, part.requires_grad_(False).eval())
        if options.device.type == "cpu":
            decoder.prepare(pipeline.vae)
        pipeline.set_progress_bar_config(disable=True)
        backbone = cls(pipeline, options.max_sequence_length)
        backbone._text = text
        return backbone

    @classmethod
    def _absent(cls, folder: Path) -> dict[str, None]:
        """The optional parts that a folder lacks; diffusers refuses the folder unless each is given as None."""
        return {name: None for name in cls.optional_parts if not (folder / name).is_dir()}

    @classmethod
    def load_transformer(cls, folder: Path, options: LoadOptions) -> Any:
        """The transformer, on the CPU; with `nf4` in four bits, on the device."""
        kind: Any = cls.transformer_class
        how: dict[str, Any] = {"torch_dtype": options.dtype, "local_files_only": True}
        if options.nf4:
            how["device_map"] = {"": options.device}
            how["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=options.dtype,
                bnb_4bit_use_double_quant=True,
            )
        file = options.transformer
        if file is None:
            return kind.from_pretrained(folder, subfolder="transformer", **how)
        try:
            return kind.from_single_file(cls.single_file(file), config=str(folder), subfolder="transformer", **how)
        except (LookupError, RuntimeError, NameError, ValueError, TypeError, AttributeError) as error:
            # diffusers' conversion raises these for names that it does not find, and for weights that stay empty.
            raise ConfigError(
                f"--transformer {file} is not this model's {kind.__name__} in ComfyUI's or the original names "
                f"({one_line(error)})"
            ) from None

    @classmethod
    def single_file(cls, file: Path) -> str | dict[str, Tensor]:
        """What diffusers' `from_single_file` takes: a path, or the tensors if names must change first.

        diffusers goes by the ending of the name, and does not know ComfyUI's `.sft`. Nor does it know the prefix under which
        ComfyUI saves a transformer with other parts, for some models.
        """
        with safe_open(file, "pt") as opened:
            whole = any(name.startswith(WHOLE_MODEL) for name in opened.keys())  # noqa: SIM118
        if whole:
            tensors = load_file(file).items()
            return {k.removeprefix(WHOLE_MODEL): value for k, value in tensors if k.startswith(WHOLE_MODEL)}
        return str(file) if file.suffix == ".safetensors" else load_file(file)

    @classmethod
    def skeleton(cls, folder: Path, dtype: torch.dtype = torch.float32, max_sequence_length: int = 0) -> Backbone:
        """A backbone from a folder's configs alone, on the meta device: no weights, no text encoders.

        Its geometry, names and sizes are the model's, so that they can be checked and counted before anything is loaded.

        Raises:
            ConfigError: a part cannot be built from its config.
        """

        def build(kind: Any, name: str) -> Any:
            with readable_errors("model", folder / name / "config.json"), torch.device("meta"):
                found = kind.from_config(kind.load_config(folder, subfolder=name, local_files_only=True))
                return found.to(dtype).requires_grad_(False)

        parts: dict[str, Any] = dict.fromkeys(cls.text_parts())
        parts["transformer"] = build(cls.transformer_class, "transformer")
        parts["vae"] = build(cls.vae_class, "vae")
        with readable_errors("model", folder / "scheduler" / "scheduler_config.json"):
            parts["scheduler"] = cls.scheduler_class.from_pretrained(
                folder, subfolder="scheduler", local_files_only=True
            )
        # Switches, such as is_distilled.
        known = inspect.signature(cls.pipeline_class).parameters
        index = json.loads((folder / "model_index.json").read_text())
        parts |= {name: value for name, value in index.items() if isinstance(value, bool) and name in known}
        with readable_errors("model", folder):
            return cls(cls.pipeline_class(**parts), max_sequence_length)

    @property
    def device(self) -> torch.device:
        # diffusers' own property walks through all modules: milliseconds, where this is asked for every latent's noise.
        return next(self.transformer.parameters()).device

    # Checks of the skeleton, see check.py

    def check_vae(self, model: str) -> None:
        """Checks that the VAE fits the transformer. Raises a ConfigError that begins with the model's name."""
        config = self.vae.config
        channels = self.transformer.config.in_channels // self.patch_channels
        if config.latent_channels != channels:
            raise ConfigError(
                f"model {model}: its VAE makes {config.latent_channels} channels, its transformer takes {channels}: the "
                "VAE belongs to another model; take both from the same one"
            )
        if not config.scaling_factor or config.shift_factor is None:
            raise ConfigError(
                f"model {model}: vae/config.json lacks scaling_factor or shift_factor: take it from the model"
            )
        for other, factor in self.other_scaling_factors.items():
            if abs(config.scaling_factor - factor) < 1e-3:
                raise ConfigError(
                    f"model {model}: its VAE has scaling_factor {config.scaling_factor}, that of {other}, but the "
                    f"transformer is {self.family}'s: take the VAE of the same model"
                )

    def check_single_file(self, where: str, names: Sequence[str]) -> None:  # noqa: B027
        """Checks a single-file transformer by its tensors' names. Raises a ConfigError that begins with `where`."""

    @property
    def few_steps(self) -> bool:
        """Whether the model was distilled to draw in a few steps: its velocity points to one picture, not to their mean."""
        return False

    def check_guidance(self, guidance: float) -> None:  # noqa: B027
        """Raises ValueError for a guidance scale that the model cannot take."""

    # The LoRA

    @property
    def name(self) -> str:
        """What kind of model it is, for people: more exactly than the family where the configs tell."""
        return self.family

    @property
    @abstractmethod
    def architecture(self) -> str:
        """The name that modelspec metadata gives this kind of model."""

    def adapter(self, targets: LoraTargets, rank: int, alpha: float) -> LoraConfig:
        """The LoRA of a run, as peft's config."""
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            target_modules=list(self.lora_targets[targets]),
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

    # Text

    @classmethod
    def text_parts(cls) -> list[str]:
        """The names of the pipeline's text encoders and tokenizers."""
        return [name for name in inspect.signature(cls.pipeline_class).parameters if name.startswith(TEXT_PARTS)]

    @classmethod
    def frees_text_encoders(cls, folder: Path) -> bool:
        """Whether all prompts are encoded before the transformer is loaded, and the text encoders freed."""
        return True

    @classmethod
    def text_encoder_bytes(cls, folder: Path, dtype: torch.dtype) -> int:
        """Bytes of a pipeline folder's text encoders, from their configs."""
        import transformers

        index = json.loads((folder / "model_index.json").read_text())
        total = 0
        for name in cls.text_parts():
            config = folder / name / "config.json"
            if name.startswith("text_encoder") and config.is_file():
                kind = getattr(transformers, (index.get(name) or [None, None])[1] or "", None)
                if kind is None:
                    continue
                with torch.device("meta"):
                    model = kind(kind.config_class.from_pretrained(config.parent, local_files_only=True))
                total += sum(p.numel() for p in model.parameters()) * dtype.itemsize
        return total

    @classmethod
    def text_cache(cls, folder: Path, options: LoadOptions) -> TextCache | None:
        """The text features on disk; None for a model that keeps its text encoders."""
        if options.prompts is None or not cls.frees_text_encoders(folder):
            return None
        settings = [cls.pipeline_class.__name__, str(options.dtype), options.max_sequence_length]
        return TextCache(options.text_cache or default_folder(), folder, settings)

    def text_bytes(self, folder: Path) -> int:
        """Bytes of the text features of one prompt, at most."""
        return size(self.blank_conditioning(folder))

    @classmethod
    def encode_text(cls, prompts: Sequence[str], folder: Path, options: LoadOptions) -> None:
        """Encodes the prompts that the text cache lacks, if any. The encoders are loaded for that, and freed.

        Raises:
            ConfigError: the cache cannot be written.
        """
        cache = cls.text_cache(folder, options)
        if cache is None:
            return
        loaded: list[Any] = []

        def encode(chosen: list[str]) -> list[Conditioning]:
            if not loaded:
                pipeline: Any = cls.pipeline_class.from_pretrained(
                    folder,
                    dtype=options.dtype,
                    local_files_only=True,
                    transformer=None,
                    vae=None,
                    **cls._absent(folder),
                )
                for name, part in pipeline.components.items():
                    if isinstance(part, torch.nn.Module):
                        _check_finite(folder / name, part)
                loaded.append(pipeline.to(options.device))
                say_cut(pipeline, options.prompts or (), options.max_sequence_length)
            return cls.encode_prompts(loaded[0], chosen, options.device, options.max_sequence_length)

        fill(cache, prompts, encode)
        loaded.clear()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()

    @staticmethod
    @abstractmethod
    def encode_prompts(
        pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int
    ) -> list[Conditioning]:
        """The features of each prompt, by the pipeline's text encoders."""

    @abstractmethod
    def blank_conditioning(self, folder: Path) -> Conditioning:
        """Made-up features of a prompt, in the shapes and precision of real ones: for the memory estimate."""

    def keep(self, prompt: str, features: Conditioning) -> None:
        """Keeps the features of a prompt in memory, so that it is not encoded. Beyond KEPT bytes the longest unused go."""
        known = self._kept.pop(prompt, {})
        self._kept[prompt] = features
        self._kept_bytes += size(features) - size(known)
        while self._kept_bytes > KEPT and len(self._kept) > 1:
            self._kept_bytes -= size(self._kept.pop(next(iter(self._kept))))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """The features of each prompt, read from disk or computed. Raises ValueError if the encoders are gone."""
        needed = list(dict.fromkeys(prompts))
        found = {prompt: self._kept[prompt] for prompt in needed if prompt in self._kept}
        stored = {prompt: self._text.get(prompt) for prompt in needed if self._text and prompt not in found}
        missing = [prompt for prompt in needed if prompt not in found and stored.get(prompt) is None]
        if missing:
            parts = self.pipeline.components.items()
            if all(part is None for name, part in parts if name.startswith(TEXT_PARTS)):
                gone = f", or its features are no longer in {self._text.folder}" if self._text is not None else ""
                raise ValueError(f"prompt {missing[0]!r} was not encoded when the model was loaded{gone}")

            def made(chosen: list[str]) -> list[Conditioning]:
                return self.encode_prompts(self.pipeline, chosen, self.device, self.max_sequence_length)

            for prompt, features in in_batches(missing, made):
                # The device's memory is for the pictures.
                found[prompt] = {name: value.cpu() for name, value in features.items()}
        for prompt, features in found.items():
            self.keep(prompt, features)
        found |= {prompt: features for prompt, features in stored.items() if features is not None}
        return [{name: value.to(self.device) for name, value in found[prompt].items()} for prompt in prompts]

    # Sampling

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of a picture's latent. Raises ValueError for a size that does not fit."""

    @abstractmethod
    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """Sigmas `[num_steps + 1]` from 1 to 0, by the pipeline's own scheduler."""

    def shifted_sigmas(self, num_steps: int, tokens: int, max_shift: float, start: np.ndarray | None = None) -> Tensor:
        """The scheduler's sigmas, shifted by the number of image tokens if its config asks for that.

        Args:
            max_shift: `calculate_shift`'s last argument if the config has none; it differs between pipelines.
            start: the sigmas before the shift; by default the scheduler's own.
        """
        config = self.pipeline.scheduler.config
        scheduler = self.pipeline.scheduler.from_config(config)
        arguments: dict[str, Any] = {}
        if config.get("use_dynamic_shifting"):
            arguments["mu"] = calculate_shift(
                tokens,
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", max_shift),
            )
        scheduler.set_timesteps(num_steps, sigmas=start, **arguments)
        return scheduler.sigmas.float().cpu()

    @abstractmethod
    def velocity(self, prompts: Sequence[str], guidance: float) -> tree.Velocity:
        """The velocity for rows whose prompts repeat in the order given: row r belongs to prompts[r % len(prompts)]."""

    # Encoding and decoding

    def scale(self, encoded: Tensor) -> Tensor:
        """The inverse of `unscale`: what the VAE encodes, as latents."""
        return (encoded - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def vae_latents(self, pixels: Tensor) -> Tensor:
        """What the VAE makes of RGB from -1 to 1, `[N, 3, H, W]`: the mean of its posterior."""
        return self.vae.encode(pixels).latent_dist.mode()

    @torch.no_grad()
    def encode_pictures(self, images: np.ndarray) -> Tensor:
        """uint8 RGB `[N, H, W, 3]` -> latents, float32 `[N, ...]` on the CPU."""
        # With FSDP2 the transformer is elsewhere until training begins.
        device = next(self.vae.parameters()).device
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device, self.vae.dtype)
        return self.scale(self.vae_latents(pixels / 127.5 - 1).float()).cpu()

    def unscale(self, latents: Tensor) -> Tensor:
        """Latents `[N, ...]` as the VAE takes them, in its precision."""
        return latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor

    def vae_pixels(self, unscaled: Tensor) -> Tensor:
        """What the VAE makes of `unscale`'s result: RGB from -1 to 1, `[N, 3, H, W]`."""
        return self.vae.decode(unscaled, return_dict=False)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int) -> np.ndarray:
        """Latents `[N, ...]` -> uint8 RGB `[N, H, W, 3]`, rounded as diffusers does.

        Args:
            batch: the largest number at a time, see `decoder_calls`.

        Raises:
            ValueError: a pixel is not finite, which would look black.
        """
        rows, calls = decoder_calls(batch, latents.shape[1:], latents.device)
        parts, threads = latents.split(rows), torch.get_num_threads()
        if calls < threads or threads == 1 or len(parts) == 1:
            return torch.cat([self._decode(part) for part in parts]).numpy()
        # A thread for each of several small batches makes better use of the cores than all threads for each in turn.
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return torch.cat(list(pool.map(self._decode, parts))).numpy()
        finally:
            # It is the default of threads to come, too.
            torch.set_num_threads(threads)

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        pixels = self.vae_pixels(self.unscale(latents)).float()
        if not pixels.isfinite().all():
            raise ValueError("the VAE gave pixels that are not finite: use --dtype float32")
        return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def decoder_calls(batch: int, shape: Sequence[int], device: torch.device) -> tuple[int, int]:
    """How many latents of a shape one VAE call gets, and how many calls run at once: together at most `batch`.

    On a CPU calls are small, which is faster, and there is one for each of its threads if `batch` allows as many.
    """
    if device.type != "cpu":
        return batch, 1
    rows, threads = max(1, min(batch, CACHED // math.prod(shape))), torch.get_num_threads()
    return rows, threads if rows * threads <= batch else 1


def _check_finite(source: Path, module: torch.nn.Module) -> None:
    """Raises ConfigError for a weight that is not finite. A VAE's would only make its pictures black."""
    for name, weight in module.named_parameters():
        # Types of one byte, which some ways of quantising use, have no minimum here.
        whole = weight.is_floating_point() and weight.element_size() > 1 and weight.numel()
        if whole and not all(end.isfinite() for end in weight.aminmax()):
            raise ConfigError(f"model: {source}: {name} is not finite: the weights are damaged, download them again")


def rows_per_prompt(rows: int, prompts: int) -> int:
    """How often the prompts repeat in a batch. Raises ValueError if they do not fit."""
    if rows % prompts:
        raise ValueError(f"{rows} rows do not divide into {prompts} prompts")
    return rows // prompts
