"""Losses on scalars: identities, fixed points on enumerated bandits, values by hand, and twins in plain Python."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tmpo_trainer import objectives, tree
from tmpo_trainer.objectives import Transitions, softmax_tb_advantage, softmax_tb_loss
from tmpo_trainer.tree import TreePlan

SIGMAS = (1.0, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(q: Tensor, p: Tensor) -> Tensor:
    return (q * (q.log() - p.log())).sum()


def exactly(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, exactly(expected), rtol=1e-12, atol=1e-12)


def of(
    plan: TreePlan,
    log_probs: Tensor,
    old: Tensor | None = None,
    shift: Tensor | None = None,
    delta: Tensor | None = None,
) -> Transitions:
    """The transitions of a plan; by default the policy is still that of the rollout."""
    index = plan.index()
    old = log_probs.detach() if old is None else old
    shift = torch.zeros_like(old) if shift is None else shift
    return Transitions(log_probs, old, shift, index.leaf_edges, index.edge_parent, delta)


# Rewards


def test_zscore_uses_the_population_std_of_each_group():
    rewards = 3 + 2 * normal(4, 27)
    z = objectives.zscore(rewards)
    torch.testing.assert_close(
        z, (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True, correction=0)
    )
    torch.testing.assert_close(z.mean(1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.square().mean(1), torch.ones(4, dtype=torch.float64))
    assert objectives.zscore(torch.tensor([0.0, 2.0])).tolist() == [-1, 1]


def test_zscore_of_equal_rewards_is_zero_and_its_floor_is_small():
    assert objectives.zscore(torch.full((27,), 0.25)).tolist() == [0] * 27
    # Rounding noise stays noise; a spread above the floor is scaled to 1.
    assert objectives.zscore(0.5 + 1e-7 * normal(27)).abs().max() < 0.01
    assert objectives.zscore(0.5 + 1e-3 * normal(27)).std(correction=0).item() == pytest.approx(1)


# Advantage


@pytest.mark.parametrize("beta", [0.8, 2.0])
@pytest.mark.parametrize("anchored", [False, True])
def test_q_weighted_advantage_is_the_kl_divergence(beta, anchored):
    rewards, log_probs, delta = normal(3, 27)
    advantage = softmax_tb_advantage(rewards, log_probs, beta, delta if anchored else None, 0.3)
    q, p = (beta * rewards).softmax(0), (0.3 * delta if anchored else log_probs).softmax(0)
    torch.testing.assert_close((q * advantage).sum(), kl(q, p))
    torch.testing.assert_close((p * advantage).sum(), -kl(p, q))


def test_advantage_at_a_uniform_policy_is_the_centred_reward():
    rewards = normal(27)
    advantage = softmax_tb_advantage(rewards, torch.full((27,), -1.3, dtype=torch.float64), 2.0)
    log_mean_exp = (2.0 * rewards).exp().mean().log()
    torch.testing.assert_close(advantage, 2.0 * rewards - log_mean_exp)


def test_advantage_ignores_shifts_and_carries_no_gradient():
    rewards, log_probs, delta = normal(3, 27)
    log_probs.requires_grad_()
    advantage = softmax_tb_advantage(rewards, log_probs, 2.0)
    assert not advantage.requires_grad
    torch.testing.assert_close(softmax_tb_advantage(rewards + 7, log_probs, 2.0), advantage)
    torch.testing.assert_close(softmax_tb_advantage(rewards, log_probs - 1e3, 2.0), advantage)
    anchored = softmax_tb_advantage(rewards, log_probs, 2.0, delta)
    torch.testing.assert_close(softmax_tb_advantage(rewards, log_probs * 0, 2.0, delta + 5), anchored)
    assert not torch.allclose(anchored, advantage)


# Enumerated bandits: every arm is in the group once, and the policy is a softmax over the arms of each root


def train_bandit(
    rewards: Tensor,
    beta: float,
    baseline: objectives.Baseline,
    reference: Tensor | None = None,
    weight: float = 1.0,
    start: Tensor | None = None,
    updates: int = 1500,
) -> Tensor:
    """Policy `[roots, arms]` after gradient descent, by default from a random start; rewards and reference likewise."""
    roots, arms = rewards.shape
    theta = (normal(roots, arms, seed=9) / 2 if start is None else start.log()).requires_grad_()
    # Tiling: arm a of root r is row a * roots + r.
    leaf_edges, edge_parent = torch.arange(roots * arms)[:, None], torch.arange(roots * arms) % roots
    optimizer = torch.optim.SGD([theta], lr=roots * arms / 2)
    for _ in range(updates):
        log_probs = theta.log_softmax(1).T.flatten()
        old = log_probs.detach()
        delta = None if reference is None else old - reference.log().T.flatten()
        transitions = Transitions(log_probs, old, torch.zeros_like(old), leaf_edges, edge_parent, delta)
        anchor = None if delta is None else weight
        loss, _ = softmax_tb_loss(transitions, rewards.T.flatten(), beta, baseline=baseline, anchor_weight=anchor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return theta.detach().softmax(1)


@pytest.mark.parametrize("baseline", ["none", "group", "siblings"])
def test_bandit_converges_to_the_boltzmann_distribution(baseline):
    rewards = normal(1, 6)
    policy = train_bandit(rewards, 1.5, baseline)
    torch.testing.assert_close(policy, (1.5 * rewards).softmax(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("baseline", ["none", "group", "siblings"])
@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_anchored_bandit_converges_to_the_tilted_reference(baseline, weight):
    rewards, reference = normal(1, 6), normal(1, 6, seed=4).softmax(1)
    policy = train_bandit(rewards, 1.5, baseline, reference, weight)
    tilted = (reference.log() + 1.5 / weight * rewards).softmax(1)
    torch.testing.assert_close(policy, tilted, rtol=0, atol=1e-6)
    assert (tilted - (1.5 * rewards).softmax(1)).abs().max() > 0.05


def test_anchored_bandits_of_several_roots_need_the_siblings_baseline():
    # Roots that differ in reward: no transition can move mass between them.
    rewards = normal(3, 5) + torch.tensor([[-1.0], [0.0], [2.0]])
    reference = normal(3, 5, seed=4).softmax(1)
    tilted = (reference.log() + 1.5 / 2.5 * rewards).softmax(1)
    policy = train_bandit(rewards, 1.5, "siblings", reference, 2.5)
    torch.testing.assert_close(policy, tilted, rtol=0, atol=1e-6)
    # Without it the tilted reference is not even a place to stay: the difference between roots pulls away from it.
    for baseline in ("none", "group"):
        policy = train_bandit(rewards, 1.5, baseline, reference, 2.5, start=tilted, updates=3)
        assert (policy - tilted).abs().max() > 0.02


# Gaussian kernels: what antithetic noise makes exact


class Affine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(normal(4, 4) / 2)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) * (1 + sigma[:, None])


def antithetic(step: int, path: tree.Path) -> Tensor:
    """Children 2i and 2i + 1 are +-eps, the same for every parent."""
    if step == 0:
        return normal(4, seed=path[0])
    return (1 - 2 * (path[-1] % 2)) * normal(4, seed=1000 * step + path[-1] // 2)


def independent(step: int, path: tree.Path) -> Tensor:
    return normal(4, seed=1000 * step + path[-1])


def log_p_gradient(noise: tree.Noise, plan: TreePlan) -> Tensor:
    """Gradient of the loss without rewards: what the -log p in the advantage does at the first update."""
    model = Affine()
    run = tree.rollout(model, noise, SIGMAS, plan, reduce="sum")
    log_probs = run.log_probs.requires_grad_()
    loss, _ = softmax_tb_loss(of(plan, log_probs), torch.zeros(plan.leaves, dtype=torch.float64), 2.0)
    tree.replay(model, run, objectives.edge_coefficients(loss, log_probs))
    assert model.weight.grad is not None
    return model.weight.grad


@pytest.mark.parametrize("plan", [TreePlan(6, 1, {2: 4}), TreePlan.tmpo(6, (1, 2, 4), 4)])
def test_antithetic_noise_cancels_the_log_p_part(plan):
    assert log_p_gradient(antithetic, plan).abs().max() < 1e-12
    assert log_p_gradient(independent, plan).abs().max() > 1e-2


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_ratio_norm_centres_the_log_ratio(reduce):
    model = Affine()
    run = tree.rollout(model, antithetic, SIGMAS, TreePlan(6, 2, {2: 6}), reduce=reduce)
    with torch.no_grad():
        model.weight += 0.2 * normal(4, 4, seed=8)
    means = tree.parent_means(model, run)
    raw = tree.edge_log_probs(run, means) - run.log_probs
    shift = tree.edge_mean_shift(run, means)
    # Row c * 2 + root, with children 2i and 2i + 1 antithetic.
    plus, minus = (raw + shift).view(3, 2, 2).unbind(1)
    torch.testing.assert_close(plus, -minus, rtol=0, atol=1e-12)
    assert plus.abs().min() > 1e-3
    torch.testing.assert_close(raw.view(6, 2).mean(0), -shift.view(6, 2).mean(0), rtol=0, atol=1e-12)
    assert shift.min() > 1e-4


# Clipping and ratios


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.1, 2.0, 2.2, 2.2),
        (1.5, 2.0, 2.4, 0.0),
        (1.5, -2.0, -3.0, -3.0),
        (0.5, 2.0, 1.0, 1.0),
        (0.5, -2.0, -1.6, 0.0),
    ],
)
def test_clipping_stops_only_gains_outside_the_interval(ratio, advantage, value, slope):
    log_ratio = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    result = objectives.clipped_surrogate(log_ratio, torch.tensor(advantage, dtype=torch.float64), 0.2)
    result.backward()
    assert result.item() == pytest.approx(value)
    assert log_ratio.grad is not None and log_ratio.grad.item() == pytest.approx(slope)


def test_path_ratio_is_the_product_of_all_its_transitions():
    log_probs = torch.tensor([0.05, 0.04, 0.03, -0.3], requires_grad=True)
    zero = torch.zeros(4)
    leaf_edges, rewards = torch.tensor([[0, 1], [2, 3]]), torch.tensor([1.0, 0.0])
    chains = Transitions(log_probs, zero, zero, leaf_edges, torch.arange(4))
    _, figures = softmax_tb_loss(chains, rewards, 1.0)
    assert figures["ratio_max"] == pytest.approx(math.exp(0.09))
    assert figures["ratio_mean"] == pytest.approx((math.exp(0.09) + math.exp(-0.27)) / 2)
    assert figures["clip_fraction"] == 0.5
    tree_of_two = Transitions(log_probs, zero, zero, leaf_edges, torch.tensor([0, 1, 0, 1]))
    _, figures = softmax_tb_loss(tree_of_two, rewards, 1.0, baseline="siblings")
    assert figures["ratio_max"] == pytest.approx(math.exp(0.05)) and figures["clip_fraction"] == 0.25


# The whole loss


def nodes(plan: TreePlan) -> list[list[tuple[int, ...]]]:
    """The nodes of every stochastic step by their paths, in the order of the layout: children, parents."""
    levels: list[list[tuple[int, ...]]] = [[(root,) for root in range(plan.roots)]]
    for children in plan.fanout.values():
        levels.append([(*path, child) for child in range(children) for path in levels[-1]])
    return levels[1:]


def trees() -> list[tuple[int, int, int]]:
    return [(1, 3, 1), (3, 3, 2), (1, 2, 3), (2, 2, 3), (1, 4, 2), (5, 2, 1), (1, 3, 3)]


@pytest.mark.parametrize(("roots", "branching", "levels"), trees())
@pytest.mark.parametrize("baseline", ["none", "group", "siblings"])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("spread", [0.0, 0.25])
def test_loss_and_coefficients_equal_plain_loops(
    written_out_loss, roots, branching, levels, baseline, anchored, spread
):
    plan = TreePlan(levels + 2, roots, {step + 2: branching for step in range(levels)})
    paths = nodes(plan)
    old, move, delta = normal(3, sum(map(len, paths)))
    current, shift, rewards = (
        old + spread * move,
        spread * normal(len(old), seed=6) ** 2 / 8,
        normal(plan.leaves, seed=7),
    )
    anchor = 0.3 if anchored else None
    plain = current.clone().requires_grad_()
    by_node = [
        dict(zip(itertools.chain(*paths), values, strict=True)) for values in (plain, plain - old + shift, delta)
    ]
    expected = written_out_loss(paths, *by_node, rewards, 1.7, 0.2, baseline, anchor)
    log_probs = current.clone().requires_grad_()
    transitions = of(plan, log_probs, old, shift, delta if anchored else None)
    found, _ = softmax_tb_loss(transitions, rewards, 1.7, 0.2, baseline, anchor)
    assert found.item() == pytest.approx(expected.item(), rel=1e-11, abs=1e-12)
    coefficients = objectives.edge_coefficients(found, log_probs)
    torch.testing.assert_close(coefficients, torch.autograd.grad(expected, plain)[0], rtol=1e-10, atol=1e-12)
    assert log_probs.grad is None


def test_group_baseline_subtracts_the_mean_advantage():
    log_probs, rewards = normal(2, 5)
    log_probs.requires_grad_()
    loss, figures = softmax_tb_loss(of(TreePlan(2, 1, {1: 5}), log_probs), rewards, 2.0, baseline="group")
    coefficients = objectives.edge_coefficients(loss, log_probs)
    assert coefficients.sum().abs() < 1e-14
    advantage = softmax_tb_advantage(rewards, log_probs, 2.0)
    torch.testing.assert_close(coefficients, -(advantage - advantage.mean()) / 5)
    assert figures["advantage_mean"] == pytest.approx(advantage.mean().item())


def test_siblings_baseline_ignores_what_no_transition_can_influence():
    plan = TreePlan.tmpo(6, (1, 2, 3), 3)
    rewards, log_probs = normal(27), normal(36, seed=2).requires_grad_()

    def coefficients(r: Tensor) -> Tensor:
        loss, _ = softmax_tb_loss(of(plan, log_probs), r, 2.0, baseline="siblings")
        return objectives.edge_coefficients(loss, log_probs)

    # A reward of the seed alone (row % 3 is the root) changes nothing.
    seeds = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64).repeat(9)
    torch.testing.assert_close(coefficients(rewards + seeds), coefficients(rewards))
    # A reward of the first-level node (row % 9) changes only first-level edges.
    changed = coefficients(rewards + normal(9, seed=5).repeat(3)) - coefficients(rewards)
    assert changed[:9].abs().min() > 1e-3 and changed[9:].abs().max() < 1e-14
    assert coefficients(rewards).view(4, 3, 3).sum(1)[0].abs().max() < 1e-14


def test_edge_means_and_sibling_means_equal_loops():
    plan = TreePlan(6, 2, {2: 2, 3: 1, 5: 3})
    index, values = plan.index(), normal(12)
    edges = len(index.edge_parent)
    means = objectives.edge_mean(values, index.leaf_edges, edges)
    for edge in range(edges):
        below = [values[leaf].item() for leaf, row in enumerate(index.leaf_edges.tolist()) if edge in row]
        assert means[edge].item() == pytest.approx(sum(below) / len(below))
    centred = objectives.subtract_sibling_mean(means, index.edge_parent)
    for edge in range(edges):
        siblings = [means[e].item() for e in range(edges) if index.edge_parent[e] == index.edge_parent[edge]]
        assert centred[edge].item() == pytest.approx(means[edge].item() - sum(siblings) / len(siblings))
    sums = objectives.path_sum(means, index.leaf_edges)
    assert sums[7].item() == pytest.approx(sum(means[e].item() for e in index.leaf_edges[7].tolist()))


def test_figures_describe_the_group():
    plan = TreePlan.tmpo(6, (1, 2, 3), 3)
    index, rewards = plan.index(), normal(27)
    log_probs = normal(36, seed=2) / 10
    _, figures = softmax_tb_loss(of(plan, log_probs), rewards, 2.0)
    path = log_probs[index.leaf_edges].sum(1)
    q, p = (2 * rewards).softmax(0), path.softmax(0)
    expected = {
        "log_prob_std": path.std(correction=0),
        "beta_reward_std": 2 * rewards.std(correction=0),
        "advantage_mean": (q.log() - p.log()).mean(),
        "effective_leaves": (-(q * q.log()).sum()).exp(),
        "kl_q_p": kl(q, p),
        "ratio_mean": 1.0,
        "ratio_max": 1.0,
        "clip_fraction": 0.0,
    }
    assert figures == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-6)
    _, equal = softmax_tb_loss(of(plan, log_probs), torch.zeros(27), 2.0)
    assert equal["effective_leaves"] == pytest.approx(27)


def test_effective_number_by_hand():
    """q = (1/2, 1/4, 1/4) has an entropy of 1.5 bits."""
    log_q = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    assert objectives.effective_number(log_q) == pytest.approx(2**1.5)
    assert objectives.effective_number(torch.full((8,), 1 / 8).log()) == pytest.approx(8)
    assert objectives.effective_number(torch.tensor([0.0, -500.0, -900.0]).log_softmax(0)) == pytest.approx(1)
    assert objectives.effective_number(torch.tensor([0.5, 0.5, 0.0]).log()) == pytest.approx(2)


def test_only_the_current_log_probs_carry_gradient():
    plan = TreePlan.tmpo(6, (1, 2, 3), 3)
    log_probs = normal(36, seed=2).requires_grad_()
    shift = torch.full((36,), 0.1, dtype=torch.float64, requires_grad=True)
    loss, _ = softmax_tb_loss(of(plan, log_probs, shift=shift), normal(27), 2.0)
    loss.backward()
    assert log_probs.grad is not None and shift.grad is None


def test_a_loss_that_cannot_be_says_why():
    chains = of(TreePlan(2, 2, {1: 1}), torch.zeros(2))
    with pytest.raises(ValueError, match=r"unknown baseline 'mean'.*none, group, siblings"):
        softmax_tb_loss(chains, torch.zeros(2), 1.0, baseline="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="an anchor needs the log ratio to the reference"):
        softmax_tb_loss(chains, torch.zeros(2), 1.0, anchor_weight=0.5)


# The GRPO family and step-wise balance


#: A tree of two levels with two children: edges 0 and 1, then 2 (below 0), 3 (below 1), 4 (below 0), 5 (below 1).
SMALL = TreePlan(4, 1, {1: 2, 2: 2})


def test_group_advantage_is_the_z_score_with_a_floor():
    # Mean 2, population std 1.
    close(objectives.group_advantage(exactly([1, 3, 1, 3])), [-1 / 1.0001, 1 / 1.0001] * 2)
    close(objectives.group_advantage(exactly([7, 7, 7])), [0, 0, 0])
    # One in 101 is 10 standard deviations above: clipped.
    rare = objectives.group_advantage(exactly([1] + [0] * 100))
    assert rare[0] == 5 and rare[1] == pytest.approx(-0.01 / (math.sqrt(0.0099 * 0.990099 / 0.99) + 1e-4), rel=2e-2)


def test_diverse_advantage_rewards_rare_winners_only():
    # Angles 0, 60 and 180 degrees: the nearest other is 1 - cos 60 = 1/2, 1/2 and 1 - cos 120 = 3/2 away; mean 5/6.
    features = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)], [-3.0, 0.0]], dtype=torch.float64)
    # Mean reward 1: above it are the second (by 1) and the third (by 0).
    close(objectives.diverse_advantage(exactly([0, 2, 1]), features), [-1, 0.5 / (5 / 6), 0])
    close(objectives.diverse_advantage(exactly([0, 1, 2]), features), [-1, 0, 1.5 / (5 / 6)])
    # No standard deviation: ten times the reward is ten times the advantage; pictures that are equal count as they are.
    close(objectives.diverse_advantage(exactly([0, 0, 0.3]), features[:1].repeat(3, 1)), [-0.1, -0.1, 0.2])
    assert objectives.diverse_advantage(exactly([0, 0, 90]), features)[2] == 5
    with pytest.raises(ValueError, match="features of the pictures are not finite"):
        objectives.diverse_advantage(exactly([0, 0, 1]), features * math.nan)


def test_tree_advantage_weights_children_by_their_probability():
    # Leaves 0..3 end on edges 2..5. Children of edge 0: 2 and 4, with odds 3 to 1; of edge 1: 3 and 5, even.
    log_probs = exactly([9, -9, math.log(3), 5, 0, 5])
    found = objectives.tree_advantage(exactly([1, 2, -1, 4]), of(SMALL, log_probs))
    close(found, [0.75 * 1 + 0.25 * -1, 0.5 * 2 + 0.5 * 4, 1, 2, -1, 4])


def test_subtree_balance_by_hand():
    log_probs = exactly([0, math.log(3), 0, 0, 0, 0]).requires_grad_()
    # exp(beta R): 1, 2, 3, 6. Flows: edge 0 has (1 + 3) / 2 = 2, edge 1 has 4; the leaves' edges their own.
    rewards = exactly([1, 2, 3, 6]).log() / 2
    loss, figures = objectives.subtree_balance_loss(of(SMALL, log_probs), rewards, beta=2.0)
    # log of target over policy among siblings: (1/3) / (1/4), (2/3) / (3/4), and of the leaves over 1/2.
    advantage = [math.log(a) for a in (4 / 3, 8 / 9, 0.25 / 0.5, 0.25 / 0.5, 0.75 / 0.5, 0.75 / 0.5)]
    share = [1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 4]
    assert loss.item() == pytest.approx(-sum(s * a for s, a in zip(share, advantage, strict=True)))
    assert figures["advantage_mean"] == pytest.approx(sum(advantage) / 6)
    # At a ratio of 1 the slope of an edge is its share times its advantage.
    close(torch.autograd.grad(loss, log_probs)[0], [-s * a for s, a in zip(share, advantage, strict=True)])


def test_subtree_balance_is_at_rest_where_every_branch_is_balanced():
    rewards = exactly([1, 2, 3, 6]).log()
    balanced = exactly([1 / 3, 2 / 3, 0.25, 0.25, 0.75, 0.75]).log().requires_grad_()
    loss, figures = objectives.subtree_balance_loss(of(SMALL, balanced), rewards, 1.0)
    assert abs(loss.item()) < 1e-12 and abs(figures["advantage_mean"]) < 1e-12
    with pytest.raises(ValueError, match="none or siblings"):
        objectives.subtree_balance_loss(of(SMALL, balanced), rewards, 1.0, baseline="group")


def test_subtree_balance_does_not_overflow():
    log_probs = torch.zeros(6, requires_grad=True)
    rewards = torch.tensor([0.0, 500.0, 1000.0, 1000.0])
    loss, _ = objectives.subtree_balance_loss(of(SMALL, log_probs), rewards, 2.0, baseline="siblings")
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, log_probs)[0]).all()


def test_grpo_loss_by_hand():
    # Two chains of two steps: edges 0 and 1 at the first, 2 and 3 at the second.
    plan = TreePlan(3, 2, {1: 1, 2: 1})
    log_probs = torch.tensor(
        [math.log(1.5), 0.0, math.log(0.5), math.log(1.1)], dtype=torch.float64, requires_grad=True
    )
    advantage = objectives.edge_mean(exactly([1, -2]), plan.index().leaf_edges, 4)
    close(advantage, [1, -2, 1, -2])
    # RatioNorm's shift is not theirs.
    zero = torch.zeros(4, dtype=torch.float64)
    loss, figures = objectives.grpo_loss(of(plan, log_probs, zero, zero + 9), advantage, 0.2)
    # min(rho A, clip(rho) A): 1.2 (clipped), -2, 0.5, -2.2.
    assert loss.item() == pytest.approx(-(1.2 - 2 + 0.5 - 2.2) / 4)
    close(torch.autograd.grad(loss, log_probs)[0], [0, 2 / 4, -0.5 / 4, 2.2 / 4])
    assert figures["clip_fraction"] == 0.5 and figures["ratio_max"] == pytest.approx(1.5)
    assert figures["advantage_mean"] == -0.5 and figures["advantage_std"] == 1.5


@pytest.mark.parametrize(
    "plan", [TreePlan(6, 1, {2: 3, 3: 3, 4: 3}), TreePlan(6, 2, {1: 2, 4: 3}), TreePlan(6, 5, {1: 1, 2: 1})]
)
def test_advantages_of_random_trees_against_plain_python(plan: TreePlan):
    torch.manual_seed(0)
    edges = len(plan.index().edge_parent)
    log_probs, rewards = torch.randn(edges, dtype=torch.float64), torch.randn(plan.leaves, dtype=torch.float64)
    levels = nodes(plan)
    number = {path: i for i, path in enumerate(itertools.chain(*levels))}
    reward = dict(zip(levels[-1], rewards.tolist(), strict=True))

    def children_of(path: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [other for other in number if other[:-1] == path]

    def value(path: tuple[int, ...]) -> float:
        below = children_of(path)
        if not below:
            return reward[path]
        weights = [math.exp(log_probs[number[c]].item()) for c in below]
        return sum(w * value(c) for w, c in zip(weights, below, strict=True)) / sum(weights)

    found = objectives.tree_advantage(rewards, of(plan, log_probs))
    close(found, [value(path) for path in number])

    def flow(path: tuple[int, ...]) -> float:
        ends = [math.exp(1.5 * r) for leaf, r in reward.items() if leaf[: len(path)] == path]
        return sum(ends) / len(ends)

    advantage = []
    for path in number:
        siblings = children_of(path[:-1])
        policy = math.exp(log_probs[number[path]].item()) / sum(math.exp(log_probs[number[s]].item()) for s in siblings)
        advantage.append(math.log(flow(path) / sum(map(flow, siblings)) / policy))
    current = log_probs.clone().requires_grad_()
    loss, _ = objectives.subtree_balance_loss(of(plan, current), rewards, 1.5)
    share = [sum(leaf[: len(path)] == path for leaf in reward) / plan.leaves for path in number]
    close(torch.autograd.grad(loss, current)[0], [-s * a for s, a in zip(share, advantage, strict=True)])
