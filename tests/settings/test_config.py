"""The settings that all methods share: what must hold between them, and what a run and the loop ask of them."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml

from tmpo_trainer.settings.config import TrainConfig, absolute, to_yaml
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.settings.presets import all_settings, make_config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_weights": (1,), "reward": ("a", "b")}, "reward_weights has 1 values for 2 rewards"),
        ({"reward": ("a", "a")}, "reward a a names one twice"),
        ({"reward": ()}, "at least 1 item"),
        ({"reward_models": ("shapes",)}, "reward_models shapes: write NAME=PATH"),
        ({"reward_models": ("ocr=x",)}, "ocr is none of the rewards shapes"),
        ({"reward_norm": "none", "reward": ("a", "b")}, "reward_norm none is for a single reward"),
        ({"branch_early": (2, 1)}, "must be strictly increasing steps"),
        ({"branch_early": ()}, "must be strictly increasing steps"),
        ({"branch_early": (0, 1)}, "must be strictly increasing steps"),
        (
            {"max_batch": 1, "prompts_per_batch": 2, "prompts_per_update": 2},
            "max_batch 1 cannot hold one latent of each of 2",
        ),
        ({"replay_batch": 1, "prompts_per_batch": 2, "prompts_per_update": 2}, "replay_batch 1 cannot hold"),
        (
            {"neutral": ("contrast",), "neutral_share": (1, 0.5)},
            "neutral_share has 2 values for 1 statistics: give one",
        ),
        ({"data_folder": "pictures"}, "data_folder pictures without data_weight"),
        ({"neutral": ("contrast", "contrast")}, "neutral contrast contrast names one twice"),
        (
            {"neutral": ("contrast", "sharpness", "saturation"), "branch_early": (2, 3)},
            "neutral names 3 statistics, and 9 pictures per prompt allow 2",
        ),
        ({"kappa": 3.0}, "Extra inputs are not permitted"),
        ({"learning_rate": float("nan")}, "finite number"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_a_single_share_may_be_a_number() -> None:
    assert TrainConfig.model_validate({"neutral": ["contrast"], "neutral_share": 0.5}).neutral_share == (0.5,)


def test_fewer_prompts_than_a_batch_would_hold() -> None:
    assert TrainConfig(max_batch=1, prompts_per_batch=4).prompts_per_update == 1


def test_what_a_method_may_change() -> None:
    """By default nothing beside the reward is needed, and rewards are combined as the settings say."""
    plain = TrainConfig(branch_early=(2, 4), branching=4, reward_norm="none")
    assert (plain.leaves, plain.extra_rewards, plain.needs_features, plain.combining) == (16, (), False, "none")
    gardo = make_config([("settings", {"method": "gardo", "auxiliary": ["ocr"], "kl_weight": 1})])
    assert (gardo.extra_rewards, gardo.needs_features, gardo.combining) == (("ocr",), True, "none")
    several = {"reward": ["shapes", "sharpness"]}
    assert [make_config([("settings", {"method": m, **several})]).combining for m in ("tmpo", "flow-grpo")] == [
        "zscore"
    ] * 2
    # Weights of a scorer that only the method needs may be named.
    more = {"method": "gardo", "auxiliary": ["ocr"], "kl_weight": 1, "reward_models": ["ocr=x"]}
    assert make_config([("settings", more)]).reward_models == ("ocr=x",)


@pytest.mark.parametrize("method", ["tmpo", "tmpo-no-tree", "tree-grpo", "mix-grpo"])
def test_yaml_gives_the_same_settings_back(method: str) -> None:
    made = make_config([("settings", {"method": method, "output_dir": "out", "resolution": [64, 32]})])
    text = to_yaml(made)
    assert make_config([("yaml", yaml.safe_load(text))]) == made
    assert list(yaml.safe_load(text)) == list(type(made).model_fields)


#: The largest or the smallest value that is accepted, and one beyond: these fail in an update, or fill the memory before one.
BOUNDS = [
    ("eta", 0.01, 1e-300), ("eta", 1, 1e300), ("clip", 1000, 1e300), ("kl_weight", 1e4, 1e300), ("beta_start", 1000, 1e300),
    ("beta_end", 1e-4, 1e-300), ("beta_end", 1000, 1e300), ("kappa", 1e9, 1e300), ("kappa", 0.01, 1e-300),
    ("anchor_weight", 1e-4, 1e-300), ("anchor_weight", 1e4, 1e300), ("beta_warmup", 10**9, 10**12), ("guidance", 1000, 1e300),
    ("learning_rate", 1, 1e300), ("weight_decay", 10, 1e300), ("max_grad_norm", 1e-6, 1e-300), ("max_grad_norm", 1e12, 1e300),
    ("lora_rank", 4096, 10**12), ("lora_alpha", 1e5, 1e300), ("lora_alpha", 1e-3, 1e-300), ("remote_timeout", 86400, 1e300),
    ("reward_weights", [-1e6], [1e300]), ("resolution", [8192, 8192], [8192, 10**12]), ("updates", 10**9, 10**12),
    ("prompts_per_update", 10_000, 10**12), ("prompts_per_batch", 10_000, 10**12), ("rollout_steps", 1000, 10**12),
    ("eval_images", 10_000, 10**12), ("eval_steps", 1000, 10**12), ("inner_updates", 1000, 10**12), ("threads", 1024, 10**12),
    ("branching", 21, 22), ("decode_batch", 10**9, 10**20), ("max_batch", 10**9, 10**20), ("checkpoint_every", 10**9, 10**20),
]  # fmt: skip


@pytest.mark.parametrize(("name", "last", "beyond"), BOUNDS)
def test_numbers_have_bounds(name: str, last: Any, beyond: Any) -> None:
    assert make_config([("flags", {name: last})])
    with pytest.raises(ConfigError, match=f"flags: {name}"):
        make_config([("flags", {name: beyond})])


def test_every_number_has_two_bounds() -> None:
    """A new setting must not fail in an update either."""

    def bounds(metadata: Any) -> set[str]:
        given = [more for part in metadata for more in (part, *getattr(part, "metadata", ()))]
        return {name for part in given for name in ("ge", "gt", "le", "lt") if hasattr(part, name)}

    def parts(kind: Any, own: set[str]) -> Iterator[set[str]]:
        """The bounds of every number in a type: optional ones, and those of a tuple."""
        if kind in (int, float):
            yield own
        elif typing.get_origin(kind) is Annotated:
            yield from parts(typing.get_args(kind)[0], own | bounds(kind.__metadata__))
        else:
            for part in typing.get_args(kind):
                yield from parts(part, own)

    # These are checked as a whole, against the rollout's steps and the model.
    checked = {"branch_early", "branch_late", "branch_steps", "resolution", "adam_betas"}
    numbers = {name: [*parts(field.annotation, bounds(field.metadata))] for name, field in all_settings().items()}
    assert sum(map(bool, numbers.values())) > 30 and len(numbers["leaf_steps"]) == 1
    for name in numbers.keys() - checked:
        assert all(len(own) == 2 for own in numbers[name]), name


# -- paths ---------------------------------------------------------------------------------------------------------


def test_paths_are_expanded_and_can_be_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name in ("flux", "owner/dino", "demo", "efficientnet-lite0", "~"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "clip.bin").touch()
    paths = ("transformer", "prompts", "eval_prompts", "output_dir", "text_cache", "init_lora")
    typed = {"model": "flux", "features": "owner/dino", "reward": ["pickscore", "remote", "hpsv2"], "reward_models": [
        "pickscore=clip.bin", "remote=http://localhost:1/a=b", "hpsv2=~/h"]}  # fmt: skip
    config = make_config([("run.yaml", typed | {name: f"~/{name}" for name in paths} | {"prompts": "./~/p.txt"})])
    home = tmp_path / "home"
    assert {name: getattr(config, name) for name in paths} == {name: home / name for name in paths} | {
        "prompts": Path("./~/p.txt")
    }
    assert (config.model, config.features, config.reward_models[2]) == ("flux", "owner/dino", f"hpsv2={home}/h")
    made = absolute(config)
    assert made.prompts == tmp_path / "~" / "p.txt" and made.transformer == config.transformer
    assert (made.model, made.features) == (str(tmp_path / "flux"), str(tmp_path / "owner/dino"))
    assert made.reward_models == (f"pickscore={tmp_path}/clip.bin", "remote=http://localhost:1/a=b", f"hpsv2={home}/h")
    assert absolute(made) == made == make_config([("config.yaml", yaml.safe_load(to_yaml(made)))])
    # Names stay names, even if there is a folder of that name; so does a hub id.
    for model, features in (("demo", "efficientnet-lite0"), ("owner/flux", "facebook/dinov2-large")):
        made = absolute(make_config([("flags", {"model": model, "features": features})]))
        assert (made.model, made.features) == (model, features)


def test_windows_paths_survive() -> None:
    given = {
        "model": "C:\\models\\flux",
        "reward": ["ocr"],
        "reward_models": ["ocr=D:\\o=1\\new"],
        "features": "..\\dino",
    }
    made = absolute(make_config([("flags", given | {"prompts": "C:\\p\\new.txt"})]))
    assert make_config([("config.yaml", yaml.safe_load(to_yaml(made)))]) == made
    assert (made.model, made.features, list(made.reward_models)) == (
        given["model"], given["features"], given["reward_models"]
    )  # fmt: skip
    assert str(made.prompts).endswith("C:\\p\\new.txt")


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_config([]).updates = 3


@pytest.mark.parametrize(
    ("share", "taken_out"),
    [(1, ("latent_norm", "contrast")), ((1, 0.5), ("latent_norm",)), ((0.5, 1), ("contrast",)), (0.5, ())],
)
def test_statistics_that_are_taken_out_wholly(share: float | tuple[float, ...], taken_out: tuple[str, ...]) -> None:
    given = {"neutral": ["latent_norm", "contrast"], "neutral_share": share}
    assert TrainConfig.model_validate(given).taken_out == taken_out
    assert TrainConfig().taken_out == ()
