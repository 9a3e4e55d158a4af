"""Charts of the reports as one SVG file that stands alone: what the benchmarks put into the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accord.atomic import write_text
from accord.report.html import Html, element
from accord.report.style import STYLE
from accord.report.svg import Series, xy_chart

__all__ = ["Panel", "write_figure"]

WIDTH, HEIGHT, TOP, MARGIN = 480, 288, 56, 24


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
    height = rows * (HEIGHT + TOP + MARGIN) + MARGIN
    drawn = []
    for index, panel in enumerate(panels):
        x = MARGIN + (index % columns) * (WIDTH + MARGIN)
        y = MARGIN + (index // columns) * (HEIGHT + TOP + MARGIN)
        chart = xy_chart(panel.series, title=panel.title, x_label=panel.x_label, y_label=panel.y_label)
        placed = Html(chart.replace("<svg ", f'<svg x="{x}" y="{y + TOP}" width="{WIDTH}" height="{HEIGHT}" ', 1))
        drawn += [
            element("text", panel.title, x=x, y=y + 14, class_="strong"),
            _legend(panel.series, x, y + 36),
            placed,
        ]
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


def _legend(series: Sequence[Series], x: float, y: float) -> Html:
    entries: list[Html] = []
    for item in series:
        if item.label:
            entries.append(element("path", d=f"M{x} {y - 4}h24", class_=f"line c{item.colour}"))
            entries.append(element("text", item.label, x=x + 30, y=y))
            x += 30 + 7.2 * len(item.label) + 16
    return element("g", *entries)
