"""Prompts, answers of controlled quality, demonstrations and the wider text a base model is trained on, all seeded."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Literal, TypeVar

import numpy as np

from accord.errors import DataError
from accord.randomness import generator
from accord.records import Completion, Group, Message, content_id
from accord.tasks.assistant import world
from accord.tasks.assistant.grammar import FAMILIES, Request, bare_question

__all__ = ["Prompt", "Split", "Style", "answer", "demonstrations", "pretraining_texts", "prompts", "split"]

Split = Literal["train", "heldout"]
Content = Literal["right", "wrong", "off_task", "evasion", "refusal"]
Tone = Literal["polite", "neutral", "rude"]
Length = Literal["brief", "rambling"]

_T = TypeVar("_T")

# How often each kind of request is asked.
_FREQUENCY = {
    "sum": 0.10,
    "difference": 0.07,
    "compare": 0.07,
    "opposite": 0.09,
    "member": 0.05,
    "list": 0.08,
    "colour": 0.07,
    "home": 0.05,
    "use": 0.05,
    "thanks": 0.06,
    "wish": 0.06,
    "polite": 0.07,
    "advice": 0.08,
    "harm": 0.10,
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as a person typed it, and what it really asks (known to the simulator, never shown to a model)."""

    text: str
    request: Request

    @property
    def group(self) -> Group:
        """The prompt as a `Group` without completions."""
        return Group(prompt=(Message("user", self.text),))


@dataclass(frozen=True, slots=True)
class Style:
    """The qualities of an answer.

    content  right: does what should be done, which is to refuse when the request is harmful, and to say why
             wrong: a false answer, or giving in to a harmful request
             off_task: says something about another request
             evasion: does not answer
             refusal: refuses, with no reason or any reason
    """

    content: Content = "right"
    tone: Tone = "neutral"
    length: Length = "brief"


def split(prompt: str) -> Split:
    """Which side a prompt is on: a fifth of all questions is held out. The hash ignores greeting and parting words, so
    no held-out question was ever seen in training behind another greeting."""
    return "heldout" if content_id(["assistant-split", bare_question(prompt)]) % 5 == 0 else "train"


def prompts(n: int, seed: int, side: Split) -> list[Prompt]:
    """`n` distinct prompts of one side; a longer list from the same seed starts with the shorter one.

    Raises: DataError when the grammar does not hold that many.
    """
    rng = generator("assistant-prompts", seed, side)
    found: dict[str, Prompt] = {}
    for _ in range(20 * n + 1000):
        if len(found) == n:
            break
        prompt = _draw_prompt(rng)
        if split(prompt.text) == side:
            found.setdefault(prompt.text, prompt)
    if len(found) < n:
        raise DataError(f"asked for {n} distinct {side} prompts, but only {len(found)} were found; ask for fewer")
    return list(found.values())


def answer(request: Request, style: Style, rng: np.random.Generator) -> str:
    """One answer to `request` in the given style, drawn with `rng`."""
    content = _content(request, style.content, rng)
    if style.length == "rambling":
        content = _ramble(content, rng)
    if style.tone == "rude":
        rude = _pick(world.RUDE, rng)
        return f"{rude} {content}" if rng.random() < 0.5 else f"{content} {rude}"
    if style.tone == "neutral":
        return content
    refuses = style.content == "refusal" or (style.content == "right" and request.family == "harm")
    if refuses or rng.random() < 0.5:
        return f"{content} {_pick(world.CLOSINGS, rng)}"
    return f"{_pick(world.ACCEPTING + world.OPENINGS, rng)} {content}"


def demonstrations(n: int, seed: int) -> list[Group]:
    """`n` training prompts, each answered by a person of mixed quality: the data for supervised fine-tuning.

    Most answers are on task and right, a third is polite, a tenth rude, a fifth rambling; harmful requests are refused
    only three times in five. This leaves preference learning room to improve on imitation.
    """
    rng = generator("assistant-demonstrations", seed)
    groups = []
    for prompt in prompts(n, seed, "train"):
        text = answer(prompt.request, _human_style(prompt.request, rng), rng)
        groups.append(Group(prompt.group.prompt, (Completion((Message("assistant", text),)),)))
    return groups


def pretraining_texts(n: int, seed: int) -> list[str]:
    """`n` short documents for a base model: facts, tables, letters, unanswered questions, dialogues, idle talk.

    They hold the words and facts of the world, but nothing in the chat format, and no held-out question.
    """
    rng = generator("assistant-pretraining", seed)
    writers = (_facts, _facts, _table, _letters, _questions, _dialogue, _dialogue, _talk)
    return [_pick(writers, rng)(rng) for _ in range(n)]


def _pick(options: Sequence[_T], rng: np.random.Generator) -> _T:
    return options[int(rng.integers(len(options)))]


@cache
def _arguments(family: str) -> tuple[tuple[str, ...], ...]:
    return tuple(FAMILIES[family].answers)


def _weighted(weights: Mapping[_T, float], rng: np.random.Generator) -> _T:
    options = list(weights)
    ends = list(accumulate(weights.values()))
    return options[bisect(ends, rng.random() * ends[-1], hi=len(options) - 1)]


def _draw_request(rng: np.random.Generator) -> Request:
    family = _weighted(_FREQUENCY, rng)
    return Request(family, _pick(_arguments(family), rng))


def _draw_question(request: Request, rng: np.random.Generator) -> str:
    family = FAMILIES[request.family]
    return _pick(family.questions, rng).format(**family.bind(request.arguments))


def _draw_prompt(rng: np.random.Generator) -> Prompt:
    request = _draw_request(rng)
    question = _draw_question(request, rng)
    return Prompt(_pick(world.GREETINGS, rng) + question + _pick(world.PARTINGS, rng), request)


def _state(request: Request, value: str, rng: np.random.Generator) -> str:
    family = FAMILIES[request.family]
    return _pick(family.statements, rng).format(**family.bind(request.arguments), value=value)


def _answer_value(request: Request, rng: np.random.Generator) -> str:
    """One of the right values; for a harmful request, one of the ways to give in."""
    return _pick(FAMILIES[request.family].answers[request.arguments], rng)


def _wrong_value(request: Request, rng: np.random.Generator) -> str:
    """A right value of another request of the same family that is wrong here."""
    family = FAMILIES[request.family]
    right = family.answers[request.arguments]
    while True:
        value = _pick(family.answers[_pick(_arguments(request.family), rng)], rng)
        if value not in right:
            return value


def _content(request: Request, content: str, rng: np.random.Generator) -> str:
    harmful = request.family == "harm"
    if content == "refusal" or (content == "right" and harmful):
        reason = world.HARM[request.arguments[0]] if content == "right" else _pick(("", *world.REASONS), rng)
        return _pick(world.REFUSALS, rng) + (f" because {reason}." if reason else ".")
    if content == "evasion":
        return _pick(world.EVASIONS, rng)
    if content == "off_task":
        other = _draw_request(rng)
        while other.family in (request.family, "harm"):
            other = _draw_request(rng)
        return _state(other, _answer_value(other, rng), rng)
    value = _answer_value(request, rng) if content == "right" or harmful else _wrong_value(request, rng)
    return _state(request, value, rng)


def _ramble(content: str, rng: np.random.Generator) -> str:
    """Idle sentences around the answer; one rambler in four says the answer twice."""
    first, second = (world.FILLERS[i] for i in rng.permutation(len(world.FILLERS))[:2].tolist())
    last = content if rng.random() < 0.25 else second
    return " ".join((first, content, last) if rng.random() < 0.5 else (content, first, last))


def _human_style(request: Request, rng: np.random.Generator) -> Style:
    weights: dict[Content, float]
    if request.family == "harm":
        weights = {"right": 0.45, "refusal": 0.15, "wrong": 0.32, "off_task": 0.04, "evasion": 0.04}
    else:
        weights = {"right": 0.68, "wrong": 0.17, "off_task": 0.06, "evasion": 0.05, "refusal": 0.04}
    tones: dict[Tone, float] = {"polite": 0.33, "neutral": 0.57, "rude": 0.10}
    lengths: dict[Length, float] = {"brief": 0.8, "rambling": 0.2}
    return Style(_weighted(weights, rng), _weighted(tones, rng), _weighted(lengths, rng))


# Kinds of request whose answer is a fact, and whose answer is a piece of writing or advice.
_FACTUAL = ("sum", "difference", "compare", "opposite", "member", "list", "colour", "home", "use")
_WRITTEN = ("thanks", "wish", "polite", "advice", "harm")


def _fact(family: str, rng: np.random.Generator) -> str:
    request = Request(family, _pick(_arguments(family), rng))
    known = FAMILIES[family]
    return known.statements[0].format(**known.bind(request.arguments), value=_answer_value(request, rng))


def _facts(rng: np.random.Generator) -> str:
    return " ".join(_fact(_pick(_FACTUAL, rng), rng) for _ in range(4))


def _table(rng: np.random.Generator) -> str:
    family = _pick(("sum", "difference", "compare"), rng)
    return " ".join(_fact(family, rng) for _ in range(5))


def _letters(rng: np.random.Generator) -> str:
    return " ".join(_fact(_pick(_WRITTEN, rng), rng) for _ in range(3))


def _train_prompt(rng: np.random.Generator) -> Prompt:
    while True:
        prompt = _draw_prompt(rng)
        if split(prompt.text) == "train":
            return prompt


def _questions(rng: np.random.Generator) -> str:
    return " ".join(_train_prompt(rng).text for _ in range(3))


def _dialogue(rng: np.random.Generator) -> str:
    asker, teller = _pick(world.NAMES, rng), _pick(world.NAMES, rng)
    prompt = _train_prompt(rng)
    style = Style(
        content=_pick(("right", "right", "right", "wrong", "off_task", "evasion", "refusal"), rng),
        tone=_pick(("polite", "neutral", "neutral", "rude"), rng),
        length=_pick(("brief", "rambling"), rng),
    )
    return f"{asker} asks: {prompt.text} {teller} says: {answer(prompt.request, style, rng)}"


def _talk(rng: np.random.Generator) -> str:
    phrases = (*world.FILLERS, *world.RUDE, *world.CLOSINGS, *world.OPENINGS, *world.ACCEPTING, *world.EVASIONS)
    return " ".join(_pick(phrases, rng) for _ in range(5))
