"""Values of every shaping term and of ensembles, worked out by hand or by the standard library in double precision."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from accord.config import RLOOConfig, ShapingConfig
from accord.rewards.compose import combined
from accord.rewards.shaping import (
    Moments,
    Samples,
    Shaped,
    length_penalty,
    overlong_penalty,
    par,
    reference_difference,
    running_normalised,
    shape,
)

TEXTS = ("a b c d", "a b x y", "a a a a a", "c d")
SCORES = (2.0, -1.0, 0.5, 9.0)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def samples(references: tuple[tuple[float, ...], ...] = ()) -> Samples:
    """Two prompts with two completions each; the second and the last were cut."""
    return Samples(
        TEXTS,
        (range(2), range(2, 4)),
        torch.tensor([4, 9, 6, 10]),
        torch.tensor([True, False, True, False]),
        references,
    )


def shaped(
    moments: Moments | None = None, references: tuple[tuple[float, ...], ...] = (), **settings: object
) -> Shaped:
    shaping = {k: v for k, v in settings.items() if k in ShapingConfig.model_fields}
    rest = {k: v for k, v in settings.items() if k not in shaping}
    section = RLOOConfig.model_validate({"max_new_tokens": 10, "missing_eos_penalty": 0, **rest, "shaping": shaping})
    return shape(tensor(*SCORES), samples(references), section, moments or Moments())


@pytest.mark.parametrize(
    ("how", "coef", "expected"),
    [("mean", 9.0, 3.0), ("worst", 9.0, 1.0), ("uncertainty", 0.5, 3.0 - 0.5 * 8 / 3), ("uncertainty", 0.0, 3.0)],
)
def test_an_ensemble_of_1_3_5(how: str, coef: float, expected: float) -> None:
    """Mean 3, least 1, population variance ((-2)^2 + 0 + 2^2) / 3."""
    assert combined((1.0, 3.0, 5.0), how, coef) == pytest.approx(expected, abs=1e-15)  # type: ignore[arg-type]


def test_difference_to_the_mean_of_the_references() -> None:
    assert reference_difference(tensor(2.0, -1.0), ((1.0, 4.0), (0.5,))).tolist() == [-0.5, -1.5]


def test_par_is_the_mean_sigmoid_of_the_differences() -> None:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    found = par(tensor(2.0, -1.0, 0.3), ((1.0, 4.0), (0.5,), (0.3,)))
    assert found.tolist() == pytest.approx([(sigmoid(1.0) + sigmoid(-2.0)) / 2, sigmoid(-1.5), 0.5], abs=1e-15)


def test_a_completion_without_reference_is_refused() -> None:
    for function in (par, reference_difference):
        with pytest.raises(ValueError, match="needs the score of a reference"):
            function(tensor(1.0, 2.0), ((1.0,), ()))


def test_moments_of_two_rollouts_are_those_of_all_their_scores() -> None:
    first, second = (1.0, 2.0, 6.0), (-3.0, 0.5)
    moments = Moments().merged(tensor(*first)).merged(tensor(*second))
    assert (moments.count, moments.mean) == (5, pytest.approx(statistics.fmean(first + second), abs=1e-15))
    assert moments.std == pytest.approx(statistics.pstdev(first + second), abs=1e-15)


def test_running_normalisation() -> None:
    moments = Moments(4, 1.0, 16.0)  # standard deviation 2
    assert running_normalised(tensor(3.0, -1.0), moments, centre=False).tolist() == [1.5, -0.5]
    assert running_normalised(tensor(3.0, -1.0), moments, centre=True).tolist() == [1.0, -1.0]
    assert running_normalised(tensor(7.0), Moments(1, 7.0, 0.0), centre=False).tolist() == [7.0]


def test_length_costs_beyond_what_is_free() -> None:
    assert length_penalty(torch.tensor([3, 5, 9]), coef=0.5, free=5).tolist() == [0.0, 0.0, -2.0]


def test_the_last_part_of_the_room_costs_more_and_more() -> None:
    """Room 10, buffer 4: 0 up to 6 tokens, then a quarter a token."""
    lengths = torch.tensor([2, 6, 7, 9, 10])
    found = overlong_penalty(lengths, longest=10, buffer=4, penalty=2.0)
    assert found.tolist() == [0.0, 0.0, -0.5, -1.5, -2.0]
    with pytest.raises(ValueError, match="at least one token"):
        overlong_penalty(lengths, longest=10, buffer=0, penalty=1.0)


@pytest.mark.parametrize(
    ("settings", "term", "expected"),
    [
        ({"score_clip": 1.0}, "clip", (-1.0, 0.0, 0.0, -8.0)),
        ({"length_penalty": 0.5, "length_free": 5}, "length", (0.0, -2.0, -0.5, -2.5)),
        ({"overlong_buffer": 4, "overlong_penalty": 2.0}, "overlong", (0.0, -1.5, 0.0, -2.0)),
        # 3-grams: "a b c", "b c d"; "a b x", "b x y"; three times "a a a"; none.
        ({"repetition_penalty": 3.0}, "repetition", (0.0, 0.0, -3.0 * 2 / 3, 0.0)),
        # 2-grams: ab bc cd against ab bx xy; aa against cd.
        ({"diversity_bonus": 3.0}, "diversity", (2.0, 2.0, 3.0, 3.0)),
        ({"missing_eos_penalty": 2.0}, "truncation", (0.0, -2.0, 0.0, -2.0)),
        ({"missing_eos_penalty": 2.0, "truncation": "replace"}, "truncation", (0.0, -1.0, 0.0, -11.0)),
    ],
)
def test_each_term_by_itself(settings: dict[str, object], term: str, expected: tuple[float, ...]) -> None:
    found = shaped(**settings)
    assert found.terms.keys() == {term}
    assert found.terms[term].tolist() == pytest.approx(expected, abs=1e-6)
    assert found.rewards.tolist() == pytest.approx([s + t for s, t in zip(SCORES, expected, strict=True)], abs=1e-6)
    assert found.learned.all()


def test_leaving_out_what_was_cut_changes_no_reward() -> None:
    found = shaped(truncation="leave_out", missing_eos_penalty=2.0)
    assert found.rewards.tolist() == list(SCORES) and found.terms == {}
    assert found.learned.tolist() == [True, False, True, False]


def test_the_order_of_the_terms() -> None:
    """Difference, then the spread 2, then the clip at 3, then prices, then the penalty for being cut.

    2 - 1 = 1 -> 0.5 -> 0.5;   -1 - 1 = -2 -> -1 -> -1, less 9 - 5 tokens, less 2;
    0.5 - 0.5 = 0;  0, less 1;   9 - 0.5 = 8.5 -> 4.25 -> 3, less 5, less 2
    """
    found = shaped(
        Moments(4, 100.0, 16.0), ((1.0,), (1.0,), (0.5,), (0.5,)),
        reference="difference", running="scale", score_clip=3.0, length_penalty=1.0, length_free=5,
        missing_eos_penalty=2.0,
    )  # fmt: skip
    assert list(found.terms) == ["reference", "running", "clip", "length", "truncation"]
    assert found.rewards.tolist() == pytest.approx([0.5, -7.0, -1.0, -4.0], abs=1e-12)
    assert torch.stack(list(found.terms.values())).sum(0).tolist() == pytest.approx(
        [r - s for r, s in zip(found.rewards.tolist(), SCORES, strict=True)], abs=1e-12
    )
