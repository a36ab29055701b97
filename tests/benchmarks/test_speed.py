"""The comparison at tiny size: exact counts, the per-leaf gradient, what a record replays, memory, growth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import arms, growth, measuring, models, per_leaf, speed
from benchmarks.__main__ import main
from tmpo_trainer import objectives, tree
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.settings.presets import make_config
from tmpo_trainer.training.loop import Trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize(("steps", "forwards", "backwards"), [((1, 2, 3), 96, 54), ((1, 3, 4), 72, 54)])
def test_the_per_leaf_gradient_is_the_trainers(
    make_trainer: Callable[..., Trainer],
    shake: Any,
    gradient: Any,
    steps: tuple[int, ...],
    forwards: int,
    backwards: int,
) -> None:
    own = {"branch_early": steps, "branch_late": steps, "kernel": "flow_sde", "max_grad_norm": 1e9}
    trainer = make_trainer(learning_rate=0.0, schedule="fixed", **own)
    shake(trainer)
    rewards: list[Tensor] = []
    backward = trainer.method.backward

    def keeping(batch: Any, network: Any, inner: int) -> Any:
        rewards.extend(batch.rewards)
        return backward(batch, network, inner)

    trainer.method.backward = keeping
    trainer.update()
    expected = gradient(trainer)
    single = per_leaf.PerLeaf(trainer)
    single.update(0, measuring.Phases(CPU), rewards)
    assert per_leaf.relative_error([gradient(trainer)], [expected]) < 1e-5
    # Two prompts.
    assert (single.forwards, single.backwards) == (2 * forwards, 2 * backwards)


def test_the_per_leaf_gradient_in_float64() -> None:
    """Of a small network, where rounding hides nothing."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).double()
    parameters = list(network.parameters())

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return network(torch.cat([x, sigma[:, None]], 1))

    plain = tree.keyed_noise((0,), (4,))

    def noise(step: int, path: tree.NodePath) -> Tensor:
        return plain(step, path).double()

    sigmas, plan = [1, 0.9, 0.75, 0.6, 0.4, 0.2, 0], tree.TreePlan.tmpo(6, (1, 3, 4), 3)
    config = make_config([("settings", {"branch_late": (1, 3, 4)})])
    how: Any = {"kernel": "flow_sde", "eta": 0.7, "reduce": "mean"}
    leaves = per_leaf.rollout(velocity, noise, sigmas, plan, **how)
    run = tree.rollout(velocity, noise, sigmas, plan, **how)
    assert torch.cat([leaf.x for leaf in leaves]).allclose(run.leaves, atol=1e-12)

    rewards = torch.randn(27).double()
    weights = per_leaf.coefficients(leaves, rewards, 2.0, config)
    per_leaf.replay(velocity, leaves, weights, **how)
    found = [parameter.grad for parameter in parameters]
    network.zero_grad()
    index, log_probs = plan.index(), run.log_probs.clone().requires_grad_()
    transitions = objectives.Transitions(
        log_probs, run.log_probs, torch.zeros_like(log_probs), index.leaf_edges, index.edge_parent
    )
    loss, _ = objectives.softmax_tb_loss(transitions, rewards, 2.0, config.clip)
    tree.replay(velocity, run, objectives.edge_coefficients(loss, log_probs))
    assert per_leaf.relative_error(found, [parameter.grad for parameter in parameters]) < 1e-11


def test_the_per_leaf_implementation_refuses_what_it_does_not_have(make_trainer: Callable[..., Trainer]) -> None:
    for settings in ({"kl_weight": 0.1}, {"solver": "ab2"}, {"leaf_steps": 1}):
        with pytest.raises(ConfigError, match="leave out the arm per-leaf"):
            per_leaf.PerLeaf(make_trainer(**settings))


def test_a_record_makes_the_same_calls_again() -> None:
    module = torch.nn.Linear(3, 2)
    seen: list[tuple[Tensor, bool]] = []
    calls = measuring.Calls(module)
    x, y = torch.randn(4, 3), torch.randn(5, 3)
    with calls.recording():
        with torch.no_grad():
            module(x)
        module(y).sum().backward()
    module.zero_grad()
    module.register_forward_pre_hook(lambda _, given: seen.append((given[0], torch.is_grad_enabled())))
    calls.again(gradient=False)
    assert module.weight.grad is None
    calls.again(gradient=True)
    assert module.weight.grad is not None and module.weight.grad.any()
    assert [(len(rows), grad) for rows, grad in seen] == [(4, False), (5, True)]


def test_a_phase_inside_another_counts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    phases = measuring.Phases(CPU)
    monkeypatch.setattr(phases, "_now", lambda: next(now))
    with phases.whole(), phases("rollout"), phases("decode"):
        pass
    assert phases.seconds == {"other": 1 + 5, "rollout": 2 + 4, "decode": 3}


def test_arms_are_measured_in_turn_and_compared_by_round() -> None:
    order: list[str] = []

    class Made:
        forwards = backwards = 1.0

        def __init__(self, name: str, seconds: list[float]):
            self.name, self.seconds = name, seconds

        def run(self) -> dict[str, float]:
            order.append(self.name)
            return {"rollout": self.seconds.pop(0), "other": 1.0}

    found = speed.measure([Made("a", [2.0, 8.0, 3.0]), Made("b", [1.0, 2.0, 3.0])], 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert speed.ratio(found, "a", "b", ("rollout",)) == 2.0


def test_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--backbone", "flux", "--size", "tiny", "--rounds", "1", "--json", str(tmp_path / "a.json")]
    assert main(["speed", *flags, "--variant", "nine: --max-batch 9"]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "a.json").read_text())
    counts = {name: (own["forwards"], own["forwards and backwards"]) for name, own in result["arms"].items()}
    early, late = (96, 12), (54, 12)
    # Noise in five of six steps; in the window of four; one seed, branches at the window's start; the KL's reference.
    expected = {
        "tmpo early": early, "floor early": early, "per-leaf early": (96, 54), "nine early": early,
        "tmpo late": late, "floor late": late, "per-leaf late": (54, 54), "nine late": late,
        "flow-grpo": (162, 135), "mix-grpo": (162, 108), "gardo": (162 + 135, 135),
    }  # fmt: skip
    assert expected.items() <= counts.items()
    assert max(result["per-leaf gradient, relative difference"].values()) < 1e-5
    assert all(f"| {name} " in out for name in counts)
    assert result["arms"]["nine late"]["ratios"]["late"]["all / floor"] > 0
    # Latents are a larger share of tiny models.
    assert result["memory"]["replay, 81 / 27 leaves"] < 1.2
    for phases in (result["memory"]["27"], result["memory"]["81"]):
        assert phases["replay"]["ratio"] == pytest.approx(1, abs=0.15)


def test_sd35_branches_where_it_may_and_rivals_can_be_left_out(tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    flags = [
        "--size",
        "tiny",
        "--rounds",
        "1",
        "--no-memory",
        "--arms",
        "floor",
        "--json",
        str(file),
        "--guidance",
        "2",
    ]
    assert main(["speed", "--backbone", "sd35m", *flags]) == 0
    result = json.loads(file.read_text())
    # The fifth step of six ends too near to 0.
    assert result["positions"] == {"early": [1, 2, 3], "late": [1, 3, 4]}
    assert set(result["arms"]) == {"tmpo early", "floor early", "tmpo late", "floor late"}


def test_arms_are_of_tmpo_over_a_preset_of_another_method(tmp_path: Path) -> None:
    """TMPO replays 12 transitions of a tree; nft, for which preset demo is written, would replay the 27 leaves."""
    flags = "--size tiny --rounds 1 --no-memory --arms floor --backbone sd35m --preset demo --prompts-per-update 1"
    variants = ["--variant", "nine: --max-batch 9", "--variant", "nft: --method nft"]
    assert main(["speed", *flags.split(), *variants, "--json", str(tmp_path / "c.json")]) == 0
    arms = json.loads((tmp_path / "c.json").read_text())["arms"]
    counts = {name: arms[f"{name} early"]["forwards and backwards"] for name in ("tmpo", "nine", "nft")}
    assert counts == {"tmpo": 12, "nine": 12, "nft": 27}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--variant", "nine"], '--variant nine: write "NAME: FLAGS"'),
        (["--variant", "nine: --max-bath 9"], "unknown flag --max-bath, did you mean --max-batch"),
        (["--rounds", "0"], "--rounds 0: at least 1"),
        (["--config", "run.yaml"], "speed has no --config"),
        (["--variant", "nine: --dry-run"], "--variant nine: speed has no --config, --resume, --dry-run"),
        (["--variant", "nine: --branch-early 1 2 4"], "--variant nine: --branch-early is set by the benchmark"),
        (["--branch-late", "1", "2", "4"], "--branch-late is set by the benchmark"),
    ],
)
def test_bad_flags_are_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "STEPS", (6, 10))
    monkeypatch.setattr(growth, "RESOLUTIONS", (1, 2))
    picture = tmp_path / "images" / "growth.png"
    flags = [
        "--backbone",
        "flux",
        "--size",
        "tiny",
        "--rounds",
        "1",
        "--grow",
        str(picture),
        "--json",
        str(tmp_path / "g"),
    ]
    assert main(["speed", *flags]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "g").read_text())["growth"]
    # With 81 leaves of six steps: 3 + 3 + 9 + 27 + 81 + 81 nodes, 3 + 9 + 27 parents.
    assert [point["evaluations"]["tmpo"] for point in found["leaves K"]] == [[14, 1], [42, 3], [96, 12], [204, 39]]
    assert [point["evaluations"]["flow-grpo"][0] for point in found["steps N"]] == [162, 270]
    assert [point["pixels per side"] for point in found["pixels per side"]] == [16, 32]


def test_weights_are_shared_and_adapters_are_not(tmp_path: Path) -> None:
    config = arms.configure("sd35m", "tiny", [], {})
    model = models.make("sd35m", "tiny", config, CPU, tmp_path)
    one, two = models.share(model.backbone), models.share(model.backbone)
    one.transformer.add_adapter(one.adapter("paper", 4, 8))
    pointers = [{p.data_ptr() for n, p in b.transformer.named_parameters() if "lora" not in n} for b in (one, two)]
    assert pointers[0] == pointers[1]
    assert not any("lora" in name for name, _ in two.transformer.named_parameters())
