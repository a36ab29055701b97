"""The training loop: rollout, rewards, objective, replay, optimiser step."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, reduce
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..backbones.base import Backbone
from ..evaluation.features import Features
from ..lora import adapter as lora
from ..methods import gardo
from ..methods.base import Planner
from ..processes import like, whole
from ..prompts.lists import PromptList, as_list, prompt_index
from ..rewards import Scorer
from ..settings.config import TrainConfig
from ..settings.errors import ConfigError
from . import checkpoint
from .progress import Reporter
from .prompt_batch import Clock, Group

#: Figures of the last optimiser step of an update alone: in the first one every ratio is 1 by construction.
LAST_ONLY = ("ratio_mean", "ratio_max", "clip_fraction")


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the run was saved. Exit code 130."""


class OtherProcessFailed(RuntimeError):
    """Another process has an error; this one stops with it."""


class Trainer:
    """Trains a LoRA on a backbone's transformer, on one process or several.

    With W processes an update has W * prompts_per_update prompts, each process its own ones with its own noise; the branch
    steps are the same on all, and gradients are averaged. It equals one process with all the prompts.

    Args:
        config: settings. run: the run's folder. backbone: the frozen model; the trainer adds an adapter to it.
        scorers: the rewards, in the order of `config.reward`. prompts: for training, texts alone or with metadata.
        accelerator: of this process; by default one for the backbone's device alone.
        auxiliary, features: for GARDO: the scorers of `config.auxiliary`, and what the rarity of a picture is measured on.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        backbone: Backbone,
        scorers: Sequence[Scorer],
        prompts: Sequence[str] | PromptList,
        accelerator: Accelerator | None = None,
        auxiliary: Sequence[Scorer] = (),
        features: Features | None = None,
    ):
        self.config, self.run, self.backbone = config, run, backbone
        self.accelerator = accelerator or Accelerator(cpu=backbone.device.type == "cpu")
        self.scorers, listed = list(scorers), as_list(prompts)
        self.prompts, self.metadata = listed.texts, listed.metadata
        self.sigmas = backbone.sigmas(config.rollout_steps, *config.resolution)
        self.latent_shape = backbone.latent_shape(*config.resolution)
        self.planner = Planner(config, self.sigmas)
        #: Whether a KL penalty has a reference of its own in place of the pretrained model, which moves, and holds some
        #: samples only.
        self.gate = gardo.Gate() if config.method == "gardo" else None
        self._gate_before: dict[str, Any] = {}
        self.auxiliary, self.features = list(auxiliary), features if self.gate else None
        torch.manual_seed(config.seed)
        lora.attach(backbone.transformer, backbone.adapter(config.lora_targets, config.lora_rank, config.lora_alpha))
        if config.gradient_checkpointing:
            backbone.transformer.enable_gradient_checkpointing()
        if config.compile:
            # Block by block: they are alike, one is compiled for all. Batches vary in size.
            for module in backbone.transformer.modules():
                if type(module).__name__ in backbone.transformer._no_split_modules:
                    module.compile(dynamic=True)
            # One per kind of block, with and without gradient and adapter: more than torch's default of 8.
            torch._dynamo.config.recompile_limit = 64
        self.lora = {n: p for n, p in backbone.transformer.named_parameters() if p.requires_grad}
        if config.init_lora:
            lora.start(self.lora, config.lora_alpha / config.lora_rank, config.init_lora)
        self.optimizer = torch.optim.AdamW(
            self.lora.values(),
            lr=config.learning_rate,
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
        )
        if self.accelerator.is_fsdp2:
            # In place: the transformer keeps its class's methods, its parameters become shards.
            backbone.transformer, self.optimizer = self.accelerator.prepare(backbone.transformer, self.optimizer)
            self.lora = {n: p for n, p in backbone.transformer.named_parameters() if p.requires_grad}
        # With FSDP2 the transformer was elsewhere until now.
        self.device = backbone.device
        self.ema = {name: value.detach().clone() for name, value in self.lora.items()}
        self.held = {name: value.detach().clone() for name, value in self.lora.items()} if self.gate else {}
        #: Most parents in one network call of the replay; see `_replay`.
        self.replay_batch = config.replay_batch
        self.done = 0
        self._whole = True
        #: Whether all processes know of the error that ends the run, so that they can save together.
        self._agreed = self.accelerator.num_processes == 1
        self._stop: int | None = None

    # -- several processes ---------------------------------------------------------------------------------------

    @property
    def sharded(self) -> bool:
        """Whether the transformer's parameters are shards (FSDP2); every process must then make the same network calls."""
        return isinstance(next(iter(self.lora.values())), DTensor)

    def _average_gradients(self) -> None:
        """One gradient for all processes. FSDP2 does that in its backward pass."""
        if self.accelerator.num_processes > 1 and not self.sharded:
            for parameter in self.lora.values():
                parameter.grad = reduce(parameter.grad, "mean")

    def _agree(self, error: Exception | None) -> None:
        """Raises on all processes if one has an error: the others would wait for it for ever in the next collective."""
        if self.accelerator.num_processes > 1:
            texts = gather_object([None if error is None else f"{type(error).__name__}: {error}"])
            failed = [f"process {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
            self._agreed = bool(failed)
            if failed and error is None:
                raise OtherProcessFailed("; ".join(failed))
        if error is not None:
            raise error

    def _anywhere(self, value: bool) -> bool:
        """Whether something is so on any process."""
        return any(gather_object([value])) if self.accelerator.num_processes > 1 else value

    def _full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors from shards, for the main process to write: on the CPU, one after another. Empty on the others."""
        found = {}
        for name, value in tensors.items():
            full = whole(value)
            if self.accelerator.is_main_process:
                found[name] = full.cpu() if self.sharded else full
        return found

    # -- state ---------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Writes a checkpoint of the updates done so far: the same files whatever the number of processes."""
        lora, ema, held = self._full(self.lora), self._full(self.ema), self._full(self.held)
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {key: self._full(values) for key, values in optimizer["state"].items()}
        path = self.run / f"checkpoint-{self.done}"
        if self.accelerator.is_main_process:
            about = {
                "seed": self.config.seed,
                "lora_rank": self.config.lora_rank,
                "processes": self.accelerator.num_processes,
            }
            if self.gate:
                about["gate"] = self.gate.state()
            checkpoint.save(self.run, self.done, lora, ema, optimizer, about, self.config.checkpoints_kept, held)
        self.accelerator.wait_for_everyone()
        return path

    def resume(self, path: Path) -> None:
        """Continues from a checkpoint. Raises ConfigError if it is of another model, rank or seed."""
        weights, ema, optimizer, state = checkpoint.load(path)
        for name, parameter in self.lora.items():
            if name not in weights or weights[name].shape != parameter.shape or len(weights) != len(self.lora):
                raise ConfigError(f"checkpoint {path} is of another model or LoRA rank (at {name})")
        if state["seed"] != self.config.seed:
            raise ConfigError(f"checkpoint {path} has seed {state['seed']}, the settings say {self.config.seed}")
        processes = self.accelerator.num_processes
        if state.get("processes", 1) != processes:
            raise ConfigError(
                f"checkpoint {path} is of {state.get('processes', 1)} processes, here are {processes}: the prompts would "
                "come in another order; start as many, or begin a new run with --init-lora"
            )
        with torch.no_grad():
            for name, parameter in self.lora.items():
                parameter.copy_(like(weights[name], parameter))
                self.ema[name].copy_(like(ema[name], parameter))
        for key, parameter in enumerate(self.lora.values()):
            values = optimizer["state"].get(key, {})
            optimizer["state"][key] = {n: like(v, parameter) if v.dim() else v for n, v in values.items()}
        self.optimizer.load_state_dict(optimizer)
        if self.gate:
            held = checkpoint.load_held(path)
            if "gate" not in state or held is None:
                raise ConfigError(f"checkpoint {path} has no reference of GARDO: it is of another method")
            self.gate.load(state["gate"])
            for name, value in self.held.items():
                value.copy_(like(held[name], value))
        self.done = state["update"]

    def averaged(self) -> AbstractContextManager[None]:
        """The transformer with the averaged (EMA) weights, for evaluation and export."""
        return self._with(self.ema)

    @contextmanager
    def _with(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        kept = {name: value.detach().clone() for name, value in self.lora.items()}
        with torch.no_grad():
            for name, parameter in self.lora.items():
                parameter.copy_(weights[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.lora.items():
                    parameter.copy_(kept[name])

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The transformer with the adapter off: the pretrained model."""
        self.backbone.transformer.disable_adapters()
        try:
            yield
        finally:
            self.backbone.transformer.enable_adapters()

    def kl_reference(self) -> AbstractContextManager[None]:
        """The transformer that the KL penalty and the anchor compare with: the pretrained one, GARDO's copy with gardo."""
        return self._with(self.held) if self.gate else self.reference()

    # -- one update ----------------------------------------------------------------------------------------------

    def learning_rate(self, update: int) -> float:
        """Cosine from the peak to lr_min_ratio of it, per update."""
        low = self.config.lr_min_ratio
        return self.config.learning_rate * (
            low + (1 - low) * 0.5 * (1 + math.cos(math.pi * update / self.config.updates))
        )

    def update(self) -> dict[str, Any]:
        """One rollout of all prompts and `inner_updates` optimiser steps. Returns what goes into metrics.jsonl."""
        config, u = self.config, self.done
        clock = Clock(self.device)
        start = time.perf_counter()
        plan = self.planner.plan(u)
        if self.gate:
            self._gate_before = self.gate.state()
        if self.gate and self.gate.renew():
            for name, value in self.held.items():
                value.copy_(self.lora[name].detach())
        count = config.prompts_per_update
        first = self.accelerator.process_index * count
        total = self.accelerator.num_processes * count
        slots = [
            (slot, self.prompts[prompt_index(u * total + slot, len(self.prompts), config.seed)])
            for slot in range(first, first + count)
        ]
        groups: list[Group] = []
        error: Exception | None = None
        for start_slot in range(0, count, config.prompts_per_batch):
            chosen = slots[start_slot : start_slot + config.prompts_per_batch]
            try:
                groups.append(Group(self, clock, plan, u, chosen))
            except Exception as caught:
                if self.sharded and isinstance(caught, torch.OutOfMemoryError):
                    # The others wait for this one inside a block: the launcher has to end them.
                    raise
                error = caught
            if self.sharded:
                # The next group's network calls need all processes.
                self._agree(error)
            elif error is not None:
                break
        self._agree(error)
        figures: defaultdict[str, list[float]] = defaultdict(list)
        for group in groups:
            for name, values in group.figures.items():
                figures[name] += values
        if self.gate:
            figures["gated"] += self._choose(self.gate, groups)
        for group_of_optimizer in self.optimizer.param_groups:
            group_of_optimizer["lr"] = self.learning_rate(u)
        for inner in range(config.inner_updates):
            for name, values in self._replay(groups, inner).items():
                if inner + 1 == config.inner_updates or name not in LAST_ONLY:
                    figures[name] += values
            self._average_gradients()
            norm = whole(torch.nn.utils.clip_grad_norm_(self.lora.values(), config.max_grad_norm))
            if not torch.isfinite(norm):
                # The norm is that of all processes' gradient.
                self._agreed = True
                raise ValueError(f"the gradient of update {u + 1} is {norm.item()}")
            figures["grad_norm"].append(norm.item())
            self._whole = False
            self.optimizer.step()
        self.done += 1
        if self.done % config.ema_every == 0:
            with torch.no_grad():
                for name, parameter in self.lora.items():
                    self.ema[name].lerp_(parameter, 1 - config.ema_decay)
        self._whole = True
        for group in groups:
            for name, values in group.evaluations().items():
                figures[name] += values
        everyone = gather_object([dict(figures)]) if self.accelerator.num_processes > 1 else [figures]
        merged = {name: [value for part in everyone for value in part[name]] for name in figures}
        if self.gate:
            self.gate.kl = summarise("kl_reference", merged["kl_reference"])
            self._gate_before = self.gate.state()
        seconds = time.perf_counter() - start
        return {
            "update": self.done,
            # A branch at step 1 is several seeds.
            "branch_steps": [*([1] if plan.roots > 1 and 1 not in plan.fanout else []), *plan.fanout],
            "beta": config.beta(u),
            "learning_rate": self.learning_rate(u),
            **{name: summarise(name, values) for name, values in merged.items()},
            "seconds": {**clock.seconds, "other": seconds - sum(clock.seconds.values()), "total": seconds},
        }

    def _choose(self, gate: gardo.Gate, groups: list[Group]) -> list[float]:
        """Tells every group which of its samples GARDO's gate holds; ranks are over all prompts of all processes."""
        proxy = torch.cat([group.proxy for group in groups]).numpy()
        auxiliary = [torch.cat([group.auxiliary[i] for group in groups]).numpy() for i in range(len(self.auxiliary))]
        everyone = gather_object([(proxy, auxiliary)]) if self.accelerator.num_processes > 1 else [(proxy, auxiliary)]
        held = gate.held(
            np.concatenate([part for part, _ in everyone]),
            [np.concatenate([part[i] for _, part in everyone]) for i in range(len(self.auxiliary))],
        )
        first = sum(len(part) for part, _ in everyone[: self.accelerator.process_index])
        for group in groups:
            group.gate = torch.from_numpy(held[first : first + len(group.proxy)])
            group.gated = int(held.sum())
            first += len(group.proxy)
        return [float(held.mean())]

    def _replay(self, groups: list[Group], inner: int) -> dict[str, list[float]]:
        """The gradient of all groups. Out of memory, on any process, it is begun again with half the batch on all.

        With a sharded transformer the other processes are already waiting in a collective: there it is an error.
        """
        while True:
            self.optimizer.zero_grad()
            figures: defaultdict[str, list[float]] = defaultdict(list)
            full = False
            try:
                for group in groups:
                    for name, values in group.backward(inner).items():
                        figures[name] += values
            except torch.OutOfMemoryError:
                if self.sharded:
                    raise
                full = True
            if not self._anywhere(full):
                return figures
            parents = max(group.parents for group in groups)
            least = max(group.count for group in groups)
            before = min(self.replay_batch or parents, parents)
            if before <= least:
                self._agreed = True
                raise RuntimeError(
                    f"out of memory in the replay, even with {before} latents at a time: try --gradient-checkpointing, "
                    "fewer --prompts-per-batch or a smaller --resolution"
                )
            self.replay_batch = max(before // 2, least)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if self.accelerator.is_main_process:
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
            Interrupted: after SIGINT or SIGTERM, saved.
        """
        config = self.config
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.done < config.updates:
                metrics = self.update()
                reporter.update(metrics)
                stop = self._stopped()
                if config.sample_every and not stop and (self.done % config.sample_every == 0 or self.done == 1):
                    with self.averaged():
                        reporter.samples(self.done)
                # The report measures the last one.
                last = self.done == config.updates and config.report
                if config.eval_every and self.done % config.eval_every == 0 and not last and not stop:
                    with self.averaged():
                        reporter.evaluation(self.done)
                stop = self._stopped()
                due = config.checkpoint_every and self.done % config.checkpoint_every == 0
                if due or self.done == config.updates or stop:
                    self.save()
                if stop:
                    raise Interrupted(f"stopped by {signal.Signals(stop).name} after update {self.done}")
        except Interrupted:
            raise
        except BaseException:
            # In the midst of an update's optimiser steps there is nothing to save: the last checkpoint stands.
            saved = self.run / f"checkpoint-{self.done}" in checkpoint.checkpoints(self.run)
            if self._whole and self._agreed and not saved:
                if self.gate and self._gate_before:
                    # An update that failed has moved it; it will be done again.
                    self.gate.load(self._gate_before)
                self.save()
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _stopped(self) -> int:
        """The signal that any process has had, or 0: all are to stop after the same update."""
        if self.accelerator.num_processes == 1:
            return self._stop or 0
        return max(gather_object([self._stop or 0]))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # A launcher repeats SIGTERM.
        if self._stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop = number
        print("\nstopping after this update and saving; Ctrl-C to stop at once", file=sys.stderr)


def summarise(name: str, values: list[float]) -> float:
    """One figure of an update from those of its prompts: the largest of a maximum or an error, else the mean."""
    return max(values) if name.endswith(("_max", "_error")) else math.fsum(values) / len(values)
