"""The optimiser step: clip, check, update, and everything about it that must survive a restart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accord.config import OptimiserFields
from accord.errors import TrainingError
from accord.models.extras import require_bitsandbytes
from accord.models.memory import asked_for
from accord.models.precision import reading_dtype
from accord.phases import phase
from accord.training.loss_scale import LossScale

__all__ = ["Optimiser", "Update", "learning_rate_at"]

MAX_SKIPPED_IN_A_ROW = 5
# What bitsandbytes keeps beside moments of 8 bits: the numbers their bits mean, by its own names.
_TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}


def learning_rate_at(step: int, total: int, peak: float, section: OptimiserFields) -> float:
    """Learning rate of step `step` in 1..total.

    Warm-up rises linearly to `peak` over ceil(warmup_fraction * total) steps. After it, with p in [0, 1) the share of
    the remaining steps already done: constant: peak; linear: peak (1 - p); cosine: peak (1 + cos(pi p)) / 2.
    """
    warmup = math.ceil(section.warmup_fraction * total)
    if step <= warmup:
        return peak * step / warmup
    done = (step - 1 - warmup) / max(1, total - warmup)
    if section.schedule == "linear":
        return peak * (1 - done)
    if section.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimiser step did. `grad_norm` is the global norm before clipping; `applied` False = skipped."""

    grad_norm: float
    applied: bool


class Optimiser:
    """AdamW over one model, with global-norm clipping and a guard against non-finite gradients.

    Its moments are float32, or (`adamw_8bit`) of 8 bits, in blocks of 256 with a scale each; of parameters below 4,096
    numbers they are float32 then too. Source of those: Dettmers et al. 2021, arXiv:2110.02861, as in `bitsandbytes`.
    Departures: embeddings are treated like other matrices.
    Raises: ConfigError for `adamw_8bit` without bitsandbytes.
    """

    def __init__(self, model: nn.Module, section: OptimiserFields) -> None:
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for _, p in self._named if p.ndim >= 2]
        vectors = [p for _, p in self._named if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": section.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._in_8_bits = section.optimiser == "adamw_8bit"
        self._adam = _adamw(groups, section)
        self._max_grad_norm = section.max_grad_norm
        self._loss_scale = LossScale() if reading_dtype() is torch.float16 else None
        self.skipped = 0
        self._skipped_in_a_row = 0

    @phase("backward")
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to what is accumulated."""
        (loss if self._loss_scale is None else loss * self._loss_scale.scale).backward()

    @phase("optimiser")
    def update(self, learning_rate: float) -> Update:
        """Apply the accumulated gradients once and clear them.

        A non-finite gradient is skipped and counted, so one bad batch cannot poison the weights; several in a row mean
        the run is lost: TrainingError. So does memory that runs out, for it leaves some parameters updated: the
        checkpoint on disk is what to go on from.
        """
        try:
            return self._update(learning_rate)
        except RuntimeError as error:
            reason = asked_for(error)
            if reason is None:
                raise
        self.discard()
        count = sum(p.numel() for _, p in self._named)
        ways = "`model.adapter` or `model.trainable_blocks` train fewer"
        ways += "" if self._in_8_bits else ", `optimiser: adamw_8bit` needs less for each"
        raise TrainingError(
            f"out of memory in the optimiser's update of {count:,} parameters: {reason}. {ways} (settings of another "
            "run: give it a folder of its own). With more memory the same command continues from the last checkpoint"
        )

    def _update(self, learning_rate: float) -> Update:
        parameters = [p for _, p in self._named]
        if self._loss_scale is not None:
            self._loss_scale.undo([p.grad for p in parameters if p.grad is not None])
        norm = float(nn.utils.clip_grad_norm_(parameters, self._max_grad_norm))
        applied = math.isfinite(norm)
        overflowed = self._loss_scale is not None and self._loss_scale.seen(finite=applied)
        if applied:
            for group in self._adam.param_groups:
                group["lr"] = learning_rate
            self._adam.step()
            self._skipped_in_a_row = 0
        else:
            self.skipped += 1
            self._skipped_in_a_row += not overflowed
        self._adam.zero_grad(set_to_none=True)
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"the gradient was not finite in {MAX_SKIPPED_IN_A_ROW} updates in a row; the last checkpoint is good. "
                "Lower the learning rate, or look for broken rows in the data."
            )
        return Update(norm, applied)

    def discard(self) -> None:
        """Throw the accumulated gradients away."""
        self._adam.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """AdamW's moments by parameter name, for the checkpoint."""
        state = self._adam.state
        return {
            f"{key}:{name}": value
            for name, parameter in self._named
            for key, value in self._kept(state.get(parameter, {}))
        }

    def counters(self) -> dict[str, int]:
        counters = {"skipped": self.skipped, "skipped_in_a_row": self._skipped_in_a_row}
        if self._loss_scale is not None:
            counters |= {"loss_scale": self._loss_scale.scale, "loss_scale_good": self._loss_scale.good}
        return counters

    def restore(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        """Put back what `tensors` and `counters` gave."""
        parameters = dict(self._named)
        for key, value in tensors.items():
            moment, _, name = key.partition(":")
            self._adam.state[parameters[name]][moment] = value.to(parameters[name].device, copy=True)
        if self._in_8_bits:
            self._complete()
        self.skipped, self._skipped_in_a_row = counters["skipped"], counters["skipped_in_a_row"]
        if self._loss_scale is not None:
            self._loss_scale.scale, self._loss_scale.good = counters["loss_scale"], counters["loss_scale_good"]

    def _kept(self, state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint holds of a parameter: numbers as tensors, but not the tables of what 8 bits mean."""
        for key, value in state.items():
            if key not in _TABLES:
                yield key, value if isinstance(value, Tensor) else torch.tensor(value)

    def _complete(self) -> None:
        """Give restored states of 8 bits what bitsandbytes expects besides: the step as a number, and the tables."""
        adam: Any = self._adam
        adam.fill_qmap()
        for parameter, state in adam.state.items():
            state["step"] = int(state["step"])
            if state["state1"].dtype == torch.uint8:
                for key, table in _TABLES.items():
                    adam.name2qmap[table] = adam.name2qmap[table].to(parameter.device)
                    state[key] = adam.name2qmap[table]


def _adamw(groups: list[dict[str, Any]], section: OptimiserFields) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "lr": 0.0, "betas": (section.adam_beta1, section.adam_beta2), "eps": section.adam_epsilon
    }  # fmt: skip
    if section.optimiser == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    require_bitsandbytes("optimiser")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **options)
