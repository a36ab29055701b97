"""`python -m tmpo_trainer score`: what is printed and written, what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tmpo_trainer import diversity
from tmpo_trainer.commands import main
from tmpo_trainer.demo import domain
from tmpo_trainer.diversity import MEASURES, Measure
from tmpo_trainer.evaluation import picture_files
from tmpo_trainer.evaluation.features import EfficientNetLite
from tmpo_trainer.evaluation.latents import LatentEncoder

#: What ComfyUI writes into a picture of the prompt "a blue square".
GRAPH = {
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a blue square", "clip": ["1", 1]}},
    "4": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0]}},
}


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
    info.add_text("prompt", json.dumps(GRAPH))
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
    _, table, limit = out.strip().split("\n\n")
    numbers = table.splitlines()[-1].split()
    expected = diversity.measure(features=vectors)
    assert numbers[0] == "3" and [float(x) for x in numbers[1:3]] == pytest.approx([*expected.values()], abs=1e-4)
    # One right picture of three: from the mean to that picture alone, log 3 away.
    points = [line.split() for line in limit.splitlines()[2:]]
    assert points[0] == ["0", "0.333", "100.0%", "0.000"] and points[-1][1] == "1.000"
    assert float(points[-1][3]) == pytest.approx(np.log(3), abs=1e-2) and len(points) == 8


def test_two_pictures_of_a_prompt_have_no_limit(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = [str(file) for file in sorted(pictures.iterdir()) if file.suffix == ".png"][:2]
    assert main.main(["score", *two, "--reward", "shapes", "--prompt", "a blue square", "--diversity"]) == 0
    assert "the limit: no prompt has three pictures" in capsys.readouterr().out


def test_pictures_that_are_alike_have_no_limit(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = sorted(pictures.glob("*.png"))[0]
    for copy in ("again.png", "third.png"):
        shutil.copy(first, copy)
    flags = [
        "score",
        str(first),
        "again.png",
        "third.png",
        "--reward",
        "shapes",
        "--prompt",
        "a blue square",
        "--diversity",
    ]
    assert main.main(flags) == 0
    assert "the pictures of every prompt are alike" in capsys.readouterr().out


def test_diversity_alone_needs_no_prompts(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in pictures.glob("*.txt"):
        path.unlink()
    assert main.main(["score", "pictures", "--diversity"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("all pictures")


def test_diversity_alone_is_that_of_each_prompt(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If pictures share prompts; those of other prompts differ for another reason."""
    assert main.main(["score", "pictures", "--diversity"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("all pictures")
    for name in "abc":
        (pictures / f"{name}.txt").write_text("a cat" if name == "c" else "a circle")
        Image.open(pictures / f"{name}.png").transpose(Image.Transpose.ROTATE_90).save(pictures / f"{name}-2.png")
        (pictures / f"{name}-2.txt").write_text("a cat" if name == "c" else "a circle")
    assert main.main(["score", "pictures", "--diversity"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[-3].endswith("a circle") and rows[-2].endswith("a cat") and "2 prompts" in rows[-1]


def test_prompts_from_a_file_with_metadata(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"prompt": text, "target": text} for text in ("two red circles", "a blue square", "a green triangle")]
    Path("list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    flags = ["--reward", "shapes", "ocr", "--prompts", "list.jsonl", "--output", "scores.json"]
    assert main.main(["score", "pictures", *flags]) == 0
    content = json.loads(Path("scores.json").read_text())
    assert content["mean"] == {"shapes strict": 1, "shapes partial": 1, "ocr": 0}


def test_diversity_in_a_csv(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["score", "pictures", "--diversity", "--prompt", "x", "--output", "d.csv"]) == 0
    with Path("d.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["Vendi score"] for row in rows}) == 1 and 1 < float(rows[0]["Vendi score"]) <= 3
    # Measures on latents need a VAE, and one line says so.
    assert "LGMD" not in rows[0]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tmpo_trainer: ")]
    assert line == "tmpo_trainer: LGMD is not measured, because it needs latents: give --vae MODEL"


def test_lgmd_with_a_vae(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--diversity", "--vae", "demo", "--prompt", "x", "--output", "d.json"]
    assert main.main(["score", "pictures", *flags]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["images", *" ".join(MEASURES).split(), "prompt"] and "LGMD" not in err
    found = json.loads(Path("d.json").read_text())
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(pictures.glob("*.png"))])
    latents = LatentEncoder("demo", torch.device("cpu"))(images)
    assert list(found["diversity"]["x"]) == ["images", *MEASURES]
    assert found["diversity"]["x"]["LGMD"] == pytest.approx(diversity.lgmd(latents).item(), abs=1e-4)
    assert {row["LGMD"] for row in found["images"]} == {found["diversity"]["x"]["LGMD"]}


def test_diversity_is_that_of_each_prompt(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A lone picture has none, and the mean is over prompts."""
    for name in ("d", "e"):
        Image.open(pictures / "b.png").save(pictures / f"{name}.png")
    Path("list.txt").write_text("two\ntwo\nlone\nsame\nsame\n")
    assert main.main(["score", "pictures", "--diversity", "--prompts", "list.txt", "--output", "d.csv"]) == 0
    with Path("d.csv").open() as file:
        rows = {row["prompt"]: row["cosine diversity"] for row in csv.DictReader(file)}
    assert rows["lone"] == "" and float(rows["two"]) > 0.01 and float(rows["same"]) == pytest.approx(0, abs=1e-6)
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[0] == "mean" and float(last[1]) == pytest.approx(float(rows["two"]) / 2, abs=1e-4)


def test_a_new_measure_needs_its_entry_alone(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MEASURES, "spread", Measure(lambda features: features.std(), "features"))
    monkeypatch.setitem(MEASURES, "largest", Measure(lambda latents: latents.max(), "latents"))
    assert main.main(["score", "pictures", "--diversity", "--vae", "demo", "--prompt", "x", "--output", "d.csv"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("  spread   largest  prompt")
    with Path("d.csv").open() as file:
        assert float(next(csv.DictReader(file))["largest"]) > 0
    assert main.main(["score", "pictures", "--diversity", "--prompt", "x"]) == 0
    out, err = capsys.readouterr()
    assert "spread" in out and "largest" not in out and "LGMD, largest is not measured" in err


def test_a_picture_that_cannot_be_scored_is_named(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (3000, 2)).save("thin.png")
    assert main.main(["score", "thin.png", "--reward", "ocr", "--prompt", 'a "sign"']) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("tmpo_trainer: thin.png: reward ocr cannot read image 0")


def test_what_was_scored_before_a_failure_is_kept(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(picture_files, "BATCH", 1)
    (pictures / "b.png").rename(pictures / "z.png")
    original = picture_files.load

    def vanished(opened: list[picture_files.Picture]) -> np.ndarray:
        if opened[0].path.name == "z.png":
            raise FileNotFoundError(2, "No such file or directory", "z.png")
        return original(opened)

    monkeypatch.setattr(picture_files, "load", vanished)
    assert main.main(["score", "pictures", "--reward", "shapes", "--output", "s.json"]) == 1
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["file", "a.png", "c.png", "mean"]
    assert [row["shapes strict"] for row in json.loads(Path("s.partial.json").read_text())["images"]] == [1, 0]
    assert not Path("s.json").exists()
    assert "tmpo_trainer: 2 of 3 pictures were scored" in err and "No such file or directory" in err.splitlines()[-1]
    # Nor does a failure of what comes after.
    monkeypatch.setattr(picture_files, "load", original)
    monkeypatch.setattr(picture_files, "measure_diversity", lambda *more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main.main(["score", "pictures", "--reward", "shapes", "--prompt", "a blue square", "--diversity"])
    assert "mean of 3" in capsys.readouterr().out


def test_memory_that_does_not_suffice_is_one_line(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def large(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(picture_files, "load", large)
    assert main.main(["score", "pictures", "--reward", "shapes"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "tmpo_trainer: out of memory"


@pytest.mark.parametrize("lost", ["output", "table"])
def test_the_scores_survive_in_one_place(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    """The file is written although the table cannot be printed, and the other way round."""

    def fail(*arguments: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(picture_files, "write" if lost == "output" else "text_table", fail)
    assert main.main(["score", "pictures", "--reward", "shapes", "--output", "s.csv"]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "tmpo_trainer: [Errno 28] No space left on device"
    assert Path("s.csv").exists() == (lost == "table") and ("mean of 3" in out) == (lost == "output")


def test_a_file_name_in_another_encoding(pictures: Path) -> None:
    try:
        (pictures / "a.png").rename(pictures / "caf\udce9.png")
    except (OSError, UnicodeEncodeError):
        pytest.skip("file names are UTF-8 here")
    assert main.main(["score", "pictures", "--reward", "shapes", "--prompt", "a red circle", "--output", "s.csv"]) == 0
    assert "caf\\udce9.png" in Path("s.csv").read_text(encoding="utf-8")


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
    ("pictures --reward shapes --output scores.txt", ["must end in .csv or .json"]),
    ("pictures --reward shapes --output none/scores.csv", ["folder none does not exist"]),
    ("pictures --diversity --features none", ["features none: no such folder"]),
    ("pictures --reward shapes --vae demo", ["--vae is for --diversity"]),
    ("pictures --diversity --vae nowhere", ["model nowhere is not a folder"]),
    ("pictures wide.png --diversity --vae demo", ["--vae: pictures of prompt", "differ in size", "wide.png is 96x64"]),
    ("odd.png odd.png --diversity --vae demo", ["--vae: odd.png: the VAE encodes sides that are multiples of 8, not 60x64"]),
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
    Image.new("RGB", (96, 64)).save("wide.png")
    Image.new("RGB", (60, 64)).save("odd.png")
    Path("latin.txt").write_bytes("ein W\u00fcrfel".encode("latin-1"))
    assert main.main(["score", *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("tmpo_trainer: ")
    for part in blame:
        assert part in line
