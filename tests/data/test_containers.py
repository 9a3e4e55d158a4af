"""Containers: the same rows from every kind of file, lines counted right, damaged files refused with one sentence."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_support import write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.data import json_stream
from accord.data.containers import open_container
from accord.data.read import read_groups, scan
from accord.errors import DataError

ROWS = [{"prompt": "Name a prime.", "completion": "7"}, {"prompt": "说一个质数。", "completion": "七,\n或者\t十一"}]


def _json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, ensure_ascii=False, indent=2), encoding="utf-8")


def _separated(separator: str):
    def write(path: Path) -> None:
        quoted = [separator.join('"' + row[name] + '"' for name in row) for row in ROWS]
        path.write_text(
            "\r\n".join(["prompt" + separator + "completion", *quoted]) + "\r\n", encoding="utf-8", newline=""
        )

    return write


WRITERS = {
    "rows.json": _json,
    "rows.jsonl": lambda path: write_lines(path, *ROWS),
    "lines-named.json": lambda path: write_lines(path, *ROWS),
    "array-named.jsonl": _json,
    "spread.json": lambda path: path.write_text("\n".join(json.dumps(row, indent=1) for row in ROWS)),
    "json-named.csv": _json,
    "rows.csv": _separated(","),
    "semicolons.csv": _separated(";"),
    "rows.tsv": _separated("\t"),
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "no-suffix": lambda path: write_lines(path, *ROWS),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("compressed", ["plain", "gz", "gz without its name", "named gz but plain"])
def test_every_container_gives_the_same_groups(tmp_path: Path, name: str, compressed: str) -> None:
    path = tmp_path / (name + ".gz" if compressed in ("gz", "named gz but plain") else name)
    WRITERS[name](path)
    if compressed.startswith("gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    result = read_groups(path)
    said = [(g.prompt[0].content, g.completions[0].text) for g in result.groups]
    assert said == [tuple(row.values()) for row in ROWS]
    assert bool([note for note in result.notes if "compressed" in note or "gzip" in note]) == compressed.startswith(
        ("gz without", "named")
    )


def test_a_folder_gives_its_parts_in_name_order_and_names_what_it_does_not_read(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write_lines(tmp_path / "deep" / "part-1.jsonl", {"prompt": "b"})
    (tmp_path / "a.csv").write_text("prompt\na\n")
    (tmp_path / "README.md").write_text("# about")
    (tmp_path / ".hidden.jsonl").write_text("never read")
    result = read_groups(tmp_path)
    assert [g.prompt[0].content for g in result.groups] == ["a", "b"]
    assert any("README.md" in note for note in result.notes)
    assert [Path(g.origin.file).name for g in result.groups if g.origin] == ["a.csv", "part-1.jsonl"]


def test_a_folder_of_two_formats_is_refused_and_both_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", {"prompt": "a"})
    write_lines(tmp_path / "b.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(DataError, match=r"b\.jsonl: the format is pairs, but .*a\.jsonl in the same folder is prompts"):
        read_groups(tmp_path)


def test_unicode_line_separators_inside_json_strings_do_not_split_rows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "one\u2028two\u0085three"}, {"prompt": "four"})
    assert [g.prompt[0].content for g in read_groups(path).groups] == ["one\u2028two\u0085three", "four"]


def test_lines_are_those_of_the_rows_starts(tmp_path: Path) -> None:
    array = tmp_path / "a.json"
    array.write_text('\n[\n {"prompt":\n "a"}\n,\n\n {"prompt": "b"}, {"prompt": "c"}]\n')
    assert [g.origin.line for g in read_groups(array).groups if g.origin] == [3, 7, 7]
    lines = write_lines(tmp_path / "b.jsonl", '{"prompt": "a"}', "", '{"prompt": "b"}')
    assert [g.origin.line for g in read_groups(lines).groups if g.origin] == [1, 3]
    table = tmp_path / "c.csv"
    table.write_text('prompt,note\n"a\nb",x\nc,y\n')
    assert [g.origin.line for g in read_groups(table).groups if g.origin] == [2, 4]


@settings(derandomize=True, max_examples=50, deadline=None)
@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=6,
    ),
    st.sampled_from([1, 2, 7]),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_streamed_arrays_hold_what_json_loads_finds(tmp_path_factory, values, chunk, indent, ascii) -> None:
    """The oracle is json.loads of the whole text; the stream sees it in pieces of a few bytes, cut anywhere."""
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_bytes(json.dumps(values, indent=indent, ensure_ascii=ascii).encode("utf-8", "surrogatepass"))
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    original, json_stream.CHUNK_BYTES = json_stream.CHUNK_BYTES, chunk
    try:
        with path.open("rb") as stream:
            read = [value for _, value, _ in json_stream.json_values(path, stream, 1 << 20)]
    finally:
        json_stream.CHUNK_BYTES = original
    assert json.dumps(read) == json.dumps(values)


@pytest.mark.parametrize("number", ["0.5", "1e5", "-1E+22"])
def test_a_number_may_be_cut_anywhere_between_two_pieces(
    tmp_path: Path, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 1)
    path = tmp_path / "a.json"
    path.write_text(f"[{number}, {number}]")
    with path.open("rb") as stream:
        assert [value for _, value, _ in json_stream.json_values(path, stream, 1 << 20)] == [float(number)] * 2


@pytest.mark.parametrize("name", ["big.json", "big.jsonl", "big.csv"])
def test_memory_is_bounded_by_the_row_and_not_by_the_file(tmp_path: Path, name: str) -> None:
    row = json.dumps({"prompt": "word " * 2000})
    path = tmp_path / name
    with path.open("w") as file:
        if name == "big.csv":
            file.write("prompt\n" + ("word " * 2000 + "\n") * 1200)
        else:
            file.write("[" * (name == "big.json") + (row + ("," if name == "big.json" else "") + "\n") * 1199 + row)
            file.write("]" if name == "big.json" else "\n")
    assert path.stat().st_size > 11e6
    tracemalloc.start()
    try:
        assert sum(1 for _ in scan(path)) == 1200
        assert tracemalloc.get_traced_memory()[1] < 3e6
    finally:
        tracemalloc.stop()


REFUSED = {
    "a web page": ("a.jsonl", b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    "a web page as text": ("a.txt", b"\n<html><head></head></html>", "web page"),
    "markup": ("a.json", b'<?xml version="1.0"?><View/>', "XML"),
    "a Git LFS pointer": (
        "a.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "git lfs pull",
    ),
    "an empty file": ("a.jsonl", b"", "is empty"),
    "white space": ("a.json", b" \n\n", "is empty"),
    "only a mark": ("a.json", b"\xef\xbb\xbf", "is empty"),
    "a cut gzip stream": ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 5000)[:-20], "cut off or damaged"),
    "a damaged gzip stream": ("a.gz", b"\x1f\x8b\x08\x00" + b"\x55" * 40, "cut off or damaged"),
    "UTF-16 with a mark": ("a.csv", "prompt\nhello there\n".encode("utf-16"), "UTF-16"),
    "UTF-16 without a mark": ("a.jsonl", '{"prompt": "hello there"}\n'.encode("utf-16-le"), "UTF-16"),
    "UTF-32": ("a.json", "[{}]".encode("utf-32"), "UTF-32"),
    "GB18030": ("a.jsonl", '{"prompt": "说一个质数"}\n{"prompt": "再说一个"}\n'.encode("gb18030"), "GB18030"),
    "a zip archive": ("a.csv", b"PK\x03\x04rest", "zip archive"),
    "zstandard": ("a.jsonl.zst", b"\x28\xb5\x2f\xfdrest", "zstd -d"),
    "a broken Parquet file": ("a.parquet", b"PAR1 nothing of the kind PAR1", "Parquet file is damaged"),
    "an unknown kind": ("a.md", b"# Title\n", "cannot tell what this holds"),
    "a cut array": ("a.json", b'[{"prompt": "a"},\n{"prompt": "b"}', r"a\.json:2: the JSON array ends without"),
    "an array cut in a row": ("a.json", b'[{"prompt": "a"},\n{"prompt": "b', r"a\.json:2: the file is cut off"),
    "a broken array": (
        "a.json",
        b'[{"prompt": "a"},\n{"prompt" "b"}, 1111111111111111111]',
        r"a\.json:2: invalid JSON",
    ),
    "a broken end": ("a.json", b'[{"prompt": oops}]', "invalid JSON"),
    "a missing comma": ("a.json", b'[{"prompt": "a"}\n{"prompt": "b"}]', r"a\.json:2: .*comma"),
    "text after the array": ("a.json", b'[{"prompt": "a"}]\n[]', r"a\.json:2: there is more text"),
    "an empty array": ("a.json", b"[]", "no rows"),
    "a deep array": ("a.json", b"[" * 100_000, "too deep"),
    "a header alone": ("a.csv", b"prompt,completion\n", "no rows"),
    "two columns of one name": ("a.csv", b"prompt,prompt\na,b\n", "column names"),
    "an open quote": ("a.csv", b'prompt,b\n"a,b\nc,d\n', "not valid CSV"),
    "NUL bytes in a table": ("a.csv", b"prompt,b\na\x00,b\n", r"a\.csv:2: .*NUL"),
    "bad bytes late in a text": ("a.txt", b"a fine line\n" * 6000 + b"caf\xe9\n", r"a\.txt:6001: byte 0xe9"),
    "bad bytes late in an array": (
        "a.json",
        b'[{"prompt": "\xc3\xa9"},\n{"prompt": "\xe9"}]',
        r"a\.json:2: the text is not UTF-8",
    ),
    "numbers": ("a.json", b"[1, 2]", "no objects with named fields"),
    "all rows broken": ("a.jsonl", b"oops\nno\n", r"none of the first 2 rows can be parsed.*a\.jsonl:1: row"),
    "other columns": ("a.jsonl", b'{"first": 1, "second": 2}\n', "columns are: first, second.*--map"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_not_what_it_claims_gets_one_clear_sentence(tmp_path: Path, case: str) -> None:
    name, content, message = REFUSED[case]
    path = tmp_path / name
    path.write_bytes(content)
    for lenient in (False, True):
        with pytest.raises(DataError, match=message) as error:
            read_groups(path, lenient=lenient)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


CHINESE = {
    "short": '{"prompt":"你好","completion":"世界"}',
    "two characters": '{"prompt": "你好"}\n',
    "lines": '{"prompt": "说一个质数"}\n{"prompt": "再说一个"}\n',
    "one line among ASCII": '{"prompt": "hi"}\n{"prompt": "你好"}\n{"prompt": "ok"}\n',
    "array": '[{"prompt": "请问，这是什么？", "completion": "这是一本书。"}]',
}
TAIWANESE = {
    "short": '{"prompt":"你好","completion":"世界"}',
    "lines": '{"prompt": "請說一個質數"}\n{"prompt": "這是什麼？"}\n',
    "array": '[{"prompt": "我們現在要做什麼，你知道嗎？", "completion": "不知道。"}]',
}


@pytest.mark.parametrize(
    ("text", "codec", "name"),
    [(text, "gbk", "GB18030") for text in CHINESE.values()] + [(text, "big5", "BIG5") for text in TAIWANESE.values()],
)
def test_chinese_in_its_own_encodings_is_recognised_in_short_files(
    tmp_path: Path, text: str, codec: str, name: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(text.encode(codec))
    with pytest.raises(DataError, match=f"probably {name} .*iconv -f {name} -t UTF-8 a.jsonl"):
        read_groups(path)


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ("prompt\ncafé crème\ndéjà vu\n".encode("latin-1"), "2: byte 0xe9 at column 4"),
        ('{"prompt": "Äpfel und Öl für Ärzte"}'.encode("latin-1"), "1: byte 0xc4 at column 13"),
        ('{"prompt": "안녕하세요 세계"}'.encode("euc-kr"), "1: byte 0xbe at column 13"),
        ('{"prompt": "素数を一つ言ってください"}'.encode("euc-jp"), "1: byte 0xc1 at column 13"),
        ('{"prompt": "素数を一つ言ってください"}'.encode("shift-jis"), "1: byte 0x91 at column 13"),
        ('{"prompt": "Привет, как дела"}'.encode("cp1251"), "1: byte 0xcf at column 13"),
        ('{"prompt": "Привет, как дела"}'.encode("koi8-r"), "1: byte 0xf0 at column 13"),
        (bytes(range(1, 256)), "2: byte 0x80 at column 118"),
        (random.Random(0).randbytes(4000), r"\d+: byte 0x.. at column \d+"),
    ],
)
def test_other_bytes_are_said_not_to_be_utf8_and_where_and_nothing_is_guessed(
    tmp_path: Path, content: bytes, where: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.jsonl:{where} is not UTF-8") as error:
        read_groups(path)
    assert "probably" not in str(error.value) and "iconv" not in str(error.value)


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "preferences.jsonl", {"prompt": "a"})
    with pytest.raises(DataError, match=r"no such file\. Did you mean .*preferences\.jsonl\?"):
        read_groups(tmp_path / "preference.jsonl")


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data files"):
        read_groups(tmp_path)


def test_a_row_larger_than_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accord.data.containers.MAX_ROW_BYTES", 1 << 20)
    for name, content in (
        ("a.jsonl", '{"prompt": "' + "a" * (1 << 20) + '"}'),
        ("a.json", '[{"prompt": "' + "a" * (3 << 20) + '"}]'),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=r"(longer|larger) than 1 MiB"):
            read_groups(tmp_path / name)


def test_a_container_can_be_read_twice(tmp_path: Path) -> None:
    container = open_container(write_lines(tmp_path / "a.jsonl", {"prompt": "a"}))
    counted: list[int] = []
    assert list(container.rows(counted.append)) == list(container.rows(counted.append)) != []
    assert sum(counted) == 2 * container.path.stat().st_size
