"""Formats with many answers per prompt: ranked or scored lists, OASST trees, Label Studio exports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from accord.data.fields import Row, check_order, check_scores, completion, desirable, number, prompt_of, text
from accord.data.formats_pairs import ANSWER_PAIRS, judged_pair, parse_verdict
from accord.data.problems import UnusableRow, describe
from accord.records import Group, Message

__all__ = ["LIST_FIELDS", "dense_ranks", "read_label_studio", "read_oasst", "read_ranked"]

LIST_FIELDS = ("responses", "completions", "answers", "outputs", "candidates")
_TEXT_FIELDS = ("text", "content", "response", "answer", "completion", "output")
_RANK_FIELDS = ("rank", "ranking")
_SCORE_FIELDS = ("score", "rating", "reward", "overall_score")


def dense_ranks(values: Sequence[float]) -> list[int]:
    """Ranks 0, 1, 2... in increasing order of value; equal values share a rank."""
    order = {value: rank for rank, value in enumerate(sorted(set(values)))}
    return [order[value] for value in values]


def _spoken(value: object, field: str) -> tuple[Message]:
    return (Message("assistant", text(value, field)),)


def _column(items: list[Row], names: tuple[str, ...], field: str) -> list[float] | None:
    """One number per answer, or None when no answer has one; some with and some without is a problem."""
    if not any(item.has(*names) for item in items):
        return None
    return [number(item.get(*names), f"{field}[{i}].{items[0].name(*names)}") for i, item in enumerate(items)]


def read_ranked(row: Row) -> tuple[Group, ...]:
    """Responses as objects with a rank (low is better) or score (high is better), or as text beside lists of them."""
    field = row.name(*LIST_FIELDS)
    answers = row.get(field)
    if not isinstance(answers, list) or not answers:
        raise UnusableRow(field, describe(answers), "a list of responses", "Correct the row.")
    prompt = prompt_of(row)
    if all(isinstance(answer, str) for answer in answers):
        spoken = [_spoken(answer, f"{field}[{i}]") for i, answer in enumerate(answers)]
        ranks = _beside(row, ("ranks", "rank", "ranking"), len(answers))
        scores = _beside(row, ("scores", "score", "rewards", "ratings"), len(answers))
    else:
        items = [Row(answer, row.left_out) for answer in answers]
        spoken = [
            _spoken(item.get(*_TEXT_FIELDS), f"{field}[{i}].{item.name(*_TEXT_FIELDS)}") for i, item in enumerate(items)
        ]
        ranks, scores = _column(items, _RANK_FIELDS, field), _column(items, _SCORE_FIELDS, field)
    if ranks is None and scores is None:
        row.left_out["(lists of answers without ranks or scores are read as demonstrations)"] += 1
    places = dense_ranks(ranks) if ranks is not None else [None] * len(spoken)
    names = [f"{field}[{i}]" for i in range(len(spoken))]
    completions = tuple(
        completion(prompt, answer, name, rank=place, score=scores[i] if scores else None)
        for i, (answer, name, place) in enumerate(zip(spoken, names, places, strict=True))
    )
    check_scores(completions, names)
    return (Group(prompt, completions),)


def _beside(row: Row, names: tuple[str, ...], count: int) -> list[float] | None:
    values = row.get(*names)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != count:
        raise UnusableRow(row.name(*names), describe(values), f"a list of {count} numbers", "Give one per response.")
    return [number(value, f"{row.name(*names)}[{i}]") for i, value in enumerate(values)]


def read_oasst(row: Row) -> tuple[Group, ...]:
    """One group per user message with replies: ranked when two or more replies have a rank, else demonstrations."""
    groups = []
    waiting: list[tuple[tuple[Message, ...], object]] = [((), row.get("prompt"))]
    while waiting:
        before, value = waiting.pop()
        node = Row(value, row.left_out)
        role = {"prompter": "user", "assistant": "assistant"}.get(str(node.get("role")))
        if role is None:
            raise UnusableRow("prompt...role", describe(node.get("role")), "prompter or assistant", "Correct the tree.")
        dialogue = (*before, Message(role, text(node.get("text"), "prompt...text")))
        check_order(dialogue, "prompt...replies")
        replies = node.get("replies") or []
        if not isinstance(replies, list):
            raise UnusableRow("prompt...replies", describe(replies), "a list of replies", "Correct the tree.")
        kept = [reply for reply in replies if not (isinstance(reply, Mapping) and reply.get("deleted"))]
        row.left_out["deleted replies"] += len(replies) - len(kept)
        if role == "user" and kept:
            groups.append(_replies(dialogue, [Row(reply, row.left_out) for reply in kept], row))
        waiting += [(dialogue, reply) for reply in reversed(kept)]
    if not groups:
        raise UnusableRow("prompt.replies", "no replies", "at least one reply", "Delete the tree.")
    return tuple(groups)


def _replies(dialogue: tuple[Message, ...], replies: list[Row], row: Row) -> Group:
    ranked = [reply for reply in replies if reply.has("rank")]
    if len(ranked) < 2:
        answers = [_spoken(reply.get("text"), "prompt...text") for reply in replies]
        return Group(dialogue, tuple(completion(dialogue, answer, "prompt...replies") for answer in answers))
    row.left_out["replies without a rank beside ranked ones"] += len(replies) - len(ranked)
    ranks = dense_ranks([number(reply.get("rank"), "prompt...rank") for reply in ranked])
    answers = [_spoken(reply.get("text"), "prompt...text") for reply in ranked]
    pairs = zip(answers, ranks, strict=True)
    return Group(dialogue, tuple(completion(dialogue, answer, "prompt...replies", rank=rank) for answer, rank in pairs))


# --- Label Studio ----------------------------------------------------------------------------------------------------


def read_label_studio(row: Row) -> tuple[Group, ...]:
    """One group per annotation that holds a result; cancelled and empty annotations are counted."""
    data, annotations = Row(row.get("data"), row.left_out), row.get("annotations")
    groups = []
    for index, item in enumerate(annotations if isinstance(annotations, list) else []):
        annotation = Row(item, row.left_out)
        results = annotation.get("result")
        if annotation.get("was_cancelled") or not results:
            row.left_out["cancelled or empty annotations"] += 1
            continue
        groups.append(_annotation(data, results, f"annotations[{index}].result"))
    if not groups:
        raise UnusableRow(
            "annotations", "no annotation with a result", "at least one", "Annotate the task or delete it."
        )
    return tuple(groups)


def _annotation(data: Row, results: object, field: str) -> Group:
    readers = {"pairwise": _ls_pairwise, "ranker": _ls_ranker, "choices": _ls_choices, "textarea": _ls_textarea}
    for item in results if isinstance(results, list) else []:
        result = Row(item, data.left_out)
        value = result.get("value")
        if result.peek("type") in readers and isinstance(value, Mapping):
            return readers[str(result.get("type"))](data, value, f"{field}.value")
    raise UnusableRow(
        field, describe(results), "a pairwise, ranker, choices or textarea result", "Export that control."
    )


def _ls_pairwise(data: Row, value: Mapping[str, object], field: str) -> Group:
    names = next((pair for pair in ANSWER_PAIRS if data.has(*pair)), ANSWER_PAIRS[-1])
    first, second = (_spoken(data.get(name), f"data.{name}") for name in names)
    verdict = parse_verdict(value.get("selected"), f"{field}.selected")
    return judged_pair(prompt_of(data), first, second, verdict, names)


def _ls_ranker(data: Row, value: Mapping[str, object], field: str) -> Group:
    ranker, items = value.get("ranker"), data.get("items")
    ids = ranker.get("rank") if isinstance(ranker, Mapping) and len(ranker) == 1 else None
    if not isinstance(ids, list):
        raise UnusableRow(
            f"{field}.ranker",
            describe(ranker),
            "one ranked list called rank",
            "Buckets are no ranking: rank the items.",
        )
    bodies = (
        {item.get("id"): item.get("body") for item in items if isinstance(item, Mapping)}
        if isinstance(items, list)
        else {}
    )
    if sorted(map(str, ids)) != sorted(map(str, bodies)):
        raise UnusableRow(
            f"{field}.ranker.rank", f"the ids {ids}", f"the ids of data.items {list(bodies)}", "Correct the ids."
        )
    prompt = prompt_of(data)
    return Group(
        prompt,
        tuple(
            completion(prompt, _spoken(bodies[item], "data.items.body"), field, rank=i) for i, item in enumerate(ids)
        ),
    )


def _ls_choices(data: Row, value: Mapping[str, object], field: str) -> Group:
    choices = value.get("choices")
    label = desirable(choices[0] if isinstance(choices, list) and len(choices) == 1 else choices, f"{field}.choices")
    prompt, name = prompt_of(data), data.name("response", "completion", "answer", "output")
    return Group(prompt, (completion(prompt, _spoken(data.get(name), f"data.{name}"), field, label=label),))


def _ls_textarea(data: Row, value: Mapping[str, object], field: str) -> Group:
    written = value.get("text")
    written = written if isinstance(written, list) else [written]
    prompt = prompt_of(data)
    return Group(prompt, tuple(completion(prompt, _spoken(words, f"{field}.text"), field) for words in written))
