"""The reward server's queue.

One thread scores, so that scorers need not be thread-safe. It scores waiting jobs for the same scorer in one call, because
the processes of a training run ask at about the same time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .. import Scorer

#: At most this many pictures in a call that several requests share. A single request may have more.
MOST_MERGED = 64


class Refused(Exception):
    """A request gets no scores: the status and text of the reply."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


@dataclass(eq=False)
class Job:
    """Pictures of one size from one request, uint8 `[n, H, W, 3]`, and n prompts and metadata."""

    name: str
    images: np.ndarray
    prompts: list[str]
    metadata: list[Any]
    scores: Future[list[float]] = field(default_factory=Future)


class Queue:
    """Jobs in the order in which they arrived, and the thread that scores them once it is started."""

    def __init__(self, scorers: Mapping[str, Scorer]):
        self._scorers = scorers
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self.thread = threading.Thread(target=self._work, daemon=True)

    @property
    def waiting(self) -> int:
        """The number of jobs that wait, without those that are being scored."""
        return len(self._waiting)

    def add(self, job: Job) -> None:
        """Raises Refused after `stop`."""
        with self._changed:
            if self._stopping:
                raise Refused(503, "the server is stopping")
            self._waiting.append(job)
            self._changed.notify()

    def stop(self, seconds: float) -> bool:
        """Refuses the jobs that wait and finishes the call in progress. Returns whether that took at most some seconds."""
        with self._changed:
            self._stopping = True
            for job in self._waiting:
                job.scores.set_exception(Refused(503, "the server is stopping"))
            self._changed.notify()
        self.thread.join(seconds)
        return not self.thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                jobs = self._take()
            self._do(jobs)

    def _take(self) -> list[Job]:
        """Removes the first job that waits and those that can share a call with it."""
        first = self._waiting.popleft()
        jobs, count = [first], len(first.prompts)
        for job in list(self._waiting):
            same = job.name == first.name and job.images.shape[1:] == first.images.shape[1:]
            if same and count + len(job.prompts) <= MOST_MERGED:
                self._waiting.remove(job)
                jobs.append(job)
                count += len(job.prompts)
        return jobs

    def _do(self, jobs: list[Job]) -> None:
        try:
            scores = self._score(jobs)
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].scores.set_exception(error)
                return
            # One of the jobs caused the error. Scored one by one, the others get their scores.
            for job in jobs:
                self._do([job])
            return
        for job in jobs:
            job.scores.set_result(scores[: len(job.prompts)])
            scores = scores[len(job.prompts) :]

    def _score(self, jobs: list[Job]) -> list[float]:
        """Raises Refused: 400 if the scorer rejects its input (ValueError), 500 for any other failure."""
        name = jobs[0].name
        images = np.concatenate([job.images for job in jobs])
        prompts = [prompt for job in jobs for prompt in job.prompts]
        metadata = [about for job in jobs for about in job.metadata]
        if all(about is None for about in metadata):
            metadata = None
        try:
            scores = self._scorers[name].score(images, prompts, metadata).float().cpu()
        except ValueError as error:
            raise Refused(400, f"{name}: {error}") from error
        except Exception as error:
            raise Refused(500, f"{name}: {type(error).__name__}: {error}") from error
        if scores.shape != (len(prompts),):
            raise Refused(500, f"{name}: {list(scores.shape)} scores for {len(prompts)} images")
        bad = torch.nonzero(~torch.isfinite(scores)).flatten().tolist()
        if bad:
            raise Refused(500, f"{name}: {scores[bad[0]].item()} for an image of prompt {prompts[bad[0]]!r}")
        return scores.tolist()
