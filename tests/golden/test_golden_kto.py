"""KTO and BCO against values and derivatives worked out by hand. s(x) = 1 / (1 + exp(-x)); beta = .1 throughout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accord.losses import bco_loss, class_weights, kto_loss, kto_reference_point

DESIRABLE, UNDESIRABLE = torch.tensor([True]), torch.tensor([False])


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def point(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("log_ratio", "z0", "desirable", "undesirable", "slope"),
    [
        (0.0, 0.0, 0.5, 0.5, 0.025),
        (1.0, 0.0, 0.475021, 0.524979, 0.024938),
        (-1.0, 0.0, 0.524979, 0.475021, 0.024938),
        (1.0, 0.5, 0.487503, 0.512497, 0.024984),
        (-1.0, 0.5, 0.537430, 0.462570, 0.024860),
        (20.0, 0.0, 0.119203, 0.880797, 0.010499),
    ],
)
def test_kto(log_ratio: float, z0: float, desirable: float, undesirable: float, slope: float) -> None:
    """s(-d) and s(d) with d = .1 (log-ratio - z0) = 0, .1, -.1, .05, -.15, 2; derivatives -+.1 s(d) s(-d): it shrinks
    to .1 * .104994 at d = 2."""
    for kind, value, gradient in [(DESIRABLE, desirable, -slope), (UNDESIRABLE, undesirable, slope)]:
        policy = double(log_ratio - 7).requires_grad_()
        result = kto_loss(policy, double(-7), kind, point(z0), beta=0.1)
        result.loss.backward()
        assert policy.grad is not None
        assert result.loss.item() == pytest.approx(value, abs=1e-6)
        assert policy.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_kto_weighs_the_two_kinds() -> None:
    """Both at the reference point: (1.5 * .5 + 3 * .5) / 2 = 1.125, derivatives -1.5 * .025 / 2 and 3 * .025 / 2."""
    policy = double(-4, -5).requires_grad_()
    kinds = torch.tensor([True, False])
    result = kto_loss(policy, double(-4, -5), kinds, point(0), beta=0.1, desirable_weight=1.5, undesirable_weight=3.0)
    result.loss.backward()
    assert policy.grad is not None
    assert result.loss.item() == 1.125
    assert policy.grad.tolist() == pytest.approx([-0.01875, 0.0375])


def test_kto_metrics_are_sums() -> None:
    """Log-ratios 1, .5, 0 (desirable) and .5, -1 (not) against z0 = .5: d = .05, 0, -.05, and 0, -.15. Right: the
    first, the last, and half of the two ties. Rewards .1 + .05 + 0 and .05 - .1. Losses .487503 + .5 + .512497 + .5 +
    .462570."""
    policy, kinds = double(1, 0.5, 0, 0.5, -1), torch.tensor([True, True, True, False, False])
    result = kto_loss(policy, torch.zeros_like(policy), kinds, point(0.5), beta=0.1)
    assert result.correct_sum.item() == 3.0
    assert result.desirable_reward_sum.item() == pytest.approx(0.15)
    assert result.undesirable_reward_sum.item() == pytest.approx(-0.05)
    assert (result.desirable_count.item(), result.undesirable_count.item()) == (3, 2)
    assert result.loss_sum.item() == pytest.approx(2.462570, abs=1e-6)
    assert result.loss.item() == pytest.approx(2.462570 / 5, abs=1e-6)


@pytest.mark.parametrize(("log_ratios", "z0"), [([0.4, -0.9, 0.2], 0.0), ([0.4, 0.9, 0.2], 0.5), ([], 0.0)])
def test_kto_reference_point(log_ratios: list[float], z0: float) -> None:
    """Means -.1, clamped, and .5. Clamping each first would give .2 for the first row."""
    policy = (double(*log_ratios) - 3).requires_grad_()
    result = kto_reference_point(policy, torch.full_like(policy, -3.0))
    assert result.shape == ()
    assert not result.requires_grad
    assert result.item() == pytest.approx(z0, abs=1e-12)


@pytest.mark.parametrize(
    ("log_ratio", "shift", "desirable", "undesirable", "desirable_gradient", "undesirable_gradient"),
    [
        (0.0, 0.0, 0.693147, 0.693147, -0.05, 0.05),
        (1.0, 0.0, 0.644397, 0.744397, -0.047502, 0.052498),
        (-1.0, 0.0, 0.744397, 0.644397, -0.052498, 0.047502),
        (1.0, 0.3, 0.798139, 0.598139, -0.054983, 0.045017),
    ],
)
def test_bco(
    log_ratio: float,
    shift: float,
    desirable: float,
    undesirable: float,
    desirable_gradient: float,
    undesirable_gradient: float,
) -> None:
    """-log s(d) and -log s(-d) with d = .1 log-ratio - shift = 0, .1, -.1, -.2; derivatives -.1 s(-d) and .1 s(d). The
    second and third row make the paired example at shift 0: .644397 + .644397 = 1.288793, at zero 1.386294."""
    rows = [(DESIRABLE, desirable, desirable_gradient), (UNDESIRABLE, undesirable, undesirable_gradient)]
    for kind, value, gradient in rows:
        policy = double(log_ratio - 7).requires_grad_()
        result = bco_loss(policy, double(-7), kind, point(shift), beta=0.1)
        result.loss.backward()
        assert policy.grad is not None
        assert result.loss.item() == pytest.approx(value, abs=1e-6)
        assert policy.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_bco_metrics_are_sums() -> None:
    """Log-ratios 1 (desirable) and -1, 2, -3 (not) against shift .1: d = 0, -.2, .1, -.4. Right: half the first, the
    second, the last. Rewards .1 and -.1 + .2 - .3. Losses .693147 + .598139 + .744397 + .513015 = 2.548698."""
    policy, kinds = double(1, -1, 2, -3), torch.tensor([True, False, False, False])
    result = bco_loss(policy, torch.zeros_like(policy), kinds, point(0.1), beta=0.1)
    assert result.correct_sum.item() == 2.5
    assert result.desirable_reward_sum.item() == pytest.approx(0.1)
    assert result.undesirable_reward_sum.item() == pytest.approx(-0.2)
    assert (result.desirable_count.item(), result.undesirable_count.item()) == (1, 3)
    assert result.loss_sum.item() == pytest.approx(2.548698, abs=1e-6)
    assert result.loss.item() == pytest.approx(2.548698 / 4, abs=1e-6)


def test_bco_ends_where_the_reward_is_the_log_odds_of_being_desirable() -> None:
    """Ten judgements of one completion, seven of them desirable: the slope is 0 where .1 log-ratio - .3 = logit(.7) =
    .847298, at log-ratio 11.472979."""
    kinds = torch.arange(10) < 7
    log_ratio = double(11.472979).requires_grad_()
    bco_loss(log_ratio.expand(10), double(*[0] * 10), kinds, point(0.3), beta=0.1).loss.backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad.item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize(
    ("num_desirable", "num_undesirable", "weights"),
    [
        (100, 100, (1.0, 1.0)),
        (1, 1, (1.0, 1.0)),
        (4, 3, (1.0, 1.0)),
        (5, 4, (1.0, 1.0)),
        (30, 120, (4.0, 1.0)),
        (99, 100, (100 / 99, 1.0)),
        (100, 10, (1.0, 7.5)),
        (3, 2, (1.0, 1.125)),
    ],
)
def test_class_weights(num_desirable: int, num_undesirable: int, weights: tuple[float, float]) -> None:
    """w_D n_D / (w_U n_U): 1, 4/3 and 5/4 are inside [1, 4/3]. 30 / 120 is raised to 1 by w_D = 4; 100 / 10 is lowered
    to 4/3 by w_U = 7.5; 3 / 2 by 9 / 8."""
    assert class_weights(num_desirable, num_undesirable) == pytest.approx(weights)


@pytest.mark.parametrize("numbers", [(0, 5), (5, 0)])
def test_class_weights_need_both_kinds(numbers: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"found {numbers[0]} and {numbers[1]}"):
        class_weights(*numbers)
