"""Builds the bundled demo model from scratch: `python -m tmpo_trainer.demo.build`.

Three stages, each seeded, each resumable from `--work` after an interruption:

    draw    random scenes of the domain, as pictures and prompts
    vae     a narrow 8x AutoencoderKL with 16 channels
    model   two small CLIP text encoders and a 3-block SD3 transformer, trained together by rectified flow

The result is an ordinary `StableDiffusion3Pipeline` folder in float16. `--model-steps 200 --vae-steps 100 --scenes 2000`
tries all stages in minutes, but the model then draws only noise.
"""

# diffusers' annotations are wrong here: one-element tuples for any length, unions for a single type.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from . import domain

MAX_TOKENS = 12
TEXT_WIDTH = 96
VAE_BATCH, MODEL_BATCH = 10, 64
MODEL_LR = 1.5e-3
#: Cycles of the transformer's training: (steps, mean of the sigmas' logits). In each, the learning rate falls to 0. The
#: second sees noisier latents, where the number of objects and their places are decided.
MODEL_CYCLES = ((16_000, 0.6), (24_000, 1.0))
#: SD3's latent normalisation, which ComfyUI hard-codes: the VAE is rescaled to fit it, not the other way round.
SD3_SHIFT, SD3_SCALE = 0.0609, 1.5305
#: How often each family is drawn.
FAMILY_WEIGHTS = {"single": 0.14, "count": 0.2, "pair": 0.2, "relation": 0.26, "mixed": 0.2}


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary in which each word of the domain is one token (other words split into letters).

    Byte-pair merges go by frequency, ties by spelling. The `tokenizers` trainer numbers the letters differently in each
    process, so that a resumed build would continue with other ids.
    """
    words = sorted({word for family in domain.FAMILIES for s in domain.all_scenes(family) for word in s.text().split()})
    spelt = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for parts in spelt for pair in pairwise(parts)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelt = [merge(parts, best) for parts in spelt]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges)])
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """`parts` with each occurrence of `pair` joined."""
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    # With CLIP's own start (std .02), the text is so faint beside the transformer's biases that it is long ignored.
    nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight, std=0.5)
    nn.init.normal_(encoder.text_model.embeddings.position_embedding.weight, std=0.25)
    nn.init.normal_(encoder.text_projection.weight, std=0.5 / TEXT_WIDTH**0.5)
    return encoder


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        # Multiples of 32, so that ComfyUI's own AutoencoderKL can be built with them. One group, because several
        # groups of few channels normalise away the very thing to be encoded, the colour of a plain area.
        block_out_channels=(32, 32, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,
        sample_size=domain.IMAGE_SIZE,
        scaling_factor=SD3_SCALE,
        shift_factor=SD3_SHIFT,
    )


def make_transformer() -> SD3Transformer2DModel:
    """Depth = heads and 64 per head, so that ComfyUI's size detection reads them correctly."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        num_attention_heads=3,
        attention_head_dim=64,
        caption_projection_dim=192,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def _draw_chunk(job: tuple[int, int, int]) -> tuple[np.ndarray, list[str]]:
    seed, chunk, size = job
    rng = np.random.default_rng([seed, chunk])
    families = rng.choice(list(FAMILY_WEIGHTS), size, p=list(FAMILY_WEIGHTS.values()))
    scenes = [domain.sample_scene(rng, str(family)) for family in families]
    return np.stack([domain.render(scene, rng) for scene in scenes]), [scene.text() for scene in scenes]


def draw_stage(work: Path, scenes: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Pictures uint8 `[scenes, 64, 64, 3]` and their prompts."""
    pictures, prompts = work / "pictures.npy", work / "prompts.json"
    if not prompts.exists():
        size = min(1000, scenes)
        jobs = [(seed, chunk, size) for chunk in range(math.ceil(scenes / size))]
        with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
            parts = list(tqdm(pool.imap(_draw_chunk, jobs), total=len(jobs), desc="draw"))
        np.save(pictures, np.concatenate([images for images, _ in parts])[:scenes])
        prompts.write_text(json.dumps([text for _, texts in parts for text in texts][:scenes]))
    return np.load(pictures, mmap_mode="r"), json.loads(prompts.read_text())


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 `[N, H, W, 3]` -> float `[N, 3, H, W]` in -1..1."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def lr_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then constant, then linear to zero over the last 60%."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (0.6 * steps))


def save_state(path: Path, state: dict) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def batch_indices(seed: int, step: int, size: int, total: int) -> np.ndarray:
    """The examples of a step, a function of (seed, step), so that a resumed build repeats them."""
    return np.sort(np.random.default_rng([seed, 1, step]).integers(0, total, size))


def vae_stage(work: Path, pictures: np.ndarray, steps: int, seed: int, every: int = 500) -> AutoencoderKL:
    """Trains with L1 + squared error + a light KL, then rescales the latents to SD3's shift and scale, channel by channel."""
    torch.manual_seed(seed)
    vae = make_vae()
    done = work / "vae.pt"
    if done.exists():
        vae.load_state_dict(torch.load(done, weights_only=True))
        return vae.eval()
    vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    partial, start = work / "vae-partial.pt", 0
    if partial.exists():
        state = torch.load(partial, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="vae")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * lr_factor(step, steps, 100)
        images = to_tensor(pictures[batch_indices(seed, step, VAE_BATCH, len(pictures))])
        images = images.to(memory_format=torch.channels_last)
        torch.manual_seed(seed * 1_000_003 + step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            z = posterior.mean + torch.exp(0.5 * posterior.logvar) * torch.randn_like(posterior.mean)
            output = vae.decode(z).sample
        error = output.float() - images
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-3 * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(l1=f"{error.abs().mean():.4f}", kl=f"{kl:.2f}")
        if (step + 1) % every == 0:
            save_state(partial, {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    vae.to(memory_format=torch.contiguous_format).eval()
    fit_latents_to_sd3(vae, pictures[: min(4096, len(pictures))])
    save_state(done, vae.state_dict())
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray, batch: int = 128) -> Tensor:
    """Posterior means `[N, 16, 8, 8]`, as the VAE gives them (no shift, no scale)."""
    starts = tqdm(range(0, len(pictures), batch), desc="encode", disable=len(pictures) < 10_000)
    return torch.cat([vae.encode(to_tensor(pictures[i : i + batch])).latent_dist.mean for i in starts])


@torch.no_grad()
def fit_latents_to_sd3(vae: AutoencoderKL, pictures: np.ndarray) -> None:
    """Gives every latent channel the mean SD3_SHIFT and the std 1 / SD3_SCALE, pictures unchanged.

    The affine map per channel is folded into the 1x1 quant convolutions. Channels that the KL has switched off (less signal
    than posterior noise; the decoder ignores them) are held at the mean. Scaled up, they would be noise to be learnt.
    """
    posteriors = [vae.encode(to_tensor(pictures[i : i + 128])).latent_dist for i in range(0, len(pictures), 128)]
    latents = torch.cat([posterior.mean for posterior in posteriors])
    noise = torch.cat([posterior.std for posterior in posteriors]).mean((0, 2, 3))
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    gain = 1 / (SD3_SCALE * std)
    offset = SD3_SHIFT - gain * mean
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert isinstance(quant, nn.Conv2d) and isinstance(post, nn.Conv2d)
    assert quant.bias is not None and post.bias is not None
    quant.weight[:16].mul_(gain[:, None, None, None])
    quant.bias[:16].mul_(gain).add_(offset)
    quant.bias[16:].add_(2 * gain.log())
    post.bias.sub_(post.weight[:, :, 0, 0] @ (offset / gain))
    post.weight.div_(gain[None, :, None, None])
    off = torch.nonzero(std < noise).flatten()
    print(f"{16 - len(off)} of 16 latent channels carry signal")
    quant.weight[off], quant.bias[off] = 0.0, SD3_SHIFT
    # The lowest log-variance that diffusers' posterior keeps: sampling gives the mean.
    quant.weight[16 + off], quant.bias[16 + off] = 0.0, -30.0


class TextToVelocity(nn.Module):
    """Text encoders and transformer as one trainable module; text features as `StableDiffusion3Pipeline` forms them."""

    def __init__(self, text_encoders: list[CLIPTextModelWithProjection], transformer: SD3Transformer2DModel):
        super().__init__()
        self.text_encoders = nn.ModuleList(text_encoders)
        self.transformer = transformer

    def forward(self, x: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        outputs = [encoder(ids, output_hidden_states=True) for encoder in self.text_encoders]
        return self.transformer(
            hidden_states=x,
            timestep=1000 * sigma,
            encoder_hidden_states=torch.cat([output.hidden_states[-2] for output in outputs], -1),
            pooled_projections=torch.cat([output.text_embeds for output in outputs], -1),
            return_dict=False,
        )[0]


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    return tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")[
        "input_ids"
    ]


def model_stage(
    work: Path,
    latents: Tensor,
    prompts: list[str],
    cycles: Sequence[tuple[int, float]],
    seed: int,
    compile: bool,
    every: int = 1000,
) -> tuple[CLIPTokenizer, TextToVelocity]:
    """Trains by rectified flow on cached latents: logit-normal sigmas, 10% empty prompts. Returns the EMA weights."""
    torch.manual_seed(seed + 1)
    tokenizer = make_tokenizer()
    model = TextToVelocity([make_text_encoder(tokenizer) for _ in range(2)], make_transformer())
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.AdamW(model.parameters(), lr=MODEL_LR, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    partial, start = work / "model-partial.pt", 0
    if partial.exists():
        state = torch.load(partial, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    ids = token_ids(tokenizer, prompts)
    empty = token_ids(tokenizer, [""])
    velocity = torch.compile(model) if compile else model
    # (step within its cycle, length of the cycle, mean logit) of every step.
    plan = [(step, length, mean) for length, mean in cycles for step in range(length)]
    steps = len(plan)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="model")
    running = 0.0
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = MODEL_LR * lr_factor(plan[step][0], plan[step][1], 500)
        chosen = torch.from_numpy(batch_indices(seed, step, MODEL_BATCH, len(prompts)))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        x0 = latents[chosen].float()
        noise = torch.randn(x0.shape, generator=generator)
        sigma = torch.sigmoid(plan[step][2] + torch.randn(len(x0), generator=generator))
        s = sigma[:, None, None, None]
        dropped = torch.rand(len(x0), generator=generator) < 0.1
        text = torch.where(dropped[:, None], empty, ids[chosen])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prediction = velocity((1 - s) * x0 + s * noise, sigma, text)
        loss = (prediction.float() - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(model)
        running += 0.01 * (loss.item() - running) if step > start else loss.item()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % every == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(partial, {**state, "step": step + 1})
    averaged = ema.module
    assert isinstance(averaged, TextToVelocity)
    return tokenizer, averaged.eval()


def assemble(vae: AutoencoderKL, tokenizer: CLIPTokenizer, model: TextToVelocity) -> StableDiffusion3Pipeline:
    """An ordinary pipeline without T5 (call it with `max_sequence_length=0`, or it appends 256 zero tokens)."""
    return StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=model.text_encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=model.text_encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tmpo_trainer.demo.build", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--work", type=Path, default=Path("outputs/demo-build"), help="folder for intermediate results")
    parser.add_argument("--scenes", type=int, default=80_000, help="pictures to draw")
    parser.add_argument("--vae-steps", type=int, default=6_000)
    parser.add_argument("--model-steps", type=int, help="train one cycle of this many steps in place of the full plan")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the transformer (needs a C++ compiler; 1.3x)"
    )
    args = parser.parse_args(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    pictures, prompts = draw_stage(args.work, args.scenes, args.seed)
    vae = vae_stage(args.work, pictures, args.vae_steps, args.seed)
    cache = args.work / "latents.pt"
    if not cache.exists():
        latents = (encode(vae, pictures) - SD3_SHIFT) * SD3_SCALE
        save_state(cache, {"latents": latents.half()})
    latents = torch.load(cache, weights_only=True)["latents"]
    cycles = MODEL_CYCLES if args.model_steps is None else ((args.model_steps, MODEL_CYCLES[0][1]),)
    tokenizer, model = model_stage(args.work, latents, prompts, cycles, args.seed, args.compile)
    pipeline = assemble(vae, tokenizer, model)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(args.output)
    print(f"saved {args.output}; measure it with: python -m benchmarks card {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
