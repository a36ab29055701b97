"""Writes a pipeline of FLUX.1-dev's or SD3.5-Medium's size with random weights, for measurements.

    python -m benchmarks random-model flux /tmp/flux

`--blocks` and `--heads` make it smaller, e.g. for a CPU. The text encoders have one thin layer: they are not measured.
`--configs` writes only the configs, those of the full text encoders too, so that `--dry-run` can estimate memory anywhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tmpo_trainer.demo.build import make_tokenizer

T5_WIDTH = 4096
#: Scale and shift of the latents.
FLUX_SCALE, SD3_SCALE = (0.3611, 0.1159), (1.5305, 0.0609)


def vae(
    scale: float, shift: float, channels: tuple[int, ...] = (128, 256, 512, 512), layers: int = 2, groups: int = 32
) -> AutoencoderKL:
    """The VAE of either model; they differ only in scale and shift. Fewer channels and layers make a smaller one."""
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=layers,
        norm_num_groups=groups,
        latent_channels=16,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def t5(thin: bool) -> tuple[T5EncoderModel, Any]:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(c) for c in range(ord("a"), ord("z") + 1))]
    sizes = {"d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": len(pieces)}
    if not thin:
        sizes = {"d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
    config = T5Config(d_model=T5_WIDTH, feed_forward_proj="gated-gelu", **sizes)
    return T5EncoderModel(config), T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces])


def clip(kind: Any, width: int, layers: int, thin: bool) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 77
    config = CLIPTextConfig(
        vocab_size=len(tokenizer) if thin else 49408,
        hidden_size=width,
        intermediate_size=64 if thin else 4 * width,
        projection_dim=width,
        num_hidden_layers=1 if thin else layers,
        num_attention_heads=width // 64,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, kind(config)


def flux_transformer(blocks: list[int], heads: int) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        num_layers=blocks[0],
        num_single_layers=blocks[1],
        num_attention_heads=heads,
        guidance_embeds=True,
    )


def flux_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


def flux(blocks: list[int], heads: int, thin: bool) -> FluxPipeline:
    encoder, tokenizer = t5(thin)
    clip_tokenizer, clip_encoder = clip(CLIPTextModel, 768, 12, thin)
    return FluxPipeline(
        scheduler=flux_scheduler(),
        vae=vae(*FLUX_SCALE),
        text_encoder=clip_encoder,
        tokenizer=clip_tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        transformer=flux_transformer(blocks, heads),
    )


def sd35m_transformer(blocks: list[int], heads: int) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
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
        # 0 to 12 of the 24.
        dual_attention_layers=tuple(range(blocks[0] // 2 + 1)),
    )


def sd35m_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def sd35m(blocks: list[int], heads: int, thin: bool) -> StableDiffusion3Pipeline:
    encoder, tokenizer = t5(thin)
    small_tokenizer, small = clip(CLIPTextModelWithProjection, 768, 12, thin)
    large_tokenizer, large = clip(CLIPTextModelWithProjection, 1280, 32, thin)
    return StableDiffusion3Pipeline(
        scheduler=sd35m_scheduler(),
        vae=vae(*SD3_SCALE),
        text_encoder=small,
        tokenizer=small_tokenizer,
        text_encoder_2=large,
        tokenizer_2=large_tokenizer,
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
        transformer=sd35m_transformer(blocks, heads),
    )


#: Blocks (for FLUX: joint and single ones) and attention heads of the real models.
SIZES = {"flux": (flux, [19, 38], 24), "sd35m": (sd35m, [24], 24)}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks random-model", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("kind", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", help="for FLUX joint and single ones, for SD3.5 all")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--configs", action="store_true", help="write no weights")
    args = parser.parse_args(arguments)
    make, blocks, heads = SIZES[args.kind]
    if args.blocks and len(args.blocks) != len(blocks):
        parser.error(f"--blocks of {args.kind}: give {len(blocks)}")
    torch.manual_seed(0)
    # Made in bfloat16: full-size FLUX has 12 G weights.
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta" if args.configs else "cpu"):
            pipeline = make(args.blocks or blocks, args.heads or heads, not args.configs)
    finally:
        torch.set_default_dtype(torch.float32)
    if args.configs:
        pipeline.save_config(args.folder)
        for name, part in pipeline.components.items():
            if isinstance(part, ModelMixin):
                part.save_config(args.folder / name)
            elif isinstance(part, PreTrainedModel):
                part.config.save_pretrained(args.folder / name)
            elif part is not None:
                part.save_pretrained(args.folder / name)
    else:
        pipeline.save_pretrained(args.folder)
    count = sum(p.numel() for p in pipeline.transformer.parameters())
    print(f"{args.folder}: {type(pipeline).__name__}, transformer of {count / 1e6:.1f} M random weights")
    return 0
