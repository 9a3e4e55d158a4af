"""Scorers: text in, one `Score` a completion out. A failure is a value with an error, never a silent 0."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from accord.data.order import micro_batches
from accord.data.templates import Template
from accord.data.tokenise import tokenise_groups
from accord.errors import RewardError
from accord.models.layout import collate
from accord.models.memory import one_pass
from accord.models.offload import in_use
from accord.models.token_scores import head_scores
from accord.phases import phase
from accord.records import Completion, Group, Message, Score, ScoreRequest, content_id

__all__ = [
    "FunctionScorer",
    "JudgingModel",
    "ModelScorer",
    "NoScorer",
    "RewardFunction",
    "Scorer",
    "TokenFunctionScorer",
    "failures_of",
    "fingerprint",
    "plain",
    "values_of",
]

RewardFunction = Callable[..., Any]


class Scorer(Protocol):
    """Anything that judges completions. Scores come back in the order of the requests."""

    name: str
    wants_tokens: bool  # whether requests must carry their tokens

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]: ...


class ModelScorer:
    """A reward model with its own tokenizer and template.

    The answer is rendered as a finished assistant turn, so the head reads the end-of-turn token it was trained on;
    whether the policy really finished is the missing-EOS penalty's business. Prompts that are too long lose their
    oldest part, as when the reward model was trained; answers that do not fit are errors. Of a model with several heads
    the score is their mean, and its `members` are theirs. With `offload` the model is on that device only while it
    scores.
    """

    wants_tokens = False

    def __init__(
        self,
        model: Any,
        template: Template,
        *,
        micro_batch_tokens: int,
        max_tokens: int,
        max_prompt_tokens: int | None,
        name: str,
        offload: torch.device | None = None,
    ) -> None:
        self.name = name
        self._model, self._template = model, template
        self._micro_batch_tokens, self._offload = micro_batch_tokens, offload
        self._limits: dict[str, Any] = {"max_tokens": max_tokens, "max_prompt_tokens": max_prompt_tokens}

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        with in_use(self._model, self._offload):
            return self._score(requests)

    def _score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        groups = [Group(r.prompt, (Completion((Message("assistant", r.completion),)),)) for r in requests]
        with phase("data"):
            tokenised = tokenise_groups(groups, self._template, loss_on="assistant", **self._limits)
        errors = {dropped.index: dropped.reason for dropped in tokenised.dropped}
        places = (index for index in range(len(requests)) if index not in errors)
        rows = list(zip(places, tokenised.groups, strict=True))
        results = [Score(None, errors.get(index)) for index in range(len(requests))]
        for rows_of_pass in micro_batches(rows, lambda row: row[1].num_tokens, lambda _: 1, self._micro_batch_tokens):
            with phase("data"):
                batch = collate(
                    [group for _, group in rows_of_pass],
                    layout="plain", pad_id=self._template.pad_id, device=self._model.device,
                )  # fmt: skip
            with torch.no_grad(), one_pass([group for _, group in rows_of_pass], f"scoring by {self.name}"):
                scores = head_scores(self._model, batch)
            for (index, _), value, members in zip(rows_of_pass, scores.mean(1).tolist(), scores.tolist(), strict=True):
                results[index] = (
                    Score(value, members=tuple(members) if len(members) > 1 else ())
                    if math.isfinite(value)
                    else Score(None, f"the reward model returned {value}")
                )
        return results


@dataclass(frozen=True, slots=True)
class JudgingModel:
    """One reward model, and the scorer that asks it alone."""

    scorer: Scorer
    model: Any


class FunctionScorer:
    """A Python function f(prompt, completion) -> float.

    `prompt` is the text of a single-message prompt, or a list of {"role", "content"} for longer ones. A function with a
    parameter `finished` is also told whether the answer ended by itself (False: it was cut by the length limit); one
    with a parameter `messages` is given the whole conversation, answer included, as a list of {"role", "content"}.
    `fingerprint` is a hash of its source (of its bytecode where there is none): an edited function is another run's.
    """

    wants_tokens = False

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.name = name
        self._function = function
        self.fingerprint = fingerprint(function)
        self._wanted = inspect.signature(function).parameters.keys() & {"finished", "messages"}

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return [self._one(request) for request in requests]

    def _one(self, request: ScoreRequest) -> Score:
        known = {"finished": request.finished, "messages": _turns(request)}
        extra = {name: known[name] for name in self._wanted}
        try:
            value = _number(self._function(plain(request.prompt), request.completion, **extra))
        except (Exception, SystemExit) as error:  # the user's code may raise anything: a counted, named failure
            return Score(None, _said(error))
        return Score(value) if math.isfinite(value) else Score(None, f"returned {value}")


class TokenFunctionScorer:
    """A Python function f(prompt, tokens) -> one float for each token; the completion's score is their sum.

    `tokens` is the text of each token, the end token included where there is one; `prompt` is as for `FunctionScorer`.
    """

    wants_tokens = True

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.name = name
        self._function = function
        self.fingerprint = fingerprint(function)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return [self._one(request) for request in requests]

    def _one(self, request: ScoreRequest) -> Score:
        try:
            rewards = _numbers(self._function(plain(request.prompt), list(request.tokens)))
        except (Exception, SystemExit) as error:
            return Score(None, _said(error))
        if len(rewards) != len(request.tokens):
            return Score(None, f"returned {len(rewards)} rewards for {len(request.tokens)} tokens")
        bad = [value for value in rewards if not math.isfinite(value)]
        return Score(None, f"returned {bad[0]} for a token") if bad else Score(math.fsum(rewards), tokens=rewards)


class NoScorer:
    """Where the rewards of an environment are all there is: nothing is added to them."""

    wants_tokens = False

    def __init__(self, name: str) -> None:
        self.name = name

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return [Score(0.0) for _ in requests]


def failures_of(
    scorer: Scorer, requests: Sequence[ScoreRequest], scores: Sequence[Score], *, max_fraction: float = 0.0
) -> list[int]:
    """Where scoring failed. Raises RewardError, naming the first failing prompt and how many failed, when more than
    `max_fraction` of the completions did."""
    failed = [index for index, score in enumerate(scores) if score.value is None]
    if len(failed) > max_fraction * len(requests):
        request, score = requests[failed[0]], scores[failed[0]]
        raise RewardError(
            f"{scorer.name} failed on {len(failed)} of {len(requests)} completions; the first: {score.error}\n"
            f"  prompt: {plain(request.prompt)!r}\n  completion: {request.completion!r}"
        )
    return failed


def values_of(scorer: Scorer, requests: Sequence[ScoreRequest]) -> list[float]:
    """The scores as numbers. Raises RewardError as `failures_of` when one fails."""
    scores = scorer.score(requests)
    failures_of(scorer, requests, scores)
    return [score.value for score in scores if score.value is not None]


def fingerprint(function: Callable[..., Any]) -> str:
    """A hash of a function's or a class's source (of its bytecode where there is none)."""
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        text = repr(getattr(getattr(function, "__code__", None), "co_code", type(function).__qualname__))
    return f"{content_id(text):016x}"


def _turns(request: ScoreRequest) -> list[dict[str, str]]:
    """The conversation up to its last answer."""
    turns = (*request.prompt, Message("assistant", request.completion))
    return [{"role": m.role, "content": m.content} for m in turns]


def plain(prompt: Sequence[Message]) -> Any:
    """A prompt as people's functions take it: the text of a single message, else {"role", "content"} of each."""
    if len(prompt) == 1:
        return prompt[0].content
    return [{"role": m.role, "content": m.content} for m in prompt]


class _NotNumbers(TypeError):
    """What a function returned cannot be used: its own fault, wherever that was noticed."""


def _number(value: Any) -> float:
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise _NotNumbers(f"returned {value!r:.100}, a {type(value).__name__}; expected a number")


def _numbers(values: Any) -> tuple[float, ...]:
    try:
        given = iter(values)
    except TypeError:
        raise _NotNumbers(f"returned {values!r:.100}, a {type(values).__name__}; expected a number a token") from None
    return tuple(_number(value) for value in given)


def _said(error: BaseException) -> str:
    if isinstance(error, _NotNumbers):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
