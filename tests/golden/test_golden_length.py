"""Length decorrelation against correlations and angles computed by hand."""

from __future__ import annotations

import pytest
import torch

from accord.losses import alignment_penalty, length_penalty


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_correlations_with_length() -> None:
    """Lengths 1 2 3 centred are -1 0 1. Scores 0 1 5 centred are -2 -1 3: r = (2 + 0 + 3) / sqrt(14 * 2) = .944911.
    Scores 3 0 0 centred are 2 -1 -1: r = -3 / sqrt(6 * 2) = -.866025. Length head 2 0 7 centred is -1 -3 4: r = 5 /
    sqrt(26 * 2) = .693375. Loss: (.944911 + .866025) / 2 - .693375 = .212093."""
    quality = torch.stack([double(0, 1, 5), double(3, 0, 0)], dim=1)
    result = length_penalty(quality, double(2, 0, 7), torch.tensor([1, 2, 3]))
    assert result.quality.tolist() == pytest.approx([0.944911, -0.866025], abs=1e-6)
    assert result.length_head.item() == pytest.approx(0.693375, abs=1e-6)
    assert result.loss.item() == pytest.approx(0.212093, abs=1e-6)


def test_the_derivative_of_the_correlation() -> None:
    """dr/dx_i = (y_i / sqrt(sum y^2) - r x_i / sqrt(sum x^2)) / sqrt(sum x^2), x and y centred. For scores 0 1 5: sum
    x^2 = 14, sqrt = 3.741657, y / sqrt(2) = -.707107 0 .707107, r x / 3.741657 = -.505076 -.252538 .757614: minus
    each, over 3.741657: -.053995 .067494 -.013499."""
    scores = double(0, 1, 5).requires_grad_()
    constant = double(1, 1, 1).requires_grad_()
    length_penalty(scores[:, None], constant, torch.tensor([1, 2, 3])).loss.backward()
    assert scores.grad is not None and constant.grad is not None
    assert scores.grad.tolist() == pytest.approx([-0.053995, 0.067494, -0.013499], abs=1e-6)
    assert constant.grad.tolist() == [0, 0, 0], "the correlation of constants is 0 and has no derivative"


@pytest.mark.parametrize("value", [0.0, 0.1, -3e5])
def test_scores_or_lengths_all_alike_have_no_correlation(value: float) -> None:
    """The mean of seven times 0.1 misses it by a rounding: that is no variance."""
    alike = torch.full((7, 1), value, dtype=torch.float64).requires_grad_()
    varied = torch.arange(7.0)
    result = length_penalty(alike, varied, torch.arange(7))
    result.loss.backward()
    assert result.quality.item() == 0 and result.length_head.item() == pytest.approx(1)
    assert alike.grad is not None and not alike.grad.any()
    assert length_penalty(varied[:, None], varied, torch.full((7,), 9)).loss.item() == 0


def test_angle_to_the_length_head() -> None:
    """(3, 4) and (1, 0): cosine 3/5; (0, -2) and (1, 0): 0; mean .3. Of w = (3, 4) the derivative of w.l / |w| is l /
    |w| - (w.l) w / |w|^3 = (.2 - 9/125, -12/125) = (.128, -.096), halved by the mean."""
    weights = torch.stack([double(3, 4), double(0, -2)]).requires_grad_()
    penalty = alignment_penalty(weights, double(1, 0))
    penalty.backward()
    assert penalty.item() == pytest.approx(0.3)
    assert weights.grad is not None
    assert weights.grad[0].tolist() == pytest.approx([0.064, -0.048])
    assert weights.grad[1].tolist() == [0, 0]
    assert alignment_penalty(10 * weights, double(0.1, 0)).item() == pytest.approx(0.3), "size is not the angle"
    assert alignment_penalty(0.01 * weights, double(0.1, 0)).item() == pytest.approx(0.3)
    assert alignment_penalty(torch.zeros(2, 2), torch.zeros(2)).item() == 0
    low = alignment_penalty(weights.bfloat16(), double(1, 0).bfloat16())
    assert (low.dtype, low.item()) == (torch.float32, pytest.approx(0.3, rel=1e-6)), "3, 4 and 2 are exact in 16 bits"


def test_correlations_to_be_logged_carry_no_gradient_and_shapes_must_fit() -> None:
    scores = double(1, 2, 4).requires_grad_()
    result = length_penalty(scores[:, None], scores, torch.tensor([1, 2, 3]))
    assert result.loss.requires_grad and not result.quality.requires_grad and not result.length_head.requires_grad
    for quality, length, lengths in ((3, 3, 1), (3, 1, 3), (1, 3, 3)):
        with pytest.raises(ValueError, match="expected equal shapes"):
            length_penalty(torch.zeros(quality, 2), torch.zeros(length), torch.zeros(lengths))
