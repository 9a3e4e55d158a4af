"""Sequences of groups larger than memory: kept in a file, found by position, and lazy views of them.

Groups that are few stay Python objects; of many a nameless file is made, which is gone when the process ends. What is
made of a sequence in memory is made at once, what is made of one in a file when it is asked for: `mapped`, `kept`,
`selected` and the like give a tuple for the first and a `Lazy` for the second, with the same items.
"""

from __future__ import annotations

import marshal
import os
import struct
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from accord.atomic import cache_folder, make_folder
from accord.errors import DataError
from accord.records import Completion, Group, Message, Origin

__all__ = [
    "Lazy",
    "characters",
    "group_bytes",
    "in_memory",
    "joined",
    "kept",
    "mapped",
    "numbered",
    "object_bytes",
    "selected",
    "shelved",
]

S = TypeVar("S")
T = TypeVar("T")

MEMORY_BYTES = 1 << 30  # about what groups take as Python's objects, with their tokens, before they go to a file
GROUP_BYTES, COMPLETION_BYTES = 700, 450  # of which this is neither text nor its tokens
CHARACTER_BYTES = 12  # a character, and about a quarter of a token, whose number and mask take 48 bytes
READ_AT_ONCE = 64
_ORIGIN = struct.Struct("<iq")
_NO_FILE = -1


class Lazy(Sequence[T]):
    """`length` items, each made by `at` when it is asked for."""

    def __init__(self, length: int, at: Callable[[int], T]) -> None:
        self._length, self._at = length, at

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            places = range(self._length)[index]
            return Lazy(len(places), lambda i: self._at(places[i]))
        return self._at(range(self._length)[index])

    def __iter__(self) -> Iterator[T]:
        return map(self._at, range(self._length))


def in_memory(items: Sequence[object]) -> bool:
    return isinstance(items, list | tuple)


def mapped(items: Sequence[S], make: Callable[[S], T]) -> Sequence[T]:
    """What `make` makes of each item."""
    if in_memory(items):
        return tuple(make(item) for item in items)
    return Lazy(len(items), lambda i: make(items[i]))


def numbered(items: Sequence[S], make: Callable[[int, S], T]) -> Sequence[T]:
    """What `make` makes of each item and its position."""
    if in_memory(items):
        return tuple(make(i, item) for i, item in enumerate(items))
    return Lazy(len(items), lambda i: make(i, items[i]))


def joined(first: Sequence[S], second: Sequence[S]) -> Sequence[S]:
    """The items of one, then those of the other."""
    if in_memory(first) and in_memory(second):
        return (*first, *second)
    return Lazy(len(first) + len(second), lambda i: first[i] if i < len(first) else second[i - len(first)])


def kept(items: Sequence[T], keep: Callable[[T], bool]) -> Sequence[T]:
    """The items that `keep` says to keep."""
    return selected(items, np.fromiter(map(keep, items), dtype=np.bool_, count=len(items)))


def selected(items: Sequence[T], chosen: NDArray[np.bool_]) -> Sequence[T]:
    """The items whose entry in `chosen`, (len(items),), is True."""
    if in_memory(items):
        return tuple(item for item, wanted in zip(items, chosen.tolist(), strict=True) if wanted)
    places = np.flatnonzero(chosen)
    return items if len(places) == len(items) else Lazy(len(places), lambda i: items[int(places[i])])


def shelved(groups: Iterable[Group]) -> Sequence[Group]:
    """The groups in order, in memory if they are few. Raises DataError when there is no room for the file."""
    few: list[Group] = []
    size = 0
    rest = iter(groups)
    for group in rest:
        few.append(group)
        size += object_bytes(group)
        if size > MEMORY_BYTES:
            return _GroupFile(few, rest)
    return tuple(few)


def characters(group: Group) -> int:
    """Of the turns of the prompt and of the completions."""
    turns = (group.prompt, *(answer.messages for answer in group.completions))
    return sum(len(message.content) for messages in turns for message in messages)


def object_bytes(group: Group) -> int:
    """About what a group takes in memory, its tokens included."""
    return CHARACTER_BYTES * characters(group) + GROUP_BYTES + COMPLETION_BYTES * len(group.completions)


def group_bytes(group: Group) -> bytes:
    """All a group holds but its origin; equal groups give equal bytes."""
    completions = tuple(
        (_turns(answer.messages), answer.rank, answer.score, answer.label, answer.rewards)
        for answer in group.completions
    )
    # Version 2 has no references, which would depend on what else holds an object.
    return marshal.dumps((_turns(group.prompt), completions, group.margin, group.soft_label, group.reference), 2)


def _turns(messages: tuple[Message, ...]) -> tuple[tuple[str, str, bool], ...]:
    return tuple((message.role, message.content, message.learn) for message in messages)


class _GroupFile(Sequence[Group]):
    """Groups in a file: the list is emptied into it, then the rest."""

    def __init__(self, few: list[Group], rest: Iterable[Group]) -> None:
        self._files: dict[str, int] = {}
        ends = array("q", [0])
        folder = cache_folder("data")
        try:
            make_folder(folder)
            self._file = tempfile.TemporaryFile(dir=folder)
            weakref.finalize(self, self._file.close)
            for source in (few, rest):
                for group in source:
                    record = self._dumped(group)
                    self._file.write(record)
                    ends.append(ends[-1] + len(record))
                few.clear()
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"the data is too large to be kept in memory, and cannot be kept in {folder}: {error.strerror}. Make "
                "room, or name another folder with the environment variable ACCORD_CACHE."
            ) from error
        self._ends = np.array(ends)
        self._names = tuple(self._files)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | Sequence[Group]:
        if isinstance(index, slice):
            return Lazy(len(self), self.__getitem__)[index]
        place = range(len(self))[index]
        return self._loaded(self._read(place, place + 1))

    def __iter__(self) -> Iterator[Group]:
        for first in range(0, len(self), READ_AT_ONCE):
            last = min(first + READ_AT_ONCE, len(self))
            records = self._read(first, last)
            ends = (self._ends[first : last + 1] - self._ends[first]).tolist()
            for start, end in pairwise(ends):
                yield self._loaded(records[start:end])

    def _read(self, first: int, last: int) -> bytes:
        start, end = int(self._ends[first]), int(self._ends[last])
        return os.pread(self._file.fileno(), end - start, start)

    def _dumped(self, group: Group) -> bytes:
        if group.origin is None:
            return _ORIGIN.pack(_NO_FILE, 0) + group_bytes(group)
        file = self._files.setdefault(group.origin.file, len(self._files))
        return _ORIGIN.pack(file, group.origin.line) + group_bytes(group)

    def _loaded(self, record: bytes) -> Group:
        file, line = _ORIGIN.unpack_from(record)
        prompt, completions, margin, soft_label, reference = marshal.loads(record[_ORIGIN.size :])
        return Group(
            tuple(Message(*turn) for turn in prompt),
            tuple(Completion(tuple(Message(*turn) for turn in turns), *judged) for turns, *judged in completions),
            margin,
            soft_label,
            reference,
            None if file == _NO_FILE else Origin(self._names[file], line),
        )
