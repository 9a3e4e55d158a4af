"""Scorers: text in, one `Score` a completion out. A failure is a value with an error, never a silent 0."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from accord.data.order import micro_batches
from accord.data.templates import Template
from accord.data.tokenise import tokenise_groups
from accord.errors import ConfigError, RewardError
from accord.models.layout import collate
from accord.models.token_scores import head_scores
from accord.records import Completion, Group, Message, Score, ScoreRequest, content_id

__all__ = ["FunctionScorer", "ModelScorer", "RewardFunction", "Scorer", "load_function", "values_of"]

RewardFunction = Callable[..., Any]


class Scorer(Protocol):
    """Anything that judges completions. Scores come back in the order of the requests."""

    name: str

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]: ...


class ModelScorer:
    """A reward model with its own tokenizer and template.

    The answer is rendered as a finished assistant turn, so the head reads the end-of-turn token it was trained on;
    whether the policy really finished is the missing-EOS penalty's business. Prompts that are too long lose their
    oldest part, as when the reward model was trained; answers that do not fit are errors. Of a model with several heads
    the score is their mean, and its `members` are theirs.
    """

    def __init__(
        self,
        model: Any,
        template: Template,
        *,
        micro_batch_tokens: int,
        max_tokens: int,
        max_prompt_tokens: int | None,
        name: str,
    ) -> None:
        self.name = name
        self._model, self._template = model, template
        self._micro_batch_tokens = micro_batch_tokens
        self._limits: dict[str, Any] = {"max_tokens": max_tokens, "max_prompt_tokens": max_prompt_tokens}

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        groups = [Group(r.prompt, (Completion((Message("assistant", r.completion),)),)) for r in requests]
        tokenised = tokenise_groups(groups, self._template, loss_on="assistant", **self._limits)
        errors = {dropped.index: dropped.reason for dropped in tokenised.dropped}
        places = (index for index in range(len(requests)) if index not in errors)
        rows = list(zip(places, tokenised.groups, strict=True))
        results = [Score(None, errors.get(index)) for index in range(len(requests))]
        for rows_of_pass in micro_batches(rows, lambda row: row[1].num_tokens, lambda _: 1, self._micro_batch_tokens):
            batch = collate([group for _, group in rows_of_pass], layout="plain", pad_id=self._template.pad_id)
            with torch.no_grad():
                scores = head_scores(self._model, batch)
            for (index, _), value, members in zip(rows_of_pass, scores.mean(1).tolist(), scores.tolist(), strict=True):
                results[index] = (
                    Score(value, members=tuple(members) if len(members) > 1 else ())
                    if math.isfinite(value)
                    else Score(None, f"the reward model returned {value}")
                )
        return results


class FunctionScorer:
    """A Python function f(prompt, completion) -> float.

    `prompt` is the text of a single-message prompt, or a list of {"role", "content"} for longer ones. A function with a
    parameter `finished` is also told whether the answer ended by itself (False: it was cut by the length limit).
    `fingerprint` is a hash of its source (of its bytecode where there is none): an edited function is another run's.
    """

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.name = name
        self._function = function
        self.fingerprint = _fingerprint(function)
        self._wants_finished = "finished" in inspect.signature(function).parameters

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return [self._one(request) for request in requests]

    def _one(self, request: ScoreRequest) -> Score:
        extra = {"finished": request.finished} if self._wants_finished else {}
        try:
            result = self._function(_plain(request.prompt), request.completion, **extra)
            if isinstance(result, str):
                raise TypeError(f"returned the text {result!r}, expected a number")
            value = float(result)
        except (Exception, SystemExit) as error:  # the user's code may raise anything: a counted, named failure
            place = traceback.extract_tb(error.__traceback__)[-1]
            return Score(None, f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})")
        return Score(value) if math.isfinite(value) else Score(None, f"returned {value}")


def values_of(scorer: Scorer, requests: Sequence[ScoreRequest]) -> list[float]:
    """The scores as numbers. Raises RewardError naming the first failing prompt and how many failed."""
    scores = scorer.score(requests)
    failed = [(request, score) for request, score in zip(requests, scores, strict=True) if score.value is None]
    if failed:
        request, score = failed[0]
        raise RewardError(
            f"{scorer.name} failed on {len(failed)} of {len(requests)} completions; the first: {score.error}\n"
            f"  prompt: {_plain(request.prompt)!r}\n  completion: {request.completion!r}"
        )
    return [score.value for score in scores if score.value is not None]


def load_function(spec: str, key: str) -> RewardFunction:
    """The function behind `module:function`, looked up on the import path and in the current folder."""
    module_name, colon, name = spec.partition(":")
    if not colon or not module_name or not name:
        raise ConfigError(f"`{key}` = {spec!r}: expected module:function, for example my_rewards:score")
    # A console script starts with its own folder on the path, where `python -m` has the current one.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, which an installed command does not look in
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"`{key}` = {spec!r}: cannot import {module_name!r} ({error}); "
            "it must be installed, in the current folder, or in a folder on PYTHONPATH"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"`{key}` = {spec!r}: {module_name!r} has no function {name!r}")
    return function


def _fingerprint(function: RewardFunction) -> str:
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        text = repr(getattr(getattr(function, "__code__", None), "co_code", type(function).__qualname__))
    return f"{content_id(text):016x}"


def _plain(prompt: Sequence[Message]) -> Any:
    if len(prompt) == 1:
        return prompt[0].content
    return [{"role": m.role, "content": m.content} for m in prompt]
