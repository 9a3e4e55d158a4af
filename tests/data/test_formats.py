"""Each format: detected, and read into the group its layout means."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from data_support import assistant, user, write_lines

from accord.data.formats import FORMATS
from accord.data.read import ReadResult, read_groups
from accord.errors import DataError
from accord.records import Completion, Group, Message

DOCUMENT = (Path(__file__).parents[2] / "docs" / "data-formats.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"### (\S+)\n\n(.*?\n```json\n.*?)\n```", DOCUMENT, re.DOTALL))

U, A = Message("user", "Name a prime."), Message("assistant", "7")
B = Message("assistant", "8")


def read(tmp_path: Path, *rows: object, **options) -> ReadResult:
    return read_groups(write_lines(tmp_path / "rows.jsonl", *rows), **options)


def answers(*messages: Message, ranks: tuple[int, ...] = ()) -> tuple[Completion, ...]:
    return tuple(Completion((m,), rank=r) for m, r in zip(messages, ranks or [None] * len(messages), strict=True))


PAIR = Group((U,), answers(A, B, ranks=(0, 1)))
TREE = json.loads(SECTIONS["oasst"].partition("```json\n")[2])


def test_the_document_describes_every_format_in_the_order_of_detection() -> None:
    assert list(SECTIONS) == [item.name for item in FORMATS]
    for item in FORMATS:
        assert " ".join(SECTIONS[item.name].split()).startswith(item.description), item.name


DOCUMENTED = {
    "accord": (Group((U,), answers(A, B, ranks=(0, 1)), margin=1.0),),
    "hh": (PAIR,),
    "pairs": (PAIR,),
    "comparisons": (
        Group(
            (
                Message(
                    "user",
                    "SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: My cat sleeps all day.\nIs that normal?\n\nTL;DR:",
                ),
            ),
            answers(
                Message("assistant", " Is it normal that my cat sleeps all day?"),
                Message("assistant", " Cat sleeps."),
                ranks=(0, 1),
            ),
        ),
    ),
    "tldr": (
        Group(
            (Message("user", "SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: My cat sleeps all day.\n\nTL;DR:"),),
            answers(Message("assistant", " Cat sleeps.")),
        ),
    ),
    "verdict": (Group((U,), PAIR.completions, margin=0.5),),
    "oasst": (Group((U,), answers(B, A, ranks=(1, 0))),),
    "label-studio": (PAIR,),
    "seed-tasks": tuple(
        Group((Message("user", f"Is this number prime?\n\n{n}"),), answers(Message("assistant", said)))
        for n, said in ((7, "Yes."), (8, "No."))
    ),
    "ranked": (Group((U,), answers(B, A, Message("assistant", "It is 7."), ranks=(2, 0, 1))),),
    "messages": (Group((U,), answers(A)),),
    "sharegpt": (Group((Message("user", "说一个质数。"),), answers(Message("assistant", "七。"))),),
    "alpaca": (Group((Message("user", "Is this number prime?\n\n7"),), answers(Message("assistant", "Yes."))),),
    "prompt-completion": (Group((U,), (Completion((B,), label=False),)),),
    "text": (Group((), (Completion((Message("assistant", "What a wonderful film."),), score=0.9),)),),
    "prompts": (Group((U,), reference="7"),),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_the_documents_example_is_detected_and_read(tmp_path: Path, name: str) -> None:
    result = read(tmp_path, SECTIONS[name].partition("```json\n")[2])
    assert (result.format, result.groups) == (name, DOCUMENTED[name])


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [user(U.content), assistant("7")], "rejected": [user(U.content), assistant("8")]},
        {"prompt": [user(U.content)], "chosen": [assistant("7")], "rejected": [assistant("8")]},
        {
            "prompt": U.content,
            "chosen": [user(U.content), assistant("7")],
            "rejected": [user(U.content), assistant("8")],
        },
        {"prompt": U.content, "chosen": assistant("7"), "rejected": assistant("8")},
        {"question": U.content, "chosen": "7", "rejected": "8"},
        {
            "conversations": [{"from": "human", "value": U.content}],
            "chosen": {"from": "gpt", "value": "7"},
            "rejected": "8",
        },
        {"chosen_messages": [user(U.content), assistant("7")], "rejected_messages": [user(U.content), assistant("8")]},
        {"Question": U.content, "Best Answer": "7", "Best Incorrect Answer": "8"},
        {"instruction": U.content, "output_1": "7", "output_2": "8", "preference": 1.0},
        {"instruction": U.content, "output_1": "8", "output_2": "7", "preference": 2},
        {"input": U.content, "output_1": "7", "output_2": "8", "label": "1"},
        {"prompt": U.content, "response_a": "8", "response_b": "7", "winner": "B"},
        {"prompt": U.content, "answer1": "8", "answer2": "7", "selected": "right"},
        {
            "conversation_a": [user(U.content), assistant("8")],
            "conversation_b": [user(U.content), assistant("7")],
            "winner": "model_b",
        },
        {"prompt": "\n\nHuman: Name a prime.\n\nAssistant:", "chosen": "7", "rejected": "8"},
        {"prompt": U.content, "responses": ["8", "7"], "ranks": [2, 1]},
        {"prompt": U.content, "answers": [{"answer": "8", "rank": 5}, {"answer": "7", "rank": 1}]},
    ],
)
def test_every_layout_of_a_pair_gives_the_same_pair(tmp_path: Path, row: dict[str, object]) -> None:
    (group,) = read(tmp_path, row).groups
    assert (
        sorted(group.completions, key=lambda c: c.rank or 0) == list(PAIR.completions) and group.prompt == PAIR.prompt
    )
    assert (group.kind, group.margin, group.soft_label) == ("pairs", None, None)


def test_the_implicit_prompt_is_the_longest_common_beginning(tmp_path: Path) -> None:
    shared = [user("hi"), assistant("hello"), user("a prime?")]
    (group,) = read(tmp_path, {"chosen": [*shared, assistant("7")], "rejected": [*shared, assistant("8")]}).groups
    assert [m.content for m in group.prompt] == ["hi", "hello", "a prime?"]
    assert [c.text for c in group.completions] == ["7", "8"]


def test_a_dialogue_that_is_the_beginning_of_the_other_keeps_its_answer(tmp_path: Path) -> None:
    short = [user("hi"), assistant("hello")]
    (group,) = read(tmp_path, {"chosen": [*short, user("more"), assistant("ok")], "rejected": short}).groups
    assert [m.content for m in group.prompt] == ["hi"]
    assert [len(c.messages) for c in group.completions] == [3, 1]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}, "differ at turn 1"),
        (
            {"prompt": "x", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("d")]},
            "another prompt",
        ),
    ],
)
def test_dialogues_without_a_common_prompt_are_problems(tmp_path: Path, row: dict[str, object], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read(tmp_path, row)


def test_a_pair_may_say_how_likely_its_chosen_answer_is_preferred(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (certain,) = read(tmp_path, row).groups
    (likely,) = read(tmp_path, row | {"soft_label": 0.8}).groups
    assert (certain.soft_label, likely.soft_label) == (None, 0.8)


def test_scores_of_both_answers_give_the_margin(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 8.5, "score_rejected": 6}
    (group,) = read(tmp_path, row).groups
    assert group.margin == 2.5 and [c.score for c in group.completions] == [8.5, 6.0]


@pytest.mark.parametrize(
    ("preference", "texts", "ranks", "soft_label"),
    [(1.25, "ab", (0, 1), 0.75), (1.75, "ba", (0, 1), 0.75), (0, "ab", (0, 0), 0.5), (1.5, "ab", (0, 0), 0.5)],
)
def test_numbers_between_one_and_two_are_soft_labels(tmp_path: Path, preference, texts, ranks, soft_label) -> None:
    """1.25 says that the second is preferred with probability 0.25, so the first with 0.75; 1.5 and 0 are ties."""
    (group,) = read(tmp_path, {"prompt": "x", "output_1": "a", "output_2": "b", "preference": preference}).groups
    assert "".join(c.text for c in group.completions) == texts
    assert tuple(c.rank for c in group.completions) == ranks and group.soft_label == soft_label


@pytest.mark.parametrize(
    ("said", "texts", "margin"),
    [("a-is-better", "ab", 1.0), ("a-is-slightly-better", "ab", 0.5), ("b-is-better", "ba", 1.0), ("tie", "ab", None)],
)
def test_five_level_preferences_give_margins(tmp_path: Path, said: str, texts: str, margin: float | None) -> None:
    (group,) = read(tmp_path, {"prompt": "x", "completion_a": "a", "completion_b": "b", "preference": said}).groups
    assert "".join(c.text for c in group.completions) == texts and group.margin == margin


def test_a_tie_between_equal_answers_is_a_tie(tmp_path: Path) -> None:
    (group,) = read(tmp_path, {"prompt": "x", "completion_a": "a", "completion_b": "a", "preference": "tie"}).groups
    assert group.soft_label == 0.5


def test_several_raters_give_several_groups(tmp_path: Path) -> None:
    row = {"prompt": "x", "response1": "a", "response2": "b", "annotator1": 1, "annotator2": 2, "annotator3": 0}
    result = read(tmp_path, row)
    assert [(g.completions[0].text, g.soft_label) for g in result.groups] == [("a", None), ("b", None), ("a", 0.5)]


@pytest.mark.parametrize("verdict", [None, 3, 0.5, "maybe", -1, True])
def test_a_verdict_that_says_nothing_is_a_problem(tmp_path: Path, verdict: object) -> None:
    good = {"prompt": "x", "output_1": "a", "output_2": "b", "preference": 1}
    result = read(tmp_path, good, good | {"preference": verdict}, lenient=True)
    if verdict is True:
        assert result.problem_count == 1
    assert [p.field for p in result.problems] == ["preference"]


def test_every_assistant_turn_is_taught_and_only_the_last_is_judged(tmp_path: Path) -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    (taught,) = read(tmp_path, {"messages": messages}).groups
    assert (len(taught.prompt), len(taught.completions[0].messages)) == (1, 3)
    (judged,) = read(tmp_path, {"messages": messages, "label": "good"}).groups
    assert (len(judged.prompt), judged.completions[0].text, judged.completions[0].label) == (3, "d", True)


def test_roles_of_sharegpt_tool_dialogues_are_translated(tmp_path: Path) -> None:
    roles = ["system", "human", "function_call", "observation", "observation", "gpt"]
    row = {"conversations": [{"from": role, "value": role} for role in roles], "tools": "[]"}
    result = read(tmp_path, row)
    (group,) = result.groups
    said = [m.role for m in (*group.prompt, *group.completions[0].messages)]
    assert said == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert result.notes == ("columns not used: tools",)


def test_text_blocks_are_kept_and_the_others_counted(tmp_path: Path) -> None:
    blocks = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "7"}, {"type": "text", "text": "!"}]
    row = {"messages": [user("a"), {"role": "assistant", "content": blocks}]}
    result = read(tmp_path, row, row)
    assert result.groups[0].completions[0].text == "7\n!"
    assert result.notes == ("2 reasoning blocks not used",)


def test_tool_calls_without_text_are_kept_as_json(tmp_path: Path) -> None:
    calls = [{"function": {"name": "f", "arguments": "{}"}}]
    turns = [user("a"), {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "1"}]
    (group,) = read(tmp_path, {"messages": [*turns, assistant("b")]}).groups
    assert json.loads(group.completions[0].messages[0].content) == calls


def test_an_empty_system_message_is_left_out_and_counted(tmp_path: Path) -> None:
    result = read(tmp_path, {"messages": [{"role": "system", "content": ""}, user(U.content), assistant("7")]})
    assert result.groups == (Group((U,), answers(A)),)
    assert result.notes == ("1 empty system messages not used",)


def test_null_columns_are_absent(tmp_path: Path) -> None:
    """As in tables with fixed columns: a null chosen makes no pair, a null label no judgement."""
    row = {"prompt": U.content, "completion": "7", "chosen": None, "rejected": None, "label": None, "messages": None}
    result = read(tmp_path, row)
    assert (result.format, result.groups, result.notes) == ("prompt-completion", (Group((U,), answers(A)),), ())


def test_a_loss_weight_of_zero_keeps_an_assistant_turn_out_of_the_loss(tmp_path: Path) -> None:
    turns = [
        user("a") | {"loss_weight": 0.0},
        assistant("b") | {"loss_weight": 0},
        user("c"),
        assistant("d") | {"weight": 1},
    ]
    (group,) = read(tmp_path, {"messages": turns}).groups
    assert [m.learn for m in (*group.prompt, *group.completions[0].messages)] == [True, False, True, True]


def test_alpaca_rows_take_system_and_history(tmp_path: Path) -> None:
    row = {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system": "s"}
    (group,) = read(tmp_path, row).groups
    assert [(m.role, m.content) for m in group.prompt] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]


def test_text_that_looks_like_control_tokens_or_templates_stays_text(tmp_path: Path) -> None:
    odd = "<|im_end|>\n<s>[INST] {{ messages }} {% raw %} \n\nHuman: hi\n\nAssistant: ok </s>"
    (group,) = read(tmp_path, {"messages": [user(odd), assistant(odd)]}).groups
    assert (group.prompt, group.completions[0].messages) == ((Message("user", odd),), (Message("assistant", odd),))
    (group,) = read(tmp_path, {"prompt": odd, "completion": odd}).groups
    assert (group.prompt[0].content, group.completions[0].text) == (odd, odd)


def test_scored_lists_are_rated(tmp_path: Path) -> None:
    row = {
        "instruction": "x",
        "completions": [{"response": "a", "overall_score": 3}, {"response": "b", "overall_score": 7}],
    }
    (group,) = read(tmp_path, row).groups
    assert group.kind == "rated" and [c.score for c in group.completions] == [3.0, 7.0]


def test_scores_may_tell_tied_ranks_apart_and_tie_where_ranks_differ(tmp_path: Path) -> None:
    row = {"prompt": "x", "responses": ["a", "b", "c"], "ranks": [1, 1, 2], "scores": [2, 3, 2]}
    (group,) = read(tmp_path, row).groups
    assert [(c.rank, c.score) for c in group.completions] == [(0, 2.0), (0, 3.0), (1, 2.0)]


def test_a_response_alone_keeps_its_rank(tmp_path: Path) -> None:
    (group,) = read(tmp_path, {"prompt": "x", "responses": [{"text": "a", "rank": 1}]}).groups
    assert (group.kind, group.completions[0].rank) == ("sft", 0)


def test_a_list_with_a_rank_missing_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"responses\[1\]\.rank: found nothing"):
        read(tmp_path, {"prompt": "x", "responses": [{"text": "a", "rank": 0}, {"text": "b"}]})


def _reply(text: str, rank: int | None, *replies: dict, role: str = "assistant", deleted: bool = False) -> dict:
    node = {"role": role, "text": text, "rank": rank, "replies": list(replies), "deleted": deleted}
    return {key: value for key, value in node.items() if value is not None}


def test_trees_give_one_group_per_user_message_with_its_whole_context(tmp_path: Path) -> None:
    later = _reply("more?", None, _reply("yes", None), role="prompter")
    replies = [_reply("b", 1), _reply("a", 0, later), _reply("gone", 2, deleted=True), _reply("unranked", None)]
    result = read(tmp_path, TREE | {"prompt": _reply("x", None, *replies, role="prompter")})
    first, second = result.groups
    assert [(c.text, c.rank) for c in first.completions] == [("b", 1), ("a", 0)]
    assert [m.content for m in second.prompt] == ["x", "a", "more?"] and second.kind == "sft"
    assert "1 deleted replies not used" in result.notes
    assert "1 replies without a rank beside ranked ones not used" in result.notes


def _task(data: dict, *results: dict, cancelled: bool = False) -> dict:
    return {"id": 1, "data": data, "annotations": [{"was_cancelled": cancelled, "result": [r]} for r in results]}


def test_label_studio_controls_are_read(tmp_path: Path) -> None:
    items = [{"id": "i", "body": "a"}, {"id": "j", "body": "b"}]
    ranker = {"type": "ranker", "value": {"ranker": {"rank": ["j", "i"]}}}
    (group,) = read(tmp_path, _task({"prompt": "x", "items": items}, ranker)).groups
    assert [(c.text, c.rank) for c in group.completions] == [("b", 0), ("a", 1)]
    choices = {"type": "choices", "value": {"choices": ["not acceptable"]}}
    (group,) = read(tmp_path, _task({"prompt": "x", "response": "a"}, choices)).groups
    assert group.completions[0].label is False
    (group,) = read(tmp_path, _task({"prompt": "x"}, {"type": "textarea", "value": {"text": ["a"]}})).groups
    assert group.completions[0].text == "a" and group.kind == "sft"


def test_cancelled_annotations_are_counted_and_a_task_without_any_is_a_problem(tmp_path: Path) -> None:
    choice = {"type": "choices", "value": {"choices": ["good"]}}
    good = _task({"prompt": "x", "response": "a"}, choice)
    good["annotations"].append({"was_cancelled": True, "result": []})
    bad = _task({"prompt": "x", "response": "a"}, choice, cancelled=True)
    result = read(tmp_path, good, bad, lenient=True)
    assert result.notes[0] == "1 cancelled or empty annotations not used" and len(result.groups) == 1
    assert [p.field for p in result.problems] == ["annotations"]


def test_buckets_are_no_ranking(tmp_path: Path) -> None:
    buckets = {"type": "ranker", "value": {"ranker": {"_": ["i"], "relevant_results": ["j"]}}}
    with pytest.raises(DataError, match="Buckets are no ranking"):
        read(tmp_path, _task({"prompt": "x", "items": [{"id": "i", "body": "a"}, {"id": "j", "body": "b"}]}, buckets))


def test_labels_are_read_in_their_usual_spellings(tmp_path: Path) -> None:
    spellings = [True, 1, "1", "yes", "Good", "desirable", False, 0, "0", "no", "BAD", "undesirable"]
    result = read(tmp_path, *({"prompt": "x", "completion": "a", "label": label} for label in spellings))
    assert [g.completions[0].label for g in result.groups] == [True] * 6 + [False] * 6


def test_only_the_first_of_several_questions_is_used_and_the_others_are_counted(tmp_path: Path) -> None:
    result = read(tmp_path, {"turns": ["a", "b"], "reference": ["x", ""]})
    assert result.groups == (Group((Message("user", "a"),), reference="x"),)
    assert result.notes == ("1 later turns (their earlier answers are not in the file) not used",)


def test_text_files_hold_one_prompt_a_line_or_documents_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first\n\n second \n")
    assert [g.prompt[0].content for g in read_groups(path).groups] == ["first", " second "]
    forced = read_groups(path, format="text").groups
    assert [(g.prompt, g.completions[0].text) for g in forced] == [((), "first"), ((), " second ")]


# --- mapping and forcing ---------------------------------------------------------------------------------------------


def test_mapped_fields_are_followed_into_objects_and_lists(tmp_path: Path) -> None:
    row = {"data": {"q": "x", "a.b": "dotted"}, "out": [{"text": "a"}], "other": 1, "input": "keep"}
    fields = {"prompt": "data.q", "completion": "out.0.text"}
    result = read(tmp_path, row, fields=fields)
    assert result.groups == (Group((Message("user", "x"),), answers(Message("assistant", "a"))),)
    assert read(tmp_path, row, fields={"prompt": "data.a.b"}, format="prompts").groups[0].prompt[0].content == "dotted"
    assert "columns not used: other, input" in result.notes


def test_a_column_can_be_renamed_beside_the_others(tmp_path: Path) -> None:
    row = {"prompt": "Name a prime.", "chosen": "7", "worse": "8"}
    assert read(tmp_path, row, fields={"rejected": "worse"}).groups == (PAIR,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"promt": "a"}, "there is no field promt. Did you mean prompt"),
        ({"prompt": "a.b"}, r"--map prompt=a\.b: no row has anything there\. The columns are: a, c"),
        ({"prompt": "a.0"}, "no row has anything there"),
    ],
)
def test_a_mapping_that_leads_nowhere_is_refused(tmp_path: Path, fields: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, {"a": {"x": 1}, "c": 2}, fields=fields)


def test_an_unknown_format_names_the_nearest_and_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such format\. Did you mean alpaca\? The formats are: accord, hh, pairs"):
        read(tmp_path, {"prompt": "a"}, format="alpacca")


def test_a_forced_format_reads_what_detection_would_not_choose(tmp_path: Path) -> None:
    row = {"prompt": "x", "chosen": "a", "rejected": "b"}
    result = read(tmp_path, row, format="prompts")
    assert result.groups == (Group((Message("user", "x"),)),)
    assert result.notes == ("columns not used: chosen, rejected",)


def test_the_fingerprint_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    """sha256 of '{"prompt": "a"}\\n', from the sha256sum program."""
    result = read(tmp_path, {"prompt": "a"})
    assert result.fingerprint == "8a8c2da9cd6156c411e04714ce81cde2425df195083077b23550021445caf826"
    assert read(tmp_path, {"prompt": "b"}).fingerprint != result.fingerprint
