"""What tests share: tiny pipelines with random weights, settings that fit them, a made-up reward, trainers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.models.families import tiny_kontext, tiny_sd35_large  # noqa: F401
from tests.models.flux2 import tiny_flux2  # noqa: F401
from tests.models.qwen import tiny_qwen  # noqa: F401
from tests.models.z_image import tiny_z_image  # noqa: F401
from tmpo_trainer.backbones import load_backbone
from tmpo_trainer.backbones.base import Backbone, LoadOptions
from tmpo_trainer.demo import build
from tmpo_trainer.methods.batch import Clock, Network, PromptBatch
from tmpo_trainer.settings.config import TrainConfig
from tmpo_trainer.settings.presets import make_config
from tmpo_trainer.training.loop import Trainer

torch.set_num_threads(1)

#: Makes a mutation of a file or message, from random numbers, what is valid, and scraps that mean something in its format.
Mutate = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


@pytest.fixture(scope="session")
def mutate() -> Mutate:
    """`mutate(source, data, scraps)`: one to sixteen edits: flips, other bytes, cuts, repeats and scraps."""

    def mutate(source: random.Random, data: bytes, scraps: Sequence[bytes]) -> bytes:
        changed = bytearray(data)
        for _ in range(source.choice((1, 1, 2, 4, 16))):
            place, length = source.randrange(len(changed) + 1), source.choice((0, 1, 2, 4, 20, 64))
            kind = source.randrange(20)
            if kind < 3 and changed:
                changed[min(place, len(changed) - 1)] ^= 1 << source.randrange(8)
            elif kind < 6:
                changed[place : place + length] = source.randbytes(length or 1)
            elif kind < 9:
                del changed[place : place + length]
            elif kind < 12:
                changed[place:place] = changed[place : place + length] * source.choice((1, 50))
            elif kind < 19:
                changed[place : place + length] = source.choice(scraps)
            else:
                del changed[place:]
        return bytes(changed)

    return mutate


TEXT_WIDTH, HEADS, HEAD_WIDTH = 32, 2, 16


@pytest.fixture(scope="session")
def clip_config() -> Callable[[int], CLIPTextConfig]:
    """`clip_config(width)`: a one-layer CLIP text encoder over the demo model's tokenizer."""

    def clip_config(width: int) -> CLIPTextConfig:
        tokenizer = build.make_tokenizer()
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width,
            projection_dim=width,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=build.MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    return clip_config


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, clip_config: Callable[[int], CLIPTextConfig]) -> Path:
    """Folder of a `StableDiffusion3Pipeline` without T5: pictures of up to 128 x 128 in multiples of 16."""
    torch.manual_seed(0)
    tokenizer = build.make_tokenizer()
    text_config = clip_config(TEXT_WIDTH)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,
        sample_size=64,
        scaling_factor=build.SD3_SCALE,
        shift_factor=build.SD3_SHIFT,
    )
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        caption_projection_dim=HEADS * HEAD_WIDTH,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    # Fresh projections are timid. With these, velocities are of order 1 and the prompt matters.
    with torch.no_grad():
        transformer.proj_out.weight.normal_(std=0.2)
        for encoder_projection in (
            transformer.context_embedder.weight,
            transformer.time_text_embed.text_embedder.linear_1.weight,
        ):
            encoder_projection.mul_(4)
    encoders = [CLIPTextModelWithProjection(text_config) for _ in range(2)]
    pipeline = build.assemble(vae, tokenizer, build.TextToVelocity(encoders, transformer))
    folder = tmp_path_factory.mktemp("tiny") / "model"
    pipeline.save_pretrained(folder)
    return folder


PROMPTS = ("a red circle", "two blue squares", "a green triangle", "a pink circle and a cyan square")


WIDTH = 32


def t5() -> tuple[Any, Any]:
    """A one-layer T5 encoder and its tokenizer, over letters."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(c) for c in range(ord("a"), ord("z") + 1))]
    config = T5Config(vocab_size=len(pieces), d_model=WIDTH, d_kv=16, d_ff=WIDTH, num_layers=1, num_heads=2)
    return T5EncoderModel(config), T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces])


def small_vae(scale: float, shift: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,
        scaling_factor=scale,
        shift_factor=shift,
    )


def wake(transformer: Any) -> None:
    """Fresh projections are timid. With these, velocities are of order 1 and prompt and guidance matter."""
    with torch.no_grad():
        transformer.proj_out.weight.normal_(std=0.2)
        transformer.context_embedder.weight.mul_(4)
        for name in ("text_embedder", "guidance_embedder"):
            if hasattr(transformer.time_text_embed, name):
                getattr(transformer.time_text_embed, name).linear_1.weight.mul_(4)


@pytest.fixture(scope="session")
def tiny_flux(
    tmp_path_factory: pytest.TempPathFactory, clip_config: Callable[[int], CLIPTextConfig]
) -> Callable[[bool], Path]:
    """`tiny_flux(dev)`: with guidance input and shifted sigmas as FLUX.1-dev, or without as FLUX.1-schnell."""
    made: dict[bool, Path] = {}

    def tiny_flux(dev: bool) -> Path:
        if dev not in made:
            torch.manual_seed(0)
            transformer = FluxTransformer2DModel(
                in_channels=64,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                guidance_embeds=dev,
                axes_dims_rope=(4, 6, 6),
            )
            wake(transformer)
            encoder, tokenizer = t5()
            pipeline = FluxPipeline(
                scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dev, shift=3.0 if dev else 1.0),
                vae=small_vae(0.3611, 0.1159),
                text_encoder=CLIPTextModel(clip_config(WIDTH)),
                tokenizer=build.make_tokenizer(),
                text_encoder_2=encoder,
                tokenizer_2=tokenizer,
                transformer=transformer,
            )
            made[dev] = tmp_path_factory.mktemp("flux") / "model"
            pipeline.save_pretrained(made[dev])
        return made[dev]

    return tiny_flux


@pytest.fixture(scope="session")
def tiny_sd35(tmp_path_factory: pytest.TempPathFactory, clip_config: Callable[[int], CLIPTextConfig]) -> Path:
    """A tiny SD3.5-Medium: a second attention in its first block, rms-normalised queries and keys, and T5."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        caption_projection_dim=WIDTH,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    wake(transformer)
    encoder, tokenizer = t5()
    wide = T5EncoderModel(T5Config(**{**encoder.config.to_dict(), "d_model": 2 * WIDTH}))
    clips = [CLIPTextModelWithProjection(clip_config(WIDTH)) for _ in range(2)]
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small_vae(1.5305, 0.0609),
        text_encoder=clips[0],
        tokenizer=build.make_tokenizer(),
        text_encoder_2=clips[1],
        tokenizer_2=build.make_tokenizer(),
        text_encoder_3=wide,
        tokenizer_3=tokenizer,
        transformer=transformer,
    )
    folder = tmp_path_factory.mktemp("sd35") / "model"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def written_out_loss() -> Callable[..., torch.Tensor]:
    """`written_out_loss(paths, log_pi, log_w, delta, rewards, ...)`: Softmax-TB in loops over the nodes, for autograd.

    paths: the nodes of each stochastic step in row order; those of the last one are the leaves. log_pi, log_w, delta: a
    scalar per node, its log-probability, its log ratio with the shift, its log ratio to the reference. rewards: `[K]`.
    """

    def written_out_loss(
        paths: Sequence[Sequence[tuple[int, ...]]],
        log_pi: dict[tuple[int, ...], torch.Tensor],
        log_w: dict[tuple[int, ...], torch.Tensor],
        delta: dict[tuple[int, ...], torch.Tensor],
        rewards: torch.Tensor,
        beta: float,
        clip: float,
        baseline: str,
        anchor_weight: float | None,
    ) -> torch.Tensor:
        leaves = paths[-1]

        def along(values: dict[tuple[int, ...], torch.Tensor], leaf: tuple[int, ...]) -> torch.Tensor:
            return torch.stack([values[leaf[:depth]] for depth in range(2, len(leaf) + 1)]).sum()

        def surrogate(log_ratio: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
            rho = log_ratio.exp()
            return torch.min(rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage)

        log_q = (beta * rewards).log_softmax(0)
        source, weight = (log_pi, 1.0) if anchor_weight is None else (delta, anchor_weight)
        log_p = (weight * torch.stack([along(source, leaf) for leaf in leaves])).detach().log_softmax(0)
        advantage = log_q - log_p
        if baseline != "siblings":
            if baseline == "group":
                advantage = advantage - advantage.mean()
            return -torch.stack([surrogate(along(log_w, x), a) for x, a in zip(leaves, advantage, strict=True)]).mean()
        loss = torch.zeros((), dtype=rewards.dtype)
        for step in paths:
            below = {
                path: torch.stack([a for leaf, a in zip(leaves, advantage, strict=True) if leaf[: len(path)] == path])
                for path in step
            }
            terms = []
            for path in step:
                siblings = [below[other].mean() for other in step if other[:-1] == path[:-1]]
                terms.append(surrogate(log_w[path], below[path].mean() - torch.stack(siblings).mean()))
            loss = loss - torch.stack(terms).mean()
        return loss

    return written_out_loss


class RedScorer:
    """Mean red less mean blue of a picture, about -0.1..0.1. Deterministic and blind to the prompt."""

    name = "red"

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None = None) -> torch.Tensor:
        assert len(images) == len(prompts)
        means = torch.from_numpy(images.astype(np.float32) / 255).mean((1, 2))
        return means[:, 0] - means[:, 2]


@pytest.fixture(scope="session")
def red_scorer() -> RedScorer:
    return RedScorer()


@pytest.fixture(scope="session")
def load(tiny_model: Path) -> Callable[..., Backbone]:
    """A fresh backbone of the tiny model."""

    def load(max_sequence_length: int = 0) -> Backbone:
        return load_backbone(str(tiny_model), LoadOptions(torch.float32, torch.device("cpu"), max_sequence_length))

    return load


@pytest.fixture(scope="session")
def load_stock(tiny_model: Path) -> Callable[[], StableDiffusion3Pipeline]:
    """A fresh diffusers pipeline of the tiny model. That it has no T5 must be said, or diffusers refuses the folder."""

    def load() -> StableDiffusion3Pipeline:
        pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_model, text_encoder_3=None, tokenizer_3=None)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


def load_folder(folder: Path, config: TrainConfig) -> Backbone:
    return load_backbone(str(folder), LoadOptions(torch.float32, torch.device("cpu"), config.max_sequence_length))


@pytest.fixture
def make_trainer(load: Callable[..., Backbone], red_scorer: RedScorer, tmp_path: Path) -> Callable[..., Trainer]:
    """`make_trainer(setting=value, ...)`: a trainer of a fresh tiny model, or of `folder` or `backbone`, in
    `tmp_path`.

    The tree branches at steps 1, 2 and 3 of 6 unless told otherwise: 96 evaluations in a rollout, 12 in a replay.
    """

    def make(
        scorer: Any = red_scorer,
        prompts: Sequence[str] = PROMPTS,
        folder: Path | None = None,
        backbone: Backbone | None = None,
        **changes: Any,
    ) -> Trainer:
        settings: dict[str, Any] = {
            "prompts_per_update": 2,
            "branch_late": (1, 2, 3),
            # So large that the Beta distribution is its mean.
            "kappa": 1e9,
            "guidance": 1.0,
            "resolution": (32, 32),
            "max_sequence_length": 0,
            "lora_rank": 4,
            "lora_alpha": 8,
            "updates": 20,
            "learning_rate": 1e-3,
        }
        config = make_config([("settings", {**settings, **changes})])
        if backbone is None:
            backbone = load(config.max_sequence_length) if folder is None else load_folder(folder, config)
        return Trainer(config, tmp_path, backbone, [scorer], prompts)

    return make


@pytest.fixture
def shake() -> Callable[[Trainer, float], None]:
    """Moves the LoRA of a trainer away from zero, so that A and B both have gradients."""

    def shake(trainer: Trainer, scale: float = 0.05) -> None:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in trainer.weights.lora.values():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))

    return shake


@pytest.fixture(scope="session")
def roll() -> Callable[..., tuple[PromptBatch, Network]]:
    """`roll(trainer, slots, update=0)`: the rollout of one batch, ready for the method's gradient.

    Slots are (place in the update, prompt) each; by default the first two prompts.
    """

    def roll(
        trainer: Trainer, slots: Sequence[tuple[int, str]] | None = None, update: int = 0
    ) -> tuple[PromptBatch, Network]:
        slots = list(enumerate(PROMPTS[:2])) if slots is None else slots
        clock = Clock(trainer.device)
        trainer.method.begin(update, trainer.weights)
        network = trainer.roller.network([prompt for _, prompt in slots], clock)
        with trainer.judges.scoring() as scoring:
            finish = trainer.roller.roll_out(network, clock, trainer.method.shape(update), update, slots, scoring)
            return finish()[0], network

    return roll


@pytest.fixture(scope="session")
def gradient() -> Callable[[Trainer], torch.Tensor]:
    """The gradient of a trainer's LoRA as one vector."""

    def gradient(trainer: Trainer) -> torch.Tensor:
        parts = []
        for parameter in trainer.weights.lora.values():
            assert parameter.grad is not None
            parts.append(parameter.grad.flatten())
        return torch.cat(parts)

    return gradient
