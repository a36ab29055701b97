"""The anchor on data: its loss written out, its pictures, and what it costs beside a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.tiny import COUNT, SHAPE, SIGMAS, SLOTS, all_parts, set_up
from tmpo_trainer import methods, tree
from tmpo_trainer.methods import data
from tmpo_trainer.methods.leaves import NoisedLeaves

Make = Callable[..., Any]


def test_the_anchor_on_data_is_flow_matching_on_pictures_of_the_pretrained_model() -> None:
    """Written out: its Euler steps, noise and loss; the same pictures at every optimiser step, others in the next update."""
    made = set_up("awm", data_weight=0.6, data_images=3, rollout_steps=6, noise_weight=1)
    x = []
    for image in range(3):
        for slot in SLOTS:
            x.append(tree.keyed_noise((0, 5, slot, "data"), SHAPE)(0, (image,)))
    x = torch.stack(x).double()
    with torch.no_grad(), made.weights.pretrained():
        for s, after in zip(SIGMAS.double()[:-1], SIGMAS.double()[1:], strict=True):
            x = x - (s - after) * made.transformer(x, s.expand(len(x)))
    rows = all_parts(NoisedLeaves(x, SLOTS, (0, 5, "data"), 1, 1.0))
    error = (made.transformer(rows.x, rows.t) - rows.v).square().mean((1, 2, 3))
    (expected,) = torch.autograd.grad(0.6 * error.mean() * COUNT / 4, made.transformer.adapter)
    for _ in range(2):
        made.transformer.zero_grad()
        figures = data.backward(made.method, made.batch, made.network)
        torch.testing.assert_close(made.transformer.adapter.grad, expected, rtol=1e-6, atol=1e-9)
    assert figures["data_loss"] == pytest.approx([error[p::COUNT].mean().item() for p in range(COUNT)], rel=1e-6)
    drawn = made.batch.own.pop("data")
    made.batch.update = 6
    data.backward(made.method, made.batch, made.network)
    assert not torch.equal(made.batch.own["data"], drawn)


def test_the_anchor_on_pictures_with_captions() -> None:
    """Written out: all pictures come in turn, each with the velocity for its own caption, also in parts."""
    made = set_up("awm", data_weight=0.6, data_images=2, data_folder="pictures", noise_weight=1)
    latents = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # Captions are factors on the velocity.
    captions = [str(number) for number in range(2, 7)]

    def velocity(chosen: Sequence[str]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, sigma: (
            torch.tensor([float(c) for c in chosen])[:, None, None, None] * (x @ made.transformer.adapter[:2, :2])
        )

    examples = data.Examples(latents, captions, velocity, 4)
    order = [examples.chosen(update, [0, 1, 2, 3], 2, 0) for update in range(5)]
    counts = torch.tensor(order).flatten().bincount()
    assert counts.tolist() == [8] * 5 and order[0] != order[1]
    chosen = examples.chosen(5, SLOTS, 2, 0)
    # A place's pictures do not depend on what else is in the batch.
    assert chosen[1::COUNT] == examples.chosen(5, SLOTS[1:], 2, 0)
    rows = all_parts(NoisedLeaves(latents[chosen], SLOTS, (0, 5, "data"), 1, 1.0))
    error = (velocity([captions[i] for i in chosen])(rows.x, rows.t) - rows.v).square().mean((1, 2, 3))
    (expected,) = torch.autograd.grad(0.6 * error.mean() * COUNT / 4, made.transformer.adapter)
    for most in (None, 2):
        made.network.max_batch = most
        made.transformer.zero_grad()
        figures = data.backward(made.method, made.batch, made.network, examples)
        torch.testing.assert_close(made.transformer.adapter.grad, expected, rtol=1e-6, atol=1e-9)
        assert figures["data_loss"] == pytest.approx([error[p::COUNT].mean().item() for p in range(COUNT)], rel=1e-6)
    assert dict(made.network.evaluated) == {"replay": 8}
    assert data.evaluations(made.method) == {"reference": 0, "replay": 2}


@pytest.mark.parametrize("method", ["tmpo", "awm"])
def test_the_anchor_on_data_goes_with_any_method(make: Make, method: str) -> None:
    """Its network calls are counted, as they are promised; with weight 0 it is not there."""
    trainer = make(method, data_weight=0.5, data_images=2, inner_updates=2)
    plan = trainer.method.shape(0)
    promised, own = methods.evaluations(trainer.method, plan), trainer.method.evaluations(plan)
    assert (promised["reference"] - own["reference"], promised["replay"] - own["replay"]) == (12, 4)
    metrics = trainer.update()
    assert {phase: metrics.get(f"evaluations/{phase}", 0) for phase in promised} == promised
    assert metrics["data_loss"] > 0 and "data_loss" not in make(method).update()
