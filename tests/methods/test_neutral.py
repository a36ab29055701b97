"""A reward that is neutral to a statistic, in updates of every family of methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tmpo_trainer.training.loop import Trainer

Make = Callable[..., Trainer]


class Norm:
    """A reward that is nothing but the squared norm of the latents, or one that says nothing at all."""

    name = "shapes"

    def __init__(self, weight: float):
        self.weight = weight

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Any = None) -> Tensor:
        return torch.from_numpy(0.5 + self.weight * (images.astype(np.float64) ** 2).sum((1, 2, 3)))


@pytest.mark.parametrize("method", ["tmpo", "flow-grpo", "tree-grpo", "gardo"])
def test_a_reward_that_is_its_statistic_teaches_nothing(
    make: Make, shake: Callable[..., None], gradient: Callable[[Trainer], Tensor], method: str
) -> None:
    found = []
    for weight, neutral in ((0.01, ("latent_norm",)), (0.0, ()), (0.01, ())):
        trainer = make(method, neutral=neutral)
        trainer.judges.rewards = [Norm(weight)]
        shake(trainer)
        metrics = trainer.update()
        found.append((metrics, gradient(trainer)))
    (logged, none), (_, constant), (raw, whole) = found
    # But for the rounding of equal rewards. TMPO's target is uniform then, which has a gradient of its own.
    assert (none - constant).norm() < 0.01 * whole.norm()
    assert (none - whole).norm() > 0.1 * whole.norm()
    assert logged["neutral/latent_norm"] == pytest.approx(1) and logged["neutral/share"] == pytest.approx(1)
    # The figures of the reward are those of the reward.
    assert logged["reward_std/shapes"] == raw["reward_std/shapes"] > 0


def test_the_combined_reward_is_made_neutral(
    make: Make, roll: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"reward": ("channel-0", "channel-1"), "reward_weights": (2.0, -1.0)}
    statistics = ("latent_norm", "latent_distance", "feature_distance")
    batches = []
    for neutral in ((), statistics):
        trainer = make("tmpo", **settings, neutral=neutral)
        first = trainer.judges.rewards[0]
        trainer.judges.rewards = [first, type(first)(1)]
        batches.append(roll(trainer)[0])
    plain, made = batches
    for p, (before, after) in enumerate(zip(plain.rewards, made.rewards, strict=True)):
        leaves = made.rollout.leaves[p::2].double()
        norm = leaves.square().sum((1, 2, 3))
        distance = (leaves - leaves.mean(0)).square().sum((1, 2, 3))
        corner = torch.nn.functional.normalize(leaves[:, :, 0, 0], dim=1)
        features = (1 - corner @ corner.T).sum(1)
        rows = torch.stack([after.double(), norm, distance, features])
        assert torch.corrcoef(rows)[0, 1:].abs().max() < 1e-4
        assert after.std().item() == pytest.approx(before.std().item(), rel=1e-4)
        design = torch.stack([torch.ones_like(norm), norm, distance, features], 1)
        left = before.double() - design @ torch.linalg.lstsq(design, before.double()[:, None]).solution[:, 0]
        assert torch.corrcoef(torch.stack([left, after.double()]))[0, 1].item() == pytest.approx(1, abs=1e-4)


def test_statistics_of_pictures(make_trainer: Make, roll: Callable[..., Any]) -> None:
    trainer = make_trainer(neutral=("contrast", "file_size"), prompts_per_batch=2, reward_norm="none")
    seen: list[np.ndarray] = []
    decode = trainer.backbone.decode
    trainer.backbone.decode = lambda latents, batch: seen.append(decode(latents, batch)) or seen[-1]
    batch, _ = roll(trainer)
    images = np.concatenate(seen)
    for p, rewards in enumerate(batch.rewards):
        luma = images[p::2].astype(np.float64) @ [0.299, 0.587, 0.114]
        contrast = torch.from_numpy(luma.std((1, 2)))
        raw = batch.scores["red"][:, p]
        assert abs(torch.corrcoef(torch.stack([contrast, rewards.double()]))[0, 1]) < 1e-4
        assert abs(torch.corrcoef(torch.stack([contrast, raw.double()]))[0, 1]) > 0.01
        # Raw rewards keep their scale.
        assert rewards.std() < raw.std() and rewards.mean().item() == pytest.approx(raw.mean().item())
