"""Damaged and hostile picture files: each is read or refused in one line, within some time and memory.

FUZZ=5000 in the environment tries that many mutations.
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from tmpo_trainer.commands import main
from tmpo_trainer.evaluation import picture_files
from tmpo_trainer.pictures import reading
from tmpo_trainer.settings.errors import ConfigError

GRAPH = {
    "2": {"class_type": "T", "inputs": {"text": "a dog"}},
    "4": {"class_type": "S", "inputs": {"positive": ["2", 0]}},
}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def seeds() -> list[tuple[str, bytes]]:
    """Small sound pictures: (ending, content). Most have metadata."""
    generator = random.Random(0)
    picture = Image.frombytes("RGB", (24, 16), generator.randbytes(24 * 16 * 3))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + "a dog\nSteps: 2".encode("utf-16-be")
    info = PngInfo()
    info.add_text("prompt", json.dumps(GRAPH))
    info.add_text("parameters", "a dog\nSteps: 2", zip=True)
    info.add_itxt("workflow", "{}", zip=True)
    kinds: list[tuple[str, str, Image.Image, dict[str, Any]]] = [
        ("png", "PNG", picture, {"pnginfo": info, "exif": exif}),
        ("png", "PNG", picture.convert("P"), {"transparency": 0}),
        ("png", "PNG", picture, {"save_all": True, "append_images": [picture.rotate(90)]}),
        ("jpg", "JPEG", picture, {"exif": exif}),
        ("jpg", "JPEG", picture.convert("CMYK"), {"progressive": True}),
        ("webp", "WEBP", picture, {"exif": exif}),
        ("webp", "WEBP", picture, {"save_all": True, "append_images": [picture.rotate(90)]}),
        ("bmp", "BMP", picture, {}),
        ("gif", "GIF", picture, {"save_all": True, "append_images": [picture.rotate(90)]}),
        ("tif", "TIFF", picture, {"exif": exif}),
        ("tif", "TIFF", picture, {"compression": "tiff_lzw"}),
        ("tif", "TIFF", picture, {"compression": "jpeg"}),
    ]
    found = []
    for ending, form, image, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        found.append((ending, buffer.getvalue()))
    return found


#: Lengths and other numbers at the ends of their ranges.
FILLERS = [byte * length for byte in (b"\0", b"\xff", b"\x7f", b"\x80") for length in (1, 2, 4, 8, 64)]


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have right checksums, so that Pillow looks at their content."""
    out, place = data[:8], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        if place + 12 + length > len(data):
            break
        out += chunk(data[place + 4 : place + 8], data[place + 8 : place + 8 + length])
        place += 12 + length
    return out + data[place:]


def read(path: Path) -> str | None:
    """What `score` reads of a file: its prompt, or None for a file that is refused in one line."""
    began = time.monotonic()
    try:
        (picture,) = picture_files.open_images([path], None, None)
        array = picture_files.load([picture])
    except ConfigError as error:
        assert str(path) in str(error) and str(error).isprintable() and len(str(error)) < 600
        return None
    finally:
        assert time.monotonic() - began < 10
    assert array.shape == (1, picture.size[1], picture.size[0], 3)
    picture.prompt.encode()
    return picture.prompt


def test_mutations(tmp_path: Path, mutate: Any, capfd: pytest.CaptureFixture[str]) -> None:
    generator, sound = random.Random(1), seeds()
    for i, (ending, data) in enumerate(sound):
        path = tmp_path / f"{i}.{ending}"
        path.write_bytes(data)
        assert picture_files.open_images([path], "x", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(int(os.environ.get("FUZZ", "100"))):
            ending, data = sound[i % len(sound)]
            path = tmp_path / f"mutated.{ending}"
            changed = mutate(generator, data, FILLERS)
            if data.startswith(HEAD) and generator.random() < 0.8:
                changed = with_checksums(changed)
            path.write_bytes(changed)
            read(path)
    # libtiff writes past Python.
    assert capfd.readouterr().err == ""


HEAD = b"\x89PNG\r\n\x1a\n"
IHDR = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
BODY = chunk(b"IDAT", zlib.compress(bytes(8 * 25))) + chunk(b"IEND", b"")


def png(*chunks: bytes) -> bytes:
    return HEAD + IHDR + b"".join(chunks) + BODY


def graph_of(text: str) -> bytes:
    return png(chunk(b"tEXt", b"prompt\0" + text.encode("latin-1")))


def many_samplers() -> str:
    """A long chain of nodes, each of which is also where a search starts."""
    nodes = {str(i): {"class_type": "S", "inputs": {"positive": [str(i + 1), 0]}} for i in range(30_000)}
    return json.dumps(nodes | {"30000": {"class_type": "T", "inputs": {"text": "a dog"}}})


def jpeg_with_exif(exif: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", exif=b"Exif\0\0" + exif)
    return buffer.getvalue()


def tiff(width: int, height: int) -> bytes:
    """A header that claims a size, with a next directory that is itself."""
    entries = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 64)]
    packed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + struct.pack("<I", 8) + bytes(64)


#: A file's name, its content, and its prompt or what the error says.
CRAFTED: list[tuple[str, bytes, str | None, str]] = [
    ("eps.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", None, "not one of PNG, JPEG, WEBP"),
    ("size.png", HEAD + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)) + BODY, None, "pixels"),
    ("large.png", HEAD + chunk(b"IHDR", struct.pack(">IIBBBBB", 8193, 8192, 8, 2, 0, 0, 0)) + BODY, None, "make it smaller"),
    ("thin.png", HEAD + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**20, 1, 8, 2, 0, 0, 0)) + BODY, None, "2000 times"),
    ("ztxt.png", png(chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(2**26)))), None, "too large"),
    ("itxt.png", png(chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(bytes(2**26)))), None, "too large"),
    ("long.png", png(chunk(b"tEXt", b"parameters\0" + b"a" * 2**23)), None, "has no prompt"),
    ("deep.png", graph_of("[" * 100_000), None, "has no prompt"),
    ("nested.png", graph_of('{"4": {"class_type": ' + "[" * 900 + "]" * 900 + "}}"), None, "has no prompt"),
    ("list.png", graph_of("[1, 2]"), None, "has no prompt"),
    ("samplers.png", graph_of(many_samplers()), "a dog", ""),
    ("half.png", graph_of(json.dumps(GRAPH).replace("a dog", "a \\ud800 dog")), "a ? dog", ""),
    ("loop.tif", tiff(8, 8), None, "has no prompt"),
    ("large.tif", tiff(2**20, 2**20), None, "pixels"),
    ("exif.jpg", jpeg_with_exif(b"II*\0\x08\0\0\0\xff\xff" + b"\x69\x87\x04\0\1\0\0\0\x08\0\0\0" * 50), None, "has no prompt"),
    ("short.jpg", jpeg_with_exif(b"MM\0*"), None, "has no prompt"),
    ("empty.png", b"", None, "damaged"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "prompt", "cause"), CRAFTED, ids=[name for name, *_ in CRAFTED])
def test_crafted_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder,
    name: str, data: bytes, prompt: str | None, cause: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(data)
    began = time.monotonic()
    assert main.main(["score", name, "--reward", "sharpness"]) == (2 if prompt is None else 0)
    assert time.monotonic() - began < 10
    out, err = capfd.readouterr()
    assert not [warning for warning in recwarn if "PIL" in warning.filename]
    if prompt is None:
        (line,) = err.splitlines()
        assert line.startswith(f"tmpo_trainer: {name} ") and cause in line and out == ""
    else:
        assert prompt in out


def test_warnings_of_pillow_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("exif.jpg").write_bytes(jpeg_with_exif(b"II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\1\0\0\0\1\0\0\0\x69\x87"))
    assert main.main(["score", "exif.jpg", "--reward", "sharpness", "--prompt", "x"]) == 0
    assert not [warning for warning in recwarn if "PIL" in warning.filename]
    with pytest.warns(UserWarning, match="Corrupt EXIF"), Image.open("exif.jpg") as image:
        image.getexif()


def test_ghostscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow runs `gs` for an EPS, whatever its file is called."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/run\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    path = tmp_path / "a.png"
    path.write_bytes(CRAFTED[0][1])
    with pytest.raises(ConfigError, match="not one of PNG"):
        reading.read_picture(path)
    assert not (tmp_path / "run").exists()


def test_a_prompt_cannot_command_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    info = PngInfo()
    info.add_text("parameters", "a \x1b]0;owned\x07\x1b[2Jdog \u202e\nSteps: 2")
    name = "a\x1b[31m.png"
    Image.new("RGB", (8, 8)).save(name, pnginfo=info)
    assert main.main(["score", name, "--reward", "sharpness"]) == 0
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out) and "dog" in out


def test_files_that_are_no_pictures_of_the_user(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("._a.png", ".hidden.png", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "folder.png").mkdir()
    assert picture_files.find_images([tmp_path]) == [tmp_path / "a.png"]
    with pytest.raises(ConfigError, match="holds no pictures"):
        picture_files.find_images([tmp_path / "folder.png"])


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(ConfigError, match=r"a\.png cannot be read as a picture: Permission denied"):
        picture_files.open_images([tmp_path / "a.png"], "x", None)
    tmp_path.chmod(0)
    try:
        with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
            picture_files.find_images([tmp_path])
    finally:
        tmp_path.chmod(0o700)


def test_large_pictures_are_read_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_files, "MOST_PIXELS", 250)
    pictures = [picture_files.Picture(Path(f"{i}.png"), "x", (10, 10)) for i in range(5)]
    assert list(picture_files.batches(pictures)) == [[0, 1], [2, 3], [4]]
