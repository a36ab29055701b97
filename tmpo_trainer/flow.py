"""Rectified-flow transition kernels and their log-probabilities, as pure functions on tensors.

Notation: x = (1 - sigma) x0 + sigma x1 with data x0 and noise x1; velocity v = x1 - x0; sigmas run from 1 down to 0.
Means and log-probabilities are float32 (or float64 for float64 input) whatever dtype the network runs in: the
log-probabilities of sibling paths differ by about .003, which bfloat16 does not resolve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Kernel = Literal["ode", "cps", "flow_sde", "dance"]
#: Kernels whose drift corrects for their noise by the score, which they compute from the velocity. `cps` needs no score.
SCORE_KERNELS: tuple[Kernel, ...] = ("flow_sde", "dance")
Reduce = Literal["mean", "sum"]
#: How a deterministic step is taken, see `ab2`.
Solver = Literal["euler", "ab2"]

#: A stochastic step must end at this sigma or above. Below, the std vanishes and the gradient of that one edge, which
#: grows as 1 / std^2, outweighs all others (about 150 times for the last step but one of SD3.5 at 6 steps).
MIN_STOCHASTIC_SIGMA = 0.05


def working_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for anything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def per_row(value: float | Tensor, x: Tensor) -> Tensor:
    """A number, or one number per row `[N]`, shaped to broadcast over `x [N, ...latent]`, in the working dtype."""
    if not isinstance(value, Tensor):
        # Filled on the device: a number copied to a GPU would be waited for.
        return torch.full([1] * x.dim(), value, dtype=working_dtype(x), device=x.device)
    value = value.to(x.device, working_dtype(x))
    return value.reshape(-1, *[1] * (x.dim() - 1))


def predict_data(x: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """x0_hat = x - sigma v: the clean latent that the velocity points to. Same shape as `x`."""
    dtype = working_dtype(x)
    return x.to(dtype) - per_row(sigma, x) * velocity.to(dtype)


def transition(
    kernel: Kernel,
    x: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    eta: float,
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the Gaussian step sigma -> sigma_next.

    Args:
        kernel: `ode` (plain Euler, std 0), `cps` (coefficient-preserving sampling, arXiv:2509.05952, the paper's
            choice), `flow_sde` (Flow-GRPO's, paper eq. 38-40) or `dance` (DanceGRPO's constant noise level).
        x, velocity: `[N, ...latent]`.
        sigma, sigma_next: numbers, or one per row `[N]`, with 1 >= sigma > sigma_next >= 0.
        eta: noise level, >= 0. For `cps` at most 1: the angle is eta * pi / 2.

    Returns:
        mean `[N, ...latent]` and std `[1 or N, 1, ...]` (it broadcasts over `x`), float32 or float64.

    Raises:
        ValueError: unknown kernel.
    """
    dtype = working_dtype(x)
    x, velocity = x.to(dtype), velocity.to(dtype)
    s, s_next = per_row(sigma, x), per_row(sigma_next, x)
    delta = s - s_next
    if kernel == "ode":
        return x - delta * velocity, torch.zeros_like(s)
    noise = x + (1 - s) * velocity
    if kernel == "cps":
        phi = eta * math.pi / 2
        data = x - s * velocity
        return (1 - s_next) * data + s_next * math.cos(phi) * noise, s_next * math.sin(phi)
    if kernel == "flow_sde":
        # At sigma = 1 the level is infinite; like Flow-GRPO, use the next sigma there, in (1 - sigma) only.
        level = eta * torch.sqrt(s / (1 - torch.where(s >= 1, s_next, s)))
    elif kernel == "dance":
        level = torch.full_like(s, eta)
    else:
        raise ValueError(f"unknown kernel {kernel!r}: one of {', '.join(get_args(Kernel))}")
    # Eq. 39 carries a sqrt(dt) that eq. 40 counts again; the SDE itself has level^2 dt once.
    return x - delta * velocity - delta * level**2 / (2 * s) * noise, level * torch.sqrt(delta)


def ab2(velocity: Tensor, previous: Tensor, sigmas: tuple[float, float, float]) -> Tensor:
    """The mean velocity of a step by the second-order Adams-Bashforth method with variable steps.

    It extrapolates linearly from the last two velocities to the middle of the step, so that an Euler step with the result
    has an error of third order, at no further network call.

    Args:
        velocity: at the beginning of the step, `[N, ...latent]`. previous: at the beginning of the step before it.
        sigmas: of the beginnings of the step before and of this one, and of the end of this one.
    """
    before, sigma, sigma_next = sigmas
    ratio = (sigma_next - sigma) / (sigma - before)
    return (1 + ratio / 2) * velocity - ratio / 2 * previous


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor | float, reduce: Reduce = "mean") -> Tensor:
    """Gaussian log-density of a step, per row: `[N]`.

    `mean` (paper eq. 48-49) averages over latent dimensions, `sum` adds them up. The two are different objectives:
    the factor 1/d does not cancel inside a softmax over paths.
    """
    dtype = working_dtype(mean)
    std = torch.as_tensor(std, dtype=dtype, device=mean.device)
    density = -((x_next.to(dtype) - mean.to(dtype)) ** 2) / (2 * std**2) - torch.log(std) - math.log(2 * math.pi) / 2
    density = density.expand(mean.shape).flatten(1)
    return density.mean(1) if reduce == "mean" else density.sum(1)


def last_stochastic_step(sigmas: Sequence[float] | Tensor) -> int:
    """The last 1-based step that may carry noise: it ends at sigma >= MIN_STOCHASTIC_SIGMA. 0 if there is none."""
    return sum(float(sigma) >= MIN_STOCHASTIC_SIGMA for sigma in list(sigmas)[1:])


def check_stochastic(kernel: Kernel, eta: float, sigmas: Sequence[float] | Tensor, steps: Sequence[int]) -> None:
    """Raises ValueError, with the std in it, if one of the 1-based `steps` is too late to carry noise."""
    last = last_stochastic_step(sigmas) if kernel != "ode" else len(sigmas)
    for step in steps:
        if step > last:
            sigma, sigma_next = float(sigmas[step - 1]), float(sigmas[step])
            _, std = transition(kernel, torch.zeros(1, 1), torch.zeros(1, 1), sigma, sigma_next, eta)
            raise ValueError(
                f"step {step} of {len(sigmas) - 1} ends at sigma {sigma_next:.4f} < {MIN_STOCHASTIC_SIGMA}, "
                f"where the noise of kernel {kernel!r} (std {float(std):.4f}) would make its gradient outweigh "
                f"all others: branch at step {last} or earlier"
            )
