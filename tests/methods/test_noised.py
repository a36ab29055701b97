"""Methods on noised leaves: their gradients written out, exact facts, what they cost and keep between updates."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.methods.tiny import COUNT, DRAWS, LEAVES, all_parts, all_rows, found, move, set_up
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.training import checkpoint

Make = Callable[..., Any]

METHODS = ("awm", "nft", "crd", "tmpo-leaf")


# -- gradients -----------------------------------------------------------------------------------------------------


def awm(A: Tensor, e: Tensor, e_old: Tensor, e_ref: Tensor, clip: float) -> Tensor:
    rho = (e_old - e).exp()
    return -torch.min(rho * A, rho.clamp(1 - clip, 1 + clip) * A).mean()


def crd(R: Tensor, e: Tensor, e_old: Tensor, e_ref: Tensor, clip: float) -> Tensor:
    ratio = 7.0 * (e_ref - e)
    return (R - (ratio - ratio.mean())).square().mean() / 14


def tmpo_leaf(R: Tensor, e: Tensor, e_old: Tensor, e_ref: Tensor, clip: float) -> Tensor:
    return awm((1.5 * R).log_softmax(0) - (-e.detach()).log_softmax(0), e, e_old, e_ref, clip)


def anchored(R: Tensor, e: Tensor, e_old: Tensor, e_ref: Tensor, clip: float) -> Tensor:
    A = (1.5 * R).log_softmax(0) - (7.0 * (e_ref - e.detach())).log_softmax(0)
    return awm(A - A.mean(), e, e_old, e_ref, clip)


BETA = {"beta_start": 1.5, "beta_end": 1.5}


@pytest.mark.parametrize(
    ("name", "settings", "loss"),
    [
        ("awm", {}, awm),
        ("crd", {"tilt_weight": 7.0}, crd),
        ("tmpo-leaf", BETA, tmpo_leaf),
        ("tmpo-leaf", {**BETA, "anchor": "ref", "anchor_weight": 7.0, "baseline": "group"}, anchored),
    ],
)
def test_gradient_is_that_of_the_loss_of_errors(
    name: str, settings: dict[str, Any], loss: Callable[..., Tensor]
) -> None:
    """At the rollout's weights, and at others where ratios are clipped; with a KL; in several calls of the network."""
    clip = 0.01
    own = {} if name == "crd" else {"clip": clip}
    made = set_up(name, kl_weight=0.3, inner_updates=2, noise_weight=0.5, **own, **settings)
    _, x, t, v, weight = all_rows(made)
    with torch.no_grad(), made.weights.pretrained():
        reference = made.transformer(x, t)
    e_old = None
    for inner in range(2):
        velocity = made.transformer(x, t)

        def errors(u: Tensor) -> Tensor:
            return (weight * (u - v).square().mean((1, 2, 3))).view(DRAWS, LEAVES, COUNT).mean(0)

        e, e_ref = errors(velocity), errors(reference)
        e_old = e.detach() if e_old is None else e_old
        losses = [loss(made.batch.rewards[p], e[:, p], e_old[:, p], e_ref[:, p], clip) for p in range(COUNT)]
        kl, mse = ((velocity - other).square().mean((1, 2, 3)) for other in (reference, v))
        # Two of the four prompts of an update.
        total = (sum(losses) / COUNT + 0.3 * (weight * kl).mean()) * COUNT / 4
        (expected,) = torch.autograd.grad(total, made.transformer.adapter)
        got, figures = found(made, inner)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        assert figures["loss"] == pytest.approx([value.item() for value in losses], rel=1e-9)
        assert sum(figures["kl_reference"]) / 2 == pytest.approx(kl.mean().item())
        assert sum(figures["velocity_mse"]) / 2 == pytest.approx(mse.mean().item())
        assert "clip_fraction" not in figures or (max(figures["clip_fraction"]) > 0) == (inner == 1)
        move(made, 0.1)


@pytest.mark.parametrize("rise", [0, 0.001])
@pytest.mark.parametrize("adaptive", [False, True])
def test_gradient_of_nft_is_that_of_its_loss_written_out(adaptive: bool, rise: float) -> None:
    """With an old policy that is not the current one; clipped advantages are wholly good or bad."""
    own = {
        "strength": 0.4, "reward_range": 1.2, "adaptive_weight": adaptive, "kl_weight": 0.3, "old_decay_rise": rise,
        "noise_weight": 1,
    }  # fmt: skip
    made = set_up("nft", inner_updates=2, **own)
    _, x, t, v, weight = all_rows(made)
    with torch.no_grad():
        v_old = made.transformer(x, t)
        with made.weights.pretrained():
            reference = made.transformer(x, t)
    rows = [(r % COUNT, r // COUNT % LEAVES) for r in range(len(x))]
    for inner in range(2):
        velocity, losses = made.transformer(x, t), []
        for i, (p, leaf) in enumerate(rows):
            r = 0.5 + 0.5 * min(max(made.batch.rewards[p][leaf].item() / 1.2, -1), 1)
            plus = (1 - 0.4) * v_old[i] + 0.4 * velocity[i]
            minus = (1 + 0.4) * v_old[i] - 0.4 * velocity[i]
            parts = []
            for u in (plus, minus):
                if adaptive:
                    data, x0 = x[i] - t[i] * u, x[i] - t[i] * v[i]
                    parts.append(((data - x0) ** 2 / (data - x0).abs().mean().detach()).mean())
                else:
                    parts.append(((u - v[i]) ** 2).mean())
            losses.append(weight[i] * (r * parts[0] + (1 - r) * parts[1]) * 1.2 / 0.4)
        kl = (velocity - reference).square().mean((1, 2, 3))
        total = (torch.stack(losses).mean() + 0.3 * (weight * kl).mean()) * COUNT / 4
        (expected,) = torch.autograd.grad(total, made.transformer.adapter)
        got, figures = found(made, inner)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        assert sum(figures["loss"]) / 2 == pytest.approx(torch.stack(losses).mean().item())
        move(made, 0.1)
    # A policy that is always the current one is not evaluated beside it.
    assert made.network.evaluated["reference"] == len(x) * (2 if rise else 1)


@pytest.mark.parametrize("kl", [0, 0.3])
def test_a_limit_on_the_error_of_what_is_pushed_away(kl: float) -> None:
    """Such a row keeps its KL alone, once its error is above that many times the pretrained model's, whatever the weights.
    A row that attracts has no limit."""
    settings = {"negative_limit": 1.2, "kl_weight": kl, "noise_weight": 1, "adaptive_weight": False}
    made = set_up("awm", **settings)
    _, x, t, v, weight = all_rows(made)
    with torch.no_grad(), made.weights.pretrained():
        reference = made.transformer(x, t)
    advantage = torch.stack(made.batch.rewards, 1).repeat(DRAWS, 1).flatten()
    halts = []
    for _ in range(2):
        velocity = made.transformer(x, t)
        error, other = ((velocity - v).square().mean((1, 2, 3)), (reference - v).square().mean((1, 2, 3)))
        wrong = error > 1.2 * other
        halts.append(wrong & (advantage < 0))
        rows = advantage * error * ~halts[-1] + kl * (velocity - reference).square().mean((1, 2, 3))
        (expected,) = torch.autograd.grad((weight * rows).mean() * COUNT / 4, made.transformer.adapter)
        assert halts[-1].any() and (wrong & (advantage > 0)).any() and (~wrong & (advantage < 0)).any()
        for name, more in (("awm", {}), ("nft", {"old_decay_rise": 0, "strength": 0.4})):
            same = set_up(name, **settings, **more)
            same.weights.read(made.weights.lora)
            got, figures = found(same)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
            assert figures["negative_halted"] == [halts[-1][p::COUNT].double().mean().item() for p in range(COUNT)]
        move(made, 0.3)
    # It is looked at anew wherever the weights are.
    assert not torch.equal(*halts)


@pytest.mark.parametrize(("method", "more"), [("awm", {}), ("nft", {"old_decay_rise": 0, "strength": 0.4})])
def test_the_pretrained_model_at_a_sample_of_the_rows(method: str, more: dict[str, Any]) -> None:
    """Written out: the KL at the sample alone, with as much more weight; in several calls of the network."""
    settings = {
        "kl_weight": 0.3,
        "noise_weight": 1,
        "leaf_importance": 0.5,
        "level_importance": 0.3,
        "adaptive_weight": False,
    }
    made = set_up(method, reference_share=0.3, inner_updates=2, **settings, **more)
    noised = made.method.noised(made.batch)
    _, x, t, _, weight = all_parts(noised)
    sample = noised.sample(5)
    kl_weight = torch.zeros(LEAVES * DRAWS * COUNT, dtype=torch.float64)
    kl_weight[sample] = LEAVES * DRAWS / 5
    assert (kl_weight > 0).sum() == 5 * COUNT
    with torch.no_grad(), made.weights.pretrained():
        reference = made.transformer(x, t)
    without = set_up(method, inner_updates=2, **settings | {"kl_weight": 0}, **more)
    for inner in range(2):
        without.weights.read(made.weights.lora)
        rest, _ = found(without, inner)
        velocity = made.transformer(x, t)
        kl = kl_weight * (velocity - reference).square().mean((1, 2, 3))
        total = 0.3 * (weight * kl).mean() * COUNT / 4
        (own,) = torch.autograd.grad(total, made.transformer.adapter)
        logged = noised.importance * kl.detach()
        # Several calls of the network; the last optimiser step has the reference of the first.
        for most in (None, 2, 5):
            made.network.max_batch = most
            if not inner:
                made.batch.own = {}
            got, figures = found(made, inner)
            torch.testing.assert_close(got, rest + own, rtol=1e-9, atol=1e-12)
            assert figures["kl_reference"] == pytest.approx([logged[p::COUNT].mean().item() for p in range(COUNT)])
        assert made.network.evaluated["reference"] == 3 * 5 * COUNT
        move(made, 0.1)
    assert made.method.keeps(made.batch.plan) == LEAVES + 5 + (LEAVES * DRAWS if method == "nft" else 0)


def test_the_limit_needs_the_pretrained_model_at_every_row() -> None:
    with pytest.raises(
        ConfigError, match=r"reference_share 0.3 with negative_limit 2: .*use reference_share 1 or negative_limit none"
    ):
        set_up("nft", reference_share=0.3, negative_limit=2)


# -- exact facts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
def test_nft_at_the_old_policy_is_awm(adaptive: bool) -> None:
    """Its gradient there is the error's, weighted by the advantage, whatever its strength."""
    expected, _ = found(set_up("awm", adaptive_weight=adaptive))
    for strength in (0.1, 1.0):
        got, _ = found(set_up("nft", adaptive_weight=adaptive, strength=strength))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_equal_rewards_move_nothing() -> None:
    got, figures = found(set_up("awm", torch.full((COUNT, LEAVES), 0.3, dtype=torch.float64)))
    assert not got.any() and figures["advantage_std"] == [0, 0]


def test_crd_is_anchored_softmax_tb_of_leaves() -> None:
    settings = {"anchor": "ref", "baseline": "group", "beta_start": 1.0, "beta_end": 1.0, "anchor_weight": 7.0}
    expected, _ = found(set_up("tmpo-leaf", **settings))
    got, _ = found(set_up("crd", tilt_weight=7.0))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_the_optimum_of_crd_is_the_tilt() -> None:
    """On pictures that can be enumerated, with the log ratio of their probabilities in the place of the errors'."""
    made = set_up("crd", tilt_weight=0.7)
    rewards = made.batch.rewards[0]
    generator = torch.Generator().manual_seed(2)
    reference = torch.randn(LEAVES, generator=generator, dtype=torch.float64).softmax(0)
    logits = torch.zeros(LEAVES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-18)

    def closure() -> Tensor:
        optimizer.zero_grad()
        ratio = logits.log_softmax(0) - reference.log()
        loss, _ = made.method.loss(made.batch, 0, -ratio, -ratio, torch.zeros_like(ratio))
        loss.backward()
        return loss

    optimizer.step(closure)
    tilted = reference * (rewards / 0.7).exp()
    torch.testing.assert_close(logits.detach().softmax(0), tilted / tilted.sum(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("method", "most"), [("nft", 0.7), ("awm", 0.7)])
def test_importance_sampling_keeps_the_gradient_and_takes_noise_from_it(method: str, most: float) -> None:
    """On average over the noise, with the KL penalty, against the same draws without it."""
    rewards = torch.tensor([[0.0] * 6 + [3, 0.5, 0.5], [1, 2, 3, 1, 1, 1, 1, 1, 1]], dtype=torch.float64)

    def gradients(**settings: Any) -> Tensor:
        made = set_up(method, rewards, kl_weight=0.2, noise_shift=1, draws=1, **settings)
        made.network.max_batch = None
        rows = []
        for update in range(1500):
            made.batch.update, made.batch.own = update, {}
            rows.append(found(made)[0].flatten())
        return torch.stack(rows)

    even, chosen = gradients(), gradients(leaf_importance=0.7, level_importance=0.3)
    difference = even.mean(0) - chosen.mean(0)
    error = ((even.var(0) + chosen.var(0)) / len(even)).sqrt()
    assert (difference / error).square().mean() < 1.6
    assert (even.mean(0) / error).square().mean() > 20
    assert chosen.var(0).sum() < most * even.var(0).sum()


def test_errors_that_are_logged_are_of_even_leaves_and_levels() -> None:
    made = set_up("nft", leaf_importance=0.7, level_importance=0.5, kl_weight=0.3, draws=3)
    _, figures = found(made)
    noised = made.method.noised(made.batch)
    rows = all_parts(noised)
    with torch.no_grad():
        velocity = made.transformer(rows.x, rows.t)
        with made.weights.pretrained():
            reference = made.transformer(rows.x, rows.t)
    for name, other in (("velocity_mse", rows.v), ("kl_reference", reference)):
        value = noised.importance * (velocity - other).square().mean((1, 2, 3))
        assert figures[name] == pytest.approx([value[p::COUNT].mean().item() for p in range(COUNT)])


def test_split_chains_are_independent_seeds_that_branch_once() -> None:
    made = set_up("nft", rollout="split-chains", branch_early=(1, 2, 4), branching=3, leaf_steps=1)
    plan = made.method.shape(0)
    assert (plan.num_steps, plan.roots, dict(plan.fanout), plan.leaves) == (5, 9, {4: 3}, 27)
    assert plan.rollout_evaluations == 9 * 4 + 27


# -- in training ---------------------------------------------------------------------------------------------------


def settings_of(method: str) -> dict[str, Any]:
    return {"method": method, "draws": 2, "branch_early": (1, 2), "kl_weight": 0.1} | (
        {"rollout": "tree", "anchor": "ref"} if method == "tmpo-leaf" else {}
    )


@pytest.mark.parametrize(
    ("method", "more"),
    [
        *((name, {}) for name in METHODS), ("nft", {"old_decay_rise": 0}), ("nft", {"old_decay_max": 0}),
        ("nft", {"old_decay_rise": 0, "kl_weight": 0, "negative_limit": 1.2, "leaf_importance": 0.8}),
        ("nft", {"reference_share": 0.3}), ("nft", {"old_decay_rise": 0, "reference_share": 0.01}),
        ("awm", {"reference_share": 0.3}), ("crd", {"rollout": "split-chains", "branch_early": (2, 3)}),
    ],
)  # fmt: skip
def test_network_calls(make: Make, method: str, more: dict[str, Any]) -> None:
    """Rows of the transformer's own calls, against what is promised and what metrics.jsonl says; with two optimiser steps."""
    trainer = make(**settings_of(method) | {"inner_updates": 2} | more)
    counts = {"forward": 0, "with gradient": 0}

    def count(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        counts["with gradient" if torch.is_grad_enabled() else "forward"] += len(kwargs["hidden_states"])

    trainer.backbone.transformer.register_forward_pre_hook(count, with_kwargs=True)
    plan = trainer.method.shape(0)
    promised = trainer.method.evaluations(plan)
    metrics = trainer.update()
    assert {phase: metrics.get(f"evaluations/{phase}", 0) for phase in promised} == promised
    replayed = promised["replay"]
    assert counts == {"forward": 2 * (sum(promised.values()) - replayed), "with gradient": 2 * replayed}
    rows = 9 * 2
    # An old policy that is always the current one has no evaluations of its own.
    old = rows if method == "nft" and not {"old_decay_rise", "old_decay_max"} & set(more) else 0
    reference = {0.3: 5, 0.01: 1, 1: rows}[more.get("reference_share", 1)]
    ratio = {"awm": 1, "nft": 0, "crd": 2, "tmpo-leaf": 2}[method]
    rolled = {"tree": 3 * 2 + 9 * 4, "split-chains": 3 * 3 + 9 * 3, "chains": 9 * 6}[trainer.config.rollout]
    assert promised == {"rollout": rolled, "reference": old + reference, "ratio": ratio * rows, "replay": 2 * rows}


@pytest.mark.parametrize(
    ("method", "more"),
    [
        *((name, {"level_importance": 0.5}) for name in METHODS),
        ("nft", {"old_decay_rise": 0, "leaf_importance": 0.8}), ("awm", {"leaf_importance": 0.8}),
        ("nft", {"negative_limit": None, "reference_share": 0.3, "rollout": "split-chains", "branch_early": (2, 3)}),
    ],
)  # fmt: skip
def test_batches_change_nothing(check_batches: Callable[..., None], method: str, more: dict[str, Any]) -> None:
    check_batches(**settings_of(method) | {"noise_weight": 1, "negative_limit": 1.0001} | more)


def test_nft_on_policy_after_an_attempt_that_ran_out_of_memory(make: Make) -> None:
    """Half of the velocities of the old policy were kept by then: the update is that of a run that had the memory."""
    settings = settings_of("nft") | {"old_decay_rise": 0, "inner_updates": 2}
    small, full = make(**settings, replay_batch=4), make(**settings, replay_batch=8)
    calls, failed = [], []

    def fail(module: nn.Module, args: tuple) -> None:
        if torch.is_grad_enabled():
            calls.append(None)
            if len(calls) == 2:
                failed.append(None)
                raise torch.OutOfMemoryError("made up")

    full.backbone.transformer.register_forward_pre_hook(fail)
    for trainer in (small, full):
        trainer.update()
    assert failed and full.replay_batch == 4
    for name, value in small.weights.lora.items():
        assert torch.equal(value, full.weights.lora[name])


@pytest.mark.parametrize("method", ["nft", "tmpo-leaf"])
def test_it_resumes_to_the_bit(make: Make, method: str) -> None:
    settings = settings_of(method) | ({"old_decay_rise": 0.2} if method == "nft" else {})
    whole, first, second = (make(**settings) for _ in range(3))
    for _ in range(3):
        expected = whole.update()
    first.update()
    first.update()
    path = first.save()
    second.resume(path)
    got = second.update()
    assert {**got, "seconds": 0} == {**expected, "seconds": 0}
    for name, value in whole.weights.lora.items():
        assert torch.equal(value, second.weights.lora[name])
        if method == "nft":
            assert torch.equal(whole.method.old[name], second.method.old[name])
    state = json.loads((path / "state.json").read_text())
    assert state["method_state"] == ({"updates": 2} if method == "nft" else {})
    if method == "nft":
        (path / checkpoint.TENSORS).unlink()
        with pytest.raises(ConfigError, match="lacks the copy of the adapter that nft keeps"):
            make(**settings).resume(path)


def test_a_run_that_goes_on_on_policy_rolls_out_its_own_weights(make: Make) -> None:
    first = make(**settings_of("nft"), old_decay_rise=0.4)
    first.update()
    first.update()
    second = make(**settings_of("nft"), old_decay_rise=0)
    second.resume(first.save())
    weights = second.weights.copy()
    assert not all(torch.equal(value, second.method.old[name]) for name, value in weights.items())
    second.method.begin(2, second.weights)
    assert second.method.rollout_weights(second.weights) is None
    assert all(torch.equal(value, second.method.old[name]) for name, value in weights.items())


def test_the_old_policy_of_nft_follows_and_rolls_out(make: Make) -> None:
    """Its decay rises from 0. The current policy is what is trained."""
    trainer = make(**settings_of("nft"), old_decay_rise=0.4, old_decay_max=0.5)
    seen = []
    for decay in (0.0, 0.4, 0.5):
        before = {name: value.clone() for name, value in trainer.method.old.items()} or trainer.weights.copy()
        seen.append(trainer.update()["reward/channel-0"])
        for name, value in trainer.weights.lora.items():
            torch.testing.assert_close(trainer.method.old[name], decay * before[name] + (1 - decay) * value.detach())
    # The next rollout is the old policy's, however wrong the current weights are.
    expected = trainer.method.old
    with torch.no_grad():
        for parameter in trainer.weights.lora.values():
            parameter.add_(1)
    used = trainer.method.rollout_weights(trainer.weights)
    assert used is expected and len(set(seen)) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "awm", "baseline": "group"}, "baseline group belongs to method tmpo, not to awm"),
        ({"method": "tmpo-leaf", "baseline": "siblings"}, "baseline siblings with tmpo-leaf: evidence is of leaves"),
        ({"method": "crd", "kernel": "cps", "eta": 2}, "eta 2.0 is too large for kernel cps"),
    ],
    ids=str,
)
def test_combinations_that_make_no_sense(refused: Callable[..., None], settings: dict[str, Any], message: str) -> None:
    refused(message, **settings)


@pytest.mark.parametrize("method", ["nft", "flow-grpo"])
def test_chains_take_only_the_number_of_branch_steps(planned: Make, refused: Callable[..., None], method: str) -> None:
    assert planned(method, torch.linspace(1, 0, 5), rollout_steps=4, branch_early=(1, 4, 5)).plan(0).leaves == 27
    refused("branch_early .* strictly increasing", method=method, branch_early=())
    if method == "nft":
        for rollout in ("tree", "split-chains"):
            settings = {"method": method, "rollout": rollout, "rollout_steps": 4, "branch_early": (1, 4, 5)}
            refused("branch_early .* must stay below rollout_steps 4", **settings)


def test_a_tree_that_cannot_carry_noise_is_refused(planned: Make) -> None:
    with pytest.raises(ConfigError, match=r"branch_early \[1, 5\]: step 5 of 6 ends at sigma 0.0089"):
        planned("awm", torch.tensor([1, 0.923, 0.819, 0.668, 0.432, 0.0089, 0]), rollout="tree", branch_early=(1, 5))
