"""The memory estimate against what a real run of the same network allocates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tmpo_trainer import methods, tree
from tmpo_trainer.backbones import load_skeleton
from tmpo_trainer.backbones.base import Backbone
from tmpo_trainer.commands import main
from tmpo_trainer.settings.config import TrainConfig
from tmpo_trainer.settings.presets import make_config
from tmpo_trainer.training import memory

TOKENS = 12
PLAN = tree.TreePlan.tmpo(6, (1, 2, 3), 3)


def settings(**changes: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "resolution": (64, 64), "max_sequence_length": TOKENS, "lora_rank": 4, "lora_alpha": 8, "guidance": 3.5,
        "replay_batch": 6, "max_batch": 9, "decode_batch": 5,
    }  # fmt: skip
    late = {} if "method" in changes else {"branch_late": (1, 3, 4)}
    return make_config([("settings", given | late | changes)])


def estimate(folder: Path, config: TrainConfig) -> dict[str, dict[str, int]]:
    skeleton = load_skeleton(str(folder), torch.float32, TOKENS)
    skeleton.split_guidance = config.split_guidance
    method = methods.make(config, skeleton.sigmas(config.rollout_steps, *config.resolution))
    return memory.estimate(skeleton, folder, config, method, [PLAN], torch.device("cuda"))


def part(phases: dict[str, dict[str, int]], phase: str, name: str) -> int:
    (parts,) = (parts for title, parts in phases.items() if title.startswith(phase))
    return parts[name]


def peak_of(module: torch.nn.Module, work: Callable[[], Any]) -> int:
    """Bytes beyond a module's weights, and their gradients, while something runs."""
    with memory.Peak() as peak:
        peak.ignore(module)
        work()
    return peak.peak


@pytest.fixture(params=["flux", "flux2", "sd35"])
def model(request: pytest.FixtureRequest) -> Path:
    return tiny(request, request.param)


def tiny(request: pytest.FixtureRequest, name: str) -> Path:
    found = request.getfixturevalue(f"tiny_{name}")
    kind = {"flux": True, "flux2": "base"}.get(name)
    return found if kind is None else found(kind)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ["flux", "flux2", "sd35", "qwen"])
def test_fake_tensors_count_what_real_ones_take(
    request: pytest.FixtureRequest, make_trainer: Callable[..., Any], name: str, checkpointing: bool, split: bool
) -> None:
    model = tiny(request, name)
    config = settings(gradient_checkpointing=checkpointing, split_guidance=split)
    phases = estimate(model, config)
    trainer = make_trainer(folder=model, **config.model_dump(exclude_unset=True))
    backbone: Backbone = trainer.backbone
    backbone.split_guidance = split
    # As long as a prompt can be, as in the estimate.
    for prompt in ("a red circle", ""):
        made_up = backbone.blank_conditioning(model).items()
        backbone.keep(prompt, {name: torch.ones_like(value) for name, value in made_up})
    network = backbone.velocity(["a red circle"], config.guidance)
    x, sigma = torch.randn(6, *trainer.roller.latent_shape), torch.full((6,), 0.5)

    def replay() -> None:
        network(x + 0, sigma + 0).sum().backward()

    # In the second part of a replay the gradients are there from the start.
    replay()
    real = peak_of(backbone.transformer, replay)
    assert part(phases, "replay, 6", "forward and backward") == pytest.approx(real, rel=0.02)
    latents = torch.randn(5, *trainer.roller.latent_shape)
    vae = backbone.pipeline.vae
    with torch.no_grad():
        unscaled = backbone.unscale(latents)
        real = peak_of(vae, lambda: backbone.vae_pixels(unscaled + 0))
    assert part(phases, "decoding, 5", "decoder") == pytest.approx(real, rel=0.02)
    weights = sum(p.numel() for n, p in backbone.transformer.named_parameters() if "lora_" not in n) * 4
    assert part(phases, "rollout, 9", "transformer") == weights
    lora = sum(p.numel() for p in trainer.weights.lora.values()) * 4
    # Weights, gradient, two moments, average.
    assert part(phases, "rollout, 9", "LoRA, optimiser, average") == 5 * lora


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        {"kl_weight": 0.1, "prompts_per_batch": 2},
        {"reuse_forward": True},
        {"method": "awm", "rollout": "tree", "draws": 2, "kl_weight": 0.1},
        {"method": "nft", "rollout": "tree", "draws": 2, "kl_weight": 0.1},
    ],
)
def test_a_whole_update_takes_what_the_phases_say(
    model: Path, make_trainer: Callable[..., Any], changes: dict[str, Any]
) -> None:
    """The second one, with gradients and moments there, and more than one call per phase."""
    fixed = {} if "method" in changes else {"branch_late": (1, 2, 3), "kappa": 1e9}
    config = settings(prompts_per_update=2, **fixed, **changes)
    phases = estimate(model, config)
    trainer = make_trainer(folder=model, **config.model_dump(exclude_unset=True))
    trainer.update()
    with memory.Peak() as peak:
        for module in (trainer.backbone.transformer, trainer.backbone.pipeline.vae):
            peak.ignore(module)
        moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
        peak.ignore_tensors([*moments, *trainer.weights.ema.values()])
        trainer.update()
    known = ("transformer", "VAE", "LoRA, optimiser, average")
    during = [parts for title, parts in phases.items() if not title.startswith(("text", "sample", "optimiser"))]
    most = max(sum(size for name, size in parts.items() if name not in known) for parts in during)
    # Pictures are on the host with a GPU; here they are counted, whole and in parts.
    pictures = 27 * config.prompts_per_batch * 64 * 64 * 3
    assert 0.75 * most < peak.peak < 1.15 * most + 2 * pictures


def test_a_batch_is_of_whole_prompts(tiny_sd35: Path) -> None:
    """27 and 5 do not divide into two prompts: the run takes 26 and 4, and so does the estimate."""
    changes = {"prompts_per_update": 2, "prompts_per_batch": 2, "max_batch": 27, "replay_batch": 5}
    phases = estimate(tiny_sd35, settings(**changes))
    assert any(title.startswith("rollout, 26 ") for title in phases)
    assert any(title.startswith("replay, 4 ") for title in phases)


def test_what_saves_memory_is_seen_to(tiny_sd35: Path) -> None:
    def replay(**changes: Any) -> int:
        return part(estimate(tiny_sd35, settings(**changes)), "replay", "forward and backward")

    plain = replay()
    assert replay(gradient_checkpointing=True) < 0.8 * plain
    assert replay(replay_batch=3) < 0.7 * plain
    assert replay(guidance=1.0) < 0.7 * plain
    assert replay(split_guidance=True, gradient_checkpointing=True) < replay(gradient_checkpointing=True)

    def weights(quantize: str) -> int:
        return part(estimate(tiny_sd35, settings(quantize=quantize)), "replay", "transformer")

    # From 32 bits to 4, of all that is in linear layers.
    assert weights("nf4") < 0.25 * weights("none")


def test_what_a_method_keeps_is_seen_to(tiny_sd35: Path) -> None:
    """GARDO's copy of the adapter; the reference's means, where there is a KL."""

    def resident(name: str, **changes: Any) -> int:
        return part(estimate(tiny_sd35, settings(**changes)), "rollout", name)

    lora, latents = "LoRA, optimiser, average", "latents kept"
    gardo = {"method": "gardo", "auxiliary": ("sharpness",), "kl_weight": 0.1}
    assert resident(lora, **gardo) * 5 == resident(lora) * 6
    # NFT's old policy, which rolls out in the place of the current one unless it is the same.
    nft = {"method": "nft", "kl_weight": 0.1}
    assert resident(lora, **nft) * 5 == resident(lora) * 6
    assert resident("LoRA kept aside", **nft, old_decay_rise=0.1) * 5 == resident(lora)
    with pytest.raises(KeyError):
        resident("LoRA kept aside", **nft, old_decay_rise=0)
    # 27 leaves, 12 parents with their means, 36 children; 12 means more.
    assert resident(latents, kl_weight=0.1) * 87 == resident(latents) * 99


def test_no_tensor_is_counted_twice_and_none_for_ever() -> None:
    with memory.Peak() as peak:
        x = torch.ones(1000)
        y = x.view(10, 100).t()
        assert peak.now == 4000
        z = y + 1
        assert peak.now == 8000
        del z
        assert peak.now == 4000 and peak.peak == 8000


@pytest.mark.parametrize("kind", ["flux", "demo"])
def test_dry_run_loads_nothing(
    kind: str,
    tiny_flux: Callable[[bool], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def heavy(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Backbone, "load", heavy)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    more = [] if kind == "demo" else ["--model", str(tiny_flux(True)), "--resolution", "64", "64"]
    assert main.main(["--dry-run", *more]) == 0
    out = capsys.readouterr().out
    assert ("text encoding: " in out) == (kind == "flux")
    for phase in ("rollout, ", "decoding, ", "replay, ", "optimiser: "):
        assert out.count(f"\n  {phase}") == 1
    assert not list(tmp_path.iterdir())


def test_a_cpu_decodes_what_its_caches_hold(tiny_sd35: Path) -> None:
    skeleton, config = load_skeleton(str(tiny_sd35), torch.float32, TOKENS), settings(decode_batch=64)
    method = methods.make(config, skeleton.sigmas(config.rollout_steps, *config.resolution))
    phases = memory.estimate(skeleton, tiny_sd35, config, method, [PLAN], torch.device("cpu"))
    threads = torch.get_num_threads()
    together = 8 * threads if threads <= 8 else 8
    assert any(title.startswith(f"decoding, {min(together, PLAN.leaves)} ") for title in phases)
