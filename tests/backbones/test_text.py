"""Text features on disk: any tensors, computed once for all runs; the encoders are freed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tmpo_trainer.backbones import base, encode_text, load_backbone, load_skeleton, text
from tmpo_trainer.backbones.base import Backbone, LoadOptions
from tmpo_trainer.backbones.flux import FluxBackbone
from tmpo_trainer.backbones.text import Conditioning, TextCache, fill, stack
from tmpo_trainer.settings.errors import ConfigError
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
    fill(cache, PROMPTS, encode, batch=2)
    made = {prompt: cache.get(prompt) for prompt in PROMPTS}
    fill(cache, [*PROMPTS, "third"], encode, batch=2)
    # Every call has the same number of prompts.
    assert calls == [PROMPTS, ["third", "third"]]
    for prompt in PROMPTS:
        before, after = made[prompt], cache.get(prompt)
        assert before and after
        assert all(torch.equal(before[name], after[name]) for name in ("states", "mask", "length"))
        assert before["states"].shape == (len(prompt), 3) and before["length"] == len(prompt)


def test_another_version_of_the_libraries_makes_features_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their pipelines decide on templates and layers."""
    cache = TextCache(tmp_path, tmp_path, ["FluxPipeline", "torch.float32", 12])
    save_file({"tokens": torch.ones(4, 3), "pooled": torch.zeros(2)}, cache.path("a"))
    again = TextCache(tmp_path, tmp_path, ["FluxPipeline", "torch.float32", 12])
    fill(again, ["a"], lambda prompts: pytest.fail("encoded again"))
    found = again.get("a")
    assert found and stack([found] * 2)["tokens"].shape == (2, 4, 3)
    monkeypatch.setattr(text, "version", lambda name: "9.9")
    assert TextCache(tmp_path, tmp_path, ["FluxPipeline", "torch.float32", 12]).missing(["a"]) == ["a"]


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
    loaded = classmethod(lambda *arguments, **options: pytest.fail("the text encoders were loaded again"))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loaded)
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


def test_features_are_read_when_they_are_needed(folder: Path, tmp_path: Path) -> None:
    """None are held: without its file a prompt has none."""
    backbone = cached(folder, tmp_path, PROMPTS)
    backbone.encode(PROMPTS)
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match=f"prompt 'a red circle' was not encoded .* no longer in {tmp_path}"):
        backbone.encode(PROMPTS)


def test_processes_share_the_encoding(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = LoadOptions(
        torch.float32, torch.device("cpu"), TOKENS, prompts=[f"prompt {i}" for i in range(20)], text_cache=tmp_path
    )
    skeleton = load_skeleton(str(folder), torch.float32, TOKENS)
    for rank, files in ((0, 11), (1, 21)):
        encode_text(str(folder), skeleton, options, slice(rank, None, 2))
        assert len(list(tmp_path.iterdir())) == files
    monkeypatch.setattr(FluxBackbone, "encode_prompts", lambda *arguments: pytest.fail("encoded again"))
    load_backbone(str(folder), options).encode(["prompt 7", ""])


def test_prompts_that_are_cut_are_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once: they are encoded once."""
    long = " ".join(["two red circles and a blue square"] * 4)
    for _ in range(2):
        cached(folder, tmp_path, ["red", "blue", long])
    told = [line for line in capsys.readouterr().err.splitlines() if "tokens" in line]
    assert told == [
        f"tmpo_trainer: 1 of 3 prompts have more than {TOKENS} tokens, and the model does not see their end "
        "(--max-sequence-length; rewards see all of it)"
    ]


def test_a_model_with_its_encoders_keeps_few_features(
    load: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load()
    expected = backbone.encode(PROMPTS)
    monkeypatch.setattr(base, "KEPT", 1)
    torch.testing.assert_close(backbone.encode(PROMPTS[::-1]), expected[::-1])
    calls: list[list[str]] = []
    original = backbone.encode_prompts
    monkeypatch.setattr(
        backbone, "encode_prompts", lambda p, chosen, *more: calls.append(chosen) or original(p, chosen, *more)
    )
    again = backbone.encode(PROMPTS)
    # The last used is still there.
    assert [set(chosen) for chosen in calls] == [set(PROMPTS[1:])]
    # To the bit, whatever else was missing: a resumed run misses other prompts than the run before it did.
    for one, other in zip(again, expected, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_disk_that_fills_keeps_what_is_written(tmp_path: Path) -> None:
    """The limit on a file's size stands in for the disk's."""
    resource = pytest.importorskip("resource")
    cache = TextCache(tmp_path, tmp_path, ["float32"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(
            ConfigError, match=f"--text-cache {tmp_path}: text features cannot be written .*too large"
        ) as told:
            fill(cache, PROMPTS, lambda prompts: [{"states": torch.ones(10)}, {"states": torch.ones(10_000)}], batch=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == [cache.path(PROMPTS[0]).name]


def test_users_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All may read what one has written. Processes with the same number, as in containers, do not take each other's file."""
    cache = TextCache(tmp_path, tmp_path, ["float32"])
    (tmp_path / "plain").touch()
    original, nested = text.save_file, []

    def save(features: Conditioning, path: Path) -> None:
        original(features, path)
        if not nested:
            nested.append(path)
            cache.put("a", features)

    monkeypatch.setattr(text, "save_file", save)
    cache.put("a", {"states": torch.ones(2)})
    assert not cache.missing(["a"]) and len(list(tmp_path.iterdir())) == 2
    assert cache.path("a").stat().st_mode == (tmp_path / "plain").stat().st_mode
    # Where only its owner may replace a file, one that is whole does.
    monkeypatch.setattr(Path, "replace", lambda *paths: (_ for _ in ()).throw(PermissionError("not the owner")))
    cache.put("a", {"states": torch.ones(2)})
    with pytest.raises(ConfigError, match="not the owner"):
        cache.put("b", {"states": torch.ones(2)})
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_without_room_is_refused_before_anything_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(folder, tmp_path / "text", PROMPTS)
    monkeypatch.setattr(Backbone, "encode_text", lambda *arguments: pytest.fail("encoded"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"^--text-cache {tmp_path}/file/text: text features cannot be written there"):
        cached(folder, tmp_path / "file" / "text", PROMPTS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"the text features of 1 prompts need .* GiB, and its disk has"):
        cached(folder, tmp_path / "text", [*PROMPTS, "third"])
    # What is there already needs no room.
    cached(folder, tmp_path / "text", PROMPTS)
