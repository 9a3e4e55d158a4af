"""The speed benchmark's works and its arithmetic; what it times is not timed here."""

from __future__ import annotations

import pytest

from benchmarks.speed.__main__ import _row, table
from benchmarks.speed.work import UPDATES, WARM_UP, WORKS, Timing, groups_of, pairs_of


@pytest.mark.parametrize("name", WORKS)
def test_a_work_is_the_same_for_both_sides_and_every_answer_is_one(name: str) -> None:
    work = WORKS[name]
    steps = groups_of(work)
    assert steps == groups_of(work)
    assert [len(step) for step in steps] == [work.batch] * UPDATES
    for group in steps[0]:
        assert len(group.completions) == work.answers
        assert all(c.ids[-1] == 1 and 1 not in c.ids[:-1] and max(c.ids) < work.vocabulary for c in group.completions)
        assert len(pairs_of(group)) == work.answers * (work.answers - 1) // 2
        assert len(set(group.completions)) == work.answers


def timing(seconds: float, losses: list[float], peak: float) -> Timing:
    return Timing(1.0, [9.0] * WARM_UP + [seconds] * (UPDATES - WARM_UP), losses, 100.0, peak, "1.0")


def test_a_ratio_is_of_two_runs_side_by_side_and_learning_is_compared_by_update() -> None:
    same = [1.0] * UPDATES
    sides = {
        "accord": [timing(1.0, same, 300.0), timing(2.0, same, 300.0), timing(1.0, same, 300.0)],
        "trl": [timing(3.0, same, 600.0), timing(4.0, same, 600.0), timing(5.0, same, 600.0)],
    }
    row = _row("dpo-long", WORKS["dpo-long"], sides)
    assert (row["ratio_low"], row["ratio"], row["ratio_high"]) == (2.0, 3.0, 5.0)
    assert (row["accord"], row["peer"], row["unit"], row["memory_ratio"]) == (16.0, 4.0, "pairs/s", 0.5)
    assert row["same_learning"] and "3.00x (2.00 to 5.00)" in table([row])
    apart = [1.0] * (UPDATES - 1) + [1.001]
    sides["trl"][0] = timing(3.0, apart, 600.0)
    assert not _row("dpo-long", WORKS["dpo-long"], sides)["same_learning"]
