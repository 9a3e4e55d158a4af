"""Choosing tokens from logits: values worked out by hand, extremes, and the distribution of many draws."""

from __future__ import annotations

import math

import pytest
import torch

from accord.randomness import generator
from accord.rollout.sampling import Sampling, adjusted_logits, choose

JUST_BELOW_ONE = 1 - 2**-53


def _logits(*probabilities: float) -> torch.Tensor:
    """One row of logits, shifted by 3 so that nothing can rely on normalised input."""
    return torch.tensor([probabilities]).log() + 3


def _kept(logits: torch.Tensor, sampling: Sampling) -> list[int]:
    return (adjusted_logits(logits, sampling)[0] > -math.inf).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(("u", "expected"), [(0.0, 0), (0.4999, 0), (0.5, 1), (0.7499, 1), (0.75, 2), (0.99, 2)])
def test_the_inverse_cdf_runs_in_vocabulary_order(u: float, expected: int) -> None:
    """p = (1/2, 1/4, 1/4) has F = (1/2, 3/4, 1): the first F_i above u is token 0 below 1/2, 1 below 3/4, else 2."""
    p = (0.5, 0.25, 0.25)
    ids, logprobs = choose(_logits(*p), torch.tensor([u], dtype=torch.float64), Sampling(1))
    assert ids.tolist() == [expected]
    assert logprobs.item() == pytest.approx(math.log(p[expected]), abs=1e-6)


@pytest.mark.parametrize("u", [0.0, 0.3, 0.5, JUST_BELOW_ONE])
def test_a_token_of_probability_zero_is_never_chosen(u: float) -> None:
    """Zeros at both ends and in the middle: u = 0 must skip the first, u -> 1 must stop before the last."""
    ids, logprobs = choose(_logits(0, 0.5, 0, 0.5, 0), torch.tensor([u], dtype=torch.float64), Sampling(1))
    assert ids.item() == (1 if u < 0.5 else 3)
    assert logprobs.item() == pytest.approx(math.log(0.5), abs=1e-6)


def test_a_large_vocabulary_does_not_blur_the_cumulative_sum() -> None:
    """Token 0 has weight 1 and 50,000 tokens have w = e^-17 = 4e-8: u = (1 + (k - 1/2) w) / (1 + 50000 w) is token k's.
    Just above 1, float32 numbers are 12e-8 apart: tokens would share a place, and most could never be drawn."""
    w = math.exp(-17)
    logits = torch.full((1, 50_001), -17.0)
    logits[:, 0] = 0.0
    tokens = torch.arange(40_000, 40_006)
    uniforms = (1 + (tokens.double() - 0.5) * w) / (1 + 50_000 * w)
    ids, logprobs = choose(logits.expand(6, -1), uniforms, Sampling(1))
    assert ids.tolist() == tokens.tolist()
    assert logprobs.tolist() == pytest.approx([-17 - math.log(1 + 50_000 * w)] * 6, abs=1e-5)


def test_the_logprob_is_under_the_tempered_distribution() -> None:
    """Temperature 1/2 squares the odds: (4, 2, 1) becomes (16, 4, 1)/21, so u = 0.9 > 16/21 takes token 1 at 4/21."""
    ids, logprobs = choose(_logits(4, 2, 1), torch.tensor([0.9], dtype=torch.float64), Sampling(1, temperature=0.5))
    assert ids.item() == 1
    assert logprobs.item() == pytest.approx(math.log(4 / 21), abs=1e-6)


def test_the_logprob_is_renormalised_over_what_top_k_keeps() -> None:
    """Odds (1, 4, 2): top-k 2 keeps (4, 2), so u = 0.7 > 4/6 takes token 2 at 2/6."""
    ids, logprobs = choose(_logits(1, 4, 2), torch.tensor([0.7], dtype=torch.float64), Sampling(1, top_k=2))
    assert ids.item() == 2
    assert logprobs.item() == pytest.approx(math.log(2 / 6), abs=1e-6)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(1e-9, [1]), (0.49, [1]), (0.51, [1, 2]), (0.76, [0, 1, 2]), (0.9, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, expected: list[int]) -> None:
    """In decreasing order 1/2 (token 1), 1/4 (2), 1/8 (0), 1/8 (3): the mass before each is 0, 1/2, 3/4, 7/8."""
    assert _kept(_logits(0.125, 0.5, 0.25, 0.125), Sampling(1, top_p=top_p)) == expected


def test_top_p_counts_mass_among_what_top_k_left() -> None:
    """Odds (3, 3, 2, 2): top-k 3 keeps the ties too; top-k 2 leaves (1/2, 1/2), where top-p 0.4 takes one."""
    logits = _logits(3, 3, 2, 2)
    assert _kept(logits, Sampling(1, top_k=3)) == [0, 1, 2, 3]
    assert _kept(logits, Sampling(1, top_k=2)) == [0, 1]
    assert _kept(logits, Sampling(1, top_k=2, top_p=0.4)) == [0]
    assert _kept(logits, Sampling(1, top_p=0.4)) == [0, 1]


def test_top_k_of_the_vocabulary_or_more_keeps_everything() -> None:
    assert _kept(_logits(1, 2, 3), Sampling(1, top_k=3)) == [0, 1, 2]
    assert _kept(_logits(1, 2, 3), Sampling(1, top_k=99)) == [0, 1, 2]


def test_temperature_zero_is_greedy_with_certainty() -> None:
    ids, logprobs = choose(_logits(1, 5, 2), torch.tensor([0.99], dtype=torch.float64), Sampling(1, temperature=0))
    assert (ids.item(), logprobs.item()) == (1, 0.0)


@pytest.mark.parametrize("temperature", [1e-30, 1e-3])
def test_a_tiny_temperature_stays_finite(temperature: float) -> None:
    ids, logprobs = choose(
        _logits(1, 5, 2), torch.tensor([JUST_BELOW_ONE], dtype=torch.float64), Sampling(1, temperature=temperature)
    )
    assert (ids.item(), logprobs.item()) == (1, 0.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_show_in_the_logprob(temperature: float) -> None:
    logits = torch.tensor([[0.0, math.nan, 1.0]])
    ids, logprobs = choose(logits, torch.tensor([0.5], dtype=torch.float64), Sampling(1, temperature=temperature))
    assert 0 <= ids.item() < 3
    assert not math.isfinite(logprobs.item())


def test_many_draws_follow_the_probabilities() -> None:
    """20,000 draws of a fixed seed by chi-square: 18.47 is the 99.9th percentile at 4 degrees of freedom."""
    p = (0.5, 0.3, 0.15, 0.04, 0.01)
    n = 20_000
    uniforms = torch.from_numpy(generator("chi-square", 0).random(n))
    ids, _ = choose(_logits(*p).expand(n, -1), uniforms, Sampling(1))
    counts = torch.bincount(ids, minlength=5).tolist()
    assert sum((count - n * q) ** 2 / (n * q) for count, q in zip(counts, p, strict=True)) < 18.47


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_new_tokens", 9),
        ("min_new_tokens", -1),
        ("stop_ids", (3, -1)),
    ],
)
def test_a_setting_out_of_range_names_its_field(field: str, value: object) -> None:
    settings = {"max_new_tokens": 8, field: value}
    with pytest.raises(ValueError, match=f"^{field} is "):
        Sampling(**settings)  # type: ignore[arg-type]
