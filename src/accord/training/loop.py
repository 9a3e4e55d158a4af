"""The one training loop: steps, metrics, samples, checkpoints, interruption. Every method runs in it.

What survives a restart is what a trainer's `capture` returns plus the step number; everything random is a function of
keys. So a run killed at any moment and started again redoes the steps since its last checkpoint and ends bit-identical
to one that was never interrupted (on the same machine, thread count and library versions).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Console
from torch import Tensor

from accord import metrics
from accord.errors import Terminated
from accord.training.checkpoint import Snapshot, load_latest, save_checkpoint
from accord.training.progress import StageProgress
from accord.training.runfolder import RunFolder
from accord.training.signals import GracefulStop

__all__ = ["Captured", "Ended", "StepOutcome", "Trainer", "run_training"]

ENDING = "loop.ending"  # beside the trainer's values in a checkpoint: why no step follows it


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one step reports.

    metrics  by registered name
    status   a few words for the bar
    samples  for samples.jsonl
    ending   why this step is the last one, ahead of the trainer's total ("KL 12.3 exceeded the budget 12"); None = it
             is not. It must follow from what survives a restart, as everything a step does.
    """

    metrics: Mapping[str, float]
    status: str = ""
    samples: tuple[Mapping[str, Any], ...] = ()
    ending: str | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """How training ended: steps done, and why ahead of the trainer's total, None if not."""

    steps: int
    early: str | None = None


@dataclass(frozen=True, slots=True)
class Captured:
    """All that survives a restart besides the step: tensors by component, and JSON values."""

    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any] = field(default_factory=dict)


class Trainer(Protocol):
    """What a method gives to the loop."""

    stage: str
    total_steps: int
    checkpoint_every: int
    keep_checkpoints: int

    def step(self, step: int) -> StepOutcome: ...

    def capture(self) -> Captured: ...

    def restore(self, captured: Captured) -> None: ...


def run_training(trainer: Trainer, run: RunFolder, console: Console) -> Ended:
    """Run `trainer` from its newest good checkpoint, or from the start, to its last step or to one that ends it early.

    Raises: Terminated after saving when SIGTERM or SIGINT arrived.
    """
    done, early = _resume(trainer, run, console)
    with (
        GracefulStop() as stop,
        StageProgress(console, trainer.stage, trainer.total_steps, done) as progress,
    ):
        while done < trainer.total_steps and early is None:
            step = done + 1
            started, cpu_started = time.monotonic(), time.process_time()
            outcome = trainer.step(step)
            clocks = {
                "time/step_seconds": time.monotonic() - started,
                "time/step_cpu_seconds": time.process_time() - cpu_started,
            }
            _record(run, step, outcome, clocks)
            early = outcome.ending
            last = step == trainer.total_steps or early is not None
            # Read once: a signal between the two uses would claim a save that did not happen.
            stopping = stop.requested is not None
            if step % trainer.checkpoint_every == 0 or last or stopping:
                _save(trainer, run, step, early)
            progress.advance(outcome.status)
            done = step
            if stopping:
                break
    # Outside the context, where no signal can be noted any more: one that came during the last save counts too.
    if stop.requested is not None:
        raise Terminated(
            f"stopped by signal {stop.requested} at {trainer.stage} step {done} of {trainer.total_steps}; "
            "the state is saved: run the same command again to continue",
            exit_code=128 + stop.requested,
        )
    return Ended(done, early)


def _resume(trainer: Trainer, run: RunFolder, console: Console) -> tuple[int, str | None]:
    """Steps done, and why no step follows them, None if one may."""
    loaded = load_latest(run.checkpoints)
    for note in loaded.notes:
        console.print(f"[yellow]{note}[/]", highlight=False)
    if loaded.snapshot is None:
        run.truncate_after(0)
        return 0, None
    snapshot = loaded.snapshot
    early = snapshot.values.pop(ENDING, None)
    trainer.restore(Captured(snapshot.tensors, snapshot.values))
    run.truncate_after(snapshot.step)
    console.print(f"  continuing {trainer.stage} after step {snapshot.step} of {trainer.total_steps}", highlight=False)
    return snapshot.step, early


def _record(run: RunFolder, step: int, outcome: StepOutcome, clocks: Mapping[str, float]) -> None:
    row = {**outcome.metrics, **clocks}
    for name in row:
        metrics.check(name)
    # NaN is no JSON number: a metric without a value this step is left out of the line.
    run.append_metrics(step, {name: value for name, value in row.items() if math.isfinite(value)})
    if outcome.samples:
        run.append_samples(step, outcome.samples)


def _save(trainer: Trainer, run: RunFolder, step: int, early: str | None) -> None:
    captured = trainer.capture()
    values = captured.values if early is None else {**captured.values, ENDING: early}
    run.sync()
    save_checkpoint(run.checkpoints, Snapshot(step, captured.tensors, values), keep=trainer.keep_checkpoints)
