"""Scorers: the numbers they give, and failures that name the prompt instead of passing as a score."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from accord.data.templates import Template
from accord.errors import ConfigError, RewardError
from accord.models.load import reward_model_from
from accord.models.scratch_tokenizer import train_tokenizer
from accord.records import Message, Score, ScoreRequest
from accord.rewards.functions import load_function
from accord.rewards.scorers import FunctionScorer, ModelScorer, values_of
from models_support import tiny_model

TURNS = (Message("user", "hello"), Message("assistant", "hi"), Message("user", "how are you?"))


def request(prompt: str, completion: str, *, finished: bool = True) -> ScoreRequest:
    return ScoreRequest((Message("user", prompt),), completion, finished)


# --- functions -------------------------------------------------------------------------------------------------------


def test_a_function_is_given_the_prompts_text_and_the_completion_in_order() -> None:
    seen: list[Any] = []

    def score(prompt: Any, completion: str) -> float:
        seen.append((prompt, completion))
        return float(len(completion))

    assert values_of(FunctionScorer(score, "length"), [request("a", "xyz"), request("b", "")]) == [3.0, 0.0]
    assert seen == [("a", "xyz"), ("b", "")]


def test_a_prompt_of_several_messages_is_given_as_messages() -> None:
    seen: list[Any] = []
    scorer = FunctionScorer(lambda prompt, completion: float(seen.append(prompt) or 1), "seen")
    assert scorer.score([ScoreRequest(TURNS, "fine")]) == [Score(1.0)]
    assert seen == [[{"role": m.role, "content": m.content} for m in TURNS]]


def test_a_function_that_asks_is_told_whether_the_answer_ended_by_itself() -> None:
    def score(prompt: str, completion: str, finished: bool) -> float:
        return 1.0 if finished else -1.0

    requests = [request("a", "x"), request("a", "x", finished=False)]
    assert values_of(FunctionScorer(score, "ended"), requests) == [1.0, -1.0]


def test_any_number_is_a_score() -> None:
    for value in (1, True, torch.tensor(1.0)):
        assert FunctionScorer(lambda p, c, value=value: value, "one").score([request("a", "b")]) == [Score(1.0)]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda p, c: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda p, c: math.nan, "returned nan"),
        (lambda p, c: math.inf, "returned inf"),
        (lambda p, c: None, "returned None, a NoneType; expected a number"),
        (lambda p, c: "1", "returned '1', a str; expected a number"),
        (lambda p, c: sys.exit(0), "SystemExit: 0"),
        (lambda p: 1.0, "TypeError"),
    ],
)
def test_a_failing_function_names_the_prompt_the_completion_and_the_reason(
    function: Callable[..., float], reason: str
) -> None:
    scorer = FunctionScorer(function, "my_rewards:score")
    with pytest.raises(RewardError) as caught:
        values_of(scorer, [request("what is it?", "a thing"), request("and this?", "another")])
    message = str(caught.value)
    for part in ("my_rewards:score failed on 2 of 2 completions", reason, "'what is it?'", "'a thing'"):
        assert part in message
    assert "and this?" not in message


def test_one_failure_among_good_scores_is_a_value_with_an_error_and_stops_the_run() -> None:
    def score(prompt: str, completion: str) -> float:
        if prompt == "bad":
            raise ValueError("no such animal")
        return 2.0

    scorer = FunctionScorer(score, "animals")
    requests = [request("good", "x"), request("bad", "y"), request("good", "z")]
    first, failed, last = scorer.score(requests)
    assert (first, last) == (Score(2.0), Score(2.0))
    assert failed.value is None
    assert str(failed.error).startswith(f"ValueError: no such animal ({__file__}:")
    with pytest.raises(RewardError, match=r"(?s)animals failed on 1 of 3 .* prompt: 'bad'"):
        values_of(scorer, requests)


# --- functions by name -----------------------------------------------------------------------------------------------


def test_a_function_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_this_folder.py").write_text("def score(prompt, completion):\n    return 4.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert load_function("rewards_of_this_folder:score", "ppo.reward_function")("a", "b") == 4.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("math", "expected module:function"),
        (":sqrt", "expected module:function"),
        ("math:", "expected module:function"),
        ("no_such_module_here:score", "cannot import 'no_such_module_here'"),
        ("math:no_such_function", "'math' has no function 'no_such_function'"),
        ("math:pi", "'math' has no function 'pi'"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_with_its_key(spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_function(spec, "ppo.gold_function")
    assert str(caught.value).startswith(f"`ppo.gold_function` = {spec!r}: ")
    assert message in str(caught.value)


# --- reward models ---------------------------------------------------------------------------------------------------


def model_scorer(*, max_tokens: int = 40, budget: int = 4096) -> tuple[ModelScorer, Any, Any]:
    tokenizer = train_tokenizer(["hello, how are you? fine, thanks"] * 3, vocab_size=300)
    model = reward_model_from(tiny_model("llama", vocab_size=300), 0)
    template = Template.of(tokenizer, "auto")
    scorer = ModelScorer(
        model, template, micro_batch_tokens=budget, max_tokens=max_tokens, max_prompt_tokens=None, name="a reward model"
    )
    return scorer, model, tokenizer


REQUESTS = [
    ScoreRequest(TURNS, "fine, thanks"),
    request("hello", ""),
    request("how are you?", "fine", finished=False),
    request("hello", "<|user|> is text, and so is <eos>"),
]


def plain_scores(model: Any, tokenizer: Any, requests: Sequence[ScoreRequest]) -> list[float]:
    """The same through transformers alone: its own forward pass over the whole finished dialogue, one at a time."""
    scores = []
    for each in requests:
        turns = [{"role": m.role, "content": m.content} for m in each.prompt]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        ids += [*tokenizer.encode(each.completion, split_special_tokens=True), tokenizer.eos_token_id]
        with torch.no_grad():
            scores.append(float(model(input_ids=torch.tensor([ids])).logits[0, 0]))
    return scores


@pytest.mark.parametrize("budget", [16, 4096])
def test_a_reward_model_reads_the_finished_dialogue_whatever_the_micro_batches(budget: int) -> None:
    scorer, model, tokenizer = model_scorer(max_tokens=100, budget=budget)
    found = values_of(scorer, REQUESTS)
    assert found == pytest.approx(plain_scores(model, tokenizer, REQUESTS), abs=1e-5)
    assert len(set(found)) == len(found)


def test_a_prompt_that_is_too_long_loses_its_oldest_part_and_is_scored() -> None:
    """The oldest turn does not fit beside the others; without it the dialogue is the same."""
    scorer, _, _ = model_scorer()
    long = ScoreRequest((Message("user", "hello " * 60), *TURNS[1:]), "fine")
    other = ScoreRequest((Message("user", "fine " * 70), *TURNS[1:]), "fine")
    (a, b) = scorer.score([long, other])
    assert a.error is None and b.error is None and a.value == pytest.approx(b.value, abs=1e-6)


def test_an_answer_that_does_not_fit_is_an_error_for_that_answer_alone() -> None:
    scorer, _, _ = model_scorer()
    requests = [request("hello", "fine"), request("hello", "xyz" * 30), request("hello", "fine")]
    good, bad, again = scorer.score(requests)
    assert good.value is not None and good.value == pytest.approx(again.value, abs=1e-6)
    assert bad.value is None and bad.error is not None and "max_tokens is 40" in bad.error
    with pytest.raises(RewardError, match="failed on 1 of 3"):
        values_of(scorer, requests)


def test_a_reward_model_whose_weights_have_diverged_is_an_error() -> None:
    scorer, model, _ = model_scorer()
    with torch.no_grad():
        model.score.weight.fill_(math.nan)
    assert scorer.score([request("hello", "fine")]) == [Score(None, "the reward model returned nan")]
