"""Rewards inside an online step: failed scores, truncated answers, rewards of single tokens, reference answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from accord.config import PPOConfig, REINFORCEConfig, RLOOConfig, RolloutFields
from accord.errors import RewardError
from accord.methods.judging import ReferenceScores, RewardState
from accord.methods.online import final_rewards, learned
from accord.methods.online_stage import LEARNERS
from accord.methods.online_trainer import OnlineTrainer
from accord.methods.ppo import PPOTrainer
from accord.methods.rollouts import Rollout, RolloutModels, collect
from accord.models.load import reward_model_from
from accord.rewards.scorers import FunctionScorer, TokenFunctionScorer
from models_support import tiny_model
from online_support import PROMPTS, equal, measured, prompts, rollout_cast, uneven, weights

SEED = 9
SHAPE = {"prompts_per_step": 3, "samples_per_prompt": 4, "episodes": 36, "max_new_tokens": 9, "learning_rate": 0.01}


def section(**changes: Any) -> RLOOConfig:
    return RLOOConfig(**(SHAPE | changes))


def rollout(made: RolloutModels, config: RolloutFields) -> Rollout:
    return collect(made, prompts()[:3], config, ("rloo", SEED, 1))


def trainer(made: RolloutModels, config: RolloutFields, stage: str = "rloo") -> OnlineTrainer:
    return OnlineTrainer(stage, made, prompts(), config, LEARNERS[stage](config), SEED)


def failing(words: str) -> Any:
    """`uneven`, which has no answer for the prompt `words`."""

    def score(prompt: str, completion: str) -> float:
        if prompt == words:
            raise KeyError(words)
        return uneven(prompt, completion)

    return score


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_prompt_whose_scoring_failed_is_left_out_and_the_step_is_that_of_the_others() -> None:
    """Against a rollout of the other two prompts alone, whose samples do not depend on who is beside them."""
    config = section(max_failed_fraction=0.4)
    whole = rollout(rollout_cast(function=failing(PROMPTS[1])), config)
    others = collect(rollout_cast(), [prompts()[0], prompts()[2]], config, ("rloo", SEED, 1))
    assert whole.groups == others.groups
    assert whole.scores.tolist() == others.scores.tolist()
    assert torch.equal(whole.mask, others.mask)
    assert torch.allclose(whole.ref_logprobs, others.ref_logprobs, atol=1e-9)
    lessons = [LEARNERS["rloo"](config).lesson(each) for each in (whole, others)]
    assert torch.allclose(lessons[0].advantages, lessons[1].advantages, atol=1e-9)  # type: ignore[arg-type]
    assert len(whole.failures) == 4 and "KeyError" in whole.failures[0].error


def test_failures_are_counted_and_named_and_above_the_bound_the_run_stops() -> None:
    config = section(max_failed_fraction=0.4, prompts_per_step=5, episodes=20)
    outcome = trainer(rollout_cast(function=failing(PROMPTS[1])), config).step(1)
    assert outcome.metrics["rollout/failed_scores"] == 4
    assert outcome.metrics["rollout/left_out_prompts"] == 1
    named = [sample for sample in outcome.samples if "error" in sample]
    assert named and all(s["prompt"] == PROMPTS[1] and "score" not in s for s in named)
    with pytest.raises(RewardError, match=r"(?s)failed on 4 of 20 completions; the first: KeyError.*prompt: 'w4 w5"):
        trainer(
            rollout_cast(function=failing(PROMPTS[1])), config.model_copy(update={"max_failed_fraction": 0.1})
        ).step(1)


def test_a_score_that_float32_cannot_square_is_a_failure() -> None:
    """1e18 squared is 1e36, which float32 holds (up to 3.4e38); 1e20 squared is not."""
    config = section(prompts_per_step=5, episodes=20)
    with pytest.raises(RewardError, match=r"failed on 20 of 20 completions; the first: the score 1e\+20 is beyond"):
        trainer(rollout_cast(function=lambda prompt, completion: 1e20), config).step(1)
    trainer(rollout_cast(function=lambda prompt, completion: -1e18), config).step(1)


def test_a_step_without_anything_left_to_learn_from_stops_the_run() -> None:
    def one_a_prompt(prompt: str, completion: str) -> float:
        seen[prompt] = seen.get(prompt, 0) + 1
        return float("nan") if seen[prompt] == 1 else 1.0

    seen: dict[str, int] = {}
    with pytest.raises(RewardError, match="no prompt is left to learn from"):
        rollout(rollout_cast(function=one_a_prompt), section(max_failed_fraction=0.5))


# --- truncated answers -----------------------------------------------------------------------------------------------


def left_out() -> dict[str, Any]:
    return {"shaping": {"truncation": "leave_out"}}


def test_truncated_answers_that_are_left_out_are_not_learned_from() -> None:
    found = rollout(rollout_cast(), section(max_new_tokens=24, **left_out()))
    choice = learned(found)
    rows = [row for group in choice.rows for row in group]
    assert rows == found.finished.nonzero().flatten().tolist() and 0 < len(rows) < len(found.finished)
    ids = [completion.ids for group in found.groups for completion in group.completions]
    assert [c.ids for group in choice.groups for c in group.completions] == [ids[row] for row in rows]


def test_nothing_is_updated_where_every_answer_is_truncated() -> None:
    config = section(max_new_tokens=1, **left_out())
    for made in (rollout_cast(), rollout_cast()):
        before = weights(made.policy)
        metrics = trainer(made, config).step(1).metrics
        assert metrics["rollout/finished_fraction"] == 0
        assert equal(before, weights(made.policy)) and "train/grad_norm" not in metrics


def test_ppo_learns_from_finished_answers_alone_or_from_nothing() -> None:
    for room, some in ((24, True), (1, False)):
        made = rollout_cast()
        value = reward_model_from(tiny_model("gpt2", dtype=torch.float64, seed=3), 4)
        config = PPOConfig(**(SHAPE | {"minibatches": 1, "update_epochs": 1, "max_new_tokens": room, **left_out()}))
        before = weights(made.policy)
        metrics = PPOTrainer(made, value, prompts(), config, SEED + 1).step(1).metrics
        assert (metrics["rollout/finished_fraction"] > 0) == some
        assert ("train/grad_norm" in metrics) == some == (not equal(before, weights(made.policy)))


# --- rewards of single tokens ----------------------------------------------------------------------------------------


def per_token(prompt: str, tokens: list[str]) -> list[float]:
    return [len(token) / 8 for token in tokens]


def test_token_rewards_are_paid_at_their_tokens_and_the_rest_at_the_last() -> None:
    made = rollout_cast()
    made = replace(made, scorer=TokenFunctionScorer(per_token, "letters"))
    found = rollout(made, section(missing_eos_penalty=0.5))
    kl = torch.zeros(found.mask.shape)
    rewards = final_rewards(found, kl)
    tokens = [list(request.tokens) for request in found.requests]
    assert [len(row) for row in tokens] == found.mask.sum(1).tolist()
    for row, texts in enumerate(tokens):
        paid = per_token("", texts)
        assert found.scores[row] == pytest.approx(sum(paid), abs=1e-6)
        assert rewards[row, : len(paid) - 1].tolist() == pytest.approx(paid[:-1], abs=1e-6)
        last = paid[-1] - 0.5 * (not found.finished[row])
        assert float(rewards[row, len(paid) - 1]) == pytest.approx(last, abs=1e-6)
        assert rewards[row, len(paid) :].abs().sum() == 0


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda prompt, tokens: [1.0], "returned 1 rewards for 2 tokens"),
        (lambda prompt, tokens: [1.0, float("inf")], "returned inf for a token"),
        (lambda prompt, tokens: 1.0, "returned 1.0, a float; expected a number a token"),
        (lambda prompt, tokens: "ab", "returned 'a', a str; expected a number"),
    ],
)
def test_a_token_function_that_returns_something_else_is_a_failure(function: Any, reason: str) -> None:
    request = rollout(replace(rollout_cast(), scorer=TokenFunctionScorer(per_token, "x")), section()).requests[0]
    [score] = TokenFunctionScorer(function, "mine").score([replace(request, tokens=("a", "b"))])
    assert score.value is None and reason in str(score.error)


# --- reference answers, running moments ------------------------------------------------------------------------------


def test_rewards_compare_with_the_prompts_own_reference_answers_scored_once() -> None:
    asked: list[str] = []

    def score(prompt: str, completion: str) -> float:
        asked.append(completion)
        return uneven(prompt, completion)

    made = rollout_cast(function=score)
    answers = {group.prompt_id: (f"yes {k}", "a longer answer")[: k + 1] for k, (group, _) in enumerate(prompts())}
    made.rewards.references = ReferenceScores(made.scorer, answers)
    config = section(missing_eos_penalty=0, shaping={"reference": "difference"})
    first, second = rollout(made, config), rollout(made, config)
    for found in (first, second):
        for row, request in enumerate(found.requests):
            scores = [uneven("", text) for text in answers[request.prompt_id]]
            expected = uneven("", request.completion) - sum(scores) / len(scores)
            assert float(found.shaped.rewards[row]) == pytest.approx(expected, abs=1e-6)
    assert asked.count("a longer answer") == 2 and asked.count("yes 0") == 1


def test_a_reference_answer_that_cannot_be_scored_fails_its_prompt() -> None:
    def score(prompt: str, completion: str) -> float:
        return float("nan") if completion == "bad" else 1.0

    made = rollout_cast(function=score)
    answers = {group.prompt_id: ("bad" if k == 2 else "good",) for k, (group, _) in enumerate(prompts())}
    made.rewards.references = ReferenceScores(made.scorer, answers)
    found = rollout(made, section(shaping={"reference": "par"}, max_failed_fraction=0.5))
    assert len(found.groups) == 2 and found.failures[0].error == "its reference answer: returned nan"


@pytest.mark.parametrize("stage", ["rloo", "reinforce"])
def test_running_moments_survive_a_restart_bit_by_bit(stage: str) -> None:
    kinds: dict[str, type[RolloutFields]] = {"rloo": RLOOConfig, "reinforce": REINFORCEConfig}
    config = kinds[stage](**(SHAPE | {"shaping": {"running": "standardise"}}))
    old = trainer(rollout_cast(), config, stage)
    old.step(1)
    captured, rows = old.capture(), []
    captured = type(captured)(
        {k: {n: t.clone() for n, t in v.items()} for k, v in captured.tensors.items()}, captured.values
    )
    rows = measured(old, [2, 3])
    made = rollout_cast()
    new = trainer(made, config, stage)
    new.restore(captured)
    assert made.rewards.moments.count == 12
    assert measured(new, [2, 3]) == rows
    forgetful = trainer(replace(rollout_cast(), rewards=RewardState()), config, stage)
    forgetful.restore(type(captured)(captured.tensors, captured.values | {"rewards": RewardState().capture()}))
    assert measured(forgetful, [2]) != rows[:1]


def test_the_terms_add_up_in_what_is_logged() -> None:
    config = section(
        score_clip=2.0,
        shaping={"length_penalty": 0.1, "repetition_penalty": 1, "diversity_bonus": 1, "overlong_buffer": 4},
    )
    made = replace(rollout_cast(), scorer=FunctionScorer(uneven, "uneven"))
    metrics = trainer(made, config).step(1).metrics
    terms = {name: value for name, value in metrics.items() if name.endswith("_term/mean")}
    assert {name.split("/")[1] for name in terms} == {
        "clip_term", "length_term", "overlong_term", "repetition_term", "diversity_term", "truncation_term",
    }  # fmt: skip
    priced = metrics["rollout/score/mean"] + sum(terms.values()) - 0.05 * metrics["rollout/kl_per_sequence_nats"]
    assert metrics["rollout/reward/mean"] == pytest.approx(priced, abs=1e-5)
