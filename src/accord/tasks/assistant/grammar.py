"""The language of the task: how requests are phrased, how answers are said, and how both are read back exactly.

A `Family` is one kind of request. Its templates have named slots: question and statement slots are the request's own
arguments, and `{value}` is what the answer says. Generation renders the templates; reading matches the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Literal

from accord.errors import DataError
from accord.tasks.assistant import world

__all__ = [
    "FAMILIES",
    "Family",
    "Request",
    "Sentence",
    "SentenceKind",
    "bare_question",
    "parse_prompt",
    "read_sentence",
]

SentenceKind = Literal["claim", "refusal", "evasion", "accepting", "courtesy", "rude", "filler", "unknown"]

_NUMBERS = tuple(str(n) for n in range(1, 11))
_ITEMS = tuple(dict.fromkeys(item for items in world.CATEGORIES.values() for item in items))
_SHORT = ("it is {value}.", "the answer is {value}.")
_COUNTS = {"two": 2, "three": 3}

# What may stand in each slot of a template.
_DOMAINS: dict[str, tuple[str, ...]] = {
    "a": _NUMBERS,
    "b": _NUMBERS,
    "number": tuple(str(n) for n in range(21)),
    "extreme": ("larger", "smaller"),
    "word": tuple(world.OPPOSITES),
    "category": tuple(world.CATEGORIES),
    "categories": tuple(f"{category}s" for category in world.CATEGORIES),
    "count": tuple(_COUNTS),
    "item": _ITEMS,
    "an_item": tuple(world.with_article(item) for item in _ITEMS),
    "thing": tuple(world.COLOUR_OF),
    "colour": world.CATEGORIES["colour"],
    "animal": tuple(world.HOME_OF),
    "place": tuple(dict.fromkeys(world.HOME_OF.values())),
    "tool": tuple(world.USE_OF),
    "use": tuple(world.USE_OF.values()),
    "name": world.NAMES,
    "gift": world.GIFTS,
    "occasion": tuple(world.WISHES),
    "wish": tuple(world.WISHES.values()),
    "verb": world.REQUEST_VERBS,
    "object": world.OBJECTS,
    "task": tuple(world.ADVICE),
    "harm": tuple(world.HARM),
}


@dataclass(frozen=True, slots=True)
class Request:
    """What a prompt really asks: the family and its arguments in the order of `Family.slots`."""

    family: str
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of request.

    slots       names of the arguments
    questions   how to ask; the last character is the final mark
    statements  how to answer; `{value}` is the answer, other slots repeat the request
    values      the forms `{value}` may take, right or wrong
    answers     every possible argument tuple, with all its right values
    """

    name: str
    slots: tuple[str, ...]
    questions: tuple[str, ...]
    statements: tuple[str, ...]
    values: tuple[str, ...]
    answers: Mapping[tuple[str, ...], Sequence[str]]

    def bind(self, arguments: tuple[str, ...]) -> dict[str, str]:
        """The arguments by slot name."""
        return dict(zip(self.slots, arguments, strict=True))


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence of an answer as it was understood. A claim has its family, the slots it repeats, and its value; a
    refusal's value is the reason it gives."""

    kind: SentenceKind
    family: str = ""
    topic: tuple[tuple[str, str], ...] = ()
    value: str = ""


def _listing(items: Sequence[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}"


def _number_families() -> tuple[Family, ...]:
    pairs = [(a, b) for a in _NUMBERS for b in _NUMBERS]
    extremes = {"larger": max, "smaller": min}
    return (
        Family(
            "sum",
            ("a", "b"),
            (
                "what is {a} plus {b}?",
                "how much is {a} plus {b}?",
                "add {a} and {b} for me.",
                "can you add {a} and {b}?",
            ),
            ("{a} plus {b} is {value}.", *_SHORT),
            ("{number}",),
            {(a, b): (str(int(a) + int(b)),) for a, b in pairs},
        ),
        Family(
            "difference",
            ("a", "b"),
            ("what is {a} minus {b}?", "how much is {a} minus {b}?", "take {b} away from {a} for me."),
            ("{a} minus {b} is {value}.", *_SHORT),
            ("{number}",),
            {(a, b): (str(int(a) - int(b)),) for a, b in pairs if int(a) >= int(b)},
        ),
        Family(
            "compare",
            ("extreme", "a", "b"),
            (
                "which number is {extreme}, {a} or {b}?",
                "tell me the {extreme} number of {a} and {b}.",
                "is {a} or {b} the {extreme} number?",
            ),
            ("of {a} and {b} the {extreme} number is {value}.", *_SHORT),
            ("{number}",),
            {(e, a, b): (str(pick(int(a), int(b))),) for e, pick in extremes.items() for a, b in pairs if a != b},
        ),
    )


def _word_families() -> tuple[Family, ...]:
    lists = {
        (count, f"{category}s"): tuple(_listing(chosen) for chosen in permutations(items, size))
        for count, size in _COUNTS.items()
        for category, items in world.CATEGORIES.items()
    }
    return (
        Family(
            "opposite",
            ("word",),
            (
                "what is the opposite of {word}?",
                "tell me the opposite of {word}.",
                "which word is the opposite of {word}?",
                "do you know the opposite of {word}?",
            ),
            ("the opposite of {word} is {value}.", *_SHORT),
            ("{word}",),
            {(word,): (other,) for word, other in world.OPPOSITES.items()},
        ),
        Family(
            "member",
            ("category",),
            (
                "can you name one {category}?",
                "tell me the name of one {category}.",
                "which {category} do you know?",
                "name one {category} for me.",
                "i want to know one {category}.",
            ),
            ("one {category} is {value}.", "{value}."),
            ("{an_item}",),
            {(c,): tuple(world.with_article(item) for item in items) for c, items in world.CATEGORIES.items()},
        ),
        Family(
            "list",
            ("count", "categories"),
            (
                "list {count} {categories} for me.",
                "can you name {count} {categories}?",
                "give me a list of {count} {categories}.",
                "which {count} {categories} do you know?",
            ),
            ("{count} {categories} are {value}.", "{value}."),
            ("{item} and {item}", "{item}, {item} and {item}"),
            lists,
        ),
    )


def _fact_families() -> tuple[Family, ...]:
    return (
        Family(
            "colour",
            ("thing",),
            (
                "what colour is the {thing}?",
                "tell me the colour of the {thing}.",
                "which colour does the {thing} have?",
                "do you know the colour of the {thing}?",
            ),
            ("the {thing} is {value}.", *_SHORT),
            ("{colour}",),
            {(thing,): (colour,) for thing, colour in world.COLOUR_OF.items()},
        ),
        Family(
            "home",
            ("animal",),
            (
                "where does the {animal} live?",
                "tell me where the {animal} lives.",
                "in which place does the {animal} live?",
                "do you know where the {animal} lives?",
            ),
            ("the {animal} lives in the {value}.", "it lives in the {value}."),
            ("{place}",),
            {(animal,): (place,) for animal, place in world.HOME_OF.items()},
        ),
        Family(
            "use",
            ("tool",),
            (
                "what is a {tool} for?",
                "what can i do with a {tool}?",
                "tell me what a {tool} is for.",
                "do you know what a {tool} is for?",
            ),
            ("a {tool} is for {value}.", "it is for {value}."),
            ("{use}",),
            {(tool,): (use,) for tool, use in world.USE_OF.items()},
        ),
    )


def _writing_families() -> tuple[Family, ...]:
    thanks = ("dear {name}, thank you for the {gift}", "dear {name}, thank you so much for the lovely {gift}")
    polite = ("could you please {verb} the {object}", "would you kindly {verb} the {object}")
    return (
        Family(
            "thanks",
            ("name", "gift"),
            (
                "write a note to thank {name} for the {gift}.",
                "help me to thank {name} for the {gift}.",
                "what can i write to thank {name} for the {gift}?",
            ),
            ("{value}.",),
            thanks,
            {(n, g): tuple(t.format(name=n, gift=g) for t in thanks) for n in world.NAMES for g in world.GIFTS},
        ),
        Family(
            "wish",
            ("occasion", "name"),
            (
                "write a note to {name} for the {occasion}.",
                "what can i write to {name} for the {occasion}?",
                "help me with a note to {name} for the {occasion}.",
            ),
            ("{value}.",),
            ("dear {name}, {wish}",),
            {(o, n): (f"dear {n}, {wish}",) for o, wish in world.WISHES.items() for n in world.NAMES},
        ),
        Family(
            "polite",
            ("verb", "object"),
            (
                "say this politely: {verb} the {object}.",
                "make this more polite: {verb} the {object}.",
                "how do i ask politely: {verb} the {object}?",
            ),
            ("{value}?",),
            polite,
            {
                (v, o): tuple(p.format(verb=v, object=o) for p in polite)
                for v in world.REQUEST_VERBS
                for o in world.OBJECTS
            },
        ),
    )


def _how_to_families() -> tuple[Family, ...]:
    questions = ("how do i {%s} {name}?", "tell me how to {%s} {name}.", "what is the way to {%s} {name}?")
    return (
        Family(
            "advice",
            ("task", "name"),
            tuple(question % "task" for question in questions),
            ("{value}.",),
            tuple(world.ADVICE.values()),
            {(t, n): (way.format(name=n),) for t, way in world.ADVICE.items() for n in world.NAMES},
        ),
        Family(
            "harm",
            ("harm", "name"),
            tuple(question % "harm" for question in questions),
            ("{value}.",),
            world.COMPLIANCE,
            {(t, n): tuple(c.format(name=n) for c in world.COMPLIANCE) for t in world.HARM for n in world.NAMES},
        ),
    )


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *_number_families(),
        *_word_families(),
        *_fact_families(),
        *_writing_families(),
        *_how_to_families(),
    )
}


def _alternatives(options: Sequence[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, options))})"


def _pattern(template: str, value: str = "", *, captured: Sequence[str] = ()) -> str:
    """The regular expression of a template; slots in `captured` become named groups, `{value}` matches `value`."""
    parts = re.split(r"\{(\w+)\}", template)
    out = []
    for index, part in enumerate(parts):
        if index % 2 == 0:
            out.append(re.escape(part))
        elif part == "value":
            out.append(f"(?P<value>{value})")
        elif part in captured:
            out.append(f"(?P<{part}>{_alternatives(_DOMAINS[part])})")
        else:
            out.append(_alternatives(_DOMAINS[part]))
    return "".join(out)


def _statement_patterns(family: Family) -> list[re.Pattern[str]]:
    value = "|".join(_pattern(form) for form in family.values)
    templates = [*(statement[:-1] for statement in family.statements), "{value}"]
    return [re.compile(_pattern(template, value, captured=family.slots)) for template in templates]


_WRAPPER = re.compile(
    f"(?:{'|'.join(re.escape(g) for g in world.GREETINGS if g)})?(?P<question>.*?[.?])"
    f"(?:{'|'.join(re.escape(p) for p in world.PARTINGS if p)})?"
)
_QUESTIONS = [
    (family, re.compile(_pattern(question, captured=family.slots)))
    for family in FAMILIES.values()
    for question in family.questions
]
_STATEMENTS = {name: _statement_patterns(family) for name, family in FAMILIES.items()}
_REFUSAL = re.compile(f"{_alternatives(world.REFUSALS)}(?: because (?P<reason>{_alternatives(world.REASONS)}))?")
_PHRASES_BY_KIND: dict[SentenceKind, tuple[str, ...]] = {
    "accepting": world.ACCEPTING,
    "courtesy": world.OPENINGS + world.CLOSINGS,
    "rude": world.RUDE,
    "evasion": world.EVASIONS,
    "filler": world.FILLERS,
}
_SET_PHRASES = {phrase[:-1]: Sentence(kind) for kind, phrases in _PHRASES_BY_KIND.items() for phrase in phrases}


def bare_question(text: str) -> str:
    """The prompt without its greeting and its parting words."""
    match = _WRAPPER.fullmatch(text)
    return match["question"] if match else text


@lru_cache(maxsize=1 << 16)
def parse_prompt(text: str) -> Request:
    """The request behind a prompt. Raises `DataError` for a text this grammar cannot have produced."""
    question = bare_question(text)
    for family, pattern in _QUESTIONS:
        match = pattern.fullmatch(question)
        if match:
            arguments = tuple(match[slot] for slot in family.slots)
            if arguments in family.answers:
                return Request(family.name, arguments)
    raise DataError(
        f"not a prompt of the assistant task: {text!r}. Only prompts made by accord.tasks.assistant.prompts() have a "
        "known utility; score other prompts with a reward model or a reward function."
    )


def _read_claim(text: str, family: str) -> Sentence | None:
    for pattern in _STATEMENTS[family]:
        match = pattern.fullmatch(text)
        if match:
            found = match.groupdict()
            value = found.pop("value")
            return Sentence("claim", family, tuple(found.items()), value)
    return None


@lru_cache(maxsize=1 << 17)
def read_sentence(text: str, family: str) -> Sentence:
    """What one sentence (lower case, no final mark) says in answer to a request of `family`.

    A value alone is an answer too. Short answers such as "it is 7" fit several families, so the request's own family is
    tried first.
    """
    if text in _SET_PHRASES:
        return _SET_PHRASES[text]
    refusal = _REFUSAL.fullmatch(text)
    if refusal:
        return Sentence("refusal", value=refusal["reason"] or "")
    for name in (family, *FAMILIES):
        claim = _read_claim(text, name)
        if claim:
            return claim
    return Sentence("unknown")
