"""Save Leaves and Tree Animation: what is in their files, read back with Pillow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

SEED = 2**63 + 5


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def graph() -> dict[str, dict[str, Any]]:
    """4 is the sampler of two trees with 9 leaves each, 5 its pictures, 6 their scores, 7 the four best."""
    return {
        "1": node("TMPO_DemoModelLoader"),
        "2": node("CLIPTextEncode", clip=["1", 1], text="two red circles"),
        "3": node("EmptySD3LatentImage", width=64, height=64, batch_size=2),
        "4": node("TMPO_TreeSampler", model=["1", 0], positive=["2", 0], negative=["2", 0], latent_image=["3", 0], seed=SEED,
                  steps=8, cfg=1.0, scheduler="normal", branch_steps="1, 4", branching=3, kernel="cps", eta=0.7, max_batch=0,
                  solver="ab2"),
        "5": node("VAEDecode", samples=["4", 0], vae=["1", 2]),
        "6": node("TMPO_ScoreImages", images=["5", 0], prompt="two red circles", reward="sharpness", model="(hub)"),
        "7": node("TMPO_SelectBranches", images=["5", 0], scores=["6", 0], mode="best by score", count=4, min_score=0.0,
                  beta=2.0, seed=0, index=0),
        "8": node("TMPO_TreeView", tree=["4", 1], images=["5", 0], scores=["6", 0], theme="dark", beta=1.0, selected=-1),
    }  # fmt: skip


def save(images: list[Any], **inputs: Any) -> dict[str, Any]:
    return node("TMPO_SaveLeaves", images=images, filename_prefix="shared/leaf", **inputs)


def opened(comfy: Any, found: dict[str, Any]) -> list[tuple[np.ndarray, dict[str, Any], dict[str, str]]]:
    """Pixels, what a picture says of itself, and all texts of the files that a node reports."""
    pictures = []
    for file in found["images"]:
        assert file["type"] == "output"
        with Image.open(comfy.base / "output" / file["subfolder"] / file["filename"]) as picture:
            pictures.append((np.asarray(picture), json.loads(picture.text["tmpo"]), dict(picture.text)))
    return pictures


def test_saved_leaves_say_which_they_are(comfy: Any) -> None:
    both = {"tree": ["4", 1], "scores": ["6", 0]}
    run = {
        **graph(),
        "20": save(["5", 0], **both),
        "21": save(["7", 0], tree=["4", 1], scores=["7", 2], indices=["7", 3]),
        "22": save(["5", 0], **both, indices="12, 3"),
        "23": save(["7", 0]),
        "9": {**graph()["7"], "inputs": {**graph()["7"]["inputs"], "count": 18}},
        "24": save(["9", 0], tree=["4", 1], scores=["9", 2], indices=["9", 3]),
    }
    found = comfy.run(run)
    everything = opened(comfy, found["20"])
    (tree,) = found["8"]["tmpo_tree"]
    assert len(everything) == len(tree["leaves"]) == 18
    for leaf in tree["leaves"]:
        pixels, about, texts = everything[leaf["index"]]
        assert about == {
            "leaf": leaf["index"], "seed": SEED, "path": ", ".join(map(str, leaf["path"])), "steps": 8,
            "branch_steps": "1, 4", "kernel": "cps", "eta": 0.7, "solver": "ab2", "latent": leaf["prompt"],
            "prompt": "two red circles", "scores": leaf["scores"],
        }  # fmt: skip
        assert json.loads(texts["prompt"]).keys() == run.keys()
        assert np.abs(pixels.astype(int) - comfy.image(leaf["image"])).max() <= 1

    # Some leaves are those of the whole batch, however they came.
    chosen = opened(comfy, found["21"])
    best = sorted(tree["leaves"], key=lambda leaf: (-leaf["scores"]["sharpness"], leaf["index"]))[:4]
    assert [about["leaf"] for _, about, _ in chosen] == [leaf["index"] for leaf in best]
    picked = opened(comfy, found["22"])
    assert [about["leaf"] for _, about, _ in picked] == [12, 3]
    ranked = opened(comfy, found["24"])
    assert len({about["leaf"] for _, about, _ in ranked}) == 18 and ranked[0][1]["leaf"] == best[0]["index"] != 0
    for pixels, about, _ in (*chosen, *picked, *ranked):
        whole, said, _ = everything[about["leaf"]]
        assert (pixels == whole).all() and about == said
    # Without a tree, the place in the batch.
    assert [about for _, about, _ in opened(comfy, found["23"])] == [{"leaf": i} for i in range(4)]
    # Every file has its own name.
    names = [file["filename"] for at in ("20", "21", "22", "23") for file in found[at]["images"]]
    assert len(set(names)) == len(names) == 28


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"images": ["7", 0]}, "images has 4 entries, but the tree has 18 leaves: connect indices"),
        ({"images": ["5", 0], "indices": "18"}, "18 is not in a batch of 18"),
        ({"images": ["7", 0], "indices": "1, 2"}, "indices has 2 entries for 4 images"),
        ({"images": ["5", 0], "indices": ", ".join(map(str, range(17, -1, -1)))}, "all 18 images in another order"),
        ({"images": ["5", 0], "indices": "1; 2"}, "'1; 2' are no places in a batch: write numbers"),
        ({"images": ["7", 0], "indices": "0, 1, 2, 3", "scores": ["6", 0]}, "scores belong to other images"),
    ],
)
def test_what_does_not_belong_together(comfy: Any, inputs: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        comfy.run({**graph(), "20": save(**{"tree": ["4", 1], **inputs})})


def test_files_stay_in_the_output_folder(comfy: Any) -> None:
    outside = save(["5", 0])
    outside["inputs"]["filename_prefix"] = "../../elsewhere/leaf"
    with pytest.raises(Exception, match="outside the output folder"):
        comfy.run({**graph(), "20": outside})


def test_no_metadata_if_it_is_disabled(nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths  # type: ignore[import-not-found]
    from comfy.cli_args import args  # type: ignore[import-not-found]

    monkeypatch.setattr(args, "disable_metadata", True)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    nodes.share.SaveLeaves.execute(torch.rand(2, 16, 16, 3), "leaf")
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["leaf_00001_.png", "leaf_00002_.png"]
    for file in files:
        with Image.open(file) as picture:
            assert picture.text == {}


def test_an_animation(comfy: Any) -> None:
    shared = {"tree": ["4", 1], "images": ["5", 0], "filename_prefix": "shared/tree", "frame_time": 60, "size": 640}
    found = comfy.run({
        **graph(),
        "20": node("TMPO_TreeAnimation", **shared, format="webp", theme="dark", scores=["6", 0], vae=["1", 2]),
        "21": node("TMPO_TreeAnimation", **shared, format="gif", theme="light"),
    })  # fmt: skip
    for at, dark in (("20", True), ("21", False)):
        assert found[at]["animated"] == [True]
        (file,) = found[at]["images"]
        with Image.open(comfy.base / "output" / file["subfolder"] / file["filename"]) as animation:
            # Two columns beyond the start.
            assert animation.n_frames == 17 and max(animation.size) <= 640
            frames = []
            for frame in range(animation.n_frames):
                animation.seek(frame)
                frames.append(np.asarray(animation.convert("L")).astype(float))
            assert animation.info["duration"] == 24 * 60
            exif = animation.getexif()
        background = frames[0][-3:].mean()
        assert background < 60 if dark else background > 200
        # What differs from the background: little at the start, then the predictions, then the leaves.
        shown = [(np.abs(frame - background) > 20).mean() for frame in (frames[0], frames[8], frames[-1])]
        assert 2 * shown[0] < shown[1] and 1.5 * shown[1] < shown[2], shown
        if dark:
            assert json.loads(exif[0x0110].removeprefix("prompt:"))["20"]["class_type"] == "TMPO_TreeAnimation"


def test_transparency_is_saved(comfy: Any) -> None:
    """As Save Image does."""
    run = {
        "1": node("EmptyImage", width=32, height=24, batch_size=1, color=0x20FF40),
        "2": node("SolidMask", value=0.25, width=32, height=24),
        "3": node("JoinImageWithAlpha", image=["1", 0], alpha=["2", 0]),
        "4": save(["3", 0]),
    }
    ((pixels, *_),) = opened(comfy, comfy.run(run)["4"])
    assert pixels.shape == (24, 32, 4) and pixels[0, 0].tolist() == [0x20, 0xFF, 0x40, 191]
