"""The GPU benchmark, small enough for a CPU: every work runs, and its arithmetic is counted as derived here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from accord.models.load import ModelShape
from benchmarks import gpu


def test_every_work_runs_and_is_reported_with_what_was_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)  # TRL's side has dependencies of its own
    gpu.main(["--small", "--out", str(tmp_path / "gpu.json")])
    rows: list[dict[str, Any]] = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [(row["work"], row["side"]) for row in rows] == [
        ("sft", "accord"), ("dpo", "accord"), ("ppo", "accord"), ("sampling", "accord"), ("sampling", "transformers"),
    ]  # fmt: skip
    assert all(row["seconds"] > 0 and row["tokens_per_second"] > 0 and 0 < row["mfu"] < 1 for row in rows)
    said = capsys.readouterr().out
    assert "| ppo | small | accord |" in said and "TRL is not installed" in said
    if json.loads((tmp_path / "gpu.json").read_text())["machine"]["device"] == "cpu":
        assert "Never run on one" in said


def test_the_arithmetic_of_an_update() -> None:
    """One layer of width H = 16 and MLP M = 48, vocabulary 512; 4 pairs, prompts of 8 and answers of 8.

    Tokens: 4 (8 + 2 * 8) = 96. Pairs that attention sees: 4 (8 * 9 / 2) + 8 (8 * 8 + 8 * 9 / 2) = 944.
    Forward: 2 * 96 (4 H^2 + 3 H M) + 4 * 944 H + 2 * 64 * 512 H = 638,976 + 60,416 + 1,048,576 = 1,747,968.
    Backward is twice as much.
    """
    shape = ModelShape(16, 1, 4, 64, intermediate_size=48)
    assert gpu.needed_flops(gpu.works(True)["dpo"], shape) == 3 * 1_747_968
