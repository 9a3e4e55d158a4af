"""The curves of cost: their arithmetic, and that the quick form measures, writes and draws."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import scaling_cost
from benchmarks.scaling_cost import CURVES, Point, _measure, exponent, main, steep


def test_the_exponent_of_a_power_is_its_power() -> None:
    values = [1.0, 2.0, 8.0, 32.0]
    for power in (0.0, 1.0, 1.5, 2.0):
        assert exponent(values, [3.0 * v**power for v in values]) == pytest.approx(power)
    assert exponent(values, [0.0, 0.0, 0.0, 0.0]) == pytest.approx(0.0)


def test_steps_that_are_steeper_than_linear_are_found() -> None:
    """Linear up to 4, quadratic from there on."""
    assert steep([1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 16.0]) == [(4.0, 8.0, pytest.approx(2.0))]


@pytest.mark.parametrize("name", ["sequence", "completions-shared", "model"])
def test_an_update_is_measured(name: str) -> None:
    point = _measure(name, CURVES[name].quick[0], quick=True)
    assert point.seconds > 0 and point.megabytes >= 0 and point.curve == name


def test_the_quick_form_measures_each_point_apart_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figure = tmp_path / "cost.json", tmp_path / "cost.svg"
    assert main(["--quick", "--curves", "check", "--out", str(out), "--figure", str(figure)]) == 0
    rows = json.loads(out.read_text())
    assert [(row["curve"], row["value"]) for row in rows] == [("check", n) for n in CURVES["check"].quick]
    assert all(row["seconds"] > 0 for row in rows) and "check: time grows as n^" in capsys.readouterr().out
    assert figure.read_text().startswith("<svg")
    # Another curve joins what is there, and one that is measured again takes its own place.
    assert main(["--quick", "--curves", "tokens", "--up-to", "100", "--out", str(out)]) == 0
    rows = [(row["curve"], row["value"]) for row in json.loads(out.read_text())]
    assert rows == [*(("check", n) for n in CURVES["check"].quick), ("tokens", 100)]


def test_only_the_points_that_are_measured_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_cost, "_apart", lambda name, value, quick: Point(name, value, 9.0, 9.0))
    out, figure = tmp_path / "cost.json", tmp_path / "cost.svg"
    kept = [Point("check", value, 1.0, 1.0) for value in CURVES["check"].values]
    out.write_text(json.dumps([asdict(point) for point in kept]))
    assert (
        main(["--curves", "check", "vocabulary", "--up-to", "10000", "--out", str(out), "--figure", str(figure)]) == 0
    )
    points = [Point(**row) for row in json.loads(out.read_text())]
    vocabulary = [Point("vocabulary", value, 9.0, 9.0) for value in (1024, 4096)]
    assert points == [*vocabulary, Point("check", 10_000, 9.0, 9.0), *kept[1:]]
    assert "accord data check" in figure.read_text()
