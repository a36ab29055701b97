"""The settings that all methods share: what must hold between them, and what a run and the loop ask of them."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tmpo_trainer.settings.config import TrainConfig, to_yaml
from tmpo_trainer.settings.presets import make_config


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
        ({"branch_early": (1, 2, 6)}, "must stay below rollout_steps 6"),
        ({"branch_early": (1,)}, "leaves nothing to train"),
        (
            {"max_batch": 1, "prompts_per_batch": 2, "prompts_per_update": 2},
            "max_batch 1 cannot hold one latent of each of 2",
        ),
        ({"replay_batch": 1, "prompts_per_batch": 2, "prompts_per_update": 2}, "replay_batch 1 cannot hold"),
        ({"kappa": 3.0}, "Extra inputs are not permitted"),
        ({"learning_rate": float("nan")}, "finite number"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


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


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_config([]).updates = 3
