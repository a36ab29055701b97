"""TMPO and its variants: their gradients written out, their trees, their network calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tmpo_trainer.methods.base import Method

Check = Callable[..., None]
Loss = Callable[[Any, Callable[..., Tensor]], Tensor]
VARIANTS = ("tmpo-beta-1", "tmpo-step-balance", "tmpo-no-tree", "tmpo-fixed-branching")


def z_scored(prompt: Any) -> Tensor:
    return prompt.z


def softmax_tb(
    beta: float, baseline: str = "none", anchor: float | None = None, reward: Callable[[Any], Tensor] = z_scored
) -> Loss:
    """Algorithm 4, path by path: log softmax(beta R) - log softmax(log pi), or the anchor's log ratio in its place."""

    def loss(prompt: Any, clipped: Callable[..., Tensor]) -> Tensor:
        leaves, steps = range(len(prompt.leaves)), prompt.steps
        # Where a leaf's path passes: its row at every step.
        rows = [[leaf % len(step.new) for step in steps] for leaf in leaves]

        def along(values: list[Tensor]) -> list[Tensor]:
            return [torch.stack([v[row] for v, row in zip(values, path, strict=True)]).sum() for path in rows]

        policy = torch.stack(along([step.new if anchor is None else anchor * step.delta for step in steps])).detach()
        advantage = (beta * reward(prompt)).log_softmax(0) - policy.log_softmax(0)
        ratios = [step.new - step.old + step.shift for step in steps]
        if baseline != "siblings":
            centre = advantage.mean() if baseline == "group" else 0.0
            return -torch.stack([clipped(r, a - centre) for r, a in zip(along(ratios), advantage, strict=True)]).mean()
        total = torch.zeros(())
        for level, step in enumerate(steps):
            below = [
                torch.stack([advantage[leaf] for leaf in leaves if rows[leaf][level] == row]).mean()
                for row in range(len(step.new))
            ]
            terms = []
            for row, ratio in enumerate(ratios[level]):
                siblings = below[row % step.parents :: step.parents]
                terms.append(clipped(ratio, below[row] - torch.stack(siblings).mean()))
            total = total - torch.stack(terms).mean()
        return total

    return loss


def step_balance(beta: float) -> Loss:
    """Balance among siblings: the mean of exp(beta R) below each, over the policy."""

    def loss(prompt: Any, clipped: Callable[..., Tensor]) -> Tensor:
        flow, total = (beta * prompt.z).exp(), torch.zeros(())
        for step in reversed(prompt.steps):
            # Row c * parents + p is child c of parent p.
            siblings, policy = flow.view(-1, step.parents), step.new.detach().view(-1, step.parents)
            advantage = (siblings.log().log_softmax(0) - policy.log_softmax(0)).flatten()
            total = total - clipped(step.new - step.old + step.shift, advantage).mean()
            flow = siblings.mean(0)
        return total

    return loss


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (softmax_tb(0.8), {}),
        (softmax_tb(0.8, "group"), {"baseline": "group", "guidance": 3.5}),
        (softmax_tb(0.8, "siblings"), {"baseline": "siblings"}),
        # Halfway through the warm-up from 0.8 to 2.
        (softmax_tb(1.4, "siblings"), {"baseline": "siblings", "kl_weight": 0.5, "update": 75}),
        (softmax_tb(0.8), {"kl_weight": 0.5, "kernel": "flow_sde"}),
        (softmax_tb(0.8, anchor=0.1), {"anchor": "ref", "anchor_weight": 0.1, "kl_weight": 0.5, "replay_batch": 5}),
        (softmax_tb(0.8, "group", anchor=0.1), {"anchor": "ref", "anchor_weight": 0.1, "baseline": "group"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_gradient_is_that_of_the_loss_written_out(check_gradient: Check, loss: Loss, settings: dict[str, Any]) -> None:
    check_gradient("tmpo", loss, **{"kernel": "cps", **settings})


def cosine_distances(prompt: Any) -> Tensor:
    """Of the features of `conftest.Corner`, with infinity on the diagonal."""
    corner = torch.nn.functional.normalize(prompt.leaves[:, :, 0, 0], dim=1)
    return (1 - corner @ corner.T).fill_diagonal_(torch.inf)


def with_distance(prompt: Any) -> Tensor:
    distance = cosine_distances(prompt).fill_diagonal_(0).sum(1)
    return prompt.z + 0.3 * (distance - distance.mean()) / distance.std(correction=0)


def with_rarity(prompt: Any) -> Tensor:
    nearest = cosine_distances(prompt).min(1).values
    return torch.where(prompt.z > 0, prompt.z * (1 + 0.3 * (nearest / nearest.mean() - 1)), prompt.z)


@pytest.mark.parametrize(("kind", "reward"), [("distance", with_distance), ("rarity", with_rarity)])
def test_diversity_is_a_part_of_the_reward(check_gradient: Check, kind: str, reward: Callable[[Any], Tensor]) -> None:
    loss = softmax_tb(0.8, "siblings", reward=reward)
    check_gradient("tmpo", loss, baseline="siblings", diversity=kind, diversity_weight=0.3)


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        ("tmpo-beta-1", softmax_tb(1.0)),
        ("tmpo-step-balance", step_balance(0.8)),
        ("tmpo-no-tree", softmax_tb(0.8)),
        ("tmpo-fixed-branching", softmax_tb(0.8)),
    ],
)
def test_gradients_of_variants(check_gradient: Check, method: str, loss: Loss) -> None:
    check_gradient(method, loss, kl_weight=0.5)


@pytest.mark.parametrize("method", ["tmpo-beta-1", "tmpo-fixed-branching"])
def test_variants_with_paths_of_a_tree_take_an_anchor(check_gradient: Check, method: str) -> None:
    beta = 1.0 if method == "tmpo-beta-1" else 0.8
    check_gradient(method, softmax_tb(beta, anchor=0.1), anchor="ref", anchor_weight=0.1)


@pytest.mark.parametrize("method", VARIANTS)
def test_batches_change_nothing(check_batches: Check, method: str) -> None:
    check_batches(method)


def test_batches_change_nothing_with_an_anchor(check_batches: Check) -> None:
    check_batches("tmpo", anchor="ref", anchor_weight=0.1, kernel="cps", guidance=3.5)


# -- plans and what they cost --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rollout", "replay"),
    [
        ("tmpo-beta-1", 96, 12),
        ("tmpo-step-balance", 96, 12),
        ("tmpo-fixed-branching", 96, 12),
        ("tmpo-no-tree", 162, 54),
    ],
)
def test_network_calls(check_calls: Check, method: str, rollout: int, replay: int) -> None:
    check_calls(method, rollout, replay)


@pytest.mark.parametrize(
    ("method", "settings", "update", "rollout", "replay", "reference"),
    [
        ("tmpo", {}, 0, 96, 12, 0),
        ("tmpo", {}, 10**6, 54, 12, 0),
        ("tmpo", {"anchor": "ref"}, 0, 96, 12, 12),
        ("tmpo-beta-1", {}, 0, 96, 12, 0),
        ("tmpo-step-balance", {}, 0, 96, 12, 0),
        ("tmpo-fixed-branching", {}, 10**6, 96, 12, 0),
        ("tmpo-no-tree", {}, 0, 162, 54, 0),
    ],
)
def test_network_evaluations(
    check_evaluations: Check,
    method: str,
    settings: dict[str, Any],
    update: int,
    rollout: int,
    replay: int,
    reference: int,
) -> None:
    check_evaluations(method, rollout, replay, reference, update, **settings)


def test_no_tree_has_the_steps_of_the_tree(planned: Callable[..., Method]) -> None:
    with_tree, without = planned("tmpo", kappa=6), planned("tmpo-no-tree", kappa=6)
    for update in range(50):
        one, other = with_tree.plan(update), without.plan(update)
        assert list(one.fanout) == list(other.fanout) and set(other.fanout.values()) == {1}
        assert one.leaves == other.leaves == other.roots == 27


def test_fixed_branching_stays_at_the_early_steps(planned: Callable[..., Method]) -> None:
    plans = [planned("tmpo-fixed-branching", kappa=6, branch_early=(1, 2, 4)).plan(u) for u in (0, 250, 499)]
    assert [plan.fanout for plan in plans] == [{2: 3, 4: 3}] * 3 and {plan.roots for plan in plans} == {3}


def test_beta(planned: Callable[..., Method]) -> None:
    def betas(method: str) -> list[float]:
        return [planned(method).about(update)["beta"] for update in (0, 75, 150, 500)]

    assert betas("tmpo") == pytest.approx([0.8, 1.4, 2, 2]) and betas("tmpo-beta-1") == [1, 1, 1, 1]
    assert planned("tmpo").metadata() == {"beta": "0.8 to 2.0"}


# -- what makes no sense -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "tmpo-no-tree", "anchor": "ref"}, "anchor ref needs paths of a tree: not with tmpo-no-tree"),
        ({"method": "tmpo-step-balance", "anchor": "ref"}, "anchor ref needs paths of a tree"),
        ({"method": "tmpo-no-tree", "baseline": "siblings"}, "chains have no siblings"),
        ({"method": "tmpo-step-balance", "baseline": "group"}, "no advantage per path"),
        ({"tree": False, "baseline": "siblings"}, "chains have no siblings"),
        ({"auxiliary": ("sharpness",)}, "auxiliary sharpness belongs to method gardo, not to tmpo"),
        (
            {"method": "tmpo-no-tree", "balance": "subtree"},
            "balance subtree with tmpo-no-tree: chains have no siblings",
        ),
        ({"branch_late": (1, 3)}, "branch_early and branch_late differ in number"),
        ({"branch_early": (1, 2, 6)}, "branch_early .* must stay below rollout_steps 6"),
        ({"branch_early": (1,), "branch_late": (2,)}, "leaves nothing to train"),
        ({"branch_late": (1, 5, 6)}, "branch_late .* must stay below rollout_steps 6"),
        ({"eta": 1.5}, "eta 1.5 is too large for kernel cps"),
        ({"diversity": "rarity", "diversity_weight": 1.5}, "diversity_weight 1.5 with diversity rarity: at most 1"),
    ],
    ids=str,
)
def test_combinations_that_make_no_sense(refused: Check, settings: dict[str, Any], message: str) -> None:
    refused(message, **settings)


def test_fixed_branching_does_not_ask_for_later_steps(planned: Callable[..., Any]) -> None:
    early = planned("tmpo", schedule="fixed", rollout_steps=4, branch_early=(1, 2), branch_late=(1, 3, 5))
    assert list(early.plan(999).fanout) == [2]


def test_late_branch_steps_are_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"branch_late \[1, 3, 5\]: step 5 of 6 ends at sigma 0.0089"):
        make("tmpo", branch_late=(1, 3, 5))
