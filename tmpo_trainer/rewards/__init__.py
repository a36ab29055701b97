"""Scorers. Each maps images and prompts to one float32 number per image; one file per scorer."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import objectives
from ..prompts.lists import PromptList
from ..settings.errors import ConfigError, suggest


class Scorer(Protocol):
    """What training, evaluation and the nodes expect of a reward."""

    name: str

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None = None) -> Tensor:
        """uint8 RGB `[N, H, W, 3]` and N prompts -> float32 `[N]`, higher is better. Never 0 for a failure: raise."""
        ...


class Parked:
    """A scorer whose weights are on the device only while it scores.

    Args:
        scorer: with a method `to(device)`. device: where it scores; in between it is on the CPU.
    """

    def __init__(self, scorer: Any, device: torch.device):
        self.name, self.scorer, self.device = scorer.name, scorer, device
        scorer.to(torch.device("cpu"))

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None = None) -> Tensor:
        """As the scorer does."""
        try:
            # Also what was on the way when the device was full goes back.
            self.scorer.to(self.device)
            return self.scorer.score(images, prompts, metadata)
        finally:
            self.scorer.to(torch.device("cpu"))


#: Files that are no scorers, see `settings.discovery`.
SHARED: tuple[str, ...] = ()
NAMES = (
    "shapes", "shapes-partial", "pickscore", "hpsv2", "imagereward", "clipscore", "geneval", "ocr", "sharpness", "remote",
)  # fmt: skip
#: Those that want more of a prompt than its words.
PARTICULAR = ("shapes", "geneval", "ocr")


def check_name(name: str) -> None:
    """Raises ConfigError for a scorer that is not known. `remote-...` is as good as `remote`: for several of them."""
    if name not in NAMES and not name.startswith("remote-"):
        raise ConfigError(f"unknown reward {name}{suggest(name, NAMES)} (known: {', '.join(NAMES)})")


def check_prompts(names: Sequence[str], prompts: PromptList) -> None:
    """Raises ConfigError for the first prompt that one of the scorers cannot score."""
    for name in names:
        if _module(name) in PARTICULAR:
            check = importlib.import_module(f".{_module(name)}", __name__).check
            for prompt in prompts.texts:
                try:
                    check(prompt, prompts.metadata.get(prompt))
                except ValueError as error:
                    raise ConfigError(f"{prompts.where}: {error}") from None


def _module(name: str) -> str:
    return name.removesuffix("-partial")


def remote_address(name: str, path: str | None) -> str:
    """The URL of a remote reward. Raises ConfigError if none was given."""
    if path is None:
        raise ConfigError(f"reward {name} needs its address: --reward-models {name}=http://127.0.0.1:18085")
    return path


def load_scorer(
    name: str,
    device: torch.device | None = None,
    path: str | None = None,
    hosts: Sequence[str] = (),
    timeout: float = 120,
    pickscore_scale: Literal["raw", "flow"] = "raw",
) -> Scorer:
    """A scorer by its name.

    Args:
        device: where it runs; by default the CPU. path: of its weights, in place of the hub's; the URL of a remote one.
        hosts: beside this machine, that a remote scorer may be on. timeout: seconds for a reply of it.
        pickscore_scale: see `pickscore.load`.

    Raises:
        ConfigError: it is not known, or its weights cannot be had.
    """
    check_name(name)
    if name == "remote" or name.startswith("remote-"):
        from . import remote

        return remote.load(remote_address(name, path), hosts, timeout, name)
    if name == "pickscore":
        from . import pickscore

        return pickscore.load(device or torch.device("cpu"), path, pickscore_scale)
    if name == "shapes-partial":
        from . import shapes

        return shapes.load_partial(path)
    return importlib.import_module(f".{name}", __name__).load(device or torch.device("cpu"), path)


def score_all(
    scorers: Sequence[tuple[str, Scorer]], images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None
) -> dict[str, Tensor]:
    """Scores by name, float32 `[N]` each. Those that keep no GPU busy (`waits`) go on in threads beside the others.

    Raises:
        ValueError: a score is not finite, or there are not N. Whatever a scorer raises.
    """
    with ThreadPoolExecutor(len(scorers)) as pool:
        aside = {
            name: pool.submit(scorer.score, images, prompts, metadata)
            for name, scorer in scorers
            if getattr(scorer, "waits", False)
        }
        here = {name: scorer.score(images, prompts, metadata) for name, scorer in scorers if name not in aside}
        found = here | {name: future.result() for name, future in aside.items()}
    return {name: check_finite(name, found[name], prompts) for name, _ in scorers}


def check_finite(name: str, scores: Tensor, prompts: Sequence[str]) -> Tensor:
    """Raises ValueError, naming the scorer and the first prompt to blame, unless there is a finite number for each."""
    if scores.shape != (len(prompts),):
        raise ValueError(f"reward {name} gave {tuple(scores.shape)} scores for {len(prompts)} images")
    bad = torch.nonzero(~torch.isfinite(scores)).flatten()
    if len(bad):
        i = int(bad[0])
        raise ValueError(f"reward {name} gave {scores[i].item()} for image {i} of prompt {prompts[i]!r}")
    return scores


def combine(scores: dict[str, Tensor], weights: Sequence[float] | None, norm: str) -> Tensor:
    """Weighted sum of rewards `[K]` each; with `zscore` normalised within the group first. `[K]`."""
    factors = weights or [1.0] * len(scores)
    parts = [objectives.zscore(values) if norm == "zscore" else values for values in scores.values()]
    return torch.stack([factor * part for factor, part in zip(factors, parts, strict=True)]).sum(0)
