"""Diversity figures against brute force and against cases whose value is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tmpo_trainer.diversity import (
    DISTANCE_FLOOR,
    MEASURES,
    Measure,
    cosine_distances,
    cosine_diversity,
    lgmd,
    measure,
    vendi_score,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_lgmd(x: Tensor) -> float:
    rows = x.double().flatten(1)
    pairs = [(a - b).square().mean().sqrt().item() for a, b in itertools.combinations(rows, 2)]
    return sum(math.log(distance) for distance in pairs) / len(pairs)


def test_lgmd_of_independent_normals_is_half_log_two():
    assert lgmd(normal(40, 16, 16, 16)).item() == pytest.approx(math.log(2) / 2, abs=2e-3)


@pytest.mark.parametrize("shape", [(2, 5), (7, 3, 4), (27, 4, 8, 8)])
def test_lgmd_is_the_mean_log_distance(shape):
    x = normal(*shape)
    assert lgmd(x).item() == pytest.approx(brute_lgmd(x), abs=1e-5)
    assert lgmd(x.double()).item() == pytest.approx(brute_lgmd(x), abs=1e-12)


def test_lgmd_scales_by_the_log_of_the_scale():
    x = normal(9, 30).double()
    assert (lgmd(3 * x) - lgmd(x)).item() == pytest.approx(math.log(3), abs=1e-12)


def test_lgmd_of_duplicates_is_the_floor_and_finite():
    assert lgmd(torch.ones(3, 4)).item() == pytest.approx(math.log(DISTANCE_FLOOR), rel=1e-6)
    one_pair = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 3.0]], dtype=torch.float64)
    assert lgmd(one_pair).item() == pytest.approx((math.log(DISTANCE_FLOOR) + 2 * math.log(3)) / 3, rel=1e-9)


def test_lgmd_keeps_near_duplicates_apart_above_25_rows():
    # A distance through |a|^2 + |b|^2 - 2 a.b, which cdist takes above 25 rows, is rounding noise here.
    x = 10 + 1e-3 * normal(32, 256)
    assert lgmd(x).item() == pytest.approx(brute_lgmd(x), abs=1e-3)


def test_lgmd_of_bfloat16_is_computed_in_float32():
    x = normal(6, 50).bfloat16()
    assert lgmd(x).dtype == torch.float32
    assert lgmd(x).item() == pytest.approx(brute_lgmd(x), abs=1e-5)


def test_cosine_diversity_is_the_mean_over_pairs():
    x = normal(11, 6) + 0.5
    rows = x.double()
    pairs = [1 - torch.nn.functional.cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(rows, 2)]
    assert cosine_diversity(x).item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_cosine_diversity_of_known_cases():
    assert cosine_diversity(torch.ones(5, 3)).item() == pytest.approx(0, abs=1e-6)
    assert cosine_diversity(torch.eye(4)).item() == pytest.approx(1, abs=1e-6)
    assert cosine_diversity(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])).item() == pytest.approx(2, abs=1e-6)


def test_vendi_score_counts_distinct_samples():
    assert vendi_score(torch.ones(6, 3)).item() == pytest.approx(1, abs=1e-6)
    assert vendi_score(5 * torch.eye(6)).item() == pytest.approx(6, abs=1e-5)
    assert vendi_score(torch.eye(3).repeat(4, 1)).item() == pytest.approx(3, abs=1e-5)
    # Two of one kind and one of another: eigenvalues 2/3 and 1/3.
    expected = math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    assert vendi_score(torch.eye(2)[[0, 0, 1]]).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("function", [lgmd, cosine_diversity, vendi_score, cosine_distances])
@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_samples_is_an_error(function, rows):
    with pytest.raises(ValueError, match=f"at least 2 samples, got {rows}"):
        function(torch.zeros(rows, 3))


def test_cosine_distances_are_those_of_every_pair():
    found = cosine_distances(torch.tensor([[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0]]))
    assert found.tolist() == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]


def test_latents_of_any_size_have_a_finite_lgmd():
    """Squares of float32 overflow at 1.8e19."""
    x = normal(5, 30)
    for scale in (1e19, 1e30, 1e37):
        assert lgmd(scale * x).item() == pytest.approx(lgmd(x).item() + math.log(scale), abs=1e-4)
        assert lgmd(scale * x).dtype == torch.float32


@pytest.mark.parametrize("function", [lgmd, cosine_diversity, vendi_score, cosine_distances])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_samples_that_are_not_finite_are_an_error(function, value):
    x = normal(4, 3)
    x[2, 1] = value
    with pytest.raises(ValueError, match="the diversity of 4 samples cannot be measured: sample 2 is not finite"):
        function(x)


def test_a_vector_of_zeros_is_as_far_from_all_others_as_an_orthogonal_one():
    zero, orthogonal = torch.eye(3), torch.eye(3)
    zero[2] = 0
    for function in (cosine_diversity, vendi_score, cosine_distances):
        torch.testing.assert_close(function(zero), function(orthogonal))


def test_measures_of_a_group_are_those_whose_samples_are_given(monkeypatch: pytest.MonkeyPatch):
    latents, features = normal(5, 4, 2, 2), normal(5, 7, seed=1)
    monkeypatch.setitem(MEASURES, "largest", Measure(lambda x: x.max(), "latents"))
    on_latents = {"LGMD": lgmd(latents).item(), "largest": latents.max().item()}
    on_features = {
        "cosine diversity": cosine_diversity(features).item(),
        "Vendi score": vendi_score(features).item(),
    }
    assert measure(latents=latents) == on_latents
    assert measure(features=features) == on_features
    assert measure(latents=latents, features=features) == on_latents | on_features
    assert list(measure(latents=latents, features=features)) == list(MEASURES)
