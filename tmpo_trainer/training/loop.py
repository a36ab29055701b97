"""The training loop: rollout, rewards, the method's gradient, optimiser step."""

from __future__ import annotations

import math
import signal
import sys
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from safetensors import SafetensorError

from .. import methods
from ..backbones.base import Backbone
from ..evaluation.features import Features
from ..lora import adapter
from ..methods import data
from ..methods.base import Figures
from ..methods.batch import Clock, Network, PromptBatch
from ..processes import Processes, like, whole
from ..prompts.lists import PromptList, as_list, prompt_index
from ..rewards import Scorer
from ..settings.config import TrainConfig
from ..settings.errors import ConfigError, one_line
from ..tree import TreePlan
from . import checkpoint
from .progress import Reporter
from .prompt_batch import Judges, Roller
from .stopping import stopping
from .weights import Diverged, Weights, trainable

#: Figures of which an update has the largest of its prompts, not the mean.
MAXIMA = ("ratio_max", "replay_ratio_error")
#: Figures of the last optimiser step of an update alone: in the first one every ratio is 1 by construction.
LAST_ONLY = ("ratio_mean", "ratio_max", "clip_fraction")
#: A batch and the network for its prompts.
Rolled = list[tuple[PromptBatch, Network]]


class Interrupted(Exception):
    """A signal that ends a run arrived; the run was saved. Exit code 130."""


class Trainer:
    """Trains a LoRA on a backbone's transformer, on one process or several.

    With W processes an update has W * prompts_per_update prompts, each process its own ones with its own noise; the branch
    steps are the same on all, and gradients are averaged. It equals one process with all the prompts.

    Args:
        config: settings. run: the run's folder. backbone: the frozen model; the trainer adds an adapter to it.
        scorers: the rewards, in the order of `config.reward`. prompts: for training, texts alone or with metadata.
        accelerator: of this process; by default one for the backbone's device alone.
        extra: the scorers of `config.extra_rewards`. features: of pictures, used if `config.needs_features`.
        examples: latents `[M, ...latent]` and captions of the pictures in `config.data_folder`.

    Raises:
        ConfigError: settings that do not fit the model.
        ValueError: the settings need features of pictures, and there are none.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        backbone: Backbone,
        scorers: Sequence[Scorer],
        prompts: Sequence[str] | PromptList,
        accelerator: Accelerator | None = None,
        extra: Sequence[Scorer] = (),
        features: Features | None = None,
        examples: tuple[torch.Tensor, Sequence[str]] | None = None,
    ):
        if config.needs_features and features is None:
            raise ValueError("these settings need features of pictures: pass `features` to Trainer")
        self.config, self.run, self.backbone = config, run, backbone
        self.accelerator = accelerator or Accelerator(cpu=backbone.device.type == "cpu")
        self.processes = Processes(self.accelerator)
        listed = as_list(prompts)
        self.prompts = listed.texts
        self.judges = Judges(list(scorers), list(extra), features if config.needs_features else None, listed.metadata)
        sigmas = backbone.sigmas(config.rollout_steps, *config.resolution)
        self.method = methods.make(config, sigmas)
        self._method_before = self.method.state()
        self._prepare()
        # With FSDP2 the transformer was elsewhere until now.
        self.device = backbone.device
        self.weights = Weights(backbone.transformer)
        self.roller = Roller(config, backbone, self.method, self.judges, sigmas)
        self.examples = None
        if examples is not None:
            prompts_per_update = self.processes.count * config.prompts_per_update
            self.examples = data.Examples(*examples, self.roller.velocity, prompts_per_update)
        #: Most parents in one network call of the replay; see `_gradient`.
        self.replay_batch = config.replay_batch
        self.done = 0
        self._whole = True
        self._stop: int | None = None

    def _prepare(self) -> None:
        """Gives the transformer its adapter, and makes the optimiser."""
        config, backbone = self.config, self.backbone
        start = None
        if config.init_lora:
            start = adapter.check_fits(config.init_lora, backbone, config.lora_targets, config.lora_rank)
        torch.manual_seed(config.seed)
        adapter.attach(backbone.transformer, backbone.adapter(config.lora_targets, config.lora_rank, config.lora_alpha))
        if config.gradient_checkpointing:
            backbone.transformer.enable_gradient_checkpointing()
        if config.compile:
            # Block by block: they are alike, one is compiled for all. Batches vary in size.
            for module in backbone.transformer.modules():
                if type(module).__name__ in backbone.transformer._no_split_modules:
                    module.compile(dynamic=True)
            # One per kind of block, with and without gradient and adapter: more than torch's default of 8.
            torch._dynamo.config.recompile_limit = 64
        lora = trainable(backbone.transformer)
        if start is not None:
            adapter.start(lora, config.lora_alpha / config.lora_rank, start)
        self.optimizer = torch.optim.AdamW(
            lora.values(), lr=config.learning_rate, betas=config.adam_betas, weight_decay=config.weight_decay
        )
        if self.accelerator.is_fsdp2:
            # In place: the transformer keeps its class's methods, its parameters become shards.
            backbone.transformer, self.optimizer = self.accelerator.prepare(backbone.transformer, self.optimizer)

    # -- state ---------------------------------------------------------------------------------------------------

    def save(self, least: int = 1) -> Path:
        """Writes a checkpoint of the updates done so far: the same files whatever the number of processes.

        Args:
            least: how many checkpoints to keep at least, whatever the settings say.
        """
        keep = max(self.config.checkpoints_kept, least)
        main, weights = self.processes.main, self.weights
        lora, ema = weights.whole(weights.lora, main), weights.whole(weights.ema, main)
        tensors = weights.whole(self.method.tensors(), main)
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {key: weights.whole(values, main) for key, values in optimizer["state"].items()}
        path = self.run / f"checkpoint-{self.done}"
        error = None
        if main:
            about = {
                "seed": self.config.seed,
                "lora_rank": self.config.lora_rank,
                "processes": self.processes.count,
                "method": self.config.method,
                "method_state": self.method.state(),
            }
            try:
                checkpoint.save(self.run, self.done, lora, ema, optimizer, about, keep, tensors)
            except Exception as caught:
                error = caught
        self.processes.agree(error)
        return path

    def resume(self, path: Path) -> None:
        """Continues from a checkpoint. Raises ConfigError if it is of another model, rank, seed or method."""
        saved = checkpoint.load(path)
        lora, state = self.weights.lora, saved.state
        moments = saved.moments(path, lora)
        if state["seed"] != self.config.seed:
            raise ConfigError(f"checkpoint {path} has seed {state['seed']}, the settings say {self.config.seed}")
        count = self.processes.count
        if state.get("processes", 1) != count:
            raise ConfigError(
                f"checkpoint {path} is of {state.get('processes', 1)} processes, here are {count}: the prompts would "
                "come in another order; start as many, or begin a new run with --init-lora"
            )
        # Earlier versions kept the state of GARDO's gate alone, and no method's name.
        method, kept = state.get("method", self.config.method), state.get("method_state", state.get("gate", {}))
        if method != self.config.method or not isinstance(kept, dict) or kept.keys() != self.method.state().keys():
            raise ConfigError(f"checkpoint {path} is of another method than {self.config.method}")
        self.weights.read(self.weights.share(saved.lora))
        self.weights.ema = self.weights.share(saved.ema)
        moments = {
            key: {n: like(v, lora[name]) if v.dim() else v for n, v in moments.get(key, {}).items()}
            for key, name in enumerate(lora)
        }
        # The groups hold settings, and those are of this run.
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.method.load(kept, self.weights.share(saved.tensors))
        self.done = state["update"]

    # -- one update ----------------------------------------------------------------------------------------------

    def learning_rate(self, update: int) -> float:
        """Cosine from the peak to lr_min_ratio of it, per update."""
        low = self.config.lr_min_ratio
        return self.config.learning_rate * (
            low + (1 - low) * 0.5 * (1 + math.cos(math.pi * update / self.config.updates))
        )

    def update(self) -> dict[str, Any]:
        """One rollout of all prompts and `inner_updates` optimiser steps. Returns what goes into metrics.jsonl."""
        u, clock, start = self.done, Clock(self.device), time.perf_counter()
        plan = self.method.shape(u)
        self._method_before = self.method.state()
        self.method.begin(u, self.weights)
        figures: defaultdict[str, list[float]] = defaultdict(list)
        other = self.method.rollout_weights(self.weights)
        with nullcontext() if other is None else self.weights.using(other):
            rolled = self._roll_out(u, plan, clock, figures)
        _extend(figures, self.method.judge([batch for batch, _ in rolled], self.processes))
        self._optimise(u, rolled, figures)
        if (u + 1) % self.config.ema_every == 0:
            self.weights.average(self.config.ema_decay)
        for batch, network in rolled:
            _extend(
                figures,
                {f"evaluations/{phase}": [n / batch.count] * batch.count for phase, n in network.evaluated.items()},
            )
        everyone = self.processes.gather(dict(figures))
        # A process that ran out of memory may have made calls of a phase that the others have not.
        names = dict.fromkeys(name for part in everyone for name in part)
        merged = {name: summarise(name, [v for part in everyone for v in part.get(name, ())]) for name in names}
        self.method.end(merged)
        self._method_before = self.method.state()
        self.done, self._whole = u + 1, True
        phases = clock.seconds
        seconds = time.perf_counter() - start
        return {
            "update": self.done,
            # A branch at step 1 is several seeds.
            "branch_steps": [*([1] if plan.roots > 1 and 1 not in plan.fanout else []), *plan.fanout],
            **self.method.about(u),
            "learning_rate": self.learning_rate(u),
            **merged,
            "seconds": {**phases, "other": seconds - sum(phases.values()), "total": seconds},
        }

    def _slots(self, update: int) -> list[tuple[int, str]]:
        """This process's prompts of an update, each with its place among those of all processes."""
        count = self.config.prompts_per_update
        first, total = self.processes.rank * count, self.processes.count * count
        return [
            (slot, self.prompts[prompt_index(update * total + slot, len(self.prompts), self.config.seed)])
            for slot in range(first, first + count)
        ]

    def _roll_out(self, update: int, plan: TreePlan, clock: Clock, figures: Figures) -> Rolled:
        """The rollouts of this process's prompts; all processes raise if one has an error.

        Out of memory, on any process, with graphs that were kept for the replay, they are made again without on all. Noise is
        keyed, so that they are the same ones.
        """
        while True:
            rolled, found, error = self._attempt(update, plan, clock)
            full = self.roller.graphs and isinstance(error, torch.OutOfMemoryError)
            self.processes.agree(None if full else error)
            if not self.roller.graphs or not any(self.processes.gather(full)):
                _extend(figures, found)
                return rolled
            if error is not None:
                # Its traceback holds the graphs of the batch in which it was raised, in a cycle.
                traceback.clear_frames(error.__traceback__)
                error = None
            self._drop_graphs([batch for batch, _ in rolled])
            rolled.clear()

    def _attempt(self, update: int, plan: TreePlan, clock: Clock) -> tuple[Rolled, Figures, Exception | None]:
        """The rollouts as far as they come, their figures, and what has ended them early.

        Raises:
            Exception: before the last network call of a batch with a sharded transformer, in which the other processes wait for
                this one.
        """
        slots, size = self._slots(update), self.config.prompts_per_batch
        rolled: Rolled = []
        figures: defaultdict[str, list[float]] = defaultdict(list)
        # Batches whose scorers may still be at work. During a rollout it is at most one, because its pictures are kept.
        begun: deque[tuple[Callable[[], tuple[PromptBatch, Figures]], Network]] = deque()
        error: Exception | None = None
        sharded = self.weights.sharded
        with self.judges.scoring() as scoring:
            for first in range(0, len(slots), size):
                chosen = slots[first : first + size]
                last = first + size >= len(slots)
                network: Network | None = None
                try:
                    network = self.roller.network([prompt for _, prompt in chosen], clock)
                    begun.append((self.roller.roll_out(network, clock, plan, update, chosen, scoring), network))
                    while len(begun) > (0 if last else 1):
                        finish, network = begun.popleft()
                        batch, found = finish()
                        rolled.append((batch, network))
                        _extend(figures, found)
                except Exception as caught:
                    if sharded and (network is None or not network.rolled_out):
                        # The others wait for this one inside a block: the launcher has to end them.
                        raise
                    error = caught
                if sharded:
                    # The next batch's network calls need all processes.
                    self.processes.agree(error)
                elif error is not None:
                    break
        if self.roller.graphs and isinstance(error, torch.OutOfMemoryError):
            # It will be tried again, with the same scorers, which take one call at a time.
            scoring.join()
        return rolled, figures, error

    def _optimise(self, update: int, rolled: Rolled, figures: Figures) -> None:
        """The optimiser steps of an update."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(update)
        for inner in range(config.inner_updates):
            found = self._gradient(rolled, inner)
            last = inner + 1 == config.inner_updates
            _extend(figures, {name: values for name, values in found.items() if last or name not in LAST_ONLY})
            if self.processes.count > 1 and not self.weights.sharded:
                # One gradient for all processes; FSDP2 averages in its backward pass.
                for parameter in self.weights.lora.values():
                    mean: Any = reduce(parameter.grad, "mean")
                    parameter.grad = mean
            norm = whole(torch.nn.utils.clip_grad_norm_(self.weights.lora.values(), config.max_grad_norm)).item()
            if not math.isfinite(norm):
                # The norm is that of all processes' gradient.
                self.processes.agreed = True
                raise Diverged(f"the gradient of update {update + 1} is {norm}")
            figures["grad_norm"].append(norm)
            self._whole = False
            self.optimizer.step()
        if not all(self.processes.gather(self.weights.finite())):
            self.processes.agreed = True
            raise Diverged(f"the LoRA is not finite after update {update + 1}")

    def _gradient(self, rolled: Rolled, inner: int) -> Figures:
        """The gradient of all batches. Out of memory, on any process, it is begun again with half the batch on all.

        With a sharded transformer the other processes are already waiting in a collective: there it is an error.
        """
        while True:
            self.optimizer.zero_grad()
            figures: defaultdict[str, list[float]] = defaultdict(list)
            full, error = False, None
            kept = any(batch.rollout.graphs for batch, _ in rolled)
            try:
                for batch, network in rolled:
                    network.max_batch = self.replay_batch
                    _extend(figures, self.method.backward(batch, network, inner))
                    _extend(figures, data.backward(self.method, batch, network, self.examples))
            except Exception as caught:
                if self.weights.sharded:
                    raise
                full = isinstance(caught, torch.OutOfMemoryError)
                error = None if full else caught
            self.processes.agree(error)
            if not any(self.processes.gather(full)):
                return figures
            if any(self.processes.gather(kept)):
                self._drop_graphs([batch for batch, _ in rolled])
            else:
                self._halve([batch for batch, _ in rolled])

    def _drop_graphs(self, batches: Sequence[PromptBatch]) -> None:
        """From now on the replay computes what the rollout has kept so far, for which `replay_batch` makes no difference."""
        for batch in batches:
            batch.rollout.drop_graphs()
        self.roller.graphs = False
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.processes.main:
            print(
                "\nout of memory with the activations of the rollout: from now on they are computed again "
                "(--no-reuse-forward to begin with that)",
                file=sys.stderr,
            )

    def _halve(self, batches: Sequence[PromptBatch]) -> None:
        """Halves the replay's batch. Raises RuntimeError if it cannot be smaller."""
        least = max(batch.count for batch in batches)
        # Of one optimiser step, in one call.
        most = max(
            max(
                methods.trained(self.method.evaluations(batch.plan), self.config.inner_updates),
                data.images(self.config),
            )
            * batch.count
            for batch in batches
        )
        before = min(self.replay_batch or most, most)
        if before <= least:
            self.processes.agreed = True
            raise RuntimeError(
                f"out of memory in the replay, even with {before} latents at a time: try --gradient-checkpointing, "
                "fewer --prompts-per-batch or a smaller --resolution"
            )
        self.replay_batch = max(before // 2, least)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.processes.main:
            print(
                f"\nout of memory with {before} latents in a replay call: {self.replay_batch} from now on "
                f"(--replay-batch {self.replay_batch} to begin with that)",
                file=sys.stderr,
            )

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(self, reporter: Reporter) -> None:
        """Runs the remaining updates. On a failure the last whole update is saved first.

        Only a failure between the optimiser steps of one update (`inner_updates` > 1) leaves nothing to save: then the
        last checkpoint stands.

        Raises:
            Interrupted: after a signal, saved.
        """
        config = self.config
        handlers = {number: signal.signal(number, self._on_signal) for number in stopping()}
        saving = False

        def save() -> None:
            nonlocal saving
            saving = True
            self.save()
            saving = False

        try:
            if self.done:
                # A run that was told to stop has left out what was due then.
                self._show(reporter, self.processes.gather(reporter.shown(self.done))[0])
            while self.done < config.updates:
                metrics = self.update()
                self._tell(lambda metrics=metrics: reporter.update(metrics), calls=False)
                stop = self._stopped()
                # Before an evaluation, which may take longer than a scheduler waits after its signal, and before what else is
                # shown: a run that is killed meanwhile loses nothing, and one that is resumed shows what is missing.
                due = self.done == config.updates or any(
                    every and self.done % every == 0 for every in (config.checkpoint_every, config.eval_every)
                )
                if due or stop:
                    save()
                if not stop:
                    self._show(reporter)
                    stop = self._stopped()
                    if stop and not due:
                        save()
                if stop:
                    raise Interrupted(f"stopped by {signal.Signals(stop).name} after update {self.done}")
        except Interrupted:
            raise
        except BaseException:
            # In the midst of an update's optimiser steps there is nothing to save: the last checkpoint stands.
            # Before the first update there is nothing to lose either.
            whole = self._whole and not self.weights.swapped
            if self.done and whole and self.processes.agreed and not saving and not self._saved():
                # An update that failed has moved it; it will be done again.
                self.method.load(self._method_before, self.method.tensors())
                try:
                    # The one before stays too: of a run that diverged, this one may already be spoilt.
                    self.save(least=2)
                except (OSError, RuntimeError, SafetensorError) as error:
                    # The first error is the one to report.
                    if self.processes.main:
                        print(f"\nupdate {self.done} cannot be saved: {one_line(error)}", file=sys.stderr)
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _show(self, reporter: Reporter, shown: Collection[str] = ()) -> None:
        """The sample grid and the evaluation that are due after this update, but for those that were `shown` before."""
        config, done = self.config, self.done
        if config.sample_every and (done % config.sample_every == 0 or done == 1) and "samples" not in shown:
            with self.weights.averaged():
                self._tell(lambda: reporter.samples(done))
        # The report measures the last one.
        last = done == config.updates and config.report
        if config.eval_every and done % config.eval_every == 0 and not last and "evaluation" not in shown:
            with self.weights.averaged():
                self._tell(lambda: reporter.evaluation(done))

    def _tell(self, report: Callable[[], None], calls: bool = True) -> None:
        """Calls the reporter. An error on one process, such as a full disk of the one that writes, is one of all.

        calls: whether the report calls the network.
        """
        error = None
        try:
            report()
        except Exception as caught:
            if calls and self.weights.sharded:
                # The others may wait for this one inside a block.
                raise
            error = caught
        self.processes.agree(error)

    def _saved(self) -> bool:
        """Whether the last update has a checkpoint. The first process looks: the others might see its folder too late."""
        found = self.processes.main and self.run / f"checkpoint-{self.done}" in checkpoint.checkpoints(self.run)
        return self.processes.gather(found)[0]

    def _stopped(self) -> int:
        """The signal that any process has had, or 0: all are to stop after the same update."""
        return max(self.processes.gather(self._stop or 0))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # A launcher repeats SIGTERM, and of a closed connection both the shell and the system tell.
        if self._stop and signal.Signals(number).name not in ("SIGTERM", "SIGHUP"):
            raise KeyboardInterrupt
        self._stop = number
        # The terminal may be gone, or be written to at this moment.
        with suppress(OSError, RuntimeError):
            print("\nstopping after this update and saving; Ctrl-C to stop at once", file=sys.stderr)


def summarise(name: str, values: list[float]) -> float:
    """One figure of an update from those of its prompts: the largest of `MAXIMA`, else the mean."""
    return max(values) if name in MAXIMA else math.fsum(values) / len(values)


def _extend(figures: Figures, more: Mapping[str, Sequence[float]]) -> None:
    for name, values in more.items():
        figures.setdefault(name, []).extend(values)
