"""Every preference loss learns separable pairs on a tiny model; what cannot learn, or has nothing to, does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from accord.config import PairLoss
from accord.methods.corpus import Part
from accord.randomness import generator
from accord.records import Group
from stages_support import answers_to, logged, run_stage_on, saved_model

PROMPTS = 120


def comparisons(*, shuffled: bool) -> Part:
    """Polite answers are preferred to rude ones of as many words; shuffled, to each other by the toss of a coin."""
    groups: list[Group] = []
    for i in range(PROMPTS):
        draw = generator("preferences", i)
        answers = [f"yes, {int(draw.integers(99))} please", f"no, {int(draw.integers(99))} never"]
        if shuffled and draw.random() < 0.5:
            answers.reverse()
        groups.append(answers_to(f"shall I take {i}?", *((text, {"rank": r}) for r, text in enumerate(answers))))
    return Part.of(groups, f"shuffled={shuffled}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("model") / "start", comparisons(shuffled=False).groups, 0)


TRAINING: dict[str, Any] = {
    "max_steps": 16, "epochs": 4, "batch_size": 16, "learning_rate": 5e-3, "warmup_fraction": 0.0,
    "schedule": "constant", "checkpoint_every": 1000, "eval_every": 1000,
}  # fmt: skip
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **{loss: ("dpo", {"loss": loss}) for loss in get_args(PairLoss)},
    "simpo": ("dpo", {"loss": "simpo", "beta": 2.0}),
    "orpo": ("orpo", {"odds_ratio_coef": 1.0}),
    "kto": ("kto", {}),
    "bco": ("kto", {"loss": "bco"}),
}


def train(out: Path, model: Path, name: str, *, shuffled: bool = False, **changes: Any) -> dict[str, Any]:
    stage, section = METHODS[name]
    return run_stage_on(out, model, comparisons(shuffled=shuffled), stage, TRAINING | section | changes)


def learned(summary: dict[str, Any]) -> bool:
    """It tells new answers apart, and did not from the start: the good ones became likelier beside the bad ones."""
    rows = {row["name"]: row for row in summary["headline"]}
    good, bad = (row["value"] for name, row in rows.items() if name.startswith("change of the"))
    assert rows["eval/accuracy"]["n"] > 30
    return rows["eval/accuracy"]["low"] > 0.8 and good - bad > 2


@pytest.mark.parametrize("name", METHODS)
def test_separable_pairs_are_learned(name: str, model: Path, tmp_path: Path) -> None:
    summary = train(tmp_path, model, name)
    assert learned(summary), summary["account"]
    assert not any("better than" in warning for warning in summary["warnings"])
    losses = [row["train/loss"] for row in logged(tmp_path, METHODS[name][0])]
    assert losses[-1] < losses[0]


def test_answers_that_all_got_less_likely_are_a_warning(model: Path, tmp_path: Path) -> None:
    """`apo_down` is made to lower both answers; plain DPO on the same data does not."""
    assert any("chosen answers became less likely" in w for w in train(tmp_path / "a", model, "apo_down")["warnings"])
    assert train(tmp_path / "b", model, "dpo")["warnings"] == []


@pytest.mark.parametrize("name", ["dpo", "simpo", "orpo", "kto", "bco"])
def test_nothing_is_learned_with_a_learning_rate_of_0(name: str, model: Path, tmp_path: Path) -> None:
    assert not learned(train(tmp_path, model, name, learning_rate=0.0, max_steps=2))


@pytest.mark.parametrize("name", ["dpo", "simpo", "orpo", "kto", "bco"])
def test_shuffled_labels_teach_nothing_and_the_summary_says_so(name: str, model: Path, tmp_path: Path) -> None:
    summary = train(tmp_path, model, name, shuffled=True)
    assert not learned(summary)
    accuracy = next(row for row in summary["headline"] if row["name"] == "eval/accuracy")
    assert 0.25 < accuracy["value"] < 0.75
    assert any("better than" in warning for warning in summary["warnings"])
