"""The rollout of some prompts in one batch: a forest of P trees, and their rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import diversity, nuisance, objectives, tree
from ..backbones.base import Backbone
from ..evaluation.features import Features
from ..methods.base import Figures, Method
from ..methods.batch import Clock, Network, PromptBatch
from ..prompts.lists import about
from ..rewards import ScoredBatch, Scorer, Scoring, combine
from ..settings.config import TrainConfig
from .weights import Diverged


@dataclass
class Judges:
    """What looks at the pictures of a rollout.

    rewards: the scorers that make up the reward. extra: scorers that the method needs beside them. features: of pictures, if
    the method needs them. metadata: of prompts, for the scorers.
    """

    rewards: Sequence[Scorer]
    extra: Sequence[Scorer] = ()
    features: Features | None = None
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)

    def scoring(self) -> Scoring:
        """Where they score, for one update. A scorer that is there twice scores once."""
        return Scoring(list({scorer.name: scorer for scorer in (*self.rewards, *self.extra)}.items()))


class Roller:
    """Rolls out prompts for a method.

    Args:
        sigmas: `[N + 1]`, of the rollout.

    Attributes:
        graphs: whether rollouts keep the graphs of their stochastic steps, for the first replay.
    """

    def __init__(self, config: TrainConfig, backbone: Backbone, method: Method, judges: Judges, sigmas: Tensor):
        self.config, self.backbone, self.method, self.judges, self.sigmas = config, backbone, method, judges, sigmas
        self.latent_shape = backbone.latent_shape(*config.resolution)
        self.graphs = method.graphs

    def network(self, prompts: Sequence[str], clock: Clock) -> Network:
        """The transformer for some prompts, with its calls counted and timed."""
        return Network(self.velocity(prompts), clock, self.backbone.device)

    def velocity(self, prompts: Sequence[str]) -> tree.Velocity:
        """The run's velocity for some prompts, see `Backbone.velocity`."""
        return self.backbone.velocity(prompts, self.config.guidance)

    def roll_out(
        self,
        network: Network,
        clock: Clock,
        plan: tree.TreePlan,
        update: int,
        slots: Sequence[tuple[int, str]],
        scoring: Scoring,
    ) -> Callable[[], tuple[PromptBatch, Figures]]:
        """The prompts' rollout, whose scorers may still be at work. The result, when it is called, waits for them and gives the
        rollout with its rewards, and its figures, a value per prompt.

        Args:
            network: for these prompts. plan: of one prompt. update: counted from 0.
            slots: (place among all prompts of the update on all processes, which keys the noise; prompt) each.
            scoring: of `Judges.scoring`.

        Raises:
            Diverged: a latent or log-probability is not finite.

        The result raises ValueError if a reward is not finite. A scorer's own errors come from here or from the result.
        """
        config, prompts = self.config, [prompt for _, prompt in slots]
        count, leaves = len(slots), plan.leaves
        run = tree.rollout(
            network,
            self._noise(update, [slot for slot, _ in slots]),
            tree.shortened_sigmas(self.sigmas, plan),
            plan.forest(count),
            solver=config.solver,
            max_batch=config.max_batch,
            graphs=self.graphs,
            **self.method.transition,
        )
        network.rolled_out = True
        for name, value in (("latent", run.leaves), ("log-probability", run.log_probs)):
            if not torch.isfinite(value).all():
                raise Diverged(f"non-finite {name} in the rollout of update {update + 1}, prompts {prompts}")
        # Row l * P + p is leaf l of prompt p.
        rows = prompts * leaves
        scored = scoring.batch(rows, about(self.judges.metadata, rows))
        images = self._decode(run.leaves, clock, scored, bool(scoring.early))
        with clock("reward"):
            scored.complete(images)
            features = None
            if self.judges.features is not None:
                features = self.judges.features(images).unflatten(0, (leaves, count)).cpu()

            statistics = {}
            if config.neutral:
                latents = run.leaves.unflatten(0, (leaves, count))
                pictures = images.reshape(leaves, count, *images.shape[1:])
                statistics = nuisance.measure(config.neutral, latents, pictures, features)

        def finish() -> tuple[PromptBatch, Figures]:
            with clock("reward"):
                scores = {name: values.view(leaves, count) for name, values in scored.scores().items()}
            chosen = {scorer.name: scores[scorer.name] for scorer in self.judges.rewards}
            rewards = [
                combine({name: s[:, p] for name, s in chosen.items()}, config.reward_weights, config.combining)
                for p in range(count)
            ]
            neutral: Figures = {}
            if statistics:
                # A z-scored reward stays normalised, so that beta and the weights of other terms mean the same.
                keep_spread = config.combining == "zscore"
                rewards, neutral = nuisance.neutralise(rewards, statistics, config.neutral_share, keep_spread)
            share = count / config.prompts_per_update
            places = [slot for slot, _ in slots]
            batch = PromptBatch(update, prompts, plan, run, share, scores, rewards, features, places)
            return batch, {**figures(batch), **neutral}

        return finish

    def _decode(self, latents: Tensor, clock: Clock, scored: ScoredBatch, early: bool) -> np.ndarray:
        """The pictures of latents, which are added to `scored`: with `early` those of each call of the VAE at once."""
        size = self.config.decode_batch
        parts = []
        for part in latents.split(size if early else len(latents)):
            with clock("decode"):
                parts.append(self.backbone.decode(part, size))
            scored.add(parts[-1])
        return np.concatenate(parts)

    def _noise(self, update: int, slots: Sequence[int]) -> tree.Noise:
        sources = [tree.keyed_noise((self.config.seed, update, slot), self.latent_shape) for slot in slots]

        def noise(step: int, path: tree.NodePath) -> Tensor:
            root, prompt = divmod(path[0], len(sources))
            drawn = sources[prompt](step, (root, *path[1:]))
            # That of a stochastic step is moved by the rollout, all at once.
            return drawn.to(self.backbone.device) if step == 0 else drawn

        return noise


def figures(batch: PromptBatch) -> Figures:
    """Rewards and diversity of a rollout, a value per prompt."""
    grouped = batch.rollout.leaves.unflatten(0, (batch.plan.leaves, batch.count))
    scores = {name: objectives.widened(values) for name, values in batch.scores.items()}
    return {
        **{f"reward/{name}": s.mean(0).tolist() for name, s in scores.items()},
        **{f"reward_std/{name}": s.std(0, correction=0).tolist() for name, s in scores.items()},
        "lgmd": [diversity.lgmd(grouped[:, p]).item() for p in range(batch.count)],
        "latent_std": [grouped[:, p].std().item() for p in range(batch.count)],
    }
