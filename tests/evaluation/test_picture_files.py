"""`python -m tmpo_trainer score`: which prompt a picture has, what is printed and written, what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from tmpo_trainer import diversity
from tmpo_trainer.commands import main
from tmpo_trainer.demo import domain
from tmpo_trainer.evaluation import picture_files as score
from tmpo_trainer.evaluation.features import EfficientNetLite
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
    assert score.comfy_prompt(graph) == prompt


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
        assert score.embedded_prompt(image) == prompt


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
        assert score.embedded_prompt(image) == prompt
    if prompt is not None:
        assert score.open_images([file], None, None)[0].prompt == prompt


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two right pictures and one wrong, in a folder, with their prompts in different places."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, shown in (("a", "two red circles"), ("b", "a blue square"), ("c", "a green triangle")):
        Image.fromarray(domain.render(domain.parse(shown), generator)).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("two red circles\n")
    info = PngInfo()
    info.add_text("prompt", json.dumps({"2": encode("a blue square"), "4": sampler(["2", 0], ["2", 0])}))
    Image.open(folder / "b.png").save(folder / "b.png", pnginfo=info)
    info = PngInfo()
    info.add_text("parameters", "a pink circle\nSteps: 20, Sampler: Euler")
    Image.open(folder / "c.png").save(folder / "c.png", pnginfo=info)
    (folder / "notes.md").write_text("not a picture")
    return folder


def test_a_folder_with_prompts_of_its_own(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["score", "pictures", "--reward", "shapes", "--output", "scores.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["file", "a.png", "b.png", "c.png", "mean"]
    assert "a pink circle" in lines[3] and lines[4].split()[:3] == ["mean", "of", "3"]
    content = json.loads(Path("scores.json").read_text())
    assert [row["shapes strict"] for row in content["images"]] == [1, 1, 0]
    assert content["mean"]["shapes strict"] == pytest.approx(2 / 3)
    assert content["images"][1] == {
        "file": "pictures/b.png", "prompt": "a blue square", "shapes strict": 1.0, "shapes partial": 1.0,
    }  # fmt: skip


def test_one_prompt_and_diversity(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A prompt on the command line beats the files' own; diversity is that of all pictures then."""
    flags = ["--reward", "shapes", "--prompt", "a blue square", "--diversity", "--output", "scores.csv"]
    assert main.main(["score", *[str(path) for path in sorted(pictures.glob("*.png"))[::-1]], *flags]) == 0
    out = capsys.readouterr().out
    with Path("scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(Path(row["file"]).name, row["shapes strict"]) for row in rows] == [
        ("c.png", "0.0"), ("b.png", "1.0"), ("a.png", "0.0"),
    ]  # fmt: skip
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(pictures.glob("*.png"))])
    vectors = EfficientNetLite(torch.device("cpu"))(images)
    numbers = out.splitlines()[-1].split()
    assert numbers[0] == "3" and float(numbers[1]) == pytest.approx(
        diversity.cosine_diversity(vectors).item(), abs=1e-4
    )
    assert float(numbers[2]) == pytest.approx(diversity.vendi_score(vectors).item(), abs=0.01)


def test_diversity_alone_needs_no_prompts(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in pictures.glob("*.txt"):
        path.unlink()
    assert main.main(["score", "pictures", "--diversity"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("all pictures")


def test_prompts_from_a_file_with_metadata(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"prompt": text, "target": text} for text in ("two red circles", "a blue square", "a green triangle")]
    Path("list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    flags = ["--reward", "shapes", "ocr", "--prompts", "list.jsonl", "--output", "scores.json"]
    assert main.main(["score", "pictures", *flags]) == 0
    content = json.loads(Path("scores.json").read_text())
    assert content["mean"] == {"shapes strict": 1, "shapes partial": 1, "ocr": 0}


def test_sizes_and_modes_may_differ(pictures: Path) -> None:
    """Each is scored as it is by itself; what is transparent lies on white."""
    square = np.asarray(Image.open(pictures / "b.png"))
    Image.fromarray(square).resize((96, 96)).save(pictures / "d.png")
    Image.fromarray(square).convert("P").save(pictures / "e.png")
    alpha = np.dstack([square, np.zeros(square.shape[:2], np.uint8)])
    Image.fromarray(alpha).save(pictures / "f.png")
    Image.fromarray(square).save(pictures / "g.jpg", quality=95)
    paths = score.find_images([pictures])
    opened = score.open_images(paths, "a blue square", None)
    scores, _ = score.score_images(opened, {}, [("shapes", ShapesScorer())], None)
    assert scores["shapes"].tolist() == [0, 1, 0, 1, 1, 0, 1]
    assert (score.load([opened[5]]) == 255).all()


def test_more_than_a_batch_keeps_its_order(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "BATCH", 2)
    opened = score.open_images(score.find_images([pictures] * 3), "a blue square", None)
    scores, _ = score.score_images(opened, {}, [("shapes", ShapesScorer())], None)
    assert scores["shapes"].tolist() == [0, 1, 0] * 3


def test_pictures_are_scored_as_a_viewer_shows_them(pictures: Path) -> None:
    """A camera's rotation counts."""
    wide = Image.open(pictures / "b.png").crop((0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.save("turned.jpg", exif=exif)
    (opened,) = score.open_images([Path("turned.jpg")], "x", None)
    assert opened.size == (32, 64) and score.load([opened]).shape == (1, 64, 32, 3)


def test_diversity_in_a_csv(pictures: Path) -> None:
    assert main.main(["score", "pictures", "--diversity", "--prompt", "x", "--output", "d.csv"]) == 0
    with Path("d.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["vendi"] for row in rows}) == 1 and 1 < float(rows[0]["vendi"]) <= 3


def test_a_picture_that_cannot_be_scored_is_named(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (3000, 2)).save("thin.png")
    assert main.main(["score", "thin.png", "--reward", "ocr", "--prompt", 'a "sign"']) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("tmpo_trainer: thin.png: reward ocr cannot read image 0")


BAD: list[tuple[str, list[str]]] = [
    ("deep.png --reward shapes --prompt x", ["deep.png cannot be read as a picture", "would be clipped"]),
    ("latin.png --reward shapes", ["latin.txt cannot be read as UTF-8 text"]),
    ("pictures/a.png --diversity --prompt x", ["no two pictures have the same prompt"]),
    ("pictures --reward remote --prompt x", ["reward remote needs its address"]),
    ("nowhere --reward shapes", ["nowhere does not exist"]),
    ("empty --reward shapes", ["folder empty holds no pictures (.png"]),
    ("pictures/notes.md --reward shapes", ["pictures/notes.md cannot be read as a picture"]),
    ("cut.png --reward shapes --prompt x", ["cut.png cannot be read as a picture"]),
    ("bare.png --reward shapes", ["bare.png has no prompt (in its metadata or bare.txt)", "--prompt"]),
    ("pictures --reward shapes --prompts one.txt", ["one.txt has 1 prompts for 3 pictures"]),
    ("pictures --reward shapes --prompts one.txt --prompt x", ["not allowed with"]),
    ("pictures --reward shapes --prompt dog", ["prompts: ", "'dog'"]),
    ("pictures --reward ocr --prompt dog", ["prompt 'dog' has no text to render"]),
    ("pictures --reward beauty", ["unknown reward beauty"]),
    ("pictures", ["score measures nothing"]),
    ("pictures --reward shapes --output scores.txt", ["end it in .csv or .json"]),
    ("pictures --reward shapes --output none/scores.csv", ["folder none does not exist"]),
    ("pictures --diversity --features none", ["features none: no such folder"]),
    ("pictures --rewards shapes", ["--rewards"]),
    ("--reward shapes", ["PATH"]),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "blame"), BAD, ids=[flags for flags, _ in BAD])
def test_bad_input_is_one_line_and_exit_2(
    pictures: Path, capsys: pytest.CaptureFixture[str], flags: str, blame: list[str]
) -> None:
    Path("empty").mkdir()
    Image.new("RGB", (64, 64)).save("bare.png")
    Path("cut.png").write_bytes((pictures / "a.png").read_bytes()[:200])
    Path("one.txt").write_text("a red circle\n")
    Image.fromarray(np.full((8, 8), 20000, np.uint16)).save("deep.png")
    Image.new("RGB", (64, 64)).save("latin.png")
    Path("latin.txt").write_bytes("ein W\u00fcrfel".encode("latin-1"))
    assert main.main(["score", *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("tmpo_trainer: ")
    for part in blame:
        assert part in line
