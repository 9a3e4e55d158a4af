"""Conversion between kinds, and the canonical file that reads back to equal groups."""

from __future__ import annotations

import gzip
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.data.convert import KINDS, as_kind, convert_groups, pair_margin, writing
from accord.data.read import read_groups
from accord.errors import DataError
from accord.records import Completion, Group, Message, Origin

PROMPT = (Message("user", "x"),)


def group(*answers: tuple, **rest) -> Group:
    """Answers as (text, field, value)."""
    made = tuple(Completion((Message("assistant", text),), **dict([field])) for text, *field in answers)
    return Group(PROMPT, made, **rest)


PAIR = group(("a", "rank", 0), ("b", "rank", 1), margin=2.0)
TIE = group(("a", "rank", 0), ("b", "rank", 0), soft_label=0.5)
RANKED = group(("c", "rank", 2), ("a", "rank", 0), ("b", "rank", 1), ("b2", "rank", 1))
SCORED = group(("low", "score", -1.0), ("high", "score", 3.0), ("mid", "score", 0.5))
LABELLED = group(("good", "label", True), ("bad", "label", False))
GOOD, BAD = group(("good", "label", True)), group(("bad", "label", False))
ONE_SCORE = group(("a", "score", 1.0))
SFT = Group(PROMPT, (Completion((Message("assistant", "a"),)),))
TEXT = Group((), SFT.completions)
ONE_RANK = group(("a", "rank", 0))
DIALOGUE = Group(
    PROMPT,
    (
        Completion(
            tuple(Message(role, "y") for role in ("assistant", "user", "assistant", "tool", "user", "assistant"))
        ),
    ),
)
CONTRADICTION = Group(
    PROMPT, tuple(replace(c, score=float(c.rank or 0)) for c in group(("a", "rank", 0), ("b", "rank", 1)).completions)
)
ALONE = "judged answers that are alone with their prompt: one answer cannot be compared"
LATER = "later turns by user (a prompt ends before the first answer)"
AGAINST = "pairs whose scores contradict their order"


def texts(groups: tuple[Group, ...]) -> list[str]:
    return [" ".join(c.text for c in g.completions) for g in groups]


@pytest.mark.parametrize(
    ("given", "to", "expected", "dropped"),
    [
        ([PAIR], "sft", ["a"], {}),
        ([PAIR, TIE], "sft", ["a"], {"ties": 1}),
        ([RANKED], "sft", ["a"], {}),
        ([SCORED], "sft", ["high"], {}),
        ([LABELLED, GOOD, BAD], "sft", ["good", "good"], {"undesirable answers": 1}),
        ([SFT, Group(PROMPT)], "sft", ["a"], {"prompts without an answer": 1}),
        ([PAIR, TIE], "pairs", ["a b"], {"ties": 1}),
        ([RANKED], "pairs", ["a b", "a b2", "a c", "b c", "b2 c"], {"ties": 1}),
        ([SCORED], "pairs", ["high mid", "high low", "mid low"], {}),
        ([LABELLED], "pairs", ["good bad"], {}),
        ([PAIR, SFT], "pairs", ["a b"], {"answers without a rank, score or label": 1}),
        ([PAIR, ONE_SCORE], "pairs", ["a b"], {ALONE: 1}),
        ([PAIR, ONE_RANK], "pairs", ["a b"], {ALONE: 1}),
        ([DIALOGUE, SFT], "prompts", ["", ""], {LATER: 2}),
        ([replace(PAIR, completions=DIALOGUE.completions * 2)], "prompts", [""], {LATER: 2}),
        ([PAIR, CONTRADICTION], "pairs", ["a b"], {AGAINST: 1}),
        ([PAIR, replace(PAIR, margin=-1.0)], "ranked", ["a b"], {AGAINST: 1}),
        ([RANKED, TIE], "ranked", ["c a b b2"], {"ties": 1}),
        ([SCORED], "ranked", ["low high mid"], {}),
        ([PAIR, TIE, RANKED], "rated", ["a b"], {"ties": 1, "groups without scores or labels": 1}),
        ([SCORED, GOOD], "rated", ["low high mid", "good"], {}),
        ([PAIR, Group(PROMPT), TEXT], "prompts", ["", ""], {"texts without a prompt": 1}),
    ],
)
def test_conversions(given: list[Group], to, expected: list[str], dropped: dict[str, int]) -> None:
    result = as_kind(given, to)
    assert texts(result.groups) == expected and dict(result.dropped) == dropped
    fitting = {"pairs", "ranked"} if to == "ranked" else {to}
    assert {g.kind for g in result.groups} <= fitting


@pytest.mark.parametrize(
    ("given", "to", "changed"),
    [
        ([PAIR, PAIR, TIE, RANKED], "ranked", {}),
        ([SCORED, LABELLED, ONE_SCORE, PAIR], "ranked", {"rated": 2}),
        ([RANKED, PAIR], "pairs", {"ranked": 1}),
        ([PAIR, PAIR, GOOD], "rated", {"pairs": 2}),
        ([PAIR, SFT, GOOD, BAD], "sft", {"pairs": 1, "rated": 1}),
    ],
)
def test_what_was_of_another_kind_is_counted(given: list[Group], to, changed: dict[str, int]) -> None:
    assert dict(as_kind(given, to).changed) == changed


@pytest.mark.parametrize(
    ("given", "to", "methods"),
    [
        ([BAD], "sft", "Single answers with labels are for kto or ilql, with scores for ilql, and several in one row"),
        ([RANKED], "rated", "Rankings are for reward, dpo and orpo."),
        ([SFT, Group(PROMPT)], "ranked", "Demonstrations are for sft; prompts alone are for the methods that sample"),
    ],
)
def test_a_refusal_names_the_methods_that_the_data_are_for(given: list[Group], to, methods: str) -> None:
    with pytest.raises(DataError) as refused:
        as_kind(given, to)
    assert methods in str(refused.value)


def test_the_margin_of_two_answers_is_the_pairs_own_else_the_difference_of_their_scores() -> None:
    first = Completion(PAIR.completions[0].messages, rank=0, score=3.0)
    second = Completion(PAIR.completions[1].messages, rank=1, score=1.0)
    assert pair_margin(replace(PAIR, margin=None), first, second) == 2.0
    assert pair_margin(replace(PAIR, margin=0.5), first, second) == 0.5
    assert pair_margin(RANKED, RANKED.completions[1], RANKED.completions[0]) is None
    assert pair_margin(replace(RANKED, margin=9.0), first, second) == 2.0


def test_the_pairs_of_scored_answers_have_the_difference_as_margin() -> None:
    pairs = as_kind([SCORED], "pairs").groups
    assert [p.margin for p in pairs] == [2.5, 4.0, 1.5]
    assert [[c.rank for c in p.completions] for p in pairs] == [[0, 1]] * 3


def test_a_pair_becomes_one_desirable_and_one_undesirable_answer() -> None:
    (rated,) = as_kind([PAIR], "rated").groups
    assert [(c.text, c.label, c.rank) for c in rated.completions] == [("a", True, None), ("b", False, None)]


def test_the_chosen_answer_comes_first_whatever_the_order_in_the_file() -> None:
    backwards = group(("b", "rank", 7), ("a", "rank", 3), margin=2.0, soft_label=0.9)
    assert as_kind([backwards], "pairs").groups == (replace(PAIR, soft_label=0.9),)
    assert texts(as_kind([backwards], "sft").groups) == ["a"]


def test_a_single_demonstration_becomes_the_prompts_reference() -> None:
    assert as_kind([SFT], "prompts").groups == (Group(PROMPT, reference="a"),)


def test_identical_answers_of_different_rank_make_no_pair() -> None:
    twice = group(("a", "rank", 0), ("a", "rank", 1), ("b", "rank", 2))
    result = as_kind([twice], "pairs")
    assert len(result.groups) == 2 and dict(result.dropped) == {"pairs of identical answers": 1}


def test_the_origin_survives() -> None:
    made = as_kind([Group(RANKED.prompt, RANKED.completions, origin=Origin("f", 3))], "pairs").groups
    assert {str(g.origin) for g in made} == {"f:3"}


@pytest.mark.parametrize(
    ("given", "to"), [(SFT, "pairs"), (Group(PROMPT), "sft"), (BAD, "sft"), (RANKED, "rated"), (TEXT, "prompts")]
)
def test_the_impossible_is_refused_with_what_fits(given: Group, to) -> None:
    with pytest.raises(DataError, match=rf"none of the data can become {to}: it holds 1 {given.kind} .* fits "):
        as_kind([given], to)


LETTERS = st.text(max_size=8).map(lambda text: text.encode("utf-8", "ignore").decode() + "x")


@st.composite
def groups(draw: st.DrawFn) -> Group:
    """Any group that reading can give: prompts of alternating turns, answers of one or more turns, any judgement."""
    turns = draw(st.integers(0, 2))
    prompt: list[Message] = [Message("system", draw(LETTERS))] if draw(st.booleans()) else []
    for _ in range(turns):
        prompt += [Message("user", draw(LETTERS)), Message("assistant", draw(LETTERS), draw(st.booleans()))]
    prompt.append(Message("user", draw(LETTERS)))
    judged = draw(st.sampled_from(["rank", "score", "label", "none"]))
    values = {
        "rank": st.integers(0, 3),
        "score": st.just(0.0) | st.floats(allow_nan=False, allow_infinity=False),
        "label": st.booleans(),
    }
    completions = []
    for _ in range(draw(st.integers(0, 4))):
        said = [Message("assistant", draw(LETTERS), draw(st.booleans()))]
        if draw(st.booleans()):
            said += [Message("user", draw(LETTERS)), Message("assistant", draw(LETTERS))]
        judgement = {judged: draw(values[judged])} if judged != "none" else {}
        completions.append(Completion(tuple(said), **judgement))
    return Group(
        tuple(prompt),
        tuple(completions),
        margin=draw(st.none() | st.floats(0, 5)),
        soft_label=draw(st.none() | st.floats(0, 1)),
        reference=draw(st.none() | LETTERS),
    )


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.lists(groups(), min_size=1, max_size=5), st.sampled_from(["out.jsonl", "out.jsonl.gz"]))
def test_the_canonical_file_reads_back_to_equal_groups(tmp_path_factory, given: list[Group], name: str) -> None:
    path = tmp_path_factory.mktemp("round") / name
    with writing(path) as write:
        for item in given:
            write(item)
    result = read_groups(path)
    assert result.format == "accord" and result.groups == tuple(given) and result.notes == ()


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_a_ranked_list_gives_all_pairs_and_counts_the_ties(ranks: list[int]) -> None:
    """K(K-1)/2 pairs in all: those of different rank become pairs, best first; the others are counted."""
    listed = group(*((str(i), "rank", rank) for i, rank in enumerate(ranks)))
    dropped = Counter[str]()
    made = list(convert_groups([listed], "pairs", dropped, Counter()))
    expected = {
        (str(i if a < b else j), str(j if a < b else i))
        for (i, a), (j, b) in combinations(enumerate(ranks), 2)
        if a != b
    }
    assert {(p.completions[0].text, p.completions[1].text) for p in made} == expected
    assert len(made) + dropped["ties"] == len(ranks) * (len(ranks) - 1) // 2


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.lists(groups(), min_size=1, max_size=6), st.sampled_from(KINDS))
def test_every_group_is_converted_or_counted(given: list[Group], to) -> None:
    for item in given:
        dropped = Counter[str]()
        made = list(convert_groups([item], to, dropped, Counter()))
        assert made or dropped


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("before")
    with pytest.raises(RuntimeError), writing(path) as write:
        write(SFT)
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"] and path.read_text() == "before"


def test_the_compressed_output_does_not_depend_on_its_name_or_the_time(tmp_path: Path) -> None:
    """A gzip header (RFC 1952) has flags at byte 3 (bit 3: a name follows) and the time at bytes 4 to 7."""
    path = tmp_path / "a.jsonl.gz"
    with writing(path) as write:
        write(SFT)
    assert path.read_bytes()[3:8] == bytes(5)
    assert gzip.decompress(path.read_bytes()).endswith(b"}\n")


@pytest.mark.parametrize("name", ["out.csv", "out.parquet", "out.json", "out"])
def test_another_kind_of_output_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"ends in \.jsonl or \.jsonl\.gz"), writing(tmp_path / name):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"), writing(tmp_path / "no" / "out.jsonl"):
        pass
