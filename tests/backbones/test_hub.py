"""What is taken of a model's repository on the hub, with a made-up hub."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from tmpo_trainer.backbones import find_model, hub_files, load_skeleton
from tmpo_trainer.commands import main
from tmpo_trainer.hub import hub_file
from tmpo_trainer.settings.errors import ConfigError

#: Files of repositories that nobody reads here.
OTHERS = [
    "flux1-dev.safetensors", "ae.safetensors", "sd3.5_large.safetensors", "README.md", "dev_grid.jpg",
    "text_encoders/clip_l.safetensors", "text_encoders/t5xxl_fp16.safetensors",
    "text_encoder/model.fp16.safetensors", "text_encoder_3/model.fp16-00001-of-00002.safetensors",
    "text_encoder/pytorch_model.bin", "transformer/diffusion_pytorch_model.fp16.safetensors", "vae/model.onnx",
    "transformer/diffusion_pytorch_model.non_ema-00001-of-00002.safetensors",
]  # fmt: skip
CONFIGS = [
    "model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json",
    "text_encoder_3/config.json", "text_encoder_3/model.safetensors.index.json", "tokenizer/merges.txt",
    "tokenizer/vocab.json", "tokenizer_3/spiece.model", "tokenizer_3/tokenizer.json",
]  # fmt: skip
WEIGHTS = ["text_encoder/model.safetensors", "text_encoder_3/model-00001-of-00002.safetensors",
           "vae/diffusion_pytorch_model.safetensors"]  # fmt: skip
TRANSFORMER = ["transformer/diffusion_pytorch_model-00001-of-00003.safetensors"]


@pytest.mark.parametrize(
    ("weights", "transformer", "wanted"),
    [(True, True, WEIGHTS + TRANSFORMER), (True, False, WEIGHTS), (False, True, [])],
)
def test_only_what_is_read_is_downloaded(tiny_sd35: Path, weights: bool, transformer: bool, wanted: list[str]) -> None:
    every = CONFIGS + WEIGHTS + TRANSFORMER + OTHERS
    patterns = hub_files("owner/name", tiny_sd35, weights, transformer)
    assert set(filter_repo_objects(every, allow_patterns=patterns)) == {*CONFIGS, *wanted}


def test_a_cache_that_diffusers_has_filled_is_enough(tiny_sd35: Path) -> None:
    """It does not hold what only other programs read, and offline the hub's library wants all that is asked for."""
    others = [
        "text_encoder/generation_config.json",
        "text_encoder_3/model.safetensors.index.fp16.json",
        "vae/README.txt",
    ]
    patterns = hub_files("owner/name", tiny_sd35, True, True)
    assert not list(filter_repo_objects(others, allow_patterns=patterns))


@pytest.fixture
def hub(tiny_sd35: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository on a made-up hub."""
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    shutil.copytree(tiny_sd35, repository)
    monkeypatch.chdir(tmp_path)

    def snapshot(model: str, allow_patterns: list[str]) -> str:
        names = [str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, cache / name)
        return str(cache)

    def download(model: str, name: str, **options: Any) -> str:
        if not (repository / name).is_file():
            raise RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError)
        return str(Path(snapshot(model, [name])) / name)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return repository


def test_configs_are_enough_for_a_skeleton(hub: Path) -> None:
    assert load_skeleton("owner/name", torch.float32, 12).latent_shape(32, 32) == (16, 4, 4)
    assert not list(find_model("owner/name", weights=False).rglob("*.safetensors"))


def test_fetch_checks_what_came(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["fetch", "--model", "owner/name"]) == 0
    assert "model owner/name: " in capsys.readouterr().out
    for name in ("repository", "cache"):
        (hub.parent / name / "tokenizer_3" / "tokenizer.json").unlink()
    assert main.main(["fetch", "--model", "owner/name"]) == 2
    assert "tokenizer_3 knows 1 words" in capsys.readouterr().err


def test_a_repository_without_a_pipeline(hub: Path) -> None:
    (hub / "model_index.json").unlink()
    with pytest.raises(ConfigError, match=r"owner/name has no model_index.json on the hub"):
        find_model("owner/name")


@pytest.mark.parametrize("error", [RuntimeError("Task error: CAS Client Error: connection"), HTTPError("cut off")])
def test_a_download_that_breaks_off_is_one_line(hub: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*given: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConfigError, match=rf"owner/name is not in the hub cache .* \({re.escape(str(error))}\)"):
        find_model("owner/name")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ConfigError, match=re.escape(str(error))):
        hub_file("a part", "owner/name", "model.safetensors", "--flag")
