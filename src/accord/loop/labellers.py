"""Who chooses between two answers: people through a file, a function that simulates them, or a language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from accord.atomic import write_bytes
from accord.config import JudgeConfig
from accord.loop.sheet import Choice, Labels, Pair, read_choices
from accord.methods.context import Context
from accord.methods.judges import function_scorer
from accord.randomness import generator
from accord.records import ScoreRequest
from accord.rewards.http import Client
from accord.rewards.remote import Journal, judge_scorer
from accord.rewards.scorers import FunctionScorer, Scorer, failures_of, values_of

__all__ = ["Labeller", "labeller_of", "scores_of", "truth_of"]


class Labeller(Protocol):
    """`sources` is what its choices depend on besides the pairs (what -> content hash)."""

    @property
    def sources(self) -> Mapping[str, str]: ...

    def choose(self, pairs: Sequence[Pair], folder: Path) -> Labels:
        """A choice for every pair, or why there is none. `folder` is the label stage's."""
        ...


@dataclass(frozen=True, slots=True)
class ScoreLabeller:
    """Chooses by the scores of the two answers: the better one, or with a scale as Bradley-Terry,

        P(a) = sigmoid((score(a) - score(b)) / scale),

    drawn from the content of the pair, so the same pair gets the same label whenever it is asked. Without a scale equal
    scores are a tie. A pair with an answer that could not be scored has no choice.
    """

    scorer: Scorer
    scale: float | None
    seed: int
    sources: dict[str, str] = field(default_factory=dict)
    max_failed_fraction: float = 0.0

    def choose(self, pairs: Sequence[Pair], folder: Path) -> Labels:
        """Raises: RewardError naming the first failure when more than `max_failed_fraction` of the answers failed."""
        requests = _requests(pairs)
        scores = self.scorer.score(requests)
        failures_of(self.scorer, requests, scores, max_fraction=self.max_failed_fraction)
        choices: dict[str, Choice] = {}
        failures: dict[str, str] = {}
        for pair, a, b in zip(pairs, scores[::2], scores[1::2], strict=True):
            if a.value is None or b.value is None:
                failures[pair.id] = a.error or b.error or "no reason given"
            else:
                choices[pair.id] = self._choice(pair, a.value, b.value)
        return Labels(choices, failures)

    def _choice(self, pair: Pair, a: float, b: float) -> Choice:
        if self.scale is None:
            return "tie" if a == b else "a" if a > b else "b"
        probability = 0.5 * (1.0 + math.tanh(0.5 * (a - b) / self.scale))
        draw = generator("loop-label", self.seed, pair.prompt_id, pair.a, pair.b).random()
        return "a" if draw < probability else "b"


@dataclass(frozen=True, slots=True)
class JudgeLabeller:
    """A language model scores both answers, and the higher score is chosen. What it said is kept in the label stage's
    folder, so it is not asked again when the stage is continued."""

    config: JudgeConfig
    client: Client
    max_failed_fraction: float
    say: Callable[[str], None]
    sources: dict[str, str] = field(default_factory=dict)

    def choose(self, pairs: Sequence[Pair], folder: Path) -> Labels:
        self.say(f"prompts and answers are sent to {self.client.url}")
        scorer = judge_scorer(self.config, self.client, Journal(folder / "scores-judge.jsonl"))
        return ScoreLabeller(scorer, None, 0, max_failed_fraction=self.max_failed_fraction).choose(pairs, folder)


@dataclass(frozen=True, slots=True)
class HumanLabeller:
    """People fill in a copy of the sheet; what the sheet said stays beside it, so changed texts are noticed."""

    sources: dict[str, str] = field(default_factory=dict)

    def choose(self, pairs: Sequence[Pair], folder: Path) -> Labels:
        """Raises: LabelsWanted until every row is filled in; DataError for rows that cannot be used."""
        sheet = folder / "sheet.jsonl"
        if not sheet.exists():
            write_bytes(sheet, (folder.with_name("sample") / "sheet.jsonl").read_bytes())
        return Labels(read_choices(sheet, pairs))


def labeller_of(context: Context) -> Labeller:
    """Who labels in a checked recipe. Raises ConfigError for a function that cannot be found, or a token that is not
    set."""
    config = context.recipe.loop
    assert config is not None
    if config.labeller == "human":
        return HumanLabeller()
    if config.judge is not None:
        return JudgeLabeller(config.judge, Client(config.judge, "loop.judge"), config.max_failed_fraction, context.say)
    function = function_scorer(context, "loop.label_function", config.label_function)
    assert function is not None
    sources = {"label function": function.fingerprint}
    return ScoreLabeller(function, config.label_scale, context.seed, sources, config.max_failed_fraction)


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
    values = values_of(scorer, _requests(pairs))
    return list(zip(values[::2], values[1::2], strict=True))


def _requests(pairs: Sequence[Pair]) -> list[ScoreRequest]:
    """a and b of the first pair, a and b of the second, and so on."""
    return [
        ScoreRequest(pair.prompt, text, finished, pair.prompt_id)
        for pair in pairs
        for text, finished in zip((pair.a, pair.b), pair.finished, strict=True)
    ]
