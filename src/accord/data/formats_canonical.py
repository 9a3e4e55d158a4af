"""Accord's own row: what `accord data convert` writes, one JSON object per Group, read back to an equal Group."""

from __future__ import annotations

from collections.abc import Sequence

from accord.data.fields import Row, check_scores, desirable, number, soft_label_of, text, turns
from accord.data.problems import UnusableRow, describe
from accord.records import Completion, Group, Message

__all__ = ["canonical_row", "read_canonical"]


def canonical_row(group: Group) -> dict[str, object]:
    """The JSON object for a group; fields without a value are left out."""
    row: dict[str, object] = {
        "prompt": _plain(group.prompt),
        "completions": [
            _without_none(messages=_plain(item.messages), rank=item.rank, score=item.score, label=item.label)
            for item in group.completions
        ],
    }
    return row | _without_none(margin=group.margin, soft_label=group.soft_label, reference=group.reference)


def _without_none(**fields: object) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}


def _plain(messages: Sequence[Message]) -> list[dict[str, object]]:
    return [_without_none(role=m.role, content=m.content, learn=None if m.learn else False) for m in messages]


def read_canonical(row: Row) -> tuple[Group, ...]:
    prompt, completions = row.get("prompt"), row.get("completions")
    messages = turns(prompt, "prompt", row.left_out) if prompt else ()
    read = tuple(
        _completion(item, f"completions[{index}]", row)
        for index, item in enumerate(completions if isinstance(completions, list) else [])
    )
    check_scores(read, [f"completions[{index}]" for index in range(len(read))])
    soft_label = soft_label_of(row)
    margin = number(row.get("margin"), "margin") if row.has("margin") else None
    if margin is not None and margin < 0:
        raise UnusableRow("margin", f"{margin:g}", "0 or more: rank 0 is the better answer", "Correct it or the ranks.")
    reference = text(row.get("reference"), "reference") if row.has("reference") else None
    return (Group(messages, read, margin=margin, soft_label=soft_label, reference=reference),)


def _completion(value: object, field: str, row: Row) -> Completion:
    item = Row(value, row.left_out)
    rank, score, label = item.get("rank"), item.get("score"), item.get("label")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
        raise UnusableRow(f"{field}.rank", describe(rank), "a whole number, 0 = best", "Correct the rank.")
    return Completion(
        turns(item.get("messages"), f"{field}.messages", row.left_out),
        rank=rank,
        score=None if score is None else number(score, f"{field}.score"),
        label=None if label is None else desirable(label, f"{field}.label"),
    )
