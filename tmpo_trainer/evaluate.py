"""Base against trained model on held-out prompts: scores, diversity, paired intervals and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tmpo_trainer import diversity, tree
from tmpo_trainer.backbones.sd3 import SD3Backbone
from tmpo_trainer.rewards import Scorer, check_finite

#: What counts as not collapsed, for `verdict`.
LGMD_LOSS, COSINE_SHARE, LATENT_STD_SHARE = 0.05, 0.9, 0.15


@dataclass
class Evaluation:
    """One model on P prompts x n images.

    scores: {name: `[P, n]`}. lgmd, cosine: `[P]`. latent_std: of all final latents. images: uint8 `[P, n, H, W, 3]`.
    """

    prompts: list[str]
    scores: dict[str, np.ndarray]
    lgmd: np.ndarray
    cosine: np.ndarray
    latent_std: float
    images: np.ndarray


@torch.no_grad()
def sample(
    backbone: SD3Backbone,
    prompts: Sequence[str],
    images: int,
    *,
    steps: int,
    seed: int,
    guidance: float,
    resolution: tuple[int, int],
    batch: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Final latents `[P, n, ...latent]` by plain Euler steps. Noise is keyed by (seed, prompt, image): pairs compare."""
    sigmas = backbone.sigmas(steps, *resolution)
    shape = backbone.latent_shape(*resolution)
    group = max(1, batch // images)
    parts = []
    for first in range(0, len(prompts), group):
        chosen = list(prompts[first : first + group])
        sources = [tree.keyed_noise((seed, "evaluate", prompt), shape) for prompt in chosen]
        count = len(chosen)

        def noise(step: int, path: tree.Path, sources=sources, count=count) -> Tensor:
            image, prompt = divmod(path[0], count)
            return sources[prompt](step, (image,)).to(backbone.device)

        plan = tree.TreePlan(steps, images, {}).forest(count)
        run = tree.rollout(backbone.velocity(chosen, guidance), noise, sigmas, plan, kernel="ode")
        parts.append(run.leaves.unflatten(0, (images, count)).transpose(0, 1))
        if progress is not None:
            progress(count)
    return torch.cat(parts)


def evaluate(
    backbone: SD3Backbone,
    prompts: Sequence[str],
    scorers: Sequence[tuple[str, Scorer]],
    features: Callable[[np.ndarray], Tensor],
    *,
    images: int,
    steps: int,
    seed: int,
    guidance: float,
    resolution: tuple[int, int],
    batch: int,
    decode_batch: int,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Samples `images` pictures per prompt and measures them. The transformer is used as it stands (LoRA on or off)."""
    latents = sample(
        backbone,
        prompts,
        images,
        steps=steps,
        seed=seed,
        guidance=guidance,
        resolution=resolution,
        batch=batch,
        progress=progress,
    )
    pictures = backbone.decode(latents.flatten(0, 1), decode_batch)
    texts = [prompt for prompt in prompts for _ in range(images)]
    scores = {
        name: check_finite(name, scorer.score(pictures, texts), texts).view(len(prompts), images).numpy()
        for name, scorer in scorers
    }
    vectors = features(pictures).unflatten(0, (len(prompts), images))
    return Evaluation(
        prompts=list(prompts),
        scores=scores,
        lgmd=np.array([diversity.lgmd(group).item() for group in latents]),
        cosine=np.array([diversity.cosine_diversity(group).item() for group in vectors]),
        latent_std=latents.std().item(),
        images=pictures.reshape(len(prompts), images, *pictures.shape[1:]),
    )


def paired_gain(
    base: np.ndarray, trained: np.ndarray, seed: int = 0, draws: int = 10_000
) -> tuple[float, float, float]:
    """Mean gain per prompt and its 95% bootstrap interval over prompts. `[P]` or `[P, n]` each."""
    difference = (trained - base).reshape(len(base), -1).mean(1)
    rng = np.random.default_rng(seed)
    means = difference[rng.integers(0, len(difference), (draws, len(difference)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def verdict(base: Evaluation, trained: Evaluation, score: str) -> dict[str, bool]:
    """The claims of a successful run, each true or false: the score rose, and nothing collapsed or overshot."""
    _, low, _ = paired_gain(base.scores[score], trained.scores[score])
    claims = {
        f"{score} rose (95% interval above 0)": low > 0,
        f"LGMD at least the base's less {LGMD_LOSS}": trained.lgmd.mean() >= base.lgmd.mean() - LGMD_LOSS,
        f"cosine diversity at least {COSINE_SHARE:.0%} of the base's": (
            trained.cosine.mean() >= COSINE_SHARE * base.cosine.mean()
        ),
        f"latent standard deviation within {LATENT_STD_SHARE:.0%} of the base's": (
            abs(trained.latent_std / base.latent_std - 1) <= LATENT_STD_SHARE
        ),
    }
    return {claim: bool(holds) for claim, holds in claims.items()}
