"""Rows out of files: JSON, JSON Lines, CSV, TSV, Parquet, text, each also gzipped, and folders of such parts.

A file is read for what it holds, not for what it is called, in bounded memory. A line that cannot be parsed is a
problem of that row; a file that is not what it claims to be (a web page, a Git LFS pointer, another encoding, a cut
stream) is refused with one `DataError`. What the rows mean is decided elsewhere (`accord.data.formats`).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO

from accord.data.encodings import refuse_other_encodings
from accord.data.json_stream import JsonReader, json_values
from accord.data.problems import UnusableRow
from accord.errors import DataError
from accord.records import Origin

__all__ = ["Container", "RawRow", "open_container", "parts_of"]

DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
MAX_ROW_BYTES = 64 << 20  # one row larger than this is a mistake, and would make memory unbounded
HEAD_BYTES = 1 << 16
BUFFER_BYTES = 1 << 17

Count = Callable[[int], None]
"""Told how many bytes of the file, as it lies on the disk, were read."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as the container gives it: a JSON value (usually an object), or why it could not be parsed."""

    origin: Origin
    value: object
    problem: UnusableRow | None = None


@dataclass(frozen=True, slots=True)
class Container:
    """A file whose kind is known. `rows` may be called more than once; each call reads the file again and tells its
    argument of the bytes that it reads."""

    path: Path
    kind: str  # "JSON", "JSON Lines", "CSV", "TSV", "Parquet", "text"
    notes: tuple[str, ...]
    rows: Callable[[Count], Iterator[RawRow]]


def parts_of(path: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The data files behind `path` (itself, or a folder's parts by name) and notes on what else a folder holds."""
    if path.is_file():
        return (path,), ()
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, siblings, n=1)
        raise DataError(f"{path}: there is no such file." + (f" Did you mean {path.parent / near[0]}?" if near else ""))
    if not path.is_dir():
        kind = "pipe" if path.is_fifo() else "socket" if path.is_socket() else "device"
        raise DataError(
            f"{path}: this is a {kind}, not a file or folder. Data is read more than once: save it to a file."
        )
    visible = sorted(
        p
        for p in path.rglob("*")
        if p.is_file() and not any(part.startswith((".", "_")) for part in p.relative_to(path).parts)
    )
    data = tuple(p for p in visible if p.name.removesuffix(".gz").endswith(DATA_SUFFIXES))
    if not data:
        raise DataError(f"{path}: the folder holds no data files ({', '.join(DATA_SUFFIXES)}, each also with .gz).")
    other = [str(p.relative_to(path)) for p in visible if p not in set(data)]
    return data, (f"not data files, not read: {', '.join(other[:5])}" + ", ..." * (len(other) > 5),) if other else ()


def open_container(path: Path) -> Container:
    """Find out what a file holds from its first bytes (its name only breaks ties) and return a reader for it."""
    with _refusing_damage(path), _open(path) as (stream, compressed):
        head = stream.read(HEAD_BYTES)
    _refuse_what_is_not_data(path, head)
    notes = []
    if compressed != (path.suffix == ".gz"):
        notes.append(
            "gzip data under a name without .gz" if compressed else "named .gz but not compressed; read as it is"
        )
    if head.startswith(b"\xef\xbb\xbf"):
        notes.append("a byte order mark at the start is ignored")
    kind = _kind(path, head)
    if kind.startswith("JSON") and _suffix(path) not in {".json", ".jsonl", ".ndjson"}:
        notes.append(f"holds {kind} whatever its name says")

    def rows(count: Count) -> Iterator[RawRow]:
        with _refusing_damage(path), _open(path, count) as (stream, _):
            yield from _READERS[kind](path, stream)

    return Container(path, kind, tuple(notes), rows)


# --- opening ---------------------------------------------------------------------------------------------------------


class _CountedFile(io.FileIO):
    """A file that says how many bytes were read from it."""

    def __init__(self, path: Path, count: Count | None) -> None:
        super().__init__(path)
        self._count = count

    def readinto(self, buffer: object, /) -> int:
        number = super().readinto(buffer)  # type: ignore[arg-type]
        if self._count is not None:
            self._count(number)
        return number


@contextmanager
def _open(path: Path, count: Count | None = None) -> Iterator[tuple[BinaryIO, bool]]:
    """The file's bytes, unpacked if they are compressed, and whether they are."""
    with io.BufferedReader(_CountedFile(path, count), BUFFER_BYTES) as packed:
        if packed.peek(2)[:2] != b"\x1f\x8b":
            yield packed, False
        else:
            # Its own readline is written in Python; that of a buffer before it is not.
            with io.BufferedReader(gzip.GzipFile(fileobj=packed), BUFFER_BYTES) as stream:  # type: ignore[arg-type]
                yield stream, True


class _refusing_damage:
    """Turns the errors of reading bytes into one sentence about the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
            raise DataError(
                f"{self.path}: the gzip stream is cut off or damaged ({error}). Copy or download the file again."
            ) from error
        if isinstance(error, OSError):
            raise DataError(f"{self.path}: cannot be read ({error.strerror or error}).") from error


# --- what kind of file -----------------------------------------------------------------------------------------------

_BINARY = (
    (b"PK\x03\x04", "a zip archive (or an .xlsx or .pt file)", "Unpack it, or export it as CSV or JSON Lines."),
    (b"\x28\xb5\x2f\xfd", "zstandard-compressed", "Decompress it first: zstd -d FILE."),
    (b"\xfd7zXZ", "xz-compressed", "Decompress it first: xz -d FILE."),
    (b"BZh", "bzip2-compressed", "Decompress it first: bunzip2 FILE."),
    (b"ARROW1", "an Arrow file", "Export it as Parquet or JSON Lines."),
    (b"SQLite format 3", "an SQLite database", "Export the table as CSV or JSON Lines."),
    (b"%PDF", "a PDF document", "Give the data as JSON Lines, CSV or Parquet."),
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the data", "Fetch the data: git lfs pull."),
)


def _refuse_what_is_not_data(path: Path, head: bytes) -> None:
    for magic, name, fix in _BINARY:
        if head.startswith(magic):
            raise DataError(f"{path}: this is {name}. {fix}")
    if head.startswith(b"PAR1"):
        return
    start = head[:4096].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        raise DataError(
            f"{path}: this is a web page (HTML), not data. Download the raw file, not the page that shows it."
        )
    if start.startswith(b"<") and not path.name.removesuffix(".gz").endswith(".txt"):
        raise DataError(
            f"{path}: this is XML or other markup, not data. Expected JSON, JSON Lines, CSV, Parquet or text."
        )
    refuse_other_encodings(path, head, whole=len(head) < HEAD_BYTES)
    if not start:
        raise DataError(
            f"{path}: the file is empty ({len(head)} bytes of white space)." if head else f"{path}: the file is empty."
        )


def _kind(path: Path, head: bytes) -> str:
    if head.startswith(b"PAR1"):
        return "Parquet"
    suffix = _suffix(path)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    first_line = text.split(b"\n", 1)[0].strip()
    json_object = first_line.startswith(b"{") and _is_json(first_line)
    table = {".csv": "CSV", ".tsv": "TSV", ".txt": "text"}.get(suffix)
    if table and not json_object and (table == "text" or not text.startswith((b"{", b"[{", b"[\n"))):
        return table
    if text.startswith(b"[") or first_line == b"{":
        return "JSON"
    # Under a JSON Lines name a broken first line is a broken row, not another kind of file.
    if json_object or suffix in {".jsonl", ".ndjson"} or (suffix != ".json" and first_line.endswith(b"}")):
        return "JSON Lines"
    if suffix == ".json" or text.startswith(b"{"):
        return "JSON"
    raise DataError(
        f"{path}: cannot tell what this holds from its name ({suffix or 'no suffix'}) or its first bytes. Expected "
        "JSON, JSON Lines, CSV, TSV, Parquet or text; rename it to .txt to take each line as a prompt."
    )


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


# --- readers ---------------------------------------------------------------------------------------------------------


def _lines(path: Path, stream: BinaryIO) -> Iterator[tuple[Origin, bytes]]:
    """Lines end at a line feed only: U+2028 and friends are ordinary characters inside JSON strings."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise DataError(
                f"{path}:{number}: the line is longer than {MAX_ROW_BYTES >> 20} MiB. Expected one row per line."
            )
        yield Origin(str(path), number), line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _json_lines(path: Path, stream: BinaryIO) -> Iterator[RawRow]:
    reader = JsonReader()
    for origin, line in _lines(path, stream):
        if not line.strip():
            continue
        try:
            yield RawRow(origin, reader.parse(line))
        except UnusableRow as error:
            yield RawRow(origin, None, error)


def _json(path: Path, stream: BinaryIO) -> Iterator[RawRow]:
    for line, value, problem in json_values(path, stream, MAX_ROW_BYTES):
        yield RawRow(Origin(str(path), line), value, problem)


def _decoded_lines(path: Path, stream: BinaryIO) -> Iterator[tuple[Origin, str]]:
    for origin, line in _lines(path, stream):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{origin}: byte {line[error.start]:#x} is not UTF-8. Convert the file to UTF-8."
            ) from error
        if "\0" in text:
            raise DataError(f"{origin}: there is a NUL byte, so this is binary data or a damaged file. Expected text.")
        yield origin, text


def _text(path: Path, stream: BinaryIO) -> Iterator[RawRow]:
    for origin, line in _decoded_lines(path, stream):
        if line.strip():
            yield RawRow(origin, {"line": line.rstrip("\r\n")})


def _csv(path: Path, stream: BinaryIO) -> Iterator[RawRow]:
    yield from _separated(path, stream, ",;\t")


def _tsv(path: Path, stream: BinaryIO) -> Iterator[RawRow]:
    yield from _separated(path, stream, "\t")


def _separated(path: Path, stream: BinaryIO, delimiters: str) -> Iterator[RawRow]:
    csv.field_size_limit(MAX_ROW_BYTES)  # the module's default of 128 KiB would refuse long documents
    lines = (line for _, line in _decoded_lines(path, stream))
    first = next(lines)
    delimiter = max(delimiters, key=first.count)
    reader = csv.reader(_chain(first, lines), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader)]
        if len(set(header)) < len(header) or "" in header:
            raise DataError(f"{path}:1: column names must be there and differ, found {header}. Add a header line.")
        start = reader.line_num
        for cells in reader:
            origin, start = Origin(str(path), start + 1), reader.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                fix = "Quote cells that hold the separator or line breaks."
                found, expected = f"{len(cells)} cells", f"{len(header)}, one per column"
                yield RawRow(origin, None, UnusableRow("row", found, expected, fix))
            else:
                yield RawRow(origin, {name: cell or None for name, cell in zip(header, cells, strict=True)})
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: not valid CSV ({error}). Quote cells with double quotes, doubled inside."
        ) from error


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _parquet(path: Path, stream: BinaryIO) -> Iterator[RawRow]:
    import pyarrow as pa  # heavy, and only this reader needs it
    import pyarrow.parquet as pq

    try:
        # Without a buffer of its own it would hold whole columns of a row group, often a million rows.
        file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=BUFFER_BYTES)
        number = 0
        for batch in file.iter_batches(batch_size=256, use_threads=False):
            for value in batch.to_pylist():
                number += 1
                yield RawRow(Origin(str(path), number), value)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: the Parquet file is damaged ({str(error).splitlines()[0]}). Copy it again."
        ) from error


_READERS: dict[str, Callable[[Path, BinaryIO], Iterator[RawRow]]] = {
    "JSON": _json,
    "JSON Lines": _json_lines,
    "CSV": _csv,
    "TSV": _tsv,
    "Parquet": _parquet,
    "text": _text,
}
