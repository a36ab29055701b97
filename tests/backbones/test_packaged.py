"""The configs that travel with the package: whole, of the published sizes, used where the hub's cache has none."""

from __future__ import annotations

import json
import shutil
import socket
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

from tmpo_trainer import backbones
from tmpo_trainer.backbones import check, find_configs, find_model
from tmpo_trainer.commands import main
from tmpo_trainer.settings import discovery
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.settings.presets import preset, preset_names

#: Published sizes in billions: the network's with its fixed positions, the text encoders' together.
SIZES = {
    "black-forest-labs/FLUX.1-dev": (11.9, 4.9),
    "black-forest-labs/FLUX.1-schnell": (11.9, 4.9),
    "black-forest-labs/FLUX.1-Krea-dev": (11.9, 4.9),
    "black-forest-labs/FLUX.1-Kontext-dev": (11.9, 4.9),
    "stabilityai/stable-diffusion-3.5-medium": (2.5, 5.6),
    "stabilityai/stable-diffusion-3.5-large": (8.1, 5.6),
    "black-forest-labs/FLUX.2-dev": (32.2, 24.0),
    "black-forest-labs/FLUX.2-klein-4B": (3.9, 4.0),
    "black-forest-labs/FLUX.2-klein-base-4B": (3.9, 4.0),
    "black-forest-labs/FLUX.2-klein-9B": (9.1, 8.2),
    "black-forest-labs/FLUX.2-klein-base-9B": (9.1, 8.2),
    "Qwen/Qwen-Image": (20.4, 8.3),
    "Qwen/Qwen-Image-2512": (20.4, 8.3),
    "Tongyi-MAI/Z-Image": (6.2, 4.0),
    "Tongyi-MAI/Z-Image-Turbo": (6.2, 4.0),
}


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"network: {arguments}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return cache


@cache
def count(library: str, name: str, config: str) -> int:
    """The numbers in a part of a pipeline, from its class and config."""
    with torch.device("meta"):
        if library == "diffusers":
            made = getattr(diffusers, name).from_config(json.loads(config))
        else:
            kind = getattr(transformers, name)
            made = kind(kind.config_class.from_dict(json.loads(config)))
    return sum(value.numel() for value in (*made.parameters(), *made.buffers()))


@pytest.mark.parametrize("model", SIZES)
def test_sizes_are_the_published_ones(model: str) -> None:
    folder = backbones.packaged(model)
    assert folder is not None
    index = json.loads((folder / "model_index.json").read_text())
    parts = {name: entry for name, entry in index.items() if isinstance(entry, list)}
    assert {path.name for path in folder.iterdir()} == {"model_index.json", *parts}
    numbers = {
        name: count(*entry, (folder / name / "config.json").read_text()) / 1e9
        for name, entry in parts.items()
        if name.startswith(("transformer", "text_encoder"))
    }
    network = numbers.pop("transformer")
    assert (network, sum(numbers.values())) == pytest.approx(SIZES[model], abs=0.06)


def test_every_packaged_model_has_its_size_above_and_presets_have_no_others() -> None:
    assert {folder.name.replace("--", "/") for folder in backbones.PACKAGED.iterdir()} == SIZES.keys()
    assert {preset(name)["model"] for name in preset_names() if "model" in preset(name)} <= {*SIZES, "demo"}


#: One model of each pipeline.
EACH = {
    "FluxPipeline": "black-forest-labs/FLUX.1-dev",
    "FluxKontextPipeline": "black-forest-labs/FLUX.1-Kontext-dev",
    "StableDiffusion3Pipeline": "stabilityai/stable-diffusion-3.5-large",
    "Flux2Pipeline": "black-forest-labs/FLUX.2-dev",
    "Flux2KleinPipeline": "black-forest-labs/FLUX.2-klein-base-4B",
    "QwenImagePipeline": "Qwen/Qwen-Image-2512",
    "ZImagePipeline": "Tongyi-MAI/Z-Image-Turbo",
}


@pytest.mark.parametrize(
    "model",
    [EACH[kind] for name in discovery.names("backbones") for kind in discovery.load("backbones", name).PIPELINES],
)
def test_a_packaged_model_of_each_pipeline_passes_all_checks(model: str) -> None:
    """Every part is run once without numbers."""
    folder = find_configs(model)
    assert folder == backbones.packaged(model)
    skeleton = check.skeleton(model, folder, backbones._backbone(model, folder), torch.bfloat16, 512)
    assert skeleton.text_bytes(folder)


@pytest.fixture
def tiny(tiny_sd35: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configs of a tiny model, without vocabularies and weights, as if they were packaged under owner/name."""
    shutil.copytree(
        tiny_sd35,
        tmp_path / "configs" / "owner--name",
        ignore=lambda folder, names: [
            name for name in names if name.endswith(("tensors", "tokenizer.json", "vocab.json"))
        ],
    )
    monkeypatch.setattr(backbones, "PACKAGED", tmp_path / "configs")
    monkeypatch.setattr(check, "PACKAGED", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "configs" / "owner--name"


DRY = [
    "--dry-run",
    "--model",
    "owner/name",
    "--reward",
    "shapes",
    "--resolution",
    "32",
    "32",
    "--branch-late",
    "1",
    "3",
    "4",
]


def test_a_dry_run_needs_no_hub(tiny: Path, no_network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(DRY) == 0
    out = capsys.readouterr().out
    assert out.startswith("model owner/name on ") and "\n  text encoding: " in out and "\n  replay, " in out
    assert not no_network.exists()
    # A refusal names the model as it was given.
    (tiny / "vae" / "config.json").write_text("{}")
    assert main.main(DRY) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model owner/name" in line and str(tiny.parent) not in line


def test_the_hubs_cache_comes_first_if_it_is_complete(tiny: Path, tiny_sd35: Path, no_network: Path) -> None:
    assert find_configs("owner/name") == tiny
    snapshot = no_network / "models--owner--name" / "snapshots" / "abc"
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    snapshot.mkdir(parents=True)
    shutil.copy(tiny_sd35 / "model_index.json", snapshot)
    assert find_configs("owner/name") == tiny
    shutil.copytree(tiny_sd35, snapshot, dirs_exist_ok=True)
    assert find_configs("owner/name") == snapshot
    (snapshot / "tokenizer_3" / "tokenizer_config.json").unlink()
    assert find_configs("owner/name") == tiny


def test_a_run_without_weights_is_refused_early(
    tiny: Path, no_network: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main.main([*DRY[1:], "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tmpo_trainer: model owner/name is not in the hub cache and cannot be downloaded (")
    assert said.endswith("then give --model DIR; --dry-run needs no download\n") and said.count("\n") == 1


def test_configs_in_the_cache_are_no_weights(tiny: Path, tiny_sd35: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda model, name: str(tiny_sd35 / name))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, **options: str(tiny))
    find_model("owner/name", weights=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"^the weights of model owner/name are not in the hub cache .*OFFLINE is set"
    ):
        find_model("owner/name", weights=False)
