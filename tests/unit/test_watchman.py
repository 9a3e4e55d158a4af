"""Guards in the training loop: what they leave, how they pause and stop it, and that a restart changes nothing."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from accord.config import GuardsConfig
from accord.errors import GuardAlert, Terminated
from accord.guards import read_guard_log
from accord.training.loop import Captured, Ended, StepOutcome, run_training
from accord.training.runfolder import RunFolder

QUICK = {"baseline": 1, "window": 1, "patience": 2, "length_ratio": (1.5, 2.0)}


class Growing:
    """Its answers grow by half from step 6 on; its weight is the sum of the steps. `breaks` before that step, and is
    `told` to end in that one."""

    stage = "growing"
    keep_checkpoints = 2
    total_steps = 14

    def __init__(self, *, checkpoint_every: int = 2, breaks: int = 0, begin: int = 6, told: int = 0) -> None:
        self.checkpoint_every, self._breaks, self._begin, self._told = checkpoint_every, breaks, begin, told
        self.total = torch.zeros(1, dtype=torch.float64)

    def step(self, step: int) -> StepOutcome:
        if step == self._breaks:
            raise KeyboardInterrupt
        if step == self._told:
            os.kill(os.getpid(), signal.SIGTERM)
        self.total += step
        return StepOutcome({"rollout/completion_tokens/mean": 10.0 * 1.5 ** max(0, step - self._begin + 1)})

    def capture(self) -> Captured:
        return Captured({"growing": {"total": self.total.clone()}}, {"own": 1})

    def restore(self, captured: Captured) -> None:
        assert captured.values == {"own": 1}
        self.total = captured.tensors["growing"]["total"]


def train(trainer: Growing, folder: Path, **keys: Any) -> tuple[Ended, str]:
    text = io.StringIO()
    guards = GuardsConfig.model_validate(QUICK | keys)
    with RunFolder.open(folder, resolved_config={"stage": "growing", "guards": keys}, fingerprints={}) as run:
        ended = run_training(trainer, run, Console(file=text, width=400), guards)
    return ended, text.getvalue()


def levels(folder: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["level"]) for row in read_guard_log(folder) if "guard" in row]


# Half as long again is WARN's limit and twice is ALERT's: steps 6 and 7 warn, from step 7 on it is an ALERT.
TOLD = [(1, "OK"), (7, "WARN"), (8, "ALERT")]


def test_an_alert_that_is_logged_changes_nothing_but_is_said(tmp_path: Path) -> None:
    trainer = Growing()
    ended, printed = train(trainer, tmp_path)
    assert ended == Ended(14, 14) and float(trainer.total) == sum(range(15))
    assert levels(tmp_path) == TOLD
    assert "ALERT step 8, length: answers are" in printed
    assert "samples.jsonl" in printed  # what to do
    assert "OK step 1" not in printed  # a guard that begins to watch is logged, not said


def test_a_run_without_alarms_is_left_alone_whatever_an_alert_would_do(tmp_path: Path) -> None:
    for action in ("pause", "stop"):
        trainer = Growing(begin=99)
        assert train(trainer, tmp_path / action, on_alert=action)[0] == Ended(14, 14)
        assert levels(tmp_path / action) == [(1, "OK")]


def test_stop_goes_back_to_the_newest_checkpoint_from_before_the_alarm_began(tmp_path: Path) -> None:
    trainer = Growing(checkpoint_every=2)
    ended, _ = train(trainer, tmp_path, on_alert="stop")
    assert (ended.steps, ended.weights) == (8, 4) and ended.early is not None
    assert "length" in ended.early and "began at step 6" in ended.early and "those of step 4" in ended.early
    assert float(trainer.total) == 1 + 2 + 3 + 4
    assert read_guard_log(tmp_path)[-1] == {"step": 8, "ended": ended.early}


@pytest.mark.parametrize("every", [100, 7])
def test_without_a_checkpoint_from_before_it_goes_back_to_the_start(tmp_path: Path, every: int) -> None:
    trainer = Growing(checkpoint_every=every)
    ended, printed = train(trainer, tmp_path, on_alert="stop")
    assert ended.weights == 0 and "the weights are those that training started from" in str(ended.early)
    assert float(trainer.total) == 0
    assert "continuing" not in printed


def test_the_checkpoint_that_an_alarm_may_go_back_to_is_kept(tmp_path: Path) -> None:
    """The judge is at its best at step 3, and a fall of two standard errors is seen long after two newer checkpoints;
    those after the peak are removed as ever."""

    class Falling(Growing):
        total_steps = 40

        def step(self, step: int) -> StepOutcome:
            self.total += step
            judge = (step if step <= 3 else 3.3 - 0.1 * step) + 0.5 * (step % 2)
            return StepOutcome({"rollout/score/mean": float(step), "rollout/holdout_score/mean": judge})

    trainer = Falling(checkpoint_every=1)
    ended, _ = train(trainer, tmp_path, on_alert="stop")
    assert ended.steps > 6 and "began at step 3" in str(ended.early)
    assert ended.weights == 1 and float(trainer.total) == 1
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize("every", [2, 5])
@pytest.mark.parametrize("told", range(1, 8))
def test_a_run_that_was_told_to_end_stops_with_the_same_weights(tmp_path: Path, told: int, every: int) -> None:
    """It saves between two checkpoints, which must neither take the place of one nor be gone back to."""
    whole = Growing(checkpoint_every=every)
    expected = train(whole, tmp_path / "whole", on_alert="stop")[0]
    with pytest.raises(Terminated):
        train(Growing(checkpoint_every=every, told=told), tmp_path / "cut", on_alert="stop")
    again = Growing(checkpoint_every=every)
    assert train(again, tmp_path / "cut", on_alert="stop")[0] == expected
    assert torch.equal(again.total, whole.total)


@pytest.mark.parametrize("broken", range(2, 9))
def test_an_interrupted_run_stops_at_the_same_step_with_the_same_weights_and_log(tmp_path: Path, broken: int) -> None:
    whole = Growing()
    expected = train(whole, tmp_path / "whole", on_alert="stop")[0]
    with pytest.raises(KeyboardInterrupt):
        train(Growing(breaks=broken), tmp_path / "cut", on_alert="stop")
    again = Growing()
    assert train(again, tmp_path / "cut", on_alert="stop")[0] == expected
    assert torch.equal(again.total, whole.total)
    assert read_guard_log(tmp_path / "cut") == read_guard_log(tmp_path / "whole")


def test_pause_saves_and_goes_on_only_when_the_alert_is_acknowledged(tmp_path: Path) -> None:
    with pytest.raises(GuardAlert, match=r"growing step 8 of 14.*guards\.acknowledge=\[length\]") as paused:
        train(Growing(checkpoint_every=5), tmp_path, on_alert="pause")
    assert paused.value.exit_code == 3
    with pytest.raises(GuardAlert, match="step 8 of 14"):
        train(Growing(checkpoint_every=5), tmp_path, on_alert="pause")
    trainer = Growing(checkpoint_every=5)
    assert train(trainer, tmp_path, on_alert="pause", acknowledge=["length"])[0] == Ended(14, 14)
    assert float(trainer.total) == sum(range(15))
    assert levels(tmp_path) == TOLD


def test_a_checkpoint_from_before_there_were_guards_is_continued(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        RunFolder.open(tmp_path, resolved_config={"stage": "growing"}, fingerprints={}) as run,
    ):
        run_training(Growing(breaks=4), run, Console(file=io.StringIO()))
    assert json.loads((tmp_path / "checkpoints" / "step-00000002" / "state.json").read_text()) == {"own": 1}
    assert train(Growing(), tmp_path)[0] == Ended(14, 14)
    assert levels(tmp_path)[0] == (3, "OK")
