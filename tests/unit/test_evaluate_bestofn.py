"""Best-of-n under evaluation: it gives the answer its scorer likes best, and its distance is a bound that says so."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from accord.config import BestOfNConfig, recipe_from
from accord.data.templates import Template
from accord.errors import CheckpointError, ConfigError
from accord.evaluation.compare import BestOf, Contestant, answers_of
from accord.measures.selection import best_of_n_kl_bound
from accord.methods.corpus import Corpus, Part
from accord.models.load import save_model
from accord.pipeline import run_stages
from accord.records import Group, Message, SampledCompletion, TokenGroup
from accord.rewards.scorers import FunctionScorer
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling
from models_support import EOS_ID, PAD_ID, tiny_model, word_tokenizer

PROMPTS = ("w2 w3", "w4 w5 w6 w7 w8", "w9", "w10 w11 w12")
SAMPLING = Sampling(7, stop_ids=(EOS_ID,))


def groups(count: int = len(PROMPTS)) -> list[Group]:
    texts = [*PROMPTS, *(f"w{i} w{i + 1} w{i + 2}" for i in range(13, 40))]
    return [Group((Message("user", text),)) for text in texts[:count]]


def prompts() -> list[tuple[Group, TokenGroup]]:
    tokenizer = word_tokenizer()
    return [(g, TokenGroup(tuple(tokenizer.encode(g.prompt[0].content)), (), g.prompt_id)) for g in groups()]


def uneven(prompt: str, completion: str) -> float:
    """Scores in 0 ... 6 that follow nothing."""
    return float(len(completion) * 5 % 7)


SCORER = FunctionScorer(uneven, "uneven")


def best_of(n: int, penalty: float) -> BestOf:
    section = BestOfNConfig(missing_eos_penalty=penalty)
    return BestOf(SCORER, section.model_copy(update={"n": n}))  # a section has at least 2


def contestant(best_of: BestOf | None) -> Contestant:
    return Contestant("a", tiny_model("gpt2", seed=1), Template.of(word_tokenizer(), "auto"), best_of)


def answered(best_of: BestOf | None, sampling: Sampling = SAMPLING) -> tuple[SampledCompletion, ...]:
    return answers_of(contestant(best_of), prompts(), sampling, {"judge": SCORER}, ("evaluate", 0)).sampled  # type: ignore[dict-item]


def drawn(n: int, sampling: Sampling = SAMPLING) -> list[tuple[SampledCompletion, ...]]:
    wanted = [PromptTokens(tokens.prompt_ids, tokens.prompt_id) for _, tokens in prompts()]
    return NativeSampler(tiny_model("gpt2", seed=1), pad_id=PAD_ID).generate(wanted, n, sampling, ("evaluate", 0))


@pytest.mark.parametrize("penalty", [0.0, 4.0])
def test_of_n_samples_the_first_with_the_highest_penalised_score_is_the_answer(penalty: float) -> None:
    template = Template.of(word_tokenizer(), "auto")
    expected = []
    for row in drawn(9):
        fined = [uneven("", template.decode(s.ids)) - penalty * (s.finish_reason == "length") for s in row]
        expected.append(row[fined.index(max(fined))])
    assert {s.finish_reason for row in drawn(9) for s in row} == {"stop", "length"}
    found = answered(best_of(9, penalty))
    assert found == tuple(expected) != answered(None)


def test_the_answer_is_what_the_judges_are_shown() -> None:
    found = answers_of(contestant(best_of(9, 0.0)), prompts(), SAMPLING, {"judge": SCORER}, ("evaluate", 0))  # type: ignore[dict-item]
    template = Template.of(word_tokenizer(), "auto")
    for sample, request, tokens, score in zip(
        found.sampled, found.requests, found.tokens, found.scores["judge"], strict=True
    ):
        assert request.completion == template.decode(sample.ids) and tokens.completions[0].ids == sample.ids
        assert request.finished == (sample.finish_reason == "stop")
        assert score == uneven("", request.completion)


def test_the_best_of_one_is_the_policys_own_answer() -> None:
    assert answered(best_of(1, 1.0)) == answered(None)


def test_it_samples_at_its_own_temperature_also_where_the_others_are_greedy() -> None:
    greedy = replace(SAMPLING, temperature=0.0)
    assert answered(best_of(9, 1.0), greedy) == answered(best_of(9, 1.0))


# --- the stage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_model("llama", seed=1), word_tokenizer(), tmp_path_factory.mktemp("model") / "start")


def evaluate(model: Path, out: Path, *, function: Any = uneven, **sections: Any) -> tuple[dict[str, Any], str]:
    """Summary and terminal output of an evaluation by the same function as chooses."""
    data = {"max_tokens": 40, "holdout": 0.0}
    wanted: dict[str, Any] = {"bestofn": {"n": 8}, "evaluate": {}} | sections
    tree = {stage: keys | {"max_new_tokens": 6} for stage, keys in wanted.items() if keys is not None}
    recipe = recipe_from({"model": {"path": str(model)}, "out": str(out), "data": data, **tree})
    corpus = Corpus(evaluation=Part.of(groups(25), "prompts"), prompts=Part.of(groups(25), "prompts"))
    screen = io.StringIO()
    functions = {"evaluate.gold_function": uneven} | ({"bestofn.reward_function": function} if function else {})
    summary = run_stages(recipe, corpus, ["evaluate"], Console(file=screen, width=200), functions)["evaluate"]
    return summary, screen.getvalue()


def numbers(summary: dict[str, Any], name: str) -> dict[str, float]:
    return {row["model"]: row["value"] for row in summary["headline"] if row["name"] == name}


def test_by_default_a_recipe_with_best_of_n_compares_it_with_what_came_before(model: Path, tmp_path: Path) -> None:
    summary, screen = evaluate(model, tmp_path)
    (row,) = summary["comparisons"]
    assert row["name"] == "bestofn over base" and row["low"] > 0.5
    gold = numbers(summary, "eval/gold_utility/mean")
    assert gold["bestofn"] > gold["base"] + 1
    asked = [json.loads(line) for line in (tmp_path / "evaluate" / "samples.jsonl").read_text().splitlines()]
    assert len(asked) == 50  # one answer a model and prompt, whatever it was chosen from
    assert "at most 1.2, to its own policy" in screen


def test_its_distance_is_the_bound_and_nothing_is_measured_with_log_probabilities_it_does_not_have(
    model: Path, tmp_path: Path
) -> None:
    other = save_model(tiny_model("llama", seed=2), word_tokenizer(), tmp_path / "other")
    models = ["base", "bestofn", str(other)]
    summary, _ = evaluate(model, tmp_path / "run", evaluate={"models": models})
    assert numbers(summary, "eval/kl_bound_nats") == {"bestofn": best_of_n_kl_bound(8)}
    kl = numbers(summary, "eval/kl_per_sequence_nats")
    assert set(kl) == {str(other)}
    against_base, _ = evaluate(model, tmp_path / "again", evaluate={"models": models, "reference": "base"})
    assert numbers(against_base, "eval/kl_per_sequence_nats") == kl  # the policy that best-of-n samples from


def test_best_of_n_needs_its_section_and_something_that_scores(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'bestofn', which is no stage of this recipe"):
        evaluate(model, tmp_path, bestofn=None, evaluate={"models": ["base", "bestofn"]})
    with pytest.raises(ConfigError, match="the bestofn stage needs something that scores"):
        evaluate(model, tmp_path, function=None)


def test_another_n_is_another_evaluation(model: Path, tmp_path: Path) -> None:
    evaluate(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"bestofn\.n: 8 there, 9 now"):
        evaluate(model, tmp_path, bestofn={"n": 9})
