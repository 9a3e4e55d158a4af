"""Reward-model losses against closed forms. s(d) = 1 / (1 + exp(-d)); -log s(d) = ln(1 + exp(-d))."""

from __future__ import annotations

import math

import pytest
import torch

from accord.losses import centring_penalty, divergence_span_loss, pairwise_loss, ranked_loss


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("difference", "margin", "soft_label", "loss", "gradient"),
    [
        (0.0, 0.0, 1.0, 0.693147, -0.5),
        (1.0, 0.0, 1.0, 0.313262, -0.268941),
        (-1.0, 0.0, 1.0, 1.313262, -0.731059),
        (2.0, 0.0, 1.0, 0.126928, -0.119203),
        (1.0, 0.5, 1.0, 0.474077, -0.377541),
        (1.0, 1.0, 1.0, 0.693147, -0.5),
        (1.0, 0.0, 0.8, 0.513262, -0.068941),
        (1.0, 0.0, 0.0, 1.313262, 0.731059),
        (math.log(4), 0.0, 0.8, 0.500402, 0.0),
        (math.log(4) + 1.0, 1.0, 0.8, 0.500402, 0.0),
    ],
)
def test_one_pair(difference: float, margin: float, soft_label: float, loss: float, gradient: float) -> None:
    """-(p log s(x) + (1 - p) log s(-x)) with x = d - m has derivative s(x) - p wrt the chosen score and the opposite
    wrt the rejected one. x = 1, p = .8: .8 * .313262 + .2 * 1.313262 = .513262, derivative .731059 - .8. At x =
    logit(p) = ln 4 the derivative is 0 and the loss the entropy of (.8, .2), .500402."""
    chosen, rejected = double(2.0 + difference).requires_grad_(), double(2.0).requires_grad_()
    result = pairwise_loss(chosen, rejected, margins=double(margin), soft_labels=double(soft_label))
    result.loss.backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert result.loss.item() == pytest.approx(loss, abs=1e-6)
    assert chosen.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert rejected.grad.item() == pytest.approx(-gradient, abs=1e-6)


def test_pair_metrics() -> None:
    """Differences 1, 0, -1, 2 count 1 + .5 + 0 + 1 = 2.5 correct, sum to 2, and have log-losses .313262 + .693147 +
    1.313262 + .126928 = 2.446599 whatever the margin that was trained with."""
    result = pairwise_loss(double(1, 5, 0, 2), double(0, 5, 1, 0), margins=double(1, 1, 1, 1))
    assert result.correct_sum.item() == 2.5
    assert result.score_margin_sum.item() == 2.0
    assert result.log_loss_sum.item() == pytest.approx(2.446599, abs=1e-6)
    assert result.pair_count.item() == 4
    assert result.group_count.item() == 4


def test_four_ranked_completions() -> None:
    """Scores 2 1 0 -1 in order: three pairs at distance 1, two at 2, one at 3: (3 * .313262 + 2 * .126928 + .048587) /
    6 = .207038. The best one's derivative is -(s(-1) + s(-2) + s(-3)) / 6 = -(.268941 + .119203 + .047426) / 6 =
    -.072595, the second's (.268941 - .268941 - .119203) / 6 = -.019867; the lower two mirror them."""
    scores = double(2, 1, 0, -1).requires_grad_()
    result = ranked_loss(scores, torch.arange(4), torch.zeros(4, dtype=torch.long))
    result.loss.backward()
    assert scores.grad is not None
    assert result.loss.item() == pytest.approx(0.207038, abs=1e-6)
    assert scores.grad.tolist() == pytest.approx([-0.072595, -0.019867, 0.019867, 0.072595], abs=1e-6)
    assert result.pair_count.item() == 6


def test_equal_scores_cost_log_two_whatever_the_number_of_completions() -> None:
    result = ranked_loss(torch.zeros(7), torch.tensor([0, 1, 0, 1, 2, 3, 4]), torch.tensor([0, 0, 1, 1, 1, 1, 1]))
    assert result.loss.item() == pytest.approx(math.log(2))
    assert result.correct_sum.item() == 0.5 * (1 + 10)


def test_each_prompt_weighs_the_same() -> None:
    """A pair at distance 2 (.126928) beside the four of above (.207038): mean .166983, not the mean over 7 pairs. The
    pair's winner has derivative -s(-2) / 2 = -.059601."""
    scores = double(2, 1, 0, -1, 2, 0).requires_grad_()
    ranks, groups = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([0, 0, 0, 0, 1, 1])
    result = ranked_loss(scores, ranks, groups)
    result.loss.backward()
    assert scores.grad is not None
    assert result.loss.item() == pytest.approx((0.207038 + 0.126928) / 2, abs=1e-6)
    assert result.log_loss_sum.item() == pytest.approx(0.207038 + 0.126928, abs=1e-6)
    assert scores.grad[4].item() == pytest.approx(-0.059601, abs=1e-6)


def test_equal_ranks_teach_nothing() -> None:
    """Ranks 0 0 1: two pairs remain, (3, 1) and (1, 1): (.126928 + .693147) / 2. A group of ties only is no group."""
    scores = double(3, 1, 1, 5, -5).requires_grad_()
    result = ranked_loss(scores, torch.tensor([0, 0, 1, 4, 4]), torch.tensor([0, 0, 0, 1, 1]))
    result.loss.backward()
    assert scores.grad is not None
    assert result.loss.item() == pytest.approx((0.126928 + 0.693147) / 2, abs=1e-6)
    assert scores.grad[3:].tolist() == [0.0, 0.0]
    assert (result.pair_count.item(), result.group_count.item()) == (2, 1)


def test_centring_a_pair() -> None:
    """(1.5 + .5)^2 = 4, derivative 2 (1.5 + .5) = 4 for each; a pair around 0 costs nothing. Mean over the two: 2."""
    scores = double(1.5, 0.5, 0.5, -0.5).requires_grad_()
    penalty = centring_penalty(scores, torch.tensor([0, 0, 1, 1]))
    penalty.backward()
    assert scores.grad is not None
    assert penalty.item() == pytest.approx(2.0)
    assert scores.grad.tolist() == pytest.approx([2.0, 2.0, 0.0, 0.0])


def test_centring_depends_on_the_mean_of_a_group_only() -> None:
    """Mean 1 of three costs (2 * 1)^2 = 4, however far apart they are; derivative 8 / 3 each."""
    scores = double(-7.0, 1.0, 9.0).requires_grad_()
    penalty = centring_penalty(scores, torch.zeros(3, dtype=torch.long))
    penalty.backward()
    assert scores.grad is not None
    assert penalty.item() == pytest.approx(4.0)
    assert scores.grad.tolist() == pytest.approx([8 / 3] * 3)


def test_extreme_scores_stay_finite() -> None:
    """-log s(-1e4) = 1e4 exactly in floating point, and -log s(1e4) = 0; log(sigmoid()) would underflow to -inf, on the
    side of the other label too, where 0 * inf is NaN."""
    scores = torch.tensor([-5e3, 5e3], requires_grad=True)
    result = pairwise_loss(scores, torch.tensor([5e3, -5e3]), num_groups=1)
    result.loss.backward()
    assert scores.grad is not None
    assert result.loss.item() == 1e4
    assert scores.grad.tolist() == [-1.0, 0.0]


# --- from where the answers part -------------------------------------------------------------------------------------

ONE_PAIR = torch.tensor([0, 1]), torch.tensor([0, 0])


def test_the_span_from_the_first_difference() -> None:
    """Tokens differ from place 2 on, where d = .4, .6, 1.6: -log s(d) = .513015, .437488, .183901, mean .378135. The
    chosen one's derivatives are -s(-d) / 3 = -.133771, -.118115, -.055994 and 0 before; the other's mirror them."""
    scores = torch.stack([double(0.1, 0.2, 0.5, 0.9, 1.4), double(0.1, 0.2, 0.1, 0.3, -0.2)]).requires_grad_()
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 1, 2, 3]])
    result = divergence_span_loss(scores, ids, torch.ones_like(ids, dtype=torch.bool), *ONE_PAIR)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(0.378135, abs=1e-6)
    assert result.span_loss_sum.item() == pytest.approx(0.378135, abs=1e-6)
    assert not result.span_loss_sum.requires_grad  # a metric
    assert scores.grad is not None
    expected = [0, 0, -0.133771, -0.118115, -0.055994]
    assert scores.grad[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert scores.grad[1].tolist() == pytest.approx([-x for x in expected], abs=1e-6)


def test_an_answer_that_has_ended_keeps_its_last_score() -> None:
    """Three tokens against two that part at place 1: d = .5 - .3 and .9 - .3, -log s = .598139 and .437488, mean
    .517813. Derivatives: -s(-.2) / 2 = -.225083 and -s(-.6) / 2 = -.177172, and their sum .402255 at the shorter one's
    last token; nothing at its padding, which holds NaN."""
    scores = torch.stack([double(0.1, 0.5, 0.9), double(0.1, 0.3, math.nan)]).requires_grad_()
    ids, mask = torch.tensor([[5, 6, 7], [5, 8, 7]]), torch.tensor([[True, True, True], [True, True, False]])
    result = divergence_span_loss(scores, ids, mask, *ONE_PAIR)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(0.517813, abs=1e-6)
    assert scores.grad is not None
    assert scores.grad[0].tolist() == pytest.approx([0, -0.225083, -0.177172], abs=1e-6)
    assert scores.grad[1].tolist() == pytest.approx([0, 0.402255, 0], abs=1e-6)


def test_a_span_with_margin_and_soft_label() -> None:
    """One token at d = ln 4 + 1, less the margin 1: at p = .8 the entropy .500402, without derivative; the metric
    leaves the margin out: .8 log(1 + e^-d) + .2 log(1 + e^d) at d = 2.386294 is .8 * .087983 + .2 * 2.474277 =
    .565242."""
    scores = double(math.log(4) + 1, 0)[:, None].requires_grad_()
    result = divergence_span_loss(
        scores, torch.tensor([[1], [2]]), torch.ones(2, 1, dtype=torch.bool), *ONE_PAIR,
        margins=double(1), soft_labels=double(0.8),
    )  # fmt: skip
    result.loss.backward()
    assert result.loss.item() == pytest.approx(0.500402, abs=1e-6)
    assert result.span_loss_sum.item() == pytest.approx(0.565242, abs=1e-6)
    assert scores.grad is not None and scores.grad.abs().max() < 1e-12


def test_identical_answers_are_counted_and_left_out() -> None:
    """The group beside them keeps its loss -log s(1) = .313262; as the one group with a pair it is the mean."""
    scores, ids = double(1, 0, 5, 7)[:, None], torch.tensor([[1], [2], [3], [3]])
    groups = torch.tensor([0, 0, 1, 1])
    result = divergence_span_loss(scores, ids, torch.ones(4, 1, dtype=torch.bool), torch.tensor([0, 1, 0, 1]), groups)
    assert result.loss.item() == pytest.approx(0.313262, abs=1e-6)
    assert (result.identical_count.item(), result.pair_count.item(), result.group_count.item()) == (1, 1, 1)


def test_a_pair_hopelessly_wrong_costs_its_difference_and_no_infinity() -> None:
    scores = torch.tensor([[-500.0], [500.0]]).requires_grad_()
    ids = torch.tensor([[1], [2]])
    result = divergence_span_loss(scores, ids, torch.ones(2, 1, dtype=torch.bool), *ONE_PAIR)
    result.loss.backward()
    assert result.loss.item() == 1000
    assert scores.grad is not None and scores.grad.flatten().tolist() == [-1, 1]


def test_a_group_drawn_twice_weighs_as_two_and_one_not_drawn_as_none() -> None:
    """Weights 2, 0 over -log s(1) = .313262 and -log s(-1) = 1.313262: 2 * .313262 / 2 groups; the penalty of means .5
    and .5 is 2 * 1 / 2. Metrics are of the data as it is."""
    scores, ranks, groups = double(1, 0, 0, 1), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    result = ranked_loss(scores, ranks, groups, weights=double(2, 0))
    assert result.loss.item() == pytest.approx(0.313262, abs=1e-6)
    assert result.log_loss_sum.item() == pytest.approx(0.313262 + 1.313262, abs=1e-6)
    assert centring_penalty(scores, groups, weights=double(2, 0)).item() == pytest.approx(1)
    ids, mask = torch.tensor([[1], [2], [3], [4]]), torch.ones(4, 1, dtype=torch.bool)
    span = divergence_span_loss(scores[:, None], ids, mask, ranks, groups, weights=double(2, 0))
    assert span.loss.item() == pytest.approx(0.313262, abs=1e-6)


def test_low_precision_scores_are_compared_in_float32() -> None:
    """In bfloat16, which has 8 bits, 256 - 1.5 is 254 or 256: the loss -log s(-254.5) is 254.5 in float32 alone."""
    scores, ids = torch.tensor([[1.5], [256.0]], dtype=torch.bfloat16), torch.tensor([[1], [2]])
    result = divergence_span_loss(scores, ids, torch.ones(2, 1, dtype=torch.bool), *ONE_PAIR)
    assert (result.loss.dtype, result.loss.item()) == (torch.float32, 254.5)


@pytest.mark.parametrize("wrong", ["scores", "ids", "mask", "ranks", "groups"])
def test_shapes_that_do_not_fit_are_refused(wrong: str) -> None:
    tensors = {"scores": torch.zeros(2, 3), "ids": torch.zeros(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool)}
    tensors |= {"ranks": torch.tensor([0, 1]), "groups": torch.tensor([0, 0])}
    tensors[wrong] = tensors[wrong][:, :1] if tensors[wrong].dim() == 2 else tensors[wrong][:1]
    with pytest.raises(ValueError, match="expected equal shapes"):
        divergence_span_loss(*tensors.values())
