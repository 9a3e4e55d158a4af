"""From one kind of group to another, and groups to files. What cannot be converted is counted with its reason.

    from \\ to   prompts   sft                pairs               ranked           rated
    prompts      same      -                  -                   -                -
    sft          yes (1)   same               -                   -                -
    pairs        yes       the chosen answer  same                same             chosen True, rejected False
    ranked       yes       the best answer    all K(K-1)/2        same             if it has scores
    rated        yes       desirable or best  if the group has two answers that differ in score or label   same

(1) a single demonstration becomes the prompt's reference answer, for rewards that compare with it. Ties are no pairs.
"""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import get_args

import numpy as np

from accord.data.formats_canonical import canonical_row
from accord.data.formats_lists import dense_ranks
from accord.data.shelf import selected, shelved
from accord.errors import DataError
from accord.records import Completion, Group, GroupKind

__all__ = ["KINDS", "Conversion", "as_kind", "convert_groups", "nothing_fits", "pair_margin", "writing"]

KINDS: tuple[GroupKind, ...] = get_args(GroupKind)

_FITS: dict[GroupKind, str] = {
    "prompts": "prompts",
    "sft": "sft or prompts",
    "pairs": "pairs, ranked, rated, sft or prompts",
    "ranked": "ranked, pairs, sft or prompts (and rated when the answers have scores)",
    "rated": "rated, sft or prompts (and ranked or pairs when a prompt's answers are in one row)",
}
_METHODS: dict[GroupKind, str] = {
    "prompts": "prompts alone are for the methods that sample, such as ppo",
    "sft": "demonstrations are for sft",
    "pairs": "pairs are for reward, dpo, orpo, kto and ilql",
    "ranked": "rankings are for reward, dpo and orpo",
    "rated": "single answers with labels are for kto or ilql, with scores for ilql, and several in one row also for "
    "reward, dpo and orpo",
}


@dataclass(frozen=True, slots=True)
class Conversion:
    """Groups of one kind; what was left out, (reason, how many); how many were of another kind, (which, how many)."""

    groups: Sequence[Group]
    dropped: tuple[tuple[str, int], ...]
    changed: tuple[tuple[GroupKind, int], ...]


def as_kind(groups: Sequence[Group], to: GroupKind) -> Conversion:
    """All of `groups` that can become the kind `to`. Raises DataError when none can, naming what they fit."""
    dropped, kinds, changed = Counter[str](), Counter[GroupKind](), Counter[GroupKind]()
    same = np.zeros(len(groups), dtype=np.bool_)  # groups that stay what they are need no second place on the disk
    others = 0

    def converted() -> Iterator[Group]:
        nonlocal others
        for index, group in enumerate(groups):
            made = list(convert_groups((group,), to, dropped, kinds))
            changed[group.kind] += bool(made and made[0].kind != group.kind)
            same[index] = len(made) == 1 and made[0] is group
            others += bool(made) and not same[index]
            yield from made

    result = shelved(converted())
    if not result:
        raise DataError(nothing_fits(to, dropped, kinds))
    if not others:
        result = selected(groups, same)
    return Conversion(result, tuple(dropped.items()), tuple((k, n) for k, n in changed.items() if n))


def convert_groups(
    groups: Iterable[Group], to: GroupKind, dropped: Counter[str], kinds: Counter[GroupKind]
) -> Iterator[Group]:
    """Stream the conversion; `dropped` (by reason) and `kinds` (of the groups read) are filled on the way."""
    rule = _RULES[to]
    for group in groups:
        kinds[group.kind] += 1
        for made in rule(group, dropped):
            if made.margin is not None and made.margin < 0:
                dropped["pairs whose scores contradict their order"] += 1
            else:
                yield made if made is group else made.at(group.origin)


def nothing_fits(to: GroupKind, dropped: Counter[str], kinds: Counter[GroupKind]) -> str:
    held = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no groups"
    reasons = "; ".join(f"{count} {reason}" for reason, count in dropped.items())
    fits = "; ".join(f"{kind} fits {_FITS[kind]}" for kind in kinds)
    methods = "; ".join(_METHODS[kind] for kind in kinds)
    return f"none of the data can become {to}: it holds {held} ({reasons}). {fits}. {methods.capitalize()}."


# --- rules -----------------------------------------------------------------------------------------------------------


def _to_prompts(group: Group, dropped: Counter[str]) -> tuple[Group, ...]:
    if not group.prompt:
        dropped["texts without a prompt"] += 1
        return ()
    later = [sum(message.role == "user" for message in item.messages) for item in group.completions]
    if any(later):
        dropped["later turns by user (a prompt ends before the first answer)"] += max(later)
    reference = group.reference
    if (
        reference is None
        and group.kind == "sft"
        and len(group.completions) == 1
        and len(group.completions[0].messages) == 1
    ):
        reference = group.completions[0].text
    return (Group(group.prompt, reference=reference),)


def _to_sft(group: Group, dropped: Counter[str]) -> tuple[Group, ...]:
    if group.kind == "sft":
        return (group,)
    if group.kind == "prompts":
        dropped["prompts without an answer"] += 1
        return ()
    if any(item.label is not None for item in group.completions) and group.kind == "rated":
        best = [item for item in group.completions if item.label]
        reason = "undesirable answers"
    else:
        ranked = _ranked(group, dropped)
        if ranked is None:
            return ()
        top = min(item.rank or 0 for item in ranked.completions)
        best = [item for item in ranked.completions if item.rank == top and not _all_tied(ranked)]
        reason = "ties"
    if not best:
        dropped[reason] += 1
        return ()
    return (Group(group.prompt, tuple(Completion(item.messages) for item in best), reference=group.reference),)


def _ranked(group: Group, dropped: Counter[str]) -> Group | None:
    """The group with a rank on every completion, from its ranks, else its scores, else its labels."""
    completions = group.completions
    if group.kind in ("pairs", "ranked"):
        return group
    judged = group.kind == "rated" or any(item.rank is not None for item in completions)
    if not judged:
        dropped["answers without a rank, score or label" if completions else "prompts without an answer"] += 1
        return None
    if len(completions) < 2:
        dropped["judged answers that are alone with their prompt: one answer cannot be compared"] += 1
        return None
    values = [item.score if item.score is not None else item.label for item in completions]
    if any(value is None for value in values) or len({item.score is None for item in completions}) > 1:
        dropped["lists with some answers unjudged"] += 1
        return None
    ranks = dense_ranks([-float(value) for value in values if value is not None])
    ranked = tuple(replace(item, rank=rank) for item, rank in zip(completions, ranks, strict=True))
    return Group(group.prompt, ranked, reference=group.reference)


def _all_tied(group: Group) -> bool:
    return len({item.rank for item in group.completions}) == 1


def _to_ranked(group: Group, dropped: Counter[str]) -> tuple[Group, ...]:
    ranked = _ranked(group, dropped)
    if ranked is not None and _all_tied(ranked):
        dropped["ties"] += 1
        return ()
    return (ranked,) if ranked else ()


def _to_pairs(group: Group, dropped: Counter[str]) -> tuple[Group, ...]:
    ranked = _ranked(group, dropped)
    if ranked is None:
        return ()
    pairs = []
    for first, second in combinations(sorted(ranked.completions, key=lambda item: item.rank or 0), 2):
        if first.rank == second.rank:
            dropped["ties"] += 1
        elif first.messages == second.messages:
            dropped["pairs of identical answers"] += 1
        else:
            pairs.append(_pair(ranked, first, second))
    return tuple(pairs)


def _pair(group: Group, chosen: Completion, rejected: Completion) -> Group:
    """Chosen first."""
    answers = replace(chosen, rank=0), replace(rejected, rank=1)
    return replace(group, completions=answers, margin=pair_margin(group, chosen, rejected))


def pair_margin(group: Group, chosen: Completion, rejected: Completion) -> float | None:
    """How much better `chosen` is, in score units: a pair's own margin, else the difference of scores, else unknown."""
    if len(group.completions) == 2 and group.margin is not None:
        return group.margin
    return None if chosen.score is None or rejected.score is None else chosen.score - rejected.score


def _to_rated(group: Group, dropped: Counter[str]) -> tuple[Group, ...]:
    if group.kind == "rated":
        return (group,)
    if group.kind == "pairs":
        if _all_tied(group):
            dropped["ties"] += 1
            return ()
        top = min(item.rank or 0 for item in group.completions)
        judged = (Completion(item.messages, label=item.rank == top) for item in group.completions)
    elif group.kind == "ranked" and all(item.score is not None for item in group.completions):
        judged = (replace(item, rank=None) for item in group.completions)
    else:
        dropped["groups without scores or labels"] += 1
        return ()
    return (Group(group.prompt, tuple(judged), reference=group.reference),)


_RULES: dict[GroupKind, Callable[[Group, Counter[str]], tuple[Group, ...]]] = {
    "prompts": _to_prompts,
    "sft": _to_sft,
    "pairs": _to_pairs,
    "ranked": _to_ranked,
    "rated": _to_rated,
}


# --- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[Callable[[Group], None]]:
    """A function that writes groups as JSON Lines to `path`, which appears complete when the block ends, or not at all.

    Raises: DataError when the name does not say JSON Lines, or the folder cannot be written to.
    """
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        raise DataError(f"{path}: output is JSON Lines. Give it a name that ends in .jsonl or .jsonl.gz.")
    try:
        file = NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}).") from error
    try:
        with file:
            # mtime=0 and no name: the same groups give the same bytes.
            stream = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if path.suffix == ".gz" else file

            def write(group: Group) -> None:
                stream.write(json.dumps(canonical_row(group), ensure_ascii=False).encode() + b"\n")

            yield write
            if stream is not file:
                stream.close()
            file.flush()
            os.fsync(file.fileno())
        os.chmod(file.name, 0o666 & ~_umask())
        os.replace(file.name, path)
    except BaseException:
        Path(file.name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
