"""Branch schedules, tree layout, rollouts and replays, against brute force that shares no code with them."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tmpo_trainer import flow, objectives, tree
from tmpo_trainer.tree import BranchSchedule, TreePlan

SIGMAS = (1.0, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0.0)
SD35_SIGMAS = (1.0, 0.923, 0.819, 0.668, 0.432, 0.0089, 0.0)
SHAPE = (2, 3)
ETA = 0.7

PLANS = {
    "tmpo-early": TreePlan.tmpo(6, (1, 2, 3), 3),
    "tmpo-late": TreePlan.tmpo(6, (1, 3, 5), 3),
    "tmpo-without-step-1": TreePlan.tmpo(6, (2, 4, 5), 2),
    "tmpo-two-levels": TreePlan.tmpo(6, (1, 4), 4),
    "chains": TreePlan(6, 27, dict.fromkeys(range(1, 6), 1)),
    "mix-grpo": TreePlan(6, 27, dict.fromkeys(range(2, 6), 1)),
    "tree-grpo": TreePlan(6, 1, {1: 3, 2: 3, 3: 3}),
    "no-tree": TreePlan(6, 27, {2: 1, 3: 1}),
    "uneven": TreePlan(6, 2, {1: 2, 3: 1, 4: 3}),
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


class Mlp(nn.Module):
    """A velocity of `x [N, 2, 3]` and `sigma [N]`, different for every latent."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(7, 16, generator=generator, dtype=torch.float64).to(dtype) / 2)
        self.second = nn.Parameter(torch.randn(16, 6, generator=generator, dtype=torch.float64).to(dtype) / 4)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        hidden = torch.tanh(torch.cat([x.flatten(1), sigma[:, None]], 1) @ self.first)
        return (hidden @ self.second).view_as(x)

    def moved(self, seed: int, scale: float) -> Mlp:
        """A copy with other weights."""
        other = copy.deepcopy(self)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in other.parameters():
                weight += scale * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        return other


@dataclass
class Counting:
    """A velocity that counts the rows that pass through it."""

    inner: tree.Velocity
    batches: list[int] = field(default_factory=list)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        assert len(sigma) == len(x)
        self.batches.append(len(x))
        return self.inner(x, sigma)


@dataclass
class Recorded:
    """Noise that remembers which paths it was asked for at each step, in row order."""

    inner: tree.Noise
    paths: dict[int, list[tree.NodePath]] = field(default_factory=dict)

    def __call__(self, step: int, path: tree.NodePath) -> Tensor:
        self.paths.setdefault(step, []).append(path)
        return self.inner(step, path)


def noise64(*key: int | str) -> tree.Noise:
    noise = tree.keyed_noise(key, SHAPE)
    return lambda step, path: noise(step, path).double()


def sample(plan: TreePlan, velocity: tree.Velocity | None = None, **options) -> tree.Rollout:
    return tree.rollout(velocity or Mlp(), noise64(1), SIGMAS, plan, eta=ETA, **options)


def gradient(model: nn.Module) -> Tensor:
    flat = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    model.zero_grad()
    return flat


def relative(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


# Schedule


@pytest.mark.parametrize(
    ("num_steps", "early", "late", "last"),
    [
        (6, (1, 2, 3), (1, 3, 5), None),
        (6, (1, 2, 3), (1, 3, 4), 4),
        (6, (1, 2, 3, 4, 5), (1, 2, 3, 4, 5), None),
        (10, (2, 5), (4, 8), 8),
        (28, (1, 4, 9), (3, 12, 26), None),
    ],
)
def test_schedule_never_drops_or_repeats_a_branch(num_steps, early, late, last):
    schedule = BranchSchedule(num_steps, early, late, 6.0, 8000, seed=1, last=last)
    seen = set()
    for update in range(10_000):
        steps = schedule.steps(update)
        seen.add(steps)
        assert len(steps) == len(early)
        assert all(a < b for a, b in itertools.pairwise(steps))
        assert steps[0] >= 1 and steps[-1] <= (num_steps - 1 if last is None else last)
    # All five of five leave no choice; step 1 and two of 2..4 leave three.
    assert len(seen) == 1 if len(early) == 5 else len(seen) >= 3


@pytest.mark.parametrize(
    ("update", "expected"), [(0, (1, 2, 3)), (50, (1, 2.5, 4)), (100, (1, 3, 5)), (900, (1, 3, 5))]
)
def test_raw_draws_have_the_curriculums_mean_and_spread(update, expected):
    kappa, draws = 6.0, 10_000
    raw = torch.tensor(
        [BranchSchedule(7, (1, 2, 3), (1, 3, 5), kappa, 100, seed).raw(update) for seed in range(draws)],
        dtype=torch.float64,
    )
    mean = (torch.tensor(expected, dtype=torch.float64) - 1) / 5
    variance = mean * (1 - mean) / (kappa + 1)
    assert ((raw.mean(0) - mean).abs() <= 4 * (variance / draws).sqrt()).all()
    assert ((raw.var(0) - variance).abs() <= 0.06 * variance).all()
    # Independent draws, not one draw stretched.
    assert raw[:, 1:].T.corrcoef()[0, 1].abs() < 4 / math.sqrt(draws)


def test_schedule_rounds_to_the_nearest_step():
    # kappa so large that the draw is its mean: 1 + 4 * .4 = 2.6 and 1 + 4 * .85 = 4.4.
    schedule = BranchSchedule(6, (2, 4), (3, 5), 1e9, 10, seed=0)
    assert schedule.steps(0) == (2, 4)
    assert schedule.steps(4) == (2, 4)
    assert schedule.steps(6) == (3, 5)
    assert schedule.steps(10) == schedule.steps(11) == (3, 5)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ((0.0, 0.0, 0.0), (1, 2, 3)),
        ((1.0, 1.0, 1.0), (3, 4, 5)),
        ((0.9, 0.0, 0.9), (1, 5, 4)),
        ((0.5, 0.5, 1), (3, 4, 5)),
    ],
)
def test_collisions_are_pushed_forward_then_back(monkeypatch, raw, expected):
    schedule = BranchSchedule(6, (1, 2, 3), (1, 3, 5), 6.0, 100, seed=0)
    monkeypatch.setattr(BranchSchedule, "raw", lambda self, update: raw)
    assert schedule.steps(0) == tuple(sorted(expected))


def test_draws_are_a_function_of_seed_and_update():
    def draws(seed: int) -> list[tuple[float, ...]]:
        return [BranchSchedule(6, (1, 2, 3), (1, 3, 5), 6.0, 100, seed).raw(update) for update in range(200)]

    first = draws(1)
    schedule = BranchSchedule(6, (1, 2, 3), (1, 3, 5), 6.0, 100, 1)
    assert [schedule.raw(update) for update in reversed(range(200))] == first[::-1]
    assert len(set(first)) == 200
    assert not set(first) & set(draws(2))


def test_means_at_the_ends_are_exact():
    schedule = BranchSchedule(6, (1, 2, 3), (1, 3, 5), 6.0, 100, seed=0)
    assert all(schedule.raw(update)[0] == 0 and schedule.steps(update)[0] == 1 for update in range(2000))
    assert all(schedule.raw(update)[2] == 1 for update in range(100, 200))
    at_the_end = BranchSchedule(6, (4,), (4,), 6.0, 100, seed=0, last=4)
    assert {at_the_end.steps(update) for update in range(200)} == {(4,)}
    only_one = BranchSchedule(2, (1,), (1,), 6.0, 100, seed=0)
    assert only_one.steps(3) == (1,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"early": (1, 3, 2)}, "early.*strictly increasing"),
        ({"late": (1, 3, 3)}, "late.*strictly increasing"),
        ({"early": ()}, "early.*not empty"),
        ({"early": (0, 2, 3)}, r"early.*1\.\.5"),
        ({"late": (1, 3, 6)}, r"late.*1\.\.5"),
        ({"late": (1, 3, 5), "last": 4}, r"late.*1\.\.4"),
        ({"early": (1, 2, 3, 4, 5, 6), "late": (1, 2, 3, 4, 5, 6)}, r"1\.\.5"),
        ({"early": (1, 2)}, "differ in number"),
        ({"kappa": 0.0}, "kappa"),
        ({"total_updates": 0}, "total_updates"),
    ],
)
def test_impossible_schedules_are_refused(change, message):
    settings = {"num_steps": 6, "early": (1, 2, 3), "late": (1, 3, 5), "kappa": 6.0, "total_updates": 10, "seed": 0}
    with pytest.raises(ValueError, match=message):
        BranchSchedule(**(settings | change))


# Plan


@pytest.mark.parametrize(
    ("plan", "widths", "leaves", "rollout", "train"),
    [
        (PLANS["tmpo-early"], (3, 3, 9, 27, 27, 27), 27, 96, 12),
        (PLANS["tmpo-late"], (3, 3, 3, 9, 9, 27), 27, 54, 12),
        (PLANS["tmpo-without-step-1"], (1, 1, 2, 2, 4, 8), 8, 18, 7),
        (PLANS["chains"], (27,) * 6, 27, 162, 135),
        (PLANS["mix-grpo"], (27,) * 6, 27, 162, 108),
        (PLANS["no-tree"], (27,) * 6, 27, 162, 54),
        (PLANS["tree-grpo"], (1, 3, 9, 27, 27, 27), 27, 94, 13),
        (TreePlan(6, 1, {2: 3, 3: 3, 4: 3}), (1, 1, 3, 9, 27, 27), 27, 68, 13),
        (TreePlan(6, 1, {3: 3, 4: 3, 5: 3}), (1, 1, 1, 3, 9, 27), 27, 42, 13),
        (PLANS["uneven"], (2, 4, 4, 4, 12, 12), 12, 38, 10),
        (TreePlan(4, 5, {}), (5, 5, 5, 5), 5, 20, 0),
    ],
)
def test_counts_are_the_rows_that_pass_through_the_network(plan, widths, leaves, rollout, train):
    assert (plan.widths, plan.leaves) == (widths, leaves)
    assert (plan.rollout_evaluations, plan.train_evaluations) == (rollout, train)
    sigmas = SIGMAS if plan.num_steps == 6 else (1.0, 0.9, 0.7, 0.4, 0.0)
    for max_batch in (None, 5):
        counting = Counting(Mlp())
        run = tree.rollout(counting, noise64(1), sigmas, plan, max_batch=max_batch)
        assert sum(counting.batches) == rollout and len(run.leaves) == leaves
        assert max_batch is not None or tuple(counting.batches) == widths
        counting = Counting(Mlp())
        tree.replay(counting, run, torch.ones_like(run.log_probs), max_batch=max_batch)
        assert sum(counting.batches) == train
        assert max_batch is None or max(counting.batches, default=0) <= max_batch
        if run.branches:
            counting = Counting(Mlp())
            tree.parent_means(counting, run, max_batch)
            assert sum(counting.batches) == train


def test_published_positions_cost_what_docs_maths_md_says():
    """Counted from 0: the first branch is independent roots, and 2, 3 and 5 are steps 3, 4 and 6."""
    published = [TreePlan(6, 3, {3: 3, 4: 3}), TreePlan(6, 3, {4: 3, 6: 3})]
    assert [plan.rollout_evaluations for plan in published] == [72, 30]
    assert [PLANS[name].rollout_evaluations for name in ("tmpo-early", "tmpo-late")] == [96, 54]


def test_a_branch_at_step_one_is_independent_roots():
    assert TreePlan.tmpo(6, (1, 2, 3), 3) == TreePlan(6, 3, {2: 3, 3: 3})
    assert TreePlan.tmpo(6, (2, 3), 3) == TreePlan(6, 1, {3: 3, 2: 3})
    assert TreePlan.tmpo(6, (1, 2, 3), 3).forest(4) == TreePlan(6, 12, {2: 3, 3: 3}, trees=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TreePlan(6, 0, {}), "one root"),
        (lambda: TreePlan(0, 1, {}), "one step"),
        (lambda: TreePlan(6, 1, {0: 3}), r"1\.\.6"),
        (lambda: TreePlan(6, 1, {7: 3}), r"1\.\.6"),
        (lambda: TreePlan(6, 1, {2: 0}), "children at least 1"),
        (lambda: TreePlan.tmpo(6, (1, 3, 2), 3), "strictly increasing"),
        (lambda: TreePlan.tmpo(6, (0, 2, 3), 3), "at least 1"),
        (lambda: TreePlan.tmpo(6, (1, 7), 3), r"1\.\.6"),
    ],
)
def test_impossible_plans_are_refused(make: Callable[[], TreePlan], message: str):
    with pytest.raises(ValueError, match=message):
        make()


@plans
def test_index_follows_every_leaf_through_the_tree(plan):
    # With v = 0 and one-hot noise, a latent's non-zero entries name all the nodes on its way.
    ids: dict[tree.NodePath, int] = {}
    nodes = plan.roots + sum(width * k for width, k in ((plan.widths[s - 1], k) for s, k in plan.fanout.items()))

    def one_hot(step: int, path: tree.NodePath) -> Tensor:
        ids.setdefault(path, len(ids))
        return torch.eye(nodes, dtype=torch.float64)[ids[path]]

    run = tree.rollout(lambda x, sigma: torch.zeros_like(x), one_hot, SIGMAS, plan)
    assert len(ids) == nodes
    names = {number: path for path, number in ids.items()}

    def path_of(x: Tensor) -> tree.NodePath:
        found = [names[i] for i in x.nonzero().flatten().tolist()]
        longest = max(found, key=len)
        assert sorted(found, key=len) == [longest[: i + 1] for i in range(len(longest))]
        return longest

    edges = [path_of(x) for branch in run.branches for x in branch.x_child]
    parents = [(branch.step, path_of(x)) for branch in run.branches for x in branch.x]
    steps = [branch.step for branch in run.branches for _ in branch.x_child]
    index = plan.index()
    assert index.leaf_edges.shape == (plan.leaves, len(plan.fanout)) and index.edge_parent.shape == (len(edges),)
    assert len(set(edges)) == len(edges) and len(set(parents)) == len(parents)
    for leaf, row in zip(run.leaves, index.leaf_edges.tolist(), strict=True):
        path = path_of(leaf)
        assert [edges[edge] for edge in row] == [path[: i + 2] for i in range(len(plan.fanout))]
    for edge, parent in enumerate(index.edge_parent.tolist()):
        assert parents[parent] == (steps[edge], edges[edge][:-1])
    # Tiling, on which per-prompt conditions rely.
    for x in [branch.x for branch in run.branches] + [branch.x_child for branch in run.branches] + [run.leaves]:
        assert [path_of(row)[0] for row in x] == [row % plan.roots for row in range(len(x))]


def test_a_shortened_tree_is_the_same_up_to_its_leaves() -> None:
    plan = TreePlan.tmpo(6, (1, 2, 3), 3)
    short = plan.shortened(2)
    assert (short.widths, short.fanout, short.leaves) == ((3, 3, 9, 27, 27), plan.fanout, plan.leaves)
    assert plan.shortened(None) == plan == plan.shortened(3) == plan.shortened(9)
    assert TreePlan(6, 4, {}).shortened(1).num_steps == 6
    sigmas = torch.tensor(SIGMAS)
    levels = tree.shortened_sigmas(sigmas, short)
    # Half-way from the third to the sixth is between the fourth and the fifth.
    expected = [*SIGMAS[:4], (SIGMAS[4] + SIGMAS[5]) / 2, 0.0]
    torch.testing.assert_close(levels, torch.tensor(expected))
    assert torch.equal(tree.shortened_sigmas(sigmas, plan), sigmas)
    for solver in ("euler", "ab2"):
        whole, run = (tree.rollout(Mlp(), noise64(1), s, p, eta=ETA, solver=solver) for s, p in
                      ((sigmas, plan), (levels, short)))  # fmt: skip
        assert torch.equal(run.log_probs, whole.log_probs)
        assert 0 < (run.leaves - whole.leaves).abs().max() < 0.3


def test_index_without_stochastic_steps_is_empty():
    index = TreePlan(6, 4, {}).index()
    assert index.leaf_edges.shape == (4, 0) and index.edge_parent.shape == (0,)
    assert sample(TreePlan(6, 4, {})).log_probs.shape == (0,)


@pytest.mark.parametrize("trees", [1, 3, 8])
def test_chunks_are_whole_multiples_of_the_trees(trees):
    for width in (trees, 3 * trees, 9 * trees):
        assert tree.chunk_size(width, trees, None) == width
        for max_batch in range(trees, 10 * trees):
            size = tree.chunk_size(width, trees, max_batch)
            assert size % trees == 0 and size <= max_batch
            assert size + trees > min(max_batch, width)
        if width > trees > 1:
            with pytest.raises(ValueError, match=f"{trees - 1} cannot hold one row of each of {trees} prompts"):
                tree.chunk_size(width, trees, trees - 1)


# Noise


def test_keyed_noise_is_a_pure_function_of_key_and_path():
    noise = tree.keyed_noise((7, 3, "prompt"), (4, 5))
    paths = [(0,), (1,), (0, 1), (1, 0), (0, 1, 2)]
    first = [noise(2, path) for path in paths]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = [tree.keyed_noise((7, 3, "prompt"), (4, 5))(2, path) for path in reversed(paths)][::-1]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = [tree.keyed_noise(key, (4, 5))(2, (0,)) for key in ((8, 3, "prompt"), (7, 4, "prompt"), (7, 3, "other"))]
    values = torch.stack(first + other).flatten(1)
    assert torch.pdist(values).min() > 1
    assert first[0].shape == (4, 5) and first[0].dtype == torch.float32


def test_keyed_noise_is_standard_normal():
    noise = tree.keyed_noise((0,), (16,))
    values = torch.stack([noise(0, (i,)) for i in range(2000)])
    assert values.mean().abs() < 4 / math.sqrt(32_000)
    assert (values.var() - 1).abs() < 4 * math.sqrt(2 / 32_000)
    assert values.T.corrcoef().fill_diagonal_(0).abs().max() < 0.1


# Rollout


@pytest.mark.parametrize("eta", [None, 0.0])
def test_without_noise_a_rollout_is_plain_euler(eta):
    model = Mlp()
    plan = TreePlan(6, 5, {} if eta is None else {2: 2, 4: 1})
    run = tree.rollout(model, noise64(1), SIGMAS, plan, eta=eta or 0.0)
    x = torch.stack([noise64(1)(0, (root,)) for root in range(5)])
    with torch.no_grad():
        for sigma, sigma_next in itertools.pairwise(SIGMAS):
            x = x + (sigma_next - sigma) * model(x, torch.full((5,), sigma, dtype=torch.float64))
    torch.testing.assert_close(run.leaves, x if eta is None else x.repeat(2, 1, 1), rtol=0, atol=1e-13)


@dataclass
class GaussianFlow:
    """The exact velocity for data of N(3, .5^2), and where it leads."""

    mean: float = 3.0
    std: float = 0.5

    def spread(self, sigma: Tensor | float) -> Any:
        return ((1 - sigma) ** 2 * self.std**2 + sigma**2) ** 0.5

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1)
        return (s - (1 - s) * self.std**2) / self.spread(s) ** 2 * (x - (1 - s) * self.mean) - self.mean

    def leaves(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise


def global_error(solver: flow.Solver, steps: int) -> float:
    """Root mean square error of the leaves with levels that are not evenly spaced, as FLUX's are not."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sigmas = 2 * even / (1 + even)
    run = tree.rollout(GaussianFlow(), noise64(1), sigmas, TreePlan(steps, 20, {}), solver=solver)
    start = torch.stack([noise64(1)(0, (root,)) for root in range(20)])
    return (run.leaves - GaussianFlow().leaves(start)).square().mean().sqrt().item()


def test_the_error_of_ab2_falls_with_the_square_of_the_step() -> None:
    for solver, factor in (("euler", 2), ("ab2", 4)):
        assert global_error(solver, 1024) / global_error(solver, 2048) == pytest.approx(factor, rel=0.05)
    assert global_error("ab2", 12) < global_error("euler", 100)


@pytest.mark.parametrize("max_batch", [None, 4])
def test_ab2_begins_anew_after_noise(max_batch: int | None) -> None:
    model, noise = Mlp(), Recorded(noise64(1))
    plan = TreePlan(8, 2, {3: 2, 4: 1})
    sigmas = torch.linspace(1, 0, 9, dtype=torch.float64) ** 1.5
    run = tree.rollout(model, noise, sigmas, plan, solver="ab2", eta=ETA, max_batch=max_batch)
    x = torch.stack([noise.inner(0, path) for path in noise.paths[0]])
    history: list[Tensor] = []
    with torch.no_grad():
        for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas.tolist()), 1):
            v, h = model(x, torch.full((len(x),), sigma, dtype=torch.float64)), sigma_next - sigma
            if step in plan.fanout:
                mean, std = flow.transition("cps", x, v, sigma, sigma_next, ETA)
                drawn = torch.stack([noise.inner(step, path) for path in noise.paths[step]])
                x, history = tree.tile(mean, plan.fanout[step]) + std * drawn, []
                torch.testing.assert_close(run.branches[step - 3].mean, mean, rtol=0, atol=1e-12)
                continue
            # The integral of the straight line through the last two velocities over the step.
            slope = (v - history[-1]) / (sigma - sigmas[step - 2].item()) if history else torch.zeros_like(v)
            x = x + h * v + h**2 / 2 * slope
            history.append(v)
    torch.testing.assert_close(run.leaves, x, rtol=0, atol=1e-12)


@plans
def test_a_leaf_alone_is_the_leaf_of_the_tree(plan):
    model, noise = Mlp(), Recorded(noise64(1))
    run = tree.rollout(model, noise, SIGMAS, plan, eta=ETA)
    leaves = noise.paths[max(noise.paths)]
    assert len(leaves) == plan.leaves
    cos, sin = math.cos(ETA * math.pi / 2), math.sin(ETA * math.pi / 2)
    for row, path in enumerate(leaves):
        x, level = noise64(1)(0, path[:1]), 1
        for step in range(1, 7):
            sigma, sigma_next = SIGMAS[step - 1], SIGMAS[step]
            with torch.no_grad():
                v = model(x[None], torch.tensor([sigma], dtype=torch.float64))[0]
            if step in plan.fanout:
                level += 1
                x = (1 - sigma_next) * (x - sigma * v) + sigma_next * cos * (x + (1 - sigma) * v)
                x = x + sigma_next * sin * noise64(1)(step, path[:level])
            else:
                x = x - (sigma - sigma_next) * v
        assert (run.leaves[row] - x).abs().max() < 1e-10


@plans
@pytest.mark.parametrize("max_batch", [1, 4, 10, 26, 100])
def test_chunked_rollout_equals_the_whole(plan, max_batch):
    whole = sample(plan)
    counting = Counting(Mlp())
    chunked = sample(plan, counting, max_batch=max_batch)
    assert max(counting.batches) <= max_batch
    torch.testing.assert_close(chunked.leaves, whole.leaves, rtol=0, atol=1e-12)
    torch.testing.assert_close(chunked.log_probs, whole.log_probs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", ["cps", "flow_sde", "dance"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_stored_log_probs_are_those_of_the_noise(kernel, reduce):
    noise = Recorded(noise64(1))
    run = tree.rollout(Mlp(), noise, SIGMAS, PLANS["uneven"], kernel=kernel, eta=ETA, reduce=reduce)
    expected = []
    for branch in run.branches:
        assert (branch.sigma, branch.sigma_next) == (SIGMAS[branch.step - 1], SIGMAS[branch.step])
        eps = torch.stack([noise64(1)(branch.step, path) for path in noise.paths[branch.step]]).flatten(1)
        density = -(eps**2) / 2 - branch.std.log().item() - math.log(2 * math.pi) / 2
        expected.append(density.mean(1) if reduce == "mean" else density.sum(1))
    torch.testing.assert_close(run.log_probs, torch.cat(expected), rtol=0, atol=1e-11)


def test_a_rollout_keeps_no_graph():
    run = sample(PLANS["tmpo-early"])
    assert not any(x.requires_grad for b in run.branches for x in (b.x, b.mean, b.x_child, b.log_prob))
    assert not run.leaves.requires_grad


@pytest.mark.parametrize("max_batch", [None, 4])
def test_callback_sees_every_evaluation(max_batch):
    seen: list[tuple[int, int, Tensor]] = []
    counting = Counting(Mlp())
    run = sample(
        PLANS["tmpo-late"], counting, max_batch=max_batch, callback=lambda done, total, x: seen.append((done, total, x))
    )
    assert [len(x) for _, _, x in seen] == counting.batches
    assert [done for done, _, _ in seen] == torch.tensor(counting.batches).cumsum(0).tolist()
    assert seen[-1][0] == 54 and {total for _, total, _ in seen} == {54}
    # The last step ends at sigma 0: its prediction is the result.
    last = torch.cat([x for _, _, x in seen])[-27:]
    torch.testing.assert_close(last, run.leaves, rtol=0, atol=1e-14)


def test_bfloat16_noise_and_network_leave_float32_latents():
    noise = tree.keyed_noise((1,), SHAPE)
    model = Mlp(dtype=torch.float32)
    run = tree.rollout(
        lambda x, sigma: model(x, sigma).bfloat16(),
        lambda step, path: noise(step, path).bfloat16(),
        SIGMAS,
        TreePlan(6, 3, {1: 2, 3: 2}),
    )
    assert {x.dtype for b in run.branches for x in (b.x, b.mean, b.std, b.x_child, b.log_prob)} == {torch.float32}
    assert run.leaves.dtype == torch.float32
    assert not torch.equal(run.leaves, run.leaves.bfloat16().float())


def test_too_late_stochastic_steps_and_wrong_sigmas_are_refused():
    with pytest.raises(ValueError, match=r"step 6 of 6 .*std 0"):
        sample(TreePlan(6, 2, {3: 2, 6: 2}))
    with pytest.raises(ValueError, match=r"step 5 of 6 .*std 0\.0079"):
        tree.rollout(Mlp(), noise64(1), SD35_SIGMAS, PLANS["tmpo-late"], eta=ETA)
    with pytest.raises(ValueError, match="needs 6 sigmas, got 7"):
        sample(TreePlan(5, 2, {3: 2}))


class PerPrompt(nn.Module):
    """Velocity of prompts whose conditions are tiled over the rows."""

    def __init__(self, model: Mlp, conditions: Tensor):
        super().__init__()
        self.model, self.conditions = model, conditions

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.model(x + tree.tile(self.conditions, len(x) // len(self.conditions)), sigma)


@pytest.mark.parametrize("plan", [PLANS["tmpo-early"], PLANS["uneven"], TreePlan(6, 1, {2: 3})])
@pytest.mark.parametrize("max_batch", [None, 4, 7, 31])
def test_a_forest_is_its_prompts_apart(plan, max_batch):
    prompts = 4
    conditions = torch.randn(prompts, *SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def noise(step: int, path: tree.NodePath) -> Tensor:
        root, prompt = divmod(path[0], prompts)
        return noise64("prompt", prompt)(step, (root, *path[1:]))

    model = Mlp()
    together = tree.rollout(
        PerPrompt(model, conditions), noise, SIGMAS, plan.forest(prompts), eta=ETA, max_batch=max_batch
    )
    index = plan.index()
    coefficients = torch.empty_like(together.log_probs)
    expected = torch.zeros(())
    for prompt in range(prompts):
        velocity = PerPrompt(model, conditions[prompt : prompt + 1])
        run = tree.rollout(velocity, noise64("prompt", prompt), SIGMAS, plan, eta=ETA)
        torch.testing.assert_close(together.leaves[prompt::prompts], run.leaves, rtol=0, atol=1e-12)
        # Every prompt's edges are a strided slice, numbered within as the single tree's.
        torch.testing.assert_close(together.log_probs[prompt::prompts], run.log_probs, rtol=0, atol=1e-12)
        log_probs = run.log_probs.requires_grad_()
        shift, rewards = torch.zeros_like(log_probs), run.leaves.sum((1, 2))
        transitions = objectives.Transitions(
            log_probs, run.log_probs.detach(), shift, index.leaf_edges, index.edge_parent
        )
        loss, _ = objectives.softmax_tb_loss(transitions, rewards, 2.0)
        coefficients[prompt::prompts] = objectives.edge_coefficients(loss, log_probs)
        tree.replay(velocity, run, coefficients[prompt::prompts])
        expected = expected + gradient(model)
    tree.replay(PerPrompt(model, conditions), together, coefficients, max_batch=max_batch)
    assert relative(gradient(model), expected) < 1e-12


# Replay


@plans
@pytest.mark.parametrize("max_batch", [None, 1, 7])
def test_replay_at_unchanged_weights_returns_the_stored_log_probs(plan, max_batch):
    for kernel in ("cps", "flow_sde", "dance"):
        run = sample(plan, kernel=kernel)
        log_probs, kl = tree.replay(Mlp(), run, torch.ones_like(run.log_probs), max_batch=max_batch)
        torch.testing.assert_close(log_probs, run.log_probs, rtol=0, atol=1e-12)
        assert kl.shape == (0,) and not log_probs.requires_grad
        means = tree.parent_means(Mlp(), run, max_batch)
        assert [mean.shape for mean in means] == [branch.mean.shape for branch in run.branches]
        torch.testing.assert_close(tree.edge_log_probs(run, means), run.log_probs, rtol=0, atol=1e-12)
        assert tree.edge_mean_shift(run, means).max() < 1e-24


def edge_normals(model: nn.Module, run: tree.Rollout) -> list[tuple[torch.distributions.Normal, Tensor]]:
    """Per edge, evaluated on its own: the transition's distribution under a model and the stored child."""
    cos, sin = math.cos(ETA * math.pi / 2), math.sin(ETA * math.pi / 2)
    edges = []
    for branch in run.branches:
        s, s_next = SIGMAS[branch.step - 1], SIGMAS[branch.step]
        for row, x_child in enumerate(branch.x_child):
            x = branch.x[row % len(branch.x)]
            v = model(x[None], torch.tensor([s], dtype=x.dtype))[0]
            mean = (1 - s_next) * (x - s * v) + s_next * cos * (x + (1 - s) * v)
            edges.append((torch.distributions.Normal(mean, s_next * sin), x_child))
    return edges


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("max_batch", [None, 5])
def test_log_probs_shifts_and_ratios_under_other_policies(reduce, max_batch):
    old, new, reference = Mlp(), Mlp().moved(1, 0.1), Mlp().moved(2, 0.1)
    run = sample(PLANS["uneven"], old, reduce=reduce)
    means = tree.parent_means(new, run, max_batch)
    others = tree.parent_means(reference, run, max_batch)

    def reduced(x: Tensor) -> Tensor:
        return x.mean() if reduce == "mean" else x.sum()

    with torch.no_grad():
        policies = [edge_normals(model, run) for model in (old, new, reference)]
    log_probs, shifts, to_reference, log_ratios = [], [], [], []
    for (mu_old, _), (mu, x), (mu_ref, _) in zip(*policies, strict=True):
        log_probs.append(reduced(mu.log_prob(x)))
        # Between Gaussians of one std the shift is their KL.
        shifts.append(reduced(torch.distributions.kl_divergence(mu, mu_old)))
        to_reference.append(reduced(torch.distributions.kl_divergence(mu, mu_ref)))
        log_ratios.append((mu.log_prob(x) - mu_ref.log_prob(x)).sum())
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(tree.edge_log_probs(run, means), torch.stack(log_probs), **close)
    torch.testing.assert_close(tree.edge_mean_shift(run, means), torch.stack(shifts), **close)
    torch.testing.assert_close(tree.edge_mean_shift(run, means, others), torch.stack(to_reference), **close)
    torch.testing.assert_close(tree.edge_log_ratio(run, means, others), torch.stack(log_ratios), **close)


@dataclass
class Settings:
    baseline: objectives.Baseline = "none"
    anchor_weight: float | None = None
    kl_weight: float = 0.0
    beta: float = 2.0
    clip: float = 0.2


@pytest.fixture
def naive_loss(written_out_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`naive_loss(model, old, reference, run, paths, settings)`: the whole loss with one graph through every edge.

    `paths` lists the nodes of each stochastic step in row order.
    """

    def naive_loss(
        model: nn.Module,
        old: nn.Module,
        reference: nn.Module,
        run: tree.Rollout,
        paths: list[list[tree.NodePath]],
        s: Settings,
    ) -> Tensor:
        names = [path for step in paths for path in step]
        with torch.no_grad():
            at_rollout, at_reference = edge_normals(old, run), edge_normals(reference, run)
        log_pi, log_w, delta, kl = {}, {}, {}, []
        for path, (mu, x), (mu_old, _), (mu_ref, _) in zip(
            names, edge_normals(model, run), at_rollout, at_reference, strict=True
        ):
            log_pi[path] = mu.log_prob(x).mean()
            shift = ((mu.mean - mu_old.mean) ** 2 / (2 * mu.stddev**2)).mean().detach()
            log_w[path] = log_pi[path] - mu_old.log_prob(x).mean() + shift
            delta[path] = (mu.log_prob(x) - mu_ref.log_prob(x)).sum().detach()
            kl.append(((mu.mean - mu_ref.mean) ** 2 / (2 * mu.stddev**2)).mean())
        rewards = run.leaves.sum((1, 2))
        loss = written_out_loss(paths, log_pi, log_w, delta, rewards, s.beta, s.clip, s.baseline, s.anchor_weight)
        return loss + s.kl_weight * torch.stack(kl).mean()

    return naive_loss


def replayed_gradient(
    model: nn.Module, reference: nn.Module, run: tree.Rollout, s: Settings, max_batch: int | None
) -> tuple[Tensor, dict[str, float], float]:
    """The same gradient the way training computes it."""
    index = run.plan.index()
    means, at_reference = (tree.parent_means(policy, run, max_batch) for policy in (model, reference))
    log_probs = tree.edge_log_probs(run, means).requires_grad_()
    transitions = objectives.Transitions(
        log_probs,
        run.log_probs,
        tree.edge_mean_shift(run, means),
        index.leaf_edges,
        index.edge_parent,
        None if s.anchor_weight is None else tree.edge_log_ratio(run, means, at_reference),
    )
    loss, figures = objectives.softmax_tb_loss(
        transitions, run.leaves.sum((1, 2)), s.beta, s.clip, s.baseline, s.anchor_weight
    )
    weights = tree.parent_shares(run)
    _, kl = tree.replay(
        model,
        run,
        objectives.edge_coefficients(loss, log_probs),
        max_batch=max_batch,
        kl_weights=s.kl_weight * weights if s.kl_weight else None,
        reference=at_reference if s.kl_weight else None,
    )
    assert len(kl) == (len(weights) if s.kl_weight else 0)
    return gradient(model), figures, loss.item() + s.kl_weight * (weights[: len(kl)] * kl).sum().item()


@pytest.mark.parametrize("baseline", ["none", "group", "siblings"])
@pytest.mark.parametrize("anchor_weight", [None, 0.3])
@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_replay_has_the_gradient_of_the_naive_loss(naive_loss, baseline, anchor_weight, kl_weight):
    s = Settings(baseline, anchor_weight, kl_weight)
    old, reference = Mlp(), Mlp().moved(9, 0.1)
    noise = Recorded(noise64(1))
    run = tree.rollout(old, noise, SIGMAS, PLANS["tmpo-late"], eta=ETA)
    paths = [noise.paths[branch.step] for branch in run.branches]
    clipped = []
    for update in range(3):
        # Inner updates move the weights away from the rollout's: ratios differ from 1 and some are clipped.
        model = old.moved(20, 0.1 * update)
        loss = naive_loss(model, old, reference, run, paths, s)
        loss.backward()
        expected = gradient(model)
        for max_batch in (None, 1, 3, 7):
            found, figures, value = replayed_gradient(model, reference, run, s, max_batch)
            assert relative(found, expected) < 1e-9
            assert value == pytest.approx(loss.item(), rel=1e-9, abs=1e-12)
        assert (abs(figures["ratio_max"] - 1) > 0.01) == (update > 0)
        clipped.append(figures["clip_fraction"])
    assert clipped[0] == 0 and 0 < clipped[2] < 1


@pytest.mark.parametrize("plan", [PLANS["tmpo-without-step-1"], PLANS["uneven"], PLANS["tree-grpo"]])
@pytest.mark.parametrize("baseline", ["none", "siblings"])
def test_replay_has_the_gradient_of_the_naive_loss_on_other_trees(naive_loss, plan, baseline):
    s = Settings(baseline, 0.3, 0.5)
    old, model, reference = Mlp(), Mlp().moved(20, 0.1), Mlp().moved(9, 0.1)
    noise = Recorded(noise64(1))
    run = tree.rollout(old, noise, SIGMAS, plan, eta=ETA)
    naive_loss(model, old, reference, run, [noise.paths[branch.step] for branch in run.branches], s).backward()
    expected = gradient(model)
    for max_batch in (None, 5):
        assert relative(replayed_gradient(model, reference, run, s, max_batch)[0], expected) < 1e-9


@plans
@pytest.mark.parametrize("max_batch", [None, 4])
def test_replay_of_kept_graphs_has_the_same_gradient_without_a_forward_pass(
    plan: TreePlan, max_batch: int | None
) -> None:
    model = Mlp()
    run, kept = sample(plan, model), sample(plan, model, graphs=True, max_batch=max_batch)
    coefficients = torch.linspace(-1, 2, len(run.log_probs), dtype=torch.float64)
    reference = tree.parent_means(model.moved(3, 0.1), run)
    weights = {"kl_weights": tree.parent_shares(run), "reference": reference}
    expected = tree.replay(model, run, coefficients, **weights)
    gradients = [gradient(model)]
    # The graphs are used once.
    for calls in (0, 1):
        counting = Counting(model)
        found = tree.replay(counting, kept, coefficients, **weights)
        assert len(counting.batches) == calls
        gradients.append(gradient(model))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[1:], [gradients[0]] * 2, rtol=1e-10, atol=1e-12)
    assert not kept.leaves.requires_grad and not any(branch.mean.requires_grad for branch in kept.branches)


@pytest.mark.parametrize("baseline", ["none", "group", "siblings"])
def test_replay_in_float32_is_close_to_the_naive_loss(naive_loss, baseline):
    s = Settings(baseline, None, 0.5)
    old = Mlp(dtype=torch.float32)
    model, reference = old.moved(20, 0.1), old.moved(9, 0.1)
    noise = Recorded(tree.keyed_noise((1,), SHAPE))
    run = tree.rollout(old, noise, SIGMAS, PLANS["tmpo-late"], eta=ETA)
    naive_loss(model, old, reference, run, [noise.paths[branch.step] for branch in run.branches], s).backward()
    expected = gradient(model)
    assert expected.dtype == torch.float32
    for max_batch in (None, 4):
        assert relative(replayed_gradient(model, reference, run, s, max_batch)[0], expected) < 1e-4


def test_replay_backpropagates_once_per_micro_batch_and_accumulates():
    run = sample(PLANS["tmpo-early"])
    model, coefficients = Mlp(), torch.linspace(-1, 1, 36, dtype=torch.float64)
    tree.replay(model, run, coefficients)
    whole = gradient(model)
    totals: list[Tensor] = []
    tree.replay(model, run, coefficients, max_batch=5, backward=lambda total: (totals.append(total), total.backward()))
    # 12 parents in fives.
    assert len(totals) == 3
    assert relative(gradient(model), whole) < 1e-12


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_replay_reports_the_kl_and_refuses_one_without_reference(reduce):
    model, reference = Mlp(), Mlp().moved(9, 0.1)
    run = sample(PLANS["uneven"], model, reduce=reduce)
    means = tree.parent_means(reference, run)
    parents = run.plan.train_evaluations
    coefficients, weights = torch.zeros_like(run.log_probs), torch.rand(parents, dtype=torch.float64)
    _, kl = tree.replay(model, run, coefficients, max_batch=3, kl_weights=weights, reference=means)
    # Always a mean over dimensions, whatever the log-probabilities are; one per parent, where edges have one each.
    size = run.leaves[0].numel() if reduce == "sum" else 1
    edges = tree.edge_mean_shift(run, means) / size
    first, expected = 0, []
    for branch in run.branches:
        expected.append(edges[first : first + len(branch.x)])
        first += len(branch.x_child)
    torch.testing.assert_close(kl, torch.cat(expected), rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match="reference"):
        tree.replay(model, run, coefficients, kl_weights=weights)


def test_every_parent_has_its_own_kl_weight():
    model, reference = Mlp(), Mlp().moved(9, 0.1)
    run = sample(PLANS["uneven"], model)
    means = tree.parent_means(reference, run)
    weights = torch.rand(run.plan.train_evaluations, dtype=torch.float64)
    tree.replay(model, run, torch.zeros_like(run.log_probs), max_batch=4, kl_weights=weights, reference=means)
    found, first, total = gradient(model), 0, torch.zeros((), dtype=torch.float64)
    for branch, other in zip(run.branches, means, strict=True):
        for row, x in enumerate(branch.x):
            sigma = torch.full((1,), branch.sigma, dtype=x.dtype)
            mean, std = flow.transition(
                run.kernel, x[None], model(x[None], sigma), branch.sigma, branch.sigma_next, ETA
            )
            total = total + weights[first + row] * ((mean[0] - other[row]) ** 2 / (2 * std**2)).mean()
        first += len(branch.x)
    total.backward()
    assert relative(found, gradient(model)) < 1e-10


def test_replay_of_a_tree_without_transitions_does_nothing():
    counting = Counting(Mlp())
    run = sample(TreePlan(6, 3, {}))
    log_probs, kl = tree.replay(counting, run, torch.zeros(0))
    assert log_probs.shape == kl.shape == (0,) and counting.batches == []


def test_stochastic_steps_share_a_micro_batch_with_their_own_sigmas():
    seen: list[Tensor] = []
    model = Mlp()

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return model(x, sigma)

    run = sample(PLANS["tmpo-late"], model)
    tree.replay(velocity, run, torch.ones_like(run.log_probs))
    assert len(seen) == 1
    assert seen[0].tolist() == [SIGMAS[2]] * 3 + [SIGMAS[4]] * 9


def test_flow_helpers_agree_with_the_stored_branch():
    run = sample(PLANS["tmpo-early"])
    for branch in run.branches:
        mean = tree.tile(branch.mean, 3)
        assert torch.equal(flow.log_prob(branch.x_child, mean, branch.std), branch.log_prob)
        assert torch.equal(mean[4], branch.mean[4 % len(branch.mean)])
