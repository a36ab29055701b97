"""The bundled model: frozen, small, loadable by stock diffusers, good enough; and the check that judges its training."""

import re

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig

from benchmarks import card
from tmpo_trainer.backbones import DEMO_MODEL
from tmpo_trainer.backbones.base import LoadOptions
from tmpo_trainer.backbones.sd3 import SD3Backbone
from tmpo_trainer.demo import domain, split
from tmpo_trainer.evaluation import held_out, statistics
from tmpo_trainer.evaluation.features import EfficientNetLite
from tmpo_trainer.prompts.lists import PromptList, read_prompts
from tmpo_trainer.rewards.shapes import ShapesScorer

HELDOUT = read_prompts(split.FOLDER / "heldout.txt").texts


@pytest.fixture(scope="module")
def backbone() -> SD3Backbone:
    return SD3Backbone.load(DEMO_MODEL, LoadOptions(torch.float32, torch.device("cpu"), 0))


def measure(backbone: SD3Backbone, prompts: list[str], images: int = 6) -> held_out.Evaluation:
    protocol = held_out.EvaluationProtocol(
        PromptList("prompts", prompts),
        [("strict", ShapesScorer("strict"))],
        EfficientNetLite(torch.device("cpu")),
        images,
        held_out.Sampling(12, 0, 1.0, (64, 64), decode_batch=8),
    )
    return held_out.evaluate(backbone, protocol)


def test_weights_and_prompt_lists_are_the_frozen_ones():
    text = (DEMO_MODEL / "README.md").read_text()
    assert re.findall(r"\| `(.+)` \| `([0-9a-f]{64})` \|", text) == card.hashes(DEMO_MODEL)


def test_prompt_lists_are_what_the_script_writes_and_disjoint():
    lists = split.split()
    assert {name: read_prompts(split.FOLDER / f"{name}.txt").texts for name in lists} == lists
    assert {name: len(prompts) for name, prompts in lists.items()} == {"train": 360, "heldout": 60, "validation": 60}
    assert len(set().union(*lists.values())) == 480


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in DEMO_MODEL.rglob("*") if path.is_file()) < 20e6


def test_stock_diffusers_draws_what_is_asked():
    parts = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(DEMO_MODEL, dtype=torch.float32, **parts)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [scene.text() for scene in domain.all_scenes("single")]
    pictures = pipeline(
        prompts,
        guidance_scale=1.0,
        num_inference_steps=28,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    strict = ShapesScorer().score((pictures * 255).round().astype(np.uint8), prompts)
    # The card says .80 over 192 pictures; these are 24.
    assert strict.mean() >= 0.65


def test_learning_rate_zero_and_a_collapsed_lora_both_fail_the_check(backbone):
    prompts = HELDOUT[:12]
    base = measure(backbone, prompts)
    # Learning rate 0: the same model again. Only the claim of a gain fails.
    assert list(statistics.verdict(base, measure(backbone, prompts), "strict").values()) == [False, True, True, True]

    # Collapse: teach an adapter one fixed picture per prompt.
    rng = np.random.default_rng(0)
    pictures = np.stack([domain.render(domain.parse(prompt), rng) for prompt in prompts])
    vae = backbone.pipeline.vae
    with torch.no_grad():
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        target = (vae.encode(pixels).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    torch.manual_seed(0)
    transformer = backbone.transformer
    transformer.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=list(backbone.lora_targets["paper"])))
    try:
        parameters = [p for p in transformer.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=3e-3)
        velocity = backbone.velocity(prompts, 1.0)
        for _ in range(150):
            noise, sigma = torch.randn(24, *target.shape[1:]), torch.rand(24)
            x0, s = target.repeat(2, 1, 1, 1), sigma.view(-1, 1, 1, 1)
            loss = (velocity((1 - s) * x0 + s * noise, sigma) - (noise - x0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        checks = statistics.verdict(base, measure(backbone, prompts), "strict")
    finally:
        transformer.delete_adapters("default")
    assert not any(holds for claim, holds in checks.items() if claim.startswith(("LGMD", "cosine")))
