"""Scorers whose weights are on the device only while they score."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tmpo_trainer.commands import loading
from tmpo_trainer.rewards import Parked, factors, hpsv2, imagereward, pickscore
from tmpo_trainer.settings.presets import make_config

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a red circle", "a green triangle"]


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "imagereward"])
def test_parking_changes_no_score(
    name: str, clip_folder: Path, network: imagereward.ImageReward, bert: Any, images: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The weights are on the device while the scorer works and go back afterwards, as calls of `to` and forward show."""

    def make() -> Any:
        if name == "imagereward":
            return imagereward.ImageRewardScorer(network, bert, CPU)
        scorer = pickscore.load(CPU, str(clip_folder))
        return scorer if name == "pickscore" else hpsv2.HpsScorer(scorer.towers)

    expected = make().score(images, PROMPTS)
    assert expected.std() > 1e-4
    # Another one, that has not encoded the prompts yet.
    scorer = make()
    events: list[str] = []
    move, run = nn.Module.to, nn.Module.__call__

    def to(module: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
        events.extend(str(found) for found in (*arguments, *options.values()) if isinstance(found, torch.device))
        return move(module, *arguments, **options)

    def call(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        events.append("works")
        return run(module, *arguments, **options)

    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(nn.Module, "__call__", call)
    # The same device by another name.
    parked = Parked(scorer, torch.device("cpu:0"))
    assert torch.equal(parked.score(images, PROMPTS), expected)
    assert [event for event, _ in itertools.groupby(events)] == ["cpu", "cpu:0", "works", "cpu"]
    assert parked.name == name


def test_what_the_prompts_leave_open_is_measured_on_the_device(images: np.ndarray) -> None:
    class Open:
        name, device = "open", CPU

        def to(self, device: torch.device) -> None:
            self.device = device

        def factors(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
            return {str(self.device): np.zeros(len(images))}

    parked = Parked(Open(), torch.device("cpu:0"))
    assert factors([("open", parked)], images, PROMPTS).keys() == {"cpu:0"}
    plain = SimpleNamespace(name="plain", to=lambda device: None)
    assert factors([("plain", Parked(plain, CPU))], images, PROMPTS) == {}


def test_scorers_are_parked_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or all of them would be on the device at once."""
    events: list[str] = []

    def load(name: str, *arguments: Any) -> Any:
        events.append(f"{name} loaded")
        return SimpleNamespace(name=name, to=lambda device: events.append(f"{name} parked"))

    monkeypatch.setattr(loading, "load_scorer", load)
    loading.scorers(make_config([("flags", {"reward": ["a", "b"], "offload_scorers": True})]), CPU)
    assert events == ["a loaded", "a parked", "b loaded", "b parked"]


@pytest.mark.parametrize("fails", ["score", "to"])
def test_a_parked_scorer_that_fails_comes_back(fails: str, images: np.ndarray) -> None:
    """While it scores, or half-way to a device without room."""

    class Failing:
        name, device = "failing", ""

        def to(self, device: torch.device) -> None:
            self.device = str(device)
            if fails == "to" and self.device == "cpu:0":
                raise RuntimeError("out of memory")

        def score(self, *arguments: Any) -> Tensor:
            assert self.device == "cpu:0"
            raise ValueError("no such picture")

    scorer = Failing()
    with pytest.raises((RuntimeError, ValueError), match="out of memory" if fails == "to" else "no such picture"):
        Parked(scorer, torch.device("cpu:0")).score(images, PROMPTS)
    assert scorer.device == "cpu"
