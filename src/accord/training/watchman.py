"""The guards of a stage at work: they see every step, say what changed, and tell the loop to pause or to stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from accord.config import GuardsConfig
from accord.guards import GUARDS, GuardMonitor, Verdict
from accord.training.runfolder import RunFolder

__all__ = ["Alarm", "Watchman"]

COLOURS = {"OK": "green", "WARN": "yellow", "ALERT": "bold red"}


@dataclass(frozen=True, slots=True)
class Alarm:
    """Guards at ALERT, by name, and the first step at which one of them saw something; `acknowledged` are those whose
    alerts were looked into before."""

    guards: tuple[str, ...]
    begun: int
    acknowledged: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        one = len(self.guards) == 1
        return f"the guard{'' if one else 's'} {', '.join(self.guards)} raised an ALERT that began at step {self.begun}"

    def request(self, place: str) -> str:
        """What a person is told when the run pauses at `place`."""
        return (
            f"paused at {place}: {self.text}; guards.jsonl says what was seen, and samples.jsonl shows the answers. "
            f"The state is saved. To go on all the same, run the command again with --set "
            f"guards.acknowledge=[{','.join((*self.acknowledged, *self.guards))}]"
        )


class Watchman:
    """Joins a `GuardMonitor` to a stage's folder and screen; without a configuration nothing is watched."""

    def __init__(self, config: GuardsConfig | None, run: RunFolder, console: Console) -> None:
        self._config, self._run, self._console = config, run, console
        self._monitor = None if config is None else GuardMonitor(config)

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Watch a step; log and print what changed."""
        if self._monitor is None:
            return
        verdicts = self._monitor.observe(step, metrics)
        if verdicts:
            self._run.append_verdicts(asdict(verdict) for verdict in verdicts)
        for verdict in verdicts:
            if verdict.advice or verdict.was:
                self._tell(verdict)

    def ended(self, step: int, why: str) -> None:
        """Log that a guard ended the stage."""
        self._run.append_verdicts([{"step": step, "ended": why}])

    @property
    def pausing(self) -> Alarm | None:
        """The alarm for which the run must pause."""
        return self._alarm("pause")

    @property
    def stopping(self) -> Alarm | None:
        """The alarm for which the stage must end."""
        return self._alarm("stop")

    @property
    def may_stop(self) -> bool:
        """Whether an ALERT would end the stage."""
        return self._config is not None and self._config.on_alert == "stop"

    def may_begin(self, step: int) -> int | None:
        """The step before which weights are free of any alarm that is still to come after `step`; None where no alarm
        goes back. What step k measures is the work of the weights after step k - 1."""
        if self._monitor is None or not self.may_stop:
            return None
        return self._monitor.earliest(step + 1) - 1

    def state(self) -> dict[str, Any] | None:
        return None if self._monitor is None else self._monitor.state()

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue from a checkpoint; one of a run without guards leaves them at their beginning."""
        if self._monitor is not None and state is not None:
            self._monitor.restore(state)

    def _alarm(self, action: str) -> Alarm | None:
        if self._monitor is None or self._config is None or self._config.on_alert != action:
            return None
        alerts = self._monitor.alerts()
        return Alarm(tuple(alerts), min(alerts.values()), self._config.acknowledge) if alerts else None

    def _tell(self, verdict: Verdict) -> None:
        colour = COLOURS[verdict.level]
        title = GUARDS[verdict.guard].title
        advice = f" {verdict.advice}" if verdict.advice else ""
        self._console.print(
            f"  [{colour}]{verdict.level}[/] step {verdict.step}, {title}: {escape(verdict.seen)}.{escape(advice)}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
