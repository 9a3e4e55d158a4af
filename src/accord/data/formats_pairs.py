"""Formats with two answers: pairs, HH transcripts, TL;DR comparisons, and two answers with a verdict."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from accord.data.fields import (
    PROMPT_FIELDS,
    Row,
    check_scores,
    completion,
    number,
    prompt_of,
    soft_label_of,
    text,
    turns_or_text,
)
from accord.data.hh import split_pair
from accord.data.problems import UnusableRow, describe
from accord.data.tldr import tldr_prompt
from accord.records import Group, Message

__all__ = [
    "ANSWER_PAIRS",
    "CHOSEN_FIELDS",
    "REJECTED_FIELDS",
    "read_comparison",
    "read_hh",
    "read_pair",
    "read_tldr",
    "read_verdict",
]

CHOSEN_FIELDS = ("chosen", "chosen_messages", "chosen_response", "best_answer")
REJECTED_FIELDS = ("rejected", "rejected_messages", "rejected_response", "best_incorrect_answer")
ANSWER_PAIRS = (
    ("completion_a", "completion_b"),
    ("response_a", "response_b"),
    ("answer_a", "answer_b"),
    ("conversation_a", "conversation_b"),
    ("output_1", "output_2"),
    ("response_1", "response_2"),
    ("answer_1", "answer_2"),
    ("response1", "response2"),
    ("answer1", "answer2"),
)
_VERDICT_FIELDS = ("preference", "winner", "label", "choice", "verdict", "selected")
_RATER = re.compile(r"annotator_?\d+")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who won: the first answer, the second, or nobody (a tie); how clearly; how surely."""

    winner: int | None  # 0, 1 or None = tie
    margin: float | None = None
    soft_label: float | None = None


TIE = Verdict(None, soft_label=0.5)

_WORDS = {
    "a-is-better": Verdict(0, margin=1.0),
    "a-is-slightly-better": Verdict(0, margin=0.5),
    "b-is-slightly-better": Verdict(1, margin=0.5),
    "b-is-better": Verdict(1, margin=1.0),
    **dict.fromkeys(("a", "left", "first", "model_a", "output_1", "response_1", "answer1"), Verdict(0)),
    **dict.fromkeys(("b", "right", "second", "model_b", "output_2", "response_2", "answer2"), Verdict(1)),
    **dict.fromkeys(("tie", "tie (bothbad)", "both", "equal", "same"), TIE),
}


def parse_verdict(value: object, field: str) -> Verdict:
    """A verdict in words, or as a number: 1 first, 2 second, 0 or 1.5 tie, and between 1 and 2 a soft label.

    v in (1, 2) says P(second is preferred) = v - 1, the convention of the AlpacaEval annotations.
    """
    word = _WORDS.get(str(value).strip().lower())
    if word is not None:
        return word
    expected = "1 or 2 (0 or 1.5 for a tie), a or b, left or right, tie, or a-is-(slightly-)better"
    try:
        level = number(value, field)
    except UnusableRow:
        raise UnusableRow(field, describe(value), expected, "Correct the verdict or delete the row.") from None
    if level in (0.0, 1.5):
        return TIE
    if not 1.0 <= level <= 2.0:
        raise UnusableRow(field, describe(value), expected, "Correct the verdict or delete the row.")
    second = level - 1.0
    if second in (0.0, 1.0):
        return Verdict(int(second))
    return Verdict(int(second > 0.5), soft_label=max(second, 1.0 - second))


def judged_pair(
    prompt: Sequence[Message],
    first: Sequence[Message],
    second: Sequence[Message],
    verdict: Verdict,
    fields: tuple[str, str],
    *,
    scores: tuple[float | None, float | None] = (None, None),
) -> Group:
    """A group of two, the winner first. A tie keeps the order given, has equal ranks and a soft label of one half."""
    ranks = (0, 0) if verdict.winner is None else (verdict.winner, 1 - verdict.winner)
    pair = [
        completion(prompt, messages, field, rank=rank, score=score)
        for messages, field, rank, score in zip((first, second), fields, ranks, scores, strict=True)
    ]
    if verdict.winner is not None and pair[0].messages == pair[1].messages:
        found = f"the same text as in {fields[0]}"
        raise UnusableRow(fields[1], found, "two different answers", "Delete the row: it prefers an answer to itself.")
    check_scores(pair, fields)
    pair.sort(key=lambda item: item.rank or 0)
    return Group(tuple(prompt), tuple(pair), margin=verdict.margin, soft_label=verdict.soft_label)


def _two_answers(row: Row, first: str, second: str) -> tuple[tuple[Message, ...], ...]:
    """(prompt, first, second). Whole dialogues share an implicit prompt: their longest common beginning."""
    left = turns_or_text(row.get(first), first, "assistant", row.left_out)
    right = turns_or_text(row.get(second), second, "assistant", row.left_out)
    if left[0].role == "assistant" or right[0].role == "assistant":
        return prompt_of(row), left, right
    common = 0
    while common < min(len(left), len(right)) and left[common] == right[common]:
        common += 1
    if common and left[common - 1].role == "assistant" and common in (len(left), len(right)):
        common -= 1  # one dialogue is the beginning of the other: what it ends with is still its answer
    prompt = left[:common]
    for name, rest in ((first, left[common:]), (second, right[common:])):
        if rest and rest[0].role != "assistant":
            found = f"dialogues that differ at turn {common + 1}, by {rest[0].role}"
            raise UnusableRow(name, found, "the same turns up to the answer", "Delete the row.")
    if row.has(*PROMPT_FIELDS) and prompt_of(row)[-1].content not in [message.content for message in prompt]:
        field = row.name(*PROMPT_FIELDS)
        raise UnusableRow(field, "another prompt than in the messages", "one prompt", "Delete one of the two.")
    return prompt, left[common:], right[common:]


def read_pair(row: Row) -> tuple[Group, ...]:
    """prompt/chosen/rejected in all its spellings; a margin column or two score columns give the margin, a soft_label
    column how likely it is that chosen is preferred."""
    fields = row.name(*CHOSEN_FIELDS), row.name(*REJECTED_FIELDS)
    prompt, chosen, rejected = _two_answers(row, *fields)
    margin = number(row.get("margin"), "margin") if row.has("margin") else None
    scores = [
        number(row.get(*names), row.name(*names)) if row.has(*names) else None
        for names in (
            ("score_chosen", "chosen_score", "chosen_rating"),
            ("score_rejected", "rejected_score", "rejected_rating"),
        )
    ]
    if margin is None and scores[0] is not None and scores[1] is not None:
        margin = scores[0] - scores[1]
    if margin is not None and margin < 0:
        raise UnusableRow(
            "margin", f"{margin:g}", "0 or more: chosen is the better answer", "Swap the answers or the scores."
        )
    verdict = Verdict(0, margin, soft_label_of(row))
    return (judged_pair(prompt, chosen, rejected, verdict, fields, scores=(scores[0], scores[1])),)


def read_hh(row: Row) -> tuple[Group, ...]:
    chosen, rejected = text(row.get("chosen"), "chosen"), text(row.get("rejected"), "rejected")
    prompt, left, right = split_pair(chosen, rejected)
    return (judged_pair(prompt, (left,), (right,), Verdict(0), ("chosen", "rejected")),)


def read_verdict(row: Row) -> tuple[Group, ...]:
    """Two answers with one verdict, or with one per rater: then one group per rater."""
    fields = next((pair for pair in ANSWER_PAIRS if row.has(*pair)), ANSWER_PAIRS[0])
    prompt, first, second = _two_answers(row, *fields)
    names = [row.name(*_VERDICT_FIELDS)] if row.has(*_VERDICT_FIELDS) else sorted(filter(_RATER.fullmatch, row))
    if not names:
        found = "two answers and no verdict"
        raise UnusableRow(
            "preference", found, f"one of {', '.join(_VERDICT_FIELDS)}", "Name it: --map preference=column."
        )
    verdicts = [parse_verdict(row.get(name), name) for name in names]
    return tuple(judged_pair(prompt, first, second, verdict, fields) for verdict in verdicts)


def _post_prompt(post: Row) -> tuple[Message, ...]:
    parts = [text(post.get(name), name) for name in ("subreddit", "title", "post")]
    return (Message("user", tldr_prompt(*parts)),)


def _summary(value: object, field: str) -> Message:
    """One space before the text, always: the published comparisons have it and the published demonstrations do not, and
    after "TL;DR:" it decides the answer's first token."""
    return Message("assistant", " " + text(value, field).strip())


def read_comparison(row: Row) -> tuple[Group, ...]:
    """{info: {subreddit, title, post}, summaries: [{text}, {text}], choice: 0 or 1}."""
    info = Row(row.get("info"), row.left_out)
    summaries, choice = row.get("summaries"), row.get("choice")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise UnusableRow("summaries", describe(summaries), "a list of two summaries", "Correct the row.")
    if choice not in (0, 1) or isinstance(choice, bool):
        raise UnusableRow("choice", describe(choice), "0 or 1, the index of the better summary", "Correct the choice.")
    fields = ("summaries[0].text", "summaries[1].text")
    answers = [
        (_summary(Row(item, row.left_out).get("text"), field),) for item, field in zip(summaries, fields, strict=True)
    ]
    return (judged_pair(_post_prompt(info), answers[0], answers[1], Verdict(int(choice)), fields),)


def read_tldr(row: Row) -> tuple[Group, ...]:
    prompt, names = _post_prompt(row), ("summary", "tldr", "completion", "label")
    if not row.has(*names):
        return (Group(prompt),)
    answer = _summary(row.get(*names), row.name(*names))
    return (Group(prompt, (completion(prompt, (answer,), row.name(*names)),)),)
