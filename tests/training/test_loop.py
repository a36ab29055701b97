"""Updates on the tiny model: counted evaluations, settings that must not matter, a reward that rises."""

from __future__ import annotations

import gc
import math
import shutil
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tmpo_trainer import tree
from tmpo_trainer.backbones.sd3 import SD3Backbone
from tmpo_trainer.methods.batch import Clock, Network, PromptBatch
from tmpo_trainer.prompts.lists import prompt_index
from tmpo_trainer.rewards import Scoring
from tmpo_trainer.training import checkpoint, loop
from tmpo_trainer.training.loop import Trainer

MakeTrainer = Callable[..., Trainer]
Shake = Callable[..., None]
Roll = Callable[..., tuple[PromptBatch, Network]]
Gradient = Callable[[Trainer], Tensor]
SLOTS = [(0, "a red circle"), (1, "two blue squares")]


class LatentScorer:
    """Mean of a latent channel. Pictures are rounded to 8 bits, and a pixel that falls the other way moves a reward."""

    name = "latent"

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Any = None) -> Tensor:
        return torch.from_numpy(images[:, 0].mean((1, 2)))


@pytest.fixture
def exact(make_trainer: MakeTrainer) -> MakeTrainer:
    """Trainers whose reward is a smooth function of the leaves, and whose gradients are not clipped."""

    def make(**changes: Any) -> Trainer:
        trainer = make_trainer(scorer=LatentScorer(), **{"max_grad_norm": 1e9, **changes})
        trainer.backbone.decode = lambda latents, batch: latents.numpy()
        return trainer

    return make


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.weights.lora.values()])


def off(value: Tensor, expected: Tensor) -> float:
    """Relative distance of two vectors."""
    return ((value - expected).norm() / expected.norm()).item()


# -- ratios --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("kernel", ["cps", "flow_sde", "dance"])
def test_replay_at_unchanged_weights_gives_ratio_1(
    make_trainer: MakeTrainer, shake: Shake, roll: Roll, kernel: str, guidance: float
) -> None:
    trainer = make_trainer(kernel=kernel, guidance=guidance, replay_batch=7)
    shake(trainer)
    for _ in range(2):
        assert trainer.update()["replay_ratio_error"] < 1e-4
    batch, network = roll(trainer)
    shake(trainer, 0.1)
    assert max(trainer.method.backward(batch, network, 0)["replay_ratio_error"]) > 1e-4


def test_second_inner_update_has_another_ratio(make_trainer: MakeTrainer) -> None:
    once, twice = (make_trainer(inner_updates=n, learning_rate=1e-2, max_grad_norm=1e9) for n in (1, 2))
    first, second = once.update(), twice.update()
    assert first["ratio_mean"] == first["ratio_max"] == 1.0
    assert second["ratio_max"] > 1.0001
    assert once.done == twice.done == 1
    assert off(weights(once), weights(twice)) > 1e-4


@pytest.mark.parametrize("method", ["tmpo", "flow-grpo"])
def test_rewards_of_any_size_train(make_trainer: MakeTrainer, red_scorer: Any, method: str) -> None:
    """Their squares overflow in float32."""

    class Huge:
        name = "red"

        def score(self, *arguments: Any) -> Tensor:
            return 1e37 * red_scorer.score(*arguments)

    trainer = make_trainer(scorer=Huge(), method=method)
    metrics = trainer.update()
    assert metrics["reward_std/red"] > 1e30 and metrics["grad_norm"] > 0
    assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, float))


# -- settings that must not matter ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"prompts_per_batch": 4},
        {"prompts_per_batch": 3},
        {"max_batch": 7},
        {"replay_batch": 5},
        {"prompts_per_batch": 4, "max_batch": 9, "replay_batch": 6},
        {"prompts_per_batch": 2, "guidance": 3.5, "kl_weight": 0.5, "anchor": "ref", "anchor_weight": 0.1},
    ],
    ids=str,
)
def test_batching_does_not_change_an_update(
    exact: MakeTrainer, shake: Shake, gradient: Gradient, settings: dict[str, Any]
) -> None:
    chunking = ("prompts_per_batch", "max_batch", "replay_batch")
    plain = exact(prompts_per_update=4, **{k: v for k, v in settings.items() if k not in chunking})
    chunked = exact(prompts_per_update=4, **settings)
    figures = []
    for trainer in (plain, chunked):
        shake(trainer)
        figures.append(trainer.update())
    assert off(gradient(chunked), gradient(plain)) < 1e-5
    assert off(weights(chunked), weights(plain)) < 1e-5
    for name, value in figures[0].items():
        if name not in ("seconds", "replay_ratio_error"):
            assert figures[1][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_gradient_is_the_mean_over_prompts_in_any_order(
    exact: MakeTrainer, shake: Shake, roll: Roll, gradient: Gradient
) -> None:
    trainer = exact(prompts_per_update=4)
    shake(trainer)
    start = trainer.weights.copy()
    metrics = trainer.update()
    expected = gradient(trainer).clone()
    trainer.weights.read(start)
    trainer.optimizer.zero_grad()
    prompts, rewards = trained_prompts(trainer, 0), []
    for slot in (2, 0, 3, 1):
        batch, network = roll(trainer, [(slot, prompts[slot])])
        trainer.method.backward(batch, network, 0)
        rewards.append(batch.scores["latent"].mean().item())
    assert off(gradient(trainer), expected) < 1e-5
    assert metrics["reward/latent"] == pytest.approx(sum(rewards) / 4, rel=1e-5)


@pytest.mark.parametrize("inner_updates", [1, 2])
def test_gradients_of_earlier_updates_are_gone(
    exact: MakeTrainer, roll: Roll, gradient: Gradient, inner_updates: int
) -> None:
    """The gradient left by the last of several optimiser steps is that of the same weights and rollout on their own."""
    trainer = exact(inner_updates=inner_updates, branching=2)
    trainer.update()
    alone = exact(inner_updates=inner_updates, branching=2)
    alone.weights.read(trainer.weights.lora)
    rolled = [roll(alone, [slot], update=1) for slot in enumerate(trained_prompts(alone, 1))]
    before_last: list[Tensor] = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (before_last.append(weights(trainer)), step())  # pyright: ignore
    trainer.update()
    torch.nn.utils.vector_to_parameters(before_last[-1], alone.weights.lora.values())
    for batch, network in rolled:
        alone.method.backward(batch, network, inner_updates - 1)
    assert len(before_last) == inner_updates
    assert off(gradient(trainer), gradient(alone)) < 1e-5


def trained_prompts(trainer: Trainer, update: int) -> list[str]:
    count, total = trainer.config.prompts_per_update, len(trainer.prompts)
    return [trainer.prompts[prompt_index(update * count + slot, total, trainer.config.seed)] for slot in range(count)]


def test_noise_belongs_to_slot_update_and_seed(make_trainer: MakeTrainer, roll: Roll) -> None:
    trainer = make_trainer()

    def rollout(trainer: Trainer, slots: list[tuple[int, str]], update: int = 0) -> tree.Rollout:
        return roll(trainer, slots, update)[0].rollout

    both = rollout(trainer, SLOTS)
    for p, slot in enumerate(SLOTS):
        alone = rollout(trainer, [slot])
        torch.testing.assert_close(both.leaves[p::2], alone.leaves, atol=1e-5, rtol=1e-5)
        for branch, other in zip(both.branches, alone.branches, strict=True):
            torch.testing.assert_close(branch.x_child[p::2], other.x_child, atol=1e-5, rtol=1e-5)
    prompt = "a red circle"
    first = rollout(trainer, [(0, prompt)]).leaves
    for other in (
        rollout(trainer, [(1, prompt)]),
        rollout(trainer, [(0, prompt)], update=1),
        rollout(make_trainer(seed=1), [(0, prompt)]),
    ):
        assert (other.leaves - first).abs().flatten(1).amax(1).min() > 0.1
    torch.testing.assert_close(rollout(trainer, [(0, prompt)]).leaves, first, atol=0, rtol=0)


def test_rewards_reach_their_own_prompt_and_leaf(make_trainer: MakeTrainer, roll: Roll) -> None:
    """A reward that is the picture's mean: recomputed leaf by leaf."""
    trainer = make_trainer(reward_norm="none")
    batch, _ = roll(trainer, SLOTS)
    (scorer,) = trainer.judges.rewards
    for p, (slot, prompt) in enumerate(SLOTS):
        alone, _ = roll(trainer, [(slot, prompt)])
        pictures = trainer.backbone.decode(alone.rollout.leaves, 64)
        torch.testing.assert_close(batch.rewards[p], scorer.score(pictures, [prompt] * 27), atol=1e-4, rtol=0)
    assert (batch.rewards[0] - batch.rewards[1]).abs().max() > 1e-3


# -- evaluations ---------------------------------------------------------------------------------------------------


class Rows:
    """Counts the rows that pass through a transformer: rollout and other no-grad passes, replay, reference."""

    def __init__(self, backbone: SD3Backbone):
        self.no_grad = self.grad = self.reference = self.largest = 0
        self.adapter = next(part for part in backbone.transformer.modules() if hasattr(part, "lora_A"))
        backbone.transformer.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        rows = len(kwargs["hidden_states"])
        self.largest = max(self.largest, rows)
        if self.adapter.disable_adapters:
            self.reference += rows
        elif torch.is_grad_enabled():
            self.grad += rows
        else:
            self.no_grad += rows


@pytest.mark.parametrize(
    ("settings", "rollout", "replay", "reference"),
    [
        ({}, 96, 12, 0),
        ({"branch_early": (1, 3, 4), "branch_late": (1, 3, 4)}, 72, 12, 0),
        ({"branch_early": (2, 3, 4), "branch_late": (2, 3, 4)}, 68, 13, 0),
        ({"branching": 2}, 32, 6, 0),
        ({"guidance": 3.5}, 192, 24, 0),
        ({"anchor": "ref"}, 96, 12, 12),
        ({"kl_weight": 0.1}, 96, 12, 12),
        ({"kl_weight": 0.1, "anchor": "ref", "guidance": 2.0}, 192, 24, 24),
        ({"inner_updates": 2}, 96 + 12, 24, 0),
        ({"inner_updates": 2, "anchor": "ref"}, 96 + 12, 24, 12),
        ({"leaf_steps": 1}, 42, 12, 0),
    ],
    ids=str,
)
def test_evaluations_per_prompt(
    make_trainer: MakeTrainer, settings: dict[str, Any], rollout: int, replay: int, reference: int
) -> None:
    for prompts_per_batch in (1, 2):
        trainer = make_trainer(prompts_per_batch=prompts_per_batch, **settings)
        rows = Rows(trainer.backbone)
        metrics = trainer.update()
        assert (rows.no_grad, rows.grad, rows.reference) == (2 * rollout, 2 * replay, 2 * reference)
        phases = {name: metrics.get(f"evaluations/{name}", 0) for name in ("rollout", "reference", "ratio", "replay")}
        guided = 2 if settings.get("guidance", 1) > 1 else 1
        # Latents: guidance evaluates each twice.
        assert phases == trainer.method.evaluations(trainer.method.shape(0))
        assert guided * (phases["rollout"] + phases["ratio"]) == rollout and guided * phases["replay"] == replay
        assert guided * phases["reference"] == reference


@pytest.mark.parametrize("settings", [{}, {"inner_updates": 2}, {"kl_weight": 0.1, "prompts_per_batch": 2}], ids=str)
def test_kept_graphs_give_the_same_update_with_fewer_evaluations(
    make_trainer: MakeTrainer, shake: Callable[[Trainer], None], settings: dict[str, Any]
) -> None:
    weights, metrics, counts = [], [], []
    for reuse in (False, True):
        trainer = make_trainer(reuse_forward=reuse, **settings)
        shake(trainer)
        rows = Rows(trainer.backbone)
        metrics.append([trainer.update() for _ in range(2)])
        counts.append(rows.no_grad + rows.grad)
        weights.append(torch.cat([value.detach().flatten() for value in trainer.weights.lora.values()]))
        planned = trainer.method.evaluations(trainer.method.shape(0))
        assert {name: metrics[-1][0].get(f"evaluations/{name}", 0) for name in planned} == planned
    assert counts[0] - counts[1] == 2 * 2 * 12
    # Adam's first step turns a gradient of nearly zero into one of either sign.
    assert (weights[1] - weights[0]).norm() < 1e-4 * weights[0].norm()
    assert metrics[1][1]["grad_norm"] == pytest.approx(metrics[0][1]["grad_norm"], rel=1e-4)
    assert metrics[1][0]["replay_ratio_error"] == 0


def test_graphs_that_do_not_fit_are_not_kept_again(
    make_trainer: MakeTrainer, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The replay's batch has nothing to do with it. A replay that does not fit without graphs is halved as ever."""
    trainer, plain = make_trainer(reuse_forward=True), make_trainer()
    original, tried = tree.replay, []

    def replay(*args: Any, **kwargs: Any) -> Any:
        tried.append(args[1].graphs)
        if args[1].graphs or len(tried) == 4:
            args[1].drop_graphs()
            raise torch.OutOfMemoryError("none left")
        return original(*args, **kwargs)

    expected = [plain.update() for _ in range(2)]
    monkeypatch.setattr(tree, "replay", replay)
    first = trainer.update()
    assert tried == [True, False, False] and trainer.replay_batch is None
    assert "out of memory with the activations of the rollout" in capsys.readouterr().err
    assert trainer.update()["grad_norm"] == pytest.approx(expected[1]["grad_norm"], rel=1e-4)
    assert tried[3:] == [False] * 3 and trainer.replay_batch == 6
    assert first["evaluations/replay"] == expected[0]["evaluations/replay"]


def test_a_rollout_in_which_graphs_do_not_fit_is_made_again_without(
    make_trainer: MakeTrainer, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second batch of the first update: what the first one has kept is dropped too."""
    trainer, plain = (make_trainer(reuse_forward=reuse, prompts_per_batch=1) for reuse in (True, False))
    original, tried, held = tree.rollout, [], []

    def rollout(*args: Any, **kwargs: Any) -> Any:
        tried.append(kwargs.get("graphs", False))
        if len(tried) == 2:
            graph = torch.zeros(3)
            held.append(weakref.ref(graph))
            raise torch.OutOfMemoryError("none left")
        # Before anything is rolled out again, what the failed one held is gone, also without the garbage collector.
        assert not held or held[0]() is None
        return original(*args, **kwargs)

    expected = [plain.update() for _ in range(2)]
    monkeypatch.setattr(tree, "rollout", rollout)
    gc.disable()
    try:
        found = [trainer.update() for _ in range(2)]
    finally:
        gc.enable()
    assert tried == [True, True, *[False] * 4]
    assert "out of memory with the activations of the rollout" in capsys.readouterr().err
    for name in ("grad_norm", "reward/red", "evaluations/replay", "lgmd"):
        assert [metrics[name] for metrics in found] == pytest.approx([metrics[name] for metrics in expected], rel=1e-4)
    # Without graphs there is nothing to drop.
    tried[:] = [False]
    with pytest.raises(torch.OutOfMemoryError):
        trainer.update()


@pytest.mark.parametrize("graphs", [False, True])
def test_only_another_attempt_waits_for_the_scorers(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    """They take one call at a time. A run that ends does not wait for one that hangs."""
    trainer = make_trainer(reuse_forward=graphs)
    joined = []

    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(trainer.roller, "roll_out", full)
    monkeypatch.setattr(Scoring, "join", lambda self: joined.append(1))
    with pytest.raises(torch.OutOfMemoryError):
        trainer.update()
    assert len(joined) == graphs


def test_figures_of_which_another_process_knows_nothing(make_trainer: MakeTrainer) -> None:
    """It ran out of memory and has made other calls."""
    trainer = make_trainer()

    def gather(value: Any) -> list[Any]:
        return [value, {"loss": [0.5, 0.5], "evaluations/backward": [9.0]}] if isinstance(value, dict) else [value]

    trainer.processes.gather = gather  # pyright: ignore[reportAttributeAccessIssue]
    metrics = trainer.update()
    assert metrics["evaluations/backward"] == 9 and metrics["evaluations/replay"] == 12


def test_a_figure_is_the_mean_of_the_prompts_whatever_its_scorer_is_called() -> None:
    assert loop.summarise("reward/area_max", [1.0, 3.0]) == 2 and loop.summarise("ratio_max", [1.0, 3.0]) == 3


def test_an_interrupted_change_of_weights_is_not_saved(
    make_trainer: MakeTrainer, shake: Shake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ctrl-C while the averaged weights are put in, or the trained ones back: half of the parameters are the others'."""
    for at in (1, 2):
        trainer = make_trainer(sample_every=1, checkpoint_every=0)
        shake(trainer)
        original, reads = trainer.weights.read, []

        def read(values: Any, reads: list[int] = reads, original: Any = original, at: int = at) -> None:
            reads.append(1)
            if len(reads) == at:
                original(dict.fromkeys(values, torch.zeros(())))
                raise KeyboardInterrupt
            original(values)

        monkeypatch.setattr(trainer.weights, "read", read)
        before = weights(trainer)
        reporter = SimpleNamespace(update=lambda metrics: None, samples=lambda update: None)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(reporter)  # pyright: ignore[reportArgumentType]
        assert trainer.done == 1 and len(reads) == 2
        saved = checkpoint.checkpoints(tmp_path)
        # The first time, the trained weights were put back.
        assert bool(saved) == (at == 1) and bool(weights(trainer).any()) == (at == 1)
        if saved:
            assert not torch.equal(weights(trainer), before)
            shutil.rmtree(saved[0])


@pytest.mark.parametrize("sharded", [False, True])
def test_a_line_of_figures_that_cannot_be_written_loses_no_update(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sharded: bool
) -> None:
    """Nor of sharded weights: all processes hear of it, because none waits inside the network."""
    trainer = make_trainer(sample_every=0, checkpoint_every=0)
    monkeypatch.setattr(type(trainer.weights), "sharded", sharded)

    def update(metrics: dict[str, Any]) -> None:
        if metrics["update"] == 2:
            raise OSError("made up")

    with pytest.raises(OSError, match="made up"):
        trainer.train(SimpleNamespace(update=update))  # pyright: ignore[reportArgumentType]
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path)] == ["checkpoint-2"]


def test_an_evaluation_begins_with_a_checkpoint(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """It may take longer than a scheduler waits after its signal."""
    trainer = make_trainer(sample_every=0, checkpoint_every=0, eval_every=2, updates=3)
    saved = []

    def evaluation(update: int) -> None:
        saved.append([folder.name for folder in checkpoint.checkpoints(tmp_path)])

    reporter = SimpleNamespace(update=lambda metrics: None, evaluation=evaluation)
    trainer.train(reporter)  # pyright: ignore[reportArgumentType]
    assert saved == [["checkpoint-2"]]


@pytest.mark.parametrize("inner", [1, 2])
def test_the_anchor_is_zero_before_anything_is_learnt(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, inner: int
) -> None:
    """Also where a network rounds differently for batches of another size, as in bfloat16."""
    batches = {"max_batch": 4, "replay_batch": 5, "prompts_per_batch": 2}
    trainer = make_trainer(anchor="ref", anchor_weight=0.04, inner_updates=inner, learning_rate=0, **batches)
    original, loss, found = trainer.backbone.velocity, trainer.method.loss, []

    def velocity(prompts: Any, guidance: float) -> Any:
        network = original(prompts, guidance)
        return lambda x, sigma: network(x, sigma) + 1e-3 * len(x)

    def spy(batch: Any, p: int, transitions: Any) -> Any:
        found.append(transitions.reference_log_ratio)
        return loss(batch, p, transitions)

    monkeypatch.setattr(trainer.backbone, "velocity", velocity)
    monkeypatch.setattr(trainer.method, "loss", spy)
    trainer.update()
    assert len(found) == 2 * inner and all(torch.equal(each, torch.zeros(39 - 3)) for each in found)


def test_batches_stay_within_their_limits(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(prompts_per_batch=2, max_batch=7, replay_batch=5, kl_weight=0.1)
    rows = Rows(trainer.backbone)
    trainer.update()
    assert rows.largest == 6


# -- objectives and schedules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"anchor": "ref", "anchor_weight": 0.04}, {"kl_weight": 0.1}], ids=str)
def test_anchor_and_kl_are_finite(make_trainer: MakeTrainer, settings: dict[str, Any]) -> None:
    trainer = make_trainer(learning_rate=1e-2, **settings)
    first, second = trainer.update(), trainer.update()
    for metrics in (first, second):
        assert all(math.isfinite(v) for v in metrics.values() if isinstance(v, float))
    if "kl_weight" in settings:
        assert first["kl_reference"] == pytest.approx(0, abs=1e-9) and second["kl_reference"] > 1e-9
    assert torch.isfinite(weights(trainer)).all()


def test_no_shard_is_finite(make_trainer: MakeTrainer) -> None:
    """A LoRA of a small rank leaves some of many processes without a part of a parameter, or of any."""
    trainer = make_trainer()
    trainer.weights.lora["empty"] = torch.nn.Parameter(torch.empty(0, 4))
    assert trainer.weights.finite()
    trainer.weights.lora["whole"] = torch.nn.Parameter(torch.tensor([torch.nan]))
    assert not trainer.weights.finite()
    trainer.weights.lora = {"empty": trainer.weights.lora["empty"]}
    assert trainer.weights.finite()


def test_reference_and_averaged_put_everything_back(make_trainer: MakeTrainer, shake: Shake) -> None:
    trainer = make_trainer(ema_every=100)
    x, sigma = torch.randn(2, 16, 4, 4), torch.tensor([0.5, 0.5])
    velocity = trainer.backbone.velocity(["a red circle"], 1.0)
    with torch.no_grad():
        base = velocity(x, sigma)
        shake(trainer)
        trained = velocity(x, sigma)
        assert (trained - base).abs().max() > 1e-3
        with trainer.weights.pretrained():
            assert torch.equal(velocity(x, sigma), base)
        # The average is still the initial LoRA, which is zero.
        with trainer.weights.averaged():
            torch.testing.assert_close(velocity(x, sigma), base)
        assert torch.equal(velocity(x, sigma), trained)
        with pytest.raises(RuntimeError, match="boom"), trainer.weights.averaged():
            raise RuntimeError("boom")
        assert torch.equal(velocity(x, sigma), trained)


def test_ema(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(ema_decay=0.8, ema_every=2, branching=2, learning_rate=1e-2)
    expected = {name: value.detach().clone() for name, value in trainer.weights.lora.items()}
    for update in range(1, 6):
        trainer.update()
        if update % 2 == 0:
            expected = {n: 0.8 * value + 0.2 * trainer.weights.lora[n].detach() for n, value in expected.items()}
        for name, value in expected.items():
            torch.testing.assert_close(trainer.weights.ema[name], value)
    assert off(torch.cat([v.flatten() for v in trainer.weights.ema.values()]), weights(trainer)) > 1e-3


def test_learning_rate_is_a_cosine(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(updates=4, learning_rate=1e-3, lr_min_ratio=0.1, branching=2)
    expected = [1e-3, 1e-3 * (0.55 + 0.45 * math.sqrt(0.5)), 0.55e-3, 1e-3 * (0.55 - 0.45 * math.sqrt(0.5))]
    for value in expected:
        assert trainer.update()["learning_rate"] == pytest.approx(value)
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(value)
    assert trainer.learning_rate(4) == pytest.approx(1e-4)


def test_gradient_is_clipped(make_trainer: MakeTrainer, gradient: Gradient) -> None:
    trainer = make_trainer(max_grad_norm=1e-3, branching=2)
    metrics = trainer.update()
    assert metrics["grad_norm"] > 1e-3
    assert gradient(trainer).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_features_that_are_needed_must_be_given(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="pass `features` to Trainer"):
        make_trainer(neutral=("feature_distance",))


def test_a_latent_that_is_no_number_stops_the_update(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(branching=2)
    trainer.update()
    with torch.no_grad():
        next(iter(trainer.weights.lora.values())).fill_(math.nan)
    before = {name: value.clone() for name, value in trainer.weights.ema.items()}
    with pytest.raises(ValueError, match=r"non-finite latent in the rollout of update 2, prompts \['"):
        trainer.update()
    assert trainer.done == 1 and all(torch.equal(before[n], v) for n, v in trainer.weights.ema.items())


@pytest.mark.parametrize("inner", [0, 1])
def test_half_an_update_is_not_saved(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, inner: int
) -> None:
    """A failure before the first optimiser step of update 2 leaves update 1 whole; one between two steps does not."""
    trainer = make_trainer(inner_updates=2, branching=2, sample_every=0)
    original = trainer.method.backward

    def failing(batch: PromptBatch, network: Network, turn: int) -> Any:
        if batch.update == 1 and turn == inner:
            raise ValueError("boom")
        return original(batch, network, turn)

    class Silent:
        def update(self, metrics: dict[str, Any]) -> None:
            pass

    monkeypatch.setattr(trainer.method, "backward", failing)
    with pytest.raises(ValueError, match="boom"):
        trainer.train(Silent())  # pyright: ignore[reportArgumentType]
    assert trainer.done == 1
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == (["checkpoint-1"] if inner == 0 else [])


# -- learning ------------------------------------------------------------------------------------------------------


def test_the_reward_rises(make_trainer: MakeTrainer, roll: Roll) -> None:
    """Against a run that cannot learn, on the same noise, prompts and branch steps."""
    settings = {
        "updates": 30, "prompts_per_update": 4, "prompts_per_batch": 4, "baseline": "siblings", "max_grad_norm": 1.0
    }  # fmt: skip
    rewards = {}
    for rate in (0.0, 1e-2):
        trainer = make_trainer(learning_rate=rate, **settings)
        start = weights(trainer)
        rewards[rate] = torch.tensor([trainer.update()["reward/red"] for _ in range(30)])
        if rate == 0:
            assert torch.equal(weights(trainer), start)
            for parameter_name, parameter in trainer.weights.lora.items():
                if ".lora_B." in parameter_name:
                    assert not parameter.any()
            leaves = roll(trainer)[0].rollout.leaves
            with trainer.weights.pretrained():
                assert torch.equal(roll(trainer)[0].rollout.leaves, leaves)
    gain = rewards[1e-2] - rewards[0.0]
    assert gain[0] == 0
    assert gain[-5:].mean() > 5 * rewards[0.0].std()
    assert gain[-5:].min() > gain[1:6].max()


def test_seconds_by_phase_add_up(make_trainer: MakeTrainer) -> None:
    seconds = make_trainer(kl_weight=0.1).update()["seconds"]
    assert set(seconds) == {"rollout", "reference", "replay", "decode", "reward", "other", "total"}
    assert min(seconds.values()) >= 0
    assert seconds["total"] == pytest.approx(sum(v for k, v in seconds.items() if k != "total"))


# -- scorers that wait ---------------------------------------------------------------------------------------------


def test_scorers_that_wait_score_beside_the_next_rollout(make_trainer: MakeTrainer, red_scorer: Any) -> None:
    """In the order of the batches, one at a time, and with the same result. No earlier batch's pictures are kept."""
    begun, alone = [threading.Event() for _ in range(4)], threading.Lock()
    pictures: list[weakref.ref[np.ndarray]] = []

    class Waiting:
        name, waits = "red", True

        def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Any = None) -> Tensor:
            assert alone.acquire(blocking=False), "two calls at once"
            assert all(earlier() is None for earlier in pictures)
            pictures.append(weakref.ref(images))
            assert begun[len(pictures)].wait(10), "the next rollout has not begun"
            alone.release()
            return red_scorer.score(images, prompts)

    settings = {"prompts_per_update": 3, "branching": 2}
    plain, beside = make_trainer(**settings), make_trainer(scorer=Waiting(), **settings)
    network, rollouts = beside.roller.network, iter(begun)

    def beginning(prompts: Sequence[str], clock: Clock) -> Network:
        next(rollouts).set()
        return network(prompts, clock)

    beside.roller.network = beginning
    # No rollout follows the last batch.
    begun[3].set()
    expected, got = plain.update(), beside.update()
    seconds = got.pop("seconds")
    assert len(pictures) == 3 and got == {name: value for name, value in expected.items() if name != "seconds"}
    assert torch.equal(weights(plain), weights(beside))
    assert seconds["other"] >= 0 and {"rollout", "decode", "reward"} <= set(seconds)


@pytest.mark.parametrize("failing", [1, 4])
def test_an_error_of_a_scorer_that_waits_ends_the_update(make_trainer: MakeTrainer, failing: int) -> None:
    class Failing(LatentScorer):
        waits, calls = True, 0

        def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Any = None) -> Tensor:
            self.calls += 1
            if self.calls == failing:
                raise ValueError("no such picture")
            return torch.zeros(len(prompts))

    trainer, rollouts = make_trainer(scorer=Failing(), prompts_per_update=4, branching=2), []
    network = trainer.roller.network
    trainer.roller.network = lambda prompts, clock: (rollouts.append(prompts), network(prompts, clock))[1]
    with pytest.raises(ValueError, match="no such picture"):
        trainer.update()
    # It is noticed at the end of the next batch's rollout, if there is one.
    assert trainer.done == 0 and len(rollouts) == min(failing + 1, 4)


def test_pictures_are_scored_while_the_next_ones_are_decoded(make_trainer: MakeTrainer, red_scorer: Any) -> None:
    decoded, sizes = threading.Event(), []

    class Waiting:
        name, waits, in_parts = "red", True, True

        def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Any = None) -> Tensor:
            sizes.append(len(images))
            assert decoded.wait(10), "the second part has not been decoded"
            return red_scorer.score(images, prompts)

    settings = {"prompts_per_update": 1, "branching": 2, "decode_batch": 3}
    plain, beside = make_trainer(**settings), make_trainer(scorer=Waiting(), **settings)
    original, calls = beside.backbone.decode, []

    def decode(latents: Tensor, batch: int) -> np.ndarray:
        calls.append(len(latents))
        if len(calls) == 2:
            decoded.set()
        return original(latents, batch)

    beside.backbone.decode = decode
    expected, got = plain.update(), beside.update()
    assert sizes == calls == [3, 3, 2]
    for name in ("reward/red", "reward_std/red", "loss", "grad_norm"):
        assert got[name] == expected[name]


# -- out of memory -------------------------------------------------------------------------------------------------


def memory_for(rows: int, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, after: int = 0) -> list[int]:
    """Makes the trainer's network run out of memory with gradient and more than `rows` rows, from call `after` on.

    Returns the sizes tried.
    """
    tried: list[int] = []
    original = trainer.backbone.velocity

    def velocity(prompts: Sequence[str], guidance: float) -> tree.Velocity:
        network = original(prompts, guidance)

        def limited(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                tried.append(len(x))
                if len(x) > rows and len(tried) > after:
                    raise torch.OutOfMemoryError("made up")
            return network(x, sigma)

        return limited

    monkeypatch.setattr(trainer.backbone, "velocity", velocity)
    return tried


def test_out_of_memory_halves_the_replay_and_changes_nothing_else(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, short = make_trainer(), make_trainer()
    tried = memory_for(3, short, monkeypatch)
    expected, got = plain.update(), short.update()
    # 12 parents a prompt: one call of 12, then of 6, then of 3.
    assert tried == [12, 6, *[3] * 8] and short.replay_batch == 3
    for name, parameter in plain.weights.lora.items():
        assert parameter.grad is not None and short.weights.lora[name].grad is not None
        torch.testing.assert_close(short.weights.lora[name].grad, parameter.grad, atol=1e-7, rtol=1e-4)
    assert got["loss"] == expected["loss"]
    assert got["evaluations/replay"] == expected["evaluations/replay"]
    told = capsys.readouterr().err
    assert "12 latents in a replay call: 6 from now on" in told and "3 from now on (--replay-batch 3" in told
    tried.clear()
    short.update()
    assert tried == [3] * 8


def test_out_of_memory_half_way_begins_the_gradient_again(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was accumulated before must not count twice."""
    plain, short = make_trainer(), make_trainer(replay_batch=6)
    tried = memory_for(3, short, monkeypatch, after=3)
    plain.update(), short.update()
    assert tried == [6, 6, 6, 6, *[3] * 8]
    for name, parameter in plain.weights.lora.items():
        assert parameter.grad is not None and short.weights.lora[name].grad is not None
        torch.testing.assert_close(short.weights.lora[name].grad, parameter.grad, atol=1e-7, rtol=1e-4)


def test_out_of_memory_with_a_single_latent_says_what_helps(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    memory_for(0, trainer, monkeypatch)
    with pytest.raises(RuntimeError, match="even with 1 latents at a time: try --gradient-checkpointing"):
        trainer.update()


def test_gradient_checkpointing_is_the_same_gradient(make_trainer: Callable[..., Trainer]) -> None:
    plain, sparing = make_trainer(), make_trainer(gradient_checkpointing=True)
    assert sparing.backbone.transformer.is_gradient_checkpointing
    plain.update(), sparing.update()
    for name, parameter in plain.weights.lora.items():
        assert parameter.grad is not None and sparing.weights.lora[name].grad is not None
        torch.testing.assert_close(sparing.weights.lora[name].grad, parameter.grad, atol=1e-8, rtol=1e-5)
