"""The monitor: feeds every guard with the metrics of each step, and holds what they remember."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from accord.config import GuardName, GuardsConfig
from accord.guards.detectors import GUARDS, JUDGES, Guard, Reading
from accord.guards.tracks import Track, View

__all__ = ["LEVELS", "GuardMonitor", "Level", "Verdict"]

Level = Literal["OK", "WARN", "ALERT"]
LEVELS: tuple[Level, ...] = ("OK", "WARN", "ALERT")


@dataclass(frozen=True, slots=True)
class Verdict:
    """A guard's level from `step` on; `was` is the one before, None where it begins to watch.

    begun   the step at which what led to the level began, as far as the guard can tell
    alarm   how far it has gone: WARN from 1, ALERT from 2
    seen    what was seen, against what; advice: what to do, "" at OK
    """

    step: int
    guard: GuardName
    level: Level
    was: Level | None
    begun: int
    alarm: float
    seen: str
    advice: str


@dataclass(slots=True)
class _Standing:
    """A guard's level, and the readings that may change it.

    asked  the levels that the latest readings asked for, at most `patience`
    begun  when what is above OK began: at the first such reading since the guard was at rest, if the reading does not
           know better. Of a guard's very first reading, which sums up all steps before it, no step is above suspicion.
           None = it is at rest
    """

    level: int = 0
    asked: list[int] = field(default_factory=list)
    begun: int | None = None

    def take(self, since: int, reading: Reading, patience: int) -> bool:
        """Take in a reading of what happened from step `since` on; True if the level changed. It moves only as far as
        `patience` readings in a row agree."""
        asked = min(2, int(reading.alarm))
        if asked and (self.begun is None or reading.begun is not None):
            self.begun = since if reading.begun is None else reading.begun
        if not asked and not self.level:
            self.begun = None
        self.asked = [*self.asked, asked][-patience:]
        if len(self.asked) < patience:
            return False
        level = min(max(self.level, min(self.asked)), max(self.asked))
        changed, self.level = level != self.level, level
        if changed and not level:
            self.begun = None
        return changed


class GuardMonitor:
    """Use `observe` once a step. `state` and `restore` are for checkpoints; restored, it gives the same verdicts."""

    def __init__(self, config: GuardsConfig) -> None:
        self._config = config
        self._guards: dict[GuardName, Guard] = {name: g for name, g in GUARDS.items() if name not in config.off}
        self._watched = {metric for guard in self._guards.values() for metric in guard.watches}
        self._tracks: dict[str, Track] = {}
        self._standings: dict[GuardName, _Standing] = {}

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Verdict]:
        """The verdicts that are new at this step: of guards that begin to watch, and of those whose level changed.

        A guard is asked where all of its metrics that this stage logs were logged: it counts evaluations, not steps.
        """
        config = self._config
        logged = self._watched & metrics.keys()
        for name in sorted(logged):
            track = self._tracks.setdefault(name, Track())
            track.add(step, metrics[name], baseline=config.baseline, window=self._window(name))
        full = {
            name: track
            for name, track in self._tracks.items()
            if track.count >= max(config.baseline, self._window(name))
        }  # fmt: skip
        view = View(full)
        verdicts: list[Verdict] = []
        for name, guard in self._guards.items():
            asked = logged.issuperset(self._tracks.keys() & guard.watches)
            reading = guard.read(view, config) if asked else None
            if reading is None:
                continue
            was = LEVELS[self._standings[name].level] if name in self._standings else None
            since = step if name in self._standings else self._first(guard)
            standing = self._standings.setdefault(name, _Standing())
            if standing.take(since, reading, config.patience) or was is None:
                level, begun = LEVELS[standing.level], standing.begun or step
                advice = guard.advice if standing.level else ""
                verdicts.append(Verdict(step, name, level, was, begun, round(reading.alarm, 3), reading.seen, advice))
        return verdicts

    def _first(self, guard: Guard) -> int:
        """The first step at which any of its metrics was logged."""
        steps = [self._tracks[metric].first_at for metric in guard.watches if metric in self._tracks]
        return min(step for step in steps if step is not None)

    def _window(self, metric: str) -> int:
        return self._config.window if metric.startswith("rollout/") else self._config.fixed_window

    def alerts(self) -> dict[GuardName, int]:
        """The guards at ALERT that nobody acknowledged, with the step at which it began."""
        return {
            name: standing.begun or 0
            for name, standing in self._standings.items()
            if LEVELS[standing.level] == "ALERT" and name in self._guards and name not in self._config.acknowledge
        }

    def earliest(self, step: int) -> int:
        """The earliest step at which an ALERT raised from `step` on may have begun: where a guard is alarmed already,
        where one has not spoken yet, or where a second judge was at its best."""
        begun = [standing.begun for standing in self._standings.values()]
        begun += [
            self._first(guard)
            for name, guard in self._guards.items()
            if name not in self._standings and not self._tracks.keys().isdisjoint(guard.watches)
        ]
        best = [self._tracks[name].high_at for name in JUDGES if name in self._tracks]
        return min([step, *(known for known in (*begun, *best) if known is not None)])

    def state(self) -> dict[str, Any]:
        """All it remembers, as JSON values."""
        return {
            "tracks": {name: track.state() for name, track in self._tracks.items()},
            "standings": {name: asdict(standing) for name, standing in self._standings.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._tracks = {name: Track(**values) for name, values in state["tracks"].items()}
        self._standings = {name: _Standing(**values) for name, values in state["standings"].items()}
