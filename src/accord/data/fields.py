"""The pieces every format is read from: text, numbers, labels and turns of one row, checked; errors name the field."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby

from accord.data.hh import is_transcript_prompt, parse_transcript
from accord.data.problems import UnusableRow, describe
from accord.records import Completion, Message

__all__ = [
    "PROMPT_FIELDS",
    "Row",
    "check_order",
    "check_scores",
    "completion",
    "desirable",
    "number",
    "prompt_of",
    "soft_label_of",
    "split_dialogue",
    "text",
    "turns",
    "turns_or_text",
]

PROMPT_FIELDS = (
    "prompt",
    "instruction",
    "question",
    "query",
    "conversations",
    "conversation",
    "messages",
    "input",
    "goal",
)

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

_LABELS = {
    True: ("true", "1", "1.0", "yes", "good", "desirable", "acceptable", "positive", "pos", "thumbs_up"),
    False: ("false", "0", "0.0", "-1", "no", "bad", "undesirable", "not acceptable", "negative", "neg", "thumbs_down"),
}
_LABEL_OF = {word: label for label, words in _LABELS.items() for word in words}


class Row:
    """One row's fields by lower-case name, which remembers what was used and counts what was left out.

    Null counts as absent, because tables with fixed columns (CSV, Parquet) cannot say "absent" in another way.
    """

    def __init__(self, value: object, left_out: Counter[str]) -> None:
        if not isinstance(value, Mapping):
            raise UnusableRow("row", describe(value), "an object with named fields", "Name the columns of each row.")
        self._fields = {_plain(key): item for key, item in value.items() if item is not None}
        self._used: set[str] = set()
        self.left_out = left_out

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def has(self, *names: str) -> bool:
        """Any of the names is there."""
        return not self._fields.keys().isdisjoint(names)

    def peek(self, name: str) -> object:
        return self._fields.get(name)

    def get(self, *names: str) -> object:
        """The first of the names that is there, marked as used; None when none is."""
        name = names[0] if len(names) == 1 else self.name(*names)
        self._used.add(name)
        return self._fields.get(name)

    def name(self, *names: str) -> str:
        """Which of the names this row uses (the first when it has none), for messages."""
        for name in names:  # the innermost loop of reading a file
            if name in self._fields:
                return name
        return names[0]

    def unused(self) -> list[str]:
        return [name for name in self._fields if name not in self._used]


@lru_cache(maxsize=1024)
def _plain(key: object) -> str:
    return str(key).strip().lower().replace(" ", "_")


def text(value: object, field: str) -> str:
    """Text with something in it that can be stored as UTF-8."""
    if not isinstance(value, str):
        raise UnusableRow(field, describe(value), "text", f"Fill in {field}, or name its column: --map {field}=column.")
    if not value.strip():
        raise UnusableRow(field, describe(value), "text", "Fill it in or delete the row.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"half of a surrogate pair (\\u{ord(value[error.start]):04x}) at character {error.start + 1}"
        raise UnusableRow(field, half, "whole characters", "Restore the character or delete the row.") from error
    return value


def soft_label_of(row: Row) -> float | None:
    """The probability that the first answer is the preferred one, where the row has it."""
    if not row.has("soft_label"):
        return None
    soft_label = number(row.get("soft_label"), "soft_label")
    if not 0.0 <= soft_label <= 1.0:
        raise UnusableRow("soft_label", f"{soft_label:g}", "a probability in [0, 1]", "Correct it.")
    return soft_label


def number(value: object, field: str) -> float:
    """A finite number; digits in a text column (CSV) count."""
    try:
        parsed = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        parsed = math.nan
    if not math.isfinite(parsed):
        raise UnusableRow(field, describe(value), "a finite number", "Correct it or delete the row.")
    return parsed


def desirable(value: object, field: str) -> bool:
    """A yes/no label in one of its usual spellings."""
    label = _LABEL_OF.get(str(value).strip().lower())
    if label is None or isinstance(value, list | dict):
        raise UnusableRow(field, describe(value), "true or false (or 1/0, yes/no, good/bad)", "Correct the label.")
    return label


def turns(value: object, field: str, left_out: Counter[str]) -> tuple[Message, ...]:
    """A list of {role, content} or {from, value}. Content may be text or a list of typed blocks; only text is kept."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UnusableRow(
            field, describe(value), "a list of messages", 'Use [{"role": "user", "content": "..."}, ...].'
        )
    read = (_turn(item, f"{field}[{index}]", left_out) for index, item in enumerate(value))
    return tuple(message for message in read if message is not None)


def _turn(value: object, field: str, left_out: Counter[str]) -> Message | None:
    if not isinstance(value, Mapping):
        raise UnusableRow(field, describe(value), "a message", 'Use {"role": "user", "content": "..."}.')
    spoken = value.get("role") if value.get("role") is not None else value.get("from")
    role = _ROLES.get(str(spoken).strip().lower())
    if role is None:
        raise UnusableRow(f"{field}.role", describe(spoken), "system, user, assistant or tool", "Correct the role.")
    content = value.get("content") if value.get("content") is not None else value.get("value")
    if isinstance(content, list):
        content = _blocks(content, f"{field}.content", left_out)
    if not content and value.get("tool_calls"):
        content = json.dumps(value["tool_calls"], ensure_ascii=False)
    if role == "system" and content == "":
        left_out["empty system messages"] += 1
        return None
    learn = _learn(value, field) if role == "assistant" else True
    return Message(role, text(content, f"{field}.content"), learn)


def _blocks(blocks: list[object], field: str, left_out: Counter[str]) -> str:
    """Text blocks and tool calls (which the model writes as text) joined; images, reasoning and the like counted."""
    kept = []
    for index, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if not isinstance(block, Mapping) or kind is None:
            raise UnusableRow(f"{field}[{index}]", describe(block), "a block with a type", "Correct the block.")
        if kind in ("text", "tool_call"):
            words = block.get("text") if block.get("text") is not None else block.get("value")
            kept.append(words if isinstance(words, str) else json.dumps(words, ensure_ascii=False))
        else:
            left_out[f"{kind} blocks"] += 1
    return "\n".join(kept)


def _learn(value: Mapping[str, object], field: str) -> bool:
    name = "loss_weight" if "loss_weight" in value else "weight"
    weight = value.get(name)
    if weight is None:
        return value.get("learn") is not False
    if weight not in (0, 1):
        raise UnusableRow(
            f"{field}.{name}", describe(weight), "0 or 1", "Accord trains on a turn or does not: round it."
        )
    return bool(weight)


def turns_or_text(value: object, field: str, role: str, left_out: Counter[str]) -> tuple[Message, ...]:
    """A message list, one message, or plain text spoken by `role`."""
    if isinstance(value, str):
        return (Message(role, text(value, field)),)
    if isinstance(value, Mapping):
        return turns([value], field, left_out)
    if isinstance(value, list):
        return turns(value, field, left_out)
    return (Message(role, text(value, field)),)


def prompt_of(row: Row) -> tuple[Message, ...]:
    """The prompt of a row under any of its usual names, with its system text, history and input."""
    name = row.name(*PROMPT_FIELDS)
    value = row.get(name)
    if isinstance(value, str) and is_transcript_prompt(value):
        row.left_out["(prompts were HH transcripts and are split into turns)"] += 1
        messages = parse_transcript(value, name)
    else:
        given = row.get("input") if name == "instruction" else None
        if given is not None and given != "":
            value = text(value, name) + "\n\n" + text(given, "input")
        messages = (*_history(row), *turns_or_text(value, name, "user", row.left_out))
    system = row.get("system", "system_prompt")
    if isinstance(system, str) and system.strip() and messages[0].role != "system":
        messages = (Message("system", text(system, "system")), *messages)
    return messages


def _history(row: Row) -> tuple[Message, ...]:
    """Earlier [question, answer] turns, as Alpaca files write them."""
    history = row.get("history")
    if not history:
        return ()
    if not isinstance(history, list) or any(not isinstance(turn, list) or len(turn) != 2 for turn in history):
        raise UnusableRow("history", describe(history), "a list of [question, answer]", "Correct the history.")
    spoken = ((role, said) for turn in history for role, said in zip(("user", "assistant"), turn, strict=True))
    return tuple(Message(role, text(said, "history")) for role, said in spoken)


_FOLLOWS = {
    "the start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}


def check_order(messages: Sequence[Message], field: str) -> None:
    """System first if at all, then user; no two user or assistant turns in a row; tool results follow the assistant."""
    before = "the start"
    for index, message in enumerate(messages):
        allowed = _FOLLOWS[before]
        if message.role not in allowed:
            found = f"a turn by {message.role} after {before if before == 'the start' else 'a turn by ' + before}"
            where = f"{field} (turn {index + 1})"
            raise UnusableRow(where, found, " or ".join(allowed), "Merge, reorder or delete the turns.")
        before = message.role


def completion(
    prompt: Sequence[Message],
    messages: Sequence[Message],
    field: str,
    *,
    rank: int | None = None,
    score: float | None = None,
    label: bool | None = None,
) -> Completion:
    """A completion that continues the prompt in a proper order of turns and ends with the assistant."""
    check_order((*prompt, *messages), field)
    if not messages or messages[-1].role != "assistant":
        found = f"a last turn by {messages[-1].role}" if messages else "no answer"
        raise UnusableRow(field, found, "a last turn by assistant", "Add the answer or drop the unanswered turn.")
    return Completion(tuple(messages), rank=rank, score=score, label=label)


def check_scores(completions: Sequence[Completion], fields: Sequence[str]) -> None:
    """Ranks and scores must not contradict each other: an answer of worse rank has no higher score. `fields` names
    the answers."""
    if all(item.score is None for item in completions):
        return
    judged = sorted(
        (item.rank, item.score, field)
        for item, field in zip(completions, fields, strict=True)
        if item.rank is not None and item.score is not None
    )
    limit, better = math.inf, ""
    for _, group in groupby(judged, key=lambda item: item[0]):
        tied = list(group)
        _, score, field = tied[-1]
        if score > limit:
            found = f"score {score:g} for an answer that is ranked below {better}"
            fix = "Correct the ranks (the lowest is the best) or the scores (the highest is the best)."
            raise UnusableRow(field, found, f"{limit:g} or less, the score of {better}", fix)
        _, limit, better = tied[0]


def split_dialogue(messages: Sequence[Message], *, judged: bool) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Prompt and completion of one dialogue.

    A demonstration teaches every assistant turn, so its prompt ends before the first one; a judgement (label, score) is
    about the last answer only, so its prompt ends before the last.
    """
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    cut = len(messages) if not answers else answers[-1] if judged else answers[0]
    return tuple(messages[:cut]), tuple(messages[cut:])
