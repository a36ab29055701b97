"""The toy: its mixture, reward and target against closed forms; every arm on a quickly pretrained base."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tmpo_trainer.commands import main
from tmpo_trainer.toy import mixture as toy
from tmpo_trainer.toy import report as toy_report

#: Inside 3 sd of a two-dimensional Gaussian.
INSIDE = 1 - math.exp(-4.5)


@pytest.fixture(scope="module")
def base() -> toy.Network:
    return toy.pretrain(seed=0, steps=800)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(network: toy.Network) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def test_reward_is_a_bump_on_every_rewarded_mode() -> None:
    centres = toy.centres()
    assert toy.reward(centres[[0, 2, 4, 6, 8]]).tolist() == pytest.approx([1.0] * 5)
    # An unrewarded mode's nearest rewarded one is its neighbour on the ring.
    neighbour = (2 * toy.RADIUS * math.sin(math.pi / 8)) ** 2
    assert toy.reward(centres[[1, 3, 5, 7]]).tolist() == pytest.approx([math.exp(-neighbour / 0.72)] * 4, rel=1e-4)
    assert toy.reward(centres[:1] + torch.tensor([[0.0, 0.6]])).item() == pytest.approx(math.exp(-0.5))


def test_mixture_has_its_masses_and_mean_reward() -> None:
    n = 200_000
    x = toy.sample_mixture(n, generator())
    expected = [INSIDE / 8.1] * 8 + [0.1 * INSIDE / 8.1, 1 - INSIDE]
    masses = toy.mode_masses(x)
    for found, p in zip(masses.tolist(), expected, strict=True):
        assert abs(found - p) < 4 * math.sqrt(p * (1 - p) / n)
    # E exp(-r^2 / 2 w^2) under N(0, sd^2 I) is w^2 / (w^2 + sd^2); a neighbour adds less than 1e-4.
    r = toy.reward(x)
    mean = 4.1 / 8.1 * 0.36 / (0.36 + 0.35**2)
    assert abs(r.mean().item() - mean) < 4 * r.std().item() / math.sqrt(n) + 1e-4


def test_target_is_the_mixture_tilted_by_its_reward() -> None:
    n = 200_000
    x = toy.sample_mixture(n, generator())
    masses = toy.mode_masses(x, toy.tilt(toy.reward(x)))
    assert masses.sum().item() == pytest.approx(1, abs=1e-4)
    # E exp(beta R) of a rewarded mode, radially: over the plane and inside the disc.
    r = torch.linspace(0, 8 * toy.SD, 20_001, dtype=torch.float64)
    density = r / toy.SD**2 * (-(r**2) / (2 * toy.SD**2)).exp() * (2 * (-(r**2) / 0.72).exp()).exp()
    whole = torch.trapezoid(density, r).item()
    disc = torch.trapezoid(density[r <= toy.MODE_RADIUS], r[r <= toy.MODE_RADIUS]).item()
    z = 4.1 * whole + 4
    expected = [disc / z if k % 2 == 0 else INSIDE / z for k in range(8)] + [0.1 * disc / z]
    assert masses[:9].tolist() == pytest.approx(expected, abs=0.003)


def test_weights_of_the_tilt() -> None:
    weight = toy.tilt(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), strength=2.0)
    assert weight[0].tolist() == pytest.approx([1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))])
    assert weight[1].tolist() == [0.5, 0.5]


def test_effective_modes_count_rewarded_ones_alone() -> None:
    masses = torch.full((10,), 0.1)
    assert toy.effective_modes(masses) == pytest.approx(5)
    masses[[0, 2, 4, 8]] = 0
    assert toy.effective_modes(masses) == pytest.approx(1)
    masses[6] = 0
    assert toy.effective_modes(masses) == 0


def test_kl_has_a_pseudo_count() -> None:
    p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert toy.kl(p, p, 10) == 0
    # Counts (10, 0) and (0, 10), plus 1 each.
    assert toy.kl(p, q, 10) == pytest.approx(10 / 12 * math.log(11))


def test_pretrained_base_covers_every_mode(base: toy.Network) -> None:
    masses = toy.mode_masses(toy.sample(base, 4000, seed=1))
    assert masses[:8].min() > 0.05 and masses[8] > 0 and masses[-1] < 0.25


def test_target_of_rollouts_sums_to_one(base: toy.Network) -> None:
    target = toy.make_target(base, toy.sample(base, 4000, seed=1))
    for masses in (target.masses, target.per_root, target.pooled):
        assert masses.sum().item() == pytest.approx(1, abs=1e-4)
    # More freedom, more reward: tilting all roots together beats tilting each, which beats the base.
    leaves, rewards = toy.root_rollouts(base, seed=1)
    pooled = (toy.tilt(rewards.flatten()) * rewards.flatten()).sum().item()
    assert rewards.mean().item() < target.per_root_reward < pooled
    assert len(leaves) == rewards.numel() == toy.ROOTS * toy.CHILDREN**2


@pytest.mark.parametrize("arm", (*toy.ARMS, toy.CONTROLS[0]), ids=lambda arm: arm.name)
def test_every_arm_raises_the_reward(base: toy.Network, arm: toy.Arm) -> None:
    network = toy.train(arm, base, seed=0, updates=30)
    gain = toy.reward(toy.sample(network, 2000, seed=1)) - toy.reward(toy.sample(base, 2000, seed=1))
    assert gain.mean() > 5 * gain.std() / math.sqrt(len(gain))


@pytest.mark.parametrize("arm", toy.NOISED, ids=lambda arm: arm.name)
def test_methods_on_noised_leaves_raise_the_reward(base: toy.Network, arm: toy.Arm) -> None:
    # Without an anchor, evidence that leaves differ in by more than in reward leads first.
    updates = 12 if arm.name != "Softmax-TB on leaves" else 40
    gain = toy.reward(toy.sample(toy.train(arm, base, 0, updates), 2000, seed=1))
    gain = gain - toy.reward(toy.sample(base, 2000, seed=1))
    assert gain.mean() > 3 * gain.std() / math.sqrt(len(gain))


def test_training_is_a_function_of_the_seed(base: toy.Network) -> None:
    before = weights(base)
    for arm in (toy.ARMS[1], toy.ARMS[3], toy.CONTROLS[0], toy.NOISED[2]):
        first, again, other = (weights(toy.train(arm, base, seed, updates=2)) for seed in (3, 3, 4))
        assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(weights(base), before)


def test_the_anchor_starts_where_no_log_probability_does(base: toy.Network) -> None:
    """At the base's own weights the path ratios to the base are 1."""
    anchored = toy.ARMS[3]
    uniform = dataclasses.replace(anchored, anchor="uniform")
    ends = [weights(toy.train(arm, base, seed=0, updates=1)) for arm in (anchored, uniform)]
    assert torch.allclose(*ends, atol=1e-5)
    longer = [weights(toy.train(arm, base, seed=0, updates=2)) for arm in (anchored, uniform)]
    assert (longer[0] - longer[1]).abs().max() > 1e-4


def test_the_command(
    base: toy.Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(toy_report, "pretrain", lambda seed: base)
    for module, name in ((toy, "SAMPLES"), (toy_report, "SAMPLES"), (toy_report, "TARGET_SAMPLES")):
        monkeypatch.setattr(module, name, 2000)
    folder = tmp_path / "made" / "out"
    for name in ("CURVE_SAMPLES", "ROOTS"):
        monkeypatch.setattr(toy, name, 100)
    flags = f"--seeds 2 --updates 2 --workers 1 --output-dir {folder}".split()
    assert main.main(["toy", *flags]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == (folder / "toy.md").read_text().strip() and "anchored Softmax-TB, seed 1" in err
    content = json.loads((folder / "toy.json").read_text())
    assert list(content["arms"]) == [arm.name for arm in toy.ARMS]
    for runs in content["arms"].values():
        assert [run["seed"] for run in runs] == [0, 1]
        assert all(sum(run["masses"]) == pytest.approx(1, abs=1e-3) for run in runs)
        assert [point["update"] for point in runs[0]["curve"]] == [0, 1, 2]
        assert runs[0]["masses"] != runs[1]["masses"]
    assert (folder / "toy.png").read_bytes().startswith(b"\x89PNG")


def test_processes_do_not_change_the_figures(base: toy.Network) -> None:
    target = toy.make_target(base, toy.sample(base, 2000, seed=1))
    jobs = [(toy.ARMS[3], base, target, 0, 1, toy.LEARNING_RATE)]
    (here, x), (there, y) = (next(toy_report.train_all(jobs, workers)) for workers in (1, 2))
    assert torch.equal(x, y)
    assert {**here, "seconds": 0} == {**there, "seconds": 0}


@pytest.mark.parametrize("arm", toy.CONTROLS, ids=lambda arm: arm.name)
def test_every_control_trains(base: toy.Network, arm: toy.Arm) -> None:
    network = toy.train(arm, base, seed=0, updates=1)
    assert torch.isfinite(weights(network)).all() and not torch.equal(weights(network), weights(base))


def test_a_gradient_that_is_not_finite_is_an_error(base: toy.Network) -> None:
    summed = next(arm for arm in toy.CONTROLS if arm.reduce == "sum" and arm.inner_updates > 1)
    with pytest.raises(
        ValueError, match=f"{summed.name}, seed 0: the gradient of update 1 is .* smaller --learning-rate"
    ):
        toy.train(summed, base, seed=0, updates=1, learning_rate=0.9)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--seeds 0", "--seeds 0: must be at least 1"),
        ("--updates -3", "--updates -3: must be at least 1"),
        ("--workers 0", "--workers 0: must be at least 1"),
        ("--seeds many", "argument --seeds: invalid int value: 'many'"),
        ("--learning-rate 0", "--learning-rate 0.0: must be between 0 and 1"),
        ("--seed 1", "unrecognized arguments: --seed 1"),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], flags: str, told: str) -> None:
    assert main.main(["toy", *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"tmpo_trainer: {told}\n"


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main.main(["toy", "--output-dir", str(tmp_path / "file")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("tmpo_trainer: ") and err.count("\n") == 1
