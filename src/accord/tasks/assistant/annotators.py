"""Simulated annotators: they look at the parts of the true utility with their own tastes, with noise, and with lapses.

Every vote is a function of the pair's key and the annotator's name, so labels do not depend on batching or order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from accord.errors import DataError
from accord.randomness import generator
from accord.records import Completion, Group, Message
from accord.tasks.assistant.utility import TIE_MARGIN, Parts, utility

__all__ = [
    "PANEL",
    "VOTES_PER_PAIR",
    "Agreement",
    "Annotator",
    "Comparison",
    "Vote",
    "agreement",
    "annotate",
    "comparisons_to_groups",
]


@dataclass(frozen=True, slots=True)
class Annotator:
    """One person of the panel.

    taste          weight on each part of the utility; a negative brevity weight means a liking for long answers
    temperature    noise of the judgement, in utility units: P(prefers a) = sigmoid((taste . (a - b)) / temperature)
    lapse          fraction of votes given without looking
    position_bias  utility added to the answer shown first
    """

    name: str
    taste: Parts
    temperature: float
    lapse: float
    position_bias: float = 0.0


def _taste(**weights: float) -> Parts:
    return Parts(**{name: weights.get(name, 1.0) for name in Parts._fields})


PANEL = (
    Annotator("strict", _taste(correctness=1.6, courtesy=0.6), temperature=0.8, lapse=0.02),
    Annotator("warm", _taste(correctness=0.6, courtesy=2.0), temperature=1.0, lapse=0.05),
    Annotator("talkative", _taste(brevity=-0.4, form=0.8), temperature=1.0, lapse=0.05),
    Annotator("brisk", _taste(brevity=2.0, courtesy=0.3, repetition=1.5), temperature=0.9, lapse=0.04),
    Annotator("hasty", _taste(correctness=0.7, courtesy=0.2, form=1.5), temperature=1.3, lapse=0.10, position_bias=0.4),
)

VOTES_PER_PAIR = 3
"""How many of the panel judge each pair; odd, so that a majority exists."""


@dataclass(frozen=True, slots=True)
class Vote:
    """One annotator's choice: 0 = the first answer of the comparison, 1 = the second, whatever order was shown."""

    annotator: str
    choice: int
    shown_first: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers to one prompt and what people said about them. `finished` tells which were not cut by the limit."""

    prompt: str
    answers: tuple[str, str]
    finished: tuple[bool, bool]
    votes: tuple[Vote, ...]

    @property
    def chosen(self) -> int:
        """The index of the answer most votes went to."""
        return int(2 * sum(v.choice for v in self.votes) > len(self.votes))

    @property
    def soft_label(self) -> float:
        """The share of votes for the chosen answer."""
        return sum(v.choice == self.chosen for v in self.votes) / len(self.votes)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How reliable the labels are, as fractions of pairs.

    annotators  two annotators of one pair choose the same answer
    accuracy    a single vote goes to the answer with the higher true utility
    majority    the majority does
    Pairs whose utilities are tied count for `annotators` only; `num_pairs` counts the others.
    """

    annotators: float
    accuracy: float
    majority: float
    num_pairs: int


def annotate(
    prompt: str, answer_a: str, answer_b: str, *, pair_key: int | str, finished: tuple[bool, bool] = (True, True)
) -> Comparison:
    """`VOTES_PER_PAIR` annotators of the panel, drawn for this pair, compare two answers in an order of their own.

    Raises: DataError for a prompt that is not of this task.
    """
    parts = (
        utility(prompt, answer_a, finished=finished[0]).parts,
        utility(prompt, answer_b, finished=finished[1]).parts,
    )
    rng = generator("assistant-annotators", pair_key)
    order = rng.permutation(len(PANEL))[:VOTES_PER_PAIR].tolist()
    draws = rng.random((VOTES_PER_PAIR, 4)).tolist()
    votes = tuple(_vote(PANEL[index], parts, draw) for index, draw in zip(order, draws, strict=True))
    return Comparison(prompt, (answer_a, answer_b), finished, votes)


def _vote(annotator: Annotator, parts: tuple[Parts, Parts], draw: Sequence[float]) -> Vote:
    order_draw, lapse_draw, guess_draw, choice_draw = draw
    shown_first = int(order_draw < 0.5)
    if lapse_draw < annotator.lapse:
        return Vote(annotator.name, int(guess_draw < 0.5), shown_first)
    gap = sum(w * (b - a) for w, a, b in zip(annotator.taste, *parts, strict=True))
    gap += annotator.position_bias * (1 if shown_first == 1 else -1)
    prefers_second = 1.0 / (1.0 + math.exp(-gap / annotator.temperature))
    return Vote(annotator.name, int(choice_draw < prefers_second), shown_first)


def comparisons_to_groups(comparisons: Iterable[Comparison]) -> list[Group]:
    """Pairs for a reward model: the chosen answer first, the vote share as its soft label. Left out are identical
    answers, which teach nothing, and pairs with an empty one, which is no row of data."""
    return [
        Group(
            prompt=(Message("user", c.prompt),),
            completions=tuple(
                Completion((Message("assistant", c.answers[index]),), rank=rank)
                for rank, index in enumerate((c.chosen, 1 - c.chosen))
            ),
            soft_label=c.soft_label,
        )
        for c in comparisons
        if c.answers[0] != c.answers[1] and all(text.strip() for text in c.answers)
    ]


def agreement(comparisons: Sequence[Comparison]) -> Agreement:
    """Agreement of the annotators with each other and with the true utility.

    Raises: DataError when no pair has a better answer.
    """
    same: list[bool] = []
    hits: list[bool] = []
    majority: list[bool] = []
    for c in comparisons:
        same += [v.choice == w.choice for v, w in combinations(c.votes, 2)]
        a, b = (utility(c.prompt, text, finished=f).total for text, f in zip(c.answers, c.finished, strict=True))
        if abs(a - b) < TIE_MARGIN:
            continue
        better = int(b > a)
        hits += [v.choice == better for v in c.votes]
        majority.append(c.chosen == better)
    if not majority:
        raise DataError("no comparison has two answers of different utility, so there is no agreement to measure")
    return Agreement(sum(same) / len(same), sum(hits) / len(hits), sum(majority) / len(majority), len(majority))
