"""Writes a LoRA as a safetensors file that diffusers and ComfyUI apply alike. Its metadata says how it was trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import __version__
from ..backbones.base import Backbone
from ..files import flush, let_read
from ..processes import whole
from .file import FILE_NAME


def export_lora(backbone: Backbone, folder: Path, about: dict[str, str], write: bool = True) -> bool:
    """Writes `folder/pytorch_lora_weights.safetensors` from the transformer's adapter and checks the file.

    alpha / rank is folded into lora_B and the metadata says alpha = rank: ComfyUI ignores that metadata and assumes a
    scale of 1, so any other export would be applied at different strengths.

    Args:
        about: `tmpo.*` metadata (method, step, rewards, ...); no paths, prompts or machine names.
        write: whether this process writes; with several processes, all must call this function.

    Returns:
        whether the LoRA differs from zero (it does not after a run that learnt nothing).

    Raises:
        RuntimeError: the file does not read back as written.
    """
    transformer = backbone.transformer
    config = transformer.peft_config["default"]
    state = get_peft_model_state_dict(transformer, adapter_name="default")
    scale = config.lora_alpha / config.r
    layers = {
        name: (whole(value) * (scale if ".lora_B." in name else 1)).detach().float().cpu().contiguous()
        for name, value in state.items()
    }
    changed = any(bool(value.any()) for name, value in layers.items() if ".lora_B." in name)
    if not write:
        return changed
    # No more of peft's config: diffusers hands all of it to peft, and an older one refuses fields that it does not know.
    # Where a pattern of names leaves modules out, the names themselves: a reader of the pattern would miss those.
    targets = config.target_modules
    if config.exclude_modules:
        targets = {name.removesuffix(".lora_A.weight") for name in layers if name.endswith(".lora_A.weight")}
    adapter = {"r": config.r, "lora_alpha": config.r, "target_modules": sorted(targets)}
    expected = {f"transformer.{name}": value for name, value in layers.items()}
    folder.mkdir(parents=True, exist_ok=True)
    # A name of its own, so that what a kill leaves is found here the next time.
    temporary = folder / ".lora.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        backbone.pipeline.save_lora_weights(
            temporary, transformer_lora_layers=layers, transformer_lora_adapter_metadata=adapter
        )
        written = temporary / FILE_NAME
        with safe_open(written, "pt") as file:
            metadata = dict(file.metadata())
        metadata |= {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{backbone.architecture}/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.title": f"{about.get('method', 'tmpo').upper()} LoRA ({about.get('rewards', '')})",
            **{f"tmpo.{key}": value for key, value in about.items()},
            "tmpo.model": backbone.name,
            "tmpo.version": __version__,
        }
        save_file(expected, written, metadata)
        let_read(written)
        if not _holds(written, expected):
            raise RuntimeError(f"{folder / FILE_NAME} does not read back as written: is the disk full?")
        flush(written)
        written.replace(folder / FILE_NAME)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return changed


def _holds(file: Path, expected: dict[str, Tensor]) -> bool:
    """Whether a file has these tensors. What it reads is gone when it returns: Windows keeps a mapped file from being moved."""
    found = load_file(file)
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())
