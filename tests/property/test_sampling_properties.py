"""Sampling against a float64 oracle, and its invariances."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.rollout.sampling import Sampling, adjusted_logits, choose

SETTINGS = settings(max_examples=50, derandomize=True, deadline=None)
rows = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12)
uniform = st.floats(0, 1 - 2**-53)


def _choose(logits: list[float], u: float, sampling: Sampling) -> tuple[int, float]:
    ids, logprobs = choose(torch.tensor([logits]), torch.tensor([u], dtype=torch.float64), sampling)
    return int(ids.item()), logprobs.item()


@SETTINGS
@given(rows, uniform, st.floats(0.2, 5))
def test_the_token_and_its_logprob_match_a_float64_oracle(logits: list[float], u: float, temperature: float) -> None:
    """The oracle normalises first and looks for the interval [F_{i-1}, F_i) that holds u, with room for rounding."""
    z = np.array(logits) / temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    upper = np.cumsum(p)
    token, logprob = _choose(logits, u, Sampling(1, temperature=temperature))
    assert upper[token] - p[token] - 1e-6 <= u <= upper[token] + 1e-6
    assert math.isclose(logprob, math.log(p[token]), rel_tol=1e-5, abs_tol=2e-5)


@SETTINGS
@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12, unique=True), uniform)
def test_top_k_of_one_is_greedy(logits: list[float], u: float) -> None:
    assert _choose(logits, u, Sampling(1, top_k=1)) == _choose(logits, u, Sampling(1, temperature=0))


@SETTINGS
@given(rows, uniform, st.integers(0, 5), st.floats(0.05, 1))
def test_the_chosen_token_is_one_that_the_filters_kept(logits: list[float], u: float, top_k: int, top_p: float) -> None:
    sampling = Sampling(1, top_k=top_k, top_p=top_p)
    adjusted = adjusted_logits(torch.tensor([logits]), sampling)[0]
    token, logprob = _choose(logits, u, sampling)
    assert adjusted[token] > -math.inf
    assert math.isclose(logprob, adjusted.double().log_softmax(-1)[token].item(), abs_tol=1e-5)


@SETTINGS
@given(rows, st.floats(0.05, 1), st.floats(0.05, 1))
def test_a_larger_top_p_keeps_all_that_a_smaller_one_keeps(logits: list[float], a: float, b: float) -> None:
    small, large = (
        adjusted_logits(torch.tensor([logits]), Sampling(1, top_p=p))[0] > -math.inf for p in sorted((a, b))
    )
    assert small.any()
    assert (large | ~small).all()


@SETTINGS
@given(st.lists(st.integers(-8, 8).map(float), min_size=1, max_size=12), uniform, st.integers(-64, 64).map(float))
def test_a_constant_added_to_the_logits_changes_nothing(logits: list[float], u: float, shift: float) -> None:
    """Integers and integer shifts are exact in float32, so equality is exact."""
    assert _choose([x + shift for x in logits], u, Sampling(1)) == _choose(logits, u, Sampling(1))
