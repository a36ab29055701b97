"""Settings from flags, files and presets, in the order in which they count, as --print-config shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tmpo_trainer.commands import loading, main
from tmpo_trainer.settings.presets import make_config, preset_names

#: Appendix D.4 of the paper.
PAPER = {
    "pickscore": {"learning_rate": 5e-5, "updates": 500, "max_grad_norm": 0.3, "beta_warmup": 150, "inner_updates": 1},
    "geneval": {"learning_rate": 3e-5, "updates": 1000, "max_grad_norm": 0.5, "beta_warmup": 150, "inner_updates": 1},
    "ocr": {"learning_rate": 3e-5, "updates": 250, "max_grad_norm": 0.5, "beta_warmup": 100, "inner_updates": 1},
    "joint": {"learning_rate": 3e-5, "updates": 500, "max_grad_norm": 0.5, "beta_warmup": 150, "inner_updates": 2},
}
#: Appendix D.5, laid over a protocol of D.4; on the demo model a sweep chose others.
RIVALS: dict[str, float] = {"flow-grpo": 0.03, "mix-grpo": 0.03, "tree-grpo": 0.03, "gardo": 0.04}
#: Methods on noised leaves, laid over a protocol.
NOISED: dict[str, dict[str, Any]] = {
    "awm": {"learning_rate": 3e-4, "draws": 6, "noise_shift": 3, "kl_weight": 1e-3},
    "nft": {"learning_rate": 3e-4, "draws": 10, "noise_shift": 3, "kl_weight": 1e-4, "strength": 1, "reward_range": 5},
    "crd": {"learning_rate": 3e-4, "draws": 6, "noise_shift": 3, "tilt_weight": 100, "kl_weight": 1e-3},
    "tmpo-leaf": {"learning_rate": 3e-4, "draws": 6, "noise_shift": 3, "baseline": "group"},
}
#: Prompts per update, learning rate and KL weight, see docs/comparison.md.
DEMO_RIVALS = {
    "flow-grpo": (8, 3e-3, 0.03),
    "mix-grpo": (8, 1e-3, 0.03),
    "tree-grpo": (2, 1e-3, 3),
    "gardo": (8, 3e-3, 0.04),
}
#: On a GPU that is small for the model, with weights of 16 bits and of four.
SMALL = {"gradient_checkpointing": True, "max_batch": 27, "decode_batch": 4, "offload_scorers": True}
NF4 = {"quantize": "nf4", **SMALL}
FLUX2 = {"guidance": 4.0, "max_sequence_length": 512}
#: What these change beside the model.
OVERLAYS: dict[str, dict[str, Any]] = {
    "recommended": {
        "baseline": "siblings", "kl_weight": 0.1, "neutral": ["feature_distance", "latent_norm"], "neutral_share": [1.0, 0.5],
    },
    "flux-80gb": {"gradient_checkpointing": False, "max_batch": 27, "replay_batch": 4, "decode_batch": 9},
    "flux-24gb": {
        "quantize": "nf4", "gradient_checkpointing": True, "max_batch": 27, "replay_batch": 6, "decode_batch": 4,
        "offload_scorers": True,
    },
    "sd35m-24gb": {
        "branch_late": [1, 3, 4], "gradient_checkpointing": True, "max_batch": 27, "replay_batch": 12, "decode_batch": 9,
    },
    "sd35l-24gb": {"branch_late": [1, 3, 4], **NF4, "replay_batch": 6},
    "klein4b-24gb": {**FLUX2, **SMALL, "replay_batch": 6},
    "klein9b-24gb": {**FLUX2, **NF4, "max_batch": 18, "replay_batch": 6},
    "klein9b-80gb": {
        **FLUX2, "gradient_checkpointing": False, "max_batch": 27, "replay_batch": 3, "decode_batch": 9,
    },
    "flux2-80gb": {**FLUX2, **SMALL, "max_batch": 9, "replay_batch": 4},
    "qwen-24gb": {
        "guidance": 4.0, "branch_late": [1, 3, 4], "split_guidance": True, **NF4, "max_batch": 9, "replay_batch": 2,
        "decode_batch": 2,
    },
    "qwen-80gb": {
        "guidance": 4.0, "branch_late": [1, 3, 4], "gradient_checkpointing": True, "max_batch": 27, "replay_batch": 12,
        "decode_batch": 9,
    },
    "zimage-24gb": {"guidance": 4.0, "split_guidance": True, **SMALL, "replay_batch": 4},
}  # fmt: skip
PAPER_COMMON = {
    "model": "black-forest-labs/FLUX.1-dev", "method": "tmpo", "rollout_steps": 6, "eval_steps": 28, "branching": 3,
    "branch_early": (1, 2, 3), "branch_late": (1, 3, 5), "kappa": 6, "kernel": "cps", "eta": 0.7, "clip": 0.2,
    "beta_start": 0.8, "beta_end": 2.0, "adam_betas": (0.9, 0.999), "weight_decay": 1e-4, "lr_min_ratio": 0.1,
    "ema_decay": 0.9, "ema_every": 8, "lora_rank": 64, "lora_alpha": 128, "baseline": "none", "anchor": "none",
    "kl_weight": 0, "logp_reduce": "mean", "reward_norm": "zscore", "prompts_per_update": 1,
}  # fmt: skip


def printed(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main.main([*flags, "--print-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_flags_over_config_over_preset_over_defaults(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    defaults: Any = make_config([])
    only_preset = printed(capsys, "--preset", "demo")
    assert only_preset["updates"] not in (70, 95, defaults.updates)
    assert only_preset["weight_decay"] == defaults.weight_decay
    with_file = printed(capsys, "--preset", "demo", "--config", "good.yaml")
    # PyYAML reads 5e-5 as a string.
    assert with_file == {**only_preset, "learning_rate": 5e-5, "updates": 70, "guidance": 2}
    flags = printed(capsys, "--updates", "95", "--config", "good.yaml", "--preset", "demo")
    assert flags == {**with_file, "updates": 95}


def test_the_preset_follows_the_reward(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys) == printed(capsys, "--preset", "demo") == printed(capsys, "--reward", "shapes")
    for name in ("pickscore", "geneval", "ocr"):
        assert printed(capsys, "--reward", name) == printed(capsys, "--preset", name)
    several = printed(capsys, "--reward", "hpsv2", "imagereward", "pickscore")
    assert several == printed(capsys, "--preset", "joint")
    (place / "ocr.yaml").write_text("reward: [ocr]\nseed: 3\n")
    assert printed(capsys, "--config", "ocr.yaml") == {**printed(capsys, "--preset", "ocr"), "seed": 3}
    assert printed(capsys, "--reward", "ocr", "--preset", "demo")["model"] == "demo"
    # The demo model has one preset, whatever the reward.
    own = printed(capsys, "--model", "demo", "--reward", "sharpness")
    assert own == printed(capsys, "--preset", "demo", "--reward", "sharpness")


def test_values_of_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    settings = printed(
        capsys, "--resolution", "64", "96", "--no-report", "--max-batch", "32", "--learning-rate=2e-4", "--threads", "none"
    )  # fmt: skip
    assert settings["resolution"] == [64, 96] and settings["report"] is False and settings["max_batch"] == 32
    assert settings["learning_rate"] == 2e-4 and settings["threads"] is None
    given = ["--baseline", "none", "--anchor", "none", "--reward-norm", "none", "--max-batch", "None"]
    words = printed(capsys, "--method", "tmpo", *given)
    assert (words["baseline"], words["anchor"], words["reward_norm"], words["max_batch"]) == (
        "none", "none", "none", None
    )  # fmt: skip
    # An optional list: nothing, and not a list of nothing.
    weighted = ["--reward", "shapes", "sharpness", "--reward-weights"]
    assert printed(capsys, *weighted, "1", "2")["reward_weights"] == [1, 2]
    assert printed(capsys, *weighted, "none")["reward_weights"] is None
    assert printed(capsys, "--neutral", "none")["neutral"] == []


def test_of_several_processes_one_describes_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        for action in ("--print-config", "--dry-run"):
            assert main.main([action]) == 0
            said.append(capsys.readouterr().out)
    assert said[0].startswith("model: demo") and said[1].startswith("model demo on ") and said[2:] == ["", ""]


def test_a_gpu_that_is_full_while_scorers_are_loaded_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loading, "scorers", full)
    assert main.main(["--updates", "1"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tmpo_trainer: ")]
    assert "CUDA out of memory. Tried to allocate 2.00 GiB.; another program may use the GPU" in line


@pytest.mark.parametrize("name", preset_names())
def test_print_config_round_trips(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main.main(["--preset", name, "--seed", "7", "--max-batch", "9", "--print-config"]) == 0
    text = capsys.readouterr().out
    (place / "printed.yaml").write_text(text)
    assert main.main(["--config", "printed.yaml", "--print-config"]) == 0
    assert capsys.readouterr().out == text
    settings = yaml.safe_load(text)
    assert set(settings) == set(type(make_config([("printed", settings)])).model_fields)


@pytest.mark.parametrize("name", PAPER)
def test_presets_hold_the_papers_values(capsys: pytest.CaptureFixture[str], name: str) -> None:
    config: Any = make_config([("printed", printed(capsys, "--preset", name))])
    settings = config.model_dump()
    expected = {**PAPER_COMMON, **PAPER[name]}
    assert {key: settings[key] for key in expected} == expected
    warmup = PAPER[name]["beta_warmup"]
    assert [config.beta(u) for u in (0, warmup // 2, warmup, 10 * warmup)] == pytest.approx([0.8, 1.4, 2.0, 2.0])


def test_there_is_no_other_preset_than_these() -> None:
    assert set(preset_names()) == {*PAPER, *OVERLAYS, "demo", "demo-long"}


@pytest.mark.parametrize(("name", "expected"), NOISED.items())
def test_methods_on_noised_leaves_go_with_a_protocol(
    capsys: pytest.CaptureFixture[str], name: str, expected: dict[str, Any]
) -> None:
    """Those of the authors' code; nothing of the protocol's TMPO gets in their way."""
    for flags in (["--preset", "geneval"], ["--preset", "pickscore", "recommended"], ["--preset", "demo-long"]):
        settings = printed(capsys, *flags, "--method", name)
        assert flags[1] == "demo-long" or {key: settings[key] for key in expected} == expected
    assert settings["prompts_per_update"] == settings["prompts_per_batch"] == 8
    assert (settings["rollout"], settings["solver"]) == ("tree" if name == "tmpo-leaf" else "chains", "ab2")


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_has_the_papers_settings_over_the_protocol(capsys: pytest.CaptureFixture[str], name: str) -> None:
    expected = {
        "method": name, "kernel": "flow_sde", "learning_rate": 5e-5, "max_grad_norm": 0.3, "clip": 0.2,
        "kl_weight": RIVALS[name], "inner_updates": 1,
    }  # fmt: skip
    for protocol in ("geneval", "pickscore", "joint"):
        rewards = printed(capsys, "--preset", protocol)["reward"]
        for flags in (["--preset", protocol], ["--preset", protocol, "flux-24gb"], ["--reward", *rewards]):
            settings = printed(capsys, *flags, "--method", name)
            assert {key: settings[key] for key in expected} == expected
            assert settings["updates"] == PAPER[protocol]["updates"] and settings["reward"] == rewards
    # Several rewards, of which GARDO's auxiliary scores are two, are loaded once each; PickScore as in GARDO's code.
    assert printed(capsys, "--reward", "pickscore", "--method", name)["pickscore_scale"] == (
        "flow" if name == "gardo" else "raw"
    )
    # Flags are stronger; the demo model has settings of its own.
    assert printed(capsys, "--preset", "ocr", "--method", name, "--learning-rate", "1e-3")["learning_rate"] == 1e-3
    demo = printed(capsys, "--method", name)
    assert demo["model"] == "demo" and demo["method"] == name and "baseline" not in demo
    assert (demo["prompts_per_update"], demo["learning_rate"], demo["kl_weight"]) == DEMO_RIVALS[name]


def test_a_preset_that_names_its_method_is_stronger_than_the_methods_own(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`demo-long` is written for nft, whose settings for the demo model are those of short runs."""
    short, long = printed(capsys, "--method", "nft"), printed(capsys, "--preset", "demo-long")
    assert short["method"] == long["method"] == "nft"
    assert (short["draws"], long["draws"], short["noise_weight"], long["noise_weight"]) == (2, 3, 1, 0)
    assert (short["rollout_steps"], long["rollout_steps"]) == (6, 10)
    same = (
        "rollout",
        "neutral",
        "level_importance",
        "leaf_importance",
        "negative_limit",
        "reference_share",
        "old_decay_rise",
    )
    assert [short[key] for key in same] == [long[key] for key in same]
    assert printed(capsys, "--preset", "demo-long", "--method", "nft") == long
    # A file for the same method changes nothing of that.
    Path("own.yaml").write_text("method: nft\n")
    assert printed(capsys, "--preset", "demo-long", "--config", "own.yaml") == long
    # For another method, that method's own are stronger, also than a preset laid over the first.
    for more in ((), ("recommended",)):
        other = printed(capsys, "--preset", "demo-long", *more, "--method", "awm")
        assert (other["kl_weight"], other["draws"], other["lora_targets"]) == (0.1, 1, "attention")
        assert (other["rollout"], other["neutral"]) == ("chains", [])
    # So are they than the file of a run.
    Path("run.yaml").write_text(yaml.safe_dump(short))
    Path("long.yaml").write_text(yaml.safe_dump(long))
    own = "rollout", "noise_weight", "adaptive_weight", "level_importance", "negative_limit"
    for name, expected in (
        ("awm", ["chains", 0, False, 0, None]),
        ("crd", ["chains", 0, False, 0, None]),
        ("tmpo-leaf", ["tree", 0, True, 0, None]),
    ):
        for file in ("run.yaml", "long.yaml"):
            other = printed(capsys, "--config", file, "--method", name)
            assert [other[key] for key in own] == expected
            assert (other.get("leaf_importance", 0), other.get("reference_share", 1)) == (0, 1)
    # Nothing else in crd's loss holds the mean error.
    assert printed(capsys, "--preset", "demo", "--method", "crd")["kl_weight"] == 0.1
    settings = printed(capsys, "--preset", "demo", "--method", "tmpo")
    assert [settings[key] for key in ("solver", "leaf_steps", "lora_targets")] == ["ab2", 3, "attention"]
    for name in ("tmpo", *RIVALS, *NOISED):
        targets = "paper" if name == "nft" else "attention"
        assert printed(capsys, "--preset", "demo-long", "--method", name)["lora_targets"] == targets
        # Six steps are nft's in preset demo, also where a run's file says so.
        if name != "nft":
            for flags in (("--preset", "demo"), ("--preset", "demo-long"), ("--config", "run.yaml")):
                assert printed(capsys, *flags, "--method", name)["rollout_steps"] == 10
    assert printed(capsys, "--preset", "pickscore", "recommended", "--method", "nft")["kl_weight"] == 1e-4
    assert printed(capsys, "--preset", "pickscore", "flux-24gb", "--method", "nft")["kl_weight"] == 1e-4
    # recommended is written for tmpo, on any model, and so are the protocols.
    for flags in (("--preset", "demo", "recommended"), ("--preset", "pickscore", "recommended", "--model", "demo")):
        settings = printed(capsys, *flags)
        assert (settings["method"], settings["baseline"], settings["kl_weight"]) == ("tmpo", "siblings", 0.1)
        assert settings["neutral"] == ["feature_distance", "latent_norm"]
    # A variant has what its method has.
    variants = {name: printed(capsys, "--method", f"tmpo-{name}") for name in ("beta-1", "step-balance", "no-tree")}
    assert {settings["kl_weight"] for settings in variants.values()} == {0.3}
    assert [settings["baseline"] for settings in variants.values()] == ["siblings", "siblings", "group"]


def test_a_method_beats_a_file_written_for_another(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--print-config` writes all settings of the method down, also those that belong to it alone."""
    for first, second in (("tmpo", "gardo"), ("gardo", "flow-grpo"), ("flow-grpo", "tree-grpo")):
        Path("all.yaml").write_text(yaml.safe_dump(printed(capsys, "--method", first)))
        assert printed(capsys, "--config", "all.yaml")["method"] == first
        assert printed(capsys, "--config", "all.yaml", "--method", second) == printed(capsys, "--method", second)
    # A file without a method is above the settings of any.
    Path("any.yaml").write_text("kl_weight: 0.5\n")
    assert printed(capsys, "--config", "any.yaml") == printed(capsys, "--kl-weight", "0.5")
    # With the file's own method its values stand.
    Path("own.yaml").write_text("method: flow-grpo\nkl_weight: 0.5\n")
    assert printed(capsys, "--config", "own.yaml")["kl_weight"] == 0.5
    assert printed(capsys, "--config", "own.yaml", "--method", "flow-grpo")["kl_weight"] == 0.5
    Path("gardo.yaml").write_text("method: gardo\n")
    assert "auxiliary" not in printed(capsys, "--config", "gardo.yaml", "--method", "tmpo", "--auxiliary", "none")


@pytest.mark.parametrize(
    ("name", "fixed"),
    [
        ("tmpo-beta-1", {"beta_start": 1, "beta_end": 1}),
        ("tmpo-step-balance", {"balance": "subtree"}),
        ("tmpo-no-tree", {"tree": False}),
        ("tmpo-fixed-branching", {"schedule": "fixed"}),
    ],
)
def test_an_ablation_changes_nothing_else(capsys: pytest.CaptureFixture[str], name: str, fixed: dict[str, Any]) -> None:
    plain, settings = (printed(capsys, "--preset", "pickscore", *more) for more in ((), ("--method", name)))
    assert settings == plain | {"method": name} | fixed


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_preset_laid_over_a_protocol_leaves_the_rest_alone(capsys: pytest.CaptureFixture[str], name: str) -> None:
    changed = {"model", *OVERLAYS[name]}
    for protocol, flags in (
        ("pickscore", ["--preset", name]),
        ("geneval", ["--preset", name, "--reward", "geneval"]),
        ("ocr", ["--preset", "ocr", name]),
        ("joint", ["--preset", name, "--reward", "hpsv2", "imagereward", "pickscore"]),
    ):
        plain, settings = printed(capsys, "--preset", protocol), printed(capsys, *flags)
        assert {key for key in settings if settings[key] != plain[key]} <= changed
        assert {key: settings[key] for key in OVERLAYS[name]} == OVERLAYS[name]
    assert printed(capsys, "--preset", name, "--max-batch", "5")["max_batch"] == 5


def test_later_presets_win(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--preset", "flux-24gb", "geneval")["replay_batch"] == 12
    assert printed(capsys, "--preset", "geneval", "flux-24gb")["replay_batch"] == 6
    settings = printed(capsys, "--preset", "recommended", "flux-24gb", "--method", "flow-grpo")
    assert (settings["kl_weight"], settings["replay_batch"]) == (0.03, 6) and "baseline" not in settings
