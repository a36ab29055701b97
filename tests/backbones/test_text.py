"""Text features on disk: any tensors, computed once for all runs; the encoders are freed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tmpo_trainer.backbones import load_backbone
from tmpo_trainer.backbones.base import Backbone, LoadOptions
from tmpo_trainer.backbones.flux import FluxBackbone
from tmpo_trainer.backbones.text import Conditioning, TextCache, features_of, stack
from tmpo_trainer.training.loop import Trainer

PROMPTS = ["a red circle", "two blue squares"]
TOKENS = 12


@pytest.fixture(scope="module")
def folder(tiny_flux: Callable[[bool], Path]) -> Path:
    return tiny_flux(True)


def test_a_cache_keeps_any_tensors(tmp_path: Path) -> None:
    """Prompts of different length, with a mask and a number and no pooled vector."""

    def encode(prompts: list[str]) -> list[Conditioning]:
        calls.append(prompts)
        return [
            {
                "states": torch.rand(len(prompt), 3),
                "mask": torch.ones(len(prompt), dtype=torch.bool),
                "length": torch.tensor(len(prompt)),
            }
            for prompt in prompts
        ]

    calls: list[list[str]] = []
    cache = TextCache(tmp_path / "cache", tmp_path, ["float32"])
    made = features_of(PROMPTS, cache, encode)
    again = features_of([*PROMPTS, "third"], cache, encode)
    assert calls == [PROMPTS, ["third"]]
    for prompt in PROMPTS:
        assert all(torch.equal(made[prompt][name], again[prompt][name]) for name in ("states", "mask", "length"))
        assert made[prompt]["states"].shape == (len(prompt), 3) and made[prompt]["length"] == len(prompt)


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They hold `tokens` and `pooled` under the same name."""
    cache = TextCache(tmp_path, tmp_path, ["FluxPipeline", "torch.float32", 12])
    save_file({"tokens": torch.ones(4, 3), "pooled": torch.zeros(2)}, cache.path("a"))
    assert cache.path("a").name == "25c97e7c5820f48598d5c2afe316ccf002a55965f24f25b11c6303b55351eaf2.safetensors"
    found = features_of(["a"], cache, lambda prompts: pytest.fail("encoded again"))
    assert stack([found["a"]] * 2)["tokens"].shape == (2, 4, 3)


def whole(folder: Path) -> Backbone:
    return load_backbone(str(folder), LoadOptions(torch.float32, torch.device("cpu"), TOKENS))


def cached(folder: Path, cache: Path, prompts: list[str], tokens: int = TOKENS) -> Backbone:
    return load_backbone(
        str(folder), LoadOptions(torch.float32, torch.device("cpu"), tokens, prompts=prompts, text_cache=cache)
    )


def test_features_are_computed_once_for_all_runs_and_the_encoders_go(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_backbone(str(folder), LoadOptions(torch.float32, torch.device("cpu"), TOKENS))
    expected = whole.encode(PROMPTS)
    first = cached(folder, tmp_path, PROMPTS)
    assert first.pipeline.text_encoder is None and first.pipeline.text_encoder_2 is None
    # The prompts and the empty one.
    assert len(list(tmp_path.glob("*.safetensors"))) == len(PROMPTS) + 1
    monkeypatch.setattr(FluxBackbone, "encode_prompts", lambda *arguments: pytest.fail("encoded again"))
    second = cached(folder, tmp_path, PROMPTS[::-1])
    for backbone in (first, second):
        torch.testing.assert_close(backbone.encode(PROMPTS), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="prompt 'another' was not encoded when the model was loaded"):
        second.encode(["another"])


def test_features_of_other_settings_and_damaged_files_are_made_anew(folder: Path, tmp_path: Path) -> None:
    cached(folder, tmp_path, PROMPTS)
    files = set(tmp_path.glob("*.safetensors"))
    cached(folder, tmp_path, PROMPTS, tokens=TOKENS // 2)
    assert len(set(tmp_path.glob("*.safetensors")) - files) == len(files)
    for file in files:
        file.write_bytes(file.read_bytes()[:50])
    again = cached(folder, tmp_path, PROMPTS).encode(PROMPTS)
    expected = load_backbone(str(folder), LoadOptions(torch.float32, torch.device("cpu"), TOKENS)).encode(PROMPTS)
    torch.testing.assert_close(again, expected, atol=1e-6, rtol=1e-5)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_from_cached_features_is_the_same_run(
    folder: Path, tmp_path: Path, make_trainer: Callable[..., Trainer]
) -> None:
    plain = make_trainer(folder=folder, max_sequence_length=TOKENS, guidance=3.5, prompts=PROMPTS)
    from_disk = Trainer(
        plain.config, tmp_path, cached(folder, tmp_path / "text", PROMPTS), plain.judges.rewards, plain.prompts
    )
    expected, got = plain.update(), from_disk.update()
    for name in ("reward/red", "lgmd", "loss", "grad_norm"):
        assert got[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)
