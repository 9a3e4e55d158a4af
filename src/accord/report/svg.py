"""Small charts as SVG text: lines with bands, points with error bars, forest plots, histograms, calibration.

Colours, dashes and text sizes are classes of the page's style sheet, so one drawing serves light, dark, narrow and
printed pages. Every mark has a hover title and every chart a title and a description for screen readers. All charts
are 480 units wide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from accord.report.html import Html, element, join, number, with_interval

__all__ = ["Draw", "ForestRow", "Series", "calibration_plot", "forest_plot", "histogram", "legend", "ticks", "xy_chart"]

WIDTH = 480.0

Draw = Literal["line", "points", "labelled"]


@dataclass(frozen=True, slots=True)
class Series:
    """One named set of points. `colour` (0-5) also picks dash and marker, so two series can share a look.

    A y that is not finite is a gap in a line and no mark at all among points. `lows`/`highs` draw a band around a line
    and error bars on points. `labels` name single points on hover; draw "labelled" prints them beside the points too.
    """

    label: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    colour: int = 0
    draw: Draw = "line"
    lows: tuple[float, ...] = ()
    highs: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ForestRow:
    """One estimate with its 95% interval, as fractions. `colour` (0-5) tells the judges apart."""

    label: str
    value: float
    low: float | None
    high: float | None
    n: int | None
    colour: int = 0


@dataclass(frozen=True, slots=True)
class _Frame:
    """Data ranges and the rectangle they are drawn into."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: float
    top: float
    right: float
    bottom: float

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(self.left + (value - low) / (high - low) * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(self.bottom - (value - low) / (high - low) * (self.bottom - self.top), 1)


def ticks(low: float, high: float, count: int = 5) -> tuple[float, ...]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) covering [low, high], about `count` intervals."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(float(f"{index * step:.12g}") for index in range(first, last + 1))


def _tick_labels(values: Sequence[float]) -> list[str]:
    """The values with as many decimals as all of them need; very small and very large ones with an exponent."""
    largest = max(abs(value) for value in values)
    if not 1e-3 <= largest < 1e6:
        return [number(value) for value in values]
    decimals = next(d for d in range(9) if d == 8 or all(math.isclose(round(v, d), v, abs_tol=1e-9) for v in values))
    return [f"{value:,.{decimals}f}".replace(",", "\u2009").replace("-", "\u2212") for value in values]


def _range(values: Iterable[float]) -> tuple[float, float]:
    """The finite range of the values, widened when it is a single point."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    margin = abs(low) * 0.1 or 0.5
    return low - margin, high + margin


def legend(series: Sequence[Series]) -> Html | None:
    """Names with their marks, one entry per colour; nothing for a single series."""
    named = {item.colour: item for item in reversed(series) if item.label}
    if len(named) < 2:
        return None
    entries = (element("li", _swatch(item), item.label) for _, item in sorted(named.items()))
    return element("ul", *entries, class_="legend")


def _swatch(series: Series) -> Html:
    mark = (
        element("path", d="M1 6H25", class_=f"line c{series.colour}")
        if series.draw == "line"
        else _marker(13, 6, series.colour, None)
    )
    return element("svg", mark, viewBox="0 0 26 12", aria_hidden="true")


def xy_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    x_range: tuple[float, float] | None = None,
) -> Html:
    """Lines and points over two axes with round ticks. Ranges are taken from the data unless given."""
    x_ticks = ticks(*(x_range or _range(x for item in series for x in item.xs)))
    y_ticks = ticks(*(y_range or _range(y for item in series for y in (*item.ys, *item.lows, *item.highs))))
    widest = max(map(len, _tick_labels(y_ticks)))
    frame = _Frame((x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]), 14 + 9 * widest, 34, WIDTH - 16, 240)
    marks = [_line(item, frame) if item.draw == "line" else _points(item, frame) for item in series]
    return _drawing(
        title,
        f"{', '.join(item.label for item in series)} against {x_label}",
        288,
        _axes(frame, x_ticks, y_ticks, x_label, y_label),
        *marks,
        *(_hover(item, frame) for item in series if item.draw == "line"),
    )


def _drawing(title: str, description: str, height: float, *children: Html) -> Html:
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        *children,
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        role="img",
        aria_label=f"{title}: {description}",
    )


def _axes(frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str) -> Html:
    parts = [element("text", y_label, x=0, y=16)]
    for value, label in zip(y_ticks, _tick_labels(y_ticks), strict=True):
        y = frame.y(value)
        parts.append(element("line", x1=frame.left, x2=frame.right, y1=y, y2=y, class_="tick"))
        parts.append(element("text", label, x=frame.left - 8, y=y + 4.5, text_anchor="end"))
    parts.append(element("line", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom, class_="axis"))
    for value, label in zip(x_ticks, _tick_labels(x_ticks), strict=True):
        parts.append(element("text", label, x=frame.x(value), y=frame.bottom + 20, text_anchor="middle"))
    parts.append(element("text", x_label, x=frame.right, y=frame.bottom + 42, text_anchor="end"))
    return join(parts)


def _runs(series: Series) -> list[list[int]]:
    """Indices of the points, cut where y is not finite."""
    runs: list[list[int]] = [[]]
    for index, y in enumerate(series.ys):
        if math.isfinite(y):
            runs[-1].append(index)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _line(series: Series, frame: _Frame) -> Html:
    parts: list[Html] = []
    for run in _runs(series):
        points = [f"{frame.x(series.xs[i])} {frame.y(series.ys[i])}" for i in run]
        if series.lows:
            upper = [f"{frame.x(series.xs[i])} {frame.y(series.highs[i])}" for i in run]
            lower = [f"{frame.x(series.xs[i])} {frame.y(series.lows[i])}" for i in reversed(run)]
            parts.append(element("path", d="M" + "L".join(upper + lower) + "Z", class_=f"band c{series.colour}"))
        # A lone point between two gaps has no length; "h0" with round caps draws it as a dot.
        path = "M" + ("L".join(points) if len(points) > 1 else points[0] + "h0")
        parts.append(element("path", d=path, class_=f"line c{series.colour}"))
    return join(parts)


def _hover(series: Series, frame: _Frame) -> Html:
    """Invisible marks above everything else that carry the values of a line as hover titles."""
    return join(
        element(
            "circle",
            element("title", _point_title(series, i)),
            cx=frame.x(series.xs[i]),
            cy=frame.y(series.ys[i]),
            r=5,
            class_=f"hit c{series.colour}",
        )
        for run in _runs(series)
        for i in run
    )


def _point_title(series: Series, i: int) -> str:
    name = series.labels[i] if series.labels else f"{series.label} at {number(series.xs[i])}"
    spread = f" [{number(series.lows[i])}, {number(series.highs[i])}]" if series.lows else ""
    return f"{name}: {number(series.ys[i])}{spread}"


def _points(series: Series, frame: _Frame) -> Html:
    parts: list[Html] = []
    for i in (i for run in _runs(series) for i in run):
        x, y = frame.x(series.xs[i]), frame.y(series.ys[i])
        if series.lows:
            low, high = frame.y(series.lows[i]), frame.y(series.highs[i])
            parts.append(element("line", x1=x, x2=x, y1=low, y2=high, class_=f"whisker c{series.colour}"))
        parts.append(_marker(x, y, series.colour, _point_title(series, i)))
        if series.draw == "labelled":
            anchor, shift = ("end", -9) if x > frame.right - 90 else ("start", 9)
            parts.append(element("text", series.labels[i], x=x + shift, y=y - 7, text_anchor=anchor, class_="strong"))
    return join(parts)


def _marker(x: float, y: float, colour: int, title: str | None) -> Html:
    """A dot, square, diamond or triangle by colour, so that the series differ without colour too."""
    outlines = (
        "a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z",
        "m.5 -4h8v8h-8Z",
        "l4.5 -5.5l4.5 5.5l-4.5 5.5Z",
        "m0 4l4.5 -9l4.5 9Z",
    )
    hover = element("title", title) if title else None
    return element("path", hover, d=f"M{x - 4.5:g} {y:g}{outlines[colour % 4]}", class_=f"dot c{colour}")


def forest_plot(rows: Sequence[ForestRow], *, title: str) -> Html:
    """Win rates with intervals on one axis from 0 to 100%, against the line of no difference at 50%."""
    tops = [6 + 52.0 * index for index in range(len(rows))]
    bottom = 6 + 52.0 * len(rows)
    frame = _Frame((0, 1), (0, 1), 12, 4, WIDTH - 22, bottom)
    parts: list[Html] = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = frame.x(share)
        # Only the line of no difference runs through the rows' text, between label and value.
        spans = [(frame.top, bottom)] if share == 0.5 else [(top + 22, top + 38) for top in tops]
        style = "reference" if share == 0.5 else "tick"
        parts += [element("line", x1=x, x2=x, y1=upper, y2=lower, class_=style) for upper, lower in spans]
        parts.append(element("text", f"{share:.0%}", x=x, y=bottom + 20, text_anchor="middle"))
    parts.append(element("text", "\u2190 worse", x=frame.x(0.5) - 10, y=bottom + 44, text_anchor="end"))
    parts.append(element("text", "better \u2192", x=frame.x(0.5) + 10, y=bottom + 44))
    parts += [_forest_row(row, frame, top) for row, top in zip(rows, tops, strict=True)]
    return _drawing(title, "; ".join(_forest_title(row) for row in rows), bottom + 52, *parts)


def _forest_title(row: ForestRow) -> str:
    return f"{row.label} {with_interval(row.value, row.low, row.high, row.n, 'fraction')}"


def _forest_row(row: ForestRow, frame: _Frame, top: float) -> Html:
    y = top + 30
    whisker = (
        element("line", x1=frame.x(row.low), x2=frame.x(row.high), y1=y, y2=y, class_=f"whisker c{row.colour}")
        if row.low is not None and row.high is not None
        else None
    )
    name = row.label if len(row.label) <= 24 else row.label[:23] + "\u2026"
    return join(
        [
            element("text", name, x=2, y=top + 15, class_="strong"),
            element(
                "text",
                with_interval(row.value, row.low, row.high, None, "fraction"),
                x=WIDTH - 4,
                y=top + 15,
                text_anchor="end",
            ),
            whisker,
            _marker(frame.x(row.value), y, row.colour, _forest_title(row)),
        ]
    )


def histogram(samples: Sequence[tuple[str, Sequence[float]]], *, title: str, x_label: str) -> Html:
    """Shares of each sample per bin, overlaid. `samples` are (label, values) pairs; values that are not finite drop."""
    low, high = _range(value for _, values in samples for value in values)
    edges = ticks(low, high, 16)
    shares = [_bin_shares(values, edges) for _, values in samples]
    y_ticks = ticks(0.0, max(100 * share for sample in shares for share in sample) or 1.0, 4)
    frame = _Frame((edges[0], edges[-1]), (0, y_ticks[-1]), 44, 34, WIDTH - 16, 240)
    bars = [
        element(
            "rect",
            element("title", f"{label}: {share:.1%} between {number(edges[i])} and {number(edges[i + 1])}"),
            x=frame.x(edges[i]) + 1,
            y=frame.y(100 * share),
            width=round(frame.x(edges[i + 1]) - frame.x(edges[i]) - 2, 1),
            height=round(frame.bottom - frame.y(100 * share), 1),
            class_=f"bar c{colour}",
        )
        for colour, ((label, _), sample) in enumerate(zip(samples, shares, strict=True))
        for i, share in enumerate(sample)
        if share > 0
    ]
    x_ticks = tuple(value for value in ticks(low, high) if edges[0] <= value <= edges[-1])
    axes = _axes(frame, x_ticks, y_ticks, x_label, "% of samples")
    return _drawing(title, f"{' and '.join(label for label, _ in samples)} by {x_label}", 288, axes, *bars)


def _bin_shares(values: Sequence[float], edges: Sequence[float]) -> list[float]:
    counts = [0] * (len(edges) - 1)
    finite = [value for value in values if math.isfinite(value)]
    width = edges[1] - edges[0]
    for value in finite:
        counts[min(int((value - edges[0]) / width), len(counts) - 1)] += 1
    return [count / max(1, len(finite)) for count in counts]


def calibration_plot(bins: Sequence[tuple[float, float, int]], *, title: str) -> Html:
    """Confidence against success, (predicted, observed, n) per bin, with Wilson 95% intervals.

    `predicted` is the probability, at least 1/2, that the answer with the higher score is the preferred one; `observed`
    the share of the bin's comparisons where it was. A calibrated model lies on the diagonal.
    """
    spreads = [_wilson(observed, n) for _, observed, n in bins]
    points = Series(
        "reward model",
        tuple(predicted for predicted, _, _ in bins),
        tuple(observed for _, observed, _ in bins),
        draw="points",
        lows=tuple(low for low, _ in spreads),
        highs=tuple(high for _, high in spreads),
        labels=tuple(f"predicted {number(predicted)}, n = {n}, observed" for predicted, _, n in bins),
    )
    ideal = Series("calibrated", (0.5, 1.0), (0.5, 1.0), colour=5)
    labels = {"x_label": "how sure the reward model is", "y_label": "how often it is right"}
    return xy_chart([ideal, points], title=title, **labels, x_range=(0.5, 1), y_range=(min(0.5, *points.lows), 1))


def _wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n (Wilson 1927): stays inside [0, 1] and is honest for small n."""
    z = 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - half, centre + half
