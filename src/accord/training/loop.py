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
from rich.markup import escape
from torch import Tensor

from accord import metrics
from accord.config import GuardsConfig
from accord.errors import GuardAlert, Terminated
from accord.models.compiled import compile_seconds
from accord.phases import ITERATION, phase
from accord.training.checkpoint import Snapshot, load_before, load_latest, save_checkpoint
from accord.training.progress import StageProgress
from accord.training.runfolder import RunFolder
from accord.training.signals import GracefulStop
from accord.training.watchman import Alarm, Watchman

__all__ = ["Captured", "Ended", "StepOutcome", "Trainer", "run_training"]

GUARDS = "loop.guards"  # beside the trainer's values in a checkpoint: what the guards remember
ENDING = "loop.ending"  # beside the trainer's values in a checkpoint: why no step follows it


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one step reports.

    metrics  by registered name
    status   a few words for the bar
    samples  for samples.jsonl
    notes    sentences for people, each said once
    ending   why this step is the last one, ahead of the trainer's total ("KL 12.3 exceeded the budget 12"); None = it
             is not. It must follow from what survives a restart, as everything a step does.
    """

    metrics: Mapping[str, float]
    status: str = ""
    samples: tuple[Mapping[str, Any], ...] = ()
    ending: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """How training ended: steps done, and why ahead of the trainer's total, None if not.

    weights  the step whose weights are kept: the last one, but where a guard stopped an earlier one
    """

    steps: int
    weights: int
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


def run_training(trainer: Trainer, run: RunFolder, console: Console, guards: GuardsConfig | None = None) -> Ended:
    """Run `trainer` from its newest good checkpoint, or from the start, to its last step or to one that ends it early.

    With `guards` every step's metrics are watched. A guard that stops the stage takes it back to a checkpoint from
    before the alarm, at the earliest to the start, which is saved too; nothing is saved then, because the steps since
    the last checkpoint lead to the same alarm again.

    Raises: Terminated after saving when SIGTERM or SIGINT arrived; GuardAlert after saving when a guard pauses.
    """
    watch = Watchman(guards, run, console)
    done, early = _resume(trainer, run, console, watch)
    kept: int | None = None
    if done == 0 and watch.may_stop:
        _save(trainer, run, 0, None, watch)
    with (
        GracefulStop() as stop,
        StageProgress(console, trainer.stage, trainer.total_steps, done) as progress,
    ):
        while done < trainer.total_steps and early is None and watch.pausing is None:
            with phase(ITERATION):
                step = done + 1
                started, cpu_started, compiled = time.monotonic(), time.process_time(), compile_seconds()
                outcome = trainer.step(step)
                clocks = {
                    "time/step_seconds": time.monotonic() - started,
                    "time/step_cpu_seconds": time.process_time() - cpu_started,
                }
                if compile_seconds() > compiled:
                    clocks["time/compile_seconds"] = compile_seconds() - compiled
                with phase("logging"):
                    watch.observe(step, _record(run, step, outcome, clocks))
                if watch.stopping is not None:
                    done = step
                    kept, early = _go_back(trainer, run, step, watch.stopping)
                    watch.ended(step, early)
                    break
                early = outcome.ending
                last = step == trainer.total_steps or early is not None or watch.pausing is not None
                # Read once: a signal between the two uses would claim a save that did not happen.
                stopping = stop.requested is not None
                if step % trainer.checkpoint_every == 0 or last or stopping:
                    _save(trainer, run, step, early, watch)
                progress.advance(outcome.status)
                for note in outcome.notes:
                    console.print(f"  [yellow]{escape(note)}[/]", highlight=False, soft_wrap=True)
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
    if watch.pausing is not None and done < trainer.total_steps and early is None:
        raise GuardAlert(watch.pausing.request(f"{trainer.stage} step {done} of {trainer.total_steps}"))
    return Ended(done, done if kept is None else kept, early)


def _go_back(trainer: Trainer, run: RunFolder, step: int, alarm: Alarm) -> tuple[int, str]:
    """Restore the newest state from before the alarm began; returns its step, and why training ended.

    What step k measures is the work of the weights after step k - 1: the first suspicious ones have to go as well.
    """
    snapshot = load_before(run.checkpoints, alarm.begun - 1, every=trainer.checkpoint_every)
    if snapshot is None:
        return step, f"{alarm.text}; no checkpoint from before it is left, so the weights are those of step {step}"
    _restore(trainer, snapshot)
    place = f"those of step {snapshot.step}" if snapshot.step else "those that training started from"
    return snapshot.step, f"{alarm.text}; the weights are {place}"


def _restore(trainer: Trainer, snapshot: Snapshot) -> None:
    own = {name: value for name, value in snapshot.values.items() if name not in (ENDING, GUARDS)}
    trainer.restore(Captured(snapshot.tensors, own))


def _resume(trainer: Trainer, run: RunFolder, console: Console, watch: Watchman) -> tuple[int, str | None]:
    """Steps done, and why no step follows them, None if one may."""
    loaded = load_latest(run.checkpoints)
    for note in loaded.notes:
        console.print(f"[yellow]{note}[/]", highlight=False)
    if loaded.snapshot is None:
        run.truncate_after(0)
        return 0, None
    snapshot = loaded.snapshot
    _restore(trainer, snapshot)
    watch.restore(snapshot.values.get(GUARDS))
    run.truncate_after(snapshot.step)
    if snapshot.step:
        console.print(
            f"  continuing {trainer.stage} after step {snapshot.step} of {trainer.total_steps}", highlight=False
        )
    return snapshot.step, snapshot.values.get(ENDING)


def _record(run: RunFolder, step: int, outcome: StepOutcome, clocks: Mapping[str, float]) -> dict[str, float]:
    """Log a step; returns its finite metrics."""
    row = {**outcome.metrics, **clocks}
    for name in row:
        metrics.check(name)
    # NaN is no JSON number: a metric without a value this step is left out of the line.
    finite = {name: value for name, value in row.items() if math.isfinite(value)}
    run.append_metrics(step, finite)
    if outcome.samples:
        run.append_samples(step, outcome.samples)
    return finite


@phase("checkpoint")
def _save(trainer: Trainer, run: RunFolder, step: int, early: str | None, watch: Watchman) -> None:
    captured = trainer.capture()
    loop = {GUARDS: watch.state(), ENDING: early}
    values = captured.values | {name: value for name, value in loop.items() if value is not None}
    run.sync()
    save_checkpoint(
        run.checkpoints, Snapshot(step, captured.tensors, values),
        keep=trainer.keep_checkpoints, every=trainer.checkpoint_every, before=watch.may_begin(step),
    )  # fmt: skip
