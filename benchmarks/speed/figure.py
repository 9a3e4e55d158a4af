"""The results as one SVG file: for each work how many times as fast, with the range over the turns, and the share of
the peer's peak memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accord.report.html import Html, element
from accord.report.svg import ticks
from benchmarks.figure import write_svg

__all__ = ["write_bars"]

LABEL, PANEL, GAP, LINE, TOP, MARGIN = 190, 300, 70, 30, 64, 24
BAR = 14


def write_bars(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the figure; colours follow light and dark. At 1 both sides are equal."""
    height = TOP + LINE * len(rows) + 40 + MARGIN
    width = MARGIN + LABEL + 2 * (PANEL + GAP)
    speed, memory = MARGIN + LABEL, MARGIN + LABEL + PANEL + GAP
    fastest = max(1.0, *(row["ratio_high"] for row in rows))
    largest = max(1.0, *(row["memory_ratio"] for row in rows))
    drawn = [
        element("text", "times the peer's speed (lowest to highest turn)", x=speed, y=MARGIN + 14, class_="strong"),
        element("text", "peak memory, peer = 1", x=memory, y=MARGIN + 14, class_="strong"),
        *_axis(speed, fastest, len(rows)),
        *_axis(memory, largest, len(rows)),
    ]
    for index, row in enumerate(rows):
        y = TOP + LINE * index
        drawn.append(element("text", row["work"], x=speed - 10, y=y + 12, text_anchor="end"))
        shown = f"{row['ratio']:.2f}x" + ("" if row["same_learning"] else " *")
        drawn += _bar(speed, y, row["ratio"], fastest, shown, 0, (row["ratio_low"], row["ratio_high"]))
        drawn += _bar(memory, y, row["memory_ratio"], largest, f"{row['memory_ratio']:.2f}", 1)
    if not all(row["same_learning"] for row in rows):
        drawn.append(element("text", "* the two do not learn the same", x=MARGIN, y=height - 8))
    title = element("title", "Speed and memory against the peers")
    write_svg(path, [title, *drawn], width, height)


def _place(left: float, value: float, largest: float) -> float:
    return round(left + PANEL * value / ticks(0.0, largest)[-1], 1)


def _axis(left: float, largest: float, count: int) -> list[Html]:
    top, bottom = TOP - 8, TOP + LINE * count
    drawn: list[Html] = []
    for value in ticks(0.0, largest):
        x = _place(left, value, largest)
        drawn.append(element("line", x1=x, x2=x, y1=top, y2=bottom, class_="tick"))
        drawn.append(element("text", f"{value:g}", x=x, y=bottom + 20, text_anchor="middle"))
    equal = _place(left, 1.0, largest)
    return [*drawn, element("line", x1=equal, x2=equal, y1=top, y2=bottom, class_="reference")]


def _bar(
    left: float, y: float, value: float, largest: float, shown: str, colour: int, spread: tuple[float, float] = (0, 0)
) -> list[Html]:
    end = _place(left, max(value, spread[1]), largest)
    bar = element("rect", x=left, y=y, width=_place(0, value, largest), height=BAR, class_=f"bar c{colour}")
    text = element("text", shown, x=end + 8, y=y + 12)
    if spread[1] <= 0:
        return [bar, text]
    low, high = (_place(left, side, largest) for side in spread)
    whisker = element("line", x1=low, x2=high, y1=y + BAR / 2, y2=y + BAR / 2, class_=f"whisker c{colour}")
    return [bar, whisker, text]
