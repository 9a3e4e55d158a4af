"""Files into Groups: the format is detected and named, every row that cannot be used is a `Problem` with its line.

`scan` streams in bounded memory (for checking, converting, counting); `read_groups` keeps the groups for training, in a
file if they are many.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import TypeAlias

from accord.data.containers import Container, RawRow, open_container, parts_of
from accord.data.fields import Row
from accord.data.formats import FORMATS, MAPPABLE, Format, detect_format, format_named
from accord.data.problems import Problem, UnusableRow, describe, plain
from accord.data.shelf import shelved
from accord.errors import DataError
from accord.records import Group

__all__ = ["MAX_PROBLEMS", "ReadResult", "Scan", "Watch", "left_out_notes", "read_groups", "read_row", "scan"]

MAX_PROBLEMS = 100  # how many problems are kept; all are counted
MAX_NOTES = 1000  # names of columns that are kept: a file may have other ones in every row
SHOWN_PROBLEMS = 10
SHOWN_COLUMNS = 8
DETECT_ROWS = 32


Watch: TypeAlias = "Callable[[Scan], Iterator[Group]]"


@dataclass(frozen=True, slots=True)
class ReadResult:
    """What a file held.

    rows           rows in the file; a row can give several groups (trees, several raters) or, as a problem, none
    problems       the first MAX_PROBLEMS rows that cannot be used; `problem_count` counts all
    notes          what was read but not used (columns, reasoning blocks, ...), in words
    fingerprint    sha256 of the file's bytes (of its parts' fingerprints, for a folder)
    """

    groups: Sequence[Group]
    format: str
    rows: int
    problems: tuple[Problem, ...]
    problem_count: int
    notes: tuple[str, ...]
    fingerprint: str


def read_groups(
    path: str | Path,
    *,
    format: str | None = None,
    fields: Mapping[str, str] | None = None,
    lenient: bool = False,
    watch: Watch = iter,
) -> ReadResult:
    """All groups of a file or a folder of parts.

    Args:
        format: a format's name, instead of detecting it.
        fields: target field -> dotted path in the row, for columns with names of their own (`--map field=path`).
        lenient: keep the good rows and count the bad ones, instead of refusing the file.
        watch: what the groups go through on their way, to show how far they are.
    Raises: DataError when the file cannot be read, when no row is usable, or (unless lenient) when any row is not.
    """
    scanned = scan(path, format=format, fields=fields)
    groups = shelved(watch(scanned))
    if scanned.problem_count and (not lenient or not groups):
        raise DataError(scanned.refusal(keep_good="--set data.lenient=true"))
    fingerprint = _fingerprint(scanned.parts)
    return ReadResult(
        groups,
        scanned.format,
        scanned.rows,
        tuple(scanned.problems),
        scanned.problem_count,
        scanned.notes(),
        fingerprint,
    )


def read_row(value: object, where: str, left_out: Counter[str]) -> tuple[Group, ...]:
    """The groups of one row that is in memory, in any of the formats of files; what is not used is counted.

    Raises: DataError that begins with `where` when the row has no known format, or lacks something.
    """
    try:
        row = _row(value, {}, left_out)
        found = detect_format(row)
        if found is None:
            raise DataError(f"{where}: no known format. {_columns([value])} See docs/data-formats.md.")
        groups = found.read(row)
    except UnusableRow as error:
        raise DataError(
            f"{where}: {error.field}: found {error.found}; expected {error.expected}. {error.fix}"
        ) from error
    left_out.update(f"column {name}" for name in row.unused())
    return groups


def scan(path: str | Path, *, format: str | None = None, fields: Mapping[str, str] | None = None) -> Scan:
    """Open a file or folder for streaming and detect its format; iterate the result for its groups.

    Raises: DataError when the file cannot be read or its format is unknown.
    """
    parts, notes = parts_of(Path(path))
    containers = [open_container(part) for part in parts]
    mapping = _checked_mapping(fields or {})
    samples = [_sample(part, mapping) for part in containers]
    detected = [
        format_named(format) if format else _detect(part, sample, mapping)
        for part, sample in zip(containers, samples, strict=True)
    ]
    for part, found in zip(containers, detected, strict=True):
        if found is not detected[0]:
            raise DataError(
                f"{part.path}: the format is {found.name}, but {containers[0].path} in the same folder is "
                f"{detected[0].name}. Read them separately, or force one with --format."
            )
    return Scan(Path(path), tuple(containers), detected[0], mapping, notes, forced=format is not None)


class Scan:
    """One pass over a file. The counts are complete when the iteration is."""

    def __init__(
        self,
        path: Path,
        containers: tuple[Container, ...],
        format: Format,
        mapping: Mapping[str, str],
        notes: tuple[str, ...],
        *,
        forced: bool,
    ) -> None:
        self.path, self._containers, self._format, self._mapping = path, containers, format, mapping
        self._notes, self._forced = notes, forced
        self.rows, self.usable, self.problem_count = 0, 0, 0
        self.problems: list[Problem] = []
        self.bytes_read, self.bytes_total = 0, sum(container.path.stat().st_size for container in containers)
        self._left_out: Counter[str] = Counter()
        self._left_out_of_row: Counter[str] = Counter()

    @property
    def format(self) -> str:
        return self._format.name

    @property
    def container(self) -> str:
        return self._containers[0].kind

    @property
    def description(self) -> str:
        return self._format.description

    @property
    def parts(self) -> tuple[Path, ...]:
        return tuple(container.path for container in self._containers)

    def __iter__(self) -> Iterator[Group]:
        line = 0
        for raw in chain.from_iterable(container.rows(self._count_bytes) for container in self._containers):
            self.rows += 1
            # When many rows share a line (an array written without line breaks) the line alone does not find the row.
            where, line = f"row {self.rows}, " if raw.origin.line == line else "", raw.origin.line
            try:
                groups = self._read(raw)
            except UnusableRow as error:
                self._add(replace(error.at(raw.origin), field=where + error.field))
                continue
            self.usable += 1
            for group in groups:
                yield group.at(raw.origin)

    def _count_bytes(self, count: int) -> None:
        self.bytes_read += count

    def _add(self, problem: Problem) -> None:
        self.problem_count += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    def _read(self, raw: RawRow) -> tuple[Group, ...]:
        if raw.problem is not None:
            raise raw.problem
        left_out = self._left_out_of_row
        left_out.clear()
        row = _row(raw.value, self._mapping, left_out)
        groups = self._format.read(row)
        own = None if self._forced else detect_format(row)
        if own is not None and own is not self._format:
            found = f"a row of the format {own.name}"
            fix = f"Put it in a file of its own, or force --format {self._format.name}."
            raise UnusableRow("row", found, f"{self._format.name}, as in the rest of the file", fix)
        for name, count in left_out.items():
            self._left_out[name] += count
        for name in row.unused():
            self._note_column(f"column {name}")
        return groups

    def _note_column(self, name: str) -> None:
        if name in self._left_out or len(self._left_out) < MAX_NOTES:
            self._left_out[name] += 1
        else:
            self._left_out["(columns beside those named, too many names to keep)"] += 1

    def notes(self) -> tuple[str, ...]:
        """What the file held that is not used, and oddities of the file itself."""
        files = [f"{part.path.name}: {note}" for part in self._containers for note in part.notes]
        return (*self._notes, *files, *left_out_notes(self._left_out))

    def refusal(self, *, keep_good: str | None = None) -> str:
        """The sentence (and the first problems) for an error; `keep_good` is what keeps the other rows."""
        shown = [f"  {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        more = self.problem_count - len(shown)
        return "\n".join(
            [
                f"{self.path}: {self.problem_count} of {self.rows} rows cannot be used (read as {self.format}: "
                f"{self.description}).",
                *shown,
                *([f"  ... and {more} more; `accord data check {self.path}` lists them."] if more else []),
                "Repair them" + (f", or keep only the good rows with {keep_good}." if keep_good else ".")
                if self.usable
                else "No row is usable. If the columns have other names, use --map field=path (in a recipe: `map`).",
            ]
        )


def left_out_notes(left_out: Counter[str]) -> list[str]:
    """What rows held that is not used, in words."""
    columns = [plain(name.removeprefix("column ")) for name in left_out if name.startswith("column ")]
    counted = [
        f"{name.strip('()')}: {count} rows" if name.startswith("(") else f"{count} {name} not used"
        for name, count in left_out.items()
        if count and not name.startswith("column ")
    ]
    more = f" and {len(columns) - SHOWN_COLUMNS} more" if len(columns) > SHOWN_COLUMNS else ""
    return [*counted, *([f"columns not used: {', '.join(columns[:SHOWN_COLUMNS])}{more}"] if columns else [])]


# --- detection and mapping -------------------------------------------------------------------------------------------


def _checked_mapping(fields: Mapping[str, str]) -> Mapping[str, str]:
    for name in fields:
        if name not in MAPPABLE:
            near = get_close_matches(name, MAPPABLE, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise DataError(
                f"--map {name}={fields[name]}: there is no field {name}.{hint} Fields: {', '.join(MAPPABLE)}."
            )
    return fields


def _row(value: object, mapping: Mapping[str, str], left_out: Counter[str]) -> Row:
    if isinstance(value, str):
        value = {"line": value}  # an array of strings is a list of prompts
    if mapping and isinstance(value, Mapping):
        found = {name: _follow(value, path) for name, path in mapping.items()}
        moved = {path.split(".", 1)[0] for path in mapping.values()}
        value = {key: item for key, item in value.items() if key not in moved} | found
    return Row(value, left_out)


def _follow(value: object, path: str) -> object:
    """The value at a dotted path: names in objects, numbers in lists. A column whose name holds dots is found whole."""
    if isinstance(value, Mapping) and path in value:
        return value[path]
    head, _, rest = path.partition(".")
    if isinstance(value, Mapping):
        inner = value.get(head)
    elif isinstance(value, list) and head.isdecimal() and int(head) < len(value):
        inner = value[int(head)]
    else:
        return None
    return _follow(inner, rest) if rest else inner


def _sample(container: Container, mapping: Mapping[str, str]) -> list[object]:
    """The first rows that can be parsed. Raises DataError when there are none, or when a mapped path leads nowhere."""
    first = list(islice(container.rows(lambda count: None), DETECT_ROWS))
    sample = [raw.value for raw in first if raw.problem is None]
    if not first:
        raise DataError(f"{container.path}: the file holds no rows.")
    if not sample:
        problem = next(raw.problem.at(raw.origin) for raw in first if raw.problem)
        raise DataError(f"{container.path}: none of the first {len(first)} rows can be parsed. The first: {problem}")
    for name, path in mapping.items():
        if all(_follow(value, path) is None for value in sample):
            raise DataError(f"{container.path}: --map {name}={path}: no row has anything there. {_columns(sample)}")
    return sample


def _detect(container: Container, sample: list[object], mapping: Mapping[str, str]) -> Format:
    """The format most of the first rows have."""
    rows = (_row(value, mapping, Counter()) for value in sample if isinstance(value, Mapping | str))
    votes = Counter(found.name for found in map(detect_format, rows) if found)
    if votes:
        return format_named(votes.most_common(1)[0][0])
    if not _columns(sample):
        raise DataError(f"{container.path}: the rows are no objects with named fields but {describe(sample[0])}.")
    raise DataError(
        f"{container.path}: no known format. {_columns(sample)} Expected one of: {', '.join(f.name for f in FORMATS)} "
        "(see docs/data-formats.md). If they mean the same, name them: --map prompt=COLUMN --map completion=COLUMN "
        "(in a recipe: `map`)."
    )


def _columns(sample: list[object]) -> str:
    names = list(dict.fromkeys(plain(str(key)) for value in sample if isinstance(value, Mapping) for key in value))
    return f"The columns are: {', '.join(names[:20])}." if names else ""


def _fingerprint(parts: tuple[Path, ...]) -> str:
    digests = []
    for part in parts:
        with part.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
