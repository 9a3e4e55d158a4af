"""Rows that cannot be used: every one is a Problem with its line, field, what was found; the good rows are kept."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from data_support import assistant, user, write_lines

from accord.data.read import MAX_PROBLEMS, read_groups
from accord.errors import DataError

PAIR = {"prompt": "Name a prime.", "chosen": "7", "rejected": "8"}
CHAT = {"messages": [user("Name a prime."), assistant("7")]}
TALK = {"prompt": "Name a prime.", "completion": "7", "score": 1.0}
LIST = {"prompt": "Name a prime.", "responses": [{"text": "7", "rank": 0}, {"text": "8", "rank": 1}]}
SUMMED = {
    "info": {"subreddit": "a", "title": "b", "post": "c"},
    "summaries": [{"text": "d"}, {"text": "e"}],
    "choice": 1,
}
OWN = {
    "prompt": [user("Name a prime.")],
    "completions": [{"messages": [assistant("7")], "rank": 0}, {"messages": [assistant("8")], "rank": 1}],
}
HH = {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"}

# name: (a good row, the bad row, field, what was found)
BAD = {
    "cut line": (PAIR, '{"prompt": "a", "chosen": "b', "row", "invalid JSON at column"),
    "not JSON": (PAIR, "prompt: a", "row", "invalid JSON"),
    "an array": (PAIR, "[1]", "row", "a list of 1"),
    "a number": (PAIR, "3", "row", "3"),
    "two rows on a line": (PAIR, '{"prompt": "a"} {"prompt": "b"}', "row", "more text after column 15"),
    "repeated key": (
        PAIR,
        '{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}',
        "chosen",
        "the field twice",
    ),
    "NUL bytes": (PAIR, "\0\0\0\0", "row", "NUL bytes"),
    "deep nesting": (PAIR, '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "row", "nesting too deep"),
    "a huge number": (TALK, '{"prompt": "a", "completion": "b", "score": ' + "9" * 5000 + "}", "row", "cannot be read"),
    "lone surrogate": (
        PAIR,
        '{"prompt": "a\\ud83d", "chosen": "b", "rejected": "c"}',
        "prompt",
        "half of a surrogate pair",
    ),
    "null chosen": (PAIR, PAIR | {"chosen": None}, "chosen", "nothing"),
    "empty chosen": (PAIR, PAIR | {"chosen": ""}, "chosen", "empty text"),
    "blank rejected": (PAIR, PAIR | {"rejected": " \n"}, "rejected", "only white space"),
    "number as text": (PAIR, PAIR | {"chosen": 7}, "chosen", "7"),
    "chosen is rejected": (PAIR, PAIR | {"rejected": "7"}, "rejected", "the same text as in chosen"),
    "no prompt": (PAIR, {"chosen": "7", "rejected": "8"}, "prompt", "nothing"),
    "null prompt": (PAIR, PAIR | {"prompt": None}, "prompt", "nothing"),
    "negative margin": (PAIR, PAIR | {"margin": -1}, "margin", "-1"),
    "a soft label that is no probability": (PAIR, PAIR | {"soft_label": 1.2}, "soft_label", "1.2"),
    "scores against the choice": (PAIR, PAIR | {"score_chosen": 1, "score_rejected": 2}, "margin", "-1"),
    "scores against the choice beside a margin": (
        PAIR,
        PAIR | {"margin": 1, "score_chosen": 1, "score_rejected": 5},
        "rejected",
        "score 5",
    ),
    "scores against the ranks": (
        LIST,
        {"prompt": "p", "responses": [{"text": t, "score": s, "rank": s - 1} for t, s in (("a", 1), ("b", 2))]},
        "responses[1]",
        "score 2",
    ),
    "columns of scores against the ranks": (
        LIST,
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [3, 1, 2], "scores": [1, 1, 5]},
        "responses[2]",
        "score 5",
    ),
    "own scores against the ranks": (
        OWN,
        OWN | {"completions": [item | {"score": item["rank"]} for item in OWN["completions"]]},
        "completions[1]",
        "score 1",
    ),
    "own negative margin": (OWN, OWN | {"margin": -1}, "margin", "-1"),
    "choice true": (SUMMED, SUMMED | {"choice": True}, "choice", "True"),
    "margin in words": (PAIR, PAIR | {"margin": "big"}, "margin", 'the text "big"'),
    "other schema": (PAIR, CHAT, "chosen", "nothing"),
    "richer schema": ({"prompt": "a"}, PAIR, "row", "a row of the format pairs"),
    "unknown role": (CHAT, {"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role", 'the text "robot"'),
    "no role": (CHAT, {"messages": [{"content": "hi"}]}, "messages[0].role", "nothing"),
    "two users": (
        CHAT,
        {"messages": [user("a"), user("b"), assistant("c")]},
        "messages (turn 2)",
        "a turn by user after a turn by user",
    ),
    "two assistants": (
        CHAT,
        {"messages": [user("a"), assistant("b"), assistant("c")]},
        "messages (turn 3)",
        "a turn by assistant",
    ),
    "assistant first": (
        CHAT,
        {"messages": [assistant("a"), user("b"), assistant("c")]},
        "messages (turn 1)",
        "a turn by assistant after the start",
    ),
    "late system": (
        CHAT,
        {"messages": [user("a"), {"role": "system", "content": "b"}]},
        "messages (turn 2)",
        "a turn by system",
    ),
    "no last answer": (CHAT, {"messages": [user("a"), assistant("b"), user("c")]}, "messages", "a last turn by user"),
    "no messages": (CHAT, {"messages": []}, "messages", "a list of 0"),
    "message is text": (CHAT, {"messages": ["hi"]}, "messages[0]", 'the text "hi"'),
    "empty answer": (CHAT, {"messages": [user("a"), assistant("")]}, "messages[1].content", "empty text"),
    "only an image": (
        CHAT,
        {"messages": [user("a"), {"role": "assistant", "content": [{"type": "image", "url": "x"}]}]},
        "messages[1].content",
        "empty text",
    ),
    "block without type": (
        CHAT,
        {"messages": [{"role": "user", "content": ["a"]}]},
        "messages[0].content[0]",
        'the text "a"',
    ),
    "fractional weight": (
        CHAT,
        {"messages": [user("a"), assistant("b") | {"loss_weight": 0.5}]},
        "messages[1].loss_weight",
        "0.5",
    ),
    "unknown label": (CHAT, CHAT | {"label": "perhaps"}, "label", 'the text "perhaps"'),
    "score NaN": (TALK, '{"prompt": "a", "completion": "b", "score": NaN}', "score", "nan"),
    "score infinite": (TALK, '{"prompt": "a", "completion": "b", "score": 1e999}', "score", "inf"),
    "score true": (TALK, TALK | {"score": True}, "score", "True"),
    "score in words": (TALK, TALK | {"score": "high"}, "score", 'the text "high"'),
    "other prompt": (
        HH,
        HH | {"rejected": "\n\nHuman: ho\n\nAssistant: no"},
        "rejected",
        "differs from chosen's at character 11",
    ),
    "empty HH answer": (HH, HH | {"chosen": "\n\nHuman: hi\n\nAssistant: "}, "chosen", "an empty final answer"),
    "HH ends with Human": (HH, HH | {"chosen": HH["chosen"] + "\n\nHuman: ok"}, "chosen", "ends with Human"),
    "HH Human twice": (
        HH,
        {k: "\n\nHuman: oh" + v for k, v in HH.items()},
        "chosen (turn 2)",
        "two turns by Human in a row",
    ),
    "HH empty turn": (
        HH,
        {k: "\n\nHuman: \n\nAssistant: a" + v for k, v in HH.items()},
        "chosen (turn 1)",
        "an empty turn",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_and_the_good_rows_are_kept(tmp_path: Path, case: str) -> None:
    good, bad, field, found = BAD[case]
    path = write_lines(tmp_path / "a.jsonl", good, good, bad, good)
    with pytest.raises(DataError, match="1 of 4 rows cannot be used") as error:
        read_groups(path)
    result = read_groups(path, lenient=True)
    (problem,) = result.problems
    assert (problem.origin.line, problem.field) == (3, field)
    assert found in problem.found and problem.expected and problem.fix
    assert str(problem) in str(error.value) and str(problem).startswith(f"{path}:3: ")
    assert (result.rows, result.problem_count, len(result.groups)) == (4, 1, 3)


def test_a_byte_order_mark_and_carriage_returns_are_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([json.dumps(PAIR).encode()] * 2) + b"\r\n")
    result = read_groups(path)
    assert len(result.groups) == 2 and any("byte order mark" in note for note in result.notes)


def test_one_line_in_another_encoding_is_one_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(PAIR | {"prompt": "café"}, ensure_ascii=False).encode()
    path.write_bytes(good + b"\n" + '{"prompt": "é"}'.encode("latin-1") + b"\n" + good)
    result = read_groups(path, lenient=True)
    assert [str(p.origin).rpartition(":")[2] for p in result.problems] == ["2"] and len(result.groups) == 2
    assert result.problems[0].found == "byte 0xe9 at column 13"


def test_a_last_line_that_is_cut_off_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PAIR) + "\n" + json.dumps(PAIR)[:-3])
    assert read_groups(path, lenient=True).problems[0].found == "a last line that is cut off"


def test_a_table_row_with_a_cell_too_few_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\na,b\nc\n\nd,e\n")
    result = read_groups(path, lenient=True)
    assert [(p.origin.line, p.found) for p in result.problems] == [(3, "1 cells")] and len(result.groups) == 2


def test_a_repeated_key_in_an_array_does_not_stop_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "a"},\n {"prompt": "b", "prompt": "c"},\n {"prompt": "d"}]')
    result = read_groups(path, lenient=True)
    assert [p.origin.line for p in result.problems] == [2] and len(result.groups) == 2


def test_rows_that_share_a_line_are_told_apart_by_number(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "a"}, {"prompt": ""}]')
    assert read_groups(path, lenient=True).problems[0].field == "row 2, prompt"


def test_a_very_long_line_is_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "x" * 10_000_000})
    assert len(read_groups(path).groups[0].prompt[0].content) == 10_000_000


def test_all_problems_are_counted_and_the_first_hundred_kept(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", PAIR, *([PAIR | {"chosen": ""}] * 150))
    result = read_groups(path, lenient=True)
    assert (len(result.problems), result.problem_count, MAX_PROBLEMS) == (100, 150, 100)
    with pytest.raises(DataError, match=r"150 of 151 rows(.|\n)*and 140 more"):
        read_groups(path)


def test_a_file_without_any_usable_row_is_refused_even_when_lenient(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No row is usable"):
        read_groups(write_lines(tmp_path / "a.jsonl", {"prompt": ""}), lenient=True)


def test_names_out_of_a_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "ok", "\x1b[2Jcolumn": 1}, {"prompt": {"\x1b[2J": "\x1b]0;x"}})
    result = read_groups(path, lenient=True)
    printed = " ".join([*map(str, result.problems), *result.notes])
    assert "column" in printed and "\x1b" not in printed


def test_damaged_files_never_raise_anything_but_a_data_error(tmp_path: Path) -> None:
    """A thousand files with bytes flipped, cut, doubled or inserted: each reads, or is refused on purpose."""
    chance = random.Random(0)
    whole = "".join(json.dumps(row) + "\n" for row in (PAIR, PAIR | {"prompt": "说"}, PAIR)).encode()
    sources = {
        "a.jsonl": whole,
        "a.json": b"[" + b",\n".join(whole.splitlines()) + b"]",
        "a.csv": b'prompt,chosen,rejected\n"a ""b""\nc",d,e\nf,g,h\n',
        "a.jsonl.gz": gzip.compress(whole),
    }
    outcomes = {"read": 0, "refused": 0}
    for turn in range(1000):
        name, content = chance.choice(list(sources.items()))
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(damaged))
            match chance.randrange(4):
                case 0:
                    damaged[at] = chance.randrange(256)
                case 1:
                    del damaged[at : at + chance.randint(1, 20)]
                case 2:
                    damaged[at:at] = chance.randbytes(3)
                case 3:
                    damaged[at:at] = damaged[at : at + 12]
            damaged = damaged or bytearray(b"x")
        path = tmp_path / f"{turn}-{name}"
        path.write_bytes(damaged)
        try:
            read_groups(path, lenient=True)
            outcomes["read"] += 1
        except DataError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100
