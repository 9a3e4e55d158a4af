"""The profile benchmark's recipes, data and table; what it times is not timed here."""

from __future__ import annotations

from pathlib import Path

import pytest

from accord.methods.plan import check_sizes
from accord.profiling.account import Measured, StageProfile, rows_of
from benchmarks import profile
from benchmarks.profile import GROUPS, WORKS, corpus_of, recipe_of, table


@pytest.mark.parametrize("work", WORKS)
def test_every_work_is_a_recipe_with_its_data(work: str, tmp_path: Path) -> None:
    recipe, corpus = recipe_of(work, tmp_path, 2), corpus_of(work)
    assert (recipe.threads, recipe.root) == (2, tmp_path / "run")
    part = {"sft": corpus.sft, "dpo": corpus.preferences, "ppo": corpus.prompts}[work]
    assert len(part.groups) == GROUPS
    prompts = [len(group.prompt[0].content.split()) for group in part.groups]
    answers = [len(c.messages[0].content.split()) for group in part.groups for c in group.completions]
    if work == "dpo":
        assert set(prompts) == {192} and set(answers) == {31} and corpus.comparisons().groups == part.groups
    if work == "ppo":
        assert set(prompts) == {32} and not answers and recipe.ppo is not None
        assert recipe.ppo.reward_model == str(tmp_path / "reward")
    if work == "sft":
        assert 8 <= min(p + a + 1 for p, a in zip(prompts, answers, strict=True)) and max(answers) <= 512
        check_sizes(recipe, corpus, ["sft"])


def test_the_table_has_a_row_a_profile_and_a_column_a_phase() -> None:
    rows, update, total = rows_of({"forward": Measured(3.0, useful=60), "data": Measured(1.0)}, peak=40, moved=1)
    profile = StageProfile("sft", 2, 4.0, 3.9, 4.1, rows, update, total, {}, 1, 1, ())
    head, _, row = table([("5M", profile)]).splitlines()
    assert head == "| work | model | an iteration | bound | updates of peak | forward | data |"
    assert row == "| sft | 5M | 4.00 s | 1.50 s, 38% | 50% | 75.0% (50%) | 25.0% |"


def test_what_is_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile, "LATEST", tmp_path / "profile.json")
    monkeypatch.setattr(profile, "WORKS", ())
    profile.main(["--quick"])
    written = tmp_path / "profile-quick.json"
    assert f"numbers: {written}" in capsys.readouterr().out and written.exists()
