"""A tiny Z-Image and a tiny Z-Image-Turbo with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

WIDTH = 32
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n{% endif %}{% endif %}"
)


def text_encoder() -> tuple[Qwen3Model, Qwen2Tokenizer]:
    """Three layers over bytes, of which the pipeline takes the second's output. "a red circle" has 31 tokens."""
    vocab = {letter: i for i, letter in enumerate([*sorted(ByteLevel.alphabet()), "<|endoftext|>"])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=131072, chat_template=TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    config = Qwen3Config(
        vocab_size=272,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=40960,
    )
    return Qwen3Model(config), tokenizer


def transformer() -> ZImageTransformer2DModel:
    made = ZImageTransformer2DModel(
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 16, 16],
    )
    # Fresh projections are timid. With these, velocities are of order 1, prompt and guidance matter, and padding would show.
    with torch.no_grad():
        made.all_final_layer["2-1"].linear.weight.normal_(std=0.2)
        made.cap_embedder[1].weight.mul_(4)
        made.x_pad_token.normal_()
        made.cap_pad_token.normal_()
    return made


def save(folder: Path, turbo: bool) -> Path:
    """Z-Image with a shift of 6, or Z-Image-Turbo with a shift of 3."""
    torch.manual_seed(0)
    encoder, tokenizer = text_encoder()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if turbo else 6.0)
    ZImagePipeline(scheduler, vae, encoder, tokenizer, transformer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_z_image(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """`tiny_z_image(turbo)`: its folder."""
    made: dict[bool, Path] = {}

    def tiny_z_image(turbo: bool) -> Path:
        if turbo not in made:
            made[turbo] = save(tmp_path_factory.mktemp("z_image") / "model", turbo)
        return made[turbo]

    return tiny_z_image
