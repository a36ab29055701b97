"""CLIP models in open_clip's names, through open_clip and through transformers, where open_clip is installed.

open_clip needs torchvision, which on a machine without CUDA may be missing or broken: then empty modules stand in for it,
since neither its model nor its tokenizer uses any of it; its preprocessing does and is compared only with a real one.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tmpo_trainer.rewards import clip, open_clip_file
from tmpo_trainer.rewards.hpsv2 import HpsScorer

if importlib.util.find_spec("open_clip") is None:
    pytest.skip("open-clip-torch is not installed", allow_module_level=True)

PROMPTS = ["a photo of a cat", "  It's 3 o'clock,\n&amp;quot;NOW&amp;quot; ", "caf\u00e9 \u4f60\u597d \U0001f680", "x" * 400,
           "schÃ¶n", "a_b-c/d 12345 don't we'll", ""]  # fmt: skip
SIZES = ((224, 224), (300, 200), (90, 401))

SCRIPT = """
import importlib.machinery, sys, types
from pathlib import Path
import numpy as np, torch
from PIL import Image
from tmpo_trainer.rewards import clip, clipscore, hpsv2, open_clip_file, pickscore

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
# The scorers from files, as they are where open_clip works; and without it.
cpu, pictures = torch.device("cpu"), [picture.numpy() for picture in inputs["pictures"]]
folder = Path(sys.argv[2]).parent
torch.save({"state_dict": out["state"]}, folder / "hps.pt")
torch.save(out["state"], folder / "clip.bin")
here = open_clip_file.installed()
assert here is open_clip
for way in ("open_clip", "transformers"):
    open_clip_file.installed = lambda: here if way == "open_clip" else None
    scorers = [hpsv2.load(cpu, str(folder / "hps.pt"))]
    scorers += [module.load(cpu, str(folder / "clip.bin")) for module in (clipscore, pickscore)]
    kinds = {type(scorer.towers).__name__ for scorer in scorers}
    assert kinds == {"OpenClipTowers" if way == "open_clip" else "ClipTowers"}, kinds
    out[way] = torch.stack([
        torch.cat([scorer.score(picture[None], [prompt]) for picture in pictures for prompt in inputs["prompts"]])
        for scorer in scorers
    ])
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
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    return {**inputs, **torch.load(folder / "out.pt")}


@torch.no_grad()
def test_features_of_the_mapped_model(theirs: dict) -> None:
    model = open_clip_file.build("hpsv2", Path("hps.pt"), theirs["state"]).eval()
    image = model.get_image_features(theirs["pixels"]).pooler_output
    torch.testing.assert_close(image, theirs["image"], atol=1e-6, rtol=1e-6)
    text = model.get_text_features(theirs["tokens"]).pooler_output
    torch.testing.assert_close(text, theirs["text"], atol=1e-6, rtol=1e-6)


def test_tokens(theirs: dict) -> None:
    """Up to the end of text; what follows is padding, which open_clip writes as 0."""
    tokenizer = clip.open_clip_tokenizer()
    assert tokenizer is not None
    ours = tokenizer([open_clip_file.clean(prompt) for prompt in PROMPTS], max_length=77, truncation=True)["input_ids"]
    for prompt, mine, row in zip(PROMPTS, ours, theirs["tokens"].tolist(), strict=True):
        assert mine == row[: len(mine)] and not any(row[len(mine) :]), prompt


@torch.no_grad()
def test_scores_from_prompt_and_picture(theirs: dict) -> None:
    """The scorer's own path: its tokenizer, its padding, unit features; pictures that need no preprocessing but the mean."""
    model = open_clip_file.build("hpsv2", Path("hps.pt"), theirs["state"])
    towers = clip.ClipTowers(
        model, clip.open_clip_tokenizer(), clip.pad(224), torch.device("cpu"), open_clip_file.clean
    )
    text = torch.nn.functional.normalize(theirs["text"], dim=-1)
    torch.testing.assert_close(towers.text_features(PROMPTS), text, atol=1e-5, rtol=1e-5)


def test_scores_through_open_clip_and_through_transformers(theirs: dict) -> None:
    """hpsv2, clipscore (quick GELU) and pickscore from open_clip's files: wide, tall and square pictures, all prompts."""
    ours, other = theirs["open_clip"], theirs["transformers"]
    assert ours.shape == (3, len(SIZES) * len(PROMPTS)) and ours.std(1).min() > 1e-3
    torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)
    # The activation matters: the same weights score otherwise.
    assert (ours[1] * 30 - ours[2]).abs().max() > 1e-3


def test_preprocessing(theirs: dict) -> None:
    if "prepared" not in theirs:
        pytest.skip("torchvision does not work here")
    ours = clip.pad(224)([Image.fromarray(picture.numpy()) for picture in theirs["pictures"]])
    torch.testing.assert_close(ours, theirs["prepared"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_many_pictures_are_as_one_by_one(theirs: dict) -> None:
    """K pictures of one prompt, in batches of any size."""
    model = open_clip_file.build("hpsv2", Path("hps.pt"), theirs["state"])
    towers = clip.ClipTowers(
        model, clip.open_clip_tokenizer(), clip.pad(224), torch.device("cpu"), open_clip_file.clean, batch=2
    )
    scorer = HpsScorer(towers)
    images = np.random.default_rng(1).integers(0, 256, (5, 40, 60, 3), dtype=np.uint8)
    together = scorer.score(images, ["a cat"] * 5)
    alone = torch.cat([scorer.score(image[None], ["a cat"]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.std() > 1e-4
