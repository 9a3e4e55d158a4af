"""KL estimators: their exact expectations and expected gradients in a three-way example, and the coefficient's
controller.

pi = (.5, .3, .2), ref = (.4, .4, .2): KL(pi || ref) = .5 ln(5/4) + .3 ln(3/4) = .02526715.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from accord.losses import adaptive_kl_coef, categorical_kl, kl_k1, kl_k2, kl_k3, token_rewards

PI = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REF = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
Estimator = Callable[[Tensor, Tensor], Tensor]


@pytest.mark.parametrize(("estimator", "expectation"), [(kl_k1, 0.02526715), (kl_k2, 0.02486241), (kl_k3, 0.02526715)])
def test_expectation_under_the_policy(estimator: Estimator, expectation: float) -> None:
    """k1 and k3 average to the KL, k2 to half the mean squared log-ratio; k3 the wrong way round would give
    .02473285."""
    assert (PI * estimator(PI.log(), REF.log())).sum().item() == pytest.approx(expectation, abs=1e-8)


def test_k3_of_nearly_equal_probabilities_is_not_lost_to_rounding() -> None:
    """x = .001: x^2 / 2 - x^3 / 6 = 4.99833e-7. exp(-x) - 1 + x in float32 is off by a tenth of that."""
    assert kl_k3(torch.tensor(0.001), torch.tensor(0.0)).item() == pytest.approx(4.99833e-7, rel=1e-3)


def test_expectations_far_from_the_reference() -> None:
    """pi = (.5, .5), ref = (.9, .1): KL = .5 ln(5/9) + .5 ln 5 = .510826; k2 .733946."""
    pi, ref = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.9, 0.1], dtype=torch.float64)
    means = [(pi * estimator(pi.log(), ref.log())).sum().item() for estimator in (kl_k1, kl_k2, kl_k3)]
    assert means == pytest.approx([0.510826, 0.733946, 0.510826], abs=1e-6)


def in_the_reward(estimator: Estimator) -> Tensor:
    """Expected policy gradient of a cost that is the estimate: E[k(a) grad log pi(a)], no gradient through k."""
    logits = PI.log().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    (PI * estimator(logprobs.detach(), REF.log()) * logprobs).sum().backward()
    assert logits.grad is not None
    return logits.grad


def as_a_loss(estimator: Estimator) -> Tensor:
    """Expected gradient of the estimate itself at samples of the policy: E[grad k(a)]."""
    logits = PI.log().requires_grad_()
    (PI * estimator(torch.log_softmax(logits, 0), REF.log())).sum().backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize(
    ("gradient", "estimator", "expected"),
    [
        (in_the_reward, kl_k1, [0.098938, -0.093885, -0.005053]),
        (as_a_loss, kl_k2, [0.098938, -0.093885, -0.005053]),
        (as_a_loss, kl_k1, [0.0, 0.0, 0.0]),
        (as_a_loss, kl_k3, [0.1, -0.1, 0.0]),
        (in_the_reward, kl_k3, [-0.001062, 0.006115, -0.005053]),
        (in_the_reward, kl_k2, [0.000017, 0.004955, -0.004972]),
    ],
)
def test_expected_gradient(
    gradient: Callable[[Estimator], Tensor], estimator: Estimator, expected: list[float]
) -> None:
    """grad KL(pi || ref) wrt the softmax logits is pi (x - KL), x = ln(pi / ref): .5 (.223144 - .025267) = .098938,
    .3 (-.287682 - .025267) = -.093885, .2 (0 - .025267) = -.005053. It is what k1 in the reward and k2 as a loss give.
    k3 as a loss gives grad KL(ref || pi) = pi - ref = (.1, -.1, 0); k1 as a loss gives nothing."""
    assert gradient(estimator).tolist() == pytest.approx(expected, abs=1e-6)


def test_exact_kl_and_its_gradient() -> None:
    logits = PI.log().requires_grad_()
    kl = categorical_kl(logits + 3.0, REF.log())  # logits need not be normalised
    kl.backward()
    assert logits.grad is not None
    assert kl.item() == pytest.approx(0.02526715, abs=1e-8)
    assert logits.grad.tolist() == pytest.approx([0.098938, -0.093885, -0.005053], abs=1e-6)


def test_exact_kl_with_impossible_outcomes() -> None:
    """p = (1, 0) against (.5, .5): ln 2, the impossible outcome adds 0 and no NaN to the gradient. The other way:
    inf."""
    certain, fair = torch.tensor([0.0, -math.inf], requires_grad=True), torch.zeros(2)
    kl = categorical_kl(certain, fair)
    kl.backward()
    assert certain.grad is not None
    assert kl.item() == pytest.approx(math.log(2))
    assert certain.grad.tolist() == [0.0, 0.0]
    assert categorical_kl(fair, certain.detach()).item() == math.inf


def test_exact_kl_of_low_precision_logits_is_computed_in_float32() -> None:
    """2, 1, 0 against 0, 0, 0: KL = ln 3 - entropy of softmax(2, 1, 0) = 1.098612 - .832396 = .266217."""
    p, q = torch.tensor([2.0, 1.0, 0.0]).bfloat16(), torch.zeros(3).bfloat16()
    assert categorical_kl(p, q).item() == pytest.approx(0.266217, abs=1e-6)
    assert categorical_kl(p, q.float()).item() == pytest.approx(0.266217, abs=1e-6)
    assert categorical_kl(p.float(), q).item() == pytest.approx(0.266217, abs=1e-6)


def test_shaping_with_k1_keeps_the_sequence_kl() -> None:
    """pi .5 .4 .8 .9, ref .4 .5 .8 .6, coefficient .05, score 1.5: k1 = .223144 -.223144 0 .405465, whose sum .405465
    is the log-ratio of the whole sequence, ln(.144 / .096); rewards -.011157 .011157 0 1.5 - .020273 = 1.479727."""
    pi = torch.tensor([[0.5, 0.4, 0.8, 0.9]], dtype=torch.float64)
    ref = torch.tensor([[0.4, 0.5, 0.8, 0.6]], dtype=torch.float64)
    k1 = kl_k1(pi.log(), ref.log())
    assert k1.sum().item() == pytest.approx((pi.prod() / ref.prod()).log().item())
    assert kl_k3(pi.log(), ref.log())[0].tolist() == pytest.approx([0.023144, 0.026856, 0.0, 0.072132], abs=1e-6)
    rewards = token_rewards(torch.tensor([1.5], dtype=torch.float64), 0.05 * k1, torch.ones(1, 4, dtype=torch.bool))
    assert rewards[0].tolist() == pytest.approx([-0.011157, 0.011157, 0.0, 1.479727], abs=1e-6)


@pytest.mark.parametrize(
    ("observed_kl", "factor"), [(12.0, 1.01024), (7.0, 1.008533), (6.0, 1.0), (3.0, 0.98976), (-1.0, 0.98976)]
)
def test_controller_step(observed_kl: float, factor: float) -> None:
    """Target 6, 512 samples, horizon 10,000: the largest step is .2 * .0512 = .01024; at 7 it is .0512 / 6 =
    .008533."""
    new = adaptive_kl_coef(0.15, observed_kl, target_kl=6.0, horizon=10_000, num_samples=512)
    assert new / 0.15 == pytest.approx(factor, abs=1e-6)


def test_controller_over_a_hundred_updates() -> None:
    """.15 * 1.01024^100 = .415477."""
    kl_coef = 0.15
    for _ in range(100):
        kl_coef = adaptive_kl_coef(kl_coef, 12.0, target_kl=6.0, horizon=10_000, num_samples=512)
    assert kl_coef == pytest.approx(0.415477, abs=1e-6)
