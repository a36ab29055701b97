"""A pipeline folder of FLUX.1-dev's or SD3.5-Medium's size with random weights, to measure time and memory without theirs.

    python benchmarks/random_model.py flux /tmp/flux
    python benchmarks/iteration.py --preset pickscore --reward shapes --model /tmp/flux

`--blocks` and `--heads` make it smaller, e.g. for a CPU. The text encoders have one thin layer: they are not measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

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

from tmpo_trainer.demo.build import make_tokenizer

T5_WIDTH = 4096


def vae(scale: float, shift: float) -> AutoencoderKL:
    """That of both models: alike but for the scale."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def t5() -> tuple[T5EncoderModel, Any]:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(c) for c in range(ord("a"), ord("z") + 1))]
    config = T5Config(vocab_size=len(pieces), d_model=T5_WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    return T5EncoderModel(config), T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces])


def clip(kind: Any, width: int) -> Any:
    tokenizer = make_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        projection_dim=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


def flux(blocks: list[int], heads: int) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        num_layers=blocks[0],
        num_single_layers=blocks[1],
        num_attention_heads=heads,
        guidance_embeds=True,
    )
    encoder, tokenizer = t5()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae(0.3611, 0.1159),
        text_encoder=clip(CLIPTextModel, 768),
        tokenizer=make_tokenizer(),
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


def sd35m(blocks: list[int], heads: int) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=128,
        num_layers=blocks[0],
        num_attention_heads=heads,
        attention_head_dim=64,
        caption_projection_dim=64 * heads,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=384,
        qk_norm="rms_norm",
        dual_attention_layers=tuple(range((blocks[0] + 1) // 2 + (blocks[0] > 2))),
    )
    encoder, tokenizer = t5()
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(1.5305, 0.0609),
        text_encoder=clip(CLIPTextModelWithProjection, 768),
        tokenizer=make_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection, 1280),
        tokenizer_2=make_tokenizer(),
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
        transformer=transformer,
    )


#: Blocks (for FLUX: joint and single ones) and attention heads of the real models.
SIZES = {"flux": (flux, [19, 38], 24), "sd35m": (sd35m, [24], 24)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kind", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", help="for FLUX joint and single ones, for SD3.5 all")
    parser.add_argument("--heads", type=int)
    args = parser.parse_args(arguments)
    make, blocks, heads = SIZES[args.kind]
    if args.blocks and len(args.blocks) != len(blocks):
        parser.error(f"--blocks of {args.kind}: give {len(blocks)}")
    torch.manual_seed(0)
    # Made in bfloat16: full-size FLUX has 12 G weights.
    torch.set_default_dtype(torch.bfloat16)
    try:
        pipeline = make(args.blocks or blocks, args.heads or heads)
    finally:
        torch.set_default_dtype(torch.float32)
    pipeline.save_pretrained(args.folder)
    count = sum(p.numel() for p in pipeline.transformer.parameters())
    print(f"{args.folder}: {type(pipeline).__name__}, transformer of {count / 1e6:.1f} M random weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
