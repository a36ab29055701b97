"""The user's own pictures as the anchor on data, from a folder to a resumed run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tmpo_trainer.backbones.base import Backbone
from tmpo_trainer.commands import loading, main
from tmpo_trainer.settings.config import TrainConfig
from tmpo_trainer.settings.presets import make_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of other sizes: bands of red, green and blue, with captions beside them."""
    made = tmp_path / "pictures"
    made.mkdir()
    for number, size in enumerate(((96, 64), (64, 64), (64, 160))):
        picture = np.zeros((size[1], size[0], 3), np.uint8)
        picture[size[1] // 3 :, size[0] // 2 :, number] = 255
        Image.fromarray(picture).save(made / f"{number}.png")
        (made / f"{number}.txt").write_text(f"one red circle {number}")
    return made


def settings(folder: Path) -> TrainConfig:
    return make_config([("test", {"data_folder": folder, "data_weight": 0.5, "resolution": (64, 64)})])


def test_pictures_become_latents_as_the_vae_decodes_them(folder: Path, load: Callable[..., Backbone]) -> None:
    backbone = load()
    found = loading.examples(settings(folder), backbone)
    assert found is not None
    latents, captions = found
    assert captions == [f"one red circle {number}" for number in range(3)]
    assert latents.shape == (3, *backbone.latent_shape(64, 64))
    # The middle square of a wide one, whose right half from a third down is red.
    square = np.asarray(Image.open(folder / "0.png"))[:, 16:80]
    pixels = torch.from_numpy(square.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    expected = backbone.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(backbone.unscale(latents[:1]), expected, atol=1e-4, rtol=0)
    assert loading.examples(make_config([]), backbone) is None


def test_a_run_on_pictures_resumes_bitwise(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--preset", "demo", "--method", "awm", "--prompts-per-update", "1", "--prompts-per-batch", "1", "--branching", "2",
        "--sample-every", "0", "--checkpoint-every", "1", "--no-report", "--rollout-steps", "6", "--data-weight", "0.5",
        "--data-images", "2", "--data-folder", str(folder), "--threads", "1", "--updates", "2",
    ]  # fmt: skip
    assert main.main([*flags, "--output-dir", str(tmp_path / "run")]) == 0
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["data_loss"] > 0 for line in lines) and lines[0]["data_loss"] != lines[1]["data_loss"]
    file = run / "pytorch_lora_weights.safetensors"
    first = load_file(file)
    assert main.main(["--resume", str(run / "checkpoint-1")]) == 0
    again = load_file(file)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    capsys.readouterr()
    (folder / "1.txt").unlink()
    loading.captioned.cache_clear()
    assert main.main([*flags, "--dry-run"]) == 2
    assert f"{folder / '1.png'} has no prompt" in capsys.readouterr().err
