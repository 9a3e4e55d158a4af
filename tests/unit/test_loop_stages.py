"""The sample and label stages of `accord loop` with canned answers: what is left out, counted and said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from accord.config import recipe_from
from accord.data.read import read_groups
from accord.demos.quickstart import _annotation_summary
from accord.loop import stages
from accord.loop.labellers import labeller_of
from accord.loop.stages import Policy, Sheet, run_label, run_sample
from accord.methods.context import Context
from accord.methods.corpus import Corpus, Part
from accord.records import Group
from accord.tasks.assistant import annotate, comparisons_to_groups
from stages_support import answers_to

FIRST, SECOND = Policy(0, None, "first"), Policy(1, None, "second")


def by_vowels(prompt: str, completion: str) -> float:
    return float(sum(completion.count(letter) for letter in "aeiou"))


def context(folder: Path, **loop: Any) -> Context:
    """Six prompts to ask about and four held out."""
    tree = {
        "model": {"path": "quickstart"},
        "out": str(folder),
        "reward": {},
        "ppo": {"prompts_per_step": 4, "minibatches": 2, "max_new_tokens": 8},
        "loop": {"comparisons": 6, "holdout_pairs": 4} | loop,
    }
    asked = Part.of([answers_to(f"ask {i}") for i in range(6)], "prompts")
    held = Part.of([answers_to(f"held {i}") for i in range(4)], "held out")
    corpus = Corpus(prompts=asked, evaluation=held)
    return Context(recipe_from(tree), corpus, Console(quiet=True), {})


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes policies answer by the prompt's text, the second one with what it is given for held-out prompts."""

    def install(answers: dict[str, tuple[str, ...]]) -> None:
        def canned(self: Any, policy: Policy, groups: Sequence[Group], n: int, key: Any) -> list[Any]:
            found = []
            for group in groups:
                texts = answers[group.prompt[0].content]
                chosen = texts if n == 2 else texts[policy.number :][:1]
                found.append((group, [(text, True) for text in chosen]))
            return found

        monkeypatch.setattr(stages._Drawn, "_answers", canned)
        monkeypatch.setattr(stages, "weights_hash", lambda folder: {"w": str(folder)})

    return install


ANSWERS = {f"ask {i}": (f"aa {i}", f"a {i}") for i in range(6)} | {f"held {i}": (f"a {i}", f"aa {i}") for i in range(4)}


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# --- empty answers ---------------------------------------------------------------------------------------------------


def test_pairs_with_an_empty_answer_are_left_out_and_counted_and_the_labels_are_readable_data(
    tmp_path: Path, answering: Any
) -> None:
    answering(ANSWERS | {"ask 0": ("", "a"), "ask 1": ("a", " \n"), "ask 2": ("", ""), "held 0": ("a", "")})
    where = context(tmp_path, labeller="function", label_function="test_loop_stages:by_vowels")
    sheet = Sheet(1, True, SECOND, FIRST)
    sampled = run_sample(where, "ppo", sheet)
    assert (sampled["equal"], sampled["empty"], sampled["headline"][0]["value"]) == (1, 2, 3 + 4)
    assert "1 pairs were two equal answers and are left out, and 2 with an empty answer." in sampled["account"][0]
    labelled = run_label(where, "ppo", sheet, labeller_of(where), None)
    groups = read_groups(tmp_path / "label" / "comparisons.jsonl").groups
    assert sorted(group.prompt[0].content for group in groups) == ["ask 3", "ask 4", "ask 5"]
    assert (labelled["comparisons"][0]["value"], labelled["comparisons"][0]["n"]) == (3 / 4, 4)


def test_the_quickstart_counts_pairs_with_an_empty_answer_by_themselves() -> None:
    compared = [("7.", "it is 7."), ("", "7."), ("7.", "7."), ("9.", "7.")]
    comparisons = [annotate("what is 3 plus 4?", *pair, pair_key="0") for pair in compared]
    [said] = _annotation_summary(comparisons, comparisons_to_groups(comparisons))["account"]
    assert said.endswith(" 1 pairs were two equal answers and are left out, and 1 with an empty answer.")
