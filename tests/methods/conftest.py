"""What the tests of all methods share: trainers with a smooth reward, an oracle for gradients, and counts of network calls."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tmpo_trainer import methods, tree
from tmpo_trainer.backbones.base import Backbone
from tmpo_trainer.methods.base import Method
from tmpo_trainer.methods.batch import PromptBatch
from tmpo_trainer.settings.presets import make_config
from tmpo_trainer.training.loop import Trainer

#: FLUX.1-dev at 512x512, six steps.
SIGMAS = torch.tensor([1, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0])
PROMPTS = ["a red circle", "two blue squares"]


class Channel:
    """Mean of a latent channel: a smooth reward."""

    def __init__(self, number: int):
        self.number, self.name = number, f"channel-{number}"

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Any = None) -> Tensor:
        return torch.from_numpy(images[:, self.number].mean((1, 2)))


class Corner:
    """Features: a corner of the latent."""

    name = "corner"

    def __call__(self, images: np.ndarray) -> Tensor:
        return torch.from_numpy(images[:, :, 0, 0])


@pytest.fixture
def make(load: Callable[..., Backbone], tmp_path: Path) -> Callable[..., Trainer]:
    """`make(method, setting=value, ...)`: a trainer of two prompts with a smooth reward; gradients are not clipped."""

    def make(method: str, **changes: Any) -> Trainer:
        settings: dict[str, Any] = {
            "method": method, "prompts_per_update": 2, "prompts_per_batch": 2, "branch_late": (1, 2, 3), "kappa": 1e9,
            "guidance": 1.0, "resolution": (32, 32), "max_sequence_length": 0, "lora_rank": 4, "lora_alpha": 8,
            "updates": 20, "learning_rate": 1e-2, "kernel": "flow_sde", "max_grad_norm": 1e9, "clip": 1e-3, "sample_every": 0,
        }  # fmt: skip
        if method == "gardo":
            settings |= {"auxiliary": ("channel-1", "channel-2"), "kl_weight": 0.5}
        backbone = load(0)
        backbone.decode = lambda latents, batch: latents.numpy()
        config = make_config([("settings", {**settings, **changes})])
        extra = [Channel(int(name[-1])) for name in config.extra_rewards]
        return Trainer(config, tmp_path, backbone, [Channel(0)], PROMPTS, None, extra, Corner())

    return make


@pytest.fixture
def planned() -> Callable[..., Method]:
    """`planned(method, sigmas, setting=value, ...)`: a method without a model."""

    def planned(method: str, sigmas: Tensor = SIGMAS, **settings: Any) -> Method:
        given = {"method": method, "kernel": "flow_sde", "kappa": 1e9, **settings}
        return methods.make(make_config([("settings", given)]), sigmas)

    return planned


# -- gradients -----------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """A stochastic step of one prompt, a value per child: row c * parents + p is child c of parent p.

    new, old: log-probability of the current weights and of the rollout's, mean over dimensions. delta: log-probability
    less that of the reference, summed. shift: RatioNorm's. kl: between the means and the reference's.
    """

    parents: int
    dt: float
    new: Tensor
    old: Tensor
    delta: Tensor
    shift: Tensor
    kl: Tensor


@dataclass
class Prompt:
    """One prompt's part of a batch. leaves: `[K, C, H, W]`. rewards: `[K]`."""

    number: int
    steps: list[Step]
    leaves: Tensor

    @property
    def rewards(self) -> Tensor:
        return self.leaves[:, 0].mean((1, 2))

    @property
    def z(self) -> Tensor:
        return (self.rewards - self.rewards.mean()) / self.rewards.std(correction=0)


def flow_sde(x: Tensor, v: Tensor, s: float, after: float, eta: float) -> tuple[Tensor, float]:
    dt = s - after
    level = eta * math.sqrt(s / (1 - (after if s >= 1 else s)))
    return x - dt * v - dt * level**2 / (2 * s) * (x + (1 - s) * v), level * math.sqrt(dt)


def cps(x: Tensor, v: Tensor, s: float, after: float, eta: float) -> tuple[Tensor, float]:
    angle = eta * math.pi / 2
    return (1 - after) * (x - s * v) + after * math.cos(angle) * (x + (1 - s) * v), after * math.sin(angle)


KERNELS = {"flow_sde": flow_sde, "cps": cps}


def surrogate(log_ratio: Tensor, advantage: Tensor | float, clip: float) -> Tensor:
    rho = log_ratio.exp()
    return torch.min(rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage)


def written_out(trainer: Trainer, batch: PromptBatch) -> list[Prompt]:
    """The steps of every prompt in one graph of the current weights; only what the rollout drew is taken from it."""
    config: Any = trainer.config
    kernel, count = KERNELS[config.kernel], batch.count

    def step_of(branch: tree.Branch, p: int) -> tuple[Tensor, float]:
        x, sigma = branch.x[p::count], branch.sigma
        velocity = trainer.backbone.velocity([batch.prompts[p]], config.guidance)
        return kernel(x, velocity(x, torch.full((len(x),), sigma)), sigma, branch.sigma_next, config.eta)

    # First: it puts other weights into the network, under the graph's feet.
    with torch.no_grad(), trainer.method.reference():
        reference = {(p, b.step): step_of(b, p)[0] for p in range(count) for b in batch.rollout.branches}
    prompts = []
    for p in range(count):
        steps = []
        for branch in batch.rollout.branches:
            mean, std = step_of(branch, p)
            child, parents = branch.x_child[p::count], len(mean)

            def per_child(means: Tensor, children: int = len(child) // parents) -> Tensor:
                return torch.cat([means] * children)

            new, old, at_reference = (
                torch.distributions.Normal(per_child(means), std).log_prob(child).flatten(1)
                for means in (mean, branch.mean[p::count], reference[p, branch.step])
            )
            shift = (per_child(mean) - per_child(branch.mean[p::count])) ** 2 / (2 * std**2)
            kl = (per_child(mean) - per_child(reference[p, branch.step])) ** 2 / (2 * std**2)
            steps.append(
                Step(
                    parents,
                    branch.sigma - branch.sigma_next,
                    new.mean(1),
                    old.mean(1),
                    (new.double() - at_reference.double()).sum(1).float(),
                    shift.flatten(1).mean(1).detach(),
                    kl.flatten(1).mean(1),
                )
            )
        prompts.append(Prompt(p, steps, batch.rollout.leaves[p::count]))
    return prompts


@pytest.fixture
def check_gradient(
    make: Callable[..., Trainer],
    roll: Callable[..., Any],
    shake: Callable[..., None],
    gradient: Callable[[Trainer], Tensor],
) -> Callable[..., None]:
    """`check_gradient(method, loss, setting=value, ...)`: at the rollout's weights, and at others, where ratios are clipped.

    `loss(prompt, clipped)` is the method's own loss of one prompt, with PPO's term `clipped(log_ratio, advantage)`.
    `kl_scale(step)`: what the KL of a step is multiplied by. `begun(trainer, batch)` is called after the rollout and gives
    the leaves that the penalty is a mean over, `[prompts, K]`, or None for all.
    """

    def check_gradient(
        method: str,
        loss: Callable[..., Tensor],
        kl_scale: Callable[[Step], float] = lambda step: 1.0,
        begun: Callable[[Trainer, PromptBatch], Tensor] | None = None,
        update: int = 0,
        **settings: Any,
    ) -> None:
        trainer = make(method, **{"replay_batch": 10, **settings})
        config: Any = trainer.config
        shake(trainer)
        batch, network = roll(trainer, update=update)
        network.max_batch = config.replay_batch
        held = begun(trainer, batch) if begun else None

        def clipped(log_ratio: Tensor, advantage: Tensor | float) -> Tensor:
            return surrogate(log_ratio, advantage, config.clip)

        for inner in range(2):
            trainer.optimizer.zero_grad()
            figures = trainer.method.backward(batch, network, inner)
            found = gradient(trainer)
            prompts = written_out(trainer, batch)
            losses = [loss(prompt, clipped) for prompt in prompts]
            # Where leaves are held they are chains: a row at every step.
            kls = [
                step.kl[held[p.number] if held is not None else slice(None)] * kl_scale(step)
                for p in prompts
                for step in p.steps
            ]
            total = torch.stack(losses).mean() + config.kl_weight * torch.cat(kls).mean()
            wanted = torch.autograd.grad(total, list(trainer.weights.lora.values()))
            expected = torch.cat([part.flatten() for part in wanted])
            assert (found - expected).norm() < 1e-3 * expected.norm()
            logged = sum(figures["loss"]) / 2 + config.kl_weight * sum(figures.get("kl_reference", [])) / 2
            assert logged == pytest.approx(total.item(), rel=1e-3, abs=1e-6)
            if inner == 0:
                assert max(figures["ratio_max"]) == 1.0
                trainer.optimizer.step()
                shake(trainer, 0.02)
            else:
                assert max(figures["clip_fraction"]) > 0

    return check_gradient


# -- what must not matter, and what it costs -----------------------------------------------------------------------


@pytest.fixture
def check_batches(
    make: Callable[..., Trainer], shake: Callable[..., None], gradient: Callable[[Trainer], Tensor]
) -> Callable[..., None]:
    """`check_batches(method)`: an update in small batches is that in large ones."""

    def check_batches(method: str, **settings: Any) -> None:
        whole = make(method, **{"kl_weight": 0.5, **settings})
        parts = make(
            method, **{"kl_weight": 0.5, "prompts_per_batch": 1, "max_batch": 7, "replay_batch": 5, **settings}
        )
        for trainer in (whole, parts):
            shake(trainer)
        first, second = whole.update(), parts.update()
        assert (gradient(whole) - gradient(parts)).norm() < 1e-3 * gradient(whole).norm()
        for name in ("loss", "kl_reference", "evaluations/rollout", "evaluations/reference", "evaluations/replay"):
            assert first[name] == pytest.approx(second[name], rel=1e-3, abs=1e-6)

    return check_batches


@pytest.fixture
def check_calls(make: Callable[..., Trainer]) -> Callable[..., None]:
    """`check_calls(method, rollout, replay)`: rows of the transformer's own calls, against what metrics.jsonl says."""

    def check_calls(method: str, rollout: int, replay: int, **settings: Any) -> None:
        trainer = make(method, kl_weight=0.1, **settings)
        counts = {"forward": 0, "with gradient": 0}

        def count(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            counts["with gradient" if torch.is_grad_enabled() else "forward"] += len(kwargs["hidden_states"])

        trainer.backbone.transformer.register_forward_pre_hook(count, with_kwargs=True)
        metrics = trainer.update()
        assert counts == {"forward": 2 * (rollout + replay), "with gradient": 2 * replay}
        found = [metrics[f"evaluations/{phase}"] for phase in ("rollout", "reference", "replay")]
        assert found == [rollout, replay, replay]

    return check_calls


@pytest.fixture
def check_evaluations(planned: Callable[..., Method]) -> Callable[..., None]:
    """`check_evaluations(method, rollout, replay, reference, update, ...)`: by counting the rows that a network sees."""

    def check_evaluations(
        method: str, rollout: int, replay: int, reference: int = 0, update: int = 0, **settings: Any
    ) -> None:
        made = planned(method, **settings)
        plan = made.plan(update)
        rows: Counter[bool] = Counter()
        scale = torch.ones((), requires_grad=True)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            rows[torch.is_grad_enabled()] += len(x)
            return x * scale

        run = tree.rollout(velocity, tree.keyed_noise((0,), (2,)), SIGMAS, plan, **made.transition)
        assert (rows[False], rows[True]) == (rollout, 0) and len(run.leaves) == 27
        tree.replay(velocity, run, torch.ones_like(run.log_probs))
        assert rows[True] == replay
        counts = made.evaluations(plan)
        assert counts == {"rollout": rollout, "reference": reference, "ratio": 0, "replay": replay}
        assert methods.cost(counts) == rollout + reference + 2 * replay

    return check_evaluations


@pytest.fixture
def check_equal_rewards(make: Callable[..., Trainer]) -> Callable[[str], None]:
    """`check_equal_rewards(method)`: rounding noise is not normalised into an advantage."""

    def check_equal_rewards(method: str) -> None:
        trainer = make(method)
        scorer: Any = trainer.judges.rewards[0]
        scorer.score = lambda images, prompts, metadata=None: 0.5 + 1e-6 * torch.randn(len(images))
        assert trainer.update()["advantage_std"] < 0.05

    return check_equal_rewards


@pytest.fixture
def refused() -> Callable[..., None]:
    """`refused(message, setting=value, ...)`: settings that make no sense together."""

    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(ValueError, match=message):
            make_config([("settings", settings)])

    return refused
