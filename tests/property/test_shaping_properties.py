"""What shaping keeps whatever the scores are: bounds, order, and independence of how scores come in."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.config import RLOOConfig
from accord.rewards.compose import combined
from accord.rewards.shaping import Moments, Samples, par, shape

number = st.floats(-50, 50, allow_nan=False)
scores = st.lists(number, min_size=1, max_size=12)
WORDS = ("yes", "no", "well", "so")


@settings(max_examples=50, deadline=None)
@given(st.lists(scores, min_size=1, max_size=5))
def test_moments_merged_in_any_pieces_are_those_of_all_at_once(pieces: list[list[float]]) -> None:
    merged = Moments()
    for piece in pieces:
        merged = merged.merged(torch.tensor(piece, dtype=torch.float64))
    whole = Moments().merged(torch.tensor([score for piece in pieces for score in piece], dtype=torch.float64))
    assert merged.count == whole.count
    assert merged.mean == pytest.approx(whole.mean, abs=1e-12)
    assert merged.squares == pytest.approx(whole.squares, rel=1e-10, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(number, scores), min_size=1, max_size=6))
def test_par_lies_between_0_and_1_and_rises_with_the_score(rows: list[tuple[float, list[float]]]) -> None:
    values = torch.tensor([score for score, _ in rows], dtype=torch.float64)
    references = [tuple(reference) for _, reference in rows]
    found = par(values, references)
    assert ((found >= 0) & (found <= 1)).all()
    assert (par(values + 1, references) >= found).all()


@settings(max_examples=50, deadline=None)
@given(scores, st.floats(0, 5), st.randoms(use_true_random=False))
def test_an_ensemble_does_not_care_who_its_members_are(members: list[float], coef: float, draw: random.Random) -> None:
    mixed = draw.sample(members, len(members))
    for how in ("mean", "worst", "uncertainty"):
        assert combined(mixed, how, coef) == pytest.approx(combined(members, how, coef), rel=1e-9, abs=1e-9)
    assert combined(members, "worst", coef) <= combined(members, "mean", coef) + 1e-9
    assert combined(members, "uncertainty", coef) <= combined(members, "mean", coef) + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(number, st.lists(st.sampled_from(WORDS), max_size=6), st.booleans()), min_size=2, max_size=6))
def test_the_order_of_a_prompts_samples_changes_no_reward(rows: list[tuple[float, list[str], bool]]) -> None:
    section = RLOOConfig.model_validate(
        {
            "max_new_tokens": 8, "score_clip": 20,
            "shaping": {
                "reference": "par", "running": "standardise", "length_penalty": 0.1, "overlong_buffer": 3,
                "repetition_penalty": 1, "diversity_bonus": 1, "truncation": "replace",
            },
        }
    )  # fmt: skip

    def rewards(order: list[int]) -> list[float]:
        picked = [rows[i] for i in order]
        samples = Samples(
            [" ".join(words) for _, words, _ in picked],
            [range(len(picked))],
            torch.tensor([len(words) for _, words, _ in picked]),
            torch.tensor([finished for _, _, finished in picked]),
            [(float(len(words)), 0.5) for _, words, _ in picked],
        )
        values = torch.tensor([score for score, _, _ in picked], dtype=torch.float64)
        found = shape(values, samples, section, Moments(3, 0.2, 1.0))
        total = values + torch.stack(list(found.terms.values())).sum(0)
        assert torch.allclose(total, found.rewards, atol=1e-9)
        return found.rewards.tolist()

    forward, backward = list(range(len(rows))), list(range(len(rows)))[::-1]
    assert rewards(backward) == pytest.approx(rewards(forward)[::-1], abs=1e-9)
