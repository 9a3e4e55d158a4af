"""The sample and label stages of `accord loop` with canned answers: what is left out, counted and said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_remote_scorers import Answer, serving

from accord.config import recipe_from
from accord.data.read import read_groups
from accord.demos.quickstart import _annotation_summary
from accord.errors import CheckpointError, ConfigError, RewardError
from accord.loop import stages
from accord.loop.labellers import labeller_of
from accord.loop.plan import check_loop, loop_table
from accord.loop.stages import Policy, Sheet, labels_of, run_label, run_sample
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


# --- labels of a judge -----------------------------------------------------------------------------------------------


def scoring(body: Any) -> tuple[int, bytes]:
    """Counts the letter a of the answer, which stands last between marks."""
    answer = body["messages"][1]["content"].split("\n")[-2]
    return 200, json.dumps({"choices": [{"message": {"content": json.dumps({"score": answer.count("a")})}}]}).encode()


def failing(*answers: str) -> Answer:
    """As `scoring`, but says nothing of use about some answers."""

    def answer(body: Any) -> tuple[int, bytes]:
        if body["messages"][1]["content"].split("\n")[-2] in answers:
            return 200, b'{"choices": [{"message": {"content": "I like both."}}]}'
        return scoring(body)

    return answer


def judged(folder: Path, url: str, **loop: Any) -> Context:
    judge = {"url": url, "model": "m-1", "allow_private": True, "retries": 0, "concurrency": 1}
    return context(folder, labeller="judge", judge=judge, **loop)


def label(where: Context, sheet: Sheet) -> dict[str, Any]:
    run_sample(where, "ppo", sheet)
    return run_label(where, "ppo", sheet, labeller_of(where), None)


BOTH = Sheet(2, True, SECOND, FIRST)


def test_a_judge_scores_both_answers_and_the_higher_is_chosen_and_equal_scores_tie(
    tmp_path: Path, answering: Any
) -> None:
    answering(ANSWERS | {"ask 0": ("a", "ab"), "held 0": ("a", "b")})
    with serving(scoring) as (url, asked):
        found = label(judged(tmp_path, url), BOTH)
    assert len(asked) == 2 * (6 + 4) and asked[0]["body"]["model"] == "m-1"
    pairs = {pair["id"]: pair for pair in rows(tmp_path / "sample" / "pairs.jsonl")}
    for row in rows(tmp_path / "label" / "labels.jsonl"):
        a, b = (pairs[row["id"]][side].count("a") for side in "ab")
        assert row == {"id": row["id"], "choice": "a" if a > b else "b" if b > a else "tie"}
    assert "5 are comparisons for the reward model" in found["account"][0] and " 1 ties." in found["account"][0]
    assert (found["comparisons"][0]["value"], found["comparisons"][0]["n"], found["failed"]) == (3 / 4, 4, 0)


def test_an_answer_that_the_judge_fails_on_is_no_tie_but_counted_and_named_and_in_no_win_rate(
    tmp_path: Path, answering: Any
) -> None:
    answering(ANSWERS)
    with serving(failing("aa 1", "a 2")) as (url, _):
        found = label(judged(tmp_path, url, max_failed_fraction=0.2), BOTH)
    pairs = {pair["id"]: pair for pair in rows(tmp_path / "sample" / "pairs.jsonl")}
    failed = [row for row in rows(tmp_path / "label" / "labels.jsonl") if row["choice"] is None]
    assert {pairs[row["id"]]["prompt"] for row in failed} == {"ask 1", "ask 2", "held 1", "held 2"}
    assert all("the judge did not answer" in row["error"] for row in failed)
    assert found["failed"] == 4 and found["headline"][0]["value"] == 6 and " 0 ties." in found["account"][0]
    assert "4 more pairs have no label" in found["account"][1] and "2 held-out ones" in found["account"][1]
    assert f"The first is {failed[0]['id']}: " in found["account"][1] and "I like both" in found["account"][1]
    assert (found["comparisons"][0]["value"], found["comparisons"][0]["n"]) == (1.0, 2)
    taught = read_groups(tmp_path / "label" / "comparisons.jsonl").groups
    assert labels_of(tmp_path, "labels").groups == taught
    assert sorted(group.prompt[0].content for group in taught) == ["ask 0", "ask 3", "ask 4", "ask 5"]


def test_more_failures_than_allowed_stop_the_stage_and_only_they_are_asked_again(
    tmp_path: Path, answering: Any
) -> None:
    answering(ANSWERS)
    flaky = {"on": True}
    with serving(lambda body: (failing("aa 1") if flaky["on"] else scoring)(body)) as (url, asked):
        with pytest.raises(RewardError, match=r"the judge m-1 at .* failed on 2 of 20 completions.*did not answer"):
            label(judged(tmp_path, url), BOTH)
        assert len(asked) == 20 and not (tmp_path / "label" / "labels.jsonl").exists()
        flaky["on"] = False
        assert label(judged(tmp_path, url), BOTH)["failed"] == 0
    assert len(asked) == 22 and all("aa 1" in one["body"]["messages"][1]["content"] for one in asked[20:])


def test_held_out_pairs_that_all_failed_are_an_error_and_no_win_rate(tmp_path: Path, answering: Any) -> None:
    answering(ANSWERS | {f"held {i}": ("b", f"{i}") for i in range(4)})
    with serving(failing("b")) as (url, _):
        with pytest.raises(RewardError, match=r"no held-out pair in .*label could be labelled: .*did not answer"):
            label(judged(tmp_path, url, max_failed_fraction=0.5), BOTH)


@pytest.mark.parametrize("noted", [0, 7, 20])
def test_a_label_stage_that_was_killed_asks_nothing_twice(
    tmp_path: Path, answering: Any, monkeypatch: pytest.MonkeyPatch, noted: int
) -> None:
    """Killed in the middle of a line of the journal, after `noted` answers, before there are labels."""
    answering(ANSWERS)

    def killed(path: Path, labels: Any) -> None:
        raise KeyboardInterrupt

    with serving(scoring) as (url, asked):
        whole = label(judged(tmp_path / "whole", url), BOTH)
        expected = [one["body"]["messages"][1]["content"].split("\n")[-2] for one in asked]
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(stages, "write_labels", killed)
            label(judged(tmp_path / "killed", url), BOTH)
        journal = tmp_path / "killed" / "label" / "scores-judge.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[:noted]) + b'{"key": "ab')
        del asked[:]
        again = label(judged(tmp_path / "killed", url), BOTH)
    assert [one["body"]["messages"][1]["content"].split("\n")[-2] for one in asked] == expected[noted:]
    assert again["fingerprint"] == whole["fingerprint"] and again["comparisons"] == whole["comparisons"]


def test_a_judge_whose_token_is_not_set_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    where = context(
        tmp_path, labeller="judge", judge={"url": "https://judge.example", "model": "m", "token_env": "JUDGE_TOKEN"}
    )
    with pytest.raises(ConfigError, match=r"`loop.judge.token_env` names JUDGE_TOKEN, which is not set"):
        check_loop(where.recipe, where.corpus)
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    check_loop(where.recipe, where.corpus)
    assert "m at https://judge.example" in str(loop_table(where.recipe, where.corpus).caption)


URL = "https://judge.example"


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ({"labeller": "judge"}, r"`loop.labeller` = judge needs a section `loop.judge`"),
        (
            {"judge": {"url": URL, "model": "m"}},
            r"`loop.judge` is read only by `loop.labeller` = judge, and .* is human",
        ),
        (
            {"labeller": "judge", "judge": {"url": URL, "model": "m"}, "label_function": "a:b"},
            r"`loop.label_function` is read only by `loop.labeller` = function, and `loop.labeller` is judge",
        ),
        (
            {"labeller": "judge", "judge": {"url": URL, "model": "m"}, "label_scale": 1.0},
            r"`loop.label_scale` is read only by `loop.labeller` = function",
        ),
        ({"max_failed_fraction": 0.1}, r"`loop.max_failed_fraction` is read only by .* = function or judge"),
        ({"labeller": "judge", "judge": {"url": "judge", "model": "m"}}, r"`loop.judge.url` = 'judge': expected http"),
        (
            {"labeller": "judge", "judge": {"url": URL, "model": "m", "rubric": "{prompt}"}},
            r"`loop.judge.rubric` does not say where {completion}",
        ),
    ],
)
def test_contradictions_about_the_judge(tmp_path: Path, loop: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        context(tmp_path, **loop)


def test_how_a_judge_is_asked_may_change_when_a_run_continues_but_not_who(tmp_path: Path, answering: Any) -> None:
    answering(ANSWERS)
    judge: dict[str, Any] = {"model": "m-1", "allow_private": True, "retries": 0}

    def by(url: str, **changes: Any) -> Context:
        return context(tmp_path, labeller="judge", judge=judge | {"url": url} | changes)

    with serving(failing("aa 1")) as (url, asked):
        with pytest.raises(RewardError):
            label(by(url), BOTH)
        with pytest.raises(RewardError):
            label(by(url, retries=1), BOTH)
        assert len(asked) == 20 + 2
        with pytest.raises(RewardError):
            label(by(url, model="m-2"), BOTH)  # nothing of the first judge's is taken for the second one's
        assert len(asked) == 22 + 20
    with serving(scoring) as (url, asked):
        label(by(url), BOTH)
        with pytest.raises(CheckpointError, match=r"label.judge.model: m-1 there, m-2 now"):
            label(by(url, model="m-2"), BOTH)
