"""What is compared: the trainer with some settings, the bare network calls that it makes, and the per-leaf implementation.

Each arm has its own adapter and optimiser on the same frozen weights. An update of an arm is `run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tmpo_trainer import flow
from tmpo_trainer.commands import loading
from tmpo_trainer.methods.base import Figures
from tmpo_trainer.methods.batch import Network, PromptBatch
from tmpo_trainer.rewards import Parked
from tmpo_trainer.rewards.parts.clip import ClipScorer, ClipTowers
from tmpo_trainer.settings.config import TrainConfig
from tmpo_trainer.settings.presets import make_config, preset
from tmpo_trainer.training import memory
from tmpo_trainer.training.loop import Trainer
from tmpo_trainer.tree import TreePlan

from . import models, per_leaf
from .measuring import Calls, Phases
from .scoring import Thumbnail

#: Not clipped, so that the gradient can be compared with the per-leaf implementation's.
UNCLIPPED = {"max_grad_norm": 1e9}
#: Branch steps of six, of the paper's curriculum at its start and at its end.
POSITIONS = {"early": (1, 2, 3), "late": (1, 3, 5)}
#: The other methods, without a KL penalty where they do not need one.
RIVALS: dict[str, dict[str, Any]] = {
    "flow-grpo": {},
    "mix-grpo": {},
    "tree-grpo": {},
    "gardo": {"auxiliary": ("sharpness",), "kl_weight": 0.1},
}
PROTOCOL: dict[str, Any] = {
    "rollout_steps": 6, "branching": 3, "schedule": "fixed", "report": False, "sample_every": 0,
}  # fmt: skip


def configure(kind: str, size: str, presets: list[str], flags: dict[str, Any], **own: Any) -> TrainConfig:
    """The settings of an arm: the protocol, presets, what the model needs, flags, the arm's own. Raises ConfigError."""
    layers = [("the benchmark", PROTOCOL), *((f"preset {name}", preset(name)) for name in presets)]
    needed = models.settings(kind, size) | UNCLIPPED
    return make_config([*layers, ("the model", needed), ("flags", flags), ("the arm", own)])


def positions(model: models.Model, config: TrainConfig, name: str) -> dict[str, Any]:
    """Settings that branch at the positions of this name, or at the nearest steps that may carry noise in this model."""
    last = flow.last_stochastic_step(model.backbone.sigmas(config.rollout_steps, *config.resolution))
    steps = tuple(min(step, last - behind) for step, behind in zip(POSITIONS[name], (2, 1, 0), strict=True))
    return {"branch_early": steps, "branch_late": steps}


class Arm(Protocol):
    """forwards, backwards: network evaluations of the last update per prompt, in latents; those of `backwards` are forward and
    backward passes."""

    name: str
    forwards: float
    backwards: float

    def run(self) -> dict[str, float]:
        """One update. Returns seconds by phase."""
        ...


class TrainerArm:
    """The trainer. folder: for its run, which writes nothing."""

    def __init__(self, name: str, model: models.Model, config: TrainConfig, folder: Path):
        self.name, self.model, self.config = name, model, config
        backbone = models.share(model.backbone)
        device = backbone.device
        backbone.split_guidance = config.split_guidance
        self.scorers = loading.scorers(config, device)
        extra = loading.scorers(config, device, config.extra_rewards)
        self.trainer = Trainer(config, folder, backbone, self.scorers, model.prompts, extra=extra, features=Thumbnail())
        self.phases = phases = Phases(device)
        phases.watch(self.trainer.roller, "roll_out", "rollout")
        phases.watch(backbone, "decode", "decode")
        for scorer in (*self.scorers, *extra):
            phases.watch(scorer, "score", "reward")
        phases.watch(self.trainer.method, "backward", "replay")
        #: Those of the last update, by prompt.
        self.rewards: list[Tensor] = []
        backward = self.trainer.method.backward

        def keeping(batch: PromptBatch, network: Network, inner: int) -> Figures:
            self.rewards += batch.rewards
            return backward(batch, network, inner)

        self.trainer.method.backward = keeping
        phases.watch(self.trainer.optimizer, "step", "optimiser")
        self.forwards = self.backwards = 0.0

    def run(self) -> dict[str, float]:
        self.rewards.clear()
        with self.phases.whole():
            line = self.trainer.update()
        evaluated = {name: n for name, n in line.items() if name.startswith("evaluations/")}
        # With graphs kept, the forward passes are in the rollout.
        kept = evaluated.pop("evaluations/backward", 0.0)
        self.backwards = evaluated.pop("evaluations/replay", 0.0) + kept
        self.forwards = sum(evaluated.values()) - kept
        seconds = dict(self.phases.seconds)
        # What the trainer waits for scorers in other threads.
        waited = max(line["seconds"].get("reward", 0.0) - seconds.get("reward", 0.0), 0.0)
        return seconds | {"reward": seconds.get("reward", 0.0) + waited, "other": seconds["other"] - waited}

    @property
    def plan(self) -> TreePlan:
        return self.trainer.method.shape(0)

    def gradient(self) -> list[Tensor]:
        """That of the last update."""
        return [p.grad.clone() for p in self.trainer.weights.lora.values() if p.grad is not None]

    def towers(self) -> list[ClipTowers]:
        """Those of the scorers that have any."""
        plain = [scorer.scorer if isinstance(scorer, Parked) else scorer for scorer in self.scorers]
        return [scorer.towers for scorer in plain if isinstance(scorer, ClipScorer)]

    def scorer_bytes(self) -> int:
        """Of the weights that stay on the device."""
        return 0 if self.config.offload_scorers else sum(memory.weight_bytes(towers.model) for towers in self.towers())


class FloorArm:
    """The bare calls of a trainer's network, decoder and scorer, with the same batches on prepared inputs.

    The network's are forward passes, or forward and backward passes from a prepared gradient of its output.
    """

    def __init__(self, name: str, arm: TrainerArm):
        self.name, self._arm = name, arm
        backbone = arm.trainer.backbone
        self._network, self._decoder = Calls(backbone.transformer), Calls(backbone.vae.decoder)
        self._towers = arm.towers()
        self._scorers = [Calls(towers.model.vision_model) for towers in self._towers]
        self._phases = Phases(backbone.device)

    def record(self) -> None:
        """An update of the trainer, whose calls are kept."""
        with ExitStack() as stack:
            for calls in (self._network, self._decoder, *self._scorers):
                stack.enter_context(calls.recording())
            self._arm.run()
        self.forwards, self.backwards = self._arm.forwards, self._arm.backwards

    def run(self) -> dict[str, float]:
        phases = self._phases
        self._arm.trainer.optimizer.zero_grad()
        for towers in self._towers:
            # With --offload-scorers they are elsewhere.
            towers.to(self._arm.trainer.device)
        with phases.whole():
            with phases("rollout"):
                self._network.again(gradient=False)
            with phases("decode"):
                self._decoder.again(gradient=False)
            with phases("reward"):
                for calls in self._scorers:
                    calls.again(gradient=False)
            with phases("replay"):
                self._network.again(gradient=True)
        for towers in self._towers:
            towers.to(torch.device("cpu") if self._arm.config.offload_scorers else self._arm.trainer.device)
        return dict(phases.seconds)


class PerLeafArm:
    """The implementation without sharing, on a trainer of its own."""

    def __init__(self, name: str, arm: TrainerArm):
        self.name, self._arm = name, arm
        self._own = per_leaf.PerLeaf(arm.trainer)
        # The trainer's own methods are not called, and the parts of an update are phases of `per_leaf`.
        self._phases = Phases(arm.trainer.device)
        self._update = 0
        self.forwards = self.backwards = 0.0

    def run(self, rewards: Sequence[Tensor] | None = None) -> dict[str, float]:
        """One update. rewards: see `PerLeaf.gradient`."""
        with self._phases.whole():
            self._own.update(self._update, self._phases, rewards)
        self._update += 1
        prompts = self._arm.config.prompts_per_update
        self.forwards, self.backwards = self._own.forwards / prompts, self._own.backwards / prompts
        return dict(self._phases.seconds)

    def gradient(self) -> list[Tensor]:
        """That of the last update."""
        return self._arm.gradient()


def measured_memory(arm: TrainerArm) -> dict[str, dict[str, float]]:
    """Predicted and measured peak bytes of rollout, decoding, replay and all of them; call it after an update.

    On a GPU they are all of the process's, and the scorer's weights are added to the prediction. On a CPU they are what is
    beyond the weights, the optimiser's state and the averaged weights; the gradient belongs to it.
    """
    trainer, config = arm.trainer, arm.config
    skeleton = arm.model.skeleton(config)
    predicted = memory.estimate(skeleton, arm.model.folder, config, trainer.method, [arm.plan], trainer.device)
    lora = sum(p.numel() * p.element_size() for p in trainer.weights.lora.values())
    if trainer.device.type == "cuda":
        arm.run()
        more = arm.scorer_bytes()
        left_out: tuple[str, ...] = ()
    else:
        with memory.Peak() as peak:
            for module in (trainer.backbone.transformer, trainer.backbone.vae):
                peak.ignore(module)
            for towers in arm.towers():
                peak.ignore(towers.model)
            moments = [v for state in trainer.optimizer.state.values() for v in state.values()]
            peak.ignore_tensors([*moments, *trainer.weights.ema.values()])
            arm.phases.peak = peak
            arm.run()
            arm.phases.peak = None
        more, left_out = lora, ("transformer", "VAE", "LoRA, optimiser, average", "text encoders")
    found = {}
    for phase, title in (("rollout", "rollout"), ("decode", "decoding"), ("replay", "replay")):
        (parts,) = (parts for name, parts in predicted.items() if name.startswith(title))
        expected = sum(size for part, size in parts.items() if part not in left_out) + more
        measured = arm.phases.bytes[phase]
        beyond = measured - arm.phases.at_start[phase]
        found[phase] = {
            "predicted": expected, "measured": measured, "ratio": expected / measured, "beyond its start": beyond,
        }  # fmt: skip
    most = {key: max(own[key] for own in found.values()) for key in ("predicted", "measured")}
    return found | {"most": most | {"ratio": most["predicted"] / most["measured"]}}


def network_call(model: models.Model, config: TrainConfig) -> Any:
    """A function that makes one network call for one latent without gradient."""
    velocity = model.backbone.velocity(model.prompts.texts[:1], config.guidance)
    x = torch.randn(1, *model.backbone.latent_shape(*config.resolution), device=model.backbone.device)
    sigma = torch.full((1,), 0.5, device=model.backbone.device)

    def call() -> None:
        with torch.no_grad():
            velocity(x, sigma)

    return call
