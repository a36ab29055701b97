"""Text rendering: 1 - normalised edit distance between what a picture says and what it should say, 0 to 1.

As in Flow-GRPO (Liu et al. 2025, arXiv:2505.05470), which reads with PaddleOCR. Here rapidocr reads. Its wheel contains
PP-OCR's weights, so no hub is needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..prompts.lists import GENERATED, PromptList, from_entries
from ..prompts.rendering import generate
from ..prompts.split import Split
from ..settings.errors import one_line

WEIGHTS = "package"
PACKAGES = {"rapidocr": "rapidocr", "onnxruntime": "onnxruntime", "rapidfuzz": "rapidfuzz"}

QUOTED = re.compile(r'["“]([^"“”]+)["”]')
#: Longest side of the text detector's input. It still finds letters of a twentieth of the picture's height.
DETECTION_SIDE = 320
#: At most this many engines read at the same time, one thread each. More gain little.
MOST_ENGINES = 8


def target(prompt: str, metadata: Mapping[str, Any] | None = None) -> str:
    """The text that a picture should show: `target` of the metadata, or the first text in double quotes.

    Raises:
        ValueError: neither of them gives a text.
    """
    text = (metadata or {}).get("target")
    if text is None:
        quoted = QUOTED.search(prompt)
        text = quoted.group(1) if quoted else ""
    if not isinstance(text, str) or not _letters(text):
        raise ValueError(f'prompt {prompt!r} has no text to render: put it between double quotes, or give "target"')
    return text


def check(prompt: str, metadata: Mapping[str, Any] | None) -> None:
    """Raises ValueError for a prompt that cannot be scored."""
    target(prompt, metadata)


def default_prompts(split: Split) -> PromptList:
    """Generated prompts with a text to render in each."""
    return from_entries("ocr prompts", generate(split, GENERATED[split]))


def _letters(text: str) -> str:
    return "".join(text.split()).lower()


def similarity(wanted: str, read: str) -> float:
    """1 if `wanted` is part of `read`, else 1 - min(distance, n)/n with Levenshtein's distance and n letters of `wanted`.

    Spaces and case do not count.
    """
    from rapidfuzz.distance import Levenshtein

    wanted, read = _letters(wanted), _letters(read)
    if wanted in read:
        return 1.0
    return 1 - min(Levenshtein.distance(wanted, read), len(wanted)) / len(wanted)


class OcrScorer:
    """Reads pictures on the CPU. A picture in which it reads nothing scores 0, because it shows no text.

    Args:
        engines: how many read at the same time; by default one per CPU that this process may use, at most 8.
    """

    name = "ocr"
    #: See `rewards.score_all`.
    waits = True

    def __init__(self, engines: int | None = None):
        from rapidocr import RapidOCR

        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        settings = {
            "Global.log_level": "critical",
            "Det.limit_type": "max",
            "Det.limit_side_len": DETECTION_SIDE,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        # An engine keeps state while it reads, so each thread needs its own.
        self._engines: list[Any] = [RapidOCR(params=settings) for _ in range(engines or min(available, MOST_ENGINES))]

    def read(self, images: np.ndarray) -> list[str]:
        """The text of every picture, uint8 RGB `[N, H, W, 3]`, from top to bottom; lines are joined by spaces."""
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
                texts.append(" ".join(result.txts or ()))
            return texts

        with ThreadPoolExecutor(count) as pool:
            parts = list(pool.map(work, range(count)))
        return [parts[i % count][i // count] for i in range(len(images))]

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None = None) -> Tensor:
        """uint8 RGB `[N, H, W, 3]` and N prompts -> float32 `[N]`. Raises ValueError for a prompt without a target."""
        wanted = [
            target(prompt, about) for prompt, about in zip(prompts, metadata or [None] * len(prompts), strict=True)
        ]
        return torch.tensor([similarity(*pair) for pair in zip(wanted, self.read(images), strict=True)])


def load(device: torch.device, path: str | None = None) -> OcrScorer:
    """The scorer, which runs on the CPU."""
    return OcrScorer()
