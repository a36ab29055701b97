"""Layers of settings: which layer an error is blamed on, whose settings a run has, variants, files of earlier versions."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tmpo_trainer import methods
from tmpo_trainer.commands.flags import layers
from tmpo_trainer.methods import tmpo
from tmpo_trainer.settings import presets
from tmpo_trainer.settings.config import TrainConfig
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.settings.presets import make_config
from tmpo_trainer.settings.yaml_file import read_yaml

METHODS = (
    "tmpo", "tmpo-beta-1", "tmpo-step-balance", "tmpo-no-tree", "tmpo-fixed-branching", "flow-grpo", "gardo", "mix-grpo",
    "tree-grpo", "awm", "nft", "crd", "tmpo-leaf",
)  # fmt: skip
#: config.yaml of a run of the version that had one class of settings for all methods: every key, at its default.
OLD: dict[str, Any] = {
    "model": "demo", "transformer": None, "reward": ["shapes"], "reward_weights": None, "reward_models": [],
    "pickscore_scale": "raw", "remote_hosts": [], "remote_timeout": 120.0, "reward_norm": "zscore", "method": "tmpo",
    "prompts": None, "eval_prompts": None, "updates": 500, "output_dir": None, "seed": 0, "prompts_per_update": 1,
    "prompts_per_batch": 1, "rollout_steps": 6, "branching": 3, "branch_early": [1, 2, 3], "branch_late": [1, 3, 5],
    "kappa": 6.0, "window": 4, "window_every": 25, "kernel": "cps", "eta": 0.7, "guidance": 3.5, "resolution": [512, 512],
    "max_sequence_length": 256, "text_cache": None, "max_batch": None, "replay_batch": None, "gradient_checkpointing": False,
    "split_guidance": False, "decode_batch": 64, "beta_start": 0.8, "beta_end": 2.0, "beta_warmup": 150, "clip": 0.2,
    "baseline": "none", "anchor": "none", "anchor_weight": 1.0, "logp_reduce": "mean", "inner_updates": 1, "kl_weight": 0.0,
    "auxiliary": [], "learning_rate": 3e-05, "lr_min_ratio": 0.1, "weight_decay": 0.0001, "adam_betas": [0.9, 0.999],
    "max_grad_norm": 0.5, "ema_decay": 0.9, "ema_every": 8, "lora_rank": 64, "lora_targets": "paper", "lora_alpha": 128.0,
    "init_lora": None, "eval_images": 8, "eval_limit": None, "features": "efficientnet-lite0", "eval_steps": 28,
    "eval_every": 0, "sample_every": 50, "checkpoint_every": 50, "checkpoints_kept": 2, "report": True, "tracker": "none",
    "device": "auto", "dtype": "auto", "quantize": "none", "attention": "native", "offload_scorers": False, "compile": False,
    "threads": None,
}  # fmt: skip


def complaint(*layers: tuple[str, dict[str, Any]]) -> str:
    with pytest.raises(ConfigError) as caught:
        make_config(layers)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_method_names_are_files_and_their_variants() -> None:
    assert sorted(presets.method_names()) == sorted(METHODS)
    assert {name: presets.method_file(name) for name in METHODS} == {
        name: "tmpo" if name.startswith("tmpo") and name != "tmpo-leaf" else name for name in METHODS
    }
    for wrong in ("tmpo-tree", "grpo", "", "base", "batch", "flow-grpo-beta-1"):
        with pytest.raises(
            ConfigError,
            match=f"method {wrong!r} is not known.*methods: awm, crd, flow-grpo, gardo, mix-grpo, nft, tmpo",
        ):
            presets.method_file(wrong)
    with pytest.raises(ConfigError, match="did you mean tmpo-no-tree"):
        presets.method_file("tmpo-no-tre")


def test_all_settings_are_those_of_every_method_with_a_text() -> None:
    found = presets.all_settings()
    assert list(found)[: len(TrainConfig.model_fields)] == list(TrainConfig.model_fields)
    own = {"kernel", "clip", "kl_weight", "kappa", "schedule", "tree", "balance", "baseline", "window", "auxiliary"}
    assert own <= found.keys() and not own & TrainConfig.model_fields.keys()
    assert all(field.description for field in found.values())
    assert found.keys() == OLD.keys() | {
        "schedule",
        "tree",
        "balance",
        "solver",
        "eval_solver",
        "leaf_steps",
        "reuse_forward",
        "neutral",
        "neutral_share",
        "diversity_weight",
        "diversity",
        "draws",
        "noise_shift",
        "noise_weight",
        "negative_limit",
        "level_importance",
        "leaf_importance",
        "reference_share",
        "rollout",
        "strength",
        "reward_range",
        "adaptive_weight",
        "old_decay_rise",
        "old_decay_max",
        "tilt_weight",
        "data_weight",
        "data_images",
        "data_folder",
    }


def test_a_copied_method_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings may be described in the same words as those that it was copied from."""
    text = """
from tmpo_trainer.methods import mix_grpo


class Settings(mix_grpo.flow_grpo.Settings):
    \"\"\"Settings of mix-grpo.\"\"\"

    stride: int = 1
    \"\"\"How far the window moves.\"\"\"


class Method(mix_grpo.Method):
    pass
"""
    (tmp_path / "stride_grpo.py").write_text(text)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    assert {"window", "window_every", "stride"} <= presets.all_settings().keys()


def test_a_flag_that_contradicts_a_variant_is_refused() -> None:
    said = complaint(("flags", {"method": "tmpo-beta-1", "beta_end": "3"}))
    assert said.startswith("flags: beta_end 3 with method tmpo-beta-1, which fixes it at 1.0")
    # The same value is fine, and a file or preset may say what it likes: it is laid below.
    assert vars(make_config([("flags", {"method": "tmpo-beta-1", "beta_end": "1"})]))["beta_end"] == 1
    assert vars(make_config([("run.yaml", {"beta_end": 3}), ("flags", {"method": "tmpo-beta-1"})]))["beta_end"] == 1
    # But not beside the name itself, unless a later layer takes it back.
    both = ("run.yaml", {"method": "tmpo-beta-1", "beta_end": 3})
    assert complaint(both, ("flags", {"updates": 5})).startswith(
        "run.yaml: beta_end 3 with method tmpo-beta-1, which fixes"
    )
    assert vars(make_config([both, ("flags", {"beta_end": 1})]))["beta_end"] == 1
    assert vars(make_config([both, ("flags", {"method": "tmpo"})]))["beta_end"] == 3


def test_settings_are_read_without_torch() -> None:
    script = "import sys; sys.modules['torch'] = None\nfrom tmpo_trainer.settings import presets\n"
    script += "presets.all_settings(), presets.make_config([('a', {'method': 'tree-grpo'})])"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


# -- layers --------------------------------------------------------------------------------------------------------


def test_later_layers_win_and_the_method_says_whose_settings() -> None:
    made: Any = make_config(
        [("a", {"updates": 5, "clip": 0.1}), ("b", {"updates": 6, "method": "mix-grpo", "window": 2})]
    )
    assert (made.updates, made.clip, made.window, made.method) == (6, 0.1, 2, "mix-grpo")
    assert not hasattr(made, "kappa") and not hasattr(make_config([]), "window")
    assert type(make_config([])) is type(make_config([("a", {"method": "tmpo-no-tree"})])) is tmpo.Settings


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({"learning_rat": 1}, "second: unknown key learning_rat, did you mean learning_rate?"),
        ({"zzzzzz": 1}, "second: unknown key zzzzzz (--help lists them)"),
        ({3: 1}, "second: unknown key 3 (--help lists them)"),
        ({"updates": 0}, "second: updates 0: input should be greater than or equal to 1"),
        ({"resolution": "big"}, "second: resolution 'big': "),
        ({"clip": -1}, "second: clip -1: input should be greater than 0"),
        ({"method": 3}, "second: method 3: input should be a valid string"),
        ({"method": "grpo"}, "method 'grpo' is not known"),
        # Of another method, which checks it all the same.
        ({"window": 0}, "second: window 0: input should be greater than or equal to 1"),
        ({"window": "wide"}, "second: window 'wide': "),
        ({"method": "flow-grpo", "anchor": "base"}, "second: anchor 'base': input should be 'none' or 'ref'"),
        # Values that are good by themselves.
        ({"branch_late": (1, 2)}, "second: branch_early and branch_late differ in number"),
        ({"reward_weights": (1, 2)}, "second: reward_weights has 2 values for 1 rewards: give one each"),
    ],
    ids=str,
)
def test_the_layer_to_blame_is_named(second: dict[Any, Any], expected: str) -> None:
    assert complaint(("first", {"updates": 7}), ("second", second)).startswith(expected)


def test_a_bad_value_is_blamed_on_its_own_layer_a_combination_on_the_last() -> None:
    assert complaint(("first", {"seed": -1}), ("second", {"seed": 1})).startswith("first: seed -1")
    # A later layer may still make sense of it.
    assert make_config([("first", {"branch_late": (1, 2)}), ("second", {"branch_early": (1, 2)})])
    assert complaint(("first", {"branch_late": (1, 2)}), ("second", {"updates": 7})).startswith(
        "second: branch_early and"
    )
    # An empty layer is never at fault.
    assert complaint(("first", {"branch_late": (1, 2)}), ("second", {})).startswith("first: branch_early and")
    assert complaint(("first", {"method": "gardo"}), ("second", {})).startswith("first: method gardo needs auxiliary")


# -- settings of other methods -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "key", "value", "owner"),
    [
        ("flow-grpo", "anchor", "ref", "tmpo"),
        ("mix-grpo", "baseline", "group", "tmpo"),
        ("tree-grpo", "baseline", "siblings", "tmpo"),
        ("tmpo", "auxiliary", ["sharpness", "ocr"], "gardo"),
        ("tmpo-no-tree", "auxiliary", ["sharpness"], "gardo"),
    ],
)
def test_exclusive_settings_are_refused_elsewhere(method: str, key: str, value: Any, owner: str) -> None:
    words = " ".join(value) if isinstance(value, list) else value
    told = (
        f"{key} {words} belongs to method {owner}, not to {method}: leave it at its default, or give --method {owner}"
    )
    assert complaint(("file", {"method": method, key: value})) == f"file: {told}"
    # In the end it is the merged settings that count.
    default = presets.all_settings()[key].default
    for later in ({key: default}, {"method": owner, "kl_weight": 0.1}):
        assert make_config([("file", {"method": method, key: value}), ("flags", later)])


def test_other_settings_of_other_methods_are_left_out() -> None:
    foreign = {"kappa": 3, "beta_end": 5, "tree": False, "schedule": "fixed", "window": 2, "anchor_weight": 0.3}
    made = make_config([("file", {"method": "flow-grpo", **foreign})])
    assert made == make_config([("file", {"method": "flow-grpo"})]) and not foreign.keys() & made.model_dump().keys()


# -- variants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tmpo-beta-1", "beta_start", 1.0),
        ("tmpo-beta-1", "beta_end", 1.0),
        ("tmpo-step-balance", "balance", "subtree"),
        ("tmpo-no-tree", "tree", False),
        ("tmpo-fixed-branching", "schedule", "fixed"),
    ],
)
def test_a_variant_forces_its_settings(name: str, key: str, value: Any) -> None:
    default = getattr(make_config([]), key)
    assert default != value
    made = make_config([("file", {"method": name}), ("run.yaml", {key: default})])
    assert getattr(made, key) == value and made.method == name
    # The same settings by hand are the same run under the plain name.
    fixed = tmpo.Settings.variants[name]
    plain = make_config([("run.yaml", fixed)])
    assert made.model_dump() == plain.model_dump() | {"method": name}


def test_what_a_variant_has_no_use_for() -> None:
    for name in ("tmpo-no-tree", "tmpo-step-balance"):
        assert "anchor ref needs paths of a tree" in complaint(("a", {"method": name, "anchor": "ref"}))
    for name in ("tmpo-beta-1", "tmpo-fixed-branching"):
        assert make_config([("a", {"method": name, "anchor": "ref"})])


# -- earlier versions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_config_file_of_an_earlier_version_loads(method: str) -> None:
    """It had the settings of all methods, and none of the variants'."""
    own = {"method": method} | ({"auxiliary": ["sharpness"], "kl_weight": 0.04} if method == "gardo" else {})
    made = make_config([("config.yaml", OLD | own), ("flags", {"updates": 900})])
    assert made.model_dump(mode="json") == make_config([("new", own | {"updates": 900})]).model_dump(mode="json")
    # Every key that the method has came from the file.
    changed: dict[str, Any] = {
        "learning_rate": 1e-3,
        "eta": 0.5,
        "clip": 0.3,
        "kappa": 9.0,
        "window": 2,
        "branching": 2,
    }
    found = make_config([("config.yaml", OLD | own | changed)]).model_dump()
    assert all(found[key] == value for key, value in changed.items() if key in found)


def test_presets_of_methods_go_with_their_method() -> None:
    for name in METHODS:
        for demo in (False, True):
            settings = presets.method_preset(name, demo)
            given = {"method": name} | ({"auxiliary": ["ocr"], "kl_weight": 0.1} if name == "gardo" else {}) | settings
            assert make_config([("preset", given)]).method == name
    assert presets.method_preset("tmpo", False) == {} and presets.method_preset("gardo", False)["auxiliary"]


def test_files_of_methods_say_only_what_differs_from_their_base() -> None:
    folder = presets.PRESETS / "methods"
    for base in ("base", "demo-base"):
        common = read_yaml(folder / f"{base}.yaml")
        assert "method" not in common
        prefix = base.removesuffix("base")
        for name in METHODS:
            own = folder / f"{prefix}{name}.yaml"
            # A variant has its method's settings below its own.
            if own.exists() and presets.method_file(name) == name:
                settings = read_yaml(own)
                assert not [key for key in settings.keys() & common.keys() if settings[key] == common[key]], own
                assert presets.method_preset(name, bool(prefix)) == common | settings


@pytest.mark.parametrize("name", ["demo", "demo-long"])
@pytest.mark.parametrize("method", sorted({presets.method_file(method) for method in METHODS} - {"nft"}))
def test_no_method_inherits_what_the_demo_presets_wrote_for_nft(name: str, method: str) -> None:
    made = make_config(layers(Namespace(preset=[name], config=None), {"method": method}, {}))
    assert (made.rollout_steps, made.lora_targets) == (10, "attention")
    for key in ("noise_weight", "level_importance", "leaf_importance", "negative_limit"):
        assert not getattr(made, key, None), key
    assert getattr(made, "reference_share", 1) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "is nested too deeply for settings"),
        ("seed: " + "9" * 5000, "line 1: an integer of 5000 digits"),
        ("updates: 1\nmethod: 0x" + "f" * 5000, "line 2: an integer of 5002 digits"),
        ("a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60)), "more than 100000 values"),
        ("reward: &a [*a]", "line 1: an alias stands for something that contains it"),
        ("seed: 1\nupdates: 2\nseed: 3", "line 3: key 'seed' is there twice: keep one"),
        ("arm: {seed: 1, seed: 1}", "line 1: key 'seed' is there twice"),
        ("seed: 2024-13-45", "is not YAML: month must be in 1..12"),
        ("report: !!bool maybe", "is not YAML: 'maybe'"),
        ("a" * 400_000, "is not a mapping"),
        ("a" * 400_000 + ": 1", "is not YAML"),
        ("? " + "a" * 400_000 + "\n: 1", "unknown key aaa"),
        ("kernel: " + "a" * 400_000, "kernel 'aaa"),
        ("method: " + "a" * 400_000, "method 'aaa"),
        ("reward_models: [" + "a" * 400_000 + "]", "write NAME=PATH"),
        ("reward: [x, " + "a" * 400_000 + ", x]", "names one twice"),
        ("branch_early: [" + "3, " * 10_000 + "4]", "must be strictly increasing steps"),
        ("prompts: " + "a" * 400_000, "no name of more than 255 bytes"),
        ("model: " + "a" * 400_000, "no name of more than 255 bytes"),
        ('prompts: "a\\0b"', "no NUL character"),
        ("auxiliary: [" + "a" * 400_000 + "]", "belongs to method gardo"),
        ("#" * 2_000_000, "has more than 1048576 bytes: give a file of settings"),
        ("seed: 1".encode("utf-16"), "is not YAML: it is UTF-16: save it as UTF-8"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_a_settings_file_can_have_wrong_is_one_short_line(tmp_path: Path, text: str | bytes, told: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        make_config([("x.yaml", read_yaml(path))])
    said = str(caught.value).replace(str(tmp_path), "")
    assert told in said and ("x.yaml" in said or "methods: " in said) and "\n" not in said and len(said) < 400


def test_aliases_and_merges_of_settings_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("\ufeffbase: &base {seed: 1}\none: {<<: *base, updates: 2}\ntwo: *base\n")
    assert read_yaml(tmp_path / "x.yaml") == {"base": {"seed": 1}, "one": {"seed": 1, "updates": 2}, "two": {"seed": 1}}


def test_files_that_are_no_settings(tmp_path: Path) -> None:
    for name, text, told in (
        ("broken.yaml", "updates: [1\nseed: }", "is not YAML"),
        ("list.yaml", "- updates", "is not a mapping"),
        ("empty.yaml", "", "is not a mapping"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=f"{name} {told}") as caught:
            read_yaml(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="unknown preset demi, did you mean demo"):
        presets.preset("demi")
    for name in ("../config", "methods/gardo", "a" * 1000, "a\0"):
        with pytest.raises(ConfigError, match="unknown preset") as caught:
            presets.preset(name)
        assert len(str(caught.value)) < 400
