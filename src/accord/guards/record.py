"""What the guards leave in a stage's folder: `guards.jsonl`, and the account of it for summary and report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accord.guards.detectors import GUARDS
from accord.guards.monitor import LEVELS

__all__ = ["GUARD_LOG", "guard_account", "guard_ending", "read_guard_log"]

GUARD_LOG = "guards.jsonl"


def read_guard_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a stage's log of verdicts, in order; none for a stage that has no guards."""
    path = folder / GUARD_LOG
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def guard_ending(rows: Sequence[dict[str, Any]]) -> tuple[int, str] | None:
    """At which step and why a guard ended the stage, None if none did."""
    return next(((row["step"], row["ended"]) for row in rows if "ended" in row), None)


def guard_account(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a guard: its worst level and the step at which it was first reached, the level at the end, and what was
    seen when it was at its worst."""
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "guard" not in row:
            continue
        found = {
            "guard": row["guard"],
            "title": GUARDS[row["guard"]].title,
            "worst": row["level"],
            "step": row["step"],
            "at_end": row["level"],
            "seen": row["seen"],
            "advice": row["advice"],
        }
        known = table.get(row["guard"], found)
        worse = LEVELS.index(row["level"]) > LEVELS.index(known["worst"])
        table[row["guard"]] = found if worse else {**known, "at_end": row["level"]}
    return list(table.values())
