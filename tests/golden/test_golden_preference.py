"""The losses of preference pairs against values and derivatives worked out by hand.

The pair of most tests: log policy -12 (chosen) and -15 (rejected), log reference -13 and -14, so the log-ratios are
w = 1 and l = -1 and D = 2; with beta = .1, beta D = .2. s(x) = 1 / (1 + exp(-x)):

    x      s(x)      -log s(x)   s(x) s(-x)
    0      .5        .693147     .25
    .1     .524979   .644397     .249376
    .2     .549834   .598139     .247517
    .3     .574443   .554355
    1      .731059   .313262
    2      .880797   .126928
    s(-x) = 1 - s(x), and -log s(-x) = x - log s(x).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from accord.losses import (
    PreferenceLoss,
    apo_down_loss,
    apo_zero_loss,
    conservative_dpo_loss,
    cpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    mean_logprobs,
    rdpo_loss,
    robust_dpo_loss,
    sequence_logprobs,
    sft_loss,
    simpo_loss,
)

Loss = Callable[..., PreferenceLoss]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_pair(loss: Loss, chosen: float, rejected: float, *reference: float, **options: Any) -> tuple[float, ...]:
    """(loss, its derivative wrt the chosen log-probability, and wrt the rejected one)."""
    policy = [double(chosen).requires_grad_(), double(rejected).requires_grad_()]
    result = loss(*policy, *(double(x) for x in reference), **options)
    gradients = torch.autograd.grad(result.loss, policy)
    return result.loss.item(), *(gradient.item() for gradient in gradients)


def near(*expected: float) -> object:
    return pytest.approx(expected, abs=1e-6)


def test_dpo() -> None:
    """-log s(.2) = .598139, derivative -.1 s(-.2) = -.045017 wrt the chosen and the opposite wrt the rejected
    log-probability."""
    assert one_pair(dpo_loss, -12, -15, -13, -14, beta=0.1) == near(0.598139, -0.045017, 0.045017)


@pytest.mark.parametrize(
    ("margin", "soft_label", "value", "gradient"),
    [
        (0.0, 0.7, 0.658139, -0.015017),
        (0.1, 1.0, 0.644397, -0.047502),
        (0.2, 1.0, 0.693147, -0.05),
        (-0.1, 1.0, 0.554355, -0.042556),
        (0.1, 0.7, 0.674397, -0.017502),
        (0.2, 0.3, 0.693147, 0.02),
    ],
)
def test_dpo_with_soft_labels_and_margins(margin: float, soft_label: float, value: float, gradient: float) -> None:
    """p -log s(d) + (1 - p) -log s(-d) = -log s(d) + (1 - p) d with d = .2 - m, derivative beta (s(d) - p):
    p = .7: .598139 + .3 * .2 = .658139 and .1 (.549834 - .7). m = .1: d = .1, .644397 and -.1 s(-.1); m = .2 = beta D:
    ln 2. p = .7, m = .1: .644397 + .3 * .1 and .1 (.524979 - .7). p = .3, d = 0: ln 2 and .1 (.5 - .3)."""
    found = one_pair(dpo_loss, -12, -15, -13, -14, beta=0.1, margins=double(margin), soft_labels=double(soft_label))
    assert found == near(value, gradient, -gradient)


@pytest.mark.parametrize(
    ("eps", "value", "gradient"),
    [(0.0, 0.598139, -0.045017), (0.1, 0.618139, -0.035017), (0.2, 0.638139, -0.025017), (0.5, 0.698139, 0.004983)],
)
def test_conservative_dpo(eps: float, value: float, gradient: float) -> None:
    """-log s(.2) + eps * .2, derivative .1 (s(.2) - (1 - eps)). At eps = .5 it only pulls D to 0."""
    found = one_pair(conservative_dpo_loss, -12, -15, -13, -14, beta=0.1, label_smoothing=eps)
    assert found == near(value, gradient, -gradient)


def test_the_minimum_of_conservative_dpo() -> None:
    """eps = .1: beta D = ln 9 = 2.197225, where the loss is the entropy of (.9, .1), .325083, and the slope 0."""
    found = one_pair(conservative_dpo_loss, 10 * math.log(9), 0, 0, 0, beta=0.1, label_smoothing=0.1)
    assert found == near(0.325083, 0.0, 0.0)


@pytest.mark.parametrize(
    ("eps", "value", "gradient"),
    [(0.0, 0.598139, -0.045017), (0.1, 0.573139, -0.057517), (0.2, 0.531472, -0.078350)],
)
def test_robust_dpo(eps: float, value: float, gradient: float) -> None:
    """(.9 * .598139 - .1 * .798139) / .8 = .573139, derivative .1 (-.9 s(-.2) - .1 s(.2)) / .8 = -.057517; with .2:
    (.8 * .598139 - .2 * .798139) / .6 and .1 (-.8 s(-.2) - .2 s(.2)) / .6."""
    found = one_pair(robust_dpo_loss, -12, -15, -13, -14, beta=0.1, label_smoothing=eps)
    assert found == near(value, gradient, -gradient)


@pytest.mark.parametrize("eps", [0.1, 0.2, 0.45])
def test_robust_dpo_averaged_over_flips_is_dpo_of_clean_labels(eps: float) -> None:
    """(1 - eps) L(w, l) + eps L(l, w) = .598139 with its gradient, as soft labels say it and as flipped pairs do."""
    options: dict[str, Any] = {"beta": 0.1, "label_smoothing": eps}
    soft = one_pair(robust_dpo_loss, -12, -15, -13, -14, soft_labels=double(1 - eps), **options)
    assert soft == near(0.598139, -0.045017, 0.045017)
    kept = one_pair(robust_dpo_loss, -12, -15, -13, -14, **options)
    flipped = one_pair(robust_dpo_loss, -15, -12, -14, -13, **options)
    assert (1 - eps) * kept[0] + eps * flipped[0] == pytest.approx(0.598139, abs=1e-6)
    assert (1 - eps) * kept[1] + eps * flipped[2] == pytest.approx(-0.045017, abs=1e-6)


@pytest.mark.parametrize("loss", [conservative_dpo_loss, robust_dpo_loss])
def test_smoothed_losses_with_soft_labels_and_margins(loss: Loss) -> None:
    """Both are DPO with another label: q = (1 - eps) p + eps (1 - p) and q = (p - eps) / (1 - 2 eps). With p = .7,
    eps = .1, m = .1 (d = .1): q = .66 and .75, -log s(.1) + (1 - q) .1 = .678397 and .669397, derivative
    .1 (.524979 - q)."""
    q = {conservative_dpo_loss: 0.66, robust_dpo_loss: 0.75}[loss]
    options = {"beta": 0.1, "label_smoothing": 0.1, "soft_labels": double(0.7), "margins": double(0.1)}
    gradient = 0.1 * (0.524979 - q)
    assert one_pair(loss, -12, -15, -13, -14, **options) == near(0.644397 + (1 - q) * 0.1, gradient, -gradient)


@pytest.mark.parametrize(
    ("tau", "soft_label", "value", "gradient"),
    [(0.1, 1.0, 9.0, -6.0), (0.5, 1.0, 1.0, 2.0), (0.1, 0.7, 21.0, 0.0), (0.1, 0.0, 49.0, 14.0)],
)
def test_ipo(tau: float, soft_label: float, value: float, gradient: float) -> None:
    """(D - 1 / (2 tau))^2 at D = 2: (2 - 5)^2 and (2 - 1)^2, derivative twice the difference. With p = .7, .7 * 9 +
    .3 * (-2 - 5)^2 = 21, and D = 2 = (2 p - 1) / (2 tau) is the minimum."""
    found = one_pair(ipo_loss, -12, -15, -13, -14, tau=tau, soft_labels=double(soft_label))
    assert found == near(value, gradient, -gradient)


def test_ipo_of_log_probabilities_per_token() -> None:
    """4 and 6 tokens: w = 1 / 4, l = -1 / 6, D = .416667, (.416667 - 5)^2 = 21.006944: another loss altogether."""
    value, *_ = one_pair(ipo_loss, -12 / 4, -15 / 6, -13 / 4, -14 / 6, tau=0.1)
    assert value == pytest.approx(21.006944, abs=1e-6)


@pytest.mark.parametrize(
    ("beta", "margin", "soft_label", "value", "gradient"),
    [
        (0.1, 0.0, 1.0, 0.8, -0.1),
        (1.0, 0.0, 1.0, 0.0, 0.0),
        (1.0, 1.5, 1.0, 0.5, -1.0),
        (0.1, 0.0, 0.7, 0.92, -0.04),
        (0.1, 0.5, 0.7, 1.12, -0.04),
        (1.0, 0.5, 0.7, 0.75, 0.3),
    ],
)
def test_hinge(beta: float, margin: float, soft_label: float, value: float, gradient: float) -> None:
    """max(0, 1 + m - beta D): 1 - .2; 1 - 2 < 0; 1 + 1.5 - 2. The other way round it is max(0, 1 - m + beta D): with
    p = .7, .7 * .8 + .3 * 1.2 and slope .1 (.3 - .7); m = .5: .7 * 1.3 + .3 * .7; beta = 1, m = .5: .7 * 0 + .3 * 2.5
    and slope .3."""
    labels = {"margins": double(margin), "soft_labels": double(soft_label)}
    assert one_pair(hinge_loss, -12, -15, -13, -14, beta=beta, **labels) == near(value, gradient, -gradient)


@pytest.mark.parametrize(
    ("chosen_length", "rejected_length", "value", "gradient"),
    [(4, 6, 0.644397, -0.047502), (6, 4, 0.554355, -0.042556), (5, 5, 0.598139, -0.045017)],
)
def test_rdpo(chosen_length: int, rejected_length: int, value: float, gradient: float) -> None:
    """alpha = .05: .2 + .05 (4 - 6) = .1 and .2 + .05 (6 - 4) = .3. The longer chosen answer learns less: length
    explains a part of it."""
    lengths = {"chosen_lengths": torch.tensor([chosen_length]), "rejected_lengths": torch.tensor([rejected_length])}
    found = one_pair(rdpo_loss, -12, -15, -13, -14, beta=0.1, length_coef=0.05, **lengths)
    assert found == near(value, gradient, -gradient)


def test_rdpo_with_soft_labels_and_margins() -> None:
    """Lengths 4 and 6, alpha .05, m = -.1: d = .2 - .1 + .1 = .2; p = .7: .598139 + .3 * .2 and .1 (.549834 - .7)."""
    options: dict[str, Any] = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([6])}
    options |= {"margins": double(-0.1), "soft_labels": double(0.7)}
    found = one_pair(rdpo_loss, -12, -15, -13, -14, beta=0.1, length_coef=0.05, **options)
    assert found == near(0.658139, -0.015017, 0.015017)


@pytest.mark.parametrize(
    ("chosen", "rejected", "beta", "gamma", "value", "gradient"),
    [
        (-3.0, -2.5, 2.0, 1.0, 2.126928, -1.761594),
        (-3.0, -3.0, 2.0, 1.0, 1.313262, -1.462117),
        (-3.0, -3.0, 10.0, 3.0, 3.048587, -9.525741),
        (-2.5, -3.0, 2.0, 0.0, 0.313262, -0.537883),
    ],
)
def test_simpo(chosen: float, rejected: float, beta: float, gamma: float, value: float, gradient: float) -> None:
    """-log s(beta (chosen - rejected) - gamma): -log s(-2) = 2.126928, derivative -2 s(2); -log s(-1); -log s(-3) =
    ln(1 + e^3), derivative -10 s(3) = -10 * .952574; -log s(1), derivative -2 s(-1)."""
    assert one_pair(simpo_loss, chosen, rejected, beta=beta, gamma=gamma) == near(value, gradient, -gradient)


def test_simpo_with_soft_labels_and_margins() -> None:
    """2 (-2.5 + 3) - m = 1 - .5 = .5; either side has to win by gamma = 1.5: .7 -log s(-1) + .3 -log s(-2) = .7 *
    1.313262 + .3 * 2.126928 = 1.557362, derivative 2 (-.7 s(1) + .3 s(2)) = -.495004."""
    labels = {"margins": double(0.5), "soft_labels": double(0.7)}
    found = one_pair(simpo_loss, -2.5, -3.0, beta=2.0, gamma=1.5, **labels)
    assert found == near(1.557362, -0.495004, 0.495004)


def test_cpo() -> None:
    """DPO without a reference: -log s(.1 * 3) = .554355, derivative -.1 s(-.3)."""
    assert one_pair(cpo_loss, -12, -15, beta=0.1) == near(0.554355, -0.042556, 0.042556)


def test_cpo_with_soft_labels_and_margins() -> None:
    """m = .1: d = .2; p = .7: .598139 + .3 * .2 and .1 (.549834 - .7)."""
    labels = {"margins": double(0.1), "soft_labels": double(0.7)}
    assert one_pair(cpo_loss, -12, -15, beta=0.1, **labels) == near(0.658139, -0.015017, 0.015017)


def test_cpo_and_its_supervised_term() -> None:
    """Four chosen tokens at -3 and five rejected ones at -3: .554355 + 3.0 = 3.554355. A chosen token has derivative
    -.042556 - 1 / 4, a rejected one .042556, the padding 0."""
    logprobs = torch.full((2, 5), -3.0, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 4 + [False], [True] * 5])
    chosen, rejected = sequence_logprobs(logprobs, mask).chunk(2)
    loss = cpo_loss(chosen, rejected, beta=0.1).loss + sft_loss(logprobs[:1], mask[:1]).loss
    loss.backward()
    assert logprobs.grad is not None
    assert loss.item() == pytest.approx(3.554355, abs=1e-6)
    assert logprobs.grad[0].tolist() == pytest.approx([-0.292556] * 4 + [0.0], abs=1e-6)
    assert logprobs.grad[1].tolist() == pytest.approx([0.042556] * 5, abs=1e-6)


def test_apo_zero() -> None:
    """1 - s(.1) + s(-.1) = .950042, derivatives -.1 s(.1) s(-.1) and +.1 s(-.1) s(.1): each side by itself."""
    assert one_pair(apo_zero_loss, -12, -15, -13, -14, beta=0.1) == near(0.950042, -0.024938, 0.024938)


def test_apo_zero_leaves_a_decided_completion_alone() -> None:
    """w = 100 at beta = 1 is done, l = 0 is not: loss 0 + .5, derivatives 0 and .25."""
    assert one_pair(apo_zero_loss, 100, 0, 0, 0, beta=1.0) == near(0.5, 0.0, 0.25)


def test_apo_down() -> None:
    """s(.1) + 1 - s(.2) = .975145, derivatives .1 (.249376 - .247517) = .000186 and .1 * .247517: both go down."""
    assert one_pair(apo_down_loss, -12, -15, -13, -14, beta=0.1) == near(0.975145, 0.000186, 0.024752)


def test_metrics_are_sums_over_pairs() -> None:
    """w = 1, 3, 3, -2 and l = -1, 0, 3, -2 with beta = .1: D = 2, 3, 0, 0, so 1 + 1 + .5 + .5 are right; rewards .1 +
    .3 + .3 - .2 and -.1 + 0 + .3 - .2, margins .2 + .3. Losses .598139 + .554355 + 2 * .693147 = 2.538789."""
    policy = double(-12, 0, 0, -5), double(-15, -7, -4, -8)
    result = dpo_loss(*policy, double(-13, -3, -3, -3), double(-14, -7, -7, -6), beta=0.1)
    assert result.correct_sum.item() == 3.0
    assert result.chosen_reward_sum.item() == pytest.approx(0.5)
    assert result.rejected_reward_sum.item() == pytest.approx(0.0, abs=1e-12)
    assert result.margin_sum.item() == pytest.approx(0.5)
    assert result.loss_sum.item() == pytest.approx(2.538789, abs=1e-6)
    assert result.loss.item() == pytest.approx(2.538789 / 4, abs=1e-6)
    assert result.pair_count.item() == 4


LENGTHS = {"length_coef": 9.0, "chosen_lengths": double(1), "rejected_lengths": double(2)}


@pytest.mark.parametrize(
    ("loss", "options", "chosen_reward", "rejected_reward"),
    [
        (dpo_loss, {"beta": 0.5, "margins": double(7)}, 0.5, -0.5),
        (conservative_dpo_loss, {"beta": 0.5, "label_smoothing": 0.3}, 0.5, -0.5),
        (robust_dpo_loss, {"beta": 0.5, "label_smoothing": 0.3}, 0.5, -0.5),
        (ipo_loss, {"tau": 0.5}, 0.5, -0.5),
        (hinge_loss, {"beta": 0.5}, 0.5, -0.5),
        (rdpo_loss, {"beta": 0.5, **LENGTHS}, 0.5, -0.5),
        (simpo_loss, {"beta": 2.0, "gamma": 9.0}, -24.0, -30.0),
        (cpo_loss, {"beta": 0.5}, -6.0, -7.5),
        (apo_zero_loss, {"beta": 0.5}, 0.5, -0.5),
        (apo_down_loss, {"beta": 0.5}, 0.5, -0.5),
    ],
)
def test_implicit_rewards(loss: Loss, options: dict[str, Any], chosen_reward: float, rejected_reward: float) -> None:
    """beta (or tau) times 1 and -1, or times -12 and -15, whatever the margins, lengths and target margins."""
    reference = () if loss in (simpo_loss, cpo_loss) else (double(-13), double(-14))
    result = loss(double(-12), double(-15), *reference, **options)
    assert result.chosen_reward_sum.item() == chosen_reward
    assert result.rejected_reward_sum.item() == rejected_reward
    assert result.margin_sum.item() == chosen_reward - rejected_reward
    assert result.correct_sum.item() == 1.0


def test_log_probabilities_of_completions() -> None:
    """-1 - 2 = -3 and -7 over two tokens and one; a completion of which nothing counts has 0, and 0 per token."""
    logprobs = double(-1, -2, -9, -7, -9, -9, -9, -9, -9).reshape(3, 3)
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    assert sequence_logprobs(logprobs, mask).tolist() == [-3.0, -7.0, 0.0]
    assert mean_logprobs(logprobs, mask).tolist() == [-1.5, -7.0, 0.0]


# ---- where training ends, for preferences that are random: the chosen one is preferred with probability p ------------


@pytest.mark.parametrize(
    ("loss", "options", "p", "fixed_point"),
    [
        (dpo_loss, {"beta": 1.0}, 0.7, 0.847298),
        (dpo_loss, {"beta": 1.0}, 0.9, 2.197225),
        (ipo_loss, {"tau": 0.1}, 0.7, 2.0),
        (ipo_loss, {"tau": 0.1}, 0.9, 4.0),
        (conservative_dpo_loss, {"beta": 1.0, "label_smoothing": 0.1}, 0.7, 0.663294),
        (conservative_dpo_loss, {"beta": 1.0, "label_smoothing": 0.1}, 0.9, 1.516347),
        (robust_dpo_loss, {"beta": 1.0, "label_smoothing": 0.1}, 0.7, 1.098612),
    ],
)
def test_fixed_points_of_ten_judgements_of_one_pair(
    loss: Loss, options: dict[str, float], p: float, fixed_point: float
) -> None:
    """Ten judgements, 10 p for one completion and the rest for the other. The slope of the sum is 0 at logit(p) for
    DPO; (2 p - 1) / (2 tau) for IPO; logit(.9 p + .1 (1 - p)) with smoothing .1; logit((p - .1) / .8) for labels of
    which a tenth is flipped. It grows with D there, so this is a minimum."""
    wins = torch.arange(10) < round(10 * p)

    def slope(at: float) -> float:
        difference = double(at).requires_grad_()
        chosen = torch.where(wins, difference, -difference)
        result = loss(chosen, *(torch.zeros(10, dtype=torch.float64) for _ in range(3)), **options)
        return torch.autograd.grad(result.loss, difference)[0].item()

    assert slope(fixed_point) == pytest.approx(0, abs=1e-6)
    assert slope(fixed_point - 0.1) < 0 < slope(fixed_point + 0.1)


def test_robust_dpo_has_no_fixed_point_when_all_noise_is_explained() -> None:
    """p = .9 with a tenth flipped is a certain preference, (.9 - .1) / .8 = 1: the slope s(d) - 1 never reaches 0."""
    for difference in (0.0, 5.0, 15.0):
        _, slope, _ = one_pair(
            robust_dpo_loss, difference, 0, 0, 0, beta=1.0, label_smoothing=0.1, soft_labels=double(0.9)
        )
        assert slope == pytest.approx(-1 / (1 + math.exp(difference)), rel=1e-6)


def trained_policy(loss: Loss, reference: Tensor, pairs: list[tuple[int, int, float]], **options: float) -> list[float]:
    """Probabilities of a tabular softmax policy that minimises `loss` on (i, j, p): i beats j with probability p."""
    logits = torch.zeros_like(reference, requires_grad=True)
    first, second = torch.tensor([i for i, _, _ in pairs]), torch.tensor([j for _, j, _ in pairs])
    soft_labels = double(*(p for _, _, p in pairs))
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        policy, ref = torch.log_softmax(logits, 0), reference.log()
        value = loss(policy[first], policy[second], ref[first], ref[second], soft_labels=soft_labels, **options).loss
        value.backward()
        return value

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return torch.softmax(logits.detach(), 0).tolist()


def test_dpo_on_bradley_terry_preferences_reaches_the_optimum_of_rlhf() -> None:
    """Scores 1, .5, 0, reference (.4, .4, .2), beta = .5: the policy that maximises E[score] - beta KL is reference *
    exp(score / beta) / Z = (.696599, .256264, .047137). DPO sees only who wins: p = s(score difference)."""
    scores, reference = [1.0, 0.5, 0.0], double(0.4, 0.4, 0.2)
    pairs = [(i, j, 1 / (1 + math.exp(scores[j] - scores[i]))) for i, j in [(0, 1), (0, 2), (1, 2)]]
    policy = trained_policy(dpo_loss, reference, pairs, beta=0.5)
    assert policy == near(0.696599, 0.256264, 0.047137)
    log_ratios = (double(*policy) / reference).log()
    assert 0.5 * (log_ratios[0] - log_ratios[1]).item() == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize(("tau", "expected"), [(0.5, 0.731059), (0.1, 0.993307)])
def test_ipo_stops_at_a_finite_distance_even_if_one_side_always_wins(tau: float, expected: float) -> None:
    """Two actions, uniform reference: log-odds 1 / (2 tau), that is s(1) and s(5), where DPO would go to 1."""
    assert trained_policy(ipo_loss, double(0.5, 0.5), [(0, 1, 1.0)], tau=tau)[0] == pytest.approx(expected, abs=1e-6)


def test_conservative_and_robust_dpo_end_at_their_own_labels() -> None:
    """p = .7, eps = .1, beta = .5, reference (.6, .4): the odds 1.5 of the reference times (q / (1 - q))^(1 / beta),
    where conservative DPO believes q = .66 and robust DPO q = .75: 1.5 * (.66 / .34)^2 = 5.652249 and 1.5 * 9."""
    options = {"beta": 0.5, "label_smoothing": 0.1}
    reference, pairs = double(0.6, 0.4), [(0, 1, 0.7)]
    conservative = trained_policy(conservative_dpo_loss, reference, pairs, **options)
    robust = trained_policy(robust_dpo_loss, reference, pairs, **options)
    assert conservative[0] == pytest.approx(5.652249 / 6.652249, abs=1e-6)
    assert robust[0] == pytest.approx(13.5 / 14.5, abs=1e-6)
