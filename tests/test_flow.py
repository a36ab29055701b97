"""Transition kernels against exact Gaussian propagation, log-probabilities against torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tmpo_trainer import flow

KERNELS = ("ode", "cps", "flow_sde", "dance")
#: Last one: SD3.5's long step to almost 0.
SIGMA_PAIRS = ((0.95, 0.9), (0.9037, 0.7897), (0.6525, 0.4842), (0.4, 0.1), (0.273, 0.0), (0.432, 0.0089))
FLUX_SIGMAS = (1.0, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0.0)
SD35_SIGMAS = (1.0, 0.923, 0.819, 0.668, 0.432, 0.0089, 0.0)


def marginal_variance(sigma: float, c: float) -> float:
    """V(sigma) of x = (1 - sigma) x0 + sigma x1 with x0 ~ N(m, c^2)."""
    return (1 - sigma) ** 2 * c**2 + sigma**2


def gaussian_velocity(x: Tensor, sigma: float, m: float, c: float) -> Tensor:
    """E[x1 - x0 | x] for data N(m, c^2)."""
    slope = (sigma - (1 - sigma) * c**2) / marginal_variance(sigma, c)
    return -m + slope * (x - (1 - sigma) * m)


def propagate(
    kernel: flow.Kernel, sigma: float, sigma_next: float, eta: float, m: float, c: float
) -> tuple[float, float]:
    """Mean and variance after one step from the exact marginal: the step is affine, so two points determine it."""
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    mean, std = flow.transition(kernel, x, gaussian_velocity(x, sigma, m, c), sigma, sigma_next, eta)
    offset, slope = mean[0].item(), (mean[1] - mean[0]).item()
    return offset + slope * (1 - sigma) * m, slope**2 * marginal_variance(sigma, c) + std.item() ** 2


def sde_excess(level: float, sigma: float, sigma_next: float, c: float) -> float:
    """Variance after one step minus V(sigma_next), for a mean with the drift of noise level `level`."""
    b = sigma - (1 - sigma) * c**2
    delta = sigma - sigma_next
    return delta**2 * ((b + level**2 / 2) ** 2 / marginal_variance(sigma, c) - (1 + c**2))


def random_step(rows: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, velocity = torch.randn(2, rows, 2, 3, generator=generator, dtype=torch.float64).to(dtype)
    return x, velocity


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("sigma", "sigma_next"), SIGMA_PAIRS)
@pytest.mark.parametrize("c", [0.0, 0.3, 1.0, 2.0])
def test_gaussian_mean_is_kept_and_variance_is_exact(kernel, sigma, sigma_next, c):
    m, eta = 1.7, 0.7
    mean, variance = propagate(kernel, sigma, sigma_next, eta, m, c)
    excess = {
        "ode": sde_excess(0.0, sigma, sigma_next, c),
        "flow_sde": sde_excess(eta * math.sqrt(sigma / (1 - sigma)), sigma, sigma_next, c),
        "dance": sde_excess(eta, sigma, sigma_next, c),
        "cps": -(c**2)
        / marginal_variance(sigma, c)
        * ((1 - sigma_next) * sigma - (1 - sigma) * sigma_next * math.cos(eta * math.pi / 2)) ** 2,
    }[kernel]
    assert mean == pytest.approx((1 - sigma_next) * m, abs=1e-13)
    assert variance - marginal_variance(sigma_next, c) == pytest.approx(excess, abs=1e-13)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gaussian_mean_is_kept_from_pure_noise(kernel):
    mean, _ = propagate(kernel, 1.0, 0.9037, 0.7, 1.7, 0.5)
    assert mean == pytest.approx((1 - 0.9037) * 1.7, abs=1e-13)


def test_cps_variance_is_exact_for_point_mass_data():
    for sigma, sigma_next in SIGMA_PAIRS:
        _, variance = propagate("cps", sigma, sigma_next, 0.5, 1.7, 0.0)
        assert variance == pytest.approx(sigma_next**2, abs=1e-14)


def test_flow_sde_at_sigma_one_takes_the_next_sigma_in_its_noise_level():
    sigma_next, eta = 0.9037, 0.7
    level = eta * math.sqrt(1 / (1 - sigma_next))
    _, variance = propagate("flow_sde", 1.0, sigma_next, eta, 1.7, 0.5)
    expected = marginal_variance(sigma_next, 0.5) + sde_excess(level, 1.0, sigma_next, 0.5)
    assert variance == pytest.approx(expected, abs=1e-13)
    _, std = flow.transition("flow_sde", torch.zeros(1, 1), torch.zeros(1, 1), 1.0, sigma_next, eta)
    assert std.item() == pytest.approx(level * math.sqrt(1 - sigma_next), rel=1e-6)


@pytest.mark.parametrize("kernel", ["cps", "flow_sde", "dance"])
def test_every_kernel_is_ode_at_eta_zero(kernel):
    x, velocity = random_step()
    mean, std = flow.transition(kernel, x, velocity, 0.8, 0.6, 0.0)
    torch.testing.assert_close(mean, x - (0.8 - 0.6) * velocity, rtol=0, atol=1e-14)
    assert std.abs().max() == 0


def test_cps_at_eta_one_forgets_the_predicted_noise():
    x, velocity = random_step()
    mean, std = flow.transition("cps", x, velocity, 0.8, 0.6, 1.0)
    torch.testing.assert_close(mean, 0.4 * (x - 0.8 * velocity), rtol=0, atol=1e-14)
    assert std.item() == pytest.approx(0.6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_sigma_per_row_equals_scalar_sigma(kernel):
    x, velocity = random_step(4)
    sigma = torch.tensor([1.0, 0.9, 0.5, 0.3], dtype=torch.float64)
    sigma_next = torch.tensor([0.9, 0.6, 0.4, 0.1], dtype=torch.float64)
    mean, std = flow.transition(kernel, x, velocity, sigma, sigma_next, 0.7)
    assert mean.shape == x.shape and std.shape == (4, 1, 1)
    for i in range(4):
        one = flow.transition(kernel, x[i : i + 1], velocity[i : i + 1], sigma[i].item(), sigma_next[i].item(), 0.7)
        assert torch.equal(mean[i : i + 1], one[0]) and torch.equal(std[i : i + 1], one[1])


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_input_is_computed_in_float32(kernel):
    x, velocity = random_step(dtype=torch.bfloat16)
    mean, std = flow.transition(kernel, x, velocity, 0.9037, 0.7897, 0.7)
    expected = flow.transition(kernel, x.float(), velocity.float(), 0.9037, 0.7897, 0.7)
    assert mean.dtype == std.dtype == torch.float32
    assert torch.equal(mean, expected[0]) and torch.equal(std, expected[1])
    assert not torch.equal(mean, mean.bfloat16().float())
    assert flow.predict_data(x, velocity, 0.9).dtype == torch.float32


def test_mixed_precision_follows_the_latent():
    x, velocity = random_step()
    mean, _ = flow.transition("cps", x.float(), velocity.bfloat16(), 0.9, 0.8, 0.7)
    assert mean.dtype == torch.float32
    mean, std = flow.transition("cps", x, velocity, 0.9, 0.8, 0.7)
    assert mean.dtype == std.dtype == torch.float64


def test_unknown_kernel_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown kernel 'euler'.*ode, cps, flow_sde, dance"):
        flow.transition("euler", torch.zeros(1, 1), torch.zeros(1, 1), 0.9, 0.8, 0.7)  # type: ignore[arg-type]


def test_predict_data_inverts_the_interpolation():
    data, noise = random_step()
    x = 0.3 * data + 0.7 * noise
    torch.testing.assert_close(flow.predict_data(x, noise - data, 0.7), data, rtol=0, atol=1e-14)


@pytest.mark.parametrize("std", [0.3, torch.tensor([0.1, 0.2, 0.5, 1.0, 3.0], dtype=torch.float64).view(5, 1, 1)])
def test_log_prob_is_the_normal_density(std):
    mean, offset = random_step()
    x_next = mean + 0.4 * offset
    density = torch.distributions.Normal(mean, torch.as_tensor(std, dtype=torch.float64)).log_prob(x_next).flatten(1)
    torch.testing.assert_close(flow.log_prob(x_next, mean, std), density.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(flow.log_prob(x_next, mean, std, "sum"), density.sum(1), rtol=1e-12, atol=0)


def test_log_prob_of_bfloat16_is_float32():
    mean, offset = random_step(dtype=torch.bfloat16)
    x_next = mean + offset
    value = flow.log_prob(x_next, mean, 0.3)
    assert value.dtype == torch.float32 and value.shape == (5,)
    assert torch.equal(value, flow.log_prob(x_next.float(), mean.float(), 0.3))


def test_gradients_of_cps_against_the_published_ones():
    """The published log-probability is -mean (x' - mu)^2. docs/maths.md quotes these factors, of steps 2 to 5."""
    factors = []
    for step in range(2, 6):
        x, velocity = random_step()
        mean, std = flow.transition("cps", x, velocity, FLUX_SIGMAS[step - 1], FLUX_SIGMAS[step], 0.7)
        mean.requires_grad_()
        child = mean.detach() + std * x.flip(0)
        (ours,) = torch.autograd.grad(flow.log_prob(child, mean, std).sum(), mean)
        (theirs,) = torch.autograd.grad(-(child - mean).square().flatten(1).mean(1).sum(), mean)
        torch.testing.assert_close(ours / theirs, torch.full_like(x, (ours / theirs).mean().item()))
        factors.append(round((ours / theirs).mean().item(), 1))
    assert factors == [1.0, 1.5, 2.7, 8.5]


def test_last_stochastic_step_of_both_models():
    assert flow.last_stochastic_step(FLUX_SIGMAS) == 5
    assert flow.last_stochastic_step(SD35_SIGMAS) == 4
    assert flow.last_stochastic_step(torch.tensor(SD35_SIGMAS)) == 4
    assert flow.last_stochastic_step((1.0, 0.04, 0.0)) == 0
    assert flow.last_stochastic_step((1.0, flow.MIN_STOCHASTIC_SIGMA, 0.0)) == 1


def test_too_late_stochastic_step_is_refused_with_its_std():
    flow.check_stochastic("cps", 0.7, FLUX_SIGMAS, [1, 3, 5])
    flow.check_stochastic("cps", 0.7, SD35_SIGMAS, [2, 4])
    std = 0.0089 * math.sin(0.35 * math.pi)
    with pytest.raises(ValueError, match=rf"step 5 of 6 .*std {std:.4f}.*step 4 or earlier"):
        flow.check_stochastic("cps", 0.7, SD35_SIGMAS, [2, 5])
    with pytest.raises(ValueError, match=r"step 6 of 6 .*std 0\.0000.*step 5 or earlier"):
        flow.check_stochastic("cps", 0.7, torch.tensor(FLUX_SIGMAS), [6])
    # The picture would keep this noise: Flow-GRPO's last step is an ODE step.
    std = 0.7 * math.sqrt(0.273 / (1 - 0.273)) * math.sqrt(0.273)
    with pytest.raises(ValueError, match=rf"flow_sde.*std {std:.4f}"):
        flow.check_stochastic("flow_sde", 0.7, FLUX_SIGMAS, [6])
