"""What must hold of advantages from groups, and of the losses of completions, for any numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accord.losses import (
    KLLoss,
    batch_advantages,
    completion_policy_loss,
    group_advantages,
    kl_k2_loss,
    kl_k3_loss,
    ppo_policy_loss,
    rloo_advantages,
    scaled_batch_advantages,
    scaled_group_advantages,
)

quick = settings(max_examples=50, derandomize=True, deadline=None)
seeds = st.integers(0, 2**31)

GROUPED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rloo": rloo_advantages,
    "group": group_advantages,
    "scaled group": scaled_group_advantages,
}
ADVANTAGES = GROUPED | {
    "batch": lambda rewards, group_index: batch_advantages(rewards),
    "scaled batch": lambda rewards, group_index: scaled_batch_advantages(rewards),
}
every_advantage = pytest.mark.parametrize("advantages", ADVANTAGES.values(), ids=ADVANTAGES.keys())
every_grouped = pytest.mark.parametrize("advantages", GROUPED.values(), ids=GROUPED.keys())


def rewards_and_groups(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Rewards of two to four groups of two to five completions, in any order."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 6, (int(torch.randint(2, 5, (1,), generator=random)),), generator=random)
    groups = torch.arange(len(sizes)).repeat_interleave(sizes)
    groups = groups[torch.randperm(len(groups), generator=random)]
    return 3 * torch.randn(len(groups), generator=random, dtype=dtype), groups


@every_advantage
def test_no_gradient_passes_through_advantages(advantages: Callable[[Tensor, Tensor], Tensor]) -> None:
    rewards, groups = rewards_and_groups(0)
    assert not advantages(rewards.requires_grad_(), groups).requires_grad


@every_advantage
def test_low_precision_rewards_are_compared_in_float32(advantages: Callable[[Tensor, Tensor], Tensor]) -> None:
    """1, 2, 4.03125 are exact in bfloat16, their mean is not."""
    rewards, groups = torch.tensor([1.0, 2.0, 4.03125]), torch.zeros(3, dtype=torch.long)
    found = advantages(rewards.bfloat16(), groups)
    assert found.dtype == torch.float32
    assert torch.equal(found, advantages(rewards, groups))


@every_grouped
def test_shapes_that_would_broadcast_are_refused(advantages: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="expected equal shapes, found rewards"):
        advantages(torch.zeros(3), torch.zeros(3, 1, dtype=torch.long))


@every_advantage
@quick
@given(seed=seeds, shift=st.floats(-100, 100))
def test_only_differences_of_rewards_matter(
    advantages: Callable[[Tensor, Tensor], Tensor], seed: int, shift: float
) -> None:
    rewards, groups = rewards_and_groups(seed)
    torch.testing.assert_close(advantages(rewards + shift, groups), advantages(rewards, groups), rtol=0, atol=1e-9)


@every_grouped
@quick
@given(seed=seeds)
def test_a_group_may_be_shifted_alone(advantages: Callable[[Tensor, Tensor], Tensor], seed: int) -> None:
    """A prompt whose answers are all easy, or all hard, teaches as much as another."""
    rewards, groups = rewards_and_groups(seed)
    shifted = rewards + torch.tensor([10.0, -20.0, 5.0, 40.0])[groups]
    torch.testing.assert_close(advantages(shifted, groups), advantages(rewards, groups), rtol=0, atol=1e-9)


@every_grouped
@quick
@given(seed=seeds)
def test_groups_know_nothing_of_each_other(advantages: Callable[[Tensor, Tensor], Tensor], seed: int) -> None:
    rewards, groups = rewards_and_groups(seed)
    mine = groups == 0
    alone = advantages(rewards[mine], groups[mine])
    torch.testing.assert_close(advantages(rewards, groups)[mine], alone, rtol=1e-12, atol=1e-12)
    other = torch.where(mine, rewards, 7 * rewards + groups)
    assert torch.equal(advantages(other, groups)[mine], advantages(rewards, groups)[mine])


@every_advantage
@quick
@given(seed=seeds)
def test_the_order_of_completions_does_not_matter(advantages: Callable[[Tensor, Tensor], Tensor], seed: int) -> None:
    rewards, groups = rewards_and_groups(seed)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    shuffled = advantages(rewards[order], groups[order])
    torch.testing.assert_close(shuffled, advantages(rewards, groups)[order], rtol=1e-12, atol=1e-12)


@every_advantage
@quick
@given(seed=seeds)
def test_advantages_sum_to_zero_in_what_they_are_compared_within(
    advantages: Callable[[Tensor, Tensor], Tensor], seed: int
) -> None:
    rewards, groups = rewards_and_groups(seed)
    found = advantages(rewards, groups)
    assert found.sum().item() == pytest.approx(0, abs=1e-9)
    if advantages in GROUPED.values():
        assert torch.zeros(4, dtype=torch.float64).index_add(0, groups, found).abs().max() < 1e-9


@every_advantage
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@quick
@given(reward=st.floats(-1e4, 1e4), sizes=st.lists(st.integers(2, 40), min_size=1, max_size=4))
def test_equal_rewards_give_exactly_nothing_and_never_nan(
    advantages: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, reward: float, sizes: list[int]
) -> None:
    """Exactly: a rounding error divided by a deviation of rounding errors would be a signal."""
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    assert (advantages(torch.full((len(groups),), reward, dtype=dtype), groups) == 0).all()


@quick
@given(seed=seeds, scale=st.floats(1e3, 1e6))
def test_scaled_advantages_do_not_follow_the_size_of_rewards(seed: int, scale: float) -> None:
    """Up to the 1e-4 that is added to the deviation."""
    rewards, groups = rewards_and_groups(seed)
    for advantages in (scaled_group_advantages, lambda r, g: scaled_batch_advantages(r)):
        once, again = advantages(1e3 * rewards, groups), advantages(1e3 * scale * rewards, groups)
        torch.testing.assert_close(once, again, rtol=1e-4, atol=1e-4)


class Completions:
    """Random log-probabilities, advantages and weights of a few completions."""

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        rows, columns = torch.randint(1, 7, (2,), generator=random).tolist()
        self.new, self.old, self.weights = torch.randn(3, rows, columns, generator=random, dtype=torch.float64) / 3
        self.advantages = torch.randn(rows, generator=random, dtype=torch.float64)
        self.mask = torch.rand(rows, columns, generator=random) < 0.7


def completion_loss(c: Completions, new: Tensor, old: Tensor, rows: slice = slice(None)) -> Tensor:
    return completion_policy_loss(
        new, old, c.advantages[rows], c.mask[rows], clip_range=0.2, num_completions=len(c.advantages)
    ).loss


LOSSES: dict[str, Callable[..., Tensor]] = {
    "completion": completion_loss,
    "k2": lambda c, new, old, rows=slice(None): kl_k2_loss(new, old, c.weights[rows], c.mask[rows]).loss,
    "k3": lambda c, new, old, rows=slice(None): kl_k3_loss(new, old, c.weights[rows], c.mask[rows]).loss,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def value_and_gradient(loss: Callable[..., Tensor], c: Completions, *rest: slice) -> tuple[float, Tensor]:
    rows = rest[0] if rest else slice(None)
    new = c.new[rows].clone().requires_grad_()
    value = loss(c, new, c.old[rows], *rest)
    return value.item(), torch.autograd.grad(value, new)[0]


@every_loss
@quick
@given(seed=seeds, garbage=st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_masked_tokens_receive_no_gradient_and_change_nothing(
    loss: Callable[..., Tensor], seed: int, garbage: float
) -> None:
    c = Completions(seed)
    clean, gradient = value_and_gradient(loss, c)
    for name in ("new", "old", "weights"):
        setattr(c, name, getattr(c, name).masked_fill(~c.mask, garbage))
    soiled, soiled_gradient = value_and_gradient(loss, c)
    assert soiled == clean
    assert torch.equal(soiled_gradient, gradient) and (gradient[~c.mask] == 0).all()


@every_loss
@quick
@given(seed=seeds, cut=st.integers(0, 6))
def test_micro_batches_add_up_to_the_whole_step(loss: Callable[..., Tensor], seed: int, cut: int) -> None:
    c = Completions(seed)
    whole, gradient = value_and_gradient(loss, c)
    halves = [value_and_gradient(loss, c, rows) for rows in (slice(cut), slice(cut, None))]
    assert sum(value for value, _ in halves) == pytest.approx(whole, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(torch.cat([part for _, part in halves]), gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", [kl_k2_loss, kl_k3_loss])
def test_no_gradient_passes_through_the_reference_of_a_kl_term(loss: Callable[..., KLLoss]) -> None:
    c = Completions(0)
    new, old = c.new.requires_grad_(), c.old.requires_grad_()
    term = loss(new, old, c.weights, c.mask)
    assert torch.autograd.grad(term.loss, old, allow_unused=True) == (None,)
    assert not term.estimate_sum.requires_grad


@quick
@given(seed=seeds, factor=st.floats(0, 100))
def test_the_clipped_loss_is_proportional_to_the_advantages(seed: int, factor: float) -> None:
    """Why they may carry the weights of an average. Not for negative factors: clipping treats the signs differently."""
    c = Completions(seed)
    advantages = c.advantages[:, None].expand_as(c.new)
    losses = [ppo_policy_loss(c.new, c.old, f * advantages, c.mask, clip_range=0.2).loss for f in (1.0, factor)]
    assert losses[1].item() == pytest.approx(factor * losses[0].item(), rel=1e-9, abs=1e-12)


@quick
@given(seed=seeds)
def test_at_a_ratio_of_1_the_completion_loss_is_reinforce(seed: int) -> None:
    """-A times the gradient of the completion's log-probability, the same for each of its tokens."""
    c = Completions(seed)
    c.old = c.new
    value, gradient = value_and_gradient(completion_loss, c)
    assert value == pytest.approx(-c.advantages.mean().item(), rel=1e-12, abs=1e-12)
    expected = torch.where(c.mask, -c.advantages[:, None] / len(c.advantages), 0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@quick
@given(seed=seeds)
def test_kl_terms_are_never_negative_and_least_at_the_reference(seed: int) -> None:
    c = Completions(seed)
    c.weights = c.weights.abs()
    for loss in (LOSSES["k2"], LOSSES["k3"]):
        assert value_and_gradient(loss, c)[0] >= 0
    c.new = c.old
    for loss in (LOSSES["k2"], LOSSES["k3"]):
        value, gradient = value_and_gradient(loss, c)
        assert value == 0 and (gradient == 0).all()
