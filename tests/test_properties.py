"""Schedule, tree and objectives on random shapes, rewards and settings: what holds whatever they are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tmpo_trainer import flow, objectives, tree
from tmpo_trainer.backbones import load_backbone
from tmpo_trainer.backbones.base import LoadOptions
from tmpo_trainer.objectives import Transitions
from tmpo_trainer.training.loop import Trainer
from tmpo_trainer.tree import BranchSchedule, TreePlan

#: The same examples in every run.
examples = settings(derandomize=True, deadline=None, max_examples=60, database=None)

SEEDS = st.integers(0, 2**32)
DTYPES = st.sampled_from([torch.float32, torch.float64])
BASELINES = st.sampled_from(["none", "group", "siblings"])
BETAS = st.floats(-3, 4).map(lambda power: 10.0**power)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def plans(draw: st.DrawFn, most: int = 3) -> TreePlan:
    """Up to `most` stochastic steps with 1 to 3 children each."""
    steps = draw(st.integers(2, 8))
    fanout = draw(st.dictionaries(st.integers(1, steps - 1), st.integers(1, 3), min_size=1, max_size=most))
    return TreePlan(steps, draw(st.integers(1, 4)), fanout)


@st.composite
def branching_plans(draw: st.DrawFn) -> TreePlan:
    """The paper's tree with a step that branches."""
    steps = draw(st.integers(3, 8))
    positions = draw(st.sets(st.integers(2, steps - 1), min_size=1, max_size=2)) | draw(st.sets(st.just(1)))
    return TreePlan.tmpo(steps, sorted(positions), draw(st.integers(2, 4)))


@st.composite
def rewards_of(draw: st.DrawFn, leaves: int, dtype: torch.dtype) -> Tensor:
    """Ordinary, all equal, one that stands out, or huge."""
    scale = 10.0 ** draw(st.integers(-6, 6))
    kind = draw(st.sampled_from(["normal", "equal", "one"]))
    if kind == "normal":
        return scale * normal(leaves, seed=draw(SEEDS), dtype=dtype) + draw(st.sampled_from([0.0, 1e3, -1e6]))
    values = torch.full((leaves,), draw(st.sampled_from([0.0, 0.3, -1e6, 1234567.0])), dtype=dtype)
    if kind == "one":
        values[draw(st.integers(0, leaves - 1))] += scale
    return values


def transitions_of(plan: TreePlan, seed: int, dtype: torch.dtype, moved: float = 0.0) -> Transitions:
    """Log-probabilities of a rollout, and of a policy that has moved on since."""
    index = plan.index()
    edges = len(index.edge_parent)
    old, step = normal(2, edges, seed=seed, dtype=dtype)
    current = (old + moved * step).requires_grad_()
    return Transitions(current, old, torch.zeros_like(old), index.leaf_edges, index.edge_parent)


def slopes(
    transitions: Transitions, rewards: Tensor, beta: float, baseline: objectives.Baseline, clip: float = 0.2
) -> Tensor:
    loss, _ = objectives.softmax_tb_loss(transitions, rewards, beta, clip, baseline)
    return objectives.edge_coefficients(loss, transitions.log_probs)


# Schedule


@examples
@given(st.data(), SEEDS, st.integers(0, 3000), st.floats(-2, 6).map(lambda power: 10.0**power))
def test_schedule_always_gives_as_many_increasing_steps(
    data: st.DataObject, seed: int, update: int, kappa: float
) -> None:
    last = data.draw(st.integers(2, 27))
    count = data.draw(st.integers(1, min(last, 5)))
    chosen = st.sets(st.integers(1, last), min_size=count, max_size=count).map(lambda s: tuple(sorted(s)))
    early, late = data.draw(chosen), data.draw(chosen)
    schedule = BranchSchedule(last + 1, early, late, kappa, 1000, seed)
    steps = schedule.steps(update)
    assert len(steps) == count and steps[0] >= 1 and 2 <= steps[-1] <= last
    assert all(a < b for a, b in itertools.pairwise(steps))
    assert all(0 <= xi <= 1 for xi in schedule.raw(update)) and schedule.steps(update) == steps


# Tree


@examples
@given(plans(), st.integers(1, 3))
def test_index_and_counts_of_any_plan(plan: TreePlan, trees: int) -> None:
    index = plan.index()
    edges, parents = len(index.edge_parent), plan.train_evaluations
    assert index.leaf_edges.shape == (plan.leaves, len(plan.fanout))
    assert plan.leaves == plan.roots * math.prod(plan.fanout.values())
    # Every edge is on a path, every parent has its children, and each level of the tree is crossed once.
    assert index.leaf_edges.unique().tolist() == list(range(edges))
    children = torch.bincount(index.edge_parent).tolist()
    expected = [(plan.widths[step - 1], k) for step, k in plan.fanout.items()]
    assert children == [k for width, k in expected for _ in range(width)] and len(children) == parents
    level = torch.cat([torch.full((width * k,), i) for i, (width, k) in enumerate(expected)])
    assert (level[index.leaf_edges] == torch.arange(len(plan.fanout))).all()
    # Paths that share an edge share all before it.
    for path in index.leaf_edges.T:
        for edge in path.unique():
            before = index.leaf_edges[path == edge]
            column = int(level[edge])
            assert (before[:, : column + 1] == before[0, : column + 1]).all()
    forest = plan.forest(trees)
    assert (forest.leaves, forest.rollout_evaluations) == (trees * plan.leaves, trees * plan.rollout_evaluations)


@examples
@given(
    plans(2),
    SEEDS,
    DTYPES,
    st.sampled_from(["cps", "flow_sde", "dance"]),
    st.sampled_from(["mean", "sum"]),
    st.floats(0.05, 1),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_log_probability_of_what_was_drawn_is_the_density(
    plan: TreePlan,
    seed: int,
    dtype: torch.dtype,
    kernel: flow.Kernel,
    reduce: flow.Reduce,
    eta: float,
    max_batch: int | None,
) -> None:
    sigmas = torch.linspace(1, 0, plan.num_steps + 1).tolist()
    weight = normal(6, 6, seed=seed, dtype=dtype) / 3

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(x @ weight) + sigma[:, None] * x

    def noise(step: int, path: tree.NodePath) -> Tensor:
        return tree.keyed_noise((seed,), (6,))(step, path).to(dtype)

    run = tree.rollout(velocity, noise, sigmas, plan, kernel=kernel, eta=eta, reduce=reduce, max_batch=max_batch)
    assert len(run.leaves) == plan.leaves and run.leaves.dtype == dtype and torch.isfinite(run.leaves).all()
    close = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for branch in run.branches:
        mean = branch.mean.repeat(len(branch.x_child) // len(branch.x), 1).double()
        density = torch.distributions.Normal(mean, branch.std.double()).log_prob(branch.x_child.double())
        wanted = density.mean(1) if reduce == "mean" else density.sum(1)
        torch.testing.assert_close(branch.log_prob.double(), wanted, **close)
    replayed, _ = tree.replay(
        velocity, run, torch.ones_like(run.log_probs), max_batch=max_batch, backward=lambda total: None
    )
    torch.testing.assert_close(replayed, run.log_probs, **close)


# Objectives


@examples
@given(st.data(), DTYPES, st.integers(1, 30))
def test_zscore_and_group_advantage_of_any_rewards(data: st.DataObject, dtype: torch.dtype, leaves: int) -> None:
    rewards = data.draw(rewards_of(leaves, dtype))
    for found in (objectives.zscore(rewards), objectives.group_advantage(rewards)):
        assert found.dtype == dtype and torch.isfinite(found).all()
        assert found.square().mean() < 1.001 and found.abs().max() <= max(5.0, math.sqrt(leaves))
        # Equal rewards say nothing, whatever they are.
        assert (rewards != rewards[0]).any() or found.abs().max() < 1e-3
        order = rewards.argsort()
        assert (found[order].diff() >= 0).all()


@examples
@given(st.data(), DTYPES, BETAS, SEEDS)
def test_advantage_and_figures_of_any_rewards(data: st.DataObject, dtype: torch.dtype, beta: float, seed: int) -> None:
    plan = data.draw(plans())
    rewards = objectives.zscore(data.draw(rewards_of(plan.leaves, dtype)))
    transitions = transitions_of(plan, seed, dtype)
    path = objectives.path_sum(transitions.log_probs.detach(), transitions.leaf_edges)
    log_q = objectives.log_target(rewards, beta)
    assert log_q.exp().sum().item() == pytest.approx(1, abs=1e-5)
    advantage = objectives.softmax_tb_advantage(rewards, path, beta)
    assert torch.isfinite(advantage).all()
    assert (log_q.exp() * advantage).sum().item() >= -1e-4, "KL(q || p) is not negative"
    _, figures = objectives.softmax_tb_loss(transitions, rewards, beta)
    assert all(map(math.isfinite, figures.values()))
    assert 1 - 1e-4 <= figures["effective_leaves"] <= plan.leaves * (1 + 1e-4)


@examples
@given(st.data(), BASELINES, st.floats(-3, 3).map(lambda power: 10.0**power), SEEDS)
def test_loss_ignores_shifts_of_rewards_and_the_order_of_leaves(
    data: st.DataObject, baseline: objectives.Baseline, beta: float, seed: int
) -> None:
    plan = data.draw(branching_plans())
    transitions = transitions_of(plan, seed, torch.float64, moved=0.3)
    rewards = normal(plan.leaves, seed=seed + 1)
    found = slopes(transitions, rewards, beta, baseline)
    close = {"rtol": 1e-6, "atol": 1e-8 * (1 + beta)}
    torch.testing.assert_close(slopes(transitions, rewards + 7, beta, baseline), found, **close)
    order = torch.randperm(plan.leaves, generator=torch.Generator().manual_seed(seed))
    transitions.leaf_edges = transitions.leaf_edges[order]
    torch.testing.assert_close(slopes(transitions, rewards[order], beta, baseline), found, **close)


@examples
@given(st.data(), DTYPES, BETAS, SEEDS)
def test_baselines_take_out_the_mean(data: st.DataObject, dtype: torch.dtype, beta: float, seed: int) -> None:
    plan = data.draw(branching_plans())
    rewards = objectives.zscore(data.draw(rewards_of(plan.leaves, dtype)))
    transitions = transitions_of(plan, seed, dtype)
    tolerance = (1e-5 if dtype == torch.float32 else 1e-12) * (1 + beta) * plan.leaves
    # At a ratio of 1 a path has minus its advantage over K on every edge: over a level the slopes add up to the mean.
    for step, found in level_sums(plan, slopes(transitions, rewards, beta, "group")).items():
        assert abs(found.sum().item()) < tolerance, f"step {step}"
    of_siblings = torch.zeros(plan.train_evaluations, dtype=dtype)
    of_siblings.index_add_(0, transitions.edge_parent, slopes(transitions, rewards, beta, "siblings"))
    assert of_siblings.abs().max() < tolerance


def level_sums(plan: TreePlan, values: Tensor) -> dict[int, Tensor]:
    """Edge values by their stochastic step."""
    sizes = [plan.widths[step - 1] * children for step, children in plan.fanout.items()]
    return dict(zip(plan.fanout, values.split(sizes), strict=True))


@examples
@given(st.data(), BASELINES, BETAS, SEEDS, st.sampled_from([0.0, 0.3, -1e6, 1234567.0, 3e38]))
def test_equal_rewards_train_nothing(
    data: st.DataObject, baseline: objectives.Baseline, beta: float, seed: int, value: float
) -> None:
    """Where the policy prefers no path either. The GRPO family has no -log p, so it needs no such condition."""
    plan = data.draw(branching_plans())
    rewards = torch.full((plan.leaves,), value)
    transitions = transitions_of(plan, seed, torch.float32)
    transitions.log_probs = torch.zeros_like(transitions.old_log_probs).requires_grad_()
    transitions.old_log_probs = transitions.log_probs.detach()
    found = slopes(transitions, objectives.zscore(rewards), beta, baseline)
    assert found.abs().max() < 1e-6 * (1 + beta)
    assert objectives.group_advantage(rewards).abs().max() < 1e-3
    features = normal(plan.leaves, 5, seed=seed)
    assert objectives.diverse_advantage(rewards, features).abs().max() < 1e-5


@examples
@given(st.data(), BASELINES, BETAS, SEEDS, st.floats(0, 100), st.sampled_from(["softmax-tb", "subtree", "grpo"]))
def test_ratios_that_overflow_never_give_nan(
    data: st.DataObject, baseline: objectives.Baseline, beta: float, seed: int, moved: float, name: str
) -> None:
    """Ratios up to exp of several hundred: where the clip holds, the slope is 0; elsewhere it may be infinite, an error."""
    plan = data.draw(branching_plans())
    rewards = objectives.zscore(data.draw(rewards_of(plan.leaves, torch.float32)))
    transitions = transitions_of(plan, seed, torch.float32, moved)
    if name == "grpo":
        edges = len(transitions.log_probs)
        loss, figures = objectives.grpo_loss(
            transitions, objectives.edge_mean(rewards, transitions.leaf_edges, edges), 0.2
        )
    elif name == "subtree":
        baseline = "siblings" if baseline == "group" else baseline
        loss, figures = objectives.subtree_balance_loss(transitions, rewards, beta, 0.2, baseline)
    else:
        loss, figures = objectives.softmax_tb_loss(transitions, rewards, beta, 0.2, baseline)
    found = objectives.edge_coefficients(loss, transitions.log_probs)
    assert not found.isnan().any() and not loss.isnan()
    assert found.isfinite().all() or loss.isinf()
    assert all(map(math.isfinite, figures.values()))


@pytest.mark.parametrize("scale", [1e6, 1e15, 1e19, 1e30, 3e38])
def test_rewards_of_any_size_have_the_same_z_scores(scale: float) -> None:
    """Squares of float32 overflow at 1.8e19."""
    rewards = normal(27, seed=3, dtype=torch.float32)
    rewards /= rewards.abs().max()
    for function in (objectives.zscore, objectives.group_advantage):
        torch.testing.assert_close(function(scale * rewards), function(1e3 * rewards), rtol=1e-4, atol=1e-5)
    advantage = objectives.diverse_advantage(scale * rewards, normal(27, 5, seed=1))
    assert set(advantage.tolist()) <= {5.0, -5.0, 0.0}
    target = objectives.target_figures(objectives.zscore(scale * rewards), 2.0, torch.zeros(27))
    assert target["beta_reward_std"] == pytest.approx(2, rel=1e-4)


@pytest.mark.parametrize(("beta", "reward"), [(1e300, 1.0), (2.0, 3e38), (1.0, 3e38)])
def test_a_target_that_overflows_is_an_error(beta: float, reward: float) -> None:
    rewards = torch.tensor([reward, -reward, 0.0])
    transitions = transitions_of(TreePlan(3, 1, {2: 3}), 0, torch.float32)
    for loss in (objectives.softmax_tb_loss, objectives.subtree_balance_loss):
        with pytest.raises(ValueError, match=r"beta .* times rewards from .* to .* overflows: choose a smaller beta"):
            loss(transitions, rewards, beta)


@pytest.mark.parametrize("kernel", ["cps", "flow_sde", "dance"])
def test_a_bfloat16_network_starts_at_ratio_1(
    make_trainer: Callable[..., Trainer], shake: Callable[..., None], tiny_model, kernel: str
) -> None:
    """Latents, kernel and log-probabilities are float32 whatever the network computes in, and in any batches."""
    backbone = load_backbone(str(tiny_model), LoadOptions(torch.bfloat16, torch.device("cpu"), 0))
    trainer = make_trainer(backbone=backbone, kernel=kernel, max_batch=7, replay_batch=5)
    shake(trainer)
    for _ in range(2):
        assert trainer.update()["replay_ratio_error"] < 1e-3
