"""The training loop with a trainer that counts: what it saves, what it continues from, and when a signal stops it."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from accord.errors import Terminated
from accord.training.loop import Captured, Ended, StepOutcome, run_training
from accord.training.runfolder import RunFolder


class Adder:
    """Its state is the sum of the steps it has seen. `signals`: at which (phase, step) it sends SIGTERM to itself."""

    stage = "adder"
    keep_checkpoints = 2

    def __init__(
        self, *, total_steps: int = 6, checkpoint_every: int = 100, signals: tuple[str, int] = ("", 0)
    ) -> None:
        self.total_steps, self.checkpoint_every = total_steps, checkpoint_every
        self.total = torch.zeros(1, dtype=torch.float64)
        self.seen: list[int] = []
        self._signals = signals

    def step(self, step: int) -> StepOutcome:
        self._signal("step", step)
        self.total += step
        self.seen.append(step)
        return StepOutcome({"train/loss": float(self.total)})

    def capture(self) -> Captured:
        self._signal("save", self.seen[-1])
        return Captured({"adder": {"total": self.total}}, {"seen": list(self.seen)})

    def restore(self, captured: Captured) -> None:
        self.total = captured.tensors["adder"]["total"]
        self.seen = captured.values["seen"]

    def _signal(self, *moment: str | int) -> None:
        if moment == self._signals:
            os.kill(os.getpid(), signal.SIGTERM)


def train(trainer: Adder, folder: Path) -> str:
    """What is said."""
    text = io.StringIO()
    ended(trainer, folder, Console(file=text, width=200))
    return text.getvalue()


def ended(trainer: Adder, folder: Path, console: Console | None = None) -> Ended:
    with RunFolder.open(folder, resolved_config={"stage": "adder"}, fingerprints={}) as run:
        return run_training(trainer, run, console or Console(quiet=True))


def logged(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss"]) for row in rows]


WHOLE = [(1, 1.0), (2, 3.0), (3, 6.0), (4, 10.0), (5, 15.0), (6, 21.0)]


def test_every_step_is_logged_and_the_last_one_saved(tmp_path: Path) -> None:
    train(Adder(checkpoint_every=4), tmp_path)
    assert logged(tmp_path) == WHOLE
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


def test_steps_after_the_last_checkpoint_are_done_again_and_logged_once(tmp_path: Path) -> None:
    class Broken(Adder):
        def step(self, step: int) -> StepOutcome:
            if step == 4:
                raise KeyboardInterrupt
            return super().step(step)

    with pytest.raises(KeyboardInterrupt):
        train(Broken(checkpoint_every=2), tmp_path)
    assert logged(tmp_path) == WHOLE[:3]
    trainer = Adder(checkpoint_every=2)
    assert "continuing adder after step 2 of 6" in train(trainer, tmp_path)
    assert logged(tmp_path) == WHOLE
    assert trainer.seen == [1, 2, 3, 4, 5, 6]


def test_a_finished_training_does_no_step_again(tmp_path: Path) -> None:
    train(Adder(), tmp_path)
    train(Adder(signals=("step", 6)), tmp_path)
    assert logged(tmp_path) == WHOLE


@pytest.mark.parametrize(
    ("signals", "stops_after"),
    [(("step", 1), 1), (("step", 3), 3), (("save", 4), 5), (("step", 6), 6), (("save", 6), 6)],
)
def test_a_signal_at_any_moment_stops_after_saving_and_is_never_lost(
    tmp_path: Path, signals: tuple[str, int], stops_after: int
) -> None:
    """Even one that comes while the last state is being saved: whoever sent it waits for the process to end."""
    with pytest.raises(Terminated, match=f"signal 15 at adder step {stops_after} of 6") as stopped:
        train(Adder(checkpoint_every=4, signals=signals), tmp_path)
    assert stopped.value.exit_code == 143
    trainer = Adder(checkpoint_every=4)
    assert f"after step {stops_after} of 6" in train(trainer, tmp_path)
    assert logged(tmp_path) == WHOLE
    assert float(trainer.total) == 21


def test_a_metric_that_is_no_number_this_step_is_left_out_of_the_line(tmp_path: Path) -> None:
    class Unmeasured(Adder):
        def step(self, step: int) -> StepOutcome:
            super().step(step)
            return StepOutcome({"train/loss": float("nan"), "train/grad_norm": 1.0})

    train(Unmeasured(total_steps=1), tmp_path)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row.keys() == {"step", "train/grad_norm", "time/step_seconds", "time/step_cpu_seconds"}


class Stopping(Adder):
    """Its total exceeds a budget of 9 in step 4."""

    def step(self, step: int) -> StepOutcome:
        outcome = super().step(step)
        return replace(outcome, ending="the total exceeded 9" if self.total > 9 else None)


def test_a_step_that_ends_the_training_is_the_last_one_and_stays_it(tmp_path: Path) -> None:
    assert ended(Stopping(), tmp_path) == Ended(4, 4, "the total exceeded 9")
    assert logged(tmp_path) == WHOLE[:4]
    again = Stopping()
    assert ended(again, tmp_path) == Ended(4, 4, "the total exceeded 9")
    assert again.seen == [1, 2, 3, 4]
    assert logged(tmp_path) == WHOLE[:4]


def test_a_training_that_runs_to_its_last_step_did_not_end_early(tmp_path: Path) -> None:
    assert ended(Adder(), tmp_path) == ended(Adder(), tmp_path) == Ended(6, 6)


@pytest.mark.parametrize("signals", [("step", 4), ("save", 4)])
def test_a_signal_during_the_step_that_ends_the_training_loses_no_ending(
    tmp_path: Path, signals: tuple[str, int]
) -> None:
    with pytest.raises(Terminated, match="at adder step 4 of 6"):
        train(Stopping(signals=signals), tmp_path)
    assert ended(Stopping(), tmp_path) == Ended(4, 4, "the total exceeded 9")
    assert logged(tmp_path) == WHOLE[:4]
