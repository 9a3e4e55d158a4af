"""The terms of ILQL against values and derivatives worked out by hand, and where they lead when they are minimised."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from accord.losses import awac_loss, cql_loss, expectile_loss, ilql_advantages, polyak, q_loss
from accord.models.ilql import shaped_logits

# Two actions. The value after the second one is 0; the smaller target Q are [.5, .55], one from each head.
MASK = torch.tensor([[True, True]])
VALUES, REWARDS = [[0.2, 0.5]], [[0.0, 1.0]]
Q, TARGET_Q = [[[0.4, 0.7]], [[0.6, 0.6]]], [[[0.5, 0.9]], [[0.8, 0.55]]]


def double(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def gradient(tensor: Tensor) -> list:
    assert tensor.grad is not None
    return tensor.grad.tolist()


def test_q_learns_the_reward_and_the_value_of_what_follows() -> None:
    """Targets: 0 + .99 * .5 = .495 and 1 + .99 * 0 = 1. Errors of the heads: [-.095, -.3] and [.105, -.4]. Squares sum
    to .009025 + .09 + .011025 + .16 = .27005, over 2 actions .135025. Derivatives 2 error / 2 = the errors."""
    q = double(Q)
    result = q_loss(q, double(VALUES), double(REWARDS), MASK, gamma=0.99)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(0.135025, abs=1e-9)
    assert (result.loss_sum.item(), result.token_count.item()) == (pytest.approx(0.27005), 2)
    assert gradient(q)[0][0] == pytest.approx([-0.095, -0.3])
    assert gradient(q)[1][0] == pytest.approx([0.105, -0.4])


def test_values_approach_the_expectile_of_the_smaller_target() -> None:
    """tau = .7, u = [.5 - .2, .55 - .5] = [.3, .05], both positive: .7 (.09 + .0025) / 2 = .032375. Derivatives
    -2 * .7 u / 2 = [-.21, -.035]."""
    values = double(VALUES)
    result = expectile_loss(values, double(TARGET_Q), MASK, tau=0.7)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(0.032375, abs=1e-9)
    assert gradient(values)[0] == pytest.approx([-0.21, -0.035])


def test_a_value_above_its_target_weighs_one_minus_tau() -> None:
    """u = [.5 - .9, .55 - .5] = [-.4, .05]: (.3 * .16 + .7 * .0025) / 2 = .024875, derivatives [.3 * .4, -.7 * .05]."""
    values = double([[0.9, 0.5]])
    result = expectile_loss(values, double(TARGET_Q), MASK, tau=0.7)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(0.024875, abs=1e-9)
    assert gradient(values)[0] == pytest.approx([0.12, -0.035])


def test_imitation_weighs_tokens_by_the_exponential_of_their_advantage() -> None:
    """Advantages [.3, .05]; weights exp = [1.349859, 1.051271] at beta 1, exp(.6), exp(.1) at beta 2, 1 at beta 0.
    Log-probabilities [-1, -2]: (1.349859 + 2 * 1.051271) / 2 = 1.7262. Derivatives are minus half the weights."""
    target_q, values = double(TARGET_Q), double(VALUES)
    assert ilql_advantages(target_q, values, MASK).tolist()[0] == pytest.approx([0.3, 0.05])
    for beta, weights in [(1.0, [1.349859, 1.051271]), (2.0, [1.822119, 1.105171]), (0.0, [1.0, 1.0])]:
        logprobs = double([[-1.0, -2.0]])
        result = awac_loss(logprobs, target_q, values, MASK, beta=beta)
        result.loss.backward()
        assert result.loss.item() == pytest.approx((weights[0] + 2 * weights[1]) / 2, abs=1e-6)
        assert gradient(logprobs)[0] == pytest.approx([-w / 2 for w in weights], abs=1e-6)


def test_a_q_that_says_the_same_of_three_tokens_costs_ln_3_per_head() -> None:
    """ln 3 = 1.098612 each, 2.197225 together, whatever the constant. Derivatives wrt Q: (1/3 - [v is the token]) over
    2 actions: -1/3 for the token that was written, 1/6 for each of the others."""
    q = double([[[[5.0] * 3, [0.0] * 3]]] * 2)
    tokens = torch.tensor([[[[0], [2]]]] * 2)
    result = cql_loss(q.log_softmax(-1).gather(-1, tokens)[..., 0], MASK)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(2.197225, abs=1e-6)
    for head in gradient(q):
        assert head[0][0] == pytest.approx([-1 / 3, 1 / 6, 1 / 6])
        assert head[0][1] == pytest.approx([1 / 6, 1 / 6, -1 / 3])


def test_cql_prices_the_token_that_was_not_written() -> None:
    """Q = [ln 3, 0] for the token written and another one: -log(3/4) = .287682; Q = [0, ln 3]: -log(1/4) = 1.386294."""
    q = double([[[[math.log(3), 0.0]]], [[[0.0, math.log(3)]]]])
    result = cql_loss(q.log_softmax(-1)[..., 0], torch.tensor([[True]]))
    assert result.loss.item() == pytest.approx(0.287682 + 1.386294, abs=1e-6)


@pytest.mark.parametrize(
    ("targets", "tau", "expectile"),
    [
        ([0, 1], 0.7, 0.7),
        ([0] * 9 + [1], 0.9, 0.5),
        ([0, 1, 2], 0.5, 1.0),
        ([0, 1, 2], 0.7, 1.307692),
        ([0, 1, 2], 0.9, 1.727273),
        ([0, 1, 2], 0.99, 1.970297),
    ],
)
def test_the_loss_of_a_value_is_least_at_the_expectile(targets: list[int], tau: float, expectile: float) -> None:
    """Where tau * sum of (t - V) above = (1 - tau) * sum of (V - t) below. Targets 1 with probability p, else 0:
    V = p tau / (p tau + (1 - p)(1 - tau)), which is .35 / .5 = .7 and .09 / .18 = .5. Targets 0, 1, 2 with V above 1:
    tau (2 - V) = (1 - tau)(2 V - 1), V = (1 + tau) / (2 - tau): 1.7 / 1.3, 1.9 / 1.1, 1.99 / 1.01."""
    target_q = torch.tensor([[targets], [targets]], dtype=torch.float64)
    mask = torch.ones(1, len(targets), dtype=torch.bool)

    def slope(value: float) -> float:
        values = double([[value] * len(targets)])
        expectile_loss(values, target_q, mask, tau=tau).loss.backward()
        return sum(gradient(values)[0])

    assert slope(expectile) == pytest.approx(0, abs=1e-6)
    assert slope(expectile - 0.01) < -1e-4 and slope(expectile + 0.01) > 1e-4


def test_targets_lag_behind_by_the_power_of_what_is_kept() -> None:
    """From 0 towards 1: 1 - .9^10 = .651322 and 1 - .995^200 = .633042. The whole of it at rate 1, bit for bit."""
    for rate, times, expected in [(0.1, 10, 0.651322), (0.005, 200, 0.633042)]:
        targets = torch.zeros(1, dtype=torch.float64)
        for _ in range(times):
            targets = polyak(targets, torch.ones(1, dtype=torch.float64), rate=rate)
        assert targets.item() == pytest.approx(expected, abs=1e-6)
    values = torch.tensor([0.1, 1e30, -7.3])
    assert torch.equal(polyak(torch.tensor([0.3, -1.0, 2.0]), values, rate=1.0), values)
    assert torch.equal(polyak(values, values, rate=0.3), values)
    assert not polyak(values, values.clone().requires_grad_(), rate=0.3).requires_grad


def test_a_reward_at_the_end_is_worth_its_discount_at_the_start() -> None:
    """Three actions, reward 1 at the last: Q = gamma^2, gamma, 1 = .9801, .99, 1, and V, which sees one action only,
    the same. A table of Q and V, trained on all terms that touch it; both heads begin wrong in their own way."""
    mask, rewards = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    q, values = double([[[5.0, -3.0, 0.0]], [[0.0, 2.0, -4.0]]]), double([[1.0, -1.0, 3.0]])
    target_q = q.detach().clone()
    optimiser = torch.optim.SGD([q, values], lr=0.6)
    for _ in range(300):
        optimiser.zero_grad()
        term = q_loss(q, values, rewards, mask, gamma=0.99).loss + expectile_loss(values, target_q, mask, tau=0.7).loss
        term.backward()
        optimiser.step()
        target_q = polyak(target_q, q.detach(), rate=0.5)
    for head in (*q.tolist(), *target_q.tolist(), values.tolist()):
        assert head[0] == pytest.approx([0.9801, 0.99, 1.0], abs=1e-6)


@pytest.mark.parametrize(
    ("beta", "probabilities"),
    [
        (0.0, [0.211942, 0.211942, 0.576117]),
        (1.0, [0.331499, 0.121952, 0.546549]),
        (4.0, [0.721399, 0.013213, 0.265388]),
        (100.0, [1.0, 0.0, 0.0]),
    ],
)
def test_beta_moves_probability_to_the_best_advantage(beta: float, probabilities: list[float]) -> None:
    """Logits [0, 0, 1], Q [1, 0, .5] (of the smaller head), V = .5: advantages [.5, -.5, 0]. At beta 1 the weights are
    e^.5, e^-.5, e^1: of 4.973533, they are .331499, .121952, .546549. At beta 4: e^2, e^-2, e^1 of 10.242672."""
    q = torch.tensor([[[1.0, 0.7, 0.5]], [[1.5, 0.0, 0.5]]], dtype=torch.float64)
    logits = torch.tensor([[7.0, 7.0, 8.0]], dtype=torch.float64)
    shaped = shaped_logits(logits, q, torch.tensor([0.5], dtype=torch.float64), beta=beta)
    assert shaped.softmax(-1)[0].tolist() == pytest.approx(probabilities, abs=1e-6)
