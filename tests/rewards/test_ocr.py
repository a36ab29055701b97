"""The `ocr` reward reads rendered phrases for real."""

# Quotation marks and letters that look alike are meant.
# ruff: noqa: RUF001
from __future__ import annotations

import contextlib
import random
import re
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from tmpo_trainer.commands import loading
from tmpo_trainer.prompts import rendering
from tmpo_trainer.rewards import check_reward, load_scorer, ocr
from tmpo_trainer.settings.config import TrainConfig
from tmpo_trainer.settings.errors import ConfigError

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FACES = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "STIXGeneralBol.ttf")
COLOURS = ("black", "navy", "darkred", "darkgreen", "white", "gold", "purple", "teal")
SIDE = 512


def render(phrase: str, generator: random.Random, rotation: float = 10, noise: float = 12) -> np.ndarray:
    """A phrase in a random face, size, colour, place and rotation on a random plain ground, with noise."""
    font = ImageFont.truetype(str(FONTS / generator.choice(FACES)), generator.randint(20, 60))
    left, _, right, _ = font.getbbox(phrase)
    # Long phrases on two lines.
    words = phrase.split()
    if right - left > SIDE - 60 and len(words) > 1:
        half = (len(words) + 1) // 2
        phrase = f"{' '.join(words[:half])}\n{' '.join(words[half:])}"
    colour = generator.choice(COLOURS)
    light = colour in ("white", "gold")
    ground = tuple(generator.randint(0, 70) if light else generator.randint(170, 255) for _ in range(3))
    text = Image.new("RGBA", (SIDE, SIDE))
    draw = ImageDraw.Draw(text)
    box = draw.multiline_textbbox((0, 0), phrase, font=font)
    width, height = box[2] - box[0], box[3] - box[1]
    place = (generator.uniform(10, max(11, SIDE - 20 - width)), generator.uniform(60, SIDE - 80 - height))
    draw.multiline_text(place, phrase, font=font, fill=colour)
    text = text.rotate(generator.uniform(-rotation, rotation), Image.Resampling.BICUBIC)
    sheet = Image.new("RGB", (SIDE, SIDE), ground)
    sheet.paste(text, mask=text)
    grain = np.random.default_rng(generator.randrange(2**32)).normal(0, noise, (SIDE, SIDE, 3))
    return (np.asarray(sheet) + grain).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def scorer() -> ocr.OcrScorer:
    return ocr.OcrScorer()


@pytest.fixture(scope="module")
def phrases() -> list[str]:
    targets = [entry["target"] for entry in rendering.generate("heldout", 240)]
    return list(dict.fromkeys(targets))[:100]


@pytest.fixture(scope="module")
def pictures(phrases: list[str]) -> np.ndarray:
    generator = random.Random(0)
    return np.stack([render(phrase, generator) for phrase in phrases])


def test_it_reads_a_hundred_phrases(scorer: ocr.OcrScorer, phrases: list[str], pictures: np.ndarray) -> None:
    """Five faces, sizes, colours, up to 10 degrees, noise: nearly all right; the phrase of another picture is wrong."""
    assert len(phrases) == 100
    start = time.perf_counter()
    right = scorer.score(pictures, [f'a sign that says "{phrase}"' for phrase in phrases])
    seconds = (time.perf_counter() - start) / len(phrases)
    wrong = scorer.score(pictures, [f'a sign that says "{phrase}"' for phrase in [*phrases[1:], phrases[0]]])
    print(
        f"right {right.mean():.3f} (exact {(right == 1).float().mean():.2f}), wrong {wrong.mean():.3f}, {seconds:.3f} s"
    )
    assert right.mean() >= 0.95
    assert wrong.mean() <= 0.35
    assert (right >= wrong).all()


def test_pictures_are_read_in_their_own_order(scorer: ocr.OcrScorer, phrases: list[str], pictures: np.ndarray) -> None:
    """However many engines share them: all at once is as one by one, and as one engine."""
    together = scorer.read(pictures[:7])
    assert together == [scorer.read(picture[None])[0] for picture in pictures[:7]]
    assert together == ocr.OcrScorer(engines=1).read(pictures[:7]) == ocr.OcrScorer(engines=3).read(pictures[:7])


def test_an_empty_picture_scores_0_and_part_of_a_text_in_between(scorer: ocr.OcrScorer) -> None:
    blank = np.full((1, 128, 128, 3), 255, np.uint8)
    assert scorer.score(blank, ['a sign that says "open"']).tolist() == [0]
    sign = Image.fromarray(np.full((256, 512, 3), 255, np.uint8))
    ImageDraw.Draw(sign).text((40, 90), "OPEN", font=ImageFont.truetype(str(FONTS / FACES[0]), 60), fill="black")
    scores = scorer.score(np.asarray(sign)[None], ["a sign"], [{"target": "open late"}])
    # Four of eight letters are missing.
    assert scores.tolist() == [0.5] and str(scores.dtype) == "torch.float32"


@pytest.mark.parametrize(
    ("wanted", "read", "score"),
    [
        ("Open Late", "open  LATE", 1),
        ("open", "re-open at 9", 1),
        ("open", "opne", 0.5),
        ("open", "oper", 0.75),
        ("open", "", 0),
        ("open", "something altogether different", 0),
        ("abcde", "abXcde", 0.8),
        ("a b", "ab", 1),
        ("CAFÉ", "CAFE\u0301", 1),
        ("It’s “on”", 'It\'s "on"', 1),
        ("ＯＰＥＮ", "open", 1),
        ("Mon–Fri", "mon-fri", 1),
        ("STRAẞE ½", "Straße 1⁄2", 1),
        ("soft\u00adly ❤\ufe0f", "softly❤", 1),
        ("№5", "№5", 1),
        # A recogniser of a right-to-left script gives every line in the order of the picture, or as it is spoken.
        ("مرحبا 24 بكم", "24 ابحرم\nمكب", 1),
        ("مرحبا 24 بكم", "مرحبا 24\nبكم", 1),
        ("مرحبا", "ابحر", 0.8),
    ],
)
def test_similarity(wanted: str, read: str, score: float) -> None:
    assert ocr.similarity(wanted, read) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prompt", "metadata", "text"),
    [
        ('a sign with "first" and "second"', None, "first"),
        ("a sign with “curly quotes”", None, "curly quotes"),
        ('a sign with "quoted"', {"target": "given"}, "given"),
        ('a sign with "quoted"', {"tag": "other"}, "quoted"),
        ("ein Schild „Offen“ und „Zu“", None, "Offen"),
        ("ein Schild »Offen«", None, "Offen"),
        ("une enseigne « Ouvert »", None, " Ouvert "),
        ("en skylt ”Öppet”", None, "Öppet"),
        ("写着「打开」的牌", None, "打开"),
        ("电影《流浪地球》海报写着『即将上映』", None, "即将上映"),
        ("电影《流浪地球》海报", None, "流浪地球"),
        ("a sign that says ‘open’", None, "open"),
        ("a dog's bowl that says 'it's Rex's' in the girls' room", None, "it's Rex's"),
        ("the dog's sign 'no' says \"yes\"", None, "yes"),
    ],
)
def test_the_text_that_is_wanted(prompt: str, metadata: Any, text: str) -> None:
    assert ocr.target(prompt, metadata) == text


def test_metadata_of_another_kind_is_an_error(scorer: ocr.OcrScorer) -> None:
    for metadata in ("OPEN", ["OPEN"], 5):
        with pytest.raises(ValueError, match=r'\{"target": "OPEN"\}, not ') as error:
            scorer.score(np.zeros((1, 64, 64, 3), np.uint8), ['a sign "x"'], [metadata])
        assert repr(metadata) in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "metadata"),
    [
        ("a sign", None),
        ("a dog's bowl in the girls' room", {}),
        ("a rock 'n' roll poster of the '50s", None),
        ('a sign with " "', None),
        ('a sign with ""', None),
        ('a sign with "open"', {"target": ""}),
        ('a sign with "open"', {"target": 5}),
    ],
)
def test_no_text_is_an_error_that_names_the_prompt(scorer: ocr.OcrScorer, prompt: str, metadata: Any) -> None:
    with pytest.raises(ValueError, match="no text to render") as error:
        ocr.check(prompt, metadata)
    assert repr(prompt) in str(error.value)
    with pytest.raises(ValueError, match="no text to render"):
        scorer.score(np.zeros((1, 64, 64, 3), np.uint8), [prompt], [metadata])


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("ОТКРЫТО", "О (U+041E), Т (U+0422), К (U+041A), Р (U+0420), Ы (U+042B)"),
        ("Καλημέρα", "Κ (U+039A), α (U+03B1), λ (U+03BB), η (U+03B7), μ (U+03BC) and 2 more"),
        # Its dictionary has them all, but it reads AOHNA.
        ("ΑΘΗΝΑ", "Α (U+0391), Θ (U+0398), Η (U+0397), Ν (U+039D)"),
        ("مرحبا", "م (U+0645), ر (U+0631), ح (U+062D), ب (U+0628), ا (U+0627)"),
        ("ดี", "ด (U+0E14), ี (U+0E35)"),
        ("CAFÉ №5", "№ (U+2116)"),
        ("OРEN", "Р (U+0420)"),
    ],
)
def test_letters_that_it_cannot_read(scorer: ocr.OcrScorer, text: str, letters: str) -> None:
    """They would score 0 in a perfect picture."""
    blank = np.zeros((1, 64, 64, 3), np.uint8)
    for prompt, metadata in ((f'a sign "{text}"', None), ("a sign", {"target": text})):
        said = (
            f"prompt {prompt!r}: the recogniser of ocr cannot read {letters}: give one that can by --reward-models "
            "ocr=FILE (see docs/rewards.md), or change the text"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            ocr.check(prompt, metadata)
        with pytest.raises(ValueError, match=re.escape(said)):
            scorer.score(blank, [prompt], [metadata])


@pytest.mark.parametrize("text", ["Łódź, 5 Ω", "ＣＡＦＥ\u0301", "It’s ⅓ off", "π = 3.14", "漢字かな", "H₂O ❤️"])
def test_letters_that_it_can_read(text: str) -> None:
    ocr.check("a sign", {"target": text})


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recogniser that calls an É a Ж: the package's with another dictionary."""
    content = ocr.recogniser(None).read_bytes()
    assert content.count("\nÉ\n".encode()) == 1
    file = tmp_path_factory.mktemp("models") / "cyrillic_rec_mobile.onnx"
    file.write_bytes(content.replace("\nÉ\n".encode(), "\nЖ\n".encode()))
    return file


def test_another_recogniser(other: Path, tmp_path: Path) -> None:
    """Its own dictionary decides what it can read, in the checks before a run as well."""
    config = TrainConfig(reward=("ocr",), reward_models=(f"ocr={other}",), prompts=tmp_path / "prompts.jsonl")
    assert config.prompts is not None
    config.prompts.write_text('{"prompt": "a sign", "target": "CAFЖ"}', encoding="utf-8")
    loading.check_rewards(config)
    assert loading.train_prompts(config).texts == ["a sign"]
    with pytest.raises(ConfigError, match=r"prompts\.jsonl: prompt 'a sign': .* cannot read Ж \(U\+0416\)"):
        loading.train_prompts(config.model_copy(update={"reward_models": ()}))
    sign = Image.fromarray(np.full((256, 512, 3), 255, np.uint8))
    ImageDraw.Draw(sign).text((40, 90), "CAFÉ", font=ImageFont.truetype(str(FONTS / FACES[0]), 60), fill="black")
    scorer = load_scorer("ocr", path=str(other))
    assert scorer.score(np.asarray(sign)[None], ["a sign"], [{"target": "CAFЖ"}]).tolist() == [1]
    assert scorer.score(np.asarray(sign)[None], ['a sign "CAFÉ"']).tolist() == [0.75]


def test_a_file_that_is_no_recogniser_is_one_line(other: Path, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    # Without a dictionary inside, rapidocr would download one.
    (tmp_path / "bare.onnx").write_bytes(other.read_bytes().replace(b"character", b"charactes"))
    for path, blame in (
        (tmp_path / "text.onnx", "text.onnx cannot be read"),
        (tmp_path / "bare.onnx", "bare.onnx is not a recogniser with its dictionary inside"),
        (tmp_path / "none.onnx", "none.onnx does not exist"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=blame) as error:
            check_reward("ocr", str(path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("mark", ["「", "『", "《", "〈", '"', "“", "„", "«", "'", "‘"])
def test_a_prompt_of_opening_marks_takes_no_time(mark: str) -> None:
    start = time.monotonic()
    # Some marks also end a quotation.
    with contextlib.suppress(ValueError):
        ocr.target(f"a {mark}" * 100_000)
    assert time.monotonic() - start < 3
