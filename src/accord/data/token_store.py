"""Tokens of groups that are larger than memory: made once, kept on disk by content, found by position.

The groups are cut into stretches of about SHARD_CHARACTERS of text, or SHARD_ROWS. The name of a stretch's file is a
hash of all its tokens depend on: the groups but for their origins, the tokenizer, its template, and the limits. So a
stage that was killed goes on where it was, a file that grew costs its new rows, and stages and runs share what they
have in common. Groups and tokens are Python's objects a block at a time.

    <folder>/<sha256 of what the tokens depend on>.tokens
        a line of JSON: counts, what prompts lost, how many were dropped and the first, sha256 of the rest
        ends (N + 1) int64   sources (N,) int64   N records: prompt id int64, then int32:
        tokens of the prompt, completions, tokens of each, then all ids; ~id for a token that does not count

Files are whole or not there, and never changed. Nothing is ever cleared; the folder may be deleted at any time but
while a stage is at work.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accord.atomic import make_folder, write_bytes
from accord.data.shelf import Lazy, characters, group_bytes, object_bytes
from accord.data.templates import Template
from accord.data.tokenise import Dropped, tokenise_groups
from accord.records import Group, TokenCompletion, TokenGroup

__all__ = ["StoredTokens", "store_tokens"]

FORMAT = 2
SHARD_CHARACTERS = 32 << 20  # about as many bytes of tokens, and a minute of work
SHARD_ROWS = 1 << 17  # half a minute of work where rows are short
BLOCK_BYTES = 1 << 20  # about what the groups and tokens take that are Python's objects at a time


@dataclass(frozen=True, slots=True)
class StoredTokens:
    """`Tokenised` on disk. pairs: each token group behind the group it was made from. dropped: how many, and the first
    in words."""

    pairs: Sequence[tuple[Group, TokenGroup]]
    cuts: tuple[tuple[str, int], ...]
    dropped: int
    first_dropped: str


def store_tokens(
    groups: Sequence[Group], template: Template, folder: Path, progress: Callable[[int], object] = int, **limits: Any
) -> StoredTokens:
    """What `tokenise_groups` makes of the groups, from `folder` as far as it is there, and there afterwards.

    `progress` is told how many groups are done.

    Raises: DataError as `tokenise_groups`, AccordError when the folder cannot be written.
    """
    make_folder(folder)
    identity = _identity(template, limits)
    shards: list[_Shard] = []
    sources: list[NDArray[np.int64]] = []
    first_dropped = ""
    for first, last, name in _stretches(groups, identity):
        path = folder / f"{name}.tokens"
        shard = _Shard.opened(path)
        if shard is None:
            _write(path, groups[first:last], first, template, limits, progress)
            shard = _Shard.opened(path)
            assert shard is not None
        if shard.dropped and not first_dropped:
            index, reason = first + shard.first_dropped[0], shard.first_dropped[1]
            first_dropped = str(Dropped(index, groups[index].origin, reason))
        shards.append(shard)
        sources.append(shard.sources + first)
        progress(last)
    cuts = Counter[str]()
    for shard in shards:
        cuts.update(dict(shard.cuts))
    return StoredTokens(
        _pairs(groups, shards, np.concatenate(sources) if sources else np.zeros(0, np.int64)),
        tuple(cuts.items()),
        sum(shard.dropped for shard in shards),
        first_dropped,
    )


def _pairs(
    groups: Sequence[Group], shards: Sequence[_Shard], sources: NDArray[np.int64]
) -> Sequence[tuple[Group, TokenGroup]]:
    firsts = np.array([0, *accumulate(shard.count for shard in shards)])

    def at(place: int) -> tuple[Group, TokenGroup]:
        number = int(np.searchsorted(firsts, place, side="right")) - 1
        group = groups[int(sources[place])]
        prompt_id, prompt_ids, completions = shards[number].read(place - int(firsts[number]))
        return group, TokenGroup(prompt_ids, completions, prompt_id, group.origin)

    return Lazy(len(sources), at)


def _stretches(groups: Sequence[Group], identity: bytes) -> Iterator[tuple[int, int, str]]:
    """The first group of each, the one behind its last, and its name. Where they are cut depends on the groups before
    the cut alone. No group is held: those that are not on the disk yet are read again."""
    first = size = 0
    key = hashlib.sha256(identity)
    for last, group in enumerate(groups, 1):
        content = group_bytes(group)
        key.update(len(content).to_bytes(8, "little") + content)
        size += characters(group)
        if size >= SHARD_CHARACTERS or last - first >= SHARD_ROWS:
            yield first, last, key.hexdigest()
            first, size, key = last, 0, hashlib.sha256(identity)
    if first < len(groups):
        yield first, len(groups), key.hexdigest()


def _blocks(groups: Iterable[Group]) -> Iterator[list[Group]]:
    """As many at a time as there are to be in memory at once."""
    block: list[Group] = []
    size = 0
    for group in groups:
        block.append(group)
        size += object_bytes(group)
        if size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _identity(template: Template, limits: dict[str, Any]) -> bytes:
    tokenizer: Any = template.tokenizer
    parts = [
        FORMAT,
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items()),
        type(tokenizer).__name__,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        template.source,
        limits,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


# --- one file --------------------------------------------------------------------------------------------------------


def _write(
    path: Path,
    groups: Sequence[Group],
    first: int,
    template: Template,
    limits: dict[str, Any],
    progress: Callable[[int], object],
) -> None:
    """Make the tokens of a stretch, a block at a time; the first of its groups is number `first` of all."""
    ends, sources, records = array("q", [0]), array("q"), bytearray()
    cuts = Counter[str]()
    dropped, first_dropped = 0, (0, "")
    done = first
    for block in _blocks(groups):
        made = tokenise_groups(block, template, first=done, **limits)
        for group in made.groups:
            records += _record(group)
            ends.append(len(records))
        sources.extend(source - first for source in made.sources)
        cuts.update(dict(made.cuts))
        if made.dropped and not dropped:
            first_dropped = made.dropped[0].index - first, made.dropped[0].reason
        dropped += len(made.dropped)
        done += len(block)
        progress(done)
    body = (np.array(ends, dtype="<i8").tobytes(), np.array(sources, dtype="<i8").tobytes(), records)
    digest = hashlib.sha256()
    for part in body:
        digest.update(part)
    header = {
        "count": len(sources),
        "cuts": list(cuts.items()),
        "dropped": dropped,
        "first_dropped": first_dropped,
        "sha256": digest.hexdigest(),
    }
    write_bytes(path, json.dumps(header).encode() + b"\n", *body)


def _record(group: TokenGroup) -> bytes:
    lengths = [len(group.prompt_ids), len(group.completions), *(len(answer.ids) for answer in group.completions)]
    ids = [token if counts else ~token for c in group.completions for token, counts in zip(c.ids, c.mask, strict=True)]
    return np.int64(group.prompt_id).tobytes() + np.array([*lengths, *group.prompt_ids, *ids], dtype="<i4").tobytes()


class _Shard:
    """One file, open."""

    def __init__(self, descriptor: int, header: dict[str, Any], body: int) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self.count: int = header["count"]
        self.cuts: list[tuple[str, int]] = header["cuts"]
        self.dropped: int = header["dropped"]
        self.first_dropped: tuple[int, str] = header["first_dropped"]
        numbers = np.frombuffer(os.pread(descriptor, 8 * (2 * self.count + 1), body), dtype="<i8")
        self._ends, self.sources = numbers[: self.count + 1], numbers[self.count + 1 :].astype(np.int64)
        self._records = body + 8 * len(numbers)

    @classmethod
    def opened(cls, path: Path) -> _Shard | None:
        """The file's shard; None when there is no file, or it is damaged: then it is to be written again."""
        if not path.is_file():
            return None
        with path.open("rb") as file:
            line = file.readline()
            try:
                header = json.loads(line)
                if hashlib.file_digest(file, "sha256").hexdigest() != header["sha256"]:
                    return None
            except (ValueError, KeyError, TypeError):
                return None
        return cls(os.open(path, os.O_RDONLY), header, len(line))

    def read(self, place: int) -> tuple[int, tuple[int, ...], tuple[TokenCompletion, ...]]:
        start, end = int(self._ends[place]), int(self._ends[place + 1])
        record = os.pread(self._descriptor, end - start, self._records + start)
        numbers: list[int] = np.frombuffer(record, dtype="<i4", offset=8).tolist()
        prompt, count = numbers[:2]
        position = 2 + count + prompt
        completions = []
        for length in numbers[2 : 2 + count]:
            ids = numbers[position : position + length]
            mask = tuple(token >= 0 for token in ids)
            completions.append(TokenCompletion(tuple(token if token >= 0 else ~token for token in ids), mask))
            position += length
        return int.from_bytes(record[:8], "little"), tuple(numbers[2 + count : 2 + count + prompt]), tuple(completions)
