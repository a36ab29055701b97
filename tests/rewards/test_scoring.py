"""Scoring beside other work: parts of batches, threads, errors."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tmpo_trainer.rewards import Scoring, score_all

PROMPTS = ["a", "b", "c", "d", "e"]
METADATA = [{"number": i} for i in range(5)]
IMAGES = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(3, 3)


class Numbers:
    """Scores a picture by its number, and keeps what it is called with."""

    name = "numbers"

    def __init__(self, waits: bool = True, in_parts: bool = False):
        self.waits, self.in_parts = waits, in_parts
        self.calls: list[tuple[list[str], Any, bool]] = []

    def score(self, images: np.ndarray, prompts: list[str], metadata: Any = None) -> Tensor:
        self.calls.append((prompts, metadata, threading.current_thread() is threading.main_thread()))
        return torch.tensor([float(image.max()) for image in images])


def test_parts_reach_the_scorers_that_take_them() -> None:
    """With their own prompts and metadata, and before the batch is complete; the others get all pictures at once."""
    parts, whole, here = Numbers(in_parts=True), Numbers(), Numbers(waits=False, in_parts=True)
    first = threading.Event()
    score = parts.score
    parts.score = lambda *call: (score(*call), first.set())[0]
    pairs = [("here", here), ("parts", parts), ("whole", whole)]
    with Scoring(pairs) as scoring:
        batch = scoring.batch(PROMPTS, METADATA)
        batch.add(IMAGES[:2])
        assert first.wait(5) and not whole.calls and not here.calls
        batch.add(IMAGES[2:])
        batch.complete(IMAGES)
        found = batch.scores()
    assert list(found) == ["here", "parts", "whole"]
    assert all(scores.tolist() == [0, 1, 2, 3, 4] for scores in found.values())
    assert parts.calls == [(PROMPTS[:2], METADATA[:2], False), (PROMPTS[2:], METADATA[2:], False)]
    assert whole.calls == [(PROMPTS, METADATA, False)] and here.calls == [(PROMPTS, METADATA, True)]


def test_an_error_does_not_wait_for_a_scorer_that_hangs() -> None:
    """Nor does the end of the process, and what the scorer was to do next is dropped."""
    release, begun = threading.Event(), threading.Event()
    before = set(threading.enumerate())

    class Hanging(Numbers):
        def score(self, *call: Any) -> Tensor:
            begun.set()
            release.wait(60)
            return super().score(*call)

    class Failing(Numbers):
        def score(self, *call: Any) -> Tensor:
            assert begun.wait(5)
            raise ValueError("no such picture")

    hanging = Hanging(in_parts=True)
    with (
        pytest.raises(ValueError, match="no such picture"),
        Scoring([("h", hanging), ("f", Failing(False))]) as scoring,
    ):
        batch = scoring.batch(PROMPTS, None)
        batch.add(IMAGES[:2])
        batch.add(IMAGES[2:])
        batch.complete(IMAGES)
    (left,) = set(threading.enumerate()) - before
    assert left.daemon
    # Whoever scores again waits.
    threading.Timer(0.1, release.set).start()
    scoring.join()
    assert not left.is_alive() and [prompts for prompts, *_ in hanging.calls] == [PROMPTS[:2]]


def test_the_first_score_that_is_no_number_is_named_by_its_place_in_the_batch() -> None:
    class Broken(Numbers):
        def score(self, images: np.ndarray, prompts: list[str], metadata: Any = None) -> Tensor:
            return super().score(images, prompts).where(torch.tensor([prompt != "d" for prompt in prompts]), torch.nan)

    with Scoring([("broken", Broken(in_parts=True))]) as scoring:
        batch = scoring.batch(PROMPTS, None)
        batch.add(IMAGES[:2])
        batch.add(IMAGES[2:])
        batch.complete(IMAGES)
        with pytest.raises(ValueError, match="reward broken gave nan for image 3 of prompt 'd'"):
            batch.scores()
    with pytest.raises(ValueError, match=r"reward broken gave \(5,\) scores for 4 images"):
        score_all([("broken", Numbers())], IMAGES, PROMPTS[:4], None)
