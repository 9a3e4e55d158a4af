"""Formats with one answer per prompt, or none: dialogues, Alpaca, prompt and completion, documents, prompts."""

from __future__ import annotations

from accord.data.fields import (
    PROMPT_FIELDS,
    Row,
    check_order,
    completion,
    desirable,
    number,
    prompt_of,
    split_dialogue,
    text,
    turns,
    turns_or_text,
)
from accord.data.problems import UnusableRow, describe
from accord.records import Completion, Group, Message

__all__ = [
    "ANSWER_FIELDS",
    "LABEL_FIELDS",
    "SCORE_FIELDS",
    "read_alpaca",
    "read_dialogue",
    "read_document",
    "read_prompt",
    "read_prompt_completion",
    "read_seed_task",
]

ANSWER_FIELDS = ("completion", "response", "output", "answer", "std_answer")
LABEL_FIELDS = ("label", "labels", "desirable")
SCORE_FIELDS = ("score", "reward", "rating")


def _label(row: Row) -> bool | None:
    return desirable(row.get(*LABEL_FIELDS), row.name(*LABEL_FIELDS)) if row.has(*LABEL_FIELDS) else None


def _score(row: Row) -> float | None:
    return number(row.get(*SCORE_FIELDS), row.name(*SCORE_FIELDS)) if row.has(*SCORE_FIELDS) else None


def read_dialogue(row: Row) -> tuple[Group, ...]:
    """messages or conversations. With a label or score the last answer is judged, otherwise every answer is taught."""
    names = ("messages", "conversations", "conversation")
    field = row.name(*names)
    messages = turns(row.get(*names), field, row.left_out)
    system = row.get("system", "system_prompt")
    if isinstance(system, str) and system.strip() and messages[0].role != "system":
        messages = (Message("system", text(system, "system")), *messages)
    label, score = _label(row), _score(row)
    prompt, answer = split_dialogue(messages, judged=label is not None or score is not None)
    if not answer:
        check_order(prompt, field)
        return (Group(prompt),)
    return (Group(prompt, (completion(prompt, answer, field, label=label, score=score),)),)


def read_alpaca(row: Row) -> tuple[Group, ...]:
    """instruction (+ input) and output. A list of outputs is several demonstrations of one prompt."""
    field = row.name(*ANSWER_FIELDS)
    answers = row.get(field)
    if not isinstance(answers, list):
        return read_prompt_completion(row)
    prompt = prompt_of(row)
    if not answers:
        raise UnusableRow(field, describe(answers), "one or more answers", "Add an answer or delete the row.")
    row.left_out["(lists of answers without ranks or scores are read as demonstrations)"] += 1
    spoken = [(Message("assistant", text(answer, f"{field}[{i}]")),) for i, answer in enumerate(answers)]
    return (Group(prompt, tuple(completion(prompt, answer, field) for answer in spoken)),)


def read_prompt_completion(row: Row) -> tuple[Group, ...]:
    prompt, field = prompt_of(row), row.name(*ANSWER_FIELDS)
    answer = turns_or_text(row.get(field), field, "assistant", row.left_out)
    return (Group(prompt, (completion(prompt, answer, field, label=_label(row), score=_score(row)),)),)


def read_seed_task(row: Row) -> tuple[Group, ...]:
    """{instruction, instances: [{input, output}, ...]}: one group per instance."""
    instruction, instances = text(row.get("instruction"), "instruction"), row.get("instances")
    if not isinstance(instances, list) or not instances:
        raise UnusableRow("instances", describe(instances), "a list of {input, output}", "Correct the row.")
    groups = []
    for index, item in enumerate(instances):
        instance, field = Row(item, row.left_out), f"instances[{index}]"
        given = instance.get("input")
        asked = f"{instruction}\n\n{text(given, field + '.input')}" if given not in (None, "") else instruction
        prompt = (Message("user", asked),)
        answer = Message("assistant", text(instance.get("output"), field + ".output"))
        groups.append(Group(prompt, (completion(prompt, (answer,), field),)))
    return tuple(groups)


def read_document(row: Row) -> tuple[Group, ...]:
    """Text by itself: a completion of the empty prompt, with a label or a score if there is one."""
    field = row.name("text", "line")
    message = Message("assistant", text(row.get(field), field))
    return (Group((), (Completion((message,), label=_label(row), score=_score(row)),)),)


def read_prompt(row: Row) -> tuple[Group, ...]:
    """A prompt alone. Of a list of user turns meant to be asked one after another only the first can be used."""
    if row.has("line"):
        return (Group((Message("user", text(row.get("line"), "line")),)),)
    if row.has("turns") and not row.has(*PROMPT_FIELDS):
        asked = row.get("turns")
        if not isinstance(asked, list) or not asked:
            raise UnusableRow("turns", describe(asked), "a list of questions", "Correct the row.")
        row.left_out["later turns (their earlier answers are not in the file)"] += len(asked) - 1
        prompt = (Message("user", text(asked[0], "turns[0]")),)
    else:
        prompt = prompt_of(row)
        check_order(prompt, row.name(*PROMPT_FIELDS))
        if prompt[-1].role == "assistant":
            raise UnusableRow("prompt", "a last turn by assistant", "a last turn by user", "Delete the last turn.")
    reference = row.get("reference")
    if isinstance(reference, list):
        reference = reference[0] if reference else None
    return (Group(prompt, reference=text(reference, "reference") if reference else None),)
