"""Who chooses between two answers: a function that simulates people, or people through a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from accord.atomic import write_bytes
from accord.loop.sheet import Choice, Pair, read_choices
from accord.methods.context import Context
from accord.methods.judges import function_scorer
from accord.randomness import generator
from accord.records import ScoreRequest
from accord.rewards.scorers import FunctionScorer, Scorer, values_of

__all__ = ["Labeller", "labeller_of", "scores_of", "truth_of"]


class Labeller(Protocol):
    """`sources` is what its choices depend on besides the pairs (what -> content hash)."""

    sources: dict[str, str]

    def choose(self, pairs: Sequence[Pair], folder: Path) -> dict[str, Choice]:
        """A choice for every pair, by its id. `folder` is the label stage's."""
        ...


@dataclass(frozen=True, slots=True)
class ScoreLabeller:
    """Chooses by the scores of the two answers: the better one, or with a scale as Bradley-Terry,

        P(a) = sigmoid((score(a) - score(b)) / scale),

    drawn from the content of the pair, so the same pair gets the same label whenever it is asked. Without a scale equal
    scores are a tie.
    """

    scorer: Scorer
    scale: float | None
    seed: int
    sources: dict[str, str] = field(default_factory=dict)

    def choose(self, pairs: Sequence[Pair], folder: Path) -> dict[str, Choice]:
        scored = scores_of(self.scorer, pairs)
        return {pair.id: self._choice(pair, *scores) for pair, scores in zip(pairs, scored, strict=True)}

    def _choice(self, pair: Pair, a: float, b: float) -> Choice:
        if self.scale is None:
            return "tie" if a == b else "a" if a > b else "b"
        probability = 0.5 * (1.0 + math.tanh(0.5 * (a - b) / self.scale))
        draw = generator("loop-label", self.seed, pair.prompt_id, pair.a, pair.b).random()
        return "a" if draw < probability else "b"


@dataclass(frozen=True, slots=True)
class HumanLabeller:
    """People fill in a copy of the sheet; what the sheet said stays beside it, so changed texts are noticed."""

    sources: dict[str, str] = field(default_factory=dict)

    def choose(self, pairs: Sequence[Pair], folder: Path) -> dict[str, Choice]:
        """Raises: LabelsWanted until every row is filled in; DataError for rows that cannot be used."""
        sheet = folder / "sheet.jsonl"
        if not sheet.exists():
            write_bytes(sheet, (folder.with_name("sample") / "sheet.jsonl").read_bytes())
        return read_choices(sheet, pairs)


def labeller_of(context: Context) -> Labeller:
    """Who labels in a checked recipe. Raises ConfigError for a function that cannot be found."""
    config = context.recipe.loop
    assert config is not None
    if config.labeller == "human":
        return HumanLabeller()
    function = function_scorer(context, "loop.label_function", config.label_function)
    assert function is not None
    sources = {"label function": function.fingerprint}
    return ScoreLabeller(function, config.label_scale, context.seed, sources)


def truth_of(context: Context, online: str) -> FunctionScorer | None:
    """What is measured on held-out answers and never trained on: what simulated people value, else the online stage's
    gold function."""
    config = context.recipe.loop
    assert config is not None
    labelled = function_scorer(context, "loop.label_function", config.label_function)
    key = f"{online}.gold_function"
    return labelled or function_scorer(context, key, getattr(context.recipe, online).gold_function)


def scores_of(scorer: Scorer, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
    """(score of a, score of b) of every pair."""
    requests = [
        ScoreRequest(pair.prompt, text, finished, pair.prompt_id)
        for pair in pairs
        for text, finished in zip((pair.a, pair.b), pair.finished, strict=True)
    ]
    values = values_of(scorer, requests)
    return list(zip(values[::2], values[1::2], strict=True))
