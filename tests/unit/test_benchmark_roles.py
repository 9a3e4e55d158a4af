"""The benchmark of the roles' memory: its recipes are what it says, and its table tells the target's truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from accord.methods.plan import num_parameters
from benchmarks.roles import LAYOUTS, ROWS, SHAPES, TARGET, peak_mb, recipe_of, table


@pytest.mark.parametrize("size", SHAPES)
def test_weights_dominate_the_models_that_are_measured(size: str, tmp_path: Path) -> None:
    """In 10^6 bytes: about 80 and 400, and a forward pass of 32 tokens keeps a tenth of that."""
    parameters = num_parameters(recipe_of(tmp_path, "base", size))
    assert parameters is not None and 4 * parameters / 1e6 > {"quick": 75, "full": 400}[size]


def test_each_layout_is_a_recipe_of_one_step_with_a_reward_model() -> None:
    recipes = {layout: recipe_of(Path("somewhere"), layout) for layout in LAYOUTS}
    assert {r.out for r in recipes.values()} == {f"somewhere/{layout}" for layout in LAYOUTS}
    for recipe in recipes.values():
        assert recipe.ppo.episodes == recipe.ppo.prompts_per_step * recipe.ppo.samples_per_prompt
        assert recipe.ppo.value_init == "reward" and recipe.reward.max_steps == 1
    assert recipes["separate"].model.adapter is None and recipes["separate"].model.trainable_blocks is None
    assert recipes["hydra"].model.trainable_blocks == 2 and recipes["lora"].model.adapter.rank == 16


@pytest.mark.parametrize("times", [TARGET - 0.01, TARGET + 0.01])
def test_the_table_says_whether_the_target_is_met(times: float) -> None:
    row: dict[str, Any] = {"peak_mb": 1000.0, "above_libraries_mb": 600.0, "seconds": 1.0}
    rows = [row | {"layout": name, "times_one_model": times, "times_one_model_above_libraries": 1.0} for name in ROWS]
    text = table({"rows": rows, "target": {"met": times <= TARGET}})
    assert text.endswith("met" if times < TARGET else "missed")
    assert [line.split()[0] for line in text.splitlines()[1:-1]] == list(ROWS)


def test_the_peak_is_read_in_units_of_a_million_bytes() -> None:
    before = peak_mb()
    block = bytearray(b"x") * 300_000_000
    assert 1 < peak_mb() < 100_000 and peak_mb() >= max(before, len(block) / 1e6)
