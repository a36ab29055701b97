"""Advantages and losses of TMPO's rivals against values computed by hand, and against plain Python on random trees."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tmpo_trainer import objectives
from tmpo_trainer.methods import grpo
from tmpo_trainer.tree import TreePlan

#: A tree of two levels with two children: edges 0 and 1, then 2 (below 0), 3 (below 1), 4 (below 0), 5 (below 1).
SMALL = TreePlan(4, 1, {1: 2, 2: 2})


def exactly(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, exactly(expected), rtol=1e-12, atol=1e-12)


def test_group_advantage_is_the_z_score_with_a_floor():
    # Mean 2, population std 1.
    close(grpo.group_advantage(exactly([1, 3, 1, 3])), [-1 / 1.0001, 1 / 1.0001] * 2)
    close(grpo.group_advantage(exactly([7, 7, 7])), [0, 0, 0])
    # One in 101 is 10 standard deviations above: clipped.
    rare = grpo.group_advantage(exactly([1] + [0] * 100))
    assert rare[0] == 5 and rare[1] == pytest.approx(-0.01 / (math.sqrt(0.0099 * 0.990099 / 0.99) + 1e-4), rel=2e-2)


def test_diverse_advantage_rewards_rare_winners_only():
    # Angles 0, 60 and 180 degrees: the nearest other is 1 - cos 60 = 1/2, 1/2 and 1 - cos 120 = 3/2 away; mean 5/6.
    features = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)], [-3.0, 0.0]], dtype=torch.float64)
    # Mean reward 1: above it are the second (by 1) and the third (by 0).
    close(grpo.diverse_advantage(exactly([0, 2, 1]), features), [-1, 0.5 / (5 / 6), 0])
    close(grpo.diverse_advantage(exactly([0, 1, 2]), features), [-1, 0, 1.5 / (5 / 6)])
    # No standard deviation: ten times the reward is ten times the advantage; pictures that are equal count as they are.
    close(grpo.diverse_advantage(exactly([0, 0, 0.3]), features[:1].repeat(3, 1)), [-0.1, -0.1, 0.2])
    assert grpo.diverse_advantage(exactly([0, 0, 90]), features)[2] == 5


def test_tree_advantage_weights_children_by_their_probability():
    index = SMALL.index()
    # Leaves 0..3 end on edges 2..5. Children of edge 0: 2 and 4, with odds 3 to 1; of edge 1: 3 and 5, even.
    log_probs = exactly([9, -9, math.log(3), 5, 0, 5])
    found = grpo.tree_advantage(exactly([1, 2, -1, 4]), log_probs, index.leaf_edges, index.edge_parent)
    close(found, [0.75 * 1 + 0.25 * -1, 0.5 * 2 + 0.5 * 4, 1, 2, -1, 4])


def test_subtree_balance_by_hand():
    index = SMALL.index()
    log_probs = exactly([0, math.log(3), 0, 0, 0, 0]).requires_grad_()
    zero = torch.zeros(6, dtype=torch.float64)
    # exp(beta R): 1, 2, 3, 6. Flows: edge 0 has (1 + 3) / 2 = 2, edge 1 has 4; the leaves' edges their own.
    rewards = exactly([1, 2, 3, 6]).log() / 2
    loss, figures = objectives.subtree_balance_loss(
        log_probs, log_probs.detach(), zero, index.leaf_edges, index.edge_parent, rewards, beta=2.0
    )
    # log of target over policy among siblings: (1/3) / (1/4), (2/3) / (3/4), and of the leaves over 1/2.
    advantage = [math.log(a) for a in (4 / 3, 8 / 9, 0.25 / 0.5, 0.25 / 0.5, 0.75 / 0.5, 0.75 / 0.5)]
    share = [1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 4]
    assert loss.item() == pytest.approx(-sum(s * a for s, a in zip(share, advantage, strict=True)))
    assert figures["advantage_mean"] == pytest.approx(sum(advantage) / 6)
    # At a ratio of 1 the slope of an edge is its share times its advantage.
    close(torch.autograd.grad(loss, log_probs)[0], [-s * a for s, a in zip(share, advantage, strict=True)])


def test_subtree_balance_is_at_rest_where_every_branch_is_balanced():
    index = SMALL.index()
    rewards = exactly([1, 2, 3, 6]).log()
    balanced = exactly([1 / 3, 2 / 3, 0.25, 0.25, 0.75, 0.75]).log().requires_grad_()
    loss, figures = objectives.subtree_balance_loss(
        balanced,
        balanced.detach(),
        torch.zeros(6, dtype=torch.float64),
        index.leaf_edges,
        index.edge_parent,
        rewards,
        1.0,
    )
    assert abs(loss.item()) < 1e-12 and abs(figures["advantage_mean"]) < 1e-12
    with pytest.raises(ValueError, match="none or siblings"):
        objectives.subtree_balance_loss(
            balanced, balanced, balanced, index.leaf_edges, index.edge_parent, rewards, 1.0, baseline="group"
        )


def test_subtree_balance_does_not_overflow():
    index = SMALL.index()
    log_probs = torch.zeros(6, requires_grad=True)
    rewards = torch.tensor([0.0, 500.0, 1000.0, 1000.0])
    loss, _ = objectives.subtree_balance_loss(
        log_probs,
        torch.zeros(6),
        torch.zeros(6),
        index.leaf_edges,
        index.edge_parent,
        rewards,
        2.0,
        baseline="siblings",
    )
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, log_probs)[0]).all()


def test_grpo_loss_by_hand():
    # Two chains of two steps: edges 0 and 1 at the first, 2 and 3 at the second.
    index = TreePlan(3, 2, {1: 1, 2: 1}).index()
    log_probs = torch.tensor(
        [math.log(1.5), 0.0, math.log(0.5), math.log(1.1)], dtype=torch.float64, requires_grad=True
    )
    advantage = grpo.edge_advantage(exactly([1, -2]), index.leaf_edges, 4)
    close(advantage, [1, -2, 1, -2])
    loss, figures = grpo.grpo_loss(log_probs, torch.zeros(4, dtype=torch.float64), advantage, index.leaf_edges, 0.2)
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
    index = plan.index()
    edges = len(index.edge_parent)
    log_probs, rewards = torch.randn(edges, dtype=torch.float64), torch.randn(plan.leaves, dtype=torch.float64)
    # Nodes by their paths, in the order of the layout: step, child, parent.
    levels = [[(root,) for root in range(plan.roots)]]
    for children in plan.fanout.values():
        levels.append([(*path, child) for child in range(children) for path in levels[-1]])
    number = {path: i for i, path in enumerate(itertools.chain(*levels[1:]))}
    reward = dict(zip(levels[-1], rewards.tolist(), strict=True))

    def children_of(path: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [other for other in number if other[:-1] == path]

    def value(path: tuple[int, ...]) -> float:
        below = children_of(path)
        if not below:
            return reward[path]
        weights = [math.exp(log_probs[number[c]].item()) for c in below]
        return sum(w * value(c) for w, c in zip(weights, below, strict=True)) / sum(weights)

    found = grpo.tree_advantage(rewards, log_probs, index.leaf_edges, index.edge_parent)
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
    loss, _ = objectives.subtree_balance_loss(
        current, log_probs, torch.zeros(edges, dtype=torch.float64), index.leaf_edges, index.edge_parent, rewards, 1.5
    )
    share = [sum(leaf[: len(path)] == path for leaf in reward) / plan.leaves for path in number]
    close(torch.autograd.grad(loss, current)[0], [-s * a for s, a in zip(share, advantage, strict=True)])
