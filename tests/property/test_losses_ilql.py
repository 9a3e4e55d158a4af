"""What must hold of the ILQL terms for any numbers: nothing leaks, nothing depends on batching or padding."""

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

from accord.losses import ILQLTerm, awac_loss, cql_loss, expectile_loss, ilql_advantages, q_loss

quick = settings(max_examples=50, derandomize=True, deadline=None)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**31))
NAMES = ("q", "target_q", "values", "rewards", "logprobs")
GAMMA, TAU, BETA = 0.9, 0.8, 0.7


class Actions:
    """Random tensors: (2, C, T) of the heads, (C, T) of the others."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        rows, columns, seed = shape
        self.random = torch.Generator().manual_seed(seed)
        self.mask = torch.rand(rows, columns, generator=self.random) < 0.7
        self.q, self.target_q = self.normal(2, rows, columns), self.normal(2, rows, columns)
        self.values, self.rewards = self.normal(rows, columns), self.normal(rows, columns)
        self.logprobs = -self.normal(rows, columns).abs()

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.random, dtype=torch.float64)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Actions:
        """Every tensor, the mask too, after `change`, which may touch the last two dimensions."""
        other = Actions.__new__(Actions)
        other.random = self.random
        for name in (*NAMES, "mask"):
            setattr(other, name, change(getattr(self, name)))
        return other


# The term, and the one tensor it trains.
Term = tuple[Callable[..., ILQLTerm], str]
TERMS: dict[str, Term] = {
    "q": (lambda a, **n: q_loss(a.q, a.values, a.rewards, a.mask, gamma=GAMMA, **n), "q"),
    "expectile": (lambda a, **n: expectile_loss(a.values, a.target_q, a.mask, tau=TAU, **n), "values"),
    "cql": (lambda a, **n: cql_loss(a.q, a.mask, **n), "q"),
    "awac": (lambda a, **n: awac_loss(a.logprobs, a.target_q, a.values, a.mask, beta=BETA, **n), "logprobs"),
}
every_term = pytest.mark.parametrize("term", TERMS.values(), ids=TERMS.keys())


def evaluate(term: Term, actions: Actions, **count: float) -> tuple[dict[str, float], Tensor]:
    """All fields of the record as numbers, and the gradient of the tensor it trains; no other tensor gets any."""
    call, trained = term
    leaves = {name: getattr(actions, name).clone().requires_grad_() for name in NAMES}
    record = call(type("", (), {**leaves, "mask": actions.mask}), **count)
    record.loss.backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [trained]
    assert not record.loss_sum.requires_grad
    numbers = {field.name: getattr(record, field.name).item() for field in dataclasses.fields(record)}
    gradient = leaves[trained].grad
    assert gradient is not None
    return numbers, gradient


@every_term
@quick
@given(shape=shapes, garbage=st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 7.0]))
def test_masked_tokens_receive_no_gradient_and_change_nothing(
    term: Term, shape: tuple[int, int, int], garbage: float
) -> None:
    a = Actions(shape)
    clean, gradient = evaluate(term, a)
    dirty = a.changed(lambda x: x if x.dtype == torch.bool else x.masked_fill(~a.mask, garbage))
    soiled, soiled_gradient = evaluate(term, dirty)
    assert soiled == clean
    assert torch.equal(soiled_gradient, gradient)
    assert (soiled_gradient.masked_select(~a.mask) == 0).all()


@every_term
@quick
@given(shape=shapes, places=st.lists(st.integers(0, 7), min_size=1, max_size=4))
def test_tokens_that_do_not_count_may_stand_anywhere(
    term: Term, shape: tuple[int, int, int], places: list[int]
) -> None:
    """On either side it is padding, in between a turn of somebody else: the value that follows skips it."""
    a = Actions(shape)
    width = a.mask.shape[1]
    order = sorted([*range(width), *(min(place, width) - 0.5 for place in places)])
    columns = torch.tensor([int(place) if place == int(place) else width for place in order])

    def spread(x: Tensor) -> Tensor:
        other = torch.zeros_like(x[..., :1]) if x.dtype == torch.bool else a.normal(*x.shape[:-1], 1)
        return torch.cat([x, other], -1)[..., columns]

    plain, gradient = evaluate(term, a)
    found, spread_gradient = evaluate(term, a.changed(spread))
    assert found == pytest.approx(plain, rel=1e-12, abs=1e-15)
    torch.testing.assert_close(spread_gradient[..., columns < width], gradient, rtol=1e-12, atol=1e-15)


@every_term
@quick
@given(shape=shapes)
def test_the_order_of_completions_does_not_matter(term: Term, shape: tuple[int, int, int]) -> None:
    a = Actions(shape)
    plain, gradient = evaluate(term, a)
    rows = torch.randperm(len(a.mask), generator=a.random)
    found, shuffled = evaluate(term, a.changed(lambda x: x[..., rows, :]))
    assert found == pytest.approx(plain, rel=1e-12, abs=1e-15)
    torch.testing.assert_close(shuffled, gradient[..., rows, :], rtol=1e-12, atol=1e-15)


@every_term
@quick
@given(shape=shapes, cut=st.integers(0, 5))
def test_micro_batches_add_up_to_the_whole_step(term: Term, shape: tuple[int, int, int], cut: int) -> None:
    a = Actions(shape)
    whole, gradient = evaluate(term, a)
    count = int(a.mask.sum())
    first, first_gradient = evaluate(term, a.changed(lambda x: x[..., :cut, :]), num_tokens=count)
    second, second_gradient = evaluate(term, a.changed(lambda x: x[..., cut:, :]), num_tokens=count)
    assert {name: first[name] + second[name] for name in whole} == pytest.approx(whole, rel=1e-12, abs=1e-15)
    both = torch.cat([first_gradient, second_gradient], -2)
    torch.testing.assert_close(both, gradient, rtol=1e-12, atol=1e-15)


@every_term
def test_a_batch_in_which_nothing_counts_gives_zero_and_not_nan(term: Term) -> None:
    a = Actions((2, 3, 0))
    a.mask = torch.zeros_like(a.mask)
    record, gradient = evaluate(term, a)
    assert set(record.values()) == {0}
    assert (gradient == 0).all()


@every_term
def test_low_precision_inputs_are_summed_in_float32(term: Term) -> None:
    """4,097 equal terms: in bfloat16, which has 8 bits, a running sum would stop growing long before. With Q = 2,
    target Q = V = 0, rewards 0 and log-probabilities -1/2: 2 * 4, 0, -2 * 2 and 1/2."""
    a = Actions((1, 4097, 0)).changed(lambda x: torch.zeros_like(x, dtype=torch.bfloat16))
    a.mask = torch.ones(1, 4097, dtype=torch.bool)
    a.q, a.logprobs = a.q + 2, a.logprobs - 0.5
    record = term[0](a)
    expected = {"q": 8.0, "expectile": 0.0, "cql": -4.0, "awac": 0.5}
    assert record.loss.dtype == torch.float32
    assert record.loss.item() == pytest.approx(expected[next(name for name, t in TERMS.items() if t is term)])


@quick
@given(shape=shapes)
def test_the_smaller_target_head_judges_whichever_it_is(shape: tuple[int, int, int]) -> None:
    """Swapping the heads, or raising the larger one, changes nothing; lowering the smaller one does."""
    a = Actions(shape)
    smaller, larger = a.target_q.amin(0), a.target_q.amax(0)
    variants = (
        a.target_q.flip(0),
        torch.stack([smaller, larger + 3]),
        torch.stack([larger + 1, smaller]),
        torch.stack([smaller, smaller]),
    )
    for judge in (TERMS["expectile"], TERMS["awac"]):
        plain, gradient = evaluate(judge, a)
        for target_q in variants:
            other = a.changed(lambda x: x)
            other.target_q = target_q
            assert evaluate(judge, other)[0] == plain
            assert torch.equal(evaluate(judge, other)[1], gradient)
        if a.mask.any():
            lower = a.changed(lambda x: x)
            lower.target_q = torch.stack([smaller - 1, larger])
            assert evaluate(judge, lower)[0] != plain
    expected = torch.where(a.mask, smaller - a.values, 0.0)
    assert torch.equal(ilql_advantages(a.target_q, a.values, a.mask), expected)


@quick
@given(shape=shapes)
def test_q_learns_towards_the_discounted_return_where_the_values_know_it(shape: tuple[int, int, int]) -> None:
    """Rewards summed backwards over the counted tokens of each completion, one by one: with V equal to them, Q equal to
    them costs nothing."""
    a = Actions(shape)
    returns = torch.zeros_like(a.values)
    for row, keep in enumerate(a.mask):
        following = 0.0
        for t in reversed(keep.nonzero()[:, 0].tolist()):
            following = a.rewards[row, t].item() + GAMMA * following
            returns[row, t] = following
    perfect = a.changed(lambda x: x)
    perfect.values, perfect.q = returns, torch.stack([returns, returns])
    assert evaluate(TERMS["q"], perfect)[0]["loss_sum"] == pytest.approx(0, abs=1e-20)
    perfect.q = torch.stack([returns + 1, returns])
    assert evaluate(TERMS["q"], perfect)[0]["loss_sum"] == pytest.approx(int(a.mask.sum()))


@pytest.mark.parametrize(
    "call",
    [
        lambda a, b, heads, mask: q_loss(heads, b, a, mask, gamma=GAMMA),
        lambda a, b, heads, mask: q_loss(heads, a, b, mask, gamma=GAMMA),
        lambda a, b, heads, mask: q_loss(a, a, a, mask, gamma=GAMMA),
        lambda a, b, heads, mask: q_loss(heads[..., :1], a, a, mask, gamma=GAMMA),
        lambda a, b, heads, mask: expectile_loss(b, heads, mask, tau=TAU),
        lambda a, b, heads, mask: expectile_loss(a, heads[..., :1], mask, tau=TAU),
        lambda a, b, heads, mask: cql_loss(a, mask),
        lambda a, b, heads, mask: cql_loss(heads[..., :1], mask),
        lambda a, b, heads, mask: awac_loss(b, heads, a, mask, beta=BETA),
        lambda a, b, heads, mask: awac_loss(a, heads, b, mask, beta=BETA),
        lambda a, b, heads, mask: ilql_advantages(heads[..., :1], a, mask),
    ],
)
def test_shapes_that_would_broadcast_are_refused(call: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="expected equal shapes"):
        call(torch.zeros(3, 4), torch.zeros(3, 1), torch.zeros(2, 3, 4), torch.ones(3, 4, dtype=torch.bool))
