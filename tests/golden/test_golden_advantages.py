"""Generalised advantage estimation, rewards per token and whitening, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from accord.losses import gae, token_rewards, whiten

REWARDS = torch.tensor([[0.1, -0.2, 0.3, 1.0]], dtype=torch.float64)
VALUES = torch.tensor([[0.5, 0.4, 0.3, 0.2]], dtype=torch.float64)
ALL = torch.ones(1, 4, dtype=torch.bool)


def near(expected: list[float]) -> object:
    return pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("gamma", "gae_lambda", "expected"),
    [
        (1.0, 0.95, [0.5814, 0.612, 0.96, 0.8]),
        (0.99, 0.95, [0.551696, 0.590851, 0.9504, 0.8]),
        (1.0, 1.0, [0.7, 0.7, 1.0, 0.8]),
        (1.0, 0.0, [0.0, -0.3, 0.2, 0.8]),
        (0.9, 0.8, [0.11431, 0.21432, 0.756, 0.8]),
    ],
)
def test_gae_of_four_tokens(gamma: float, gae_lambda: float, expected: list[float]) -> None:
    """With gamma = 1 the one-step errors are r + V' - V: .1 + .4 - .5 = 0; -.2 + .3 - .4 = -.3; .3 + .2 - .3 = .2;
    1 + 0 - .2 = .8 (nothing follows the last token). With lambda = .95, backwards: .8; .2 + .95 * .8 = .96;
    -.3 + .95 * .96 = .612; 0 + .95 * .612 = .5814. The other rows likewise, e.g. gamma = .9, lambda = .8: errors
    -.04, -.33, .18, .8, then .18 + .72 * .8 = .756 and so on. Returns are advantage + value."""
    result = gae(REWARDS, VALUES, ALL, gamma=gamma, gae_lambda=gae_lambda)
    assert result.advantages[0].tolist() == near(expected)
    assert result.returns[0].tolist() == near([a + v for a, v in zip(expected, VALUES[0].tolist(), strict=True)])


def test_gae_of_a_padded_sequence_ignores_what_stands_in_the_padding() -> None:
    """r = [.5, -.1], V = [.2, .1], gamma 1, lambda .95: errors .5 + .1 - .2 = .4 and -.1 - .1 = -.2, so the advantages
    are .4 - .95 * .2 = .21 and -.2. Bootstrapping from the .9 in the padding would give .293363 and -.11225."""
    rewards = torch.tensor([[0.5, -0.1, 0.9, 0.9]], dtype=torch.float64)
    values = torch.tensor([[0.2, 0.1, 0.9, 0.9]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False, False]])
    result = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    assert result.advantages[0].tolist() == near([0.21, -0.2, 0.0, 0.0])
    assert result.returns[0].tolist() == near([0.41, -0.1, 0.0, 0.0])


def test_gae_steps_over_tokens_that_somebody_else_wrote() -> None:
    """The same two counted tokens with a foreign one between them are the same two-step problem: .21 and -.2."""
    rewards = torch.tensor([[0.5, 7.0, -0.1]], dtype=torch.float64)
    values = torch.tensor([[0.2, 7.0, 0.1]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True]])
    result = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    assert result.advantages[0].tolist() == near([0.21, 0.0, -0.2])


def test_the_score_lands_on_the_end_of_sequence_token() -> None:
    """log pi - log ref = .2, -.1, .1 on the three tokens of an answer, coefficient .05, score .8:
    rewards -.01, .005, -.005 + .8 = .795, and with V = .1 .2 .3, gamma 1, lambda .95 the errors .09, .105, .495 give
    .495; .105 + .95 * .495 = .57525; .09 + .95 * .57525 = .636487."""
    kl_penalty = 0.05 * torch.tensor([[0.2, -0.1, 0.1, -1.0, -1.0, -1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False, False, False]])
    rewards = token_rewards(torch.tensor([0.8], dtype=torch.float64), kl_penalty, mask)
    assert rewards[0].tolist() == near([-0.01, 0.005, 0.795, 0.0, 0.0, 0.0])
    values = torch.tensor([[0.1, 0.2, 0.3, 0.6, 0.5, 0.5]], dtype=torch.float64)
    advantages = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95).advantages
    assert advantages[0].tolist() == near([0.636487, 0.57525, 0.495, 0.0, 0.0, 0.0])


def test_a_full_length_answer_gets_its_score_at_the_last_token() -> None:
    rewards = token_rewards(
        torch.tensor([1.5, -2.0]), torch.zeros(2, 3), torch.tensor([[True] * 3, [True, True, False]])
    )
    assert rewards.tolist() == [[0.0, 0.0, 1.5], [0.0, -2.0, 0.0]]


def test_whitening_divides_by_the_biased_deviation() -> None:
    """x = .5814 .612 .96 .8: mean .73835; squared deviations .024633 .015965 .049129 .003801 average to .023382 (the
    unbiased variance would be .031176). (.5814 - .73835) / sqrt(.023382 + 1e-8) = -1.026414."""
    x = torch.tensor([[0.5814, 0.612, 0.96, 0.8]], dtype=torch.float64)
    assert whiten(x, ALL)[0].tolist() == near([-1.026414, -0.826298, 1.449536, 0.403176])


def test_whitening_takes_mean_and_variance_over_counted_entries_only() -> None:
    """With a second row .7 -.3 the six counted values have mean .5589 and variance .163326; zeros counted as values
    would make it .419175 and .181064. (.7 - .5589) / sqrt(.163326) = .34914."""
    x = torch.tensor([[0.5814, 0.612, 0.96, 0.8], [0.7, -0.3, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    white = whiten(x, mask)
    assert white[1].tolist() == near([0.34914, -2.125275, 0.0, 0.0])


def test_whitening_may_keep_the_mean() -> None:
    """1.2 .. 2.0 in steps of .1: mean 1.6, variance .01 * 60 / 9 = .066667, so 1.2 becomes 1.6 - .4 / .258199 =
    .050807."""
    x = torch.arange(12, 21, dtype=torch.float64).reshape(3, 3) / 10
    white = whiten(x, torch.ones(3, 3, dtype=torch.bool), shift_mean=False)
    expected = [0.050807, 0.438105, 0.825403, 1.212702, 1.6, 1.987298, 2.374597, 2.761895, 3.149193]
    assert white.flatten().tolist() == near(expected)
    assert white.mean().item() == pytest.approx(1.6)


def test_whitening_does_not_blow_up_what_hardly_varies() -> None:
    """0 and .0002: variance 1e-8, so -+.0001 / sqrt(1e-8 + 1e-8) = -+.707107 and not -+1."""
    white = whiten(torch.tensor([[0.0, 2e-4]], dtype=torch.float64), torch.tensor([[True, True]]))
    assert white[0].tolist() == near([-0.707107, 0.707107])


def test_whitening_computes_in_float32() -> None:
    """1, 2, 3, 4.03125 are exact in bfloat16, what comes out of them is not."""
    x = torch.tensor([[1.0, 2.0, 3.0, 4.03125]])
    white = whiten(x.bfloat16(), ALL)
    assert white.dtype == torch.float32
    assert white[0].tolist() == near(whiten(x.double(), ALL)[0].tolist())


def test_whitened_entries_carry_no_gradient() -> None:
    assert not whiten(REWARDS.clone().requires_grad_(), ALL).requires_grad


def test_a_perfect_critic_leaves_no_advantage_and_whitening_keeps_it_at_zero() -> None:
    """A reward of 1 at the end and a value of 1 everywhere: every error is 0, and 0 / sqrt(0 + 1e-8) is 0, not NaN."""
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    advantages = gae(rewards, torch.ones(1, 4), ALL, gamma=1.0, gae_lambda=0.95).advantages
    assert advantages.tolist() == [[0.0] * 4]
    assert whiten(advantages, ALL).tolist() == [[0.0] * 4]
