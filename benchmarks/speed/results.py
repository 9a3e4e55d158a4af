"""What came of the runs: rows as JSON, a table, a figure, and the part of the documentation that is made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.command import write_between
from benchmarks.speed.counted import counted
from benchmarks.speed.work import TARGETS, WORKS, Timing, Work, groups_of

__all__ = ["AGREE", "merged", "row_of", "table", "write_page"]

AGREE = 1e-4  # absolute, or as a share of what exceeds 1


def row_of(
    name: str, work: Work, own: Sequence[Timing], peer: Sequence[Timing], apart: Sequence[Timing] = ()
) -> dict[str, Any]:
    """A work's results, from the runs of both sides in the order of their turns. `apart`: the two sides' runs by which
    learning is compared; without them the first timed ones serve."""
    steps = groups_of(work) if work.by_losses else groups_of(work) * work.updates
    timed = steps[work.warm_up :]
    amount = work.amount([group for step in timed for group in step]) / len(timed)
    seconds = [[fmean(timing.seconds[work.warm_up :]) for timing in side] for side in (own, peer)]
    ratios = sorted(theirs / ours for ours, theirs in zip(*seconds, strict=True))
    whole = [[timing.once + sum(timing.seconds) for timing in side] for side in (own, peer)]
    ours, theirs = apart or (own[0], peer[0])
    distance = max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(ours.learned, theirs.learned, strict=True))
    accord_mb, peer_mb = (median(timing.peak_mb for timing in side) for side in (own, peer))
    return {
        "work": name,
        "model": work.model,
        "vocabulary": work.vocabulary,
        "unit": work.unit,
        "accord": amount / median(seconds[0]),
        "peer": amount / median(seconds[1]),
        "ratio": median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "ratio_with_once": median(theirs / ours for ours, theirs in zip(*whole, strict=True)),
        "memory_ratio": accord_mb / peer_mb,
        "target": TARGETS[name][0],
        "memory_target": TARGETS[name][1],
        "same_learning": distance <= AGREE,
        "apart": distance,
        "accord_mb": accord_mb,
        "peer_mb": peer_mb,
        "accord_at_rest_mb": median(timing.at_rest_mb for timing in own),
        "peer_at_rest_mb": median(timing.at_rest_mb for timing in peer),
        "accord_once_seconds": median(timing.once for timing in own),
        "peer_once_seconds": median(timing.once for timing in peer),
        "turns": len(ratios),
        "timed": len(timed),
        "peer_version": f"{work.peer} {peer[0].version}",
        "accord_version": own[0].version,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    head = (
        "work", "model, vocabulary", "unit", "Accord", "peer", "counted", "speed", "aim", "memory", "aim", "once, s",
        "with once", "learns the same",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        speed = f"{row['ratio']:.2f}x ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        memory = f"{row['memory_ratio']:.2f}x ({row['accord_mb']:,.0f} / {row['peer_mb']:,.0f} MB)"
        operations = counted(WORKS[row["work"]])
        speed_aim = f"{row['target']:g}x" + " reached" * (row["ratio"] >= row["target"])
        memory_aim = f"{row['memory_target']:g}x" + " reached" * (row["memory_ratio"] <= row["memory_target"])
        once = f"{row['accord_once_seconds']:.1f} / {row['peer_once_seconds']:.1f}"
        agree = "yes" if row["same_learning"] else f"no ({row['apart']:.1e})"
        lines.append(
            f"| {row['work']} | {row['model']}, {row['vocabulary']:,} | {row['unit']} | {row['accord']:,.1f} "
            f"| {row['peer']:,.1f} ({row['peer_version']}) "
            f"| {f'{operations:.1f}x' if operations else ''} | {speed} | {speed_aim} | {memory} | {memory_aim} "
            f"| {once} | {row['ratio_with_once']:.2f}x | {agree} |"
        )
    return "\n".join(lines)


def merged(results: Mapping[str, Any], later: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows of a full run, each replaced by the one of the last later file that has its work; new works follow."""
    rows = {row["work"]: row for found in (results, *later) for row in found["rows"]}
    return {**results, "rows": list(rows.values())}


def write_page(path: Path, results: Mapping[str, Any], later: Sequence[Mapping[str, Any]] = ()) -> None:
    """Replace what stands between the two marks of a page by the results, with date and machine.

    Raises: ValueError when the page lacks the marks, or all results together a work: a page shows all of them.
    """
    missing = sorted(WORKS.keys() - {row["work"] for row in merged(results, later)["rows"]})
    if missing:
        raise ValueError(
            f"these results lack {', '.join(missing)}: a page shows all works, so run `make bench` without WORK, "
            "or measure them into another file and name it with --later"
        )
    write_between(path, "measured", _section(results, later))


def _section(results: Mapping[str, Any], later: Sequence[Mapping[str, Any]]) -> str:
    rows = merged(results, later)["rows"]
    lines = [f"Measured on {_circumstances(results)}.", "", table(rows)]
    for index, found in enumerate(later):
        again = {row["work"] for other in later[index + 1 :] for row in other["rows"]}
        works = [row["work"] for row in found["rows"] if row["work"] not in again]
        if works:
            lines += ["", f"Measured later, on {_circumstances(found)}: {', '.join(works)}."]
    return "\n".join(lines)


def _circumstances(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    turns = " or ".join(str(turns) for turns in sorted({row["turns"] for row in results["rows"]}))
    return (
        f"{machine['date']}: {machine['cpu']}, {machine['threads']} threads, {machine['memory_bytes'] / 1e9:,.0f} GB, "
        f"torch {machine['torch']}, allocator {machine['allocator']}; {turns} turns"
    )
