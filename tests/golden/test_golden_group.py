"""Advantages from groups, weights of tokens and KL terms: values worked out by hand, and expectations by enumeration.

The policies here are so small that every set of samples they could write is listed with its probability. What a method
does to the policy in expectation is then a finite sum, and is compared with the exact derivative of the objective.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from accord.losses import (
    batch_advantages,
    completion_mean_weights,
    completion_policy_loss,
    constant_length_weights,
    group_advantages,
    kl_k1,
    kl_k2_loss,
    kl_k3_loss,
    ppo_policy_loss,
    rloo_advantages,
    scaled_batch_advantages,
    scaled_group_advantages,
    sequence_logprobs,
    token_mean_weights,
)

REWARDS = torch.tensor([1.0, 5.0, 2.0, 6.0, 3.0], dtype=torch.float64)
GROUPS = torch.tensor([0, 1, 0, 0, 1])
ONE_GROUP = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)


def test_leave_one_out_advantages() -> None:
    """Group 0 has 1, 2, 6: 1 - (2 + 6) / 2 = -3, 2 - 3.5 = -1.5, 6 - 1.5 = 4.5. Group 1 has 5, 3: 2 and -2."""
    assert rloo_advantages(REWARDS, GROUPS).tolist() == pytest.approx([-3.0, 2.0, -1.5, 4.5, -2.0])


def test_group_advantages() -> None:
    """Means 3 and 4."""
    assert group_advantages(REWARDS, GROUPS).tolist() == pytest.approx([-2.0, 1.0, -1.0, 3.0, -1.0])


def test_scaled_group_advantages_use_the_unbiased_deviation() -> None:
    """Group 0: squares 4 + 1 + 9 = 14, over 2: std sqrt 7 = 2.645751; with .0001 added -2 gives -.755900. Group 1: std
    sqrt 2, 1 / 1.414314 = .707057. The biased deviation would give -.925785 and 1."""
    expected = [-0.7559004, 0.7070568, -0.3779502, 1.1338505, -0.7070568]
    assert scaled_group_advantages(REWARDS, GROUPS).tolist() == pytest.approx(expected, abs=1e-7)


def test_batch_advantages_leave_one_out_over_everything() -> None:
    """1, 2, 6: as in a group of their own. Over their std: squares 9 + 2.25 + 20.25 = 31.5, over 2: sqrt 15.75 =
    3.968627; -3 / 3.968727 = -.755910."""
    assert batch_advantages(ONE_GROUP).tolist() == pytest.approx([-3.0, -1.5, 4.5])
    assert scaled_batch_advantages(ONE_GROUP).tolist() == pytest.approx([-0.7559099, -0.3779550, 1.1338649], abs=1e-7)


def test_a_group_of_one_has_nobody_to_be_compared_with() -> None:
    lonely = torch.tensor([0, 0, 1])
    with pytest.raises(ValueError, match="a group of one completion"):
        rloo_advantages(ONE_GROUP, lonely)
    assert group_advantages(ONE_GROUP, lonely).tolist() == [-0.5, 0.5, 0.0]
    assert scaled_group_advantages(ONE_GROUP, lonely).tolist() == pytest.approx([-0.707007, 0.707007, 0.0], abs=1e-6)
    with pytest.raises(ValueError, match="a group of one completion"):
        batch_advantages(ONE_GROUP[:1])


@pytest.mark.parametrize(
    ("weights", "loss"),
    [
        (partial(completion_mean_weights, num_completions=2), 2.5),
        (partial(token_mean_weights, num_tokens=5), 1.6),
        (partial(constant_length_weights, num_completions=2, max_tokens=10), 0.4),
    ],
)
def test_three_ways_to_average_tokens(weights: Callable[[Tensor], Tensor], loss: float) -> None:
    """Four tokens that cost 1 each, and one that costs 4: means 1 and 4, so 2.5; 8 / 5 tokens = 1.6; 8 / (2 x 10)."""
    costs = torch.tensor([[1.0, 1, 1, 1], [4, 0, 0, 0]])
    assert (weights(torch.tensor([4, 1]))[:, None] * costs).sum().item() == pytest.approx(loss)


def test_a_completion_without_tokens_has_a_finite_weight() -> None:
    """It weighs nothing, having no tokens; 1 / 0 would make the batch's infinite. 1 / (1 * 2), 1 / (4 * 2)."""
    assert completion_mean_weights(torch.tensor([0, 4]), num_completions=2).tolist() == [0.5, 0.125]


def test_a_completion_is_clipped_as_a_whole() -> None:
    """Log-ratios .1 + .1: R = e^.2 = 1.221403 is clipped at 1.2 for A = 1, although no token's e^.1 = 1.105171 would
    be: -1.2 and no gradient. -.05 - .05 (and one masked): R = e^-.1 = .904837, A = -2: 1.809675, and that for each
    token. Over 2 completions: (-1.2 + 1.809675) / 2 = .304837."""
    old = torch.zeros(2, 3, dtype=torch.float64)
    new = torch.tensor([[0.1, 0.1, 9.0], [-0.05, -0.05, 9.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, False]])
    result = completion_policy_loss(new, old, torch.tensor([1.0, -2.0]), mask, clip_range=0.2)
    result.loss.backward()
    assert new.grad is not None
    assert result.loss.item() == pytest.approx(0.3048374, abs=1e-7)
    assert new.grad.tolist() == [[0, 0, 0], [pytest.approx(0.9048374), pytest.approx(0.9048374), 0]]
    assert (result.clipped_count.item(), result.token_count.item()) == (1, 2)


# --- one-token completions: expected gradients with respect to softmax logits ----------------------------------------

PI = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REF = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
SCORES = torch.tensor([10_000.0, 5_000.0, 0.0], dtype=torch.float64)  # large: the 1e-4 under a deviation is nothing
TRUE_GRADIENT = [1750.0, -450.0, -1300.0]


def gradient(logits: Tensor, loss: Tensor) -> list[float]:
    return torch.autograd.grad(loss, logits)[0].tolist()


def expected_gradient(advantages: Callable[[Tensor], Tensor], n: int) -> list[float]:
    """Minus the expected gradient of the policy loss over all 3^n sets of n samples."""
    logits = PI.log().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for arms in itertools.product(range(3), repeat=n):
        new = torch.log_softmax(logits, 0)[list(arms)][:, None]
        mask = torch.ones_like(new, dtype=torch.bool)
        loss = completion_policy_loss(new, new.detach(), advantages(SCORES[list(arms)]), mask, clip_range=0.2).loss
        total = total - PI[list(arms)].prod() * loss
    return gradient(logits, total)


def test_the_true_gradient() -> None:
    """d/dlogits of E[score] = pi (score - mean), mean .65 of the largest: .5 x .35, .3 x -.15, .2 x -.65."""
    logits = PI.log().requires_grad_()
    assert gradient(logits, (torch.softmax(logits, 0) * SCORES).sum()) == pytest.approx(TRUE_GRADIENT)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_leave_one_out_is_unbiased(n: int) -> None:
    group = torch.zeros(n, dtype=torch.long)
    assert expected_gradient(lambda rewards: rloo_advantages(rewards, group), n) == pytest.approx(TRUE_GRADIENT)
    assert expected_gradient(batch_advantages, n) == pytest.approx(TRUE_GRADIENT)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_groups_mean_shortens_the_gradient_and_keeps_its_direction(n: int) -> None:
    """The sample's own 1/n of the baseline cancels 1/n of its reward."""
    group = torch.zeros(n, dtype=torch.long)
    expected = [(n - 1) / n * value for value in TRUE_GRADIENT]
    assert expected_gradient(lambda rewards: group_advantages(rewards, group), n) == pytest.approx(expected)


def test_dividing_by_the_groups_deviation_follows_another_objective() -> None:
    """Of two samples the better gets d/2 over |d|/sqrt 2 = .707107 however much better it is, so what grows is the
    chance of being the better one: .707107 pi (s - mean s), s = P(worse) - P(better) = .5, -.3, -.8 with mean 0. That
    is .176777, -.063640, -.113137; the true gradient is proportional to .175, -.045, -.13."""
    group = torch.zeros(2, dtype=torch.long)
    found = expected_gradient(lambda rewards: scaled_group_advantages(rewards, group), 2)
    assert found == pytest.approx([0.1767767, -0.0636396, -0.1131371], abs=1e-7)


def test_a_batch_baseline_from_other_prompts_is_unbiased_too() -> None:
    """Two prompts with one sample each: the loss averages over both, and so does its gradient."""
    logits = torch.stack([PI.log(), REF.log()]).requires_grad_()
    scores = torch.stack([SCORES, 3 - SCORES.flip(0)])
    exact = (torch.softmax(logits, 1) * scores).sum(1).mean()
    total = torch.zeros((), dtype=torch.float64)
    for arms in itertools.product(range(3), repeat=2):
        chosen = torch.tensor(arms)[:, None]
        new = torch.log_softmax(logits, 1).gather(1, chosen)
        advantages = batch_advantages(scores.gather(1, chosen)[:, 0])
        mask = torch.ones_like(new, dtype=torch.bool)
        loss = completion_policy_loss(new, new.detach(), advantages, mask, clip_range=0.2).loss
        total = total - new.detach().exp().prod() * loss
    for found, expected in zip(gradient(logits, total), gradient(logits, exact), strict=True):
        assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(kl_k2_loss, [0.098938, -0.093885, -0.005053]), (kl_k3_loss, [0.1, -0.1, 0.0])],
)
def test_expected_gradient_of_a_kl_term(loss: Callable[..., object], expected: list[float]) -> None:
    """The weights are the probabilities of the samples. k2: pi (x - KL), the gradient of KL(pi || ref), x = ln(pi/ref):
    .5 (.223144 - .025267), ... k3: pi - ref, the gradient of KL(ref || pi)."""
    logits = PI.log().requires_grad_()
    new = torch.log_softmax(logits, 0)[:, None]
    result = loss(new, REF.log()[:, None], PI[:, None], torch.ones(3, 1, dtype=torch.bool))
    assert gradient(logits, result.loss) == pytest.approx(expected, abs=1e-6)  # type: ignore[attr-defined]


def test_values_of_the_kl_terms() -> None:
    """x = ln 2 twice, weights .5 and .1 (and one masked): k2 = .240227, k3 = .5 - 1 + ln 2 = .193147; times .6; sums
    over tokens are not weighted."""
    new, mask = torch.tensor([[math.log(2), math.log(2), 5.0]]), torch.tensor([[True, True, False]])
    weights = torch.tensor([[0.5, 0.1, 9.0]])
    for loss, value in ((kl_k2_loss, 0.2402265), (kl_k3_loss, 0.1931472)):
        result = loss(new, torch.zeros(1, 3), weights, mask)
        assert result.loss.item() == pytest.approx(0.6 * value, abs=1e-6)
        assert result.estimate_sum.item() == pytest.approx(2 * value, abs=1e-6)
        assert result.token_count.item() == 2


# --- completions of one or two tokens: state 0 writes a (and ends) or b; after b comes c or d -------------------------

MASK = torch.tensor([[True, False], [True, True], [True, True]])  # a, bc, bd
LOGITS = torch.tensor([[0.3, -0.2], [0.5, -0.4]], dtype=torch.float64)
REF_LOGITS = torch.tensor([[-0.5, 0.6], [0.1, 0.9]], dtype=torch.float64)
WALK_SCORES = torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64)


def walk_logprobs(logits: Tensor) -> Tensor:
    """(3, 2) log-probabilities of the tokens of a, bc and bd."""
    first, second = torch.log_softmax(logits, 1)
    return torch.stack([first[[0, 1, 1]], torch.cat([first.new_zeros(1), second])], 1)


def pairs_of_walks(logits: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """Two samples, and the probability of drawing them."""
    chances = sequence_logprobs(walk_logprobs(logits.detach()), MASK).exp()
    for walks in itertools.product(range(3), repeat=2):
        yield list(walks), chances[list(walks)].prod()


def expected_walk_gradient(averaging: Callable[[Tensor], Tensor]) -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for walks, chance in pairs_of_walks(logits):
        new, mask = walk_logprobs(logits)[walks], MASK[walks]
        advantages = group_advantages(WALK_SCORES[walks], torch.zeros(2, dtype=torch.long))
        weighted = (advantages * averaging(mask.sum(1)).double())[:, None].expand(2, 2)
        loss = ppo_policy_loss(new, new.detach(), weighted, mask, clip_range=0.2, num_tokens=1).loss
        total = total - chance * loss
    return torch.autograd.grad(total, logits)[0]


def true_walk_gradient(value: Callable[[Tensor], Tensor]) -> Tensor:
    """The derivative of E[value(log-probabilities)] over the three walks."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = sequence_logprobs(walk_logprobs(logits), MASK)
    return torch.autograd.grad((logprobs.exp() * value(logprobs)).sum(), logits)[0]


def test_only_a_constant_length_keeps_the_policy_gradient_of_completions_that_differ_in_length() -> None:
    """A constant 2: half of (n - 1) / n = 1/2 of it. A mean over tokens makes the same completion weigh less where it
    is long, and that is no multiple of the gradient."""
    exact = true_walk_gradient(lambda logprobs: WALK_SCORES)
    constant = expected_walk_gradient(partial(constant_length_weights, num_completions=2, max_tokens=2))
    torch.testing.assert_close(constant, exact / 4, rtol=1e-6, atol=1e-9)
    ratios = expected_walk_gradient(partial(completion_mean_weights, num_completions=2)) / exact
    assert ratios.max() - ratios.min() > 0.05


def test_only_k1_in_the_reward_is_the_gradient_of_a_completions_kl() -> None:
    """k1 of the whole completion, in the reward: minus the gradient of KL(policy || reference) over completions. k2 as
    a loss is the gradient of each token's KL given where it stands: for the second token the same thing, for the first
    not, which also decides how often a second is written at all: p(b) p(a) (KL of the second token) is missing."""
    ref = sequence_logprobs(walk_logprobs(REF_LOGITS), MASK)
    exact = true_walk_gradient(lambda logprobs: logprobs - ref)

    logits = LOGITS.clone().requires_grad_()
    new = walk_logprobs(logits)
    chances = sequence_logprobs(new, MASK).exp().detach()
    rewards = -sequence_logprobs(kl_k1(new.detach(), walk_logprobs(REF_LOGITS)), MASK)
    total = torch.zeros((), dtype=torch.float64)
    for walks, chance in pairs_of_walks(logits):
        advantages = rloo_advantages(rewards[walks], torch.zeros(2, dtype=torch.long))
        loss = completion_policy_loss(new[walks], new[walks].detach(), advantages, MASK[walks], clip_range=0.2).loss
        total = total - chance * loss
    torch.testing.assert_close(torch.autograd.grad(total, logits, retain_graph=True)[0], -exact)

    weights = chances[:, None].expand(3, 2)
    as_loss = torch.autograd.grad(kl_k2_loss(new, walk_logprobs(REF_LOGITS), weights, MASK).loss, logits)[0]
    second_kl = (LOGITS[1].softmax(0) * (LOGITS[1].log_softmax(0) - REF_LOGITS[1].log_softmax(0))).sum()
    missing = LOGITS[0].softmax(0).prod() * second_kl
    torch.testing.assert_close(as_loss, exact + torch.tensor([[1.0, -1.0], [0, 0]]) * missing)
    assert missing > 0.05
