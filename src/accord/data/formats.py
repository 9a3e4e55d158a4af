"""The table of row formats: how to recognise each one and how to read it into Groups.

Order matters: the first format whose `detect` accepts a row is the row's format, so the specific ones come first. What
a row holds beyond what its format reads is counted, never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from accord.data.fields import PROMPT_FIELDS, Row
from accord.data.formats_answers import (
    ANSWER_FIELDS,
    LABEL_FIELDS,
    SCORE_FIELDS,
    read_alpaca,
    read_dialogue,
    read_document,
    read_prompt,
    read_prompt_completion,
    read_seed_task,
)
from accord.data.formats_canonical import read_canonical
from accord.data.formats_lists import LIST_FIELDS, read_label_studio, read_oasst, read_ranked
from accord.data.formats_pairs import (
    ANSWER_PAIRS,
    CHOSEN_FIELDS,
    REJECTED_FIELDS,
    read_comparison,
    read_hh,
    read_pair,
    read_tldr,
    read_verdict,
)
from accord.data.hh import is_transcript
from accord.errors import DataError
from accord.records import Group

__all__ = ["FORMATS", "Format", "detect_format", "format_named"]


@dataclass(frozen=True, slots=True)
class Format:
    """One way to lay out a row."""

    name: str
    description: str
    detect: Callable[[Row], bool]
    read: Callable[[Row], tuple[Group, ...]]


def _has_list(row: Row, *names: str) -> bool:
    return any(isinstance(row.peek(name), list) for name in names)


def _is_canonical(row: Row) -> bool:
    completions = row.peek("completions")
    return (
        isinstance(completions, list)
        and isinstance(row.peek("prompt"), list)
        and all(isinstance(item, dict) and "messages" in item for item in completions)
    )


def _is_pair(row: Row) -> bool:
    return row.has(*CHOSEN_FIELDS) and row.has(*REJECTED_FIELDS)


def _is_hh(row: Row) -> bool:
    return not row.has(*PROMPT_FIELDS) and is_transcript(row.peek("chosen")) and is_transcript(row.peek("rejected"))


FORMATS = (
    Format("accord", "Accord's own rows, as `accord data convert` writes them", _is_canonical, read_canonical),
    Format("hh", "HH-RLHF transcripts: chosen and rejected dialogues", _is_hh, read_hh),
    Format(
        "pairs", "prompt, chosen and rejected, as text or as messages; the prompt may be implicit", _is_pair, read_pair
    ),
    Format(
        "comparisons",
        "TL;DR comparisons: info (the post), summaries and choice",
        lambda row: row.has("summaries") and row.has("info"),
        read_comparison,
    ),
    Format(
        "tldr",
        "TL;DR posts: subreddit, title, post, and a summary if there is one",
        lambda row: row.has("subreddit") and row.has("title") and row.has("post"),
        read_tldr,
    ),
    Format(
        "verdict",
        "two answers (output_1/output_2, completion_a/completion_b, ...) and who won",
        lambda row: any(row.has(first) and row.has(second) for first, second in ANSWER_PAIRS),
        read_verdict,
    ),
    Format(
        "oasst",
        "OASST message trees with ranked replies",
        lambda row: isinstance(row.peek("prompt"), dict) and "replies" in row.peek("prompt"),  # type: ignore[operator]
        read_oasst,
    ),
    Format(
        "label-studio",
        "Label Studio exports: pairwise, ranker, choices and text area results",
        lambda row: isinstance(row.peek("annotations"), list) and isinstance(row.peek("data"), dict),
        read_label_studio,
    ),
    Format(
        "seed-tasks",
        "an instruction with instances of input and output",
        lambda row: row.has("instruction") and _has_list(row, "instances"),
        read_seed_task,
    ),
    Format(
        "ranked",
        "a prompt with a list of ranked or scored responses",
        lambda row: row.has(*PROMPT_FIELDS) and _has_list(row, *LIST_FIELDS),
        read_ranked,
    ),
    Format(
        "messages",
        "dialogues as messages of role and content (text or typed blocks), optionally with a label or score",
        lambda row: _has_list(row, "messages"),
        read_dialogue,
    ),
    Format(
        "sharegpt",
        "ShareGPT dialogues as conversations of from and value",
        lambda row: _has_list(row, "conversations", "conversation"),
        read_dialogue,
    ),
    Format(
        "alpaca",
        "Alpaca: instruction, an optional input, and output",
        lambda row: row.has("instruction") and row.has(*ANSWER_FIELDS),
        read_alpaca,
    ),
    Format(
        "prompt-completion",
        "a prompt (or question) and a completion (or response, answer), optionally with a label or score",
        lambda row: row.has(*PROMPT_FIELDS) and row.has(*ANSWER_FIELDS),
        read_prompt_completion,
    ),
    Format(
        "text",
        "text, optionally with a scalar reward or a label",
        lambda row: row.has("text") and not row.has(*PROMPT_FIELDS),
        read_document,
    ),
    Format(
        "prompts",
        "prompts alone, optionally with a reference answer",
        lambda row: row.has(*PROMPT_FIELDS, "turns", "line"),
        read_prompt,
    ),
)

MAPPABLE = sorted(
    {
        *PROMPT_FIELDS, *ANSWER_FIELDS, *LABEL_FIELDS, *SCORE_FIELDS, *LIST_FIELDS, *CHOSEN_FIELDS, *REJECTED_FIELDS,
        *(name for pair in ANSWER_PAIRS for name in pair),
        "system", "text", "margin", "reference", "preference", "info", "summaries", "choice", "subreddit", "title",
        "post",
    }
)  # fmt: skip


def detect_format(row: Row) -> Format | None:
    return next((format for format in FORMATS if format.detect(row)), None)


def format_named(name: str) -> Format:
    """The format of that name. Raises DataError with the nearest name and the list."""
    names = [format.name for format in FORMATS]
    if name in names:
        return FORMATS[names.index(name)]
    near = get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise DataError(f"--format {name}: there is no such format.{hint} The formats are: {', '.join(names)}.")
