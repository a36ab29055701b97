"""Measures how much of a gradient is signal, and how much of that is contrast.

Takes the flags of `python -m tmpo_trainer`. It computes the gradients of `--updates` independent updates at the base
model (the weights never move; `--prompts-per-update` is the batch) and prints, for the gradient with respect to lora_B
(lora_A has none while lora_B is 0):

- noise: the trace of Cov g; signal to noise: |E g|^2 over it, unbiased, from pairs of updates; and the same after dividing each
  coordinate by its root mean square, which is what Adam sees;
- contrast: the cosine between the signal and the gradient of the latents' standard deviation in deterministic sampling.
  Near 1, training mostly makes pictures harsher;
- for methods on noised leaves, how both are distributed over the noise levels (`--noise-weight` weighs the levels).

docs/demo-settings.md has figures and what follows from them.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tmpo_trainer import tree
from tmpo_trainer.commands import loading
from tmpo_trainer.commands.flags import configure, parse
from tmpo_trainer.methods.noised import NoisedMethod
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.training.loop import Trainer

#: For the gradient of the latents' standard deviation: Euler steps, batches, prompts and pictures each.
STEPS, BATCHES, PROMPTS, IMAGES = 20, 6, 7, 8

#: Equal intervals of noise levels.
LEVELS = 5


class ByLevel:
    """The gradients of a method on noised leaves by noise level: it replays once for each interval of levels.

    Attributes:
        gradients: `[LEVELS, D]` for each update so far; without an anchor on data their sum over the levels is its gradient.
        seconds: what all replays but one took so far.
    """

    def __init__(self, method: NoisedMethod, parameters: list[Tensor]):
        self.gradients: list[Tensor] = []
        self.seconds = 0.0
        self.level, self.parameters = 0, parameters
        row_loss, backward = method.row_loss, method.backward

        def masked(batch: Any, part: Any, velocity: Tensor) -> Tensor:
            inside = (part.t * LEVELS).long().clamp_max(LEVELS - 1) == self.level
            return row_loss(batch, part, velocity) * inside

        def by_level(batch: Any, network: Any, inner: int) -> Any:
            found = {}
            for self.level in range(LEVELS):
                before, start = self.whole(), time.perf_counter()
                found = backward(batch, network, inner)
                self.seconds += (self.level > 0) * (time.perf_counter() - start)
                self.gradients[-1][self.level] += self.whole() - before
            return found

        method.row_loss, method.backward = masked, by_level

    def begin(self) -> None:
        """Called before every update."""
        self.gradients.append(torch.zeros(LEVELS, sum(p.numel() for p in self.parameters)))

    def whole(self) -> Tensor:
        """`[D]`"""
        return torch.cat(
            [(p.new_zeros(p.shape) if p.grad is None else p.grad).flatten() for p in self.parameters]
        ).cpu()

    def rows(self) -> list[str]:
        """Lines of text: each interval's share of the signal (with what it shares with others) and of the noise, and its own
        signal to noise."""
        signal, noise = moments(torch.stack(self.gradients))
        lines = []
        for level in range(LEVELS):
            share, loud = signal[level].sum() / signal.sum(), noise[level].sum() / noise.sum()
            where, own = (
                f"{level / LEVELS:.1f} to {(level + 1) / LEVELS:.1f}",
                signal[level, level] / noise[level, level],
            )
            lines.append(f"noise levels {where}: {share:.0%} of the signal, {loud:.0%} of the noise, alone {own:+.4f}")
        return lines


def moments(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Products of the mean gradients of every two parts, unbiased, and the covariances of one update, summed over D.

    `[U, parts, D]` -> `[parts, parts]` each, in float64.
    """
    g, count = gradients.double(), len(gradients)
    products = torch.einsum("ubd,ucd->bc", g, g)
    signal = (g.sum(0) @ g.sum(0).T - products) / (count * (count - 1))
    return signal, products / count - signal


def signal_to_noise(gradients: Tensor) -> tuple[float, float]:
    """Squared norm of the mean gradient, unbiased, and its ratio to the noise of one update. `[U, D]`."""
    signal, noise = moments(gradients[:, None])
    return signal.item(), (signal / noise).item()


def contrast_gradient(trainer: Trainer, parameters: list[Tensor]) -> Tensor:
    """Gradient of the standard deviation of the final latents, by backpropagation through the sampler. `[D]`."""
    sigmas = trainer.backbone.sigmas(STEPS, *trainer.config.resolution).tolist()
    total = torch.zeros(sum(p.numel() for p in parameters))
    for batch in range(BATCHES):
        prompts = [trainer.prompts[(batch * PROMPTS + i) * 7 % len(trainer.prompts)] for i in range(PROMPTS)]
        velocity = trainer.backbone.velocity(prompts, trainer.config.guidance)
        noise = tree.keyed_noise((trainer.config.seed, "contrast", batch), trainer.roller.latent_shape)
        x = torch.stack([noise(0, (row,)) for row in range(PROMPTS * IMAGES)]).to(trainer.device)
        for sigma, sigma_next in itertools.pairwise(sigmas):

            def step(x: Tensor, sigma: float = sigma, sigma_next: float = sigma_next, velocity=velocity) -> Tensor:
                return x + (sigma_next - sigma) * velocity(x, x.new_full((len(x),), sigma))

            x = checkpoint(step, x, use_reentrant=False)
        parts = torch.autograd.grad(x.std(), parameters)
        total += torch.cat([part.flatten() for part in parts]).cpu()
    return total / BATCHES


def main(arguments: list[str]) -> int:
    actions, flags = parse(arguments)
    if flags.get("method") == "gardo":
        raise ConfigError(
            "gradient-signal leaves out the KL penalty, without which there is no gardo: choose another method"
        )
    flags = {
        "updates": "32",
        **flags,
        "learning_rate": "0",
        "beta_warmup": "0",
        "max_grad_norm": "1e9",
        "kl_weight": "0",
    }
    config, preset = configure(actions, flags, None)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = loading.choose_device(config.device)
    backbone = loading.load_model(config, device)
    scorers = loading.scorers(config, device)
    features = loading.features(config, device) if config.needs_features else None
    prompts = loading.train_prompts(config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder), backbone, scorers, prompts, features=features)
        parameters = [value for name, value in trainer.weights.lora.items() if ".lora_B." in name]
        rows, rewards, seconds = [], [], []
        by_level = ByLevel(trainer.method, parameters) if isinstance(trainer.method, NoisedMethod) else None
        for _ in range(config.updates):
            if by_level:
                by_level.begin()
            line = trainer.update()
            rows.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).cpu())
            rewards.append(line[f"reward/{config.reward[0]}"])
            seconds.append(line["seconds"]["total"])
        if by_level:
            seconds.append(-by_level.seconds)
    gradients = torch.stack(rows)
    signal, ratio = signal_to_noise(gradients)
    _, as_adam = signal_to_noise(gradients / gradients.square().mean(0).sqrt().clamp_min(1e-12))
    contrast = contrast_gradient(trainer, parameters)
    # The loss falls along -g.
    cosine = -(gradients.mean(0) @ contrast).item() / (max(signal, 1e-30) ** 0.5 * contrast.norm().item())
    print(f"preset {preset}, {config.updates} updates, seed {config.seed}, {sum(seconds) / config.updates:.2f} s each")
    print(f"reward in the rollouts {sum(rewards) / len(rewards):.3f}")
    print(f"signal to noise per update {ratio:+.4f}, as Adam sees it {as_adam:+.4f}, noise {signal / ratio:.3g}")
    if by_level:
        print(*by_level.rows(), sep="\n")
    print(f"contrast: cosine of the signal with the gradient of the latents' standard deviation {cosine:+.2f}")
    return 0
