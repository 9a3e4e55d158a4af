"""The charts and numbers of the report: marks where the values say, gaps where there are none, honest intervals."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from accord.report.html import duration, number
from accord.report.panels import smoothed
from accord.report.svg import ForestRow, Series, calibration_plot, forest_plot, histogram, ticks, xy_chart

SETTINGS = settings(max_examples=50, derandomize=True, deadline=None)


def chart(*series: Series) -> ElementTree.Element:
    return ElementTree.fromstring(xy_chart(series, title="t", x_label="x", y_label="y"))


def test_values_that_are_not_finite_are_gaps_in_a_line() -> None:
    """Of 1 2 nan 4 inf 6 7 remain three pieces: two segments and the lone point 4, drawn as a dot of no length."""
    ys = (1.0, 2.0, math.nan, 4.0, math.inf, 6.0, 7.0)
    drawing = chart(Series("s", tuple(map(float, range(7))), ys))
    paths = [path.get("d", "") for path in drawing.iter("path")]
    assert [path.count("L") for path in paths] == [1, 0, 1]
    assert paths[1].endswith("h0")
    assert len(list(drawing.iter("circle"))) == 5
    assert not {"nan", "inf"} & set(re.findall(r"[a-z]+", " ".join(paths)))


def test_points_are_drawn_where_their_values_say() -> None:
    """Over 0 to 4 both ways, (1, 3) lies a quarter of the way to the right and three quarters of the way up."""
    drawing = chart(Series("s", (0.0, 1.0, 4.0), (0.0, 3.0, 4.0)))
    first, point, last = ((float(c.get("cx", "")), float(c.get("cy", ""))) for c in drawing.iter("circle"))
    assert (point[0] - first[0]) / (last[0] - first[0]) == pytest.approx(0.25, abs=1e-3)
    assert (point[1] - first[1]) / (last[1] - first[1]) == pytest.approx(0.75, abs=1e-3)
    assert last[0] > first[0] and last[1] < first[1]


@pytest.mark.parametrize("scale", [1e-14, 1e-30, 1e12])
def test_values_of_any_size_keep_their_places(scale: float) -> None:
    """A metric that is 0 but for rounding, such as the KL of a policy that does not learn, makes a chart like
    others."""
    drawing = chart(Series("s", (0.0, 1.0, 4.0), (0.0, 3.0 * scale, 4.0 * scale)))
    first, point, last = (float(c.get("cy", "")) for c in drawing.iter("circle"))
    assert (point - first) / (last - first) == pytest.approx(0.75, abs=1e-3)


@SETTINGS
@given(
    st.floats(-1e9, 1e9),
    st.floats(1e-6, 1e9),
    st.integers(2, 12),
)
def test_ticks_are_round_even_and_cover_the_range(low: float, width: float, count: int) -> None:
    high = low + width
    assume(high - low > 1e-6 * max(abs(low), abs(high)))
    marks = ticks(low, high, count)
    step = (marks[-1] - marks[0]) / (len(marks) - 1)
    assert marks[0] <= low + 1e-6 * step and marks[-1] >= high - 1e-6 * step
    assert 2 <= len(marks) <= count + 2
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-6), 3) in {1, 2, 2.5, 5}


def test_a_histogram_counts_every_finite_value_once() -> None:
    """Eight values in bins of width 0.25 from 0 to 4, the last one closed: 2, 1, 2, 1 and 2 of them share a bin."""
    values = [0.0, 0.2, 0.5, 1.1, 1.2, 2.9, 4.0, 4.0, math.nan]
    drawing = ElementTree.fromstring(histogram([("a", values)], title="t", x_label="x"))
    titles = [title.text or "" for title in drawing.iterfind("rect/title")]
    assert [title.partition("%")[0] for title in titles] == ["a: 25.0", "a: 12.5", "a: 25.0", "a: 12.5", "a: 25.0"]
    assert titles[-1].endswith("between 3.75 and 4")


def test_calibration_points_carry_wilson_intervals() -> None:
    """Wilson for 8 of 10: centre (0.8 + z^2/20)/(1 + z^2/10) = 0.716741, half 0.226593: [0.490, 0.943]."""
    drawing = ElementTree.fromstring(calibration_plot([(0.75, 0.8, 10)], title="t"))
    titles = [title.text for title in drawing.iterfind("path/title")]
    assert titles == ["predicted 0.750, n = 10, observed: 0.800 [0.490, 0.943]"]


def test_a_calibrated_bin_lies_on_the_diagonal() -> None:
    """Sure to 75% and right 75% of the time: the middle of the line from (1/2, 1/2) to (1, 1)."""
    drawing = ElementTree.fromstring(calibration_plot([(0.75, 0.75, 40)], title="t"))
    line, dot = (re.findall(r"[\d.]+", path.get("d", "")) for path in drawing.iter("path"))
    (x0, y0, x1, y1), (x, y) = map(float, line[:4]), map(float, dot[:2])
    assert (x + 4.5, y) == (pytest.approx((x0 + x1) / 2, abs=0.2), pytest.approx((y0 + y1) / 2, abs=0.2))


def test_a_forest_plot_has_its_interval_around_the_value_and_the_line_at_one_half() -> None:
    row = ForestRow("ppo over sft", 0.6, 0.55, 0.65, 300)
    drawing = ElementTree.fromstring(forest_plot([row], title="t"))
    middle = next(line for line in drawing.iter("line") if line.get("class") == "reference")
    whisker = next(line for line in drawing.iter("line") if "whisker" in (line.get("class") or ""))
    low, high, half = (float(v or "") for v in (whisker.get("x1"), whisker.get("x2"), middle.get("x1")))
    assert low - half == pytest.approx((high - half) / 3, abs=0.2) and low > half
    assert "ppo over sft 60.0% [55.0%, 65.0%], n = 300" in (drawing.get("aria-label") or "").replace("\xa0", " ")


NUMBERS = {0: "0", -2: "−2", 12345: "12\u2009345", 0.06834: "0.0683", 3.14159: "3.14", 123.456: "123", 2e-5: "2e−5"}


@pytest.mark.parametrize(
    ("value", "text"), [*NUMBERS.items(), (9999.5, "10\u2009000"), (-1.5e7 - 0.5, "−1.5e7"), (math.nan, "not finite")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.250 s"), (41, "41 s"), (59.94, "59.9 s"), (231.4, "3 min 51 s"), (7265, "2 h 01 min")],
)
def test_durations_are_said_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_smoothing_keeps_a_straight_line_straight_to_its_ends() -> None:
    """Local linear regression reproduces y = 3 - 2x exactly, also at the ends, where local means would be pulled in."""
    xs = tuple(i**1.5 for i in range(20))
    grid, line = smoothed(xs, tuple(3 - 2 * x for x in xs))
    assert (grid[0], grid[-1]) == (xs[0], xs[-1])
    np.testing.assert_allclose(line, [3 - 2 * x for x in grid], rtol=1e-9, atol=1e-9)
