"""Draws the README's picture of base against trained.

The demo model draws the noise of the run's report without and with the run's LoRA, in a plain diffusers pipeline, and the
`shapes` scorer marks every picture as right or wrong. All held-out prompts are drawn and sorted by how many more of their
pictures are right with the LoRA. The picture shows prompts at evenly spaced ranks of that order, from the largest gain to
the largest loss. Prints the counts of the prompts shown and of all. It takes a few minutes on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from tmpo_trainer import tree
from tmpo_trainer.backbones import DEMO_MODEL
from tmpo_trainer.demo.split import FOLDER
from tmpo_trainer.prompts.lists import read_prompts
from tmpo_trainer.rewards.shapes import ShapesScorer

#: Pixels of the finished picture, which GitHub shows at about half its size.
TILE, FRAME, GAP, MARGIN, NAMES, TITLE, LEGEND = 168, 6, 8, 28, 124, 48, 64
#: Green and red. Readers who cannot tell them apart have the tick and the cross.
RIGHT, WRONG, INK, FAINT = "#1a7f37", "#cf222e", "#1f2328", "#59636e"


def draw(pipe: StableDiffusion3Pipeline, prompt: str, images: int, steps: int, seed: int) -> np.ndarray:
    """Pictures of the first noises that a report with this seed uses for a prompt: uint8 `[images, H, W, 3]`."""
    size = pipe.transformer.config.sample_size
    noise = tree.keyed_noise((seed, "evaluate", prompt), (pipe.transformer.config.in_channels, size, size))
    pictures = pipe(
        prompt,
        num_images_per_prompt=images,
        latents=torch.stack([noise(0, (image,)) for image in range(images)]),
        num_inference_steps=steps,
        guidance_scale=1,
        max_sequence_length=0,
    ).images
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])


def mark(sheet: ImageDraw.ImageDraw, x: int, y: int, right: bool) -> None:
    """A disc with a tick or a cross, centred at (x, y)."""
    radius = 17
    sheet.ellipse(
        (x - radius, y - radius, x + radius, y + radius), fill=RIGHT if right else WRONG, outline="white", width=3
    )
    if right:
        sheet.line([(x - 8, y), (x - 2, y + 7), (x + 8, y - 6)], fill="white", width=4, joint="curve")
    else:
        sheet.line([(x - 6, y - 6), (x + 6, y + 6)], fill="white", width=4)
        sheet.line([(x - 6, y + 6), (x + 6, y - 6)], fill="white", width=4)


def compose(prompts: list[str], pictures: np.ndarray, scores: np.ndarray, columns: int = 2) -> Image.Image:
    """Blocks of one prompt each, the base's row above the trained model's, one column per seed.

    Args:
        pictures: uint8 `[2, prompts, images, H, W, 3]`, the base first. scores: 0 or 1, `[2, prompts, images]`.
    """
    images, step = pictures.shape[2], TILE + GAP
    block_width, block_height = NAMES + images * step + MARGIN, TITLE + 2 * step + MARGIN
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (MARGIN + columns * block_width, MARGIN + rows * block_height + LEGEND), "white")
    pen, title, text = ImageDraw.Draw(sheet), ImageFont.load_default(30), ImageFont.load_default(26)
    for number, prompt in enumerate(prompts):
        left = MARGIN + number % columns * block_width
        top = MARGIN + number // columns * block_height
        pen.text((left, top + TITLE / 2 - 6), prompt, INK, title, anchor="lm")
        for model, name in enumerate(("base", "trained")):
            y = top + TITLE + model * step
            count = int(scores[model, number].sum())
            pen.text((left, y + TILE / 2 - 18), name, INK, text, anchor="lm")
            pen.text((left, y + TILE / 2 + 18), f"{count} of {images}", FAINT, text, anchor="lm")
            for image in range(images):
                x, right = left + NAMES + image * step, bool(scores[model, number, image])
                pen.rectangle((x, y, x + TILE - 1, y + TILE - 1), fill=RIGHT if right else WRONG)
                inner = TILE - 2 * FRAME
                tile = Image.fromarray(pictures[model, number, image]).resize((inner, inner), Image.Resampling.BICUBIC)
                sheet.paste(tile, (x + FRAME, y + FRAME))
                mark(pen, x + TILE - 20, y + TILE - 20, right)
    x, y = MARGIN + 17, sheet.height - LEGEND // 2 - 8
    for right, words in ((True, "the picture shows exactly what the prompt says"), (False, "it does not")):
        mark(pen, x, y, right)
        pen.text((x + 30, y), words, INK, text, anchor="lm")
        x += int(pen.textlength(words, text)) + 86
    totals = scores.reshape(2, -1)
    words = f"base {int(totals[0].sum())} of {totals.shape[1]}, trained {int(totals[1].sum())}"
    pen.text((sheet.width - MARGIN - GAP, y), words, INK, text, anchor="rm")
    return sheet


def main(flags: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks readme-picture", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("run", type=Path, help="a run's folder, or any folder with pytorch_lora_weights.safetensors")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "images" / "demo.png")
    parser.add_argument("--prompts", type=int, default=6, help="how many the picture shows")
    parser.add_argument("--images", type=int, default=4, help="per prompt and model")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0, help="the run's")
    arguments = parser.parse_args(flags)

    prompts = read_prompts(FOLDER / "heldout.txt").texts
    pipe = StableDiffusion3Pipeline.from_pretrained(
        DEMO_MODEL, dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for name in ("base", "trained"):
        if name == "trained":
            pipe.load_lora_weights(arguments.run)
        sizes = arguments.images, arguments.steps, arguments.seed
        drawn.append(np.stack([draw(pipe, prompt, *sizes) for prompt in tqdm(prompts, name)]))
    pictures = np.stack(drawn)
    asked = [prompt for _ in drawn for prompt in prompts for _ in range(arguments.images)]
    strict = ShapesScorer().score(pictures.reshape(-1, *pictures.shape[3:]), asked)
    scores = strict.numpy().reshape(pictures.shape[:3])

    # From the largest gain to the largest loss; equal ones stay in the list's order.
    order = np.argsort(scores[0].sum(1) - scores[1].sum(1), kind="stable")
    shown = order[np.linspace(0, len(order) - 1, arguments.prompts).astype(int)]
    compose([prompts[i] for i in shown], pictures[:, shown], scores[:, shown]).save(arguments.output, optimize=True)
    for i in shown:
        print(f"{prompts[i]}: base {scores[0, i].sum():.0f}, trained {scores[1, i].sum():.0f} of {arguments.images}")
    for label, table in (("shown", scores[:, shown]), ("all", scores)):
        print(f"{label}: base {table[0].sum():.0f}, trained {table[1].sum():.0f} of {table[0].size}")
    change = scores[1].sum(1) - scores[0].sum(1)
    print(f"prompts with more right {(change > 0).sum()}, as many {(change == 0).sum()}, fewer {(change < 0).sum()}")
    return 0
