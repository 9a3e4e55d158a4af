"""The toolbox benchmark: every option is a recipe, and the table compares with the plain run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import toolbox


@pytest.mark.parametrize("name", toolbox.OPTIONS)
def test_every_option_is_a_recipe_that_differs_from_the_plain_one(name: str, tmp_path: Path) -> None:
    recipe, plain = (toolbox.recipe_of(tmp_path, option, tmp_path / "run", 4) for option in (name, "plain"))
    assert (recipe == plain) == (name == "plain")


def test_rows_are_medians_beside_their_ratio_to_the_plain_run() -> None:
    def run(name: str, peak: float, seconds: float) -> dict[str, object]:
        rest = {"compile_seconds": 0.0, "checkpoint_mb": 10.0, "loss": 2.0}
        return {"option": name, "peak_mb": peak + 100, "above_libraries_mb": peak, "step_seconds": seconds} | rest

    runs = {"plain": [run("plain", 400, 2.0)] * 3, "nf4": [run("nf4", p, 3.0) for p in (100, 900, 200)]}
    text = toolbox.table([toolbox.summary(name, rows) for name, rows in runs.items()])
    assert "| plain | 500 | 400 (1.00x) | 2.00 (1.00x) |" in text
    assert "| nf4 | 300 | 200 (0.50x) | 3.00 (1.50x) |" in text
