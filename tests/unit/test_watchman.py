"""Guards in the training loop: what they leave, how they pause and stop it, and that a restart changes nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from accord.config import GuardsConfig
from accord.errors import GuardAlert
from accord.guards import read_guard_log
from accord.training.loop import Captured, Ended, StepOutcome, run_training
from accord.training.runfolder import RunFolder

QUICK = {"baseline": 1, "window": 1, "patience": 2, "length_ratio": (1.5, 2.0)}


class Growing:
    """Its answers grow by half from step 6 on; its weight is the sum of the steps. `breaks` after that step once."""

    stage = "growing"
    keep_checkpoints = 2
    total_steps = 14

    def __init__(self, *, checkpoint_every: int = 2, breaks: int = 0, begin: int = 6) -> None:
        self.checkpoint_every, self._breaks, self._begin = checkpoint_every, breaks, begin
        self.total = torch.zeros(1, dtype=torch.float64)

    def step(self, step: int) -> StepOutcome:
        if step == self._breaks:
            raise KeyboardInterrupt
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


@pytest.mark.parametrize(("every", "kept"), [(100, 8), (7, 7)])
def test_without_a_checkpoint_from_before_it_keeps_the_oldest_there_is(tmp_path: Path, every: int, kept: int) -> None:
    trainer = Growing(checkpoint_every=every)
    assert f"those of step {kept}" in str(train(trainer, tmp_path, on_alert="stop")[0].early)
    assert float(trainer.total) == sum(range(kept + 1))


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
