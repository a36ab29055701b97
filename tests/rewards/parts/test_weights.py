"""Weights that are not available."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tmpo_trainer.rewards import hpsv2, imagereward, pickscore
from tmpo_trainer.rewards.parts import weights
from tmpo_trainer.settings.errors import ConfigError

CPU = torch.device("cpu")


def test_without_a_network_the_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(repository: str, name: str, repo_type: str | None = None) -> str:
        raise LocalEntryNotFoundError("no connection\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for load, parts in (
        (pickscore.load, ("config.json", "yuvalkirstain/PickScore_v1", "pickscore=PATH")),
        (hpsv2.load, ("HPS_v2.1_compressed.pt", "xswu/HPSv2", "hpsv2=PATH")),
        (imagereward.load, ("ImageReward.pt", "zai-org/ImageReward", "imagereward=PATH")),
    ):
        with pytest.raises(ConfigError) as caught:
            load(CPU)
        assert all(part in str(caught.value) for part in (*parts, "no connection")) and "\n" not in str(caught.value)


def test_a_tensor_that_repeats_its_numbers_is_refused(tmp_path: Path) -> None:
    """It would take its whole size as soon as it is converted: a file of a kilobyte could ask for any amount of memory."""
    torch.save({"a": torch.zeros(1, dtype=torch.float16).expand(2**20)}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"weights\.pt cannot be read \(a tensor is larger than its numbers"):
        weights.read_tensors("mine", tmp_path / "weights.pt")
