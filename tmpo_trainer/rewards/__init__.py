"""Scorers: each maps images and prompts to one float32 number per image.

One file per scorer, found by its name (`settings.discovery`) and imported only when it is chosen: `shapes-partial` is
`shapes_partial.py`. A file has a function `load` and, by the names of the fields of `Reward`, whatever else applies to
its scorer. Beside the methods of `Scorer`, a scorer may have

- `waits = True`: it does not use the GPU, and scores in a thread beside other work, see `Scoring`;
- `in_parts = True`, with `waits`: a picture's score depends on that picture alone, so that a batch may come in parts;
- `to(device)`: moves its weights, which lets it be `Parked`;
- `variants()`: the (label, scorer) pairs that a report shows in its place;
- `factors(images, prompts)`: what a prompt leaves open, such as positions, see `factors`.

A class elsewhere is a reward as well, by the name `package.module:Class`. It is called as `Class(device)`, or as
`Class(device, path)` where `--reward-models` gives it a path.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import ModuleType
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import objectives
from ..prompts.lists import PromptList, preference
from ..prompts.split import Split
from ..settings import discovery
from ..settings.errors import ConfigError, failure, one_line, suggest

#: Files that are not scorers, see `settings.discovery`.
SHARED: tuple[str, ...] = ()


class Scorer(Protocol):
    """What training, evaluation and the nodes expect of a reward."""

    name: str

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None = None) -> Tensor:
        """uint8 RGB `[N, H, W, 3]` and N prompts -> float32 `[N]`, higher is better. Never 0 for a failure: raise."""
        ...


@dataclass(frozen=True)
class Reward:
    """What a scorer's file declares under these names. A field with a default may be left out."""

    load: Callable[..., Scorer]
    """`load(device, path, **options)`; `path` is None unless `--reward-models` gives one. Raises ConfigError."""
    WEIGHTS: Literal["file", "none", "package", "server"] = "file"
    """Where the weights are. With "file", `path` may name a file or folder. With "none" there are no weights. With
    "package" they are in the first of PACKAGES, and `path` is refused unless the file has a `check_path`. With "server",
    `path` must be the server's address. A run may use several servers: `remote-a` is one more `remote`, and `load` and
    `check_path` get the keyword `name`."""
    SOURCES: Sequence[tuple[str, Sequence[str]]] = ()
    """Hub repositories, each with the files that the scorer needs. `fetch` downloads them."""
    OPTIONS: Sequence[str] = ()
    """The names of settings that `load` and `check_path` take as keywords."""
    PACKAGES: Mapping[str, str] = field(default_factory=dict)
    """Modules that the scorer imports and that ComfyUI does not install, each with its name for pip."""
    check_path: Callable[..., None] | None = None
    """`check_path(path, **options)` raises ConfigError for an unusable path. By default, the path must exist."""
    check: Callable[[str, Any, str | None], None] | None = None
    """`check(prompt, metadata, path)` raises ValueError for a prompt that cannot be scored. By default, every one can."""
    state: Callable[..., str | None] | None = None
    """`state(path, **options)`: what its scores depend on besides its settings and files, such as a server's version; the
    keywords are those of `check_path`. Kept evaluations are made anew when it changes."""
    default_prompts: Callable[[Split], PromptList] | None = preference
    """The prompts of a split if no file is given; None if the package cannot know which prompts suit the scorer."""


class Parked:
    """A scorer whose weights are on the device only while it scores.

    Args:
        scorer: has a method `to(device)`. device: where it scores; in between it is on the CPU.
    """

    def __init__(self, scorer: Any, device: torch.device):
        self.name, self.scorer, self.device = scorer.name, scorer, device
        # It is not `in_parts`, because every call moves the weights.
        self.waits: bool = getattr(scorer, "waits", False)
        if hasattr(scorer, "factors"):
            self.factors = self._factors
        scorer.to(torch.device("cpu"))

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None = None) -> Tensor:
        """Scores as the scorer itself does."""
        with self.on_device() as scorer:
            return scorer.score(images, prompts, metadata)

    def _factors(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        with self.on_device() as scorer:
            return scorer.factors(images, prompts)

    @contextmanager
    def on_device(self) -> Iterator[Any]:
        """The scorer, whose weights stay on the device until the block ends."""
        try:
            # The move is inside `try`: if the device runs out of memory halfway, the weights there must go back as well.
            self.scorer.to(self.device)
            yield self.scorer
        finally:
            self.scorer.to(torch.device("cpu"))

    def variants(self) -> list[tuple[str, Scorer]]:
        """The scorer's variants, parked as well."""
        pairs = variants(self.scorer)
        return [(label, Parked(part, self.device) if hasattr(part, "to") else part) for label, part in pairs]


def find(name: str) -> Reward:
    """The declarations of a reward. Imports its file. Raises ConfigError for an unknown name."""
    if ":" in name:
        return _from_class(name)
    known = discovery.names("rewards")
    if name in known:
        return _declared(discovery.load("rewards", name))
    first = name.partition("-")[0]
    if first in known:
        found = _declared(discovery.load("rewards", first))
        if found.WEIGHTS == "server":
            return found
    raise ConfigError(
        f"unknown reward {name}{suggest(name, known)} (known: {', '.join(known)}; or write package.module:Class)"
    )


def _declared(module: ModuleType) -> Reward:
    own = vars(module)
    return Reward(**{each.name: own[each.name] for each in fields(Reward) if each.name in own})


def _from_class(name: str) -> Reward:
    path, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*path.split("."), attribute)):
        raise ConfigError(f"reward {name}: write package.module:Class")
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise ConfigError(f"reward {name} cannot be imported: {one_line(error)}") from None
    except Exception as error:
        # A SyntaxError knows its own file and line.
        said = f"SyntaxError: {one_line(error)}" if isinstance(error, SyntaxError) else failure(error)
        raise ConfigError(f"reward {name} cannot be imported: {said}") from None
    if attribute not in vars(module):
        raise ConfigError(f"reward {name}: {path} has no {attribute}{suggest(attribute, vars(module))}")
    made = vars(module)[attribute]
    if not callable(made):
        raise ConfigError(f"reward {name}: {attribute} is no class")

    def load(device: torch.device, path: str | None) -> Scorer:
        try:
            scorer: Any = made(device) if path is None else made(device, path)
        except (ConfigError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            call = f"{attribute}(device)" if path is None else f"{attribute}(device, path)"
            said = failure(error, module.__file__)
            raise ConfigError(f"reward {name}: {call} failed with {said}") from None
        if not callable(getattr(scorer, "score", None)):
            raise ConfigError(f"reward {name}: {attribute}(device) has no method score(images, prompts, metadata)")
        return scorer

    def state(path: str | None) -> str | None:
        file = inspect.getsourcefile(module)
        return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()

    return Reward(load, state=state)


def _options(name: str, found: Reward, settings: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {key: settings[key] for key in found.OPTIONS if key in settings}
    return {**chosen, "name": name} if found.WEIGHTS == "server" else chosen


def state(name: str, path: str | None, settings: Mapping[str, Any]) -> str | None:
    """What a reward's scores depend on besides its settings and files, see `Reward.state`."""
    found = find(name)
    return None if found.state is None else found.state(path, **_options(name, found, settings))


def check_reward(name: str, path: str | None = None, settings: Mapping[str, Any] | None = None) -> None:
    """Checks that a reward can be loaded, before anything is. The arguments are those of `load_scorer`.

    Raises:
        ConfigError: the reward is unknown, a package that it needs is not installed, or the path cannot be used.
    """
    found = find(name)
    check_packages(name, found.PACKAGES)
    if found.check_path is not None:
        found.check_path(path, **_options(name, found, settings or {}))
    elif path is not None and found.WEIGHTS == "file":
        from .parts.weights import existing

        existing(name, path)
    elif path is not None:
        package = next(iter(found.PACKAGES), "")
        why = "has no weights" if found.WEIGHTS == "none" else f"has its weights from the {package} package"
        raise ConfigError(f"--reward-models {name}={path}: {name} {why}, leave it out")


def check_packages(name: str, packages: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError if a package that a reward needs is not installed.

    Args:
        packages: the reward's PACKAGES. By default they are read in its file, which is not imported: what the file imports
            may take seconds.
    """
    needed: Mapping[str, str] = packages or {}
    if packages is None:
        source = (Path(__file__).parent / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8")
        declared = {
            ast.unparse(line.targets[0]): line.value for line in ast.parse(source).body if isinstance(line, ast.Assign)
        }
        needed = ast.literal_eval(declared["PACKAGES"]) if "PACKAGES" in declared else {}
    missing = {module: pip for module, pip in needed.items() if importlib.util.find_spec(module) is None}
    if missing:
        raise ConfigError(f"reward {name} needs {', '.join(missing)}: pip install {' '.join(missing.values())}")


def check_prompts(names: Sequence[str], prompts: PromptList, paths: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError for the first prompt that one of the rewards cannot score.

    Args:
        names: rewards that pass `check_reward`. paths: what `--reward-models` gives, by name.
    """
    for name in names:
        check = find(name).check
        if check is None:
            continue
        for prompt in prompts.texts:
            try:
                check(prompt, prompts.metadata.get(prompt), (paths or {}).get(name))
            except ValueError as error:
                raise ConfigError(f"{prompts.where}: {error}") from None


def default_prompts(names: Sequence[str], split: Split) -> PromptList | None:
    """The prompts that come with the package for these rewards; None if no list suits all of them."""
    lists = {find(name).default_prompts for name in names} - {None}
    # A reward without its own list can score any prompt.
    found = lists - {preference} or lists
    own = found.pop() if len(found) == 1 else None
    return None if own is None else own(split)


def load_scorer(
    name: str,
    device: torch.device | None = None,
    path: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Scorer:
    """The scorer of a reward.

    Args:
        device: where it runs; by default the CPU. path: its weights, in place of the hub's, or the address of its
            server. settings: values by their names in `TrainConfig`. The reward gets those that its OPTIONS list.

    Raises:
        ConfigError: `check_reward` fails, or the weights cannot be found or downloaded.
    """
    check_reward(name, path, settings)
    found = find(name)
    scorer = found.load(device or torch.device("cpu"), path, **_options(name, found, settings or {}))
    # Metrics and reports use the scorer's name, so it must be the name in the settings.
    scorer.name = name
    return scorer


def variants(scorer: Any) -> list[tuple[str, Scorer]]:
    """The (label, scorer) pairs that a report shows for a scorer."""
    return scorer.variants() if hasattr(scorer, "variants") else [(scorer.name, scorer)]


def factors(scorers: Sequence[tuple[str, Any]], images: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """What the prompts leave open, by name, float `[N]` each, NaN where a picture has none: judges of diversity.

    They are those of the first scorer that defines `factors(images, prompts)`; none if no scorer does.

    Args:
        scorers: (name, scorer) pairs. images: uint8 RGB `[N, H, W, 3]`.
    """
    return next((scorer.factors(images, prompts) for _, scorer in scorers if hasattr(scorer, "factors")), {})


class Worker:
    """A thread that makes calls one after the other, in the order of `submit`.

    It is a daemon, so that a process with an error does not wait for a slow server before it ends.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Tensor], Future[Tensor]] | None] = SimpleQueue()
        self._closed = False
        self._thread = Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Tensor]) -> Future[Tensor]:
        future: Future[Tensor] = Future()
        self._calls.put((call, future))
        return future

    def close(self) -> None:
        """Ends the thread after the call that it is in. Those that it has not begun are dropped."""
        self._closed = True
        self._calls.put(None)

    def join(self) -> None:
        """Returns when the call that it is in has ended, after `close`."""
        self._thread.join()

    def _work(self) -> None:
        while (item := self._calls.get()) is not None and not self._closed:
            call, future = item
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            # They hold pictures, and the next call may be a rollout away.
            del item, call, future


class Scoring:
    """Scores batches of pictures: `with Scoring(scorers) as scoring`, then `scoring.batch` for each of them.

    Every scorer that waits has a thread, in which it scores the batches in their order, whatever the caller does meanwhile.
    The others score in the caller's thread.

    Args:
        scorers: (name, scorer) pairs.
    """

    def __init__(self, scorers: Sequence[tuple[str, Scorer]]):
        self.scorers = scorers
        self.workers = {name: Worker() for name, scorer in scorers if getattr(scorer, "waits", False)}
        #: The scorers that can begin before a batch is complete.
        self.early = {name for name, scorer in scorers if name in self.workers and getattr(scorer, "in_parts", False)}

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def join(self) -> None:
        """Returns when no scorer is at work any more, after the `with` block. If an error ended it, one that waits may still
        be."""
        for worker in self.workers.values():
            worker.join()

    def batch(self, prompts: Sequence[str], metadata: Sequence[Any] | None) -> ScoredBatch:
        """A batch of N pictures, whose prompts are known."""
        return ScoredBatch(self, prompts, metadata)


class ScoredBatch:
    """The scores of one batch, see `Scoring`. The calls are `add` for each part of the pictures, `complete`, `scores`."""

    def __init__(self, scoring: Scoring, prompts: Sequence[str], metadata: Sequence[Any] | None):
        self._scoring, self._prompts, self._metadata = scoring, prompts, metadata
        self._calls: dict[str, list[Future[Tensor]]] = {name: [] for name in scoring.workers}
        self._here: dict[str, Tensor] = {}
        self._added = 0

    def add(self, images: np.ndarray) -> None:
        """The next pictures of the batch, uint8 `[n, H, W, 3]`: the scorers that take parts begin with them."""
        rows = slice(self._added, self._added + len(images))
        self._added = rows.stop
        about = None if self._metadata is None else self._metadata[rows]
        for name, scorer in self._scoring.scorers:
            if name in self._scoring.early:
                self._submit(name, partial(_score, name, scorer, images, self._prompts[rows], about))

    def complete(self, images: np.ndarray) -> None:
        """All pictures of the batch, `[N, H, W, 3]`, which were added: the other scorers begin. Returns when those that do not
        wait are done. A scorer's own errors pass through."""
        others = [(name, scorer) for name, scorer in self._scoring.scorers if name not in self._scoring.early]
        for name, scorer in others:
            if name in self._calls:
                self._submit(name, partial(_score, name, scorer, images, self._prompts, self._metadata))
        for name, scorer in others:
            if name not in self._calls:
                self._here[name] = _score(name, scorer, images, self._prompts, self._metadata)

    def scores(self) -> dict[str, Tensor]:
        """Scores by name, float32 `[N]` each, once all scorers are done.

        Raises:
            ValueError: a score is not finite, or a scorer does not return N of them. A scorer's own errors pass through.
        """
        found = self._here | {name: _joined([call.result() for call in calls]) for name, calls in self._calls.items()}
        return {name: check_finite(name, found[name], self._prompts) for name, _ in self._scoring.scorers}

    def _submit(self, name: str, call: Callable[[], Tensor]) -> None:
        self._calls[name].append(self._scoring.workers[name].submit(call))


def _score(
    name: str, scorer: Scorer, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None
) -> Tensor:
    try:
        scores = scorer.score(images, prompts, metadata)
    except (OSError, ValueError, RuntimeError, MemoryError):
        raise
    except Exception as error:
        # A mistake in a scorer of the user's own, which ends a run like any other failure of a scorer.
        own = scorer.scorer if isinstance(scorer, Parked) else scorer
        said = failure(error, getattr(sys.modules.get(type(own).__module__), "__file__", None))
        raise ValueError(f"reward {name} failed with {said}") from error
    if not isinstance(scores, Tensor):
        raise ValueError(f"reward {name} gave {type(scores).__name__}: score must return a torch.Tensor, float32 [N]")
    return scores


def _joined(parts: Sequence[Tensor]) -> Tensor:
    # A single part may have a wrong shape, which `check_finite` reports.
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def score_all(
    scorers: Sequence[tuple[str, Scorer]], images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None
) -> dict[str, Tensor]:
    """Scores of one batch by name, float32 `[N]` each; see `Scoring`.

    Raises:
        ValueError: a score is not finite, or a scorer does not return N of them. A scorer's own errors pass through.
    """
    with Scoring(scorers) as scoring:
        batch = scoring.batch(prompts, metadata)
        batch.add(images)
        batch.complete(images)
        return batch.scores()


def check_finite(name: str, scores: Tensor, prompts: Sequence[str]) -> Tensor:
    """The scores in float32, on the CPU and without a gradient.

    Raises:
        ValueError: not all are finite; the error names the scorer and the first such prompt.
    """
    if scores.shape != (len(prompts),):
        raise ValueError(f"reward {name} gave {tuple(scores.shape)} scores for {len(prompts)} images")
    # A reward of the user's own may compute on the GPU, and with gradients.
    found = scores.detach().float().cpu()
    bad = torch.nonzero(~torch.isfinite(found)).flatten()
    if len(bad):
        i = int(bad[0])
        raise ValueError(f"reward {name} gave {scores[i].item()} for image {i} of prompt {prompts[i]!r}")
    return found


def combine(scores: dict[str, Tensor], weights: Sequence[float] | None, norm: str) -> Tensor:
    """The weighted sum `[K]` of rewards `[K]`, without weights their mean. With norm `zscore` each is normalised within the
    group of K first.

    Raises:
        ValueError: the sum is not finite.
    """
    # A mean, so that beta never asks for more sharpness of several rewards than of one.
    factors = weights or [1 / len(scores)] * len(scores)
    parts = [objectives.zscore(values) if norm == "zscore" else values for values in scores.values()]
    total = torch.stack([factor * part for factor, part in zip(factors, parts, strict=True)]).sum(0)
    if not torch.isfinite(total).all():
        terms = " + ".join(f"{factor:g} {name}" for factor, name in zip(factors, scores, strict=True))
        raise ValueError(f"the reward {terms} is not finite: choose smaller weights")
    return total
