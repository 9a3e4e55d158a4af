"""What must hold of the span loss and of length decorrelation for any numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.losses import SpanLoss, divergence_span_loss, length_penalty, ranked_loss

quick = settings(max_examples=40, derandomize=True, deadline=None)
seeds = st.integers(0, 2**31)


class Answers:
    """Up to three groups of one to four ranked answers, in shuffled order, of one to five tokens out of three."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.size = self.integer(1, 3)
        groups = [g for g in range(self.size) for _ in range(self.integer(1, 4))]
        self.groups = torch.tensor(groups)[torch.randperm(len(groups), generator=self.random)]
        self.ranks = torch.randint(0, 3, self.groups.shape, generator=self.random)
        shape = (len(groups), 5)
        self.ids = torch.randint(0, 3, shape, generator=self.random)
        lengths = torch.randint(1, 6, (len(groups), 1), generator=self.random)
        self.mask = torch.arange(5) < lengths
        self.scores = 2 * torch.randn(shape, generator=self.random, dtype=torch.float64)
        self.options = {
            name: torch.rand(self.size, generator=self.random, dtype=torch.float64)
            for name in ("margins", "soft_labels", "weights")
        }

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.random))

    def loss(self, **changes: Any) -> tuple[dict[str, float], torch.Tensor]:
        """The record as numbers and the gradient by the scores."""
        given: dict[str, Any] = {"scores": self.scores, "num_groups": None} | self.options
        given |= {"ids": self.ids, "mask": self.mask, "ranks": self.ranks, "groups": self.groups} | changes
        scores = given.pop("scores").clone().requires_grad_()
        tensors = (given.pop(name) for name in ("ids", "mask", "ranks", "groups"))
        record = divergence_span_loss(scores, *tensors, **given)
        record.loss.backward()
        assert scores.grad is not None
        return numbers(record), scores.grad


def numbers(record: SpanLoss) -> dict[str, float]:
    return {field.name: float(getattr(record, field.name).detach()) for field in dataclasses.fields(record)}


@quick
@given(seed=seeds)
def test_the_span_is_what_its_definition_says(seed: int) -> None:
    """Token by token, in Python."""
    a = Answers(seed)
    total, identical = [0.0] * a.size, 0
    for group in range(a.size):
        members = [i for i in range(len(a.groups)) if a.groups[i] == group]
        losses = []
        for i in members:
            for j in members:
                if a.ranks[i] >= a.ranks[j]:
                    continue
                better, worse = (a.ids[k][a.mask[k]].tolist() for k in (i, j))
                if better == worse:
                    identical += 1
                    continue
                longer = max(len(better), len(worse))
                first = next(t for t in range(longer) if better[t : t + 1] != worse[t : t + 1])
                gaps = [
                    float(a.scores[i, min(t, len(better) - 1)] - a.scores[j, min(t, len(worse) - 1)])
                    - float(a.options["margins"][group])
                    for t in range(first, longer)
                ]
                p = float(a.options["soft_labels"][group])
                losses.append(
                    sum(p * math.log1p(math.exp(-d)) + (1 - p) * math.log1p(math.exp(d)) for d in gaps) / len(gaps)
                )
        total[group] = float(a.options["weights"][group]) * sum(losses) / max(1, len(losses))
    record, _ = a.loss()
    assert record["identical_count"] == identical
    assert record["loss"] * max(1, record["group_count"]) == pytest.approx(sum(total), rel=1e-9, abs=1e-12)


@quick
@given(seed=seeds, garbage=st.sampled_from([math.nan, math.inf, 1e300]), width=st.integers(0, 3))
def test_padding_is_never_read_and_gets_no_gradient(seed: int, garbage: float, width: int) -> None:
    a = Answers(seed)
    clean, gradient = a.loss()
    scores = torch.cat([a.scores.masked_fill(~a.mask, garbage), a.scores.new_full((len(a.ids), width), garbage)], 1)
    ids = torch.cat([a.ids.masked_fill(~a.mask, 1), torch.ones(len(a.ids), width, dtype=torch.long)], 1)
    mask = torch.cat([a.mask, torch.zeros(len(a.ids), width, dtype=torch.bool)], 1)
    soiled, soiled_gradient = a.loss(scores=scores, ids=ids, mask=mask)
    assert soiled == pytest.approx(clean, rel=1e-12)
    assert (soiled_gradient[~mask] == 0).all()
    torch.testing.assert_close(soiled_gradient[:, : a.ids.shape[1]], gradient)


@quick
@given(seed=seeds)
def test_the_order_of_answers_does_not_matter_nor_a_constant_added_to_all_scores(seed: int) -> None:
    a = Answers(seed)
    clean, gradient = a.loss()
    order = torch.randperm(len(a.groups), generator=a.random)
    moved = {"scores": a.scores[order] + 3, "ids": a.ids[order], "mask": a.mask[order]}
    record, shuffled = a.loss(**moved, ranks=a.ranks[order], groups=a.groups[order])
    assert record == pytest.approx(clean, rel=1e-9)
    torch.testing.assert_close(shuffled, gradient[order])
    torch.testing.assert_close(gradient.sum(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)


@quick
@given(seed=seeds)
def test_micro_batches_add_up_to_the_whole_step(seed: int) -> None:
    a = Answers(seed)
    whole, gradient = a.loss(num_groups=7)
    parts = {name: 0.0 for name in whole}
    for group in range(a.size):
        own = a.groups == group
        options = {name: value[group : group + 1] for name, value in a.options.items()}
        fields = {"scores": a.scores[own], "ids": a.ids[own], "mask": a.mask[own], "ranks": a.ranks[own]}
        record, part = a.loss(**fields, groups=torch.zeros_like(a.groups[own]), num_groups=7, **options)
        parts = {name: parts[name] + record[name] for name in parts}
        torch.testing.assert_close(part, gradient[own])
    assert parts == pytest.approx(whole, rel=1e-9, abs=1e-12)


@quick
@given(seed=seeds)
def test_answers_of_one_token_each_are_compared_as_their_scores_are(seed: int) -> None:
    a = Answers(seed)
    ids = torch.arange(len(a.groups))[:, None]
    span, _ = a.loss(scores=a.scores[:, :1], ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))
    pairs = ranked_loss(a.scores[:, 0], a.ranks, a.groups, **a.options)
    assert (span["loss"], span["span_loss_sum"]) == pytest.approx((pairs.loss.item(), pairs.log_loss_sum.item()))
    assert span["pair_count"] == pairs.pair_count.item()


def test_an_empty_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="without tokens"):
        divergence_span_loss(
            torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.bool), *torch.tensor([[0, 1], [0, 0]])
        )


@quick
@given(seed=seeds, scale=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_correlations_ignore_level_and_scale_and_are_those_of_numpy(seed: int, scale: float, shift: float) -> None:
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(9, 3, generator=random, dtype=torch.float64)
    lengths = torch.randperm(9, generator=random) + 1
    first = length_penalty(scores[:, :2], scores[:, 2], lengths)
    second = length_penalty(scores[:, :2] * scale + shift, scores[:, 2] * scale + shift, 3 * lengths + 1)
    torch.testing.assert_close(first.quality, second.quality)
    torch.testing.assert_close(first.loss, second.loss)
    expected = torch.corrcoef(torch.cat([scores, lengths[:, None].double()], 1).t())[3, :3]
    torch.testing.assert_close(torch.cat([first.quality, first.length_head[None]]), expected)


@quick
@given(seed=seeds, cut=st.integers(1, 8))
def test_slopes_of_the_whole_step_given_to_its_parts_add_up_to_its_gradient(seed: int, cut: int) -> None:
    """Scores that depend on shared weights, as a model's do: the gradient by the weights is the undivided step's."""
    random = torch.Generator().manual_seed(seed)
    states = torch.randn(9, 4, generator=random, dtype=torch.float64)
    lengths = torch.randint(1, 9, (9,), generator=random)
    weights = torch.randn(4, 2, generator=random, dtype=torch.float64).requires_grad_()

    def penalty(scores: torch.Tensor) -> torch.Tensor:
        return length_penalty(scores[:, :1], scores[:, 1], lengths).loss

    (whole,) = torch.autograd.grad(penalty(states @ weights), weights)
    detached = (states @ weights).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(penalty(detached), detached)
    for part in (slice(0, cut), slice(cut, 9)):
        ((states[part] @ weights) * slopes[part]).sum().backward()
    torch.testing.assert_close(weights.grad, whole)
