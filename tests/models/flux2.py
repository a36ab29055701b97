"""Tiny FLUX.2 models with random weights: [dev], a base [klein] and a distilled one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WIDTH = 16
QWEN = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
#: Without the system message, which would be hundreds of tokens.
MISTRAL = "{% for m in messages if m.role == 'user' %}[INST]{{ m.content[0].text }}[/INST]{% endfor %}"
SIZES = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 2, "num_key_value_heads": 1}
#: As many layers as the pipelines read, over bytes.
SIZES |= {"head_dim": 8, "vocab_size": 272}


def tokenizer(template: str, *marks: str) -> Qwen2Tokenizer:
    vocab = {letter: i for i, letter in enumerate([*sorted(ByteLevel.alphabet()), "<|endoftext|>"])}
    # As the real ones, longer than the text encoder's max_position_embeddings.
    made = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=131072, chat_template=template)
    made.add_special_tokens({"additional_special_tokens": list(marks)})
    return made


def qwen() -> tuple[Any, Any]:
    config = Qwen3Config(**SIZES, num_hidden_layers=27, max_position_embeddings=40960)
    return Qwen3ForCausalLM(config), tokenizer(QWEN, "<|im_start|>", "<|im_end|>")


def mistral() -> tuple[Any, Any]:
    """With a tokenizer alone: the real model has it in a PixtralProcessor, which needs torchvision."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "mistral", **SIZES, "num_hidden_layers": 30, "rope_theta": 1e9}
    config = Mistral3Config(text_config=text, vision_config={"model_type": "pixtral", **vision}, image_token_index=257)
    return Mistral3ForConditionalGeneration(config), tokenizer(
        MISTRAL, "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"
    )


def transformer(guidance: bool) -> Flux2Transformer2DModel:
    made = Flux2Transformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    # Fresh projections are timid. With these, velocities are of order 1 and prompt and guidance matter.
    with torch.no_grad():
        made.proj_out.weight.normal_(std=0.2)
        made.context_embedder.weight.mul_(4)
        if guidance:
            made.time_guidance_embed.guidance_embedder.linear_1.weight.mul_(4)
    return made


def vae() -> AutoencoderKLFlux2:
    made = AutoencoderKLFlux2(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=1)
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.5, 2)
    return made


def save(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    dev = kind == "dev"
    encoder, words = mistral() if dev else qwen()
    switches = {} if dev else {"is_distilled": kind == "distilled"}
    pipeline: Any = Flux2Pipeline if dev else Flux2KleinPipeline
    pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae(),
        text_encoder=encoder,
        tokenizer=words,
        transformer=transformer(dev),
        **switches,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_flux2(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_flux2(kind)`: the folder of "dev", "base" (klein) or "distilled" (klein)."""
    made: dict[str, Path] = {}

    def tiny_flux2(kind: str) -> Path:
        if kind not in made:
            made[kind] = save(tmp_path_factory.mktemp("flux2") / "model", kind)
        return made[kind]

    return tiny_flux2
