"""Tiny members of the FLUX.1 and SD3.5 families that differ from those in conftest.py by their configs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline


@pytest.fixture(scope="session")
def tiny_kontext(tiny_flux: Callable[[bool], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1-Kontext-dev: the parts of FLUX.1-dev in another pipeline."""
    folder = shutil.copytree(tiny_flux(True), tmp_path_factory.mktemp("kontext") / "model")
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "FluxKontextPipeline"}))
    return folder


@pytest.fixture(scope="session")
def tiny_sd35_large(tiny_sd35: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD3.5-Large: 38 blocks, none with a second attention, and rms-normalised queries and keys."""
    torch.manual_seed(0)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd35)
    shape = {**pipeline.transformer.config, "num_layers": 38, "dual_attention_layers": ()}
    transformer = SD3Transformer2DModel.from_config(shape)
    with torch.no_grad():
        transformer.proj_out.weight.normal_(std=0.2)
        transformer.context_embedder.weight.mul_(4)
    pipeline.register_modules(transformer=transformer)
    folder = tmp_path_factory.mktemp("sd35_large") / "model"
    pipeline.save_pretrained(folder)
    return folder
