"""Comparing models: who wins by hand-made scores, and distances against a second computation row by row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from accord.data.templates import Template
from accord.errors import RewardError
from accord.evaluation.compare import Answers, Contestant, answers_of, compare, describe, kl_to, reference_perplexity
from accord.records import Group, Interval, Message, SampledCompletion, ScoreRequest, TokenGroup
from accord.rewards.scorers import FunctionScorer
from accord.rollout.sampling import Sampling
from models_support import EOS_ID, tiny_model, token_group, word_tokenizer

PROMPTS = ("w2 w3", "w4 w5 w6 w7 w8", "w9", "w10 w11 w12")


def answers(name: str, scores: list[float], texts: list[str] | None = None) -> Answers:
    texts = texts or ["text"] * len(scores)
    requests = tuple(
        ScoreRequest((Message("user", f"p{i}"),), text, finished=i % 2 == 0, prompt_id=i)
        for i, text in enumerate(texts)
    )
    sampled = tuple(SampledCompletion((1,) * (i + 1), (0.0,) * (i + 1), "stop") for i in range(len(texts)))
    return Answers(name, (), sampled, requests, {"judge": tuple(scores)})


def prompts() -> list[tuple[Group, TokenGroup]]:
    tokenizer = word_tokenizer()
    groups = [Group((Message("user", text),)) for text in PROMPTS]
    return [(g, TokenGroup(tuple(tokenizer.encode(t)), (), g.prompt_id)) for g, t in zip(groups, PROMPTS, strict=True)]


def contestant(name: str, seed: int) -> Contestant:
    model = tiny_model("gpt2", dtype=torch.float64, seed=seed)
    return Contestant(name, model, Template.of(word_tokenizer(), "auto"))


def sampled(who: Contestant, **changes: Any) -> Answers:
    sampling = Sampling(7, **{"temperature": 1.0, "stop_ids": (EOS_ID,), **changes})
    judges = {"length": FunctionScorer(lambda p, c: float(len(c)), "length")}
    return answers_of(who, prompts(), sampling, judges, ("evaluate", 0))  # type: ignore[arg-type]


# --- who wins --------------------------------------------------------------------------------------------------------


def test_wins_ties_and_differences_are_counted_prompt_by_prompt() -> None:
    """Gaps 1, 0, -2, 3: two wins, one tie, one loss: win rate (1 + .5 + 0 + 1) / 4; mean difference 2/4."""
    result = compare(answers("b", [1, 5, 0, 3]), answers("a", [0, 5, 2, 0]), "judge", 0.0)
    assert (result.name, result.base, result.judge) == ("b", "a", "judge")
    assert (result.wins, result.ties) == (0.5, 0.25)
    assert result.win_rate.value == 0.625 and result.win_rate.n == 4
    assert result.difference.value == 0.5
    assert result.difference.low < 0 < result.difference.high


@pytest.mark.parametrize(("margin", "ties"), [(0.0, 0.25), (0.99, 0.25), (1.0, 0.5), (2.0, 0.75), (3.0, 1.0)])
def test_differences_up_to_the_margin_are_ties(margin: float, ties: float) -> None:
    result = compare(answers("b", [1, 5, 0, 3]), answers("a", [0, 5, 2, 0]), "judge", margin)
    assert result.ties == ties


def test_the_other_way_round_a_win_is_a_loss() -> None:
    a, b = answers("a", [0, 5, 2, 0, 1]), answers("b", [1, 5, 0, 3, 2])
    one, other = compare(b, a, "judge", 0.0), compare(a, b, "judge", 0.0)
    assert one.win_rate.value == pytest.approx(1 - other.win_rate.value)
    assert one.difference.value == pytest.approx(-other.difference.value)
    assert one.p_value == pytest.approx(other.p_value)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_equal_models_give_equal_answers_under_any_name() -> None:
    one, other = sampled(contestant("a", 1)), sampled(contestant("b", 1))
    assert one.sampled == other.sampled and one.scores == other.scores
    assert compare(one, other, "length", 0.0).ties == 1.0
    assert sampled(contestant("a", 2)).sampled != one.sampled


def test_answers_stand_in_the_prompts_order_with_their_text_and_score() -> None:
    found = sampled(contestant("a", 1))
    tokenizer = word_tokenizer()
    for (group, tokens), made, request, full, score in zip(
        prompts(), found.sampled, found.requests, found.tokens, found.scores["length"], strict=True
    ):
        assert request.prompt == group.prompt and request.prompt_id == group.prompt_id
        assert full.prompt_ids == tokens.prompt_ids and full.completions[0].ids == made.ids
        assert request.completion.split() == tokenizer.decode(made.ids, skip_special_tokens=True).split()
        assert request.finished == (made.ids[-1] == EOS_ID)
        assert score == len(request.completion)


def test_a_judge_that_fails_stops_the_evaluation_and_names_the_prompt() -> None:
    judges = {"broken": FunctionScorer(lambda p, c: math.nan if p == PROMPTS[2] else 0.0, "broken")}
    with pytest.raises(RewardError, match=rf"broken failed on 1 of 4 .*returned nan\n *prompt: {PROMPTS[2]!r}"):
        answers_of(contestant("a", 1), prompts(), Sampling(3, stop_ids=(EOS_ID,)), judges, ("evaluate", 0))  # type: ignore[arg-type]


# --- distances -------------------------------------------------------------------------------------------------------


def _logprobs(model: Any, prompt: tuple[int, ...], ids: tuple[int, ...], temperature: float = 1.0) -> torch.Tensor:
    row = torch.tensor([prompt + ids])
    with torch.no_grad():
        logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(ids)), ids]


@pytest.mark.parametrize("budget", [16, 10_000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_is_the_mean_log_ratio_of_the_models_own_answers(budget: int, temperature: float) -> None:
    model, reference = contestant("a", 1), contestant("b", 2)
    found = sampled(model, temperature=temperature)
    ratios = []
    for group in found.tokens:
        arguments = group.prompt_ids, group.completions[0].ids, temperature
        ratios.append(float((_logprobs(model.model, *arguments) - _logprobs(reference.model, *arguments)).sum()))
    kl = kl_to(reference, model, found, temperature=temperature, budget=budget)
    assert kl.value == pytest.approx(sum(ratios) / len(ratios), rel=1e-9)
    assert kl.n == len(PROMPTS)


def test_kl_of_a_model_to_itself_is_0() -> None:
    model = contestant("a", 1)
    kl = kl_to(model, model, sampled(model), temperature=1.0, budget=64)
    assert (kl.value, kl.low, kl.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("budget", [16, 10_000])
def test_perplexity_counts_what_counts_in_the_loss(budget: int) -> None:
    """Capital letters do not count."""
    groups = [token_group("abc", "dEFg"), token_group("h", "ijklmno"), token_group("pq", "R")]
    model = contestant("a", 1)
    nll = 0.0
    for group in groups:
        completion = group.completions[0]
        logprobs = _logprobs(model.model, group.prompt_ids, completion.ids)
        nll -= sum(float(p) for p, counts in zip(logprobs, completion.mask, strict=True) if counts)
    assert reference_perplexity(model, groups, budget) == (pytest.approx(nll, rel=1e-9), 2 + 7 + 0)


# --- descriptions ----------------------------------------------------------------------------------------------------


def _value(fact: Interval | float) -> float:
    return fact.value if isinstance(fact, Interval) else fact


def test_answers_are_described_by_length_ending_and_wording() -> None:
    """Four answers of 1, 2, 3, 4 tokens, the first and third finished; 8 words in all; 4 bigrams, of which 3 differ."""
    found = answers("a", [0, 0, 0, 0], ["one two three", "one two", "word", "other word"])
    facts = describe(found, [None] * 4)
    assert _value(facts["eval/completion_tokens/mean"]) == 2.5
    assert _value(facts["eval/completion_words/mean"]) == 2.0
    assert _value(facts["eval/finished_fraction"]) == 0.5
    assert _value(facts["eval/distinct_2"]) == pytest.approx(3 / 4)
    assert not any("rouge" in name for name in facts)


def test_overlap_with_references_is_measured_where_there_are_some() -> None:
    found = answers("a", [0, 0, 0], ["the cat sat", "anything", "nothing alike"])
    facts = describe(found, ["the cat sat", None, "completely other words"])
    overlap = facts["eval/rouge_l"]
    assert isinstance(overlap, Interval)
    assert (overlap.value, overlap.n) == (0.5, 2)
