"""The parts of `accord loop` by themselves: the stop rule, sheets and labels, simulated people, prompts, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from accord.config import recipe_from
from accord.errors import ConfigError, DataError, LabelsWanted
from accord.loop.labellers import ScoreLabeller
from accord.loop.plan import check_loop, left_out, loop_table, round_prompts
from accord.loop.rule import Standing, standing
from accord.loop.sheet import (
    Labels,
    Pair,
    comparisons,
    outcomes,
    read_choices,
    read_labels,
    read_pairs,
    write_labels,
    write_pairs,
    write_sheet,
)
from accord.methods.corpus import Corpus, Part
from accord.records import Group, Interval, Message
from accord.rewards.scorers import FunctionScorer
from stages_support import answers_to


def pair(name: str, a: str = "yes", b: str = "no", writers: tuple[int, int] = (1, 1), prompt: str = "ask") -> Pair:
    return Pair(name, (Message("user", prompt),), a, b, writers)


# --- when it stops ---------------------------------------------------------------------------------------------------

BETTER, UNSURE, WORSE = Interval(0.6, 0.51, 0.7, 9), Interval(0.6, 0.5, 0.7, 9), Interval(0.3, 0.2, 0.4, 9)


@pytest.mark.parametrize(
    ("rates", "patience", "expected"),
    [
        ([], 1, Standing(0, 0, False)),
        ([BETTER], 1, Standing(1, 0, False)),
        ([UNSURE], 1, Standing(0, 1, True)),
        ([UNSURE], 2, Standing(0, 1, False)),
        ([BETTER, BETTER, WORSE], 1, Standing(2, 1, True)),
        ([UNSURE, BETTER, WORSE], 2, Standing(2, 1, False)),
        ([BETTER, UNSURE, WORSE], 2, Standing(1, 2, True)),
    ],
)
def test_the_result_is_the_last_policy_shown_to_be_better(
    rates: list[Interval], patience: int, expected: Standing
) -> None:
    assert standing(rates, patience) == expected


# --- sheets and labels -----------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path: Path) -> tuple[Path, list[Pair]]:
    pairs = [pair("1", "yes", "no"), pair("2", "\u4f60\u597d", "\u2028\x00"), pair("3", "same", "same"), pair("4", "")]
    write_sheet(tmp_path / "sheet.jsonl", pairs)
    return tmp_path / "sheet.jsonl", pairs


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().decode().split("\n") if line]


def write(file: Path, found: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in found))


def test_a_sheet_has_the_pairs_that_can_be_told_apart_and_nothing_of_who_wrote_them(
    asked: tuple[Path, list[Pair]],
) -> None:
    file, _ = asked
    assert [row["id"] for row in rows(file)] == ["1", "2", "4"]
    assert all(list(row) == ["id", "prompt", "a", "b", "choice"] and row["choice"] is None for row in rows(file))
    assert len(file.read_bytes().splitlines()) == 3


def test_a_filled_sheet_gives_its_choices_in_the_order_of_the_pairs(asked: tuple[Path, list[Pair]]) -> None:
    file, pairs = asked
    words = {"1": " B ", "2": "a", "4": "TIE"}
    filled = [row | {"choice": words[row["id"]], "note": "hard"} for row in rows(file)]
    write(file, filled[::-1])
    assert list(read_choices(file, pairs).items()) == [("1", "b"), ("2", "a"), ("4", "tie")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice": "c"}, "sheet.jsonl:2: `choice` is 'c'; expected"),
        ({"choice": 1}, "sheet.jsonl:2: `choice` is 1; expected"),
        ({"id": "9"}, "sheet.jsonl:2: the id '9' is not on this sheet"),
        ({"id": "1"}, "sheet.jsonl:2: the id '1' stands at line 1 already"),
        ({"a": "other"}, "sheet.jsonl:2: `a` is not the text that was to be judged"),
        ({"prompt": "other"}, "sheet.jsonl:2: `prompt` is not the text"),
        (None, "1 of 3 rows are missing, the first with id '2'"),
    ],
)
def test_a_sheet_that_is_no_longer_what_was_asked_is_refused(
    asked: tuple[Path, list[Pair]], change: dict[str, Any] | None, message: str
) -> None:
    file, pairs = asked
    filled = [row | {"choice": "a"} for row in rows(file)]
    write(file, [filled[0], *([] if change is None else [filled[1] | change]), filled[2]])
    with pytest.raises(DataError) as error:
        read_choices(file, pairs)
    assert message in str(error.value)


@pytest.mark.parametrize(("line", "message"), [("{", "not valid JSON"), ("[]", "found list")])
def test_a_line_that_is_no_row_is_named(asked: tuple[Path, list[Pair]], line: str, message: str) -> None:
    file, pairs = asked
    file.write_text(line + "\n")
    with pytest.raises(DataError, match=rf"sheet.jsonl:1: {message}"):
        read_choices(file, pairs)


def test_rows_still_to_be_filled_in_are_counted(asked: tuple[Path, list[Pair]]) -> None:
    file, pairs = asked
    write(file, [row | {"choice": choice} for row, choice in zip(rows(file), ("a", None, ""), strict=True)])
    with pytest.raises(LabelsWanted, match=r"2 of 3 pairs to label in .*sheet.jsonl \(the first at line 2\)") as error:
        read_choices(file, pairs)
    assert error.value.exit_code == 4


def test_pairs_and_labels_come_back_as_they_were_written(tmp_path: Path) -> None:
    longer = (Message("user", "a"), Message("assistant", "b"), Message("user", "\udcff"))
    pairs = [pair("1"), Pair("2", longer, "x\u2028y", "z", (2, 0), (True, False))]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs
    write_labels(tmp_path / "labels.jsonl", Labels({"1": "a", "2": "tie"}, {"3": "no reply"}))
    assert read_labels(tmp_path / "labels.jsonl") == {"1": "a", "2": "tie"}


def test_comparisons_have_the_chosen_answer_first_and_neither_ties_nor_held_out_pairs() -> None:
    pairs = [pair("1"), pair("2"), pair("3"), pair("4", writers=(2, 1))]
    found = comparisons(pairs, {"1": "a", "2": "b", "3": "tie", "4": "a"})
    assert [[(c.text, c.rank) for c in group.completions] for group in found] == [
        [("yes", 0), ("no", 1)],
        [("no", 0), ("yes", 1)],
    ]


def test_wins_are_the_newest_policys_on_whichever_side_it_stood_and_equal_answers_are_ties() -> None:
    held = [
        pair("1", writers=(2, 0)), pair("2", writers=(0, 2)), pair("3", writers=(0, 2)), pair("4", writers=(2, 0)),
        pair("5", "same", "same", writers=(0, 2)), pair("6", writers=(2, 2)),
    ]  # fmt: skip
    wins, prompts = outcomes(held, {"1": "a", "2": "a", "3": "b", "4": "tie", "6": "a"}, newest=2)
    assert wins == [1.0, 0.0, 1.0, 0.5, 0.5]
    assert len(prompts) == 5


# --- simulated people ------------------------------------------------------------------------------------------------


def test_simulated_people_choose_as_bradley_terry_and_always_the_same(tmp_path: Path) -> None:
    """Differences of 1 at scale 0.5: P(a) = sigmoid(2) = 0.881."""
    scorer = FunctionScorer(lambda prompt, completion: float(completion), "truth")
    pairs = [pair(str(i), "1", "0", prompt=f"ask {i}") for i in range(2000)]
    labeller = ScoreLabeller(scorer, 0.5, seed=0)
    choices = labeller.choose(pairs, tmp_path).choices
    share = sum(choice == "a" for choice in choices.values()) / len(choices)
    expected = 1 / (1 + math.exp(-2))
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 2000)
    assert labeller.choose(pairs[::-1], tmp_path).choices == choices
    assert ScoreLabeller(scorer, 0.5, seed=1).choose(pairs, tmp_path).choices != choices


def test_without_a_scale_the_better_answer_is_chosen_and_equal_ones_tie(tmp_path: Path) -> None:
    scorer = FunctionScorer(lambda prompt, completion: float(completion), "truth")
    pairs = [pair("1", "1", "0"), pair("2", "0", "1"), pair("3", "1", "1.0")]
    assert ScoreLabeller(scorer, None, seed=0).choose(pairs, tmp_path).choices == {"1": "a", "2": "b", "3": "tie"}


# --- prompts, and what is refused ------------------------------------------------------------------------------------


def test_no_prompt_comes_twice_while_there_are_others() -> None:
    asked = [round_prompts(number, 3, 10, seed=0) for number in range(1, 7)]
    assert all(len(set(chosen)) == 3 for chosen in asked)
    for first in (0, 3):
        assert len({index for chosen in asked[first : first + 3] for index in chosen}) == 9
    assert asked[:3] != asked[3:]


def corpus(count: int = 40) -> Corpus:
    return Corpus(
        preferences=Part.of(
            [answers_to(f"ask {i}", ("a", {"rank": 0}), ("b", {"rank": 1})) for i in range(count)], "pairs"
        )
    )


PPO = {"prompts_per_step": 4, "minibatches": 2, "max_new_tokens": 8}
GOOD: dict[str, Any] = {
    "model": {"path": "quickstart"},
    "data": {"holdout": 0.3},
    "reward": {},
    "ppo": PPO,
    "loop": {"comparisons": 20, "holdout_pairs": 5},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ppo": None}, "the recipe has none: add one of the sections ppo, rloo"),
        ({"rloo": PPO}, "has `ppo` and `rloo`: keep one"),
        ({"reward": None}, "add a `reward:` section"),
        ({"ppo": PPO | {"init": "x"}}, "`ppo.init` is set, but the loop chooses"),
        ({"ppo": PPO | {"reward_model": "x"}}, "`ppo.reward_model` is set"),
        ({"ppo": PPO | {"reward_function": "a:b", "value_init": "policy"}}, "`ppo.reward_function` is set"),
        ({"ppo": PPO | {"scorers": {"x": {"function": "a:b"}}, "value_init": "policy"}}, "none of `ppo.scorers` is"),
        ({"loop": {"labeller": "function"}}, "needs `loop.label_function`"),
        (
            {"loop": {"labeller": "function", "label_function": "math:no"}},
            "`loop.label_function`.*no function 'no'",
        ),
        ({"loop": None}, "`loop` is null"),
        ({"loop": {"comparisons": 41, "holdout_pairs": 5}}, "there are only 40 distinct prompts"),
        ({"loop": {"comparisons": 20, "holdout_pairs": 30}}, r"prompts are held out: lower it, raise `data.holdout`"),
        ({"loop": {"comparisons": 20, "holdout_pairs": 5}, "reward": {"init": "nope"}}, "nope: no such folder"),
    ],
)
def test_a_loop_that_could_not_work_is_refused_before_it_starts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_loop(recipe_from(GOOD | changes), corpus())


def test_keys_that_the_labeller_would_not_read_are_contradictions() -> None:
    for key, value in (("label_function", "a:b"), ("label_scale", 1.0)):
        with pytest.raises(ConfigError, match=rf"`loop.{key}` is read only by `loop.labeller` = function"):
            recipe_from(GOOD | {"loop": {key: value}})


def test_the_plan_counts_labels_and_names_what_is_left_out() -> None:
    recipe = recipe_from(GOOD | {"evaluate": {}, "dpo": {}})
    check_loop(recipe, corpus())
    assert left_out(recipe) == ["dpo", "evaluate"]
    table = loop_table(recipe, corpus())
    assert list(table.columns[2].cells) == ["at most 60", "at most 80", "at most 100", ""]


def test_a_prompt_with_several_messages_is_shown_as_messages(tmp_path: Path) -> None:
    prompt = (Message("system", "be kind"), Message("user", "ask"))
    write_sheet(tmp_path / "sheet.jsonl", [Pair("1", prompt, "a", "b", (0, 0))])
    assert rows(tmp_path / "sheet.jsonl")[0]["prompt"][0] == {"role": "system", "content": "be kind"}
    assert Pair("1", prompt, "a", "b", (0, 0)).prompt_id == Group(prompt).prompt_id
