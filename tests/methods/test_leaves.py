"""The draws of noised leaves: levels, leaves and samples of rows."""

from __future__ import annotations

import pytest
import torch

from tests.methods.tiny import COUNT, DRAWS, LEAVES, SLOTS, all_parts, all_rows, set_up
from tmpo_trainer.methods.leaves import NoisedLeaves, concentrated
from tmpo_trainer.methods.noised import advantage_shares


def test_draws() -> None:
    """x_t and v fit together; levels are one in each of K intervals, then shifted; a prompt's do not depend on its batch."""
    made = set_up("awm")
    rows, x, t, v, weight = all_rows(made)
    x0 = made.batch.rollout.leaves.repeat(DRAWS, 1, 1, 1)
    torch.testing.assert_close(x - t.view(-1, 1, 1, 1) * v, x0)
    eps = x0 + v
    assert (
        rows == slice(0, len(x))
        and 0.7 < eps.std() < 1.3
        and len({value.item() for value in eps.flatten()}) == eps.numel()
    )
    level = (t / (2 - t)).view(DRAWS, LEAVES, COUNT)
    for d in range(DRAWS):
        for p in range(COUNT):
            assert sorted((level[d, :, p] * LEAVES).long().tolist()) == list(range(LEAVES))
    assert not torch.equal(level[0], level[1]) and not torch.equal(level[..., 0], level[..., 1])
    part = all_parts(NoisedLeaves(made.batch.rollout.leaves[1::2], SLOTS[1:], (0, 5), DRAWS, 2.0))
    assert torch.equal(part.x, x[1::2]) and torch.equal(part.t, t[1::2])
    assert set(weight.tolist()) == {1.0}
    for shift in (1, 2):
        heavy = all_rows(set_up("awm", noise_weight=2, noise_shift=shift))
        torch.testing.assert_close(heavy.weight, 3 * (1 - heavy.t) ** 2)
        assert (heavy.weight.mean() == pytest.approx(1, abs=0.1)) == (shift == 1)
    made.batch.update = 6
    assert not torch.equal(all_rows(made).t, t)


def test_importance_of_noise_levels() -> None:
    """Levels have the density, and values that weigh its inverse have the mean over even levels, from little to all of it."""
    places = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for share in (0.0, 0.3, 0.95):
        t, weight = concentrated(places, share)
        edges = torch.linspace(0, 1, 11, dtype=torch.float64)
        expected = (1 - share) * edges + share * (4 * edges**3 - 3 * edges**4)
        counted = torch.bucketize(t, edges[1:-1]).bincount() / len(t)
        torch.testing.assert_close(counted.double(), expected.diff(), rtol=0, atol=2e-5)
        for power in range(4):
            assert (weight * t**power).mean() == pytest.approx(1 / (power + 1), rel=1e-3)
    rows = all_rows(set_up("awm", level_importance=0.6, noise_shift=1, noise_weight=1, draws=40))
    density = 0.4 + 0.6 * 12 * rows.t**2 * (1 - rows.t)
    torch.testing.assert_close(rows.weight, 2 * (1 - rows.t) / density)
    assert rows.t.mean() == pytest.approx(0.4 / 2 + 0.6 * 0.6, abs=0.01)
    shifted = all_rows(set_up("awm", level_importance=0.6, draws=40)).t
    torch.testing.assert_close(shifted, 2 * rows.t / (1 + rows.t))


def test_importance_of_leaves() -> None:
    """Every leaf has the rows of its share, or one less or more; weighed, all leaves count alike on average."""
    rewards = torch.tensor([[0.0] * 6 + [3, 1, 1], [0.5] * 9], dtype=torch.float64)
    made = set_up("nft", rewards, leaf_importance=0.7, draws=4)
    sizes = (made.batch.rewards[0] - made.batch.rewards[0].mean()).abs()
    share = 0.3 / LEAVES + 0.7 * sizes / sizes.sum()
    counted = []
    for made.batch.update in range(300):
        noised = made.method.noised(made.batch)
        rows = all_parts(noised)
        torch.testing.assert_close(rows.x - rows.t.view(-1, 1, 1, 1) * rows.v, made.batch.rollout.leaves[noised.leaf])
        leaf, prompt = noised.leaf // COUNT, noised.leaf % COUNT
        assert prompt.tolist() == [0, 1] * (4 * LEAVES)
        counted.append(leaf[prompt == 0].bincount(minlength=LEAVES))
        assert ((counted[-1] - 4 * LEAVES * share).abs() < 1).all()
        # Rewards that are all the same say nothing of a leaf.
        assert leaf[prompt == 1].bincount().tolist() == [4] * LEAVES
        torch.testing.assert_close(noised.importance, torch.where(prompt == 0, 1 / (LEAVES * share[leaf]), 1.0))
    means = torch.stack(counted).double().mean(0) / (4 * LEAVES * share)
    torch.testing.assert_close(means, torch.ones_like(means), rtol=0, atol=0.04)
    # Prompts with the same rewards do not choose alike.
    twins = set_up("nft", rewards[[0, 0]], leaf_importance=0.7, draws=4)
    leaf = (twins.method.noised(twins.batch).leaf // COUNT).view(-1, COUNT)
    assert not torch.equal(leaf[:, 0], leaf[:, 1])
    # The same, whichever prompts share a batch.
    alone = NoisedLeaves(
        made.batch.rollout.leaves[1::2],
        SLOTS[1:],
        (0, 299),
        4,
        2.0,
        shares=advantage_shares(made.batch.rewards[1:], 0.7),
    )
    assert torch.equal(all_parts(alone).x, rows.x[1::2])


def test_a_sample_of_the_rows() -> None:
    """Different rows, other ones in every prompt and update, all alike probable; the same, whichever prompts share a batch."""
    made = set_up("awm")
    counted, same = torch.zeros(LEAVES * DRAWS), 0
    for made.batch.update in range(2000):
        rows = made.method.noised(made.batch).sample(5)
        assert (rows % COUNT).tolist() == [0, 1] * 5
        places = [set((rows[p::COUNT] // COUNT).tolist()) for p in range(COUNT)]
        assert len(places[0]) == len(places[1]) == 5
        same += places[0] == places[1]
        counted[list(places[0])] += 1
    torch.testing.assert_close(counted / 2000, torch.full_like(counted, 5 / 18), rtol=0, atol=0.05)
    assert same < 20
    alone = NoisedLeaves(made.batch.rollout.leaves[1::2], SLOTS[1:], (0, made.batch.update), DRAWS, 2.0)
    assert torch.equal(alone.sample(5), rows[1::COUNT] // COUNT)
