"""GARDO: its gradient written out, its gate, the copy it compares with, what it keeps between updates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tmpo_trainer.methods import gardo
from tmpo_trainer.methods.batch import PromptBatch
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.training import checkpoint
from tmpo_trainer.training.loop import Trainer

Check = Callable[..., None]
Make = Callable[..., Any]


def loss(prompt: Any, clipped: Callable[..., Tensor]) -> Tensor:
    """R - mean of the end of a chain, at each of its steps; above the mean times the rarity of its features."""
    features = torch.nn.functional.normalize(prompt.leaves[:, :, 0, 0], dim=1)
    leaves = range(len(features))
    nearest = torch.stack([min(1 - features[i] @ features[j] for j in leaves if j != i) for i in leaves])
    centred = prompt.rewards - prompt.rewards.mean()
    advantage = torch.where(centred >= 0, centred * nearest / nearest.mean(), centred)
    return -torch.cat([clipped(step.new - step.old, advantage) for step in prompt.steps]).mean()


def held_leaves(trainer: Trainer, batch: PromptBatch) -> Tensor:
    """Lets the gate choose: `[prompts, K]`."""
    method: Any = trainer.method
    method.gate.share = 0.2
    figures = method.judge([batch], trainer.processes)
    held = batch.own["held"]
    assert 2 <= held.sum() < len(held) / 5 and figures == {"gated": [pytest.approx(held.sum().item() / len(held))]}
    # Row l * P + p is leaf l of prompt p.
    return held.view(-1, batch.count).T


def test_gradient_is_that_of_the_loss_written_out(check_gradient: Check) -> None:
    """The penalty is a mean over the held samples alone."""
    check_gradient("gardo", loss, kl_scale=lambda step: step.dt, begun=held_leaves)


def test_batches_change_nothing(check_batches: Check) -> None:
    check_batches("gardo")


def test_network_calls(check_calls: Check, check_evaluations: Check) -> None:
    check_calls("gardo", 162, 27 * 4)
    check_evaluations("gardo", 162, 27 * 5, 27 * 5, kl_weight=0.04, auxiliary=("imagereward",))


# -- in training ---------------------------------------------------------------------------------------------------


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}


def test_it_holds_what_the_reward_alone_likes(make: Make) -> None:
    trainer = make("gardo")
    metrics = trainer.update()
    # 54 samples, ranked together; a tenth of the suspicious half.
    assert 1 / 54 <= metrics["gated"] <= 6 / 54
    assert metrics["kl_reference"] == 0, "the reference is still the policy itself"
    assert trainer.update()["kl_reference"] > 0


def test_it_compares_with_its_copy_and_renews_it(make: Make) -> None:
    trainer = make("gardo", learning_rate=1e-3)
    method, lora = trainer.method, trainer.weights.lora
    start = trainer.weights.copy()
    for _ in range(3):
        method.gate.kl = 0.0
        trainer.update()
    assert all(torch.equal(value, method.copy[name]) for name, value in start.items())
    # The penalty is measured against the copy, the report against the pretrained model.
    x, sigma = torch.randn(1, *trainer.roller.latent_shape), torch.full((1,), 0.5)
    velocity = trainer.backbone.velocity(["a red circle"], 1.0)
    with torch.no_grad():
        now = velocity(x, sigma)
        with method.reference():
            held = velocity(x, sigma)
        with trainer.weights.pretrained():
            base = velocity(x, sigma)
    assert torch.equal(held, base) and not torch.equal(now, base)
    method.gate.kl = 2 * gardo.KL_LIMIT
    before = {name: value.detach().clone() for name, value in lora.items()}
    trainer.update()
    assert all(torch.equal(value, method.copy[name]) for name, value in before.items())
    assert method.gate.age == 1


def test_it_resumes_to_the_bit(make: Make) -> None:
    whole, first = make("gardo"), make("gardo")
    for _ in range(6):
        expected = whole.update()
    for _ in range(3):
        first.update()
    path = first.save()
    assert (path / checkpoint.TENSORS).is_file()
    state = json.loads((path / "state.json").read_text())
    assert state["method"] == "gardo" and state["method_state"] == first.method.state()
    second = make("gardo")
    second.resume(path)
    for _ in range(3):
        got = second.update()
    for name, value in whole.weights.lora.items():
        assert torch.equal(value, second.weights.lora[name])
        assert torch.equal(whole.method.copy[name], second.method.copy[name])
    assert whole.method.state() == second.method.state() and same(got, expected)
    (path / checkpoint.TENSORS).unlink()
    with pytest.raises(ConfigError, match="lacks the copy of the adapter"):
        make("gardo").resume(path)
    with pytest.raises(ConfigError, match="of another method"):
        second.resume(make("flow-grpo").save())
    with pytest.raises(ConfigError, match="of another method"):
        make("mix-grpo").resume(make("flow-grpo").save())


def test_a_checkpoint_of_an_earlier_version_goes_on(make: Make, tmp_path: Path) -> None:
    """There the gate's state was `gate`, its copy a file of another name, and no method was named."""
    whole = make("gardo")
    for _ in range(3):
        whole.update()
    old = shutil.copytree(whole.save(), tmp_path / "old")
    expected = whole.update()
    state = json.loads((old / "state.json").read_text())
    state["gate"] = state.pop("method_state")
    del state["method"]
    (old / "state.json").write_text(json.dumps(state))
    (old / checkpoint.TENSORS).rename(old / checkpoint.OLD_TENSORS)
    again = make("gardo")
    again.resume(old)
    assert again.done == 3 and again.method.state() == state["gate"] and state["gate"]["memory"]
    assert same(again.update(), expected) and again.method.state() == whole.method.state()
    # Other methods kept nothing, and said nothing.
    plain = make("flow-grpo")
    plain.update()
    path = plain.save()
    state = json.loads((path / "state.json").read_text())
    del state["method"], state["method_state"]
    (path / "state.json").write_text(json.dumps(state))
    make("flow-grpo").resume(path)
    with pytest.raises(ConfigError, match="of another method than gardo"):
        again.resume(path)


def test_its_state_is_saved_as_of_the_last_whole_update(make: Make) -> None:
    """An update that fails has moved the gate, and will be done again."""
    whole, broken = make("gardo"), make("gardo")
    for _ in range(5):
        expected = whole.update()
    reporter: Any = SimpleNamespace(update=lambda metrics: None)
    score, calls = broken.judges.rewards[0].score, 0

    def fail(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise ValueError("no more")
        return score(*arguments)

    broken.judges.rewards[0].score = fail
    with pytest.raises(ValueError, match="no more"):
        broken.train(reporter)
    again = make("gardo")
    again.resume(checkpoint.checkpoints(broken.run)[-1])
    assert again.done == 3
    for _ in range(2):
        got = again.update()
    assert again.method.state() == whole.method.state() and same(got, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_weight": 0.04}, "needs auxiliary scorers"),
        ({"auxiliary": ("sharpness",)}, "kl_weight above 0"),
        ({"kl_weight": 0.04, "auxiliary": ("shapes",)}, "name each once, and others than the reward"),
        ({"kl_weight": 0.04, "auxiliary": ("ocr", "ocr")}, "name each once, and others than the reward"),
        ({"kl_weight": 0.04, "auxiliary": ("ocr",), "anchor": "ref"}, "anchor ref belongs to method tmpo"),
    ],
    ids=str,
)
def test_combinations_that_make_no_sense(refused: Check, settings: dict[str, Any], message: str) -> None:
    refused(message, method="gardo", **settings)


# -- the gate ------------------------------------------------------------------------------------------------------


def test_win_rate() -> None:
    np.testing.assert_allclose(gardo.win_rate(np.array([3.0, 1, 2, 1])), [3.5 / 4, 1 / 4, 2.5 / 4, 1 / 4])
    np.testing.assert_allclose(gardo.win_rate(np.zeros(5)), [0.5] * 5)


def test_gate_holds_the_most_suspicious() -> None:
    gate = gardo.Gate()
    reward = np.arange(100.0)
    # The reward likes the last ones, both other scores the first.
    other = reward[::-1].copy()
    held = gate.held(reward, [other, other])
    # Half are suspicious; a tenth of them is held.
    assert held.sum() == 5 and held[-5:].all()
    assert not gardo.Gate().held(reward, [reward, 10 * reward]).any()


def test_gate_widens_when_suspicion_grows_and_narrows_when_it_falls() -> None:
    gate, reward = gardo.Gate(), np.arange(100.0)

    def feed(strength: float) -> float:
        # Rank correlation falls with strength.
        noise = np.random.default_rng(0).permutation(100)
        gate.held(reward, [reward * (1 - strength) + noise * strength])
        return gate.share

    assert feed(0.5) == gardo.SHARE, "nothing to compare with yet"
    assert feed(0.8) == pytest.approx(0.11) and feed(0.6) == pytest.approx(0.11)
    assert feed(0.3) == pytest.approx(0.099)
    for strength in np.linspace(0.8, 1, 30):
        feed(strength)
    assert gate.share <= gardo.SHARE_MAX and len(gate.memory) == gardo.MEMORY


def test_reference_is_renewed_by_kl_or_age() -> None:
    gate = gardo.Gate()
    # Every 15 updates, the first time when 15 are done.
    assert [update for update in range(50) if gate.renew()] == [15, 30, 45]
    gate.kl = 1.01 * gardo.KL_LIMIT
    assert gate.renew() and gate.kl == 0 and not gate.renew()
    other = gardo.Gate()
    other.load(gate.state())
    assert other.state() == gate.state()
