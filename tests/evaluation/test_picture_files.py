"""Picture files: which prompt one has, and how files of different sizes and kinds are read and scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from tmpo_trainer.demo import domain
from tmpo_trainer.evaluation import picture_files
from tmpo_trainer.rewards.shapes import ShapesScorer

CHECKPOINT = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "model.safetensors"}}


def encode(text: Any) -> dict[str, Any]:
    return {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": ["1", 1]}}


def sampler(positive: list[Any], negative: list[Any]) -> dict[str, Any]:
    inputs = {"model": ["1", 0], "positive": positive, "negative": negative, "latent_image": ["9", 0], "seed": 1}
    return {"class_type": "KSampler", "inputs": inputs}


GRAPHS: dict[str, tuple[dict[str, Any], str | None]] = {
    "plain": ({"1": CHECKPOINT, "2": encode(" a dog "), "3": encode("ugly"), "4": sampler(["2", 0], ["3", 0])}, "a dog"),
    "text from another node": (
        {
            "1": CHECKPOINT,
            "2": encode(["7", 0]),
            "3": encode("ugly"),
            "7": {"class_type": "PrimitiveString", "inputs": {"value": "a cat"}},
            "4": sampler(["2", 0], ["3", 0]),
        },
        "a cat",
    ),
    "flux with a guider": (
        {
            "2": {"class_type": "CLIPTextEncodeFlux", "inputs": {"clip": ["1", 0], "clip_l": "a", "t5xxl": "a red fox"}},
            "5": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["2", 0], "guidance": 3.5}},
            "6": {"class_type": "BasicGuider", "inputs": {"model": ["1", 0], "conditioning": ["5", 0]}},
        },
        "a red fox",
    ),
    "two samplers, one prompt": (
        {
            "2": encode("a dog"),
            "3": encode("ugly"),
            "4": sampler(["2", 0], ["3", 0]),
            "8": sampler(["2", 0], ["3", 0]),
        },
        "a dog",
    ),
    "through a control net, which has a negative side": (
        {
            "2": encode("a dog"),
            "3": encode("ugly"),
            "6": {"class_type": "ControlNetApplyAdvanced", "inputs": {"positive": ["2", 0], "negative": ["3", 0]}},
            "4": sampler(["6", 0], ["6", 1]),
        },
        "a dog",
    ),
    "two prompts": ({"2": encode("a dog"), "3": encode("a cat"), "4": sampler(["2", 0], ["3", 0]),
                     "5": sampler(["3", 0], ["2", 0])}, None),
    "none": ({"1": CHECKPOINT}, None),
    "a loop": ({"2": {"class_type": "X", "inputs": {"a": ["2", 0]}}, "4": sampler(["2", 0], ["2", 0])}, None),
    "SDXL": (
        {"2": {"class_type": "CLIPTextEncodeSDXL", "inputs": {"text_g": "a hut", "text_l": "a hut"}},
         "4": sampler(["2", 0], ["2", 0])}, "a hut",
    ),
    "many ways to one text": (
        {"0": encode("a dog"), **{str(i): {"class_type": "X", "inputs": {"a": [str(i - 1), 0], "b": [str(i - 1), 1]}}
                                  for i in range(1, 40)}, "99": sampler(["39", 0], ["0", 0])}, "a dog",
    ),
    "odd": ({"2": "text", "4": {"class_type": "KSampler", "inputs": None}, "5": sampler(["nowhere", 0], [1])}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_the_prompt_of_a_comfyui_graph(name: str) -> None:
    graph, prompt = GRAPHS[name]
    assert picture_files.comfy_prompt(graph) == prompt


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("a dog\nNegative prompt: ugly\nSteps: 20, Sampler: Euler", "a dog"),
        ("a dog,\nsitting\nSteps: 20, Sampler: Euler", "a dog,\nsitting"),
        ("Steps to a house\nNegative prompt: x\nSteps: 9", "Steps to a house"),
        ("Negative prompt: ugly\nSteps: 20", None),
        ("only words", "only words"),
    ],
)
def test_the_prompt_of_an_a1111_picture(tmp_path: Path, text: str, prompt: str | None) -> None:
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with Image.open(tmp_path / "a.png") as image:
        assert picture_files.embedded_prompt(image) == prompt


@pytest.mark.parametrize("ending", ["jpg", "webp"])
@pytest.mark.parametrize(
    ("comment", "prompt"),
    [
        (
            b"UNICODE\0" + "a d\u00f6g, \u4f60\nNegative prompt: ugly\nSteps: 20".encode("utf-16-be"),
            "a d\u00f6g, \u4f60",
        ),
        (b"UNICODE\0" + "a dog\nSteps: 20".encode("utf-16-le"), "a dog"),
        (b"ASCII\0\0\0a dog,\nsitting\nSteps: 20", "a dog,\nsitting"),
        (b"ASCII\0\0\0Steps: 20", None),
        # A camera's, and what is no text.
        (b"ASCII\0\0\0in the garden", None),
        (b"JIS\0\0\0\0\0a dog\nSteps: 20", None),
        (b"", None),
    ],
    ids=["big-endian", "little-endian", "ascii", "no prompt", "camera", "jis", "empty"],
)
def test_the_prompt_in_the_exif_of_an_a1111_picture(
    tmp_path: Path, ending: str, comment: bytes, prompt: str | None
) -> None:
    file = tmp_path / f"a.{ending}"
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    Image.new("RGB", (8, 8)).save(file, exif=exif)
    with Image.open(file) as image:
        assert picture_files.embedded_prompt(image) == prompt
    if prompt is not None:
        assert picture_files.open_images([file], None, None)[0].prompt == prompt


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three pictures in a folder, of which b.png shows a blue square."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, shown in (("a", "two red circles"), ("b", "a blue square"), ("c", "a green triangle")):
        Image.fromarray(domain.render(domain.parse(shown), generator)).save(folder / f"{name}.png")
    return folder


def test_sizes_and_modes_may_differ(pictures: Path) -> None:
    """Each is scored as it is by itself; what is transparent lies on white."""
    square = np.asarray(Image.open(pictures / "b.png"))
    Image.fromarray(square).resize((96, 96)).save(pictures / "d.png")
    Image.fromarray(square).convert("P").save(pictures / "e.png")
    alpha = np.dstack([square, np.zeros(square.shape[:2], np.uint8)])
    Image.fromarray(alpha).save(pictures / "f.png")
    Image.fromarray(square).save(pictures / "g.jpg", quality=95)
    paths = picture_files.find_images([pictures])
    opened = picture_files.open_images(paths, "a blue square", None)
    scores = {"shapes": np.zeros(len(opened))}
    picture_files.score_images(opened, {}, [("shapes", ShapesScorer())], scores)
    assert scores["shapes"].tolist() == [0, 1, 0, 1, 1, 0, 1]
    assert (picture_files.load([opened[5]]) == 255).all()


def test_numbers_in_names_count_as_numbers(tmp_path: Path) -> None:
    """Lines of --prompts belong to pictures in this order."""
    names = ["1.png", "2.png", "10.png", "a2b.png", "a2b10.png", "a02c.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    found = [file.name for file in picture_files.find_images([tmp_path])]
    assert found == names


def test_more_than_a_batch_keeps_its_order(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_files, "BATCH", 2)
    opened = picture_files.open_images(picture_files.find_images([pictures] * 3), "a blue square", None)
    scores = {"shapes": np.zeros(len(opened))}
    picture_files.score_images(opened, {}, [("shapes", ShapesScorer())], scores)
    assert scores["shapes"].tolist() == [0, 1, 0] * 3


def test_pictures_are_scored_as_a_viewer_shows_them(pictures: Path) -> None:
    """A camera's rotation counts."""
    wide = Image.open(pictures / "b.png").crop((0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.save("turned.jpg", exif=exif)
    (opened,) = picture_files.open_images([Path("turned.jpg")], "x", None)
    assert opened.size == (32, 64) and picture_files.load([opened]).shape == (1, 64, 32, 3)
