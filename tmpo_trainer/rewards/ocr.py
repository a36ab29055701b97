"""Text rendering: 1 - normalised edit distance between what a picture says and what it should say, 0 to 1.

As in Flow-GRPO (Liu et al. 2025, arXiv:2505.05470), which reads with PaddleOCR. Here rapidocr reads. Its wheel contains
PP-OCR's weights, so no hub is needed. Its recogniser reads Latin letters, Chinese and Japanese. `--reward-models ocr=FILE`
gives another one of PP-OCR's, such as the Cyrillic one.
"""

# Quotation marks and dashes that look alike are meant.
# ruff: noqa: RUF001
from __future__ import annotations

import importlib.util
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..prompts.lists import GENERATED, PromptList, from_entries
from ..prompts.rendering import generate
from ..prompts.split import Split
from ..settings.errors import ConfigError, one_line
from .parts.weights import existing

WEIGHTS = "package"
PACKAGES = {"rapidocr": "rapidocr", "onnxruntime": "onnxruntime", "rapidfuzz": "rapidfuzz"}

#: The recogniser in rapidocr's wheel.
RECOGNISER = "PP-OCRv6_rec_small.onnx"
#: Its dictionary has Greek letters for formulas. Words it reads as Latin look-alikes.
GREEK_WORD = re.compile(r"[\u0370-\u03ff]{2,}")

#: Texts in quotation marks. The first kind that a prompt has is used: single ones, which may be apostrophes, come last. Each
#: pattern excludes its own openers, so that many of them do not take quadratic time.
QUOTED = tuple(
    re.compile(pattern)
    for pattern in (
        '["“][^"“”]+["”]|„[^"“”„]+["“”]|”[^"“”„]+”|＂[^＂]+＂',
        "「[^「」]+」|『[^『』]+』",
        "[«»][^«»]+[«»]|[‹›][^‹›]+[‹›]",
        "《[^《》]+》|〈[^〈〉]+〉",
        # An apostrophe has a letter before it, except in "rock 'n' roll".
        r"(?<!\w)['‘’‚](?!\s|[nN]['’])(?:[^'‘’‚]|(?<=\w)['’](?=\w))+(?<!\s)['‘’](?!\w)",
    )
)

#: Marks that mean the same or look alike in a picture, each with the one that stands for all of them.
MARKS = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛ʼ′´`", "'"),
        **dict.fromkeys("“”„‟″«»", '"'),
        **dict.fromkeys("‐‑‒–—―−", "-"),
        "⁄": "/",
    }
)

#: Longest side of the text detector's input. It still finds letters of a twentieth of the picture's height.
DETECTION_SIDE = 320
#: At most this many engines read at the same time, one thread each. More gain little.
MOST_ENGINES = 8
#: An error lists at most this many letters.
MOST_LETTERS = 5


def target(prompt: str, metadata: Mapping[str, Any] | None = None) -> str:
    """The text that a picture should show: `target` of the metadata, or the first text in quotation marks.

    Raises:
        ValueError: neither of them gives a text, or the metadata is no mapping.
    """
    if metadata is not None and not isinstance(metadata, Mapping):
        given = one_line(repr(metadata), 80)
        raise ValueError(f'prompt {prompt!r}: the metadata must be an object such as {{"target": "OPEN"}}, not {given}')
    text = (metadata or {}).get("target")
    if text is None:
        quoted = next(filter(None, (pattern.search(prompt) for pattern in QUOTED)), None)
        text = quoted[0][1:-1] if quoted else ""
    if not isinstance(text, str) or not fold(text):
        raise ValueError(
            f'prompt {prompt!r} has no text to render: put it between quotation marks, or give "target" in a .jsonl file'
        )
    return text


def check(prompt: str, metadata: Mapping[str, Any] | None, path: str | None = None) -> None:
    """Raises ValueError for a prompt without a text, or with one that the recogniser cannot read.

    Args:
        path: see `load`.
    """
    text = compatible(target(prompt, metadata))
    known = dictionary(path)
    greek = set() if path else set("".join(GREEK_WORD.findall(text)))
    unknown = [letter for letter in dict.fromkeys(text) if letter in greek or not known.issuperset(fold(letter))]
    if unknown:
        names = [f"{letter} (U+{ord(letter):04X})" for letter in unknown[:MOST_LETTERS]]
        more = f" and {len(unknown) - MOST_LETTERS} more" if len(unknown) > MOST_LETTERS else ""
        raise ValueError(
            f"prompt {prompt!r}: the recogniser of ocr cannot read {', '.join(names)}{more}: give one that can by "
            "--reward-models ocr=FILE (see docs/rewards.md), or change the text"
        )


def check_path(path: str | None) -> None:
    """Raises ConfigError for a file that is not a recogniser."""
    dictionary(path)


def default_prompts(split: Split) -> PromptList:
    """Generated prompts with a text to render in each."""
    return from_entries("ocr prompts", generate(split, GENERATED[split]))


def recogniser(path: str | None) -> Path:
    """The recogniser's file: the given one, or that of rapidocr's wheel. Raises ConfigError if it does not exist."""
    if path is not None:
        return existing("ocr", path)
    package = importlib.util.find_spec("rapidocr")
    file = Path(package.origin if package and package.origin else "").with_name("models") / RECOGNISER
    if not file.is_file():
        raise ConfigError(f"reward ocr: {file} does not exist: pip install --force-reinstall rapidocr==3.10.0")
    return file


@lru_cache
def dictionary(path: str | None) -> frozenset[str]:
    """The letters that a recogniser knows, as `fold` gives them. `path` is that of `load`. Raises ConfigError."""
    import onnxruntime

    file = recogniser(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Only its description is read.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # The engine's exceptions are not public.
        raise ConfigError(f"reward ocr: {file} cannot be read ({one_line(error)}): download it again") from None
    letters = session.get_modelmeta().custom_metadata_map.get("character", "")
    if not letters:
        # rapidocr would download a dictionary.
        raise ConfigError(
            f"reward ocr: {file} is not a recogniser with its dictionary inside: use an ONNX file of rapidocr's, "
            "with _rec_ in its name"
        )
    return frozenset(fold(letters))


def compatible(text: str) -> str:
    """A text in Unicode's form NFKC, with one kind of each quotation mark and dash."""
    # NFKC would make No of №, which looks different.
    parts = text.translate(MARKS).split("№")
    return "№".join(unicodedata.normalize("NFKC", part) for part in parts).translate(MARKS)


def fold(text: str) -> str:
    """The letters of a text that count: of `compatible`, without case, spaces and invisible characters."""
    return "".join(
        letter
        for letter in unicodedata.normalize("NFC", compatible(text).casefold())
        if not (letter.isspace() or unicodedata.category(letter) in ("Cc", "Cf") or "\ufe00" <= letter <= "\ufe0f")
    )


def mirrored(text: str) -> str:
    """Lines of a right-to-left script as they are spoken, from what stands in the picture from left to right."""
    # Numbers and Latin words stand from left to right there too.
    return "\n".join(re.sub(r"[!-~\d]+", lambda run: run[0][::-1], line[::-1]) for line in text.split("\n"))


def similarity(wanted: str, read: str) -> float:
    """1 if `wanted` is part of `read`, else 1 - min(distance, n)/n with Levenshtein's distance and n letters of `wanted`.

    Only the letters that `fold` leaves count. PP-OCR's recognisers of right-to-left scripts give letters in the order of
    the picture, others may give them as they are spoken: the better of the two counts.
    """
    from rapidfuzz.distance import Levenshtein

    wanted, readings = fold(wanted), [fold(read)]
    if any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in wanted):
        readings.append(fold(mirrored(read)))
    if any(wanted in reading for reading in readings):
        return 1.0
    distance = min(Levenshtein.distance(wanted, reading) for reading in readings)
    return 1 - min(distance, len(wanted)) / len(wanted)


class OcrScorer:
    """Reads pictures on the CPU. A picture in which it reads nothing scores 0, because it shows no text.

    Args:
        engines: how many read at the same time; by default one per CPU that this process may use, at most 8.
        path: see `load`.

    Raises:
        ConfigError: the recogniser's file does not exist.
    """

    name = "ocr"
    #: See `rewards.Scoring`.
    waits = in_parts = True

    def __init__(self, engines: int | None = None, path: str | None = None):
        from rapidocr import RapidOCR

        self.path = path
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        settings = {
            "Global.log_level": "critical",
            "Det.limit_type": "max",
            "Det.limit_side_len": DETECTION_SIDE,
            "Rec.model_path": str(recogniser(path)),
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        # An engine keeps state while it reads, so each thread needs its own.
        self._engines: list[Any] = [RapidOCR(params=settings) for _ in range(engines or min(available, MOST_ENGINES))]

    def read(self, images: np.ndarray) -> list[str]:
        """The text of every picture, uint8 RGB `[N, H, W, 3]`, from top to bottom, with line breaks."""
        count = len(self._engines)

        def work(first: int) -> list[str]:
            # The engine expects BGR. It does not turn lines that are upside down: a good picture has none.
            texts = []
            for i in range(first, len(images), count):
                try:
                    result = self._engines[first](np.ascontiguousarray(images[i][..., ::-1]), use_cls=False)
                except Exception as error:
                    # The engine's exceptions are not public. It raises one for a picture of two rows, for example.
                    raise ValueError(f"reward ocr cannot read image {i}: {one_line(error)}") from None
                texts.append("\n".join(result.txts or ()))
            return texts

        with ThreadPoolExecutor(count) as pool:
            parts = list(pool.map(work, range(count)))
        return [parts[i % count][i // count] for i in range(len(images))]

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None = None) -> Tensor:
        """uint8 RGB `[N, H, W, 3]` and N prompts -> float32 `[N]`. Raises ValueError for a prompt that fails `check`."""
        pairs = list(zip(prompts, metadata or [None] * len(prompts), strict=True))
        for prompt, about in pairs:
            check(prompt, about, self.path)
        read = self.read(images)
        return torch.tensor([similarity(target(*pair), text) for pair, text in zip(pairs, read, strict=True)])


def load(device: torch.device, path: str | None = None) -> OcrScorer:
    """The scorer, which runs on the CPU.

    Args:
        path: a recogniser, in place of rapidocr's own: one of its ONNX files with _rec_ in the name.

    Raises:
        ConfigError: the file does not exist.
    """
    return OcrScorer(path=path)
