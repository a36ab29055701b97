"""The rollout of some prompts in one batch: their trees, their rewards, and their share of the gradient."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import diversity, objectives, tree
from ..methods import base as methods
from ..prompts.lists import about
from ..rewards import combine, score_all

if TYPE_CHECKING:
    from .loop import Trainer


class Clock:
    """Seconds by phase. On a GPU it waits for the queue, so that a phase's time is its own."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[phase] += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Group:
    """The rollout of some prompts in one batch: P trees as a forest, their rewards, and their share of the gradient."""

    def __init__(self, trainer: Trainer, clock: Clock, plan: tree.TreePlan, update: int, slots: list[tuple[int, str]]):
        config = trainer.config
        self.trainer, self.clock, self.update = trainer, clock, update
        self.index, self.plan = plan.index(), plan
        self.parents = plan.train_evaluations * len(slots)
        self.count, self.prompts = len(slots), [prompt for _, prompt in slots]
        sources = [tree.keyed_noise((config.seed, update, slot), trainer.latent_shape) for slot, _ in slots]

        def noise(step: int, path: tree.Path) -> Tensor:
            root, prompt = divmod(path[0], self.count)
            return sources[prompt](step, (root, *path[1:])).to(trainer.device)

        network = trainer.backbone.velocity(self.prompts, config.guidance)

        #: What the network is called for just now: rollout, reference, ratio or replay.
        self.phase = "rollout"
        #: Latents evaluated so far, by phase.
        self.evaluated: defaultdict[str, int] = defaultdict(int)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            with clock(self.phase):
                predicted = network(x, sigma)
            # What ran out of memory was none.
            self.evaluated[self.phase] += len(x)
            return predicted

        self.velocity = velocity
        self.rollout = tree.rollout(
            velocity,
            noise,
            trainer.sigmas,
            plan.forest(self.count),
            kernel=config.kernel,
            eta=config.eta,
            max_batch=config.max_batch,
            reduce=config.logp_reduce,
        )
        self.reference: list[Tensor] | None = None
        if config.kl_weight or config.anchor == "ref":
            # Before anything can fail on one process alone: with a sharded transformer the others would wait in it.
            self.phase = "reference"
            with trainer.kl_reference():
                self.reference = tree.parent_means(velocity, self.rollout, trainer.replay_batch)
        for name, value in (("latent", self.rollout.leaves), ("log-probability", self.rollout.log_probs)):
            if not torch.isfinite(value).all():
                raise ValueError(f"non-finite {name} in the rollout of update {update + 1}, prompts {self.prompts}")
        leaves = plan.leaves
        with clock("decode"):
            images = trainer.backbone.decode(self.rollout.leaves, config.decode_batch)
        texts = self.prompts * leaves
        with clock("reward"):
            # Row l * P + p is leaf l of prompt p.
            pairs = list({scorer.name: scorer for scorer in trainer.scorers + trainer.auxiliary}.items())
            scores = {
                name: values.view(leaves, self.count)
                for name, values in score_all(pairs, images, texts, about(trainer.metadata, texts)).items()
            }
            self.features = None
            if trainer.features is not None:
                self.features = trainer.features(images).unflatten(0, (leaves, self.count)).cpu()
        chosen = {scorer.name: scores[scorer.name] for scorer in trainer.scorers}
        self.rewards = [
            combine({name: s[:, p] for name, s in chosen.items()}, config.reward_weights, methods.reward_norm(config))
            for p in range(self.count)
        ]
        #: `[K * P]`: what the gate of GARDO ranks; and of its answer, whether the KL holds a sample, see `Trainer`.
        self.proxy = torch.stack(self.rewards, 1).flatten()
        self.auxiliary = [scores[scorer.name].flatten() for scorer in trainer.auxiliary]
        self.gate: Tensor | None = None
        self.gated = 0
        grouped = self.rollout.leaves.unflatten(0, (leaves, self.count))
        self.figures = {
            **{f"reward/{name}": s.mean(0).tolist() for name, s in scores.items()},
            **{f"reward_std/{name}": s.std(0, correction=0).tolist() for name, s in scores.items()},
            "lgmd": [diversity.lgmd(grouped[:, p]).item() for p in range(self.count)],
            "latent_std": [grouped[:, p].std().item() for p in range(self.count)],
        }

    def backward(self, inner: int) -> dict[str, list[float]]:
        """Adds this group's gradient. `inner` counts optimiser updates on this rollout from 0."""
        config, run = self.trainer.config, self.rollout
        batch = self.trainer.replay_batch
        if inner == 0:
            means = [branch.mean for branch in run.branches]
            log_probs, shift = run.log_probs, torch.zeros_like(run.log_probs)
        else:
            self.phase = "ratio"
            means = tree.parent_means(self.velocity, run, batch)
            log_probs, shift = tree.edge_log_probs(run, means), tree.edge_mean_shift(run, means)
        anchor = None
        if config.anchor == "ref":
            assert self.reference is not None
            anchor = tree.edge_log_ratio(run, means, self.reference).view(-1, self.count).cpu()
        # Edge e * P + p is edge e of prompt p.
        old, shift = run.log_probs.view(-1, self.count).cpu(), shift.view(-1, self.count).cpu()
        current = log_probs.view(-1, self.count).cpu()
        coefficients, figures = [], defaultdict(list)
        for p in range(self.count):
            edges = current[:, p].clone().requires_grad_()
            loss, logged = methods.loss(
                config,
                self.update,
                edges,
                old[:, p],
                shift[:, p],
                self.index,
                self.rewards[p],
                None if anchor is None else anchor[:, p],
                None if self.features is None else self.features[:, p],
            )
            coefficients.append(objectives.edge_coefficients(loss, edges))
            for name, value in logged.items():
                figures[name].append(value)
            figures["loss"].append(loss.item())
        weights = None
        if config.kl_weight:
            weights = methods.kl_weights(config, run, self.gate, self.gated)
            # Gradients are averaged over processes, and a gate's mean is over the samples of all of them.
            processes = self.trainer.accelerator.num_processes
            weights *= self.count / config.prompts_per_update if self.gate is None else processes
        self.phase = "replay"

        def backward(value: Tensor) -> None:
            with self.clock("replay"):
                value.backward()

        replayed, kl = tree.replay(
            self.velocity,
            run,
            (torch.stack(coefficients, 1).flatten() / config.prompts_per_update).to(self.trainer.device),
            max_batch=batch,
            kl_weights=weights,
            reference=self.reference if config.kl_weight else None,
            backward=backward,
        )
        if weights is not None:
            # Summed over the prompts of all processes and divided by their number: the penalty's mean.
            total = (weights.to(kl) * kl).sum().item() / config.kl_weight
            figures["kl_reference"] += [total * config.prompts_per_update / self.count] * self.count
        if inner == 0:
            # Replaying at unchanged weights must give the stored log-probabilities: a ratio of 1.
            figures["replay_ratio_error"].append((replayed - run.log_probs).exp().sub(1).abs().max().item())
        return figures

    def evaluations(self) -> dict[str, list[float]]:
        """Latents evaluated so far by phase, per prompt."""
        return {f"evaluations/{phase}": [n / self.count] * self.count for phase, n in self.evaluated.items()}
