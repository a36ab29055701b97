"""Checkpoints in open_clip's names, through transformers and through the real open_clip, where it is installed.

open_clip needs torchvision, which on a machine without CUDA may be missing or broken: then empty modules stand in for it, in
a process of their own, since neither its model nor its tokenizer uses any of it; its preprocessing does and is compared only
with a real one.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tmpo_trainer.rewards import clipscore, hpsv2, pickscore
from tmpo_trainer.rewards.parts import clip, openclip
from tmpo_trainer.settings.errors import ConfigError

CPU = torch.device("cpu")

if importlib.util.find_spec("open_clip") is None:
    pytest.skip("open-clip-torch is not installed", allow_module_level=True)

PROMPTS = ["a photo of a cat", "  It's 3 o'clock,\n&amp;quot;NOW&amp;quot; ", "caf\u00e9 \u4f60\u597d \U0001f680", "x" * 400,
           "schÃ¶n", "a_b-c/d 12345 don't we'll", ""]  # fmt: skip
SIZES = ((224, 224), (300, 200), (90, 401))

SCRIPT = """
import importlib.machinery, json, sys, types
from pathlib import Path
import numpy as np, torch
from PIL import Image
# Before there are stand-ins, which transformers would take for the real thing.
from tmpo_trainer.rewards import clipscore, hpsv2, pickscore

try:
    import torchvision
    real = True
except Exception:
    real = False
    for name in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional"):
        module = types.ModuleType("torchvision" + name)
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        module.__path__ = []
        module.__getattr__ = lambda attribute: type(attribute, (), {"BICUBIC": 3})
        sys.modules[module.__name__] = module
        parent, _, child = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
import open_clip
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

torch.manual_seed(0)
vision = CLIPVisionCfg(layers=2, width=128, head_width=64, image_size=224, patch_size=32)
model = CLIP(48, vision, CLIPTextCfg(context_length=77, vocab_size=49408, width=128, heads=2, layers=2)).eval()
for parameter in model.parameters():
    if parameter.dim():
        torch.nn.init.normal_(parameter, std=0.1)
inputs = torch.load(sys.argv[1])
out = {"state": model.state_dict(), "tokens": open_clip.get_tokenizer("ViT-H-14")(inputs["prompts"])}
with torch.no_grad():
    out["text"] = model.encode_text(out["tokens"])
    out["image"] = model.encode_image(inputs["pixels"])
if real:
    transform = open_clip.image_transform(224, is_train=False, resize_mode="longest")
    out["prepared"] = torch.stack([transform(Image.fromarray(picture.numpy())) for picture in inputs["pictures"]])

# Now as users get it.
folder = Path(sys.argv[2]).parent
for kind in ("gelu", "quick"):
    (folder / kind).mkdir()
    torch.save({"state_dict": model.state_dict()}, folder / kind / "open_clip_pytorch_model.bin")
    config = {"quick_gelu": True} if kind == "quick" else {}
    (folder / kind / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
out["scores"], out["towers"] = {}, set()
for kind, module in (("gelu", hpsv2), ("gelu", clipscore), ("gelu", pickscore), ("quick", clipscore)):
    scorer = module.load(torch.device("cpu"), str(folder / kind / "open_clip_pytorch_model.bin"))
    scores = [
        scorer.score(picture.numpy()[None].repeat(len(inputs["prompts"]), 0), inputs["prompts"])
        for picture in inputs["pictures"]
    ]
    out["scores"][kind, scorer.name] = torch.stack(scores)
    out["towers"].add(type(scorer.towers).__name__)
torch.save(out, sys.argv[2])
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What open_clip makes of prompts, pixels and pictures, in a process of its own."""
    folder = tmp_path_factory.mktemp("open_clip")
    generator = np.random.default_rng(0)
    pictures = []
    for width, height in SIZES:
        small = Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        pictures.append(torch.tensor(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))))
    inputs = {"prompts": PROMPTS, "pixels": torch.randn(3, 3, 224, 224), "pictures": pictures}
    torch.save(inputs, folder / "in.pt")
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder / "in.pt"), str(folder / "out.pt")],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return {**inputs, **torch.load(folder / "out.pt"), "folder": folder}


@pytest.fixture
def without_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openclip, "package", lambda: None)


def towers_of(theirs: dict, batch: int = clip.BATCH) -> clip.ClipTowers:
    """HPS's, through transformers."""
    model = openclip.build_transformers("hpsv2", Path("hps.pt"), theirs["state"], openclip.config_of(theirs["state"]))
    return clip.ClipTowers(model, clip.open_clip_tokenizer(), clip.pad(224), CPU, openclip.clean, batch)


@pytest.mark.parametrize(
    ("kind", "module"), [("gelu", hpsv2), ("gelu", clipscore), ("gelu", pickscore), ("quick", clipscore)]
)
def test_scores_are_the_same_both_ways(theirs: dict, without_open_clip: None, kind: str, module: ModuleType) -> None:
    """Square, wide and tall pictures with every prompt."""
    assert theirs["towers"] == {"OpenClipTowers"}
    scorer = module.load(CPU, str(theirs["folder"] / kind / "open_clip_pytorch_model.bin"))
    assert type(scorer.towers) is clip.ClipTowers
    ours = torch.stack([scorer.score(p.numpy()[None].repeat(len(PROMPTS), 0), PROMPTS) for p in theirs["pictures"]])
    expected = theirs["scores"][kind, scorer.name]
    assert expected.std() > 1e-3 * expected.abs().max()
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_activation_and_normalisation_come_from_the_file_beside(
    theirs: dict, tmp_path: Path, without_open_clip: None
) -> None:
    """The scores with OpenAI's activation differ. A missing or broken config is an error of one line."""
    plain, quick = theirs["scores"]["gelu", "clipscore"], theirs["scores"]["quick", "clipscore"]
    assert (plain - quick).abs().max() > 1e-4
    file, beside = tmp_path / "model.safetensors", tmp_path / "open_clip_config.json"
    save_file(theirs["state"], file)
    for text in (None, "no json", "[]", "{}", '{"model_cfg": "ViT"}', '{"model_cfg": {}, "preprocess_cfg": {"mean": 1}}',
                 '{"model_cfg": {}, "preprocess_cfg": {"resize_mode": "squash"}}'):  # fmt: skip
        if text is not None:
            beside.write_text(text)
        with pytest.raises(ConfigError, match=r"clipscore.*open_clip_config\.json") as caught:
            clipscore.load(CPU, str(file))
        assert "\n" not in str(caught.value)
    half = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "shortest"}
    beside.write_text(json.dumps({"model_cfg": {"quick_gelu": True}, "preprocess_cfg": half}))
    scorer = clipscore.load(CPU, str(file))
    white = scorer.towers.prepare([Image.new("RGB", (300, 250), "white")])
    torch.testing.assert_close(white, torch.ones(1, 3, 224, 224))
    scorer.towers.prepare = clip.crop(224)
    found = scorer.score(theirs["pictures"][1].numpy()[None], PROMPTS[:1])
    torch.testing.assert_close(found, quick[1, :1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("error", [ImportError, RuntimeError, OSError, AttributeError])
def test_an_open_clip_that_cannot_be_imported_is_done_without(
    theirs: dict, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def broken(name: str) -> ModuleType:
        raise error("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", broken)
    scorer = hpsv2.load(CPU, str(theirs["folder"] / "gelu" / "open_clip_pytorch_model.bin"))
    assert type(scorer.towers) is clip.ClipTowers


def test_a_file_that_is_no_checkpoint_is_one_line(theirs: dict, tmp_path: Path, without_open_clip: None) -> None:
    file = tmp_path / "model.safetensors"
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {}}')
    for tensors, said in (
        ({"text_model.x": torch.zeros(2)}, "holds only the text tower"),
        ({k: v for k, v in theirs["state"].items() if "ln_post" not in k}, "is not its checkpoint"),
    ):
        save_file(tensors, file)
        for load in (pickscore.load, clipscore.load):
            with pytest.raises(ConfigError, match=rf"model\.safetensors {said}") as caught:
                load(CPU, str(file))
            assert "\n" not in str(caught.value)


@torch.no_grad()
def test_features_of_the_mapped_model(theirs: dict) -> None:
    model = towers_of(theirs).model
    image = model.get_image_features(theirs["pixels"]).pooler_output
    torch.testing.assert_close(image, theirs["image"], atol=1e-6, rtol=1e-6)
    text = model.get_text_features(theirs["tokens"]).pooler_output
    torch.testing.assert_close(text, theirs["text"], atol=1e-6, rtol=1e-6)


def test_tokens(theirs: dict) -> None:
    """Up to the end of text; what follows is padding, which open_clip writes as 0."""
    tokenizer = clip.open_clip_tokenizer()
    assert tokenizer is not None
    ours = tokenizer([openclip.clean(prompt) for prompt in PROMPTS], max_length=77, truncation=True)["input_ids"]
    for prompt, mine, row in zip(PROMPTS, ours, theirs["tokens"].tolist(), strict=True):
        assert mine == row[: len(mine)] and not any(row[len(mine) :]), prompt


@torch.no_grad()
def test_text_features_from_prompts(theirs: dict) -> None:
    """The scorer's own path: its cleaning and tokenizer, unit features."""
    text = torch.nn.functional.normalize(theirs["text"], dim=-1)
    torch.testing.assert_close(towers_of(theirs).text_features(PROMPTS), text, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_features_of_some_prompts_are_kept(theirs: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server sees any number of them."""
    monkeypatch.setattr(clip, "KEPT", 2)
    towers = towers_of(theirs)
    whole = towers.text_features(PROMPTS)
    assert len(PROMPTS) > 2 and list(towers._texts) == PROMPTS[-2:]
    torch.testing.assert_close(towers.text_features(PROMPTS), whole, atol=1e-5, rtol=1e-5)


def test_preprocessing(theirs: dict) -> None:
    if "prepared" not in theirs:
        pytest.skip("torchvision does not work here")
    ours = clip.pad(224)([Image.fromarray(picture.numpy()) for picture in theirs["pictures"]])
    torch.testing.assert_close(ours, theirs["prepared"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_many_pictures_are_as_one_by_one(theirs: dict) -> None:
    """K pictures of one prompt, in batches of any size."""
    scorer = hpsv2.HpsScorer(towers_of(theirs, batch=2))
    images = np.random.default_rng(1).integers(0, 256, (5, 40, 60, 3), dtype=np.uint8)
    together = scorer.score(images, ["a cat"] * 5)
    alone = torch.cat([scorer.score(image[None], ["a cat"]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.std() > 1e-4
