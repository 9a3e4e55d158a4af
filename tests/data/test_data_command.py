"""`accord data`: what it prints, what it returns, and what it never imports."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_support import write_lines

from accord.cli.data import add_parser
from accord.data.formats import FORMATS
from accord.data.read import read_groups
from accord.errors import AccordError, ConfigError, DataError

PAIR = {"prompt": "Name a prime.", "chosen": "7", "rejected": "8"}
BAD = PAIR | {"chosen": ""}


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["data", *map(str, arguments)])
    return args.run(args)


def test_check_prints_one_json_object_per_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_lines(tmp_path / "good.jsonl", PAIR)
    bad = write_lines(tmp_path / "bad.jsonl", PAIR, BAD)
    page = tmp_path / "page.jsonl"
    page.write_text("<html></html>")
    assert command("check", good, bad, page, "--json") == 2
    first, second, third = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {
        "file": str(good),
        "format": "pairs",
        "rows": 1,
        "usable": 1,
        "problem_count": 0,
        "problems": [],
        "notes": [],
    }
    assert (second["rows"], second["usable"], second["problem_count"]) == (2, 1, 1)
    (problem,) = second["problems"]
    assert problem == {
        "line": 2,
        "field": "chosen",
        "found": "empty text",
        "expected": "text",
        "fix": "Fill it in or delete the row.",
    }
    assert third["format"] is None and "web page" in third["message"] and third["usable"] == 0


def test_check_returns_zero_when_all_rows_are_usable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("check", write_lines(tmp_path / "a.jsonl", PAIR)) == 0
    assert "format pairs" in capsys.readouterr().out


def test_check_says_the_format_and_the_lines_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "a.jsonl", PAIR, *[BAD] * 30)
    assert command("check", path) == 2
    said = capsys.readouterr().out
    assert "31 rows, 30 not usable" in said and f"{path}:2: chosen: found empty text" in said and "10 more rows" in said


def test_check_reads_each_part_of_a_folder_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "a.jsonl", PAIR)
    write_lines(tmp_path / "b.jsonl", {"prompt": "x"})
    assert command("check", tmp_path, "--json") == 0
    assert [json.loads(line)["format"] for line in capsys.readouterr().out.splitlines()] == ["pairs", "prompts"]


def test_a_file_damaged_in_the_middle_reports_what_was_read_and_why_it_stopped(tmp_path: Path, capsys) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" + "\n".join(json.dumps(PAIR) + "," for _ in range(40)) + '{"prompt": oops}]')
    assert command("check", path, "--json") == 2
    row = json.loads(capsys.readouterr().out)
    assert row["rows"] == 40 and "a.json:40: invalid JSON" in row["message"]


def test_check_takes_a_mapping_and_a_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"data": {"q": "x", "a": "y"}})
    assert command("check", path) == 2
    assert command("check", path, "--map", "prompt=data.q", "--map", "completion=data.a") == 0
    assert command("check", path, "--map", "prompt=data.q", "--format", "prompts") == 0
    assert "format prompt-completion" in (out := capsys.readouterr().out) and "format prompts" in out
    with pytest.raises(ConfigError, match="expected FIELD=PATH"):
        command("check", path, "--map", "prompt")


def test_convert_writes_a_file_that_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "a.jsonl", PAIR, PAIR | {"chosen": "11"})
    out = tmp_path / "out.jsonl"
    assert command("convert", path, out, "--to", "sft") == 0
    assert [g.completions[0].text for g in read_groups(out).groups] == ["7", "11"]
    assert "out.jsonl: 2 sft groups" in capsys.readouterr().out


def test_convert_stops_on_bad_rows_unless_lenient(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write_lines(tmp_path / "a.jsonl", PAIR, BAD), tmp_path / "out.jsonl"
    with pytest.raises(DataError, match="1 of 2 rows cannot be used"):
        command("convert", path, out, "--to", "pairs")
    assert not out.exists()
    assert command("convert", path, out, "--to", "pairs", "--lenient") == 0
    assert "1 rows that cannot be used" in capsys.readouterr().err and len(read_groups(out).groups) == 1


def test_convert_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "x", "output_1": "a", "output_2": "b", "preference": 1}
    path = write_lines(tmp_path / "a.jsonl", row, row | {"preference": 0})
    assert command("convert", path, tmp_path / "out.jsonl", "--to", "pairs") == 0
    assert "left out: 1 ties" in capsys.readouterr().err


def test_an_impossible_conversion_writes_nothing(tmp_path: Path) -> None:
    path, out = write_lines(tmp_path / "a.jsonl", {"prompt": "x"}), tmp_path / "out.jsonl"
    with pytest.raises(DataError, match="none of the data can become pairs"):
        command("convert", path, out, "--to", "pairs")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("kind", ["its input", "another file", "a folder", "a link to nothing"])
def test_convert_replaces_nothing(tmp_path: Path, kind: str) -> None:
    path, out = write_lines(tmp_path / "a.jsonl", PAIR, BAD), tmp_path / "out.jsonl"
    if kind == "its input":
        out = path
    elif kind == "another file":
        out.write_text("before")
    elif kind == "a folder":
        out.mkdir()
    else:
        out.symlink_to(tmp_path / "nothing")
    before = sorted(tmp_path.iterdir()), path.read_bytes()
    with pytest.raises(DataError, match=r"(a|out)\.jsonl: it is there already.*: give another name") as refused:
        command("convert", path, out, "--to", "prompts")
    assert refused.value.exit_code == 2 and "\n" not in str(refused.value)
    assert (sorted(tmp_path.iterdir()), path.read_bytes()) == before


def test_convert_looks_at_the_output_before_it_reads_the_input(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("before")
    with pytest.raises(DataError, match="it is there already"):
        command("convert", tmp_path / "nothing.jsonl", tmp_path / "out.jsonl", "--to", "prompts")


def test_convert_to_prompts_counts_the_later_turns_of_dialogues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [{"from": who, "value": "x"} for who in ("human", "gpt") * 3]
    path = write_lines(tmp_path / "a.jsonl", {"conversations": said}, {"conversations": said[:4]})
    assert command("convert", path, tmp_path / "out.jsonl", "--to", "prompts") == 0
    assert "left out: 3 later turns by user (a prompt ends before the first answer)" in capsys.readouterr().err


def test_advice_about_bad_rows_is_for_the_command_that_reads(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", PAIR, BAD)
    with pytest.raises(DataError, match="keep only the good rows with --lenient") as said:
        command("convert", path, tmp_path / "out.jsonl", "--to", "pairs")
    assert "data.lenient" not in str(said.value)
    with pytest.raises(DataError, match=r"keep only the good rows with --set data\.lenient=true") as said:
        read_groups(path)
    assert "--lenient" not in str(said.value)


def test_a_path_that_is_neither_file_nor_folder_is_called_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert command("check", "/dev/null", tmp_path / "pipe.jsonl") == 2
    said = capsys.readouterr().out
    assert "/dev/null: this is a device, not a file" in said and "pipe.jsonl: this is a pipe, not a file" in said
    assert "folder holds" not in said


def test_stats_prints_tables_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "a.jsonl", PAIR, PAIR, PAIR | {"chosen": "eleven"})
    assert command("stats", path) == 0
    said = capsys.readouterr().out
    assert "33.3% of the pairs prefer the longer answer" in said and "2 prompts seen before, 1 identical groups" in said
    assert command("stats", path, "--json") == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["format"], row["groups"], row["kinds"]) == ("pairs", 3, {"pairs": 3})


def test_stats_of_a_file_with_bad_rows_name_the_first_and_return_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "a.jsonl", PAIR, BAD, BAD)
    assert command("stats", path) == 2
    said = capsys.readouterr().out
    assert f"{path}:2: chosen: found empty text" in said and "1 pairs" in said and ":3:" not in said
    assert f"1 more rows (`accord data check {path}`" in " ".join(said.split())
    assert command("stats", path, "--json") == 2
    row = json.loads(capsys.readouterr().out)
    assert (row["problem_count"], row["groups"]) == (2, 1)
    assert (row["problems"][0]["line"], row["problems"][0]["field"]) == (2, "chosen")


def test_stats_of_a_file_without_usable_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AccordError, match="No row is usable"):
        command("stats", write_lines(tmp_path / "a.jsonl", BAD))


@pytest.mark.parametrize("name", ["data", "data check", "data convert", "data stats"])
def test_help_has_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args([*name.split(), "--help"])
    said = capsys.readouterr().out
    assert "accord data " in said and (name != "data check" or all(item.name in said for item in FORMATS))


def test_no_command_imports_torch_or_transformers(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", PAIR)
    program = (
        "import argparse, sys\n"
        "from accord.cli.data import add_parser\n"
        "parser = argparse.ArgumentParser()\n"
        "add_parser(parser.add_subparsers())\n"
        f"for line in (['check', {str(path)!r}], ['stats', {str(path)!r}],\n"
        f"             ['convert', {str(path)!r}, {str(tmp_path / 'o.jsonl')!r}, '--to', 'sft']):\n"
        "    args = parser.parse_args(['data', *line])\n"
        "    assert args.run(args) == 0\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
