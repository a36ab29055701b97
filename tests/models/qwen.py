"""A tiny Qwen-Image with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

WIDTH = 32
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
#: What the tokenizer knows as whole words: the pipeline's template, of which the pipeline drops the first 34 tokens, and the
#: first of the tests' prompts. Other words are spelt in letters, so prompts have different lengths.
WORDS = """system
Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects and background:
user
assistant
 a red circle"""  # noqa: E501


def tokenizer() -> Qwen2Tokenizer:
    """Byte-pair encoding of `WORDS`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = Qwen2Tokenizer()._tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(special_tokens=MARKS, initial_alphabet=alphabet, vocab_size=1000, show_progress=False)
    made.train_from_iterator([WORDS], trainer)
    state = json.loads(made.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    # As in Qwen2.5-VL, longer than the text encoder's max_position_embeddings.
    found = Qwen2Tokenizer(vocab=state["vocab"], merges=merges, model_max_length=131072)
    found.add_special_tokens({"additional_special_tokens": MARKS[1:]})
    return found


def text_encoder(rows: int) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": rows,
                "hidden_size": WIDTH,
                "intermediate_size": WIDTH,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 128000,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
            },
            vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH},
            # The defaults are beyond the tiny vocabulary.
            image_token_id=1, video_token_id=1, vision_start_token_id=1, vision_end_token_id=1,
        )
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a `QwenImagePipeline`, with Qwen-Image's scheduler."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    # Fresh projections are timid. With these, velocities are of order 1 and the prompt matters.
    with torch.no_grad():
        transformer.proj_out.weight.normal_(std=0.2)
        transformer.txt_in.weight.mul_(4)
    words = tokenizer()
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        transformer=transformer,
    )
    folder = tmp_path_factory.mktemp("qwen") / "model"
    pipeline.save_pretrained(folder)
    return folder
