"""Rejection sampling raises what it selects by, and nothing where there is nothing to select."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from accord.config import recipe_from
from accord.methods.corpus import Corpus, Part
from accord.pipeline import run_stages
from accord.randomness import generator
from accord.records import Completion, Group, Message

MODEL = {"scratch": {"hidden_size": 32, "layers": 2, "heads": 2, "vocab_size": 300, "max_positions": 64}}
SFT = {"epochs": 15, "batch_size": 16, "learning_rate": 5e-3, "warmup_fraction": 0.0, "schedule": "constant"}
RFT = {
    "cycles": 4, "improve_steps": 2, "samples_per_prompt": 12, "prompts_per_cycle": 24, "max_new_tokens": 8,
    "epochs": 2, "batch_size": 16, "learning_rate": 3e-3, "missing_eos_penalty": 0.0,
}  # fmt: skip


def letters() -> Corpus:
    """Answers of six letters, a or b by the toss of a coin."""
    words = ["".join("ab"[int(x)] for x in generator("letters", i).integers(2, size=6)) for i in range(64)]
    groups = [
        Group((Message("user", f"word {i}"),), (Completion((Message("assistant", word),)),))
        for i, word in enumerate(words)
    ]
    return Corpus(sft=Part.of(groups, "letters"))


def a_count(prompt: str, completion: str) -> float:
    """About 3 for the answers it was shown; more by more a's."""
    return float(completion.count("a"))


def run(out: Path, reward: Callable[..., float], **rft: Any) -> tuple[list[dict[str, float]], dict[str, Any], str]:
    """The metrics, the summary and the terminal of a run whose answers are counted whatever the reward was."""
    tree = {"model": MODEL, "threads": 1, "out": str(out), "data": {"holdout": 0.0, "max_tokens": 64}}
    recipe = recipe_from({**tree, "sft": SFT, "rft": RFT | rft})
    screen = io.StringIO()
    functions = {"rft.reward_function": reward, "rft.gold_function": a_count}
    summary = run_stages(recipe, letters(), ["sft", "rft"], Console(file=screen, width=1000), functions)["rft"]
    rows = [json.loads(line) for line in (out / "rft" / "metrics.jsonl").read_text().splitlines()]
    return rows, summary, screen.getvalue()


def counts(rows: list[dict[str, float]]) -> list[float]:
    """Mean number of a's in what each cycle sampled, before its training."""
    return [row["rollout/gold_utility/mean"] for row in rows if "rollout/gold_utility/mean" in row]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_rejection_sampling_raises_a_reward_that_counts_a_letter(tmp_path: Path) -> None:
    rows, summary, _ = run(tmp_path, a_count)
    found = counts(rows)
    assert len(found) == 4 and 2 < found[0] < 4
    assert found[-1] > found[0] + 2
    assert summary["warnings"] == []
    assert all(row["rollout/kept_score/mean"] > row.get("rollout/score/mean", -1) for row in rows)


def test_a_constant_reward_teaches_nothing_and_says_so(tmp_path: Path) -> None:
    """Every prompt is dropped in every step: the model is bit for bit the one it started from."""
    rows, summary, screen = run(tmp_path, lambda prompt, completion: 0.5)
    assert all(row["rollout/dropped_prompts"] == 24 and row["train/sequences"] == 0 for row in rows)
    assert weights(tmp_path / "rft") == weights(tmp_path / "sft")
    assert "Nothing was learned: every prompt was dropped in every step" in summary["warnings"][0]
    assert "Nothing was learned" in screen and "kept 0 of 288" in screen
    assert max(counts(rows)) < 4


def test_without_a_learning_rate_the_reward_stays_where_it_was(tmp_path: Path) -> None:
    rows, _, _ = run(tmp_path, a_count, learning_rate=0.0)
    assert 2 < counts(rows)[-1] < 4
