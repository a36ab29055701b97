"""Noised leaves: what the methods of noised.py train on, drawn statelessly, leaf by leaf and level by level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Part(NamedTuple):
    """Some rows of a batch's noised leaves, see `NoisedLeaves`.

    rows: which, of all or of a sample. x: `[n, ...latent]`, noised. t: `[n]`. v: `[n, ...latent]`, the true velocity.
    weight: `[n]`.
    """

    rows: slice
    x: Tensor
    t: Tensor
    v: Tensor
    weight: Tensor


class NoisedLeaves:
    """The noised leaves of some prompts, drawn part by part, always the same.

    Row (d * K + l) * P + p is draw d of leaf l of prompt p, or with unequal `shares` of another leaf of that prompt. Noise
    levels are stratified: in every draw, each of K intervals of 0..1 that are equally probable has one row of a prompt. All is
    a pure function of (key, place of the prompt, row, shares), like the noise of a rollout.

    Args:
        leaves: `[K * P, ...latent]`, row l * P + p is leaf l of prompt p. slots: places of the P prompts.
        key: such as (seed, update). draws: D. shift, power, concentration: `noise_shift`, `noise_weight` and
            `level_importance` of the settings.
        shares: `[K, P]`, the share of a prompt's rows that each leaf has on average, positive, with sums of 1. By default all
            have D rows.

    Attributes:
        t: `[D * K * P]`, the noise level of every row. leaf: the row of its leaf in `leaves`.
        importance: what a row must weigh for means over the rows to be means over leaves and even levels.
        weight: importance times the weight of its noise level.
    """

    def __init__(
        self,
        leaves: Tensor,
        slots: Sequence[int],
        key: tuple[int | str, ...],
        draws: int = 1,
        shift: float = 1.0,
        power: float = 0.0,
        concentration: float = 0.0,
        shares: Tensor | None = None,
    ):
        import torch

        from .. import tree

        self.leaves, self.slots, self.count, self._key = leaves, slots, len(slots), key
        each = len(leaves) // self.count
        levels = torch.empty(draws, each, self.count, dtype=torch.float64)
        chosen = torch.arange(each)[:, None].repeat(draws, self.count)
        for p, slot in enumerate(self.slots):
            for d in range(draws):
                order, place = tree.keyed_noise((*self._key, slot, "levels", d), (2, each))(0, ())
                levels[d, :, p] = (order.argsort() + torch.special.ndtr(place.double())) / each
            if shares is not None:
                # Systematic sampling: a leaf has the whole number of rows below or above its share.
                start = tree.keyed_noise((*self._key, slot, "shares"), (1,))(0, ())
                places = (torch.arange(draws * each) + torch.special.ndtr(start.double())) / (draws * each)
                chosen[:, p] = torch.searchsorted(shares[:, p].cpu().double().cumsum(0), places).clamp_max(each - 1)
        levels, importance = concentrated(levels.flatten(), concentration)
        if shares is not None:
            importance = importance / (each * shares.cpu().double().gather(0, chosen)).flatten()
        levels = shift * levels / (1 + (shift - 1) * levels)
        self.leaf = (chosen * self.count + torch.arange(self.count)).flatten()
        self.t = levels.to(self.leaves)
        self.importance = importance.to(self.leaves)
        self.weight = (importance * (1 + power) * (1 - levels) ** power).to(self.leaves)

    def sample(self, count: int) -> Tensor:
        """`count` different rows of every prompt, 1 to D * K, at random: `[count * P]`, on the CPU. Its row i is of prompt
        i % P, and does not depend on which prompts share the batch."""
        import torch

        from .. import tree

        places = len(self.t) // self.count
        orders = [tree.keyed_noise((*self._key, slot, "sample"), (places,))(0, ()).argsort() for slot in self.slots]
        return (torch.stack(orders, 1)[:count] * self.count + torch.arange(self.count)).flatten()

    def parts(self, max_batch: int | None, sample: Tensor | None = None) -> Iterator[Part]:
        """All rows, or those of a `sample`, at most `max_batch` at a time, in whole multiples of the prompts."""
        import torch

        from .. import flow, tree

        total = len(self.t) if sample is None else len(sample)
        size = tree.chunk_size(total, self.count, max_batch)
        for first in range(0, total, size):
            part = slice(first, min(first + size, total))
            rows = part if sample is None else sample[part]
            x0 = self.leaves[self.leaf[rows]]
            eps = torch.stack([self._noise(row) for row in torch.arange(len(self.t))[rows].tolist()]).to(x0)
            t = self.t[rows]
            level = flow.per_row(t, x0)
            yield Part(part, (1 - level) * x0 + level * eps, t, eps - x0, self.weight[rows])

    def leaf_means(self, rows: Tensor) -> Tensor:
        """Means over a leaf's draws of values that have been weighed: `[D * K * P]` -> `[K, P]`, on the CPU, where sums have
        one order."""
        total = rows.new_zeros(len(self.leaves), device="cpu").index_add_(0, self.leaf, rows.cpu())
        return (total / (len(rows) / len(total))).view(-1, self.count)

    def _noise(self, row: int) -> Tensor:
        from .. import tree

        (d, place), p = divmod(row, len(self.leaves)), row % self.count
        key = *self._key, self.slots[p], "noised", d
        return tree.keyed_noise(key, self.leaves.shape[1:])(0, (place // self.count,))


def concentrated(places: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Places in 0..1, uniform, to noise levels of density 1 - share + share * 12 t^2 (1 - t); and the inverse of the density
    there. `[n]` -> `[n]` each.

    On the demo model the gradient's standard deviation has about this form (docs/demo-settings.md, "A short run"): a row at .7
    has three to four times that of one at .3.
    """
    import torch

    if not share:
        return places, torch.ones_like(places)
    low, high = torch.zeros_like(places), torch.ones_like(places)
    # Bisection to the last bit of float64.
    for _ in range(54):
        middle = (low + high) / 2
        below = (1 - share) * middle + share * middle**3 * (4 - 3 * middle) < places
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low, 1 / (1 - share + share * 12 * low**2 * (1 - low))


def mean_square(x: Tensor) -> Tensor:
    """`[n, ...latent]` -> `[n]`."""
    return x.square().flatten(1).mean(1)
