"""Trackers: checked before anything is loaded, resumed with the run, and not needed for training. wandb is made up here."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tmpo_trainer.settings.config import TrainConfig
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.settings.presets import make_config
from tmpo_trainer.training import trackers


def test_wandb_without_a_login_is_an_error_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb: Any = ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    calls = []

    def login() -> None:
        calls.append(1)
        raise RuntimeError("No API key\nconfigured")

    wandb.login = login
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for mode in (None, "online"):
        monkeypatch.delenv("WANDB_MODE", False) if mode is None else monkeypatch.setenv("WANDB_MODE", mode)
        with pytest.raises(ConfigError, match=r"run `wandb login`.*WANDB_MODE=offline \(No API key configured\)$"):
            trackers.check("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.check("wandb")
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("tracker", "new", "resumed"),
    [
        ("wandb", {"resume": "allow"}, {"resume": "allow"}),
        ("trackio", {"resume": "never"}, {"resume": "allow"}),
        ("tensorboard", {}, {"purge_step": 8}),
    ],
)
def test_a_resumed_run_goes_on_in_its_tracker(
    tmp_path: Path, tracker: Any, new: dict[str, Any], resumed: dict[str, Any]
) -> None:
    given = []
    accelerator: Any = SimpleNamespace(
        project_configuration=SimpleNamespace(logging_dir=""),
        is_main_process=True,
        init_trackers=lambda project, settings, more: given.append(more[tracker]),
    )
    config = TrainConfig(tracker=tracker)
    for done in (None, 7, 7, None):
        trackers.start(accelerator, config, tmp_path, done)
    assert new.items() <= given[0].items() and resumed.items() <= given[1].items()
    if tracker == "wandb":
        ids = [more["id"] for more in given]
        assert ids[0] == ids[1] == ids[2] != ids[3]


def test_a_tracker_that_fails_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    sent = []

    def fail(*arguments: Any, **more: Any) -> None:
        raise KeyError("the disk is full")

    bad = SimpleNamespace(name="bad", log=fail, finish=fail)
    good = SimpleNamespace(name="good", log=lambda figures, step: sent.append(step), finish=lambda: sent.append("end"))
    accelerator: Any = SimpleNamespace(trackers=[bad, good], end_training=lambda: None)
    trackers.log(accelerator, {"loss": 1.0}, 1)
    trackers.log(accelerator, {"loss": 1.0}, 2)
    assert capsys.readouterr().err.count("tracker bad failed, training goes on without it") == 1
    accelerator.trackers.append(bad)
    trackers.end(accelerator)
    assert sent == [1, 2, "end"]


def test_settings_go_along_and_local_paths_do_not(tmp_path: Path) -> None:
    sent: list[Any] = []
    accelerator: Any = SimpleNamespace(
        project_configuration=SimpleNamespace(), is_main_process=True, init_trackers=lambda *all: sent.append(all)
    )
    paths = {
        name: str(tmp_path / name) for name in ("model", "features", "prompts", "output_dir", "init_lora", "text_cache")
    }
    given = paths | {"reward": ["pickscore"], "reward_models": [f"pickscore={tmp_path}/x"], "tracker": "tensorboard"}
    trackers.start(accelerator, make_config([("flags", given | {"kappa": 3})]), tmp_path, None)
    ((project, settings, _),) = sent
    assert project == "tmpo" and settings["kappa"] == 3 and settings["reward"] == "('pickscore',)"
    assert str(tmp_path) not in str(settings)
