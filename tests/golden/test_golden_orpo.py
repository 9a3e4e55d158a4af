"""The odds-ratio loss against values and derivatives worked out by hand.

With log p = a: log_odds(a) = a - ln(1 - e^a), whose derivative is 1 / (1 - e^a). R = log_odds(chosen) -
log_odds(rejected); loss = -chosen + .1 * -log s(R), with derivatives -1 - .1 s(-R) / (1 - e^chosen) and
+.1 s(-R) / (1 - e^rejected).
"""

from __future__ import annotations

import pytest
import torch

from accord.losses import orpo_loss


@pytest.mark.parametrize(
    ("chosen", "rejected", "log_odds_ratio", "penalty", "loss", "chosen_gradient", "rejected_gradient"),
    [
        (-0.5, -1.0, 0.974077, 0.320300, 0.532030, -1.069654, 0.043357),
        (-1.0, -1.0, 0.0, 0.693147, 1.069315, -1.079099, 0.079099),
        (-3.0, -2.5, -0.534581, 0.995743, 3.099574, -1.066359, 0.068694),
        (-1e-7, -1.0, 16.659420, 5.819767e-8, 1.058198e-7, -1.058198, 9.206736e-9),
        (-0.001, -0.004, 1.387795, 0.222844, 0.023284, -20.985990, 5.003995),
    ],
)
def test_one_pair(
    chosen: float,
    rejected: float,
    log_odds_ratio: float,
    penalty: float,
    loss: float,
    chosen_gradient: float,
    rejected_gradient: float,
) -> None:
    """log_odds: -.5 -> .432752, -1 -> -.541325, -3 -> -2.948931, -2.5 -> -2.414350, -1e-7 -> ln 1e7 = 16.118096, -.001
    -> 6.907255, -.004 -> 5.519460. First row: R = .974077, s(-R) = .274068; .5 + .1 * .320300; -1 - .0274068 /
    .393469; .0274068 / .632121. Fourth row: s(-R) = .581977e-7 (odds of e^-1 over 1e7), so the chosen one's derivative
    is -1 - .1 * .581977e-7 / 1e-7."""
    a = torch.tensor([chosen], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([rejected], dtype=torch.float64, requires_grad=True)
    result = orpo_loss(a, b, odds_ratio_coef=0.1)
    result.loss.backward()
    assert a.grad is not None and b.grad is not None
    assert result.loss.item() == pytest.approx(loss, abs=1e-6, rel=1e-6)
    assert result.loss_sum.item() == result.loss.item()
    assert result.odds_ratio_loss_sum.item() == pytest.approx(penalty, rel=2e-6)
    assert result.nll_sum.item() == -chosen
    assert result.margin_sum.item() == pytest.approx(log_odds_ratio, abs=1e-6)
    assert result.correct_sum.item() == (0.5 if log_odds_ratio == 0 else float(log_odds_ratio > 0))
    assert a.grad.item() == pytest.approx(chosen_gradient, rel=1e-6)
    assert b.grad.item() == pytest.approx(rejected_gradient, rel=1e-5)


@pytest.mark.parametrize(
    ("chosen", "rejected", "loss", "chosen_gradient", "rejected_gradient"),
    [
        (-1e-7, -1.0, 1.058198e-7, -1.058198, 9.206736e-9),
        (0.0, -1.0, 5.819767e-9, -1.0, 9.206736e-9),
        (-1.0, 0.0, 2.665942, -1.158198, 0.0),
        (0.0, 0.0, 0.0693147, -1.0, 0.0),
        (-1.0, -1e-7, 2.665942, -1.158198, 1e6),
    ],
)
def test_up_to_certainty_in_float32(
    chosen: float, rejected: float, loss: float, chosen_gradient: float, rejected_gradient: float
) -> None:
    """At 0 the odds count as those of -1e-7, without gradient: the penalty of (0, -1) is that of (-1e-7, -1), 5.82e-8;
    of (-1, 0) it is 16.65942 with s(-R) = 1, so 1 + 1.665942 and -1 - .1 / .632121; of (0, 0) ln 2. In float32
    1 - exp(-1e-7) would be off by a fifth, and 1 - exp(0) infinite odds."""
    a, b = torch.tensor([chosen], requires_grad=True), torch.tensor([rejected], requires_grad=True)
    result = orpo_loss(a, b, odds_ratio_coef=0.1)
    result.loss.backward()
    assert a.grad is not None and b.grad is not None
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert a.grad.item() == pytest.approx(chosen_gradient, rel=1e-5)
    assert b.grad.item() == pytest.approx(rejected_gradient, rel=1e-5)


def test_bfloat16_is_raised_before_the_odds_are_taken() -> None:
    """-.001 in bfloat16 is -.00099945; e^a would round to 1 there. log_odds = -.00099945 - ln(.00099895) = 6.907804,
    and against -1: penalty ln(1 + e^-(6.907804 + .541325)) = .000581778."""
    a, b = torch.tensor([-0.001], dtype=torch.bfloat16), torch.tensor([-1.0], dtype=torch.bfloat16)
    result = orpo_loss(a, b, odds_ratio_coef=0.1)
    assert result.loss.dtype == torch.float32
    assert result.chosen_reward_sum.item() == pytest.approx(6.907804, rel=1e-6)
    assert result.odds_ratio_loss_sum.item() == pytest.approx(0.000581778, rel=1e-5)


def test_of_sums_the_odds_are_those_of_the_probabilities() -> None:
    """The mistake of passing sums, -12 and -15: 1 - e^-12 is nearly 1, the log odds ratio 3.000006 hardly more than the
    difference."""
    result = orpo_loss(torch.tensor([-12.0]).double(), torch.tensor([-15.0]).double(), odds_ratio_coef=0.1)
    assert result.margin_sum.item() == pytest.approx(3.000006, abs=1e-6)


def test_metrics_are_sums_over_pairs() -> None:
    """Pairs (-.5, -1), (-1, -1) and (-3, -2.5): 1 + .5 + 0 right; nll .5 + 1 + 3; penalties .320300 + .693147 +
    .995743; losses .532030 + 1.069315 + 3.099574 = 4.700919; log odds .432752 - .541325 - 2.948931 = -3.057504 and
    -.541325 - .541325 - 2.414350 = -3.496999."""
    chosen = torch.tensor([-0.5, -1.0, -3.0], dtype=torch.float64)
    rejected = torch.tensor([-1.0, -1.0, -2.5], dtype=torch.float64)
    result = orpo_loss(chosen, rejected, odds_ratio_coef=0.1)
    assert result.correct_sum.item() == 1.5
    assert result.nll_sum.item() == 4.5
    assert result.odds_ratio_loss_sum.item() == pytest.approx(2.009190, abs=1e-6)
    assert result.loss_sum.item() == pytest.approx(4.700919, abs=1e-6)
    assert result.loss.item() == pytest.approx(4.700919 / 3, abs=1e-6)
    assert result.chosen_reward_sum.item() == pytest.approx(-3.057504, abs=1e-6)
    assert result.rejected_reward_sum.item() == pytest.approx(-3.496999, abs=1e-6)
    assert result.margin_sum.item() == pytest.approx(0.439496, abs=1e-6)
    assert result.pair_count.item() == 3
