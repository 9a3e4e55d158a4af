"""What must hold of the losses for any numbers: nothing leaks from masked entries, nothing depends on batching or
order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accord.losses import (
    categorical_kl,
    centring_penalty,
    entropy_loss,
    gae,
    kl_k1,
    kl_k2,
    kl_k3,
    pairwise_loss,
    ppo_policy_loss,
    ppo_value_loss,
    ranked_loss,
    sft_loss,
    token_rewards,
    whiten,
)

quick = settings(max_examples=50, derandomize=True, deadline=None)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**31))


class Tokens:
    """Random (C, T) tensors: `x` is what is trained, `old` and `target` are what it is compared with."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        rows, columns, seed = shape
        self.random = torch.Generator().manual_seed(seed)
        self.mask = self.uniform(rows, columns) < 0.7
        self.x, self.old, self.target = (self.normal(rows, columns) for _ in range(3))

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.random, dtype=torch.float64)

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(size, generator=self.random, dtype=torch.float64)


TokenLoss = Callable[..., Any]
TOKEN_LOSSES: dict[str, TokenLoss] = {
    "sft": lambda x, old, target, mask, **count: sft_loss(x, mask, **count),
    "policy": lambda x, old, target, mask, **count: ppo_policy_loss(x, old, target, mask, clip_range=0.2, **count),
    "value": lambda x, old, target, mask, **count: ppo_value_loss(x, old, target, mask, value_clip_range=0.2, **count),
    "entropy": lambda x, old, target, mask, **count: entropy_loss(x, mask, **count),
}
every_token_loss = pytest.mark.parametrize("loss", TOKEN_LOSSES.values(), ids=TOKEN_LOSSES.keys())


def evaluate(loss: TokenLoss, x: Tensor, *rest: Tensor, **count: float) -> tuple[dict[str, float], Tensor]:
    """All fields of the record as numbers, and the gradient of the loss wrt `x`."""
    x = x.clone().requires_grad_()
    record = loss(x, *rest, **count)
    record.loss.backward()
    assert x.grad is not None
    return {field.name: getattr(record, field.name).item() for field in dataclasses.fields(record)}, x.grad


@every_token_loss
@quick
@given(shape=shapes, garbage=st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 7.0]))
def test_masked_tokens_receive_no_gradient_and_change_nothing(
    loss: TokenLoss, shape: tuple[int, int, int], garbage: float
) -> None:
    t = Tokens(shape)
    clean, gradient = evaluate(loss, t.x, t.old, t.target, t.mask)
    dirty = [tensor.masked_fill(~t.mask, garbage) for tensor in (t.x, t.old, t.target)]
    soiled, soiled_gradient = evaluate(loss, *dirty, t.mask)
    assert soiled == clean
    assert torch.equal(soiled_gradient, gradient)
    assert (soiled_gradient[~t.mask] == 0).all()


@every_token_loss
@quick
@given(shape=shapes, width=st.integers(1, 4))
def test_padding_changes_nothing(loss: TokenLoss, shape: tuple[int, int, int], width: int) -> None:
    t = Tokens(shape)
    plain, gradient = evaluate(loss, t.x, t.old, t.target, t.mask)
    left, right = t.normal(len(t.x), width), t.normal(len(t.x), width)
    hidden = torch.zeros(len(t.x), width, dtype=torch.bool)
    padded = [torch.cat([left, tensor, right], 1) for tensor in (t.x, t.old, t.target)]
    record, padded_gradient = evaluate(loss, *padded, torch.cat([hidden, t.mask, hidden], 1))
    assert record == pytest.approx(plain, rel=1e-12)
    torch.testing.assert_close(padded_gradient[:, width:-width], gradient, rtol=1e-12, atol=1e-15)


@every_token_loss
@quick
@given(shape=shapes)
def test_the_order_of_completions_and_tokens_does_not_matter(loss: TokenLoss, shape: tuple[int, int, int]) -> None:
    t = Tokens(shape)
    plain, gradient = evaluate(loss, t.x, t.old, t.target, t.mask)
    rows = torch.randperm(t.x.shape[0], generator=t.random)
    columns = torch.randperm(t.x.shape[1], generator=t.random)
    shuffled = [tensor[rows][:, columns] for tensor in (t.x, t.old, t.target, t.mask)]
    record, shuffled_gradient = evaluate(loss, *shuffled)
    assert record == pytest.approx(plain, rel=1e-12)
    torch.testing.assert_close(shuffled_gradient, gradient[rows][:, columns], rtol=1e-12, atol=1e-15)


@every_token_loss
@quick
@given(shape=shapes, cut=st.integers(0, 5))
def test_micro_batches_add_up_to_the_whole_step(loss: TokenLoss, shape: tuple[int, int, int], cut: int) -> None:
    t = Tokens(shape)
    whole, gradient = evaluate(loss, t.x, t.old, t.target, t.mask)
    tensors, num_tokens = (t.x, t.old, t.target, t.mask), int(t.mask.sum())
    first, first_gradient = evaluate(loss, *(x[:cut] for x in tensors), num_tokens=num_tokens)
    second, second_gradient = evaluate(loss, *(x[cut:] for x in tensors), num_tokens=num_tokens)
    assert {name: first[name] + second[name] for name in whole} == pytest.approx(whole, rel=1e-12, abs=1e-15)
    torch.testing.assert_close(torch.cat([first_gradient, second_gradient]), gradient, rtol=1e-12, atol=1e-15)


@every_token_loss
def test_a_batch_in_which_nothing_counts_gives_zero_and_not_nan(loss: TokenLoss) -> None:
    x = torch.ones(2, 3)
    record, gradient = evaluate(loss, x, x, x, torch.zeros(2, 3, dtype=torch.bool))
    assert set(record.values()) == {0}
    assert (gradient == 0).all()


@every_token_loss
def test_low_precision_inputs_are_summed_in_float32(loss: TokenLoss) -> None:
    """4,097 equal terms: in bfloat16, which has 8 bits, a running sum would stop growing long before."""
    x = torch.full((1, 4097), -0.5, dtype=torch.bfloat16)
    record = loss(x, x, x, torch.ones(1, 4097, dtype=torch.bool))
    expected = {"sft": 0.5, "policy": 0.5, "value": 0.0, "entropy": 0.5}
    assert record.loss.dtype == torch.float32
    assert record.loss.item() == pytest.approx(expected[next(k for k, v in TOKEN_LOSSES.items() if v is loss)])


@every_token_loss
def test_metrics_carry_no_gradient(loss: TokenLoss) -> None:
    t = Tokens((3, 4, 0))
    record = loss(t.x.requires_grad_(), t.old.requires_grad_(), t.target.requires_grad_(), t.mask)
    assert record.loss.requires_grad
    assert not any(getattr(record, f.name).requires_grad for f in dataclasses.fields(record) if f.name != "loss")
    record.loss.backward()
    assert t.old.grad is None and t.target.grad is None


@pytest.mark.parametrize(
    "call",
    [
        lambda a, b, mask: sft_loss(b, mask),
        lambda a, b, mask: ppo_policy_loss(a, b, a, mask, clip_range=0.2),
        lambda a, b, mask: ppo_policy_loss(a, a, b, mask, clip_range=0.2),
        lambda a, b, mask: ppo_value_loss(a, a, b, mask, value_clip_range=0.2),
        lambda a, b, mask: entropy_loss(b, mask),
        lambda a, b, mask: gae(a, b, mask, gamma=1.0, gae_lambda=0.95),
        lambda a, b, mask: token_rewards(a[:, 0], b, mask),
        lambda a, b, mask: token_rewards(a[:, :1], a, mask),
        lambda a, b, mask: kl_k1(a, b),
        lambda a, b, mask: categorical_kl(a, b),
        lambda a, b, mask: whiten(b, mask),
        lambda a, b, mask: pairwise_loss(a[:, 0], b),
        lambda a, b, mask: pairwise_loss(a[:, 0], a[:, 1], margins=b),
        lambda a, b, mask: pairwise_loss(a[:, 0], a[:, 1], soft_labels=b),
        lambda a, b, mask: ranked_loss(a[:, 0], b.long(), torch.zeros(3, dtype=torch.long)),
        lambda a, b, mask: centring_penalty(a[:, 0], b.long()),
    ],
)
def test_shapes_that_would_broadcast_are_refused(call: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="expected equal shapes"):
        call(torch.zeros(3, 4), torch.zeros(3, 1), torch.ones(3, 4, dtype=torch.bool))


# ---- policy loss --------------------------------------------------------------------------------------------------


@quick
@given(shape=shapes)
def test_policy_loss_before_the_first_update_is_minus_the_mean_advantage(shape: tuple[int, int, int]) -> None:
    t = Tokens(shape)
    n = max(int(t.mask.sum()), 1)
    record, gradient = evaluate(TOKEN_LOSSES["policy"], t.x, t.x, t.target, t.mask)
    assert record["loss"] == pytest.approx(-t.target[t.mask].sum().item() / n, abs=1e-12)
    torch.testing.assert_close(gradient, torch.where(t.mask, -t.target / n, 0.0))
    assert record["approx_kl_sum"] == record["approx_kl_k2_sum"] == record["clipped_count"] == 0
    assert record["ratio_sum"] == record["token_count"]


@quick
@given(shape=shapes)
def test_tokens_whose_gain_is_clipped_receive_no_gradient(shape: tuple[int, int, int]) -> None:
    t = Tokens(shape)
    ratio = (t.x - t.old).exp()
    clipped = t.mask & torch.where(t.target > 0, ratio > 1.2, ratio < 0.8)
    record, gradient = evaluate(TOKEN_LOSSES["policy"], t.x, t.old, t.target, t.mask)
    assert torch.equal(gradient != 0, t.mask & ~clipped)
    assert record["clipped_count"] == clipped.sum().item()


# ---- advantages ---------------------------------------------------------------------------------------------------


def advantages_by_summation(rewards: list[float], values: list[float], gamma: float, gae_lambda: float) -> list[float]:
    """A[t] = sum over l of (gamma lambda)^l delta[t + l], as defined, over one sequence whose tokens all count."""
    n, values = len(rewards), [*values, 0.0]
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(n)]
    return [math.fsum((gamma * gae_lambda) ** l * deltas[t + l] for l in range(n - t)) for t in range(n)]


@quick
@given(shape=shapes, gamma=st.floats(0, 1), gae_lambda=st.floats(0, 1))
def test_gae_is_the_discounted_sum_of_errors(shape: tuple[int, int, int], gamma: float, gae_lambda: float) -> None:
    t = Tokens(shape)
    result = gae(t.x, t.old, t.mask, gamma=gamma, gae_lambda=gae_lambda)
    for row, keep in enumerate(t.mask):
        expected = advantages_by_summation(t.x[row][keep].tolist(), t.old[row][keep].tolist(), gamma, gae_lambda)
        assert result.advantages[row][keep].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(result.returns, torch.where(t.mask, result.advantages + t.old, 0.0))
    assert (result.advantages[~t.mask] == 0).all()


@quick
@given(shape=shapes, gamma=st.floats(0, 1))
def test_gae_lambda_one_is_return_to_go_and_zero_is_the_one_step_error(
    shape: tuple[int, int, int], gamma: float
) -> None:
    t = Tokens(shape)
    everything = torch.ones_like(t.mask)
    steps = torch.arange(t.x.shape[1])
    discount = torch.where(steps[None] >= steps[:, None], gamma ** (steps[None] - steps[:, None]).clamp_min(0), 0.0)
    monte_carlo = gae(t.x, t.old, everything, gamma=gamma, gae_lambda=1.0)
    torch.testing.assert_close(monte_carlo.returns, t.x @ discount.T.double())
    next_value = torch.cat([t.old[:, 1:], torch.zeros(len(t.old), 1)], 1)
    one_step = gae(t.x, t.old, everything, gamma=gamma, gae_lambda=0.0)
    torch.testing.assert_close(one_step.advantages, t.x + gamma * next_value - t.old)


@quick
@given(shape=shapes)
def test_advantages_carry_no_gradient_and_ignore_masked_garbage(shape: tuple[int, int, int]) -> None:
    t = Tokens(shape)
    clean = gae(t.x, t.old, t.mask, gamma=0.9, gae_lambda=0.9)
    rewards, values = (x.masked_fill(~t.mask, math.nan).requires_grad_() for x in (t.x, t.old))
    dirty = gae(rewards, values, t.mask, gamma=0.9, gae_lambda=0.9)
    assert torch.equal(clean.advantages, dirty.advantages) and torch.equal(clean.returns, dirty.returns)
    assert not dirty.advantages.requires_grad and not dirty.returns.requires_grad
    scores = t.target[:, 0].clone().requires_grad_()
    assert not token_rewards(scores, values, t.mask).requires_grad


@quick
@given(shape=shapes)
def test_rewards_of_a_completion_sum_to_its_score_minus_its_penalty(shape: tuple[int, int, int]) -> None:
    t = Tokens(shape)
    scores = t.target[:, 0]
    rewards = token_rewards(scores, t.x.masked_fill(~t.mask, math.nan), t.mask)
    expected = torch.where(t.mask.any(1), scores, 0.0) - torch.where(t.mask, t.x, 0.0).sum(1)
    torch.testing.assert_close(rewards.sum(1), expected)
    assert (rewards[~t.mask] == 0).all()
    for row in range(len(rewards)):
        counted = t.mask[row].nonzero()[:, 0]
        torch.testing.assert_close(rewards[row, counted[:-1]], -t.x[row, counted[:-1]])


@quick
@given(shape=shapes, scale=st.floats(0.1, 100), shift=st.floats(-100, 100))
def test_whitened_entries_have_mean_0_and_variance_1_whatever_scale_and_shift(
    shape: tuple[int, int, int], scale: float, shift: float
) -> None:
    t = Tokens(shape)
    white = whiten((t.x * scale + shift).masked_fill(~t.mask, math.nan), t.mask)
    assert (white[~t.mask] == 0).all()
    if t.mask.sum() >= 2:
        assert white[t.mask].mean().item() == pytest.approx(0, abs=1e-9)
        assert white[t.mask].var(unbiased=False).item() == pytest.approx(1, rel=1e-4)
        torch.testing.assert_close(white, whiten(t.x, t.mask), rtol=1e-3, atol=1e-6)


# ---- KL -----------------------------------------------------------------------------------------------------------


@quick
@given(x=st.floats(-30, 30), base=st.floats(-20, 0))
def test_k2_and_k3_are_not_negative(x: float, base: float) -> None:
    logprobs = torch.tensor([base + x]), torch.tensor([base])
    assert kl_k2(*logprobs).item() >= 0
    assert kl_k3(*logprobs).item() >= 0


@quick
@given(shape=shapes)
def test_exact_kl_is_the_mean_of_k1_and_zero_only_for_equal_distributions(shape: tuple[int, int, int]) -> None:
    t = Tokens(shape)
    exact = categorical_kl(t.x, t.old)
    log_p, log_q = t.x.log_softmax(-1), t.old.log_softmax(-1)
    torch.testing.assert_close(exact, (log_p.exp() * kl_k1(log_p, log_q)).sum(-1))
    torch.testing.assert_close(exact, (log_p.exp() * kl_k3(log_p, log_q)).sum(-1))
    assert (exact >= 0).all()
    assert torch.equal(categorical_kl(t.x, t.x), torch.zeros(len(t.x), dtype=torch.float64))


# ---- reward models ------------------------------------------------------------------------------------------------


class Ranking:
    """Up to four groups of one to five ranked completions with ties, in shuffled order."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.size = self.integer(1, 4)
        group_index = [g for g in range(self.size) for _ in range(self.integer(1, 5))]
        self.group_index = torch.tensor(group_index)[torch.randperm(len(group_index), generator=self.random)]
        self.ranks = torch.randint(0, 4, self.group_index.shape, generator=self.random)
        self.scores = torch.randn(self.group_index.shape, generator=self.random, dtype=torch.float64) * 2
        self.margins = torch.rand(self.size, generator=self.random, dtype=torch.float64)
        self.soft_labels = torch.rand(self.size, generator=self.random, dtype=torch.float64)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.random))


seeds = st.integers(0, 2**31)


def ranked_loss_by_loops(r: Ranking) -> float:
    """The definition, one pair at a time, in plain Python."""
    group_losses = []
    for g in range(r.size):
        members = (r.group_index == g).nonzero()[:, 0].tolist()
        pairs = [(i, j) for i in members for j in members if r.ranks[i] < r.ranks[j]]
        p, losses = r.soft_labels[g].item(), []
        for i, j in pairs:
            x = (r.scores[i] - r.scores[j] - r.margins[g]).item()
            losses.append(p * math.log1p(math.exp(-x)) + (1 - p) * math.log1p(math.exp(x)))
        if losses:
            group_losses.append(math.fsum(losses) / len(losses))
    return math.fsum(group_losses) / max(len(group_losses), 1)


@quick
@given(seed=seeds)
def test_ranked_loss_is_the_mean_over_groups_of_the_mean_over_pairs(seed: int) -> None:
    r = Ranking(seed)
    result = ranked_loss(r.scores, r.ranks, r.group_index, margins=r.margins, soft_labels=r.soft_labels)
    assert result.loss.item() == pytest.approx(ranked_loss_by_loops(r), rel=1e-12)


@quick
@given(seed=seeds)
def test_two_completions_are_the_pairwise_loss(seed: int) -> None:
    r = Ranking(seed)
    chosen, rejected = torch.randn(2, r.size, generator=r.random, dtype=torch.float64).requires_grad_()
    groups = torch.arange(r.size).repeat(2)
    ranks = torch.tensor([0, 1]).repeat_interleave(r.size)
    extra = {"margins": r.margins, "soft_labels": r.soft_labels, "num_groups": 3}
    pair = pairwise_loss(chosen, rejected, **extra)
    ranked = ranked_loss(torch.cat([chosen, rejected]), ranks, groups, **extra)
    for field in dataclasses.fields(pair):
        torch.testing.assert_close(getattr(pair, field.name), getattr(ranked, field.name), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(pair.loss, [chosen, rejected]), torch.autograd.grad(ranked.loss, [chosen, rejected])
    )


@quick
@given(seed=seeds, shift=st.floats(-50, 50))
def test_adding_a_constant_to_all_scores_changes_the_centring_penalty_only(seed: int, shift: float) -> None:
    r = Ranking(seed)
    plain = ranked_loss(r.scores, r.ranks, r.group_index).loss.item()
    assert ranked_loss(r.scores + shift, r.ranks, r.group_index).loss.item() == pytest.approx(plain, rel=1e-9)
    means = torch.stack([r.scores[r.group_index == g].mean() for g in range(r.size)])
    expected = (2 * (means + shift)).square().mean().item()
    assert centring_penalty(r.scores + shift, r.group_index).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@quick
@given(seed=seeds)
def test_swapping_chosen_and_rejected_mirrors_the_difference(seed: int) -> None:
    """loss(d) - loss(-d) = -d for a certain label; a label p and margin m turn into 1 - p and -m at the same loss."""
    r = Ranking(seed)
    a, b = torch.randn(2, r.size, generator=r.random, dtype=torch.float64)
    there, back = pairwise_loss(a, b), pairwise_loss(b, a)
    assert (there.loss - back.loss).item() == pytest.approx((b - a).mean().item(), abs=1e-12)
    assert there.correct_sum + back.correct_sum == there.pair_count
    soft = pairwise_loss(a, b, margins=r.margins, soft_labels=r.soft_labels).loss
    swapped = pairwise_loss(b, a, margins=-r.margins, soft_labels=1 - r.soft_labels).loss
    assert soft.item() == pytest.approx(swapped.item(), rel=1e-12)


@quick
@given(seed=seeds)
def test_groups_may_be_split_into_micro_batches_in_any_order(seed: int) -> None:
    r = Ranking(seed)
    scores = r.scores.clone().requires_grad_()
    whole = ranked_loss(scores, r.ranks, r.group_index)
    penalty = centring_penalty(scores, r.group_index)
    (expected,) = torch.autograd.grad(whole.loss + penalty, scores)
    parts = []
    for g in torch.randperm(r.size, generator=r.random).tolist():
        inside = r.group_index == g
        groups = torch.zeros(int(inside.sum()), dtype=torch.long)
        part = ranked_loss(scores[inside], r.ranks[inside], groups, num_groups=whole.group_count)
        (part.loss + centring_penalty(scores[inside], groups, num_groups=r.size)).backward()
        parts.append(part)
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, expected, rtol=1e-9, atol=1e-12)
    for field in dataclasses.fields(whole):
        total = sum(getattr(part, field.name).item() for part in parts)
        assert total == pytest.approx(getattr(whole, field.name).item(), rel=1e-9, abs=1e-12)


def test_low_precision_scores_are_compared_in_float32() -> None:
    """ln(1 + 1/e) = .313262; the nearest bfloat16 is .3125. A label of 2^-9 leaves 1 - 2^-9 for the other side, which
    bfloat16 rounds to 1. Scores 3 and 2.015625 (twice) have (2 * 7.03125 / 3)^2 as their centring penalty."""
    three, two = torch.tensor([3.0], dtype=torch.bfloat16), torch.tensor([2.0], dtype=torch.bfloat16)
    result = pairwise_loss(three, two)
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)
    soft = pairwise_loss(three, two, soft_labels=torch.tensor([2.0**-9], dtype=torch.bfloat16))
    assert soft.loss.item() == pytest.approx(math.log1p(math.exp(-1)) + 1 - 2.0**-9, rel=1e-6)
    scores = torch.tensor([3.0, 2.015625, 2.015625], dtype=torch.bfloat16)
    assert centring_penalty(scores, torch.zeros(3).long()).item() == pytest.approx((2 * 7.03125 / 3) ** 2, rel=1e-6)


def test_metrics_of_the_reward_loss_carry_no_gradient() -> None:
    scores = torch.tensor([1.0, 0.0], requires_grad=True)
    record = pairwise_loss(scores[:1], scores[1:])
    assert [f.name for f in dataclasses.fields(record) if getattr(record, f.name).requires_grad] == ["loss"]


def test_a_number_that_no_completion_has_is_no_group() -> None:
    """Groups 0 and 2: penalties (2 * 1)^2 and (2 * 2)^2, mean 10; the group 1 that nobody is in does not count."""
    assert centring_penalty(torch.tensor([1.0, 2.0]), torch.tensor([0, 2])).item() == 10.0


def test_no_completions_give_a_loss_of_zero() -> None:
    nothing = torch.zeros(0)
    result = ranked_loss(nothing, nothing.long(), nothing.long())
    assert (result.loss.item(), result.pair_count.item(), result.group_count.item()) == (0.0, 0, 0)
    assert centring_penalty(nothing, nothing.long()).item() == 0.0
