"""Charts of the reports as one SVG file that stands alone: what the benchmarks put into the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accord.atomic import write_text
from accord.report.html import Html, element
from accord.report.style import STYLE
from accord.report.svg import Series, xy_chart

__all__ = ["Panel", "write_figure", "write_svg"]

WIDTH, HEIGHT, TOP, MARGIN, LINE = 480, 288, 56, 24, 18


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: its title, its series and what the axes mean."""

    title: str
    series: tuple[Series, ...]
    x_label: str
    y_label: str


def write_figure(path: Path, panels: Sequence[Panel], *, columns: int = 2) -> None:
    """Write the panels side by side, `columns` in a row, each with its own legend. Colours follow light and dark."""
    rows = -(-len(panels) // columns)
    width = columns * (WIDTH + MARGIN) + MARGIN
    top = TOP + LINE * max(len(_lines(panel.series)) - 1 for panel in panels)
    height = rows * (HEIGHT + top + MARGIN) + MARGIN
    drawn = []
    for index, panel in enumerate(panels):
        x = MARGIN + (index % columns) * (WIDTH + MARGIN)
        y = MARGIN + (index // columns) * (HEIGHT + top + MARGIN)
        chart = xy_chart(panel.series, title=panel.title, x_label=panel.x_label, y_label=panel.y_label)
        placed = Html(chart.replace("<svg ", f'<svg x="{x}" y="{y + top}" width="{WIDTH}" height="{HEIGHT}" ', 1))
        drawn += [
            element("text", panel.title, x=x, y=y + 14, class_="strong"),
            _legend(panel.series, x, y + 36),
            placed,
        ]
    write_svg(path, drawn, width, height)


def write_svg(path: Path, drawn: Sequence[Html], width: float, height: float) -> None:
    """Write what is drawn as a picture of its own, in the report's style."""
    figure = element(
        "svg",
        element("style", Html(STYLE)),
        element("rect", x=0, y=0, width=width, height=height, fill="var(--card)"),
        *drawn,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        style="max-width: none; margin: 0; font-family: sans-serif",
        role="img",
    )
    write_text(path, figure)


def _lines(series: Sequence[Series]) -> list[list[tuple[float, Series]]]:
    """The legend's entries, each with its place, in as many lines as the width of a panel asks for."""
    lines: list[list[tuple[float, Series]]] = [[]]
    x = 0.0
    for item in series:
        length = 30 + 7.2 * len(item.label) + 16
        if item.label and lines[-1] and x + length > WIDTH:
            lines.append([])
            x = 0.0
        if item.label:
            lines[-1].append((x, item))
            x += length
    return lines


def _legend(series: Sequence[Series], left: float, top: float) -> Html:
    entries: list[Html] = []
    for number, line in enumerate(_lines(series)):
        y = top + LINE * number
        for x, item in line:
            entries.append(element("path", d=f"M{left + x} {y - 4}h24", class_=f"line c{item.colour}"))
            entries.append(element("text", item.label, x=left + x + 30, y=y))
    return element("g", *entries)
