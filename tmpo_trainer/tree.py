"""Tree rollouts: where to branch, how nodes are laid out, sampling without gradient, replay with gradient.

Nothing here depends on a model, only on `velocity(x, sigma)` with `x [N, ...latent]` and `sigma [N]`. Steps are 1-based:
step s goes from sigmas[s - 1] to sigmas[s].

Children are laid out by tiling: with W parents and k children, child c of parent p is row c * W + p. So the parent of row r
is r % W, the root of any row is row % roots, and per-root conditions are matched by repeating them.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import flow

#: Predicts noise - data. `x [N, ...latent]`, `sigma [N]` -> `[N, ...latent]`.
Velocity = Callable[[Tensor, Tensor], Tensor]
#: The path of a node: its root, then the index of the child taken at each stochastic step.
NodePath = tuple[int, ...]
#: Standard normal noise of a node that is born at a step (0 for roots): `[...latent]`. A pure function of its arguments.
Noise = Callable[[int, NodePath], Tensor]


@dataclass(frozen=True)
class BranchSchedule:
    """Which steps branch at which update: Beta-distributed around a curriculum (paper eq. 8, 41-46).

    Args:
        num_steps: steps of the rollout, N.
        early, late: 1-based mean positions at the first and the last update, each strictly increasing.
        kappa: concentration of the Beta distribution, > 0; larger is nearer to the mean. 2 around the middle is uniform.
        total_updates: length of the curriculum.
        seed: draws are a function of (seed, update) alone, the same on every rank and after resuming.
        last: the last position allowed, by default N - 1; pass `flow.last_stochastic_step(sigmas)`.

    Raises:
        ValueError: positions that do not increase, differ in number, or do not fit in 1..last.
    """

    num_steps: int
    early: tuple[int, ...]
    late: tuple[int, ...]
    kappa: float
    total_updates: int
    seed: int
    last: int | None = None

    def __post_init__(self) -> None:
        for name, positions in (("early", self.early), ("late", self.late)):
            if not positions or list(positions) != sorted(set(positions)):
                raise ValueError(f"branch steps {name}={tuple(positions)} must be strictly increasing and not empty")
            if positions[0] < 1 or positions[-1] > self.last_step:
                raise ValueError(
                    f"branch steps {name}={tuple(positions)} must lie in 1..{self.last_step} "
                    f"(the steps out of {self.num_steps} that may carry noise)"
                )
        if len(self.early) != len(self.late):
            raise ValueError(f"branch steps early={self.early} and late={self.late} differ in number")
        if self.kappa <= 0 or self.total_updates < 1:
            raise ValueError(f"kappa={self.kappa} must be > 0 and total_updates={self.total_updates} at least 1")

    @property
    def last_step(self) -> int:
        return self.num_steps - 1 if self.last is None else self.last

    def raw(self, update: int) -> tuple[float, ...]:
        """The draws xi_i in 0..1, one per branch, before scaling, rounding, sorting and repair (eq. 43)."""
        generator = random.Random(f"{self.seed}:{update}")
        progress = min(update / self.total_updates, 1.0)
        draws = []
        for early, late in zip(self.early, self.late, strict=True):
            mean = (early + (late - early) * progress - 1) / max(self.last_step - 1, 1)
            # Beta is undefined at a mean of 0 or 1: use the end itself.
            inside = 0 < mean < 1
            draws.append(generator.betavariate(self.kappa * mean, self.kappa * (1 - mean)) if inside else mean)
        return tuple(draws)

    def steps(self, update: int) -> tuple[int, ...]:
        """The branch steps of an update (0-based): strictly increasing, in 1..last, always as many as `early`."""
        steps = sorted(math.floor(1 + (self.last_step - 1) * xi + 0.5) for xi in self.raw(update))
        # About half of the draws collide. Move them, but never drop one: K must stay branching ** T.
        for i in range(1, len(steps)):
            steps[i] = max(steps[i], steps[i - 1] + 1)
        # A lone branch at step 1 would leave no transition to train.
        steps[-1] = min(max(steps[-1], 2), self.last_step)
        for i in reversed(range(len(steps) - 1)):
            steps[i] = min(steps[i], steps[i + 1] - 1)
        return tuple(steps)


@dataclass(frozen=True)
class TreeIndex:
    """How edges and leaves are connected. Edges are numbered step by step, in row order within a step.

    leaf_edges: `[K, T]` the edges of each path. edge_parent: `[E]` the parent node of each edge, numbered in the same way.
    """

    leaf_edges: Tensor
    edge_parent: Tensor


@dataclass(frozen=True)
class TreePlan:
    """The shape of a rollout.

    Args:
        num_steps: N. roots: independent noise seeds. fanout: {step: children}; 1 child is noise without branching.
        trees: how many prompts' trees the roots belong to, see `forest`.

    Raises:
        ValueError: a step outside 1..num_steps, or a count below 1.
    """

    num_steps: int
    roots: int
    fanout: Mapping[int, int]
    trees: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "fanout", dict(sorted(self.fanout.items())))
        if self.num_steps < 1 or self.roots < 1:
            raise ValueError(f"a tree needs at least one step and one root, got {self.num_steps} and {self.roots}")
        for step, children in self.fanout.items():
            if not 1 <= step <= self.num_steps or children < 1:
                raise ValueError(f"fanout {{{step}: {children}}}: steps are 1..{self.num_steps}, children at least 1")

    @classmethod
    def tmpo(cls, num_steps: int, branch_steps: Sequence[int], branching: int) -> TreePlan:
        """The paper's tree. A branch at step 1 means independent seeds (no transition), so it becomes roots."""
        if list(branch_steps) != sorted(set(branch_steps)) or min(branch_steps, default=1) < 1:
            raise ValueError(f"branch steps {tuple(branch_steps)} must be strictly increasing and at least 1")
        fanout = {step: branching for step in branch_steps if step > 1}
        return cls(num_steps, branching if 1 in branch_steps else 1, fanout)

    def forest(self, trees: int) -> TreePlan:
        """The same tree for several prompts at once: root r of prompt p is root r * trees + p, so row % trees is p."""
        return TreePlan(self.num_steps, self.roots * trees, self.fanout, trees)

    def shortened(self, leaf_steps: int | None) -> TreePlan:
        """The same tree with at most this many steps after its last stochastic one, see `shortened_sigmas`."""
        if leaf_steps is None or not self.fanout:
            return self
        return TreePlan(min(self.num_steps, max(self.fanout) + leaf_steps), self.roots, self.fanout, self.trees)

    @property
    def leaves(self) -> int:
        """K, the number of leaves."""
        return self.roots * math.prod(self.fanout.values())

    @property
    def widths(self) -> tuple[int, ...]:
        """Nodes to evaluate at each step 1..N."""
        grown = [self.roots, *(self.fanout.get(step, 1) for step in range(1, self.num_steps))]
        return tuple(itertools.accumulate(grown, operator.mul))

    @property
    def rollout_evaluations(self) -> int:
        """Network evaluations of a rollout, in nodes: every unique node once."""
        return sum(self.widths)

    @property
    def train_evaluations(self) -> int:
        """Forward and backward passes of one replay, in nodes: every unique parent of a transition once."""
        return sum(self.widths[step - 1] for step in self.fanout)

    def index(self) -> TreeIndex:
        leaf_edges, edge_parent, edges, parents = [], [], 0, 0
        for step, children in self.fanout.items():
            width = self.widths[step - 1]
            leaf_edges.append(edges + torch.arange(self.leaves) % (width * children))
            edge_parent.append(parents + torch.arange(width * children) % width)
            edges += width * children
            parents += width
        if not leaf_edges:
            return TreeIndex(torch.zeros(self.leaves, 0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
        return TreeIndex(torch.stack(leaf_edges, 1), torch.cat(edge_parent))


def shortened_sigmas(sigmas: Tensor, plan: TreePlan) -> Tensor:
    """The sigmas of a plan with another number of steps after its last stochastic one, see `TreePlan.shortened`.

    Up to that step they stay. The rest is spaced evenly on the same curve, so that `[N + 1]` becomes
    `[plan.num_steps + 1]` with the same end.
    """
    if len(sigmas) == plan.num_steps + 1:
        return sigmas
    last = max(plan.fanout, default=0)
    places = torch.linspace(last, len(sigmas) - 1, plan.num_steps - last + 1, dtype=torch.float64)
    below = places.floor().long().clamp(max=len(sigmas) - 2)
    rest = torch.lerp(sigmas[below].double(), sigmas[below + 1].double(), places - below)
    return torch.cat([sigmas[:last], rest.to(sigmas)])


def keyed_noise(key: Sequence[int | str], shape: Sequence[int]) -> Noise:
    """Noise of a node as a pure function of (key, path): the same for any micro-batch, rank count or resumption.

    Drawn on the CPU in float32, so that it does not depend on the device either.
    """
    shape = tuple(shape)

    def noise(step: int, path: NodePath) -> Tensor:
        digest = hashlib.blake2b(repr((*key, *path)).encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "little") >> 1
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    return noise


@dataclass
class Branch:
    """The record of one stochastic step: W parents, W * k children; everything float32 or float64.

    x, mean: `[W, ...latent]`, the parents and the rollout policy's mean. std: broadcasts over them.
    x_child: `[W * k, ...latent]`. log_prob: `[W * k]`, of the rollout policy.
    velocity: of the parents, `[W, ...latent]`, with the graph behind it, if the rollout keeps graphs.
    """

    step: int
    sigma: float
    sigma_next: float
    x: Tensor
    mean: Tensor
    std: Tensor
    x_child: Tensor
    log_prob: Tensor
    velocity: Tensor | None = None


@dataclass
class Rollout:
    """Leaves `[K, ...latent]` and the branches that led to them, in the order of `TreePlan.index()`."""

    plan: TreePlan
    kernel: flow.Kernel
    eta: float
    reduce: flow.Reduce
    leaves: Tensor
    branches: list[Branch]

    @property
    def log_probs(self) -> Tensor:
        """`[E]`, of the rollout policy."""
        if not self.branches:
            return torch.zeros(0, device=self.leaves.device)
        return torch.cat([branch.log_prob for branch in self.branches])

    @property
    def graphs(self) -> bool:
        """Whether graphs are kept that no replay has used."""
        return any(branch.velocity is not None for branch in self.branches)

    def drop_graphs(self) -> None:
        """Frees them. The next replay evaluates the parents."""
        for branch in self.branches:
            branch.velocity = None


def chunk_size(width: int, trees: int, max_batch: int | None) -> int:
    """Rows per network call: at most `max_batch`, in whole multiples of the trees, so that row % trees is the prompt.

    Raises:
        ValueError: `max_batch` below the number of trees.
    """
    if max_batch is None or max_batch >= width:
        return width
    if max_batch < trees:
        raise ValueError(f"a batch of at most {max_batch} cannot hold one row of each of {trees} prompts")
    return max_batch - max_batch % trees


@torch.no_grad()
def rollout(
    velocity: Velocity,
    noise: Noise,
    sigmas: Sequence[float] | Tensor,
    plan: TreePlan,
    *,
    kernel: flow.Kernel = "cps",
    eta: float = 0.7,
    solver: flow.Solver = "euler",
    max_batch: int | None = None,
    reduce: flow.Reduce = "mean",
    graphs: bool = False,
    callback: Callable[[int, int, Tensor], None] | None = None,
) -> Rollout:
    """Samples a tree, evaluating every unique node once; no gradient, unless `graphs`.

    Args:
        velocity: see `Velocity`. Rows of one call are consecutive, start at a multiple of `plan.trees` and end at one,
            so that conditions per prompt can be tiled.
        noise: see `Noise`; its shape and device set those of the rollout.
        sigmas: `[N + 1]`, from the pipeline's scheduler, ending in 0.
        plan: the tree. kernel, eta: of the stochastic steps.
        solver: of the deterministic steps. With `ab2`, the first one after the start or after a stochastic step is an Euler
            step, because fresh noise makes the last velocity useless.
        max_batch: the largest number of nodes in one call of `velocity`; guidance doubles inside it.
        reduce: how log-probabilities are reduced over dimensions.
        graphs: keep the autograd graph of every stochastic step's network call, so that `replay` has no need of a forward
            pass. All parents' activations are then alive until it, and the parameters must not change before it.
        callback: called after every network call with (nodes evaluated, nodes in all, x0_hat `[n, ...latent]`).

    Raises:
        ValueError: sigmas that do not fit the plan, or a stochastic step too near to sigma 0.
    """
    if len(sigmas) != plan.num_steps + 1:
        raise ValueError(f"a plan of {plan.num_steps} steps needs {plan.num_steps + 1} sigmas, got {len(sigmas)}")
    flow.check_stochastic(kernel, eta, sigmas, list(plan.fanout))
    levels = [float(sigma) for sigma in sigmas]
    paths: list[NodePath] = [(root,) for root in range(plan.roots)]
    x = torch.stack([noise(0, path) for path in paths])
    x = x.to(flow.working_dtype(x))
    branches: list[Branch] = []
    #: Sigma and velocity of the last step, if it was deterministic.
    past: tuple[float, Tensor] | None = None
    done = 0
    for step in range(1, plan.num_steps + 1):
        sigma, sigma_next = levels[step - 1], levels[step]
        size = chunk_size(len(x), plan.trees, max_batch)
        parts = []
        for rows in x.split(size):
            with torch.set_grad_enabled(graphs and step in plan.fanout):
                predicted = velocity(rows, torch.full((len(rows),), sigma, dtype=x.dtype, device=x.device))
                parts.append(predicted.to(x.dtype))
            done += len(rows)
            if callback is not None:
                callback(done, plan.rollout_evaluations, flow.predict_data(rows, predicted.detach(), sigma))
        with torch.set_grad_enabled(graphs and step in plan.fanout):
            with_graph = torch.cat(parts)
        v = with_graph.detach()
        if step not in plan.fanout:
            mean_v = v
            if solver == "ab2" and past is not None:
                mean_v = flow.ab2(v, past[1], (past[0], sigma, sigma_next))
            x, _ = flow.transition("ode", x, mean_v, sigma, sigma_next, 0.0)
            past = sigma, v
            continue
        past = None
        children = plan.fanout[step]
        mean, std = flow.transition(kernel, x, v, sigma, sigma_next, eta)
        paths = [(*path, child) for child in range(children) for path in paths]
        drawn = torch.stack([noise(step, path) for path in paths]).to(mean)
        tiled = tile(mean, children)
        x_child = tiled + std * drawn
        branches.append(
            Branch(step, sigma, sigma_next, x, mean, std, x_child, flow.log_prob(x_child, tiled, std, reduce))
        )
        if graphs:
            branches[-1].velocity = with_graph
        x = x_child
    return Rollout(plan, kernel, eta, reduce, x, branches)


def tile(x: Tensor, times: int) -> Tensor:
    """Repeats rows as a whole: `[W, ...]` -> `[times * W, ...]`, row r from row r % W."""
    return x.repeat(times, *[1] * (x.dim() - 1))


class _Piece(NamedTuple):
    """Parents `first` to `last` (excluded) of one branch."""

    branch: int
    first: int
    last: int


@dataclass
class _ParentBatch:
    """Parents that go through the network together: x `[n, ...latent]`, sigma and sigma_next `[n]`, by branch in `pieces`."""

    x: Tensor
    sigma: Tensor
    sigma_next: Tensor
    pieces: list[_Piece]


def _parent_batches(run: Rollout, max_batch: int | None, alone: bool = False) -> Iterator[_ParentBatch]:
    """Parents of all branches in micro-batches, one at a time, so that memory does not grow with the number of parents.

    Parents of different steps share a batch (sigma is per row); all widths are multiples of the trees, so tiling holds.
    alone: parents of different steps share none, as in the rollout.
    """
    rows = [[(b, row) for row in range(len(branch.x))] for b, branch in enumerate(run.branches)]
    for where in rows if alone else [list(itertools.chain(*rows))]:
        size = chunk_size(len(where), run.plan.trees, max_batch)
        for first in range(0, len(where), max(size, 1)):
            yield _parent_batch(run, where[first : first + size])


def _parent_batch(run: Rollout, chosen: list[tuple[int, int]]) -> _ParentBatch:
    """chosen: (branch, row) of each parent."""
    pieces = []
    for b, group in itertools.groupby(chosen, operator.itemgetter(0)):
        rows = [row for _, row in group]
        pieces.append(_Piece(b, rows[0], rows[-1] + 1))
    x = torch.cat([run.branches[b].x[start:end] for b, start, end in pieces])
    levels = [(run.branches[b].sigma, run.branches[b].sigma_next) for b, _ in chosen]
    sigma, sigma_next = torch.tensor(levels, dtype=x.dtype, device=x.device).unbind(1)
    return _ParentBatch(x, sigma, sigma_next, pieces)


@torch.no_grad()
def parent_means(velocity: Velocity, run: Rollout, max_batch: int | None = None, alone: bool = False) -> list[Tensor]:
    """Means of every transition under another policy, without gradient: one `[W, ...latent]` per branch.

    Used for the log-probabilities of a second inner update, and (adapter off) for the anchor and the KL penalty.

    Args:
        alone: every step's parents by themselves, in the calls of a rollout with this `max_batch`. In bfloat16, batches of
            another size round differently, and a log ratio sums that over all dimensions.
    """
    parts: list[list[Tensor]] = [[] for _ in run.branches]
    for batch in _parent_batches(run, max_batch, alone):
        predicted = velocity(batch.x, batch.sigma)
        mean, _ = flow.transition(run.kernel, batch.x, predicted, batch.sigma, batch.sigma_next, run.eta)
        sizes = [piece.last - piece.first for piece in batch.pieces]
        for piece, rows in zip(batch.pieces, mean.split(sizes), strict=True):
            parts[piece.branch].append(rows)
    return [torch.cat(rows) for rows in parts]


def edge_log_probs(run: Rollout, means: list[Tensor]) -> Tensor:
    """`[E]`: log-probability of the stored children under other means."""
    return torch.cat([
        flow.log_prob(branch.x_child, tile(mean, len(branch.x_child) // len(mean)), branch.std, run.reduce)
        for branch, mean in zip(run.branches, means, strict=True)
    ])  # fmt: skip


def edge_mean_shift(run: Rollout, means: list[Tensor], reference: list[Tensor] | None = None) -> Tensor:
    """`[E]`: (mu - mu_0)^2 / (2 std^2), reduced over dimensions as the log-probabilities are.

    mu_0 are the rollout's own means (RatioNorm, eq. 32) or those of a `reference`.
    """
    shifts = []
    for i, (branch, mean) in enumerate(zip(run.branches, means, strict=True)):
        other = branch.mean if reference is None else reference[i]
        shift = ((mean - other) ** 2 / (2 * branch.std**2)).flatten(1)
        shifts.append(tile(shift.mean(1) if run.reduce == "mean" else shift.sum(1), len(branch.x_child) // len(mean)))
    return torch.cat(shifts)


def edge_log_ratio(run: Rollout, means: list[Tensor], reference: list[Tensor]) -> Tensor:
    """`[E]`: log pi - log pi_ref of the stored children, summed over dimensions (the anchor's Delta).

    = dmu . eps / std + |dmu|^2 / (2 std^2), which avoids the cancellation of two large log-probabilities.
    """
    ratios = []
    for branch, mean, other in zip(run.branches, means, reference, strict=True):
        children = len(branch.x_child) // len(mean)
        difference = tile(mean - other, children) / branch.std
        eps = (branch.x_child - tile(mean, children)) / branch.std
        ratios.append((difference * eps + difference**2 / 2).flatten(1).sum(1))
    return torch.cat(ratios)


def parent_shares(run: Rollout) -> Tensor:
    """`[parents]`: each parent's share of all transitions; KL weights that make the penalty a mean over transitions."""
    edges = sum(len(branch.x_child) for branch in run.branches)
    return torch.cat(
        [torch.full((len(b.x),), len(b.x_child) / len(b.x) / edges, dtype=b.x.dtype) for b in run.branches]
    )


def replay(
    velocity: Velocity,
    run: Rollout,
    coefficients: Tensor,
    *,
    max_batch: int | None = None,
    kl_weights: Tensor | None = None,
    reference: list[Tensor] | None = None,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
) -> tuple[Tensor, Tensor]:
    """Backpropagates sum_e coefficient_e log pi(edge e), evaluating each unique parent once.

    With coefficients d loss / d log pi this is exactly the gradient of the loss, while only one micro-batch's activations
    are alive. Gradients accumulate in the parameters behind `velocity`. If the rollout has kept its graphs, they are used
    in place of `velocity`, all in one micro-batch, and then gone: the next replay evaluates the parents.

    Args:
        coefficients: `[E]`, from `objectives.edge_coefficients`.
        max_batch: the largest number of parents in one call.
        kl_weights, reference: adds sum_p weight_p * mean_d (mu - mu_ref)^2 / (2 std^2) over the parents, weights `[parents]`
            in the order of the branches, with the reference policy's means from `parent_means`.
        backward: called on each micro-batch's scalar (accelerate's `backward`, for instance).

    Returns:
        the replayed log-probabilities `[E]` (with unchanged weights, the stored ones) and the KL of every parent `[parents]`,
        empty without weights.

    Raises:
        ValueError: KL weights without a reference.
    """
    if kl_weights is not None and reference is None:
        raise ValueError("kl_weights need the reference policy's means")
    parts: list[list[Tensor]] = [[] for _ in run.branches]
    offsets = [0]
    for branch in run.branches:
        offsets.append(offsets[-1] + len(branch.x_child))
    kl: list[Tensor] = []
    starts = [0]
    for branch in run.branches:
        starts.append(starts[-1] + len(branch.x))
    kept = [branch.velocity for branch in run.branches if branch.velocity is not None]
    run.drop_graphs()
    for batch in _parent_batches(run, None if kept else max_batch):
        with torch.enable_grad():
            predicted = torch.cat(kept) if kept else velocity(batch.x, batch.sigma)
            mean, std = flow.transition(run.kernel, batch.x, predicted, batch.sigma, batch.sigma_next, run.eta)
            total = mean.new_zeros(())
            row = 0
            for b, first, last in batch.pieces:
                branch = run.branches[b]
                mu, scale = mean[row : row + last - first], std[row : row + last - first]
                row += last - first
                width = len(branch.x)
                children = len(branch.x_child) // width
                # Row c * W + p is child c of parent p.
                x_child = branch.x_child.unflatten(0, (children, width))[:, first:last].flatten(0, 1)
                weights = coefficients[offsets[b] : offsets[b + 1]].view(children, width)[:, first:last]
                log_prob = flow.log_prob(x_child, tile(mu, children), tile(scale, children), run.reduce)
                total = total + (weights.flatten() * log_prob).sum()
                parts[b].append(log_prob.detach().view(children, -1))
                if kl_weights is not None:
                    assert reference is not None
                    shift = ((mu - reference[b][first:last]) ** 2 / (2 * scale**2)).flatten(1).mean(1)
                    kl.append(shift.detach())
                    total = total + (kl_weights[starts[b] + first : starts[b] + last].to(shift) * shift).sum()
            backward(total)
    empty = torch.zeros(0, device=run.leaves.device)
    replayed = torch.cat([torch.cat(rows, 1).flatten() for rows in parts]) if parts else empty
    return replayed, torch.cat(kl) if kl else empty
