"""Loads what training and evaluation need, after all checks that are possible before anything large is loaded."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image, ImageOps

from .. import flow, methods
from ..backbones import check_text_cache, encode_text, is_hub_id, load_backbone, load_skeleton
from ..backbones.base import Backbone, LoadOptions
from ..backbones.check import check_transformer
from ..evaluation import held_out
from ..evaluation.features import Features, check_features, load_features
from ..evaluation.picture_files import Picture, find_images, load, open_images
from ..lora import adapter as lora
from ..lora.layers import Layers
from ..prompts.lists import PromptList, drawn, read_prompts
from ..prompts.split import Split
from ..rewards import Parked, Scorer, check_prompts, check_reward, default_prompts, find, load_scorer, state, variants
from ..settings.config import TrainConfig, absolute
from ..settings.errors import ConfigError, one_line
from ..training import trackers

#: The model's settings that `identity` includes.
IDENTITY = (
    "model", "transformer", "quantize", "attention", "dtype", "device", "max_sequence_length", "split_guidance",
    "reward_models", "features",
)  # fmt: skip


def quiet() -> None:
    """Silences the libraries' progress bars and advice, which would break up the run's own bar."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def choose_device(name: str) -> torch.device:
    """The device of a `--device` flag; auto is the GPU where there is one. Raises ConfigError."""
    if name != "auto":
        try:
            device = torch.device(name)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise ConfigError(f"device {name}: use auto, cpu, cuda or cuda:N")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device {name}: torch sees {torch.cuda.device_count()} CUDA devices here")
        return device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def need_gpu(config: TrainConfig) -> None:
    """Refuses to download many gigabytes to a machine that cannot use them. Raises ConfigError."""
    if is_hub_id(config.model) and config.device == "auto" and not torch.cuda.is_available():
        raise ConfigError(
            f"model {config.model} needs a CUDA GPU, and this machine has none (--device cpu tries anyway). To train the "
            "bundled demo model on a CPU: python -m tmpo_trainer --preset demo"
        )


def _prompts(config: TrainConfig, given: Path | None, split: Split, flag: str) -> PromptList:
    found = read_prompts(given) if given else default_prompts(config.reward, split)
    if found is None:
        raise ConfigError(f"reward {' '.join(config.reward)} has no prompt list of its own: give --{flag} FILE")
    check_prompts(config.reward, found, reward_paths(config))
    if split == "train":
        check_prompts(config.extra_rewards, found, reward_paths(config))
    return found


def train_prompts(config: TrainConfig) -> PromptList:
    """Training prompts: the configured file, or the list that comes with the rewards. Raises ConfigError."""
    return _prompts(config, config.prompts, "train", "prompts")


def heldout_prompts(config: TrainConfig, flag: str = "eval-prompts") -> PromptList:
    """Held-out prompts: the configured file, or the list that comes with the rewards. Raises ConfigError."""
    return _prompts(config, config.eval_prompts, "heldout", flag).first(config.eval_limit)


def reward_paths(config: TrainConfig) -> dict[str, str]:
    """The paths and addresses that `--reward-models` gives, by reward."""
    return dict(entry.split("=", 1) for entry in config.reward_models)


def check_rewards(config: TrainConfig) -> None:
    """Raises ConfigError for a reward that is not known, lacks a package, or has an unusable path or address."""
    paths = reward_paths(config)
    for name in (*config.reward, *config.extra_rewards):
        check_reward(name, paths.get(name), dict(config))


def check(config: TrainConfig, device: torch.device) -> tuple[PromptList, PromptList, Backbone]:
    """Runs all checks that need no weights. Raises ConfigError.

    Returns:
        training and held-out prompts, and the model's skeleton.
    """
    trackers.check(config.tracker)
    check_rewards(config)
    if config.report or config.eval_every or config.needs_features:
        check_features(config.features)
    train, heldout, found = train_prompts(config), heldout_prompts(config), skeleton(config, device)
    captioned(config.data_folder)
    method = methods.make(config, found.sigmas(config.rollout_steps, *config.resolution))
    # Chains of methods on noised leaves have no stochastic steps.
    kernel = method.transition.get("kernel") if method.plan(0).fanout else None
    if found.few_steps and kernel in flow.SCORE_KERNELS:
        raise ConfigError(
            f"--kernel {kernel} is not for model {config.model}, which was distilled to a few steps: the kernel computes the "
            "score from the velocity, which no longer gives it; use --kernel cps, or train the base model"
        )
    if config.init_lora:
        say_left_out(lora.check_fits(config.init_lora, found, config.lora_targets, config.lora_rank))
    return train, heldout, found


@cache
def captioned(folder: Path | None) -> list[Picture]:
    """The pictures of `data_folder` and their captions, all opened once. Raises ConfigError for a bad one."""
    return open_images(find_images([folder]), None, None, "write its caption into that file") if folder else []


def examples(config: TrainConfig, backbone: Backbone) -> tuple[torch.Tensor, list[str]] | None:
    """Latents `[M, ...latent]` and captions of the pictures in `data_folder`, cropped to the resolution about their middle."""
    if config.data_folder is None:
        return None
    height, width = config.resolution
    latents, captions = [], []
    for picture in captioned(config.data_folder):
        whole = Image.fromarray(load([picture])[0])
        fitted = ImageOps.fit(whole, (width, height), Image.Resampling.LANCZOS)
        latents.append(backbone.encode_pictures(np.array(fitted)[None]))
        captions.append(picture.prompt)
    return torch.cat(latents), captions


def say_left_out(layers: Layers) -> None:
    """One line, by one process of a machine, about layers of a LoRA file that are not applied."""
    if layers.left_out and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"tmpo_trainer: {layers.left_out}", file=sys.stderr)


def skeleton(config: TrainConfig, device: torch.device) -> Backbone:
    """The model without its weights, after all checks that need no weights. Raises ConfigError."""
    found = load_skeleton(config.model, _dtype(config, device), config.max_sequence_length)
    found.split_guidance = config.split_guidance
    try:
        found.latent_shape(*config.resolution)
        found.check_guidance(config.guidance)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.transformer:
        check_transformer(config.transformer, found, config.quantize == "nf4")
    if config.quantize == "nf4":
        if device.type == "cpu":
            raise ConfigError("--quantize nf4 needs a CUDA GPU: leave it out")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError('--quantize nf4 needs bitsandbytes: pip install -c constraints.txt -e ".[train,nf4]"')
    if config.attention != "native":
        if not found.chooses_attention:
            raise ConfigError(f"--attention {config.attention} is not for {found.family} models: leave it out")
        if device.type == "cpu" or _dtype(config, device) != torch.bfloat16:
            raise ConfigError(f"--attention {config.attention} needs a CUDA GPU and bfloat16: leave it out")
        if importlib.util.find_spec("flash_attn") is None:
            raise ConfigError(
                f"--attention {config.attention} needs a package: pip install flash-attn, or leave it out"
            )
    return found


def scorers(config: TrainConfig, device: torch.device, names: Sequence[str] | None = None) -> list[Scorer]:
    """The scorers of the rewards `names`, by default the run's. Raises ConfigError if weights cannot be loaded."""
    paths = reward_paths(config)
    found: list[Scorer] = []
    for name in config.reward if names is None else names:
        scorer = load_scorer(name, device, paths.get(name), dict(config))
        # At once, so that no two of them are on the device together.
        found.append(Parked(scorer, device) if config.offload_scorers and hasattr(scorer, "to") else scorer)
    return found


def evaluation_scorers(found: list[Scorer]) -> list[tuple[str, Scorer]]:
    """The scorers of a report: each scorer's variants as (label, scorer) pairs, with no label twice."""
    return list({label: part for scorer in found for label, part in variants(scorer)}.items())


def features(config: TrainConfig, device: torch.device) -> Features:
    """The feature extractor for diversity of pictures. Raises ConfigError if weights cannot be loaded."""
    return load_features(config.features, device)


def identity(config: TrainConfig) -> list[str]:
    """What the base's figures depend on besides prompts and sampling: the model's and scorers' settings and files."""
    # A resumed run has absolute paths in place of those that were typed.
    config = absolute(config)
    options = [option for reward in config.reward for option in find(reward).OPTIONS]
    found = [str((name, getattr(config, name))) for name in (*IDENTITY, *options)]
    for given in (config.model, config.transformer, config.features, *reward_paths(config).values()):
        path = Path(str(given)).expanduser()
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files if file.is_file()]
    states = [state(name, reward_paths(config).get(name), dict(config)) for name in config.reward]
    return found + [each for each in states if each is not None]


def sampling(config: TrainConfig) -> held_out.Sampling:
    """How the evaluation of a run draws pictures."""
    # No larger than the rollout's batch.
    leaves = config.leaves * min(config.prompts_per_batch, config.prompts_per_update)
    return held_out.Sampling(
        steps=config.eval_steps,
        seed=config.seed,
        guidance=config.guidance,
        resolution=config.resolution,
        batch=config.max_batch or min(leaves, 128),
        decode_batch=config.decode_batch,
        solver=config.eval_solver,
    )


def evaluation_protocol(
    config: TrainConfig, prompts: PromptList, found: list[Scorer], extractor: Features
) -> held_out.EvaluationProtocol:
    """How a model with these settings is evaluated on held-out prompts."""
    return held_out.EvaluationProtocol(
        prompts, evaluation_scorers(found), extractor, config.eval_images, sampling(config)
    )


def shown_prompts(heldout: PromptList) -> list[str]:
    """The held-out prompts in a run's sample grids."""
    return [heldout.texts[i] for i in held_out.spread(heldout.texts, 6)]


def drawn_prompts(
    config: TrainConfig, train: PromptList, heldout: PromptList, processes: int = 1, done: int = 0
) -> list[str]:
    """The different prompts that a run still has to draw after `done` updates: in training, evaluations, sample grids."""
    each = processes * config.prompts_per_update
    texts = drawn(train.texts, done * each, config.updates * each, config.seed)
    texts += [picture.prompt for picture in captioned(config.data_folder)]
    if config.report or config.eval_every:
        texts += heldout.texts
    elif config.sample_every:
        texts += shown_prompts(heldout)
    return list(dict.fromkeys(texts))


def encode(
    config: TrainConfig, skeleton: Backbone, device: torch.device, prompts: list[str], rank: int, processes: int
) -> None:
    """Encodes this process's share of the prompts that are not in the text cache. Raises ConfigError."""
    encode_text(config.model, skeleton, _options(config, device, prompts), slice(rank, None, processes))


def check_text(config: TrainConfig, skeleton: Backbone, device: torch.device, prompts: list[str]) -> int:
    """The number of prompts that must be encoded before the model is loaded. Raises ConfigError, see `check_text_cache`."""
    return check_text_cache(config.model, skeleton, _options(config, device, prompts))


def load_model(
    config: TrainConfig,
    device: torch.device,
    prompts: list[str] | None = None,
    sharded: bool = False,
    skeleton: Backbone | None = None,
) -> Backbone:
    """Loads the model of a run. `prompts` are all that it will ever get, see `LoadOptions`; `skeleton` see `load_backbone`."""
    backbone = load_backbone(config.model, _options(config, device, prompts, sharded), skeleton)
    backbone.split_guidance = config.split_guidance
    if config.attention != "native":
        try:
            backbone.transformer.set_attention_backend(config.attention)
        except RuntimeError as error:
            # Too old a version.
            raise ConfigError(f"--attention {config.attention}: {one_line(error)}") from None
    return backbone


def _options(
    config: TrainConfig, device: torch.device, prompts: list[str] | None, sharded: bool = False
) -> LoadOptions:
    return LoadOptions(
        _dtype(config, device),
        device,
        config.max_sequence_length,
        prompts=prompts,
        text_cache=config.text_cache,
        transformer=config.transformer,
        nf4=config.quantize == "nf4",
        sharded=sharded,
    )
