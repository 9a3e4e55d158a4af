"""JSON with the checks training data needs (repeated keys, sane errors), from one line or a stream."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from accord.data.problems import UnusableRow, plain
from accord.errors import DataError

__all__ = ["JsonReader", "json_values"]

CHUNK_BYTES = 1 << 18
_SPACE = " \t\r\n"
_NEAR_END = 16  # a literal or escape cut at the buffer's end is reported at most this far from it


class JsonReader:
    """Parses one JSON value at a time and remembers whether an object in it repeated a key."""

    def __init__(self) -> None:
        self._repeated: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        built = dict(pairs)
        if len(built) < len(pairs):
            keys = [key for key, _ in pairs]
            self._repeated = next(key for key in keys if keys.count(key) > 1)
        return built

    def raw_decode(self, text: str, start: int) -> tuple[object, int, UnusableRow | None]:
        """The value at `start`, where it ends, and its problem if an object in it repeats a key.

        Raises json.JSONDecodeError when there is no complete value, RecursionError or ValueError when it is absurd.
        """
        self._repeated = None
        value, end = self._decoder.raw_decode(text, start)
        if self._repeated is None:
            return value, end, None
        return (
            None,
            end,
            UnusableRow(plain(self._repeated), "the field twice", "once", "Delete or rename one of the two."),
        )

    def parse(self, line: bytes) -> object:
        """One line that holds exactly one JSON value. Raises UnusableRow."""
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise UnusableRow(
                "row", f"byte {line[error.start]:#x} at column {error.start + 1}", "UTF-8", "Convert the line to UTF-8."
            ) from error
        text = text.strip(_SPACE)
        try:
            value, end, problem = self.raw_decode(text, 0)
        except json.JSONDecodeError as error:
            raise _not_json(error, cut=not line.endswith(b"\n")) from error
        except (RecursionError, ValueError) as error:
            raise _absurd(error) from error
        if problem:
            raise problem
        if end < len(text):
            raise UnusableRow("row", f"more text after column {end}", "one JSON object per line", "Split the line.")
        return value


def _not_json(error: json.JSONDecodeError, *, cut: bool) -> UnusableRow:
    found = f"invalid JSON at column {error.colno} ({error.msg})"
    if "\0" in error.doc:
        found = "NUL bytes (a damaged file)"
    elif cut and error.pos <= len(error.doc) and (error.msg.startswith("Unterminated") or error.pos == len(error.doc)):
        found = "a last line that is cut off"
    return UnusableRow("row", found, "one complete JSON object per line", "Repair or delete the line.")


def _absurd(error: Exception) -> UnusableRow:
    found = (
        "nesting too deep to parse" if isinstance(error, RecursionError) else f"a value that cannot be read ({error})"
    )
    return UnusableRow("row", found, "a plain row", "Repair or delete the row.")


def json_values(path: Path, stream: BinaryIO, max_bytes: int) -> Iterator[tuple[int, object, UnusableRow | None]]:
    """(line, value, problem) for each element of a top-level array, or for each of several values in a row.

    Memory is bounded by the largest element: the buffer grows (doubling, so that time stays linear) only while one
    element is incomplete. After a syntax error nothing further can be trusted, so it refuses the file.
    """
    reader, buffer = JsonReader(), _Buffer(path, stream)
    in_array = buffer.skip(_SPACE) == "["
    if in_array:
        buffer.position += 1
    while (char := buffer.skip(_SPACE)) and not (in_array and char == "]"):
        yield _next_value(reader, buffer, max_bytes)
        if in_array and buffer.skip(_SPACE) == ",":
            buffer.position += 1
        elif in_array and buffer.skip(_SPACE) not in ("]", ""):
            raise DataError(
                f"{path}:{buffer.line}: invalid JSON: expected a comma or ] after the row. Repair the file."
            )
    if in_array and not char:
        raise DataError(
            f"{path}:{buffer.line}: the JSON array ends without its closing ]: the file is cut off. Copy it again."
        )
    if in_array:
        buffer.position += 1
        if buffer.skip(_SPACE):
            raise DataError(
                f"{path}:{buffer.line}: there is more text after the end of the JSON array. Repair the file."
            )


class _Buffer:
    """Decoded text from `position` on, with the line it is at."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self.stream = path, stream
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.text, self.position, self.ended = "", 0, False
        self._line, self._counted = 1, 0

    @property
    def line(self) -> int:
        self._line += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def skip(self, characters: str) -> str:
        """Move past `characters` and return the next one, "" at the end of the file."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in characters:
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.grow():
                return ""

    def grow(self) -> bool:
        """Read as much again as is waiting; False when there was nothing left."""
        start = self.line
        waiting = self.text[self.position :]
        chunk = self.stream.read(max(CHUNK_BYTES, len(waiting)))
        try:
            added = self.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line = start + waiting.count("\n") + chunk[: error.start].count(b"\n")
            raise DataError(f"{self.path}:{line}: the text is not UTF-8 here. Convert the file to UTF-8.") from error
        self.ended = not chunk
        self.text, self.position, self._counted = waiting + added, 0, 0
        return not self.ended


def _next_value(reader: JsonReader, buffer: _Buffer, max_bytes: int) -> tuple[int, object, UnusableRow | None]:
    line = buffer.line
    while True:
        try:
            value, end, problem = reader.raw_decode(buffer.text, buffer.position)
        except json.JSONDecodeError as error:
            incomplete = error.msg.startswith("Unterminated") or error.pos >= len(buffer.text) - _NEAR_END
            if len(buffer.text) - buffer.position > max_bytes:
                raise DataError(
                    f"{buffer.path}:{line}: one row is larger than {max_bytes >> 20} MiB, or a quote is never closed."
                ) from error
            if incomplete and not buffer.ended:
                buffer.grow()
                continue
            at = line + buffer.text.count("\n", buffer.position, error.pos)
            cut = error.msg.startswith("Unterminated") or error.pos >= len(buffer.text.rstrip())
            what = "the file is cut off in the middle of a row" if cut else f"invalid JSON ({error.msg})"
            raise DataError(f"{buffer.path}:{at}: {what}; nothing after it can be read. Repair the file.") from error
        except (RecursionError, ValueError) as error:
            raise DataError(f"{buffer.path}:{line}: {_absurd(error).found}. Repair the row.") from error
        if end + len("e+") >= len(buffer.text) and not buffer.ended and not isinstance(value, dict | list | str):
            buffer.grow()  # a number at the buffer's end may go on: 1 of "1." or "1e+" is a whole number
            continue
        buffer.position = end
        return line, value, problem
