"""What a tracker is told about a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tmpo_trainer.settings.presets import make_config
from tmpo_trainer.training import trackers


def test_settings_go_along_and_local_paths_do_not(tmp_path: Path) -> None:
    sent: list[Any] = []
    accelerator: Any = SimpleNamespace(
        project_configuration=SimpleNamespace(), init_trackers=lambda *all: sent.append(all)
    )
    paths = {
        name: str(tmp_path / name) for name in ("model", "features", "prompts", "output_dir", "init_lora", "text_cache")
    }
    given = paths | {"reward": ["pickscore"], "reward_models": [f"pickscore={tmp_path}/x"], "tracker": "tensorboard"}
    trackers.start(accelerator, make_config([("flags", given | {"kappa": 3})]), tmp_path)
    ((project, settings, _),) = sent
    assert project == "tmpo" and settings["kappa"] == 3 and settings["reward"] == "('pickscore',)"
    assert str(tmp_path) not in str(settings)
