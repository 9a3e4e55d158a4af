"""The optimiser step: schedules in closed form, clipping, the guard against broken gradients, and what is restored."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from accord.config import OptimiserFields
from accord.errors import ConfigError, TrainingError
from accord.models import extras
from accord.training.optim import MAX_SKIPPED_IN_A_ROW, Optimiser, learning_rate_at


def rates(total: int, **fields: Any) -> list[float]:
    section = OptimiserFields(**fields)
    return [learning_rate_at(step, total, 1.0, section) for step in range(1, total + 1)]


# --- schedules -------------------------------------------------------------------------------------------------------


def test_warm_up_rises_in_equal_steps_to_the_peak() -> None:
    """ceil(0.35 * 10) = 4 steps of warm-up: 1/4, 2/4, 3/4, 1; a constant rate stays there."""
    assert rates(10, warmup_fraction=0.35, schedule="constant") == [0.25, 0.5, 0.75] + [1.0] * 7


def test_a_linear_schedule_falls_in_equal_steps_towards_0() -> None:
    """Without warm-up step s of 4 has rate 1 - (s - 1)/4: the step after the last would have rate 0."""
    assert rates(4, warmup_fraction=0, schedule="linear") == [1.0, 0.75, 0.5, 0.25]


def test_a_cosine_schedule_is_half_a_cosine_over_the_steps_after_warm_up() -> None:
    """2 steps of warm-up of 6; then p = 0, 1/4, 1/2, 3/4: (1 + cos pi p)/2 = 1, (2 + sqrt 2)/4, .5, (2 - sqrt 2)/4."""
    root = math.sqrt(2)
    expected = [0.5, 1.0, 1.0, (2 + root) / 4, 0.5, (2 - root) / 4]
    assert rates(6, warmup_fraction=1 / 3, schedule="cosine") == pytest.approx(expected, rel=1e-12)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(
    total=st.integers(1, 60),
    warmup=st.floats(0, 1),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    peak=st.floats(1e-8, 1.0),
)
def test_rates_are_positive_never_above_the_peak_and_never_rise_after_warm_up(
    total: int, warmup: float, schedule: str, peak: float
) -> None:
    section = OptimiserFields(warmup_fraction=warmup, schedule=schedule)  # type: ignore[arg-type]
    found = [learning_rate_at(step, total, peak, section) for step in range(1, total + 1)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in found)
    top = max(math.ceil(warmup * total), 1)
    assert found[top - 1] == pytest.approx(peak)
    assert all(a >= b * (1 - 1e-12) for a, b in zip(found[top - 1 :], found[top:], strict=False))


# --- updates ---------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
        self.vector = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(2, 2, dtype=torch.float64), requires_grad=False)


def give_gradients(model: Model, value: float) -> None:
    for parameter in (model.matrix, model.vector):
        parameter.grad = torch.full_like(parameter, value)


def test_the_first_update_is_that_of_adamw_with_decay_on_matrices_alone() -> None:
    """At the first step AdamW moves by lr * g / (|g| + eps'), here lr; a matrix first shrinks by 1 - lr * decay."""
    model = Model()
    optimiser = Optimiser(model, OptimiserFields(weight_decay=0.5, max_grad_norm=1e9, adam_epsilon=1e-30))
    give_gradients(model, 0.25)
    update = optimiser.update(0.01)
    assert update.applied
    assert update.grad_norm == pytest.approx(0.25 * math.sqrt(6), rel=1e-12)
    torch.testing.assert_close(model.matrix, torch.full_like(model.matrix, 1 * (1 - 0.01 * 0.5) - 0.01))
    torch.testing.assert_close(model.vector, torch.full_like(model.vector, 1 - 0.01))
    assert torch.equal(model.frozen, torch.ones_like(model.frozen))
    assert model.matrix.grad is None and model.vector.grad is None


def test_gradients_are_scaled_to_the_norm_before_they_are_used_and_the_norm_before_is_reported() -> None:
    """Adam forgets the scale of its first gradient, so the moments are compared: the first is (1 - beta1) g."""
    model = Model()
    optimiser = Optimiser(model, OptimiserFields(max_grad_norm=1.0, adam_beta1=0.9))
    give_gradients(model, 100.0)
    assert optimiser.update(0.01).grad_norm == pytest.approx(100 * math.sqrt(6))
    moment = optimiser.tensors()["exp_avg:vector"]
    torch.testing.assert_close(moment, torch.full_like(moment, 0.1 / math.sqrt(6)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(broken: float) -> None:
    model, other = Model(), Model()
    optimisers = [Optimiser(m, OptimiserFields()) for m in (model, other)]
    for m, optimiser in zip((model, other), optimisers, strict=True):
        give_gradients(m, 0.5)
        optimiser.update(0.1)
    give_gradients(model, 0.5)
    assert model.vector.grad is not None
    model.vector.grad[0] = broken
    assert not optimisers[0].update(0.1).applied
    assert optimisers[0].skipped == 1
    assert torch.equal(model.matrix, other.matrix) and torch.equal(model.vector, other.vector)
    assert model.matrix.grad is None
    for m, optimiser in zip((model, other), optimisers, strict=True):
        give_gradients(m, 0.5)
        assert optimiser.update(0.1).applied
    assert torch.equal(model.matrix, other.matrix) and torch.equal(model.vector, other.vector)


def test_training_stops_after_five_broken_gradients_in_a_row_but_not_after_scattered_ones() -> None:
    model = Model()
    optimiser = Optimiser(model, OptimiserFields())
    for value in ([math.nan] * (MAX_SKIPPED_IN_A_ROW - 1) + [1.0]) * 2:
        give_gradients(model, value)
        optimiser.update(0.1)
    assert optimiser.skipped == 2 * (MAX_SKIPPED_IN_A_ROW - 1)
    for _ in range(4):
        give_gradients(model, math.nan)
        optimiser.update(0.1)
    give_gradients(model, math.nan)
    with pytest.raises(TrainingError, match="not finite in 5 updates in a row"):
        optimiser.update(0.1)


def test_a_restored_optimiser_goes_on_as_the_old_one_would_have() -> None:
    """Also in how many broken gradients in a row it has seen."""
    model, other = Model(), Model()
    section = OptimiserFields(weight_decay=0.1)
    optimiser = Optimiser(model, section)
    for value in (0.3, -0.7, math.nan, math.nan):
        give_gradients(model, value)
        optimiser.update(0.05)
    other.load_state_dict(model.state_dict())
    restored = Optimiser(other, section)
    restored.restore(optimiser.tensors(), optimiser.counters())
    for m, o in ((model, optimiser), (other, restored)):
        give_gradients(m, 0.2)
        o.update(0.05)
        assert o.skipped == 2
    assert torch.equal(model.matrix, other.matrix) and torch.equal(model.vector, other.vector)
    assert optimiser.tensors().keys() == restored.tensors().keys()
    assert all(torch.equal(value, restored.tensors()[name]) for name, value in optimiser.tensors().items())


def test_the_count_of_broken_gradients_in_a_row_survives_a_restart() -> None:
    model = Model()
    optimiser = Optimiser(model, OptimiserFields())
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        give_gradients(model, math.nan)
        optimiser.update(0.1)
    restored = Optimiser(model, OptimiserFields())
    restored.restore(optimiser.tensors(), optimiser.counters())
    give_gradients(model, math.nan)
    with pytest.raises(TrainingError):
        restored.update(0.1)


def test_restoring_copies_so_that_the_snapshot_is_not_trained_on() -> None:
    model = Model()
    optimiser = Optimiser(model, OptimiserFields())
    give_gradients(model, 1.0)
    optimiser.update(0.1)
    snapshot = {name: tensor.clone() for name, tensor in optimiser.tensors().items()}
    kept = {name: tensor.clone() for name, tensor in snapshot.items()}
    restored = Optimiser(model, OptimiserFields())
    restored.restore(snapshot, optimiser.counters())
    give_gradients(model, 1.0)
    restored.update(0.1)
    assert all(torch.equal(snapshot[name], kept[name]) for name in kept)


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_memory_that_runs_out_in_the_update_is_one_error_that_names_what_helps(
    error: type[RuntimeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    optimiser = Optimiser(model, OptimiserFields())
    give_gradients(model, 0.5)

    def fail() -> None:
        raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4194304 bytes. Error code 12")

    monkeypatch.setattr(optimiser._adam, "step", fail)
    with pytest.raises(TrainingError, match=r"update of 6 parameters: tried to allocate 4194304 bytes\.") as caught:
        optimiser.update(0.1)
    assert all(
        f"`{key}" in str(caught.value) for key in ("model.adapter", "model.trainable_blocks", "optimiser: adamw")
    )
    assert model.matrix.grad is None


def test_another_error_in_the_update_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    optimiser = Optimiser(model, OptimiserFields())
    give_gradients(model, 0.5)
    monkeypatch.setattr(optimiser._adam, "step", lambda: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        optimiser.update(0.1)


# --- moments of 8 bits -----------------------------------------------------------------------------------------------

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
EIGHT = OptimiserFields(optimiser="adamw_8bit", weight_decay=0.1)


class Wide(nn.Module):
    """A matrix that is large enough for moments of 8 bits, and a vector that is not."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(64, 72, generator=generator))
        self.vector = nn.Parameter(torch.randn(72, generator=generator))

    def step(self, optimiser: Optimiser, rate: float = 0.01) -> None:
        """Towards ones, along a gradient of many sizes."""
        (self.matrix - 1).square().mul(torch.arange(1.0, 73.0)).mean().backward()
        (self.vector - 1).square().mean().backward()
        assert optimiser.update(rate).applied


@needs_bitsandbytes
def test_moments_of_8_bits_follow_those_of_32() -> None:
    """The first step is AdamW's own, weight decay on the matrix included: moments are rounded after they are used."""
    ours, theirs = Wide(), Wide()
    start = ours.matrix.detach().clone()
    optimisers = Optimiser(ours, EIGHT), Optimiser(theirs, OptimiserFields(weight_decay=0.1))
    for model, optimiser in zip((ours, theirs), optimisers, strict=True):
        model.step(optimiser)
    torch.testing.assert_close(ours.matrix, theirs.matrix, rtol=1e-5, atol=1e-5)
    for _ in range(30):
        for model, optimiser in zip((ours, theirs), optimisers, strict=True):
            model.step(optimiser)
    torch.testing.assert_close(ours.vector, theirs.vector, rtol=1e-4, atol=1e-4)
    way = float((theirs.matrix - start).abs().mean().detach())
    assert 0 < float((ours.matrix - theirs.matrix).abs().mean().detach()) < 0.05 * way
    kinds = {key: tensor.dtype for key, tensor in optimisers[0].tensors().items() if "state" in key}
    assert kinds == {
        "state1:matrix": torch.uint8, "state2:matrix": torch.uint8,
        "state1:vector": torch.float32, "state2:vector": torch.float32,
    }  # fmt: skip


@needs_bitsandbytes
def test_moments_of_8_bits_are_restored_to_the_bit(tmp_path: Path) -> None:
    model, other = Wide(), Wide()
    optimiser = Optimiser(model, EIGHT)
    for _ in range(3):
        model.step(optimiser)
    save_file(optimiser.tensors(), tmp_path / "optimiser.safetensors")
    other.load_state_dict(model.state_dict())
    restored = Optimiser(other, EIGHT)
    restored.restore(load_file(tmp_path / "optimiser.safetensors"), optimiser.counters())
    for _ in range(3):
        model.step(optimiser)
        other.step(restored)
    assert torch.equal(model.matrix, other.matrix) and torch.equal(model.vector, other.vector)
    assert optimiser.tensors().keys() == restored.tensors().keys()
    assert all(torch.equal(value, restored.tensors()[name]) for name, value in optimiser.tensors().items())


def test_moments_of_8_bits_without_the_package_are_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"`optimiser` needs bitsandbytes, which is not installed: pip install"):
        Optimiser(Wide(), EIGHT)
