"""The rivals and ablations on the tiny model: their gradients written out, their network calls counted, GARDO's state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tmpo_trainer import tree
from tmpo_trainer.backbones.base import Backbone
from tmpo_trainer.methods import gardo
from tmpo_trainer.settings.config import TrainConfig
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.training import checkpoint
from tmpo_trainer.training.loop import Trainer
from tmpo_trainer.training.prompt_batch import Clock, Group

Make = Callable[..., Trainer]
SLOTS = [(0, "a red circle"), (1, "two blue squares")]
RIVALS = ("flow-grpo", "mix-grpo", "tree-grpo", "gardo")
ABLATIONS = ("tmpo-beta-1", "tmpo-step-balance", "tmpo-no-tree", "tmpo-fixed-branching")


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
def make(load: Callable[..., Backbone], tmp_path: Path) -> Make:
    """Trainers of a method with a smooth reward and gradients that are not clipped."""

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
        config = TrainConfig(**{**settings, **changes})
        auxiliary = [Channel(1), Channel(2)] if method == "gardo" else []
        prompts = [prompt for _, prompt in SLOTS]
        return Trainer(config, tmp_path, backbone, [Channel(0)], prompts, None, auxiliary, Corner())

    return make


def gradient(trainer: Trainer) -> Tensor:
    parts = []
    for parameter in trainer.lora.values():
        assert parameter.grad is not None
        parts.append(parameter.grad.flatten())
    return torch.cat(parts)


def mean_of(trainer: Trainer, branch: tree.Branch, p: int, count: int, velocity: tree.Velocity) -> Tensor:
    """The mean of flow_sde's step from every parent of prompt p."""
    x, s, dt = branch.x[p::count], branch.sigma, branch.sigma - branch.sigma_next
    level = trainer.config.eta * math.sqrt(s / (1 - (branch.sigma_next if s >= 1 else s)))
    v = velocity(x, torch.full((len(x),), s))
    return x - dt * v - dt * level**2 / (2 * s) * (x + (1 - s) * v)


def naive_loss(trainer: Trainer, group: Group, held: np.ndarray | None) -> Tensor:
    """The whole loss of all prompts in one graph, in plain loops; edges and leaves by the rows that the layout gives them."""
    config, run, count = trainer.config, group.rollout, group.count
    losses, penalties, references = [], [], {}
    # First: it puts other weights into the network, under the graph's feet.
    with torch.no_grad(), trainer.kl_reference():
        for p, prompt in enumerate(group.prompts):
            velocity = trainer.backbone.velocity([prompt], config.guidance)
            for branch in run.branches:
                references[p, branch.step] = mean_of(trainer, branch, p, count, velocity)
    for p, prompt in enumerate(group.prompts):
        velocity = trainer.backbone.velocity([prompt], config.guidance)
        steps = []
        for branch in run.branches:
            x, child = branch.x[p::count], branch.x_child[p::count]
            s, dt = branch.sigma, branch.sigma - branch.sigma_next
            level = config.eta * math.sqrt(s / (1 - (branch.sigma_next if s >= 1 else s)))

            mean = mean_of(trainer, branch, p, count, velocity)
            reference = references[p, branch.step]
            normal = torch.distributions.Normal(mean.repeat(len(child) // len(x), 1, 1, 1), level * math.sqrt(dt))
            old = torch.distributions.Normal(
                branch.mean[p::count].repeat(len(child) // len(x), 1, 1, 1), level * math.sqrt(dt)
            )
            scale = 2 * level**2 if not config.method.startswith("tmpo") else 2 * level**2 * dt
            steps.append({
                "parents": len(x),
                "new": normal.log_prob(child).flatten(1).mean(1),
                "old": old.log_prob(child).flatten(1).mean(1),
                "shift": ((normal.mean - old.mean) ** 2 / (2 * level**2 * dt)).flatten(1).mean(1),
                "kl": ((normal.mean - reference.repeat(len(child) // len(x), 1, 1, 1)) ** 2 / scale).flatten(1).mean(1),
            })  # fmt: skip
        rewards = run.leaves[p::count][:, 0].mean((1, 2))
        z = (rewards - rewards.mean()) / rewards.std(correction=0)
        leaves = len(rewards)

        def surrogate(log_ratio: Tensor, a: Tensor) -> Tensor:
            rho = log_ratio.exp()
            return torch.min(rho * a, rho.clamp(1 - config.clip, 1 + config.clip) * a)

        # The advantage of every row of every step.
        advantages: list[Tensor] = []
        if config.method in ("flow-grpo", "mix-grpo"):
            advantages = [z] * len(steps)
        elif config.method == "gardo":
            centred = rewards - rewards.mean()
            features = torch.nn.functional.normalize(run.leaves[p::count][:, :, 0, 0], dim=1)
            nearest = torch.stack([
                min(1 - features[i] @ features[j] for j in range(leaves) if j != i) for i in range(leaves)
            ])  # fmt: skip
            advantages = [torch.where(centred >= 0, centred * nearest / nearest.mean(), centred)] * len(steps)
        elif config.method == "tree-grpo":
            below = z
            for step in reversed(range(len(steps))):
                advantages.insert(0, below)
                children = steps[step]["old"].unflatten(0, (-1, steps[step]["parents"])).softmax(0)
                below = (children * below.unflatten(0, (-1, steps[step]["parents"]))).sum(0)
        elif config.method == "tmpo-step-balance":
            flow = (config.beta(group.update) * z).exp()
            for step in reversed(range(len(steps))):
                siblings = flow.unflatten(0, (-1, steps[step]["parents"]))
                policy = steps[step]["new"].detach().unflatten(0, (-1, steps[step]["parents"]))
                balance = siblings.log().log_softmax(0) - policy.log_softmax(0)
                advantages.insert(0, balance.flatten())
                flow = siblings.mean(0)
        if config.method == "tmpo-step-balance":
            terms = [
                surrogate(s["new"] - s["old"] + s["shift"].detach(), a) for s, a in zip(steps, advantages, strict=True)
            ]
            losses.append(-sum(term.mean() for term in terms))
        elif advantages:
            terms = [surrogate(s["new"] - s["old"], a) for s, a in zip(steps, advantages, strict=True)]
            losses.append(-torch.cat(terms).mean())
        else:
            rows = [torch.arange(leaves) % len(s["new"]) for s in steps]
            policy = sum(s["new"][row] for s, row in zip(steps, rows, strict=True)).detach()
            a = (config.beta(group.update) * z).log_softmax(0) - policy.log_softmax(0)
            ratio = sum((s["new"] - s["old"] + s["shift"].detach())[row] for s, row in zip(steps, rows, strict=True))
            losses.append(-surrogate(ratio, a).mean())
        kl = torch.stack([s["kl"] for s in steps]) if held is not None else torch.cat([s["kl"] for s in steps])
        # The rows of the gate are those of the whole batch.
        penalties.append(kl[:, torch.from_numpy(held[p::count])].flatten() if held is not None else kl)
    return torch.stack(losses).mean() + config.kl_weight * torch.cat(penalties).mean()


@pytest.mark.parametrize("method", [*RIVALS, *ABLATIONS])
def test_gradient_is_that_of_the_loss_written_out(make: Make, shake: Callable[..., None], method: str) -> None:
    """At the rollout's weights, and at others, where ratios are clipped; with a KL penalty."""
    trainer = make(method, kl_weight=0.5, window=2, replay_batch=10)
    shake(trainer)
    group = Group(trainer, Clock(trainer.device), trainer.planner.plan(0), 0, SLOTS)
    held = None
    if trainer.gate:
        trainer.gate.share = 0.2
        trainer._choose(trainer.gate, [group])
        assert group.gate is not None
        held = group.gate.numpy()
        assert 2 <= held.sum() == group.gated < len(held) / 5
    for inner in range(2):
        trainer.optimizer.zero_grad()
        figures = group.backward(inner)
        found = gradient(trainer)
        loss = naive_loss(trainer, group, held)
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(trainer.lora.values()))])
        assert (found - expected).norm() < 1e-3 * expected.norm()
        total = sum(figures["loss"]) / 2 + 0.5 * sum(figures["kl_reference"]) / 2
        assert total == pytest.approx(loss.item(), rel=1e-3, abs=1e-6)
        if inner == 0:
            assert max(figures["ratio_max"]) == 1.0
            trainer.optimizer.step()
            shake(trainer, 0.02)
        else:
            assert max(figures["clip_fraction"]) > 0


@pytest.mark.parametrize("method", [*RIVALS, *ABLATIONS])
def test_batches_change_nothing(make: Make, shake: Callable[..., None], method: str) -> None:
    whole, parts = (
        make(method, kl_weight=0.5),
        make(method, kl_weight=0.5, prompts_per_batch=1, max_batch=7, replay_batch=5),
    )
    for trainer in (whole, parts):
        shake(trainer)
    first, second = whole.update(), parts.update()
    assert (gradient(whole) - gradient(parts)).norm() < 1e-3 * gradient(whole).norm()
    for name in ("loss", "kl_reference", "evaluations/rollout", "evaluations/reference", "evaluations/replay"):
        assert first[name] == pytest.approx(second[name], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "rollout", "replay"),
    [
        # The tiny model's sixth of six steps ends at 0 and its fifth near it: four may carry noise.
        ("flow-grpo", 162, 27 * 4),
        ("gardo", 162, 27 * 4),
        ("mix-grpo", 162, 27 * 2),
        ("tree-grpo", 94, 13),
        ("tmpo-beta-1", 96, 12),
        ("tmpo-step-balance", 96, 12),
        ("tmpo-fixed-branching", 96, 12),
        ("tmpo-no-tree", 162, 54),
    ],
)
def test_network_calls(make: Make, method: str, rollout: int, replay: int) -> None:
    """Rows of the transformer's own calls, against what metrics.jsonl says."""
    trainer = make(method, kl_weight=0.1, window=2, seed=1)
    counts = {"forward": 0, "with gradient": 0}

    def count(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        counts["with gradient" if torch.is_grad_enabled() else "forward"] += len(kwargs["hidden_states"])

    trainer.backbone.transformer.register_forward_pre_hook(count, with_kwargs=True)
    metrics = trainer.update()
    assert counts == {"forward": 2 * (rollout + replay), "with gradient": 2 * replay}
    found = [metrics[f"evaluations/{phase}"] for phase in ("rollout", "reference", "replay")]
    assert found == [rollout, replay, replay]


# -- GARDO ---------------------------------------------------------------------------------------------------------


def test_gardo_holds_what_the_reward_alone_likes(make: Make) -> None:
    trainer = make("gardo")
    metrics = trainer.update()
    # 54 samples, ranked together; a tenth of the suspicious half.
    assert 1 / 54 <= metrics["gated"] <= 6 / 54
    assert metrics["kl_reference"] == 0, "the reference is still the policy itself"
    assert trainer.update()["kl_reference"] > 0


def test_gardo_compares_with_its_copy_and_renews_it(make: Make) -> None:
    trainer = make("gardo", learning_rate=1e-3)
    assert trainer.gate is not None
    start = {name: value.clone() for name, value in trainer.held.items()}
    for _ in range(3):
        trainer.gate.kl = 0.0
        trainer.update()
    assert all(torch.equal(value, trainer.held[name]) for name, value in start.items())
    # The penalty is measured against the copy, the report against the pretrained model.
    x, sigma = torch.randn(1, *trainer.latent_shape), torch.full((1,), 0.5)
    velocity = trainer.backbone.velocity(["a red circle"], 1.0)
    with torch.no_grad():
        now = velocity(x, sigma)
        with trainer.kl_reference():
            held = velocity(x, sigma)
        with trainer.reference():
            base = velocity(x, sigma)
    assert torch.equal(held, base) and not torch.equal(now, base)
    trainer.gate.kl = 2 * gardo.KL_LIMIT
    before = {name: value.detach().clone() for name, value in trainer.lora.items()}
    trainer.update()
    assert all(torch.equal(value, trainer.held[name]) for name, value in before.items())
    assert trainer.gate.age == 1


def test_gardo_resumes_to_the_bit(make: Make) -> None:
    whole, first = make("gardo"), make("gardo")
    for _ in range(6):
        expected = whole.update()
    for _ in range(3):
        first.update()
    path = first.save()
    assert (path / checkpoint.HELD).is_file()
    second = make("gardo")
    second.resume(path)
    for _ in range(3):
        got = second.update()
    for name, value in whole.lora.items():
        assert torch.equal(value, second.lora[name]) and torch.equal(whole.held[name], second.held[name])
    assert whole.gate is not None and second.gate is not None and whole.gate.state() == second.gate.state()
    assert {k: v for k, v in got.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}
    with pytest.raises(ConfigError, match="of another method"):
        second.resume(make("flow-grpo").save())


def test_gardo_saves_its_state_as_of_the_last_whole_update(make: Make) -> None:
    """An update that fails has moved the gate, and will be done again."""
    whole, broken = make("gardo"), make("gardo")
    for _ in range(5):
        expected = whole.update()
    reporter: Any = SimpleNamespace(update=lambda metrics: None)
    score, calls = broken.scorers[0].score, 0

    def fail(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise ValueError("no more")
        return score(*arguments)

    broken.scorers[0].score = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no more"):
        broken.train(reporter)
    again = make("gardo")
    again.resume(checkpoint.checkpoints(broken.run)[-1])
    assert again.done == 3
    for _ in range(2):
        got = again.update()
    assert whole.gate is not None and again.gate is not None and again.gate.state() == whole.gate.state()
    assert {k: v for k, v in got.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}


@pytest.mark.parametrize("method", ["flow-grpo", "mix-grpo", "tree-grpo"])
def test_equal_rewards_train_nothing(make: Make, method: str) -> None:
    """Rounding noise must not be normalised into an advantage."""
    trainer = make(method)
    trainer.scorers[0].score = lambda images, prompts, metadata=None: 0.5 + 1e-6 * torch.randn(len(images))  # type: ignore
    assert trainer.update()["advantage_std"] < 0.05


# -- what makes no sense -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "flow-grpo", "anchor": "ref"}, "anchor ref belongs to method tmpo"),
        ({"method": "tmpo-no-tree", "anchor": "ref"}, "anchor ref belongs to method tmpo"),
        ({"method": "mix-grpo", "baseline": "group"}, "baseline group belongs to TMPO"),
        ({"method": "tmpo-no-tree", "baseline": "siblings"}, "chains have no siblings"),
        ({"method": "tmpo-step-balance", "baseline": "group"}, "no advantage per path"),
        ({"method": "gardo", "kl_weight": 0.04}, "needs auxiliary scorers"),
        ({"method": "gardo", "auxiliary": ("sharpness",)}, "kl_weight above 0"),
        ({"auxiliary": ("sharpness",)}, "auxiliary sharpness belongs to method gardo"),
        (
            {"method": "gardo", "kl_weight": 0.04, "auxiliary": ("shapes",)},
            "name each once, and others than the reward",
        ),
        (
            {"method": "gardo", "kl_weight": 0.04, "auxiliary": ("ocr", "ocr")},
            "name each once, and others than the reward",
        ),
    ],
)
def test_combinations_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_windows_that_do_not_fit(make: Make) -> None:
    with pytest.raises(ConfigError, match="window 5: of 6 steps only 4 may carry noise"):
        make("mix-grpo", window=5)
    with pytest.raises(ConfigError, match="branches at 3 neighbouring steps"):
        make("tree-grpo", rollout_steps=4)
