"""A pipeline with random weights, of the demo model's classes but smaller, for tests that need a whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from transformers import CLIPTextConfig

torch.set_num_threads(1)

TEXT_WIDTH, HEADS, HEAD_WIDTH = 32, 2, 16


@pytest.fixture(scope="session")
def clip_config() -> Callable[[int], CLIPTextConfig]:
    """`clip_config(width)`: a one-layer CLIP text encoder over the demo model's tokenizer."""

    def clip_config(width: int) -> CLIPTextConfig:
        from transformers import CLIPTextConfig

        from tmpo_trainer.demo import build

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
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextModelWithProjection

    from tmpo_trainer.demo import build

    torch.manual_seed(0)
    tokenizer = build.make_tokenizer()
    text_config = clip_config(TEXT_WIDTH)
    vae = diffusers.AutoencoderKL(
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
    transformer = diffusers.SD3Transformer2DModel(
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
