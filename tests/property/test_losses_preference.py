"""What must hold of the preference losses, paired and unpaired, for any numbers."""

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
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    conservative_dpo_loss,
    cpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    mean_logprobs,
    orpo_loss,
    rdpo_loss,
    robust_dpo_loss,
    sequence_logprobs,
    simpo_loss,
)

quick = settings(max_examples=50, derandomize=True, deadline=None)
seeds = st.integers(0, 2**31)
BETA, EPS, TAU, ALPHA, GAMMA, COEF, POINT = 0.3, 0.2, 0.4, 0.05, 0.7, 0.25, 0.15


class Pairs:
    """Random (G,) tensors: log-probabilities below 0, labels, margins, lengths and kinds."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.size = int(torch.randint(1, 7, (), generator=self.random))
        self.chosen, self.rejected, self.ref_chosen, self.ref_rejected = (-10 * self.uniform() for _ in range(4))
        self.soft_labels, self.margins = self.uniform(), 2 * self.uniform() - 1
        self.chosen_lengths, self.rejected_lengths = (30 * self.uniform()).long(), (30 * self.uniform()).long()
        self.desirable = self.uniform() < 0.6

    def uniform(self) -> Tensor:
        return torch.rand(self.size, generator=self.random, dtype=torch.float64)

    @property
    def logprobs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.chosen, self.rejected, self.ref_chosen, self.ref_rejected

    @property
    def labels(self) -> dict[str, Tensor]:
        return {"soft_labels": self.soft_labels, "margins": self.margins}

    @property
    def lengths(self) -> dict[str, Tensor]:
        return {"chosen_lengths": self.chosen_lengths, "rejected_lengths": self.rejected_lengths}


# Every loss as a function of (chosen, rejected, reference of chosen, reference of rejected, the pairs' other tensors).
# The unpaired ones see the chosen column as completions of both kinds.
AnyLoss = Callable[..., Any]
WITH_REFERENCE: dict[str, AnyLoss] = {
    "dpo": lambda c, r, rc, rr, p, **n: dpo_loss(c, r, rc, rr, beta=BETA, **p.labels, **n),
    "conservative": lambda c, r, rc, rr, p, **n: conservative_dpo_loss(
        c, r, rc, rr, beta=BETA, label_smoothing=EPS, **p.labels, **n
    ),
    "robust": lambda c, r, rc, rr, p, **n: robust_dpo_loss(
        c, r, rc, rr, beta=BETA, label_smoothing=EPS, **p.labels, **n
    ),
    "ipo": lambda c, r, rc, rr, p, **n: ipo_loss(c, r, rc, rr, tau=TAU, soft_labels=p.soft_labels, **n),
    "hinge": lambda c, r, rc, rr, p, **n: hinge_loss(c, r, rc, rr, beta=BETA, **p.labels, **n),
    "rdpo": lambda c, r, rc, rr, p, **n: rdpo_loss(
        c, r, rc, rr, beta=BETA, length_coef=ALPHA, **p.lengths, **p.labels, **n
    ),
    "apo_zero": lambda c, r, rc, rr, p, **n: apo_zero_loss(c, r, rc, rr, beta=BETA, **n),
    "apo_down": lambda c, r, rc, rr, p, **n: apo_down_loss(c, r, rc, rr, beta=BETA, **n),
}
WITHOUT_REFERENCE: dict[str, AnyLoss] = {
    "simpo": lambda c, r, rc, rr, p, **n: simpo_loss(c, r, beta=BETA, gamma=GAMMA, **p.labels, **n),
    "cpo": lambda c, r, rc, rr, p, **n: cpo_loss(c, r, beta=BETA, **p.labels, **n),
    "orpo": lambda c, r, rc, rr, p, **n: orpo_loss(c, r, odds_ratio_coef=COEF, **n),
}
UNPAIRED: dict[str, AnyLoss] = {
    "kto": lambda c, r, rc, rr, p, **n: kto_loss(
        c,
        rc,
        p.desirable,
        torch.tensor(POINT),
        beta=BETA,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        num_completions=n.get("num_pairs"),
    ),
    "bco": lambda c, r, rc, rr, p, **n: bco_loss(
        c, rc, p.desirable, torch.tensor(POINT), beta=BETA, num_completions=n.get("num_pairs")
    ),
}
LOSSES = WITH_REFERENCE | WITHOUT_REFERENCE | UNPAIRED


def each(losses: dict[str, AnyLoss]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("loss", losses.values(), ids=losses.keys())


def evaluate(loss: AnyLoss, logprobs: tuple[Tensor, ...], p: Any, **count: float) -> tuple[dict[str, float], Tensor]:
    """All fields of the record as numbers, and the gradient (2, G) wrt the chosen and rejected log-probabilities."""
    policy = torch.stack(logprobs[:2]).requires_grad_()
    record = loss(policy[0], policy[1], *logprobs[2:], p, **count)
    (gradient,) = torch.autograd.grad(record.loss, policy)
    return {field.name: getattr(record, field.name).item() for field in dataclasses.fields(record)}, gradient


def rows(p: Pairs, index: Tensor | slice) -> Pairs:
    part = Pairs.__new__(Pairs)
    part.__dict__ = {name: x[index] if isinstance(x, Tensor) else x for name, x in vars(p).items()}
    return part


@each(LOSSES)
@quick
@given(seed=seeds, cut=st.integers(0, 6))
def test_micro_batches_add_up_to_the_whole_step(loss: AnyLoss, seed: int, cut: int) -> None:
    p = Pairs(seed)
    whole, gradient = evaluate(loss, p.logprobs, p)
    parts = [rows(p, slice(None, cut)), rows(p, slice(cut, None))]
    found = [evaluate(loss, part.logprobs, part, num_pairs=p.size) for part in parts]
    assert {name: found[0][0][name] + found[1][0][name] for name in whole} == pytest.approx(whole, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(torch.cat([g for _, g in found], 1), gradient, rtol=1e-12, atol=1e-15)


@each(LOSSES)
@quick
@given(seed=seeds)
def test_the_order_of_pairs_does_not_matter(loss: AnyLoss, seed: int) -> None:
    p = Pairs(seed)
    plain, gradient = evaluate(loss, p.logprobs, p)
    order = torch.randperm(p.size, generator=p.random)
    shuffled = rows(p, order)
    record, shuffled_gradient = evaluate(loss, shuffled.logprobs, shuffled)
    assert record == pytest.approx(plain, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(shuffled_gradient, gradient[:, order], rtol=1e-12, atol=1e-15)


@each(LOSSES)
@quick
@given(seed=seeds)
def test_the_loss_is_its_sum_over_the_normaliser(loss: AnyLoss, seed: int) -> None:
    p = Pairs(seed)
    record, _ = evaluate(loss, p.logprobs, p)
    assert record["loss"] == pytest.approx(record["loss_sum"] / p.size, rel=1e-12)
    assert evaluate(loss, p.logprobs, p, num_pairs=17)[0]["loss"] == pytest.approx(record["loss_sum"] / 17, rel=1e-12)


@each(LOSSES)
def test_nothing_carries_gradient_but_the_loss_wrt_the_policy(loss: AnyLoss) -> None:
    p = Pairs(0)
    logprobs = [x.requires_grad_() for x in p.logprobs]
    record = loss(*logprobs, p)
    assert not any(getattr(record, f.name).requires_grad for f in dataclasses.fields(record) if f.name != "loss")
    record.loss.backward()
    assert logprobs[0].grad is not None
    assert logprobs[2].grad is None and logprobs[3].grad is None


@pytest.mark.parametrize("loss", [kto_loss, bco_loss])
def test_no_gradient_passes_through_the_point_of_comparison(loss: AnyLoss) -> None:
    p = Pairs(0)
    point = torch.tensor(POINT, requires_grad=True)
    assert not loss(p.chosen, p.ref_chosen, p.desirable, point, beta=BETA).loss.requires_grad


@each(LOSSES)
def test_no_pairs_give_a_loss_of_zero(loss: AnyLoss) -> None:
    nothing = rows(Pairs(0), slice(0, 0))
    record, _ = evaluate(loss, nothing.logprobs, nothing)
    assert set(record.values()) == {0.0}


@each(WITH_REFERENCE | UNPAIRED)
@quick
@given(seed=seeds, shift=st.floats(-50, 50))
def test_a_constant_on_policy_and_reference_of_one_completion_changes_nothing(
    loss: AnyLoss, seed: int, shift: float
) -> None:
    p = Pairs(seed)
    plain, gradient = evaluate(loss, p.logprobs, p)
    for first in (0, 1):
        moved = tuple(x + shift if i % 2 == first else x for i, x in enumerate(p.logprobs))
        record, moved_gradient = evaluate(loss, moved, p)
        assert record == pytest.approx(plain, rel=1e-9, abs=1e-9)
        torch.testing.assert_close(moved_gradient, gradient, rtol=1e-9, atol=1e-12)


@each({name: WITHOUT_REFERENCE[name] for name in ("simpo", "cpo")})
@quick
@given(seed=seeds, shift=st.floats(-50, 50))
def test_a_constant_on_both_completions_changes_nothing_without_a_reference(
    loss: AnyLoss, seed: int, shift: float
) -> None:
    p = Pairs(seed)
    plain, gradient = evaluate(loss, p.logprobs, p)
    record, moved_gradient = evaluate(loss, tuple(x + shift for x in p.logprobs), p)
    for name in ("loss", "loss_sum", "margin_sum", "correct_sum"):
        assert record[name] == pytest.approx(plain[name], rel=1e-9, abs=1e-9)
    torch.testing.assert_close(moved_gradient, gradient, rtol=1e-9, atol=1e-12)


# ---- the two sides ---------------------------------------------------------------------------------------------------


@each({k: v for k, v in LOSSES.items() if k not in ("apo_zero", "apo_down", "orpo", "kto", "bco")})
@quick
@given(seed=seeds)
def test_a_swapped_pair_with_the_opposite_label_and_margin_is_the_same_pair(loss: AnyLoss, seed: int) -> None:
    p = Pairs(seed)
    plain, gradient = evaluate(loss, p.logprobs, p)
    swapped = rows(p, slice(None))
    swapped.soft_labels, swapped.margins = 1 - p.soft_labels, -p.margins
    swapped.chosen_lengths, swapped.rejected_lengths = p.rejected_lengths, p.chosen_lengths
    record, back = evaluate(loss, (p.rejected, p.chosen, p.ref_rejected, p.ref_chosen), swapped)
    assert record["loss"] == pytest.approx(plain["loss"], rel=1e-12)
    assert record["correct_sum"] == p.size - plain["correct_sum"]
    assert record["margin_sum"] == pytest.approx(-plain["margin_sum"])
    assert record["chosen_reward_sum"] == pytest.approx(plain["rejected_reward_sum"])
    torch.testing.assert_close(back.flip(0), gradient)


MIRRORS: dict[str, tuple[AnyLoss, Callable[[Tensor], Tensor]]] = {
    "dpo": (lambda *x: dpo_loss(*x, beta=BETA), lambda d: -BETA * d),
    "conservative": (
        lambda *x: conservative_dpo_loss(*x, beta=BETA, label_smoothing=EPS),
        lambda d: -(1 - 2 * EPS) * BETA * d,
    ),
    "conservative half": (lambda *x: conservative_dpo_loss(*x, beta=BETA, label_smoothing=0.5), torch.zeros_like),
    "robust": (lambda *x: robust_dpo_loss(*x, beta=BETA, label_smoothing=EPS), lambda d: -BETA * d / (1 - 2 * EPS)),
    "ipo": (lambda *x: ipo_loss(*x, tau=TAU), lambda d: -2 * d / TAU),
    "hinge": (lambda *x: hinge_loss(*x, beta=BETA), lambda d: -BETA * d - (BETA * d).clamp(-1, 1)),
    "cpo": (lambda c, r, *_: cpo_loss(c, r, beta=BETA), lambda d: -BETA * d),
}


@pytest.mark.parametrize(("loss", "expected"), MIRRORS.values(), ids=MIRRORS.keys())
@quick
@given(seed=seeds)
def test_swapping_chosen_and_rejected_mirrors_the_loss(
    loss: AnyLoss, expected: Callable[[Tensor], Tensor], seed: int
) -> None:
    """L(D) - L(-D): for a logistic loss of x it is -x, since log s(x) - log s(-x) = x; (D - t)^2 - (D + t)^2 = -4 D t
    with t = 1 / (2 tau)."""
    p = Pairs(seed)
    zeros = torch.zeros_like(p.chosen)
    difference = p.chosen - p.rejected
    there, back = loss(p.chosen, p.rejected, zeros, zeros), loss(p.rejected, p.chosen, zeros, zeros)
    assert (there.loss - back.loss).item() == pytest.approx(expected(difference).mean().item(), rel=1e-9, abs=1e-12)


@quick
@given(seed=seeds)
def test_untouched_policies_have_known_losses(seed: int) -> None:
    """At policy = reference: ln 2 for the logistic ones, -log s(alpha * difference of lengths) with lengths, 1 / (2
    tau)^2, 1, 1, 1; half the weight for KTO. Without a reference, at equal log-probabilities: ln(1 + e^gamma), ln 2,
    and the nll + lambda ln 2."""
    p = Pairs(seed)
    same = (p.chosen, p.rejected, p.chosen, p.rejected)
    twice = (p.chosen, p.chosen)
    log2 = math.log(2)
    lengths = (p.chosen_lengths - p.rejected_lengths).double()
    expected = [
        (dpo_loss(*same, beta=BETA), log2),
        (conservative_dpo_loss(*same, beta=BETA, label_smoothing=EPS), log2),
        (robust_dpo_loss(*same, beta=BETA, label_smoothing=EPS), log2),
        (ipo_loss(*same, tau=TAU), 1 / (2 * TAU) ** 2),
        (hinge_loss(*same, beta=BETA), 1.0),
        (
            rdpo_loss(*same, beta=BETA, length_coef=ALPHA, **p.lengths),
            (-ALPHA * lengths).exp().log1p().mean().item(),
        ),
        (apo_zero_loss(*same, beta=BETA), 1.0),
        (apo_down_loss(*same, beta=BETA), 1.0),
        (simpo_loss(*twice, beta=BETA, gamma=GAMMA), math.log1p(math.exp(GAMMA))),
        (cpo_loss(*twice, beta=BETA), log2),
        (orpo_loss(*twice, odds_ratio_coef=COEF), -p.chosen.mean().item() + COEF * log2),
    ]
    for record, value in expected:
        assert record.loss.item() == pytest.approx(value, rel=1e-9)
        assert (record.correct_sum.item(), record.margin_sum.item()) == (0.5 * p.size, 0.0)
    kto = kto_loss(
        p.chosen, p.chosen, p.desirable, torch.tensor(0.0), beta=BETA, desirable_weight=2.0, undesirable_weight=3.0
    )
    assert kto.loss_sum.item() == pytest.approx(p.desirable.sum().item() + 1.5 * (~p.desirable).sum().item())
    bco = bco_loss(p.chosen, p.chosen, p.desirable, torch.tensor(0.0), beta=BETA)
    assert bco.loss.item() == pytest.approx(log2)


@quick
@given(seed=seeds)
def test_options_of_zero_are_dpo(seed: int) -> None:
    p = Pairs(seed)
    plain = dpo_loss(*p.logprobs, beta=BETA, **p.labels).loss.item()
    for other in (
        conservative_dpo_loss(*p.logprobs, beta=BETA, label_smoothing=0.0, **p.labels),
        robust_dpo_loss(*p.logprobs, beta=BETA, label_smoothing=0.0, **p.labels),
        rdpo_loss(*p.logprobs, beta=BETA, length_coef=0.0, **p.lengths, **p.labels),
        cpo_loss(p.chosen - p.ref_chosen, p.rejected - p.ref_rejected, beta=BETA, **p.labels),
        simpo_loss(p.chosen - p.ref_chosen, p.rejected - p.ref_rejected, beta=BETA, gamma=0.0, **p.labels),
    ):
        assert other.loss.item() == pytest.approx(plain, rel=1e-12)


# ---- numbers at the edge ---------------------------------------------------------------------------------------------


@each(LOSSES)
@pytest.mark.parametrize("chosen", [-1e4, -1e-7, 0.0])
@pytest.mark.parametrize("rejected", [-1e4, -1e-7, 0.0])
def test_extreme_log_probabilities_give_finite_losses_and_gradients(
    loss: AnyLoss, chosen: float, rejected: float
) -> None:
    p = rows(Pairs(0), slice(0, 2))
    p.desirable = torch.tensor([True, False])
    logprobs = [torch.full((2,), x) for x in (chosen, rejected, -100.0, -100.0)]
    record, gradient = evaluate(loss, tuple(logprobs), p)
    assert all(math.isfinite(value) for value in record.values())
    assert gradient.isfinite().all()


def test_a_hopeless_pair_keeps_its_gradient() -> None:
    """-log s(-1e4) = 1e4 in floating point, derivative -1; log(sigmoid()) would be infinite, with a gradient of NaN."""
    chosen = torch.tensor([-1e4], requires_grad=True)
    zero = torch.zeros(1)
    result = dpo_loss(chosen, zero, zero, zero, beta=1.0)
    result.loss.backward()
    assert chosen.grad is not None
    assert (result.loss.item(), chosen.grad.item()) == (1e4, -1.0)


@each(LOSSES)
def test_low_precision_inputs_are_computed_in_float32(loss: AnyLoss) -> None:
    """The numbers are exact in bfloat16; their sums and differences are not, nor is 1 - p."""
    p = rows(Pairs(0), slice(0, 3))
    p.soft_labels, p.margins = torch.tensor([2.0**-9, 0.75, 1.0]), torch.tensor([2.0**-9, 0.5, -0.25])
    numbers = [-2.015625, -3.03125, -0.0078125]
    exact = tuple(torch.tensor(numbers[i % 3 :] + numbers[: i % 3]) for i in range(4))
    expected, _ = evaluate(loss, exact, p)
    p.soft_labels, p.margins = p.soft_labels.bfloat16(), p.margins.bfloat16()
    record = loss(*(x.bfloat16() for x in exact), p)
    assert record.loss.dtype in (torch.float32, torch.float64)
    assert {f.name: getattr(record, f.name).item() for f in dataclasses.fields(record)} == expected


# ---- from tokens to completions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", [sequence_logprobs, mean_logprobs])
@each(LOSSES)
@quick
@given(seed=seeds, garbage=st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_masked_tokens_receive_no_gradient_and_change_nothing(
    loss: AnyLoss, reduce: Callable[[Tensor, Tensor], Tensor], seed: int, garbage: float
) -> None:
    p = Pairs(seed)
    tokens = -torch.rand(4, p.size, 5, generator=p.random, dtype=torch.float64)
    mask = torch.rand(2, p.size, 5, generator=p.random) < 0.6

    def run(tokens: Tensor) -> tuple[float, Tensor]:
        tokens = tokens.clone().requires_grad_()
        logprobs = [reduce(tokens[i], mask[i % 2]) for i in range(4)]
        value = loss(*logprobs, p).loss
        return value.item(), torch.autograd.grad(value, tokens)[0]

    value, gradient = run(tokens)
    soiled, soiled_gradient = run(tokens.masked_fill(~mask.repeat(2, 1, 1), garbage))
    assert soiled == value
    assert torch.equal(soiled_gradient, gradient)
    assert (gradient[:2][~mask] == 0).all()


@quick
@given(seed=seeds)
def test_sums_and_means_of_log_probabilities(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(3, 4, generator=random, dtype=torch.float64)
    mask = torch.rand(3, 4, generator=random) < 0.5
    for row in range(3):
        kept = logprobs[row][mask[row]].tolist()
        assert sequence_logprobs(logprobs, mask)[row].item() == pytest.approx(math.fsum(kept), abs=1e-12)
        expected = math.fsum(kept) / max(len(kept), 1)
        assert mean_logprobs(logprobs, mask)[row].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("chosen_logprobs", lambda a, b: dpo_loss(b, a, a, a, beta=BETA)),
        ("rejected_logprobs", lambda a, b: dpo_loss(a, b, a, a, beta=BETA)),
        ("ref_chosen_logprobs", lambda a, b: dpo_loss(a, a, b, a, beta=BETA)),
        ("ref_rejected_logprobs", lambda a, b: dpo_loss(a, a, a, b, beta=BETA)),
        ("margins", lambda a, b: dpo_loss(a, a, a, a, beta=BETA, margins=b)),
        ("soft_labels", lambda a, b: dpo_loss(a, a, a, a, beta=BETA, soft_labels=b)),
        (
            "chosen_lengths",
            lambda a, b: rdpo_loss(a, a, a, a, beta=BETA, length_coef=ALPHA, chosen_lengths=b, rejected_lengths=a),
        ),
        (
            "rejected_lengths",
            lambda a, b: rdpo_loss(a, a, a, a, beta=BETA, length_coef=ALPHA, chosen_lengths=a, rejected_lengths=b),
        ),
        ("rejected_mean_logprobs", lambda a, b: simpo_loss(a, b, beta=BETA, gamma=GAMMA)),
        ("rejected_logprobs", lambda a, b: cpo_loss(a, b, beta=BETA)),
        ("rejected_mean_logprobs", lambda a, b: orpo_loss(a, b, odds_ratio_coef=COEF)),
        ("ref_logprobs", lambda a, b: kto_loss(a, b, a > 0, a.sum(), beta=BETA)),
        ("desirable", lambda a, b: kto_loss(a, a, b > 0, a.sum(), beta=BETA)),
        ("point", lambda a, b: kto_loss(a, a, a > 0, b, beta=BETA)),
        ("point", lambda a, b: bco_loss(a, a, a > 0, a, beta=BETA)),
        ("ref_logprobs", lambda a, b: kto_reference_point(a, b)),
        ("mask", lambda a, b: sequence_logprobs(a[:, None].expand(3, 4), b > 0)),
        ("mask", lambda a, b: mean_logprobs(a[:, None].expand(3, 4), b > 0)),
    ],
)
def test_shapes_that_would_broadcast_are_refused(name: str, call: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=rf"expected equal shapes, found .*\b{name} "):
        call(torch.zeros(3), torch.zeros(3, 1))
