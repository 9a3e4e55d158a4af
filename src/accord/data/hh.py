"""HH-RLHF transcripts: one string per dialogue, turns marked by "\\n\\nHuman:" and "\\n\\nAssistant:".

Source: Bai et al. 2022, arXiv:2204.05862 (the published files). The prompt is everything up to and including the last
"\\n\\nAssistant:"; both transcripts of a pair must share it. White space around a turn is layout, not content: chat
templates add their own, and keeping the leading space would change an answer's first token.
"""

from __future__ import annotations

import re
from itertools import pairwise

from accord.data.problems import UnusableRow, describe
from accord.records import Message

__all__ = ["is_transcript", "is_transcript_prompt", "parse_transcript", "split_pair"]

_MARK = re.compile(r"(?:\n\n|\A\s*)(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def is_transcript(value: object) -> bool:
    return isinstance(value, str) and value.lstrip().startswith(("Human:", "Assistant:")) and "\n\nAssistant:" in value


def is_transcript_prompt(value: str) -> bool:
    """A prompt in this form begins with a marked turn and ends with the answer's mark; less stays plain text."""
    return value.startswith("\n\nHuman:") and value.rstrip(" ").endswith("\n\nAssistant:")


def parse_transcript(value: str, field: str) -> tuple[Message, ...]:
    """The turns of a transcript. A last "Assistant:" with nothing after it marks where the answer goes: no turn."""
    marks = list(_MARK.finditer(value))
    if not marks or value[: marks[0].start()].strip():
        raise UnusableRow(
            field, describe(value), 'a transcript that starts with "\\n\\nHuman:"', "Correct the transcript."
        )
    ends = [mark.start() for mark in marks[1:]] + [len(value)]
    spoken = [(mark[1], value[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)]
    if spoken[-1] == ("Assistant", ""):
        spoken.pop()
    for index, (speaker, said) in enumerate(spoken):
        if not said:
            raise UnusableRow(f"{field} (turn {index + 1})", f"an empty turn by {speaker}", "text", "Delete the row.")
    for index, ((first, _), (second, _)) in enumerate(pairwise(spoken)):
        if first == second:
            raise UnusableRow(
                f"{field} (turn {index + 2})",
                f"two turns by {first} in a row",
                "turns that alternate",
                "Merge the turns.",
            )
    return tuple(Message(_ROLE[speaker], said) for speaker, said in spoken)


def split_pair(chosen: str, rejected: str) -> tuple[tuple[Message, ...], Message, Message]:
    """(prompt, chosen answer, rejected answer) of a pair of transcripts. Raises UnusableRow if they share no prompt."""
    answers, prompts = [], []
    for field, value in (("chosen", chosen), ("rejected", rejected)):
        head, mark, answer = value.rpartition("\n\nAssistant:")
        if not mark:
            raise UnusableRow(field, describe(value), 'a transcript with "\\n\\nAssistant:"', "Correct the transcript.")
        if not answer.strip() or "\n\nHuman:" in answer:
            found = "a transcript that ends with Human" if answer.strip() else "an empty final answer"
            raise UnusableRow(field, found, "a final answer by Assistant", "Delete the row.")
        prompts.append(head)
        answers.append(Message("assistant", answer.strip()))
    if prompts[0].strip() != prompts[1].strip():
        at = next((i for i, (a, b) in enumerate(zip(*prompts, strict=False)) if a != b), min(map(len, prompts)))
        found = f"a dialogue that differs from chosen's at character {at + 1}, before the last answer"
        raise UnusableRow("rejected", found, "the same dialogue up to the last answer", "Delete the row.")
    return parse_transcript(prompts[0], "chosen"), answers[0], answers[1]
