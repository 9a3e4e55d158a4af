"""What is wrong with one row: where, which field, what was found, what was expected, and the fix."""

from __future__ import annotations

import json
from dataclasses import dataclass

from accord.records import Origin

__all__ = ["Problem", "UnusableRow", "describe", "plain"]


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
    """A value in a few words, safe to print: control characters cannot reach the terminal."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        if not value.strip():
            return "empty text" if not value else "only white space"
        shown = value if len(value) <= 60 else value[:60] + "..."
        return "the text " + json.dumps(shown, ensure_ascii=not shown.replace("\n", "").isprintable())
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object with " + (", ".join(plain(str(key)) for key in list(value)[:6]) or "no fields")
    return repr(value)[:60]


def plain(name: str) -> str:
    """A name out of a file in a form that is safe to print on a terminal."""
    shown = name if len(name) <= 60 else name[:60] + "..."
    return shown if shown.isprintable() else json.dumps(shown)[1:-1]
