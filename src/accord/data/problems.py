"""What is wrong with one row: where, which field, what was found, what was expected, and the fix."""

from __future__ import annotations

import json
from dataclasses import dataclass

from accord.records import Origin

__all__ = ["Problem", "UnusableRow", "describe"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One row that cannot be used. Prints as `file:line: field: found ..., expected .... fix`."""

    origin: Origin
    field: str
    found: str
    expected: str
    fix: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.field}: found {self.found}; expected {self.expected}. {self.fix}"


class UnusableRow(Exception):
    """Raised by the code that reads one row; the reading loop, which knows the line, turns it into a `Problem`.

    It never leaves `accord.data`: users see Problems, or a DataError that lists them.
    """

    def __init__(self, field: str, found: str, expected: str, fix: str) -> None:
        super().__init__(field, found, expected, fix)
        self.field, self.found, self.expected, self.fix = field, found, expected, fix

    def at(self, origin: Origin) -> Problem:
        return Problem(origin, self.field, self.found, self.expected, self.fix)


def describe(value: object) -> str:
    """A value in a few words, safe to print: ASCII-escaped so that control characters cannot move the cursor."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        if not value.strip():
            return "empty text" if not value else "only white space"
        return "the text " + json.dumps(
            value if len(value) <= 60 else value[:60] + "...", ensure_ascii=not _printable(value)
        )
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object with " + (", ".join(map(str, list(value)[:6])) or "no fields")
    return repr(value)[:60]


def _printable(text: str) -> bool:
    return all(char.isprintable() or char in "\n\t" for char in text[:60])
