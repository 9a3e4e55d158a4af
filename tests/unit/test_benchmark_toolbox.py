"""The toolbox benchmark: every option is a recipe, the table compares with the plain run, and what is there is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import toolbox
from benchmarks.toolbox import Job, jobs, main

SECONDS = {"plain": 2.0, "nf4": 3.0}


def measured(job: Job, peak: float = 400.0) -> dict[str, float]:
    rest = {"compile_seconds": 0.0, "checkpoint_mb": 10.0, "loss": 2.0}
    seconds = SECONDS.get(job.option, 1.0)
    return {"peak_mb": peak + 100, "above_libraries_mb": peak, "step_seconds": seconds} | rest


@pytest.mark.parametrize("name", toolbox.OPTIONS)
def test_every_option_is_a_recipe_that_differs_from_the_plain_one(name: str, tmp_path: Path) -> None:
    recipe, plain = (toolbox.recipe_of(tmp_path, option, tmp_path / "run", 4, 2) for option in (name, "plain"))
    assert (recipe == plain) == (name == "plain") and recipe.threads == 2


def test_rows_are_medians_beside_their_ratio_to_the_plain_run_of_the_same_model() -> None:
    plain, nf4, small, slow = (
        Job(option, model, 6, 3)
        for option, model in (("plain", "101M"), ("nf4", "101M"), ("plain", "16M"), ("float16", "16M"))
    )
    runs = {plain: [400, 400, 400], nf4: [100, 900, 200], small: [50, 50, 50], slow: [60]}
    text = toolbox.table([toolbox.summary(job, [measured(job, p) for p in found]) for job, found in runs.items()])
    assert "| 101M | 3 x 6 | 400 (1.00x) | 2.00 (1.00x) |" in text
    assert "| LoRA with `model.quantise: nf4` | 101M | 3 x 6 | 200 (0.50x) | 3.00 (1.50x) |" in text
    assert "| `model.precision: float16` | 16M | 1 x 6 | 60 (1.20x) | 1.00 (0.50x) |" in text


def test_what_takes_long_runs_once_and_in_16_bits_with_the_smaller_model_and_its_own_plain_run() -> None:
    assert jobs(["float16", "compile"], quick=False, steps=6, repeats=3) == [
        Job("plain", "101M", 6, 3),
        Job("compile", "101M", 6, 1),
        Job("plain", "16M", 3, 3),
        Job("float16", "16M", 3, 1),
    ]
    assert jobs(["float16", "lora"], quick=True, steps=6, repeats=3) == [
        Job("plain", "16M", 6, 3),
        Job("float16", "16M", 3, 1),
        Job("lora", "16M", 6, 3),
    ]
    assert jobs(["plain"], quick=False, steps=6, repeats=3) == [Job("plain", "101M", 6, 3)]


def test_every_run_is_told_of_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in its fourth run: three are in the file, and the second of `plain` is in a median."""
    done: list[Job] = []

    def run(job: Job, folder: Path, threads: int) -> dict[str, float]:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(job)
        return measured(job, 100.0 * len(done))

    monkeypatch.setattr(toolbox, "prepare", lambda folder, model: None)
    monkeypatch.setattr(toolbox, "run_apart", run)
    out = tmp_path / "toolbox.json"
    with pytest.raises(KeyboardInterrupt):
        main(["--only", "nf4", "--quick", "--threads", "1", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["machine"]["threads"] == 1 and {"date", "cpu", "torch"} <= found["machine"].keys()
    rows = [
        (row["option"], row["model"], row["runs"], row["steps"], row["above_libraries_mb"]) for row in found["rows"]
    ]
    assert rows == [("plain", "16M", 2, 6, 200.0), ("nf4", "16M", 1, 6, 200.0)]
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[:2] for line in said] == [
        ["1/6", "plain, 16M, run 1 of 3"],
        ["2/6", "nf4, 16M, run 1 of 3"],
        ["3/6", "plain, 16M, run 2 of 3"],
    ]


def test_a_full_run_is_written_between_the_marks_of_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, out = tmp_path / "page.md", tmp_path / "toolbox.json"
    before = "before\n<!-- toolbox: begin -->\nold\n<!-- toolbox: end -->\nafter\n"
    page.write_text(before)
    machine = {"date": "2030-01-02", "cpu": "abacus", "threads": 2, "memory_bytes": 8e9, "torch": "9"}
    todo = jobs(list(toolbox.OPTIONS), False, 6, 3)
    rows = [toolbox.summary(job, [measured(job)] * job.runs) for job in todo]
    fewer = toolbox.summary(todo[1], [measured(todo[1])] * (todo[1].runs - 1))
    for part, missing in ((rows[:-1], "float16"), ([rows[0], fewer, *rows[2:]], todo[1].option)):
        out.write_text(json.dumps({"machine": machine, "rows": part}))
        with pytest.raises(SystemExit) as stopped:
            main(["--out", str(out), "--page", str(page)])
        assert stopped.value.code == 2 and f"lacks {missing}: a page shows a full run" in capsys.readouterr().err
        assert page.read_text() == before
    out.write_text(json.dumps({"machine": machine, "rows": rows}))
    assert main(["--out", str(out), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "Measured on 2030-01-02: abacus, 2 threads, 8 GB, torch 9." in text and toolbox.table(rows) in text


def test_the_documentation_has_the_marks() -> None:
    text = (toolbox.ROOT / "docs" / "performance.md").read_text()
    section = text[text.index("### What each saves") :]
    assert section.count("<!-- toolbox: begin -->") == 1 == section.count("<!-- toolbox: end -->")
