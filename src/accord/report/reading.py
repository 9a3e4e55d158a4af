"""A run folder as frozen records. The files and their keys are described at the top of `accord.report.stage`.

Everything optional may be missing. A line of a .jsonl file that does not parse is left out and noted, because a run
that was killed while writing leaves half a line; a summary.json or run.json that does not parse is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from accord.errors import DataError
from accord.metrics import METRICS
from accord.report.html import number
from accord.report.svg import Draw, Series

__all__ = ["Answer", "Curve", "Estimate", "Exchange", "GuardRow", "Points", "Run", "Sample", "read_run"]

Points = tuple[
    tuple[float, float], ...
]  # (step, value) in order of steps; nan where the run logged a non-finite number


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with what is known about its uncertainty.

    `source` is the model that a headline number describes, or the judge of a comparison; "" = the run itself, unknown.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    n: int | None
    unit: str | None
    meaning: str
    source: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion as logged during the run. `notes` are the other keys of its line, as text."""

    step: int
    prompt: str
    completion: str
    score: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model (or one model at one step) said. `notes` are short remarks such as its scores."""

    who: str
    text: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One prompt and the answers to it, to be shown side by side."""

    prompt: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """A chart that the stage itself asked for."""

    title: str
    x_label: str
    y_label: str
    note: str
    series: tuple[Series, ...]


@dataclass(frozen=True, slots=True)
class GuardRow:
    """What a guard said: its worst level and the step at which it was first reached, the level at the end, what was
    seen when it was at its worst, and what to do about it."""

    title: str
    worst: str
    step: int
    at_end: str
    seen: str
    advice: str


@dataclass(frozen=True, slots=True)
class Run:
    """All a report knows about one run folder. `finished` = it has a summary."""

    folder: Path
    stage: str
    finished: bool
    seconds: float | None
    headline: tuple[Estimate, ...]
    account: tuple[str, ...]
    warnings: tuple[str, ...]
    comparisons: tuple[Estimate, ...]
    calibration: tuple[tuple[float, float, int], ...]
    side_by_side: tuple[Exchange, ...]
    curves: tuple[Curve, ...]
    guards: tuple[GuardRow, ...]
    metrics: Mapping[str, Points]
    samples: tuple[Sample, ...]
    config: str
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def read_run(folder: Path) -> Run:
    """Raises DataError when the folder is missing or its JSON files are not what `accord.report.stage` describes."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such run folder; expected the folder a run wrote.")
    summary, facts = _json_file(folder / "summary.json"), _json_file(folder / "run.json")
    metric_rows, metric_notes = _json_lines(folder / "metrics.jsonl")
    sample_rows, sample_notes = _json_lines(folder / "samples.jsonl")
    config = folder / "config.yaml"
    try:
        return Run(
            folder=folder,
            stage=str(summary.get("stage") or summary.get("name") or folder.resolve().name),
            finished=bool(summary),
            seconds=_optional(summary.get("seconds")),
            headline=tuple(_estimate(row["name"], row, row.get("model", "")) for row in summary.get("headline", ())),
            account=tuple(summary.get("account", ())),
            warnings=tuple(summary.get("warnings", ())),
            comparisons=_comparisons(summary),
            calibration=tuple(
                (float(item["predicted"]), float(item["observed"]), int(item["n"]))
                for item in summary.get("calibration", ())
                if item["n"]
            ),
            side_by_side=tuple(_exchange(item) for item in summary.get("side_by_side", ())),
            curves=tuple(_curve(item) for item in summary.get("curves", ())),
            guards=tuple(_guard(item) for item in summary.get("guards", ())),
            metrics=_metrics(metric_rows),
            samples=tuple(_sample(row) for row in sample_rows),
            config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
            facts=tuple(_flatten("", facts)),
            notes=(*metric_notes, *sample_notes),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{folder}: summary.json, metrics.jsonl or samples.jsonl does not have the expected keys: {error!r}. "
            "The expected form is described in accord/report/stage.py."
        ) from error


def _json_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: expected a JSON object, but it does not parse: {error}.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def _json_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a .jsonl file, and a note naming the lines that are not JSON objects."""
    if not path.is_file():
        return [], []
    rows: list[dict[str, Any]] = []
    bad: list[int] = []
    for line_number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            bad.append(line_number)
    where = ", ".join(str(line_number) for line_number in bad[:5])
    return rows, [f"{path.name}: {len(bad)} lines could not be read (line {where})."] if bad else []


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _gap(value: Any) -> float:
    """A number, or nan for null and for anything not finite: both are gaps in a chart."""
    found = math.nan if value is None else float(value)
    return found if math.isfinite(found) else math.nan


def _estimate(name: str, item: dict[str, Any], source: str) -> Estimate:
    """Unit and meaning come from the registry of metrics where the item does not bring its own."""
    declared = METRICS.get(name)
    return Estimate(
        name=name,
        value=_gap(item["value"]),
        low=_optional(item.get("low")),
        high=_optional(item.get("high")),
        n=None if item.get("n") is None else int(item["n"]),
        unit=item.get("unit") or (declared.unit if declared else None),
        meaning=item.get("meaning") or (declared.meaning if declared else ""),
        source=source,
    )


def _comparisons(summary: dict[str, Any]) -> tuple[Estimate, ...]:
    listed = [(item["name"], item) for item in summary.get("comparisons", ())]
    pairs = listed or list(summary.get("win_rates", {}).items())
    return tuple(_estimate(name, {"unit": "fraction", **item}, _judge(item.get("judge", ""))) for name, item in pairs)


def _judge(name: str) -> str:
    """How the true utility of a simulator is called on the page; other judges keep their names."""
    return "true utility" if name == "gold" else name


def _exchange(item: dict[str, Any]) -> Exchange:
    kinds = [(label, item[key]) for key, label in (("scores", "score"), ("gold", _judge("gold"))) if key in item]
    return Exchange(
        item["prompt"],
        tuple(
            Answer(
                who,
                text,
                tuple(f"{label} {number(values[who])}" for label, values in kinds if values.get(who) is not None),
            )
            for who, text in item["answers"].items()
        ),
    )


def _curve(item: dict[str, Any]) -> Curve:
    return Curve(
        title=item["title"],
        x_label=item["x_label"],
        y_label=item["y_label"],
        note=item.get("note", ""),
        series=tuple(_series(colour, one) for colour, one in enumerate(item["series"])),
    )


def _guard(item: dict[str, Any]) -> GuardRow:
    return GuardRow(
        item["title"], item["worst"], int(item["step"]), item["at_end"], item.get("seen", ""), item.get("advice", "")
    )


def _series(colour: int, item: dict[str, Any]) -> Series:
    draw = item.get("draw", "line")
    if draw not in get_args(Draw):
        raise ValueError(f"`draw` is {draw!r}, expected one of {', '.join(get_args(Draw))}")
    columns = {key: tuple(_gap(value) for value in item.get(key, ())) for key in ("x", "y", "low", "high")}
    return Series(
        label=item["label"],
        xs=columns["x"],
        ys=columns["y"],
        colour=colour % 6,
        draw=draw,
        lows=columns["low"],
        highs=columns["high"],
        labels=tuple(item.get("labels", ())),
    )


def _metrics(rows: list[dict[str, Any]]) -> dict[str, Points]:
    """Points by metric name. A step written twice, by a run that was resumed, counts once: the later line."""
    by_name: dict[str, dict[float, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                by_name.setdefault(name, {})[float(row["step"])] = _gap(value)
    return {name: tuple(sorted(points.items())) for name, points in by_name.items()}


def _sample(row: dict[str, Any]) -> Sample:
    known = {"step", "prompt", "completion", "messages", "score"}
    messages = row.get("messages")
    return Sample(
        step=int(row["step"]),
        prompt=str(row["prompt"]),
        completion=str(row["completion"]) if messages is None else _transcript(messages),
        score=_optional(row.get("score")),
        notes=tuple(_note(key, value) for key, value in row.items() if key not in known),
    )


def _transcript(messages: list[dict[str, str]]) -> str:
    """A conversation to read: each turn behind the one who spoke."""
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def _note(key: str, value: Any) -> str:
    shown = number(value) if isinstance(value, float) else {True: "yes", False: "no"}.get(value, value)
    return f"{_judge(key)} {shown}"


def _flatten(prefix: str, value: Any) -> list[tuple[str, str]]:
    """Nested JSON as (dotted key, text) rows."""
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in _flatten(f"{prefix}.{key}" if prefix else key, inner)]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return _flatten(prefix, {str(i): item for i, item in enumerate(value, start=1)})
    if isinstance(value, list):
        return [(prefix, " ".join(str(item) for item in value))]
    return [(prefix, str(value))]
