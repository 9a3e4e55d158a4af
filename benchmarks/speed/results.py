"""What came of the runs: rows as JSON, a table, a figure, and the part of the documentation that is made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from accord.atomic import write_text
from benchmarks.speed.counted import counted
from benchmarks.speed.work import TARGETS, WORKS, Timing, Work, groups_of

__all__ = ["AGREE", "row_of", "table", "write_page"]

AGREE = 1e-4  # absolute, or as a share of what exceeds 1
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


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


def write_page(path: Path, results: Mapping[str, Any]) -> None:
    """Replace what stands between the two marks of a page by the results, with date and machine.

    Raises: ValueError when the page lacks the marks, or the results a work: a page shows a full run.
    """
    missing = sorted(WORKS.keys() - {row["work"] for row in results["rows"]})
    if missing:
        raise ValueError(f"these results lack {', '.join(missing)}: a page shows a full run, `make bench` without WORK")
    page = path.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"{path}: expected {BEGIN} and, below it, {END}, each once")
    head, rest = page.split(BEGIN)
    write_text(path, f"{head}{BEGIN}\n\n{_section(results)}\n\n{END}{rest.split(END)[1]}")


def _section(results: Mapping[str, Any]) -> str:
    machine, rows = results["machine"], results["rows"]
    turns = " or ".join(str(turns) for turns in sorted({row["turns"] for row in rows}))
    return (
        f"Measured on {machine['date']}: {machine['cpu']}, {machine['threads']} threads, "
        f"{machine['memory_bytes'] / 1e9:,.0f} GB, torch {machine['torch']}, allocator {machine['allocator']}; "
        f"{turns} turns.\n\n{table(rows)}"
    )
