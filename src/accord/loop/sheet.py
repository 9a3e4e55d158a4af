"""Pairs of answers and what people chose: the files of a round. Torch-free.

pairs.jsonl   {"id", "prompt", "a", "b", "writers": [policy of a, policy of b], "finished": [bool, bool]}: everything,
              who wrote what included; not for the eyes of labellers
sheet.jsonl   {"id", "prompt", "a", "b", "choice": null}: what a labeller sees and fills in with "a", "b" or "tie"
labels.jsonl  {"id", "choice"}: what was chosen; {"id", "choice": null, "error"} where a labeller failed

A prompt is its text, or a list of {"role", "content"} where it has more than one message. Two equal answers are not on
the sheet: nobody can choose between them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from accord.atomic import write_text
from accord.errors import DataError, LabelsWanted
from accord.records import Completion, Group, Message

__all__ = [
    "Choice",
    "Labels",
    "Pair",
    "comparisons",
    "fingerprint",
    "outcomes",
    "read_choices",
    "read_labels",
    "read_pairs",
    "write_labels",
    "write_pairs",
    "write_sheet",
]

Choice = Literal["a", "b", "tie"]
SHOWN_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to a prompt. Both by one policy: the reward model learns from it. By two: it decides which is better.

    writers   the numbers of the policies that wrote a and b
    finished  whether a and b ended by themselves
    """

    id: str
    prompt: tuple[Message, ...]
    a: str
    b: str
    writers: tuple[int, int]
    finished: tuple[bool, bool] = (True, True)

    @property
    def prompt_id(self) -> int:
        return Group(self.prompt).prompt_id

    @property
    def held_out(self) -> bool:
        return self.writers[0] != self.writers[1]

    @property
    def equal(self) -> bool:
        return self.a == self.b

    @property
    def empty(self) -> bool:
        """One of the answers says nothing: no row of data for a reward model."""
        return not (self.a.strip() and self.b.strip())


@dataclass(frozen=True, slots=True)
class Labels:
    """What a labeller says of pairs, by their ids: a choice, or why there is none."""

    choices: Mapping[str, Choice]
    failures: Mapping[str, str] = field(default_factory=dict)


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    rows = ({**_shown(p), "writers": p.writers, "finished": p.finished} for p in pairs)
    _write(path, rows)


def write_sheet(path: Path, pairs: Iterable[Pair]) -> None:
    """What a labeller fills in: every pair of two different answers."""
    _write(path, ({**_shown(p), "choice": None} for p in pairs if not p.equal))


def write_labels(path: Path, labels: Labels) -> None:
    rows: list[dict[str, Any]] = [{"id": key, "choice": choice} for key, choice in labels.choices.items()]
    _write(path, rows + [{"id": key, "choice": None, "error": why} for key, why in labels.failures.items()])


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises DataError where there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); delete its folder to make it again") from error


def read_pairs(path: Path) -> list[Pair]:
    """What `write_pairs` wrote."""
    return [
        Pair(
            row["id"], _messages(row["prompt"]), row["a"], row["b"], tuple(row["writers"]), tuple(row["finished"])
        )
        for _, row in _rows(path)
    ]  # fmt: skip


def read_labels(path: Path) -> dict[str, Choice]:
    """The choices that `write_labels` wrote."""
    return {row["id"]: row["choice"] for _, row in _rows(path) if row["choice"] is not None}


def read_choices(path: Path, pairs: Sequence[Pair]) -> dict[str, Choice]:
    """What people wrote into a sheet of `pairs`, in the order of the pairs. Other keys in a row are theirs to add.

    Raises: DataError naming `file:line` of rows that are not the sheet's or say something else than a, b or tie;
        LabelsWanted when all is well but rows are still to be filled in.
    """
    expected = {p.id: _shown(p) for p in pairs if not p.equal}
    found: dict[str, Choice] = {}
    seen: dict[str, int] = {}
    empty: list[int] = []
    problems: list[str] = []
    for line, row in _rows(path):
        problem = _problem(row, expected, seen)
        if problem is not None:
            problems.append(f"{path}:{line}: {problem}")
            continue
        seen[row["id"]] = line
        choice = row.get("choice")
        word = choice.strip().lower() if isinstance(choice, str) else choice
        if word in (None, ""):
            empty.append(line)
        elif word in get_args(Choice):
            found[row["id"]] = cast(Choice, word)
        else:
            problems.append(f'{path}:{line}: `choice` is {choice!r}; expected "a", "b" or "tie"')
    missing = [key for key in expected if key not in seen]
    if missing and not problems:
        problems.append(
            f"{path}: {len(missing)} of {len(expected)} rows are missing, the first with id {missing[0]!r}: put them "
            f"back, or delete the file to start the sheet again"
        )
    if problems:
        rest = f"\n... and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise DataError("\n".join(problems[:SHOWN_PROBLEMS]) + rest)
    if empty:
        raise LabelsWanted(
            f"{len(empty)} of {len(expected)} pairs to label in {path} (the first at line {empty[0]}): write a, b or "
            f"tie into `choice`, then run the same command again"
        )
    return {key: found[key] for key in expected}


def _problem(row: Mapping[str, Any], expected: Mapping[str, Mapping[str, Any]], seen: Mapping[str, int]) -> str | None:
    """What is wrong with a row besides its choice, or None."""
    key = row.get("id")
    if not isinstance(key, str) or key not in expected:
        return f"the id {key!r} is not on this sheet; restore the row as it was"
    if key in seen:
        return f"the id {key!r} stands at line {seen[key]} already; delete one of the two"
    changed = [name for name, value in expected[key].items() if row.get(name) != value]
    if changed:
        return f"`{changed[0]}` is not the text that was to be judged; restore it, and change `choice` only"
    return None


def comparisons(pairs: Iterable[Pair], choices: Mapping[str, Choice]) -> list[Group]:
    """What the reward model learns from: the chosen answer first. Ties teach nothing and are left out."""
    groups = []
    for pair in pairs:
        choice = choices.get(pair.id)
        if pair.held_out or choice is None or choice == "tie":
            continue
        texts = (pair.a, pair.b) if choice == "a" else (pair.b, pair.a)
        answers = tuple(Completion((Message("assistant", text),), rank=rank) for rank, text in enumerate(texts))
        groups.append(Group(pair.prompt, answers))
    return groups


def outcomes(pairs: Iterable[Pair], choices: Mapping[str, Choice], newest: int) -> tuple[list[float], list[int]]:
    """(1 for a win of policy `newest`, 0 for a loss, 0.5 for a tie or two equal answers; the prompt) of every
    held-out pair that has a choice or needs none."""
    wins: list[float] = []
    prompts: list[int] = []
    for pair in pairs:
        if pair.held_out:
            choice = "tie" if pair.equal else choices.get(pair.id)
            if choice is None:
                continue
            wins.append(0.5 if choice == "tie" else float(pair.writers[choice == "b"] == newest))
            prompts.append(pair.prompt_id)
    return wins, prompts


def _shown(pair: Pair) -> dict[str, Any]:
    """The keys that a labeller sees."""
    prompt: Any = [{"role": m.role, "content": m.content} for m in pair.prompt]
    if len(pair.prompt) == 1 and pair.prompt[0].role == "user":
        prompt = pair.prompt[0].content
    return {"id": pair.id, "prompt": prompt, "a": pair.a, "b": pair.b}


def _messages(prompt: Any) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    return tuple(Message(m["role"], m["content"]) for m in prompt)


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(_line(row) for row in rows))


def _line(row: Mapping[str, Any]) -> str:
    """People read these files, so text stays as it is; but half a surrogate pair cannot be written in UTF-8."""
    text = json.dumps(row, ensure_ascii=False)
    return (text if text.isprintable() else json.dumps(row)) + "\n"


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line, row) of a file of JSON objects, empty lines left out. Raises DataError naming `file:line`."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    rows = []
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: not valid JSON ({error}); expected one object a line") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{line}: found {type(row).__name__}; expected one JSON object a line")
        rows.append((line, row))
    return rows
