"""Paired intervals, the verdict, and evaluations of the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tmpo_trainer import diversity
from tmpo_trainer.backbones.sd3 import SD3Backbone
from tmpo_trainer.evaluation import held_out
from tmpo_trainer.evaluation.held_out import Evaluation, Sampling, evaluate
from tmpo_trainer.evaluation.statistics import paired_gain, verdict

CLAIMS = ("rose", "LGMD", "cosine", "latent standard deviation")


def made(score: float = 0.5, lgmd: float = 0.3, cosine: float = 0.2, latent_std: float = 1.0) -> Evaluation:
    """Made-up figures of 40 prompts x 4 images; the noise is the same in all, as in paired evaluations."""
    noise = np.random.default_rng(0).normal(0, 0.02, (40, 4))
    return Evaluation(
        prompts=[f"prompt {i}" for i in range(40)],
        scores={"shapes strict": score + noise, "other": noise},
        lgmd=np.full(40, lgmd),
        cosine=np.full(40, cosine),
        latent_std=latent_std,
        shown=[0],
        images=np.zeros((1, 4, 8, 8, 3), np.uint8),
    )


def test_a_single_prompt_is_no_evidence() -> None:
    assert paired_gain(np.zeros(1), np.ones(1)) == (1.0, -np.inf, np.inf)


def test_no_difference_is_no_gain() -> None:
    values = np.random.default_rng(0).normal(size=(30, 8))
    assert paired_gain(values, values) == (0.0, 0.0, 0.0)


def test_a_constant_difference_has_no_width() -> None:
    """However much the prompts differ among themselves: the interval is paired."""
    values = 10 * np.random.default_rng(0).normal(size=30)
    assert paired_gain(values, values + 0.25) == pytest.approx((0.25, 0.25, 0.25))
    assert paired_gain(values, values - 0.25)[0] == pytest.approx(-0.25)


def test_interval_is_over_prompts_and_about_two_standard_errors() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=(50, 6))
    gains = rng.normal(0.3, 0.5, 50)
    mean, low, high = paired_gain(base, base + gains[:, None])
    error = gains.std() / 50**0.5
    assert mean == pytest.approx(gains.mean())
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    assert paired_gain(base, base + gains[:, None]) == (mean, low, high)


def test_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        base = rng.normal(size=40)
        _, low, high = paired_gain(base, base + rng.normal(0.1, 1.0, 40), draws=500)
        covered += low <= 0.1 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_verdict_of_a_good_run() -> None:
    base = made()
    for trained in (made(0.6), made(0.6, lgmd=0.26, cosine=0.181, latent_std=1.14), made(0.51, latent_std=0.86)):
        claims = verdict(base, trained, "shapes strict")
        assert len(claims) == 4 and all(claims.values())
        assert all(type(holds) is bool for holds in claims.values())


@pytest.mark.parametrize(
    ("trained", "violated"),
    [
        (made(0.5), "rose"),
        (made(0.4), "rose"),
        (made(0.6, lgmd=0.24), "LGMD"),
        (made(0.6, cosine=0.179), "cosine"),
        (made(0.6, latent_std=1.16), "latent standard deviation"),
        (made(0.6, latent_std=0.84), "latent standard deviation"),
    ],
    ids=["no gain", "loss", "lgmd", "cosine", "overshoot", "shrinkage"],
)
def test_verdict_of_a_violated_claim(trained: Evaluation, violated: str) -> None:
    claims = verdict(made(), trained, "shapes strict")
    assert {word: next(holds for claim, holds in claims.items() if word in claim) for word in CLAIMS} == {
        word: word != violated for word in CLAIMS
    }


def test_verdict_needs_the_interval_above_0_not_the_mean() -> None:
    base = made()
    noisy = 0.02 + 0.5 * np.resize([1, -1], (40, 1))
    trained = replace(base, scores={"shapes strict": base.scores["shapes strict"] + noisy})
    gain, low, _ = paired_gain(base.scores["shapes strict"], trained.scores["shapes strict"])
    assert gain > 0 > low
    assert not next(iter(verdict(base, trained, "shapes strict").values()))


@pytest.fixture(scope="module")
def backbone(load: Callable[..., SD3Backbone]) -> SD3Backbone:
    return load()


PROMPTS = ["a red circle", "two blue squares", "a green triangle"]


def sample(backbone: SD3Backbone, prompts: list[str], images: int, seed: int, batch: int) -> torch.Tensor:
    how = Sampling(4, seed, 1.5, (32, 32), batch)
    return torch.cat([latents for latents, _ in held_out.sample(backbone, prompts, images, how)])


def test_noise_is_another_for_every_seed_prompt_and_image(
    backbone: SD3Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a velocity of zero what comes out is the noise that went in."""
    monkeypatch.setattr(backbone, "velocity", lambda prompts, guidance: lambda x, sigma: torch.zeros_like(x))
    rows = torch.cat([sample(backbone, PROMPTS, 3, seed=seed, batch=6).flatten(0, 1) for seed in (1, 2)])
    assert rows.shape == (18, 16, 4, 4) and rows.std().item() == pytest.approx(1, abs=0.05)
    # Independent ones are sqrt(2 * 256) apart.
    assert torch.pdist(rows.flatten(1)).min() > 15


def test_samples_are_keyed_by_seed_prompt_and_image(backbone: SD3Backbone) -> None:
    """Not by the batch they come in or the list they are part of: that is what makes evaluations paired."""
    latents = sample(backbone, PROMPTS, 3, seed=1, batch=128)
    assert latents.shape == (3, 3, 16, 4, 4)
    for batch in (1, 3, 6):
        torch.testing.assert_close(sample(backbone, PROMPTS, 3, seed=1, batch=batch), latents, atol=1e-4, rtol=0)
    fewer = sample(backbone, PROMPTS[2:0:-1], 2, seed=1, batch=128)
    torch.testing.assert_close(fewer, latents[[2, 1], :2], atol=1e-4, rtol=0)
    rows = [*latents.flatten(0, 1), *sample(backbone, PROMPTS, 3, seed=2, batch=128).flatten(0, 1)]
    assert torch.pdist(torch.stack(rows).flatten(1)).min() > 1


def test_evaluation_measures_each_prompts_own_pictures(backbone: SD3Backbone, red_scorer: Any) -> None:
    seen: list[list[str]] = []

    class Spy:
        name = "spy"

        def score(self, images: np.ndarray, prompts: list[str], metadata: Any = None) -> torch.Tensor:
            seen.append(list(prompts))
            return red_scorer.score(images, prompts)

    def features(images: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(images.astype(np.float32).mean((1, 2))) - 100

    done: list[int] = []
    result = evaluate(
        backbone,
        PROMPTS,
        [("spy", Spy())],
        features,
        3,
        Sampling(4, 1, 1.5, (32, 32), 6, 4),
        show=2,
        progress=done.append,
    )
    latents = sample(backbone, PROMPTS, 3, seed=1, batch=6)
    assert seen == [[prompt for prompt in part for _ in range(3)] for part in (PROMPTS[:2], PROMPTS[2:])]
    assert sum(done) == len(PROMPTS)
    assert result.shown == [0, 2]
    assert result.images.shape == (2, 3, 32, 32, 3) and result.scores["spy"].shape == (3, 3)
    assert result.latent_std == pytest.approx(latents.std().item())
    for p in range(3):
        pictures = backbone.decode(latents[p], 64)
        if p in result.shown:
            assert np.abs(result.images[result.shown.index(p)].astype(int) - pictures).max() <= 1
        assert result.scores["spy"][p] == pytest.approx(red_scorer.score(pictures, PROMPTS).numpy(), abs=1e-3)
        assert result.lgmd[p] == pytest.approx(diversity.lgmd(latents[p]).item(), abs=1e-4)
        assert result.cosine[p] == pytest.approx(diversity.cosine_diversity(features(pictures)).item(), abs=1e-2)


def test_a_score_that_is_no_number_names_scorer_and_prompt(backbone: SD3Backbone) -> None:
    class Broken:
        name = "broken"

        def score(self, images: np.ndarray, prompts: list[str], metadata: Any = None) -> torch.Tensor:
            scores = torch.zeros(len(prompts))
            scores[4] = float("nan")
            return scores

    with pytest.raises(ValueError, match="reward broken gave nan for image 4 of prompt 'two blue squares'"):
        evaluate(
            backbone,
            PROMPTS,
            [("broken", Broken())],
            torch.from_numpy,
            3,
            Sampling(4, 1, 1.5, (32, 32), 9, 9),
        )
