"""The training loop: rollout, rewards, objective, replay, optimiser step."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor

from tmpo_trainer import checkpoint, diversity, flow, lora, objectives, tree
from tmpo_trainer.backbones.base import Backbone
from tmpo_trainer.config import ConfigError, TrainConfig
from tmpo_trainer.prompts import prompt_index
from tmpo_trainer.reporting import Reporter
from tmpo_trainer.rewards import Scorer, check_finite, combine

#: Figures of the last optimiser step of an update alone: in the first one every ratio is 1 by construction.
LAST_ONLY = ("ratio_mean", "ratio_max", "clip_fraction")


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the run was saved. Exit code 130."""


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


class Trainer:
    """Trains a LoRA on a backbone's transformer.

    Args:
        config: settings. run: the run's folder. backbone: the frozen model; the trainer adds an adapter to it.
        scorers: the rewards, in the order of `config.reward`. prompts: training prompts.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        backbone: Backbone,
        scorers: Sequence[Scorer],
        prompts: Sequence[str],
    ):
        self.config, self.run, self.backbone = config, run, backbone
        self.scorers, self.prompts = list(scorers), list(prompts)
        self.device = backbone.device
        self.sigmas = backbone.sigmas(config.rollout_steps, *config.resolution)
        self.latent_shape = backbone.latent_shape(*config.resolution)
        self.schedule = make_schedule(config, self.sigmas)
        torch.manual_seed(config.seed)
        targets = list(backbone.lora_targets[config.lora_targets])
        adapter = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
            target_modules=targets,
            # The model's own last layer has the name of one in FLUX's single blocks. A regex is matched as a whole.
            exclude_modules="proj_out" if "proj_out" in targets else None,
            init_lora_weights="gaussian",
        )
        backbone.transformer.add_adapter(adapter)
        cast_training_params(backbone.transformer, dtype=torch.float32)
        self.lora = {n: p for n, p in backbone.transformer.named_parameters() if p.requires_grad}
        if config.init_lora:
            lora.start(self.lora, config.lora_alpha / config.lora_rank, config.init_lora)
        self.ema = {name: value.detach().clone() for name, value in self.lora.items()}
        self.optimizer = torch.optim.AdamW(
            self.lora.values(),
            lr=config.learning_rate,
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
        )
        self.done = 0
        self._whole = True
        self._stop: int | None = None

    # -- state ---------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Writes a checkpoint of the updates done so far."""
        return checkpoint.save(
            self.run,
            self.done,
            dict(self.lora),
            self.ema,
            self.optimizer.state_dict(),
            {"seed": self.config.seed, "lora_rank": self.config.lora_rank},
            self.config.checkpoints_kept,
        )

    def resume(self, path: Path) -> None:
        """Continues from a checkpoint. Raises ConfigError if it is of another model, rank or seed."""
        weights, ema, optimizer, state = checkpoint.load(path)
        for name, parameter in self.lora.items():
            if name not in weights or weights[name].shape != parameter.shape or len(weights) != len(self.lora):
                raise ConfigError(f"checkpoint {path} is of another model or LoRA rank (at {name})")
        if state["seed"] != self.config.seed:
            raise ConfigError(f"checkpoint {path} has seed {state['seed']}, the settings say {self.config.seed}")
        with torch.no_grad():
            for name, parameter in self.lora.items():
                parameter.copy_(weights[name])
                self.ema[name].copy_(ema[name])
        self.optimizer.load_state_dict(optimizer)
        self.done = state["update"]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The transformer with the averaged (EMA) weights, for evaluation and export."""
        kept = {name: value.detach().clone() for name, value in self.lora.items()}
        with torch.no_grad():
            for name, parameter in self.lora.items():
                parameter.copy_(self.ema[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.lora.items():
                    parameter.copy_(kept[name])

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The transformer with the adapter off: the pretrained model."""
        self.backbone.transformer.disable_adapters()
        try:
            yield
        finally:
            self.backbone.transformer.enable_adapters()

    # -- one update ----------------------------------------------------------------------------------------------

    def learning_rate(self, update: int) -> float:
        """Cosine from the peak to lr_min_ratio of it, per update."""
        low = self.config.lr_min_ratio
        return self.config.learning_rate * (
            low + (1 - low) * 0.5 * (1 + math.cos(math.pi * update / self.config.updates))
        )

    def update(self) -> dict[str, Any]:
        """One rollout of all prompts and `inner_updates` optimiser steps. Returns what goes into metrics.jsonl."""
        config, u = self.config, self.done
        clock = Clock(self.device)
        start = time.perf_counter()
        steps = self.schedule.steps(u)
        plan = tree.TreePlan.tmpo(config.rollout_steps, steps, config.branching)
        count = config.prompts_per_update
        slots = [
            (slot, self.prompts[prompt_index(u * count + slot, len(self.prompts), config.seed)])
            for slot in range(count)
        ]
        groups = [
            Group(self, clock, plan, u, slots[first : first + config.prompts_per_batch])
            for first in range(0, count, config.prompts_per_batch)
        ]
        figures: defaultdict[str, list[float]] = defaultdict(list)
        for group in groups:
            for name, values in group.figures.items():
                figures[name] += values
        for group_of_optimizer in self.optimizer.param_groups:
            group_of_optimizer["lr"] = self.learning_rate(u)
        for inner in range(config.inner_updates):
            self.optimizer.zero_grad()
            for group in groups:
                for name, values in group.backward(inner).items():
                    if inner + 1 == config.inner_updates or name not in LAST_ONLY:
                        figures[name] += values
            norm = torch.nn.utils.clip_grad_norm_(self.lora.values(), config.max_grad_norm)
            if not torch.isfinite(norm):
                raise ValueError(f"the gradient of update {u + 1} is {norm.item()}")
            figures["grad_norm"].append(norm.item())
            self._whole = False
            self.optimizer.step()
        self.done += 1
        if self.done % config.ema_every == 0:
            with torch.no_grad():
                for name, parameter in self.lora.items():
                    self.ema[name].lerp_(parameter, 1 - config.ema_decay)
        self._whole = True
        total = time.perf_counter() - start
        return {
            "update": self.done,
            "branch_steps": list(steps),
            "beta": config.beta(u),
            "learning_rate": self.learning_rate(u),
            **{name: summarise(name, values) for name, values in figures.items()},
            "seconds": {**clock.seconds, "other": total - sum(clock.seconds.values()), "total": total},
        }

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(self, reporter: Reporter) -> None:
        """Runs the remaining updates. On a failure the last whole update is saved first.

        Only a failure between the optimiser steps of one update (`inner_updates` > 1) leaves nothing to save: then the
        last checkpoint stands.

        Raises:
            Interrupted: after SIGINT or SIGTERM, saved.
        """
        config = self.config
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.done < config.updates:
                metrics = self.update()
                reporter.update(metrics)
                if config.sample_every and not self._stop and (self.done % config.sample_every == 0 or self.done == 1):
                    with self.averaged():
                        reporter.samples(self.done)
                # The report measures the last one.
                last = self.done == config.updates and config.report
                if config.eval_every and self.done % config.eval_every == 0 and not last and not self._stop:
                    with self.averaged():
                        reporter.evaluation(self.done)
                due = config.checkpoint_every and self.done % config.checkpoint_every == 0
                if due or self.done == config.updates or self._stop:
                    self.save()
                if self._stop:
                    raise Interrupted(f"stopped by {signal.Signals(self._stop).name} after update {self.done}")
        except Interrupted:
            raise
        except BaseException:
            # In the midst of an update's optimiser steps there is nothing to save: the last checkpoint stands.
            saved = self.run / f"checkpoint-{self.done}" in checkpoint.checkpoints(self.run)
            if self._whole and not saved:
                self.save()
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = number
        print("\nstopping after this update and saving; again to stop at once", file=sys.stderr)


def summarise(name: str, values: list[float]) -> float:
    """One figure of an update from those of its prompts: the largest of a maximum or an error, else the mean."""
    return max(values) if name.endswith(("_max", "_error")) else math.fsum(values) / len(values)


class Group:
    """The rollout of some prompts in one batch: P trees as a forest, their rewards, and their share of the gradient."""

    def __init__(self, trainer: Trainer, clock: Clock, plan: tree.TreePlan, update: int, slots: list[tuple[int, str]]):
        config = trainer.config
        self.trainer, self.clock, self.update = trainer, clock, update
        self.index = plan.index()
        self.count, self.prompts = len(slots), [prompt for _, prompt in slots]
        sources = [tree.keyed_noise((config.seed, update, slot), trainer.latent_shape) for slot, _ in slots]

        def noise(step: int, path: tree.Path) -> Tensor:
            root, prompt = divmod(path[0], self.count)
            return sources[prompt](step, (root, *path[1:])).to(trainer.device)

        network = trainer.backbone.velocity(self.prompts, config.guidance)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            with clock("network"):
                return network(x, sigma)

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
        for name, value in (("latent", self.rollout.leaves), ("log-probability", self.rollout.log_probs)):
            if not torch.isfinite(value).all():
                raise ValueError(f"non-finite {name} in the rollout of update {update + 1}, prompts {self.prompts}")
        leaves = plan.leaves
        with clock("decode"):
            images = trainer.backbone.decode(self.rollout.leaves, config.decode_batch)
        texts = self.prompts * leaves
        with clock("reward"):
            # Row l * P + p is leaf l of prompt p.
            scores = {
                scorer.name: check_finite(scorer.name, scorer.score(images, texts), texts).view(leaves, self.count)
                for scorer in trainer.scorers
            }
        self.rewards = [
            combine({name: s[:, p] for name, s in scores.items()}, config.reward_weights, config.reward_norm)
            for p in range(self.count)
        ]
        grouped = self.rollout.leaves.unflatten(0, (leaves, self.count))
        self.figures = {
            **{f"reward/{name}": s.mean(0).tolist() for name, s in scores.items()},
            **{f"reward_std/{name}": s.std(0, correction=0).tolist() for name, s in scores.items()},
            "lgmd": [diversity.lgmd(grouped[:, p]).item() for p in range(self.count)],
            "latent_std": [grouped[:, p].std().item() for p in range(self.count)],
            "evaluations/rollout": [float(plan.rollout_evaluations)] * self.count,
            "evaluations/replay": [float(plan.train_evaluations)] * self.count,
        }
        self.reference: list[Tensor] | None = None
        if config.kl_weight or config.anchor == "ref":
            with trainer.reference():
                self.reference = tree.parent_means(velocity, self.rollout, config.replay_batch)

    def backward(self, inner: int) -> dict[str, list[float]]:
        """Adds this group's gradient. `inner` counts optimiser updates on this rollout from 0."""
        config, run = self.trainer.config, self.rollout
        if inner == 0:
            means = [branch.mean for branch in run.branches]
            log_probs, shift = run.log_probs, torch.zeros_like(run.log_probs)
        else:
            means = tree.parent_means(self.velocity, run, config.replay_batch)
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
            loss, logged = objectives.softmax_tb_loss(
                edges,
                old[:, p],
                shift[:, p],
                self.index.leaf_edges,
                self.index.edge_parent,
                self.rewards[p],
                config.beta(self.update),
                config.clip,
                config.baseline,
                None if anchor is None else anchor[:, p],
                config.anchor_weight,
            )
            coefficients.append(objectives.edge_coefficients(loss, edges))
            for name, value in logged.items():
                figures[name].append(value)
            figures["loss"].append(loss.item())
        share = self.count / config.prompts_per_update

        def backward(value: Tensor) -> None:
            with self.clock("network"):
                value.backward()

        replayed, kl = tree.replay(
            self.velocity,
            run,
            (torch.stack(coefficients, 1).flatten() / config.prompts_per_update).to(self.trainer.device),
            max_batch=config.replay_batch,
            kl_weight=config.kl_weight * share,
            reference=self.reference if config.kl_weight else None,
            backward=backward,
        )
        if config.kl_weight:
            figures["kl_reference"] += [kl] * self.count
        if inner == 0:
            # Replaying at unchanged weights must give the stored log-probabilities: a ratio of 1.
            figures["replay_ratio_error"].append((replayed - run.log_probs).exp().sub(1).abs().max().item())
        return figures


def make_schedule(config: TrainConfig, sigmas: Tensor) -> tree.BranchSchedule:
    """The branch schedule of a run. Raises ConfigError for positions that cannot carry noise."""
    last = flow.last_stochastic_step(sigmas)
    for name in ("branch_early", "branch_late"):
        try:
            flow.check_stochastic(config.kernel, config.eta, sigmas, [s for s in getattr(config, name) if s > 1])
        except ValueError as error:
            raise ConfigError(f"{name} {list(getattr(config, name))}: {error}") from None
    try:
        return tree.BranchSchedule(
            config.rollout_steps,
            config.branch_early,
            config.branch_late,
            config.kappa,
            config.updates,
            config.seed,
            last,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
