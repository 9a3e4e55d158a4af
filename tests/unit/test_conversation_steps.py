"""A step of each online method on conversations: what counts, where rewards lie, and what must not matter."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest
import torch

from accord.config import GRPOConfig, OnlineDPOConfig, PPOConfig, REINFORCEConfig, RLOOConfig
from accord.data.templates import Template
from accord.errors import RewardError
from accord.methods import online_trainer, ppo_update
from accord.methods.online import final_rewards, prompt_indices
from accord.methods.online_stage import LEARNERS
from accord.methods.online_trainer import OnlineTrainer
from accord.methods.ppo import PPOTrainer
from accord.methods.rollouts import Rollout, RolloutModels, collect
from accord.models.load import reward_model_from
from accord.models.token_scores import TokenScores, score_tokens
from accord.records import Group, Message, TokenGroup, Turn
from accord.rewards.scorers import FunctionScorer, TokenFunctionScorer
from accord.rollout.conversations import Partner
from models_support import tiny_model, word_tokenizer
from online_support import PROMPTS, equal, measured, rollout_cast, unpadded, weights

SECTIONS: dict[str, Any] = {
    "ppo": PPOConfig, "rloo": RLOOConfig, "grpo": GRPOConfig, "reinforce": REINFORCEConfig,
    "online_dpo": OnlineDPOConfig,
}  # fmt: skip
SEED = 4
every_method = pytest.mark.parametrize("stage", SECTIONS)


class Chatty:
    """Answers with one to three random words, and pays by the length of what it is told."""

    def reset(self, prompt: Sequence[Message], random: np.random.Generator) -> Sequence[Message]:
        return prompt

    def step(self, messages: Sequence[Message], random: np.random.Generator) -> Turn:
        words = " ".join(f"w{number}" for number in random.integers(2, 50, size=int(random.integers(1, 4))))
        return Turn((Message("user", words),), len(messages[-1].content) % 5 - 1.5, done=bool(random.random() < 0.3))


class Silent:
    """Has nothing to say."""

    def reset(self, prompt: Sequence[Message], random: np.random.Generator) -> Sequence[Message]:
        return prompt

    def step(self, messages: Sequence[Message], random: np.random.Generator) -> Turn:
        return Turn()


def section(stage: str, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "prompts_per_step": 3, "samples_per_prompt": 4, "episodes": 24, "max_new_tokens": 6, "minibatches": 2,
        "update_epochs": 2, "learning_rate": 0.01, "schedule": "constant", "environment": "tests:Chatty",
        "max_turns": 3, "missing_eos_penalty": 0.7,
    }  # fmt: skip
    return SECTIONS[stage](**(fields | changes))


def cast(factory: Any = Chatty, *, layout: str = "shared", max_turns: int = 3, **options: Any) -> RolloutModels:
    """A policy that stops often, so that its conversations go on."""
    made = rollout_cast(layout=layout, **options)
    template = Template.of(word_tokenizer(), "raw")
    template.stop_ids = (*template.stop_ids, *range(20, 45))
    partner = None if factory is None else Partner("tests:Chatty", factory, max_turns, 64)
    return replace(made, template=template, partner=partner)


def asked(made: RolloutModels) -> list[tuple[Group, TokenGroup]]:
    groups = [Group((Message("user", text),)) for text in PROMPTS]
    return [(g, TokenGroup(made.template.prompt_ids(g.prompt), (), g.prompt_id)) for g in groups]


def trainer(stage: str, made: RolloutModels, config: Any) -> Any:
    if stage == "ppo":
        value = reward_model_from(tiny_model("gpt2", dtype=torch.float64, seed=3), 4)
        return PPOTrainer(made, value, asked(made), config, SEED)
    return OnlineTrainer(stage, made, asked(made), config, LEARNERS[stage](config), SEED)


def first_rollout(stage: str, made: RolloutModels, config: Any) -> Rollout:
    prompts = asked(made)
    chosen = [prompts[i] for i in prompt_indices(1, config, len(prompts), SEED, stage)]
    return collect(made, chosen, config, (stage, SEED, 1))


# --- what counts -----------------------------------------------------------------------------------------------------


@every_method
def test_tokens_that_others_wrote_have_exactly_no_gradient(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses are given log-probabilities and entropies of everything, with gradient, and take only their own."""
    seen: list[tuple[torch.Tensor, TokenScores]] = []

    def scored(model: Any, batch: Any, **options: Any) -> TokenScores:
        scores = score_tokens(model, batch, **(options | {"mask": "valid"}))
        assert scores.entropies is not None
        for tensor in (scores.logprobs, scores.entropies):
            tensor.retain_grad()
        seen.append((batch.completion_mask, batch.valid_mask, scores))
        return scores

    for module in (online_trainer, ppo_update):
        monkeypatch.setattr(module, "score_tokens", scored)
    changes = {} if stage == "online_dpo" else {"entropy_coef": 0.1}
    made = cast()
    trainer(stage, made, section(stage, **changes)).step(1)
    others = sum(int((valid & ~own).sum()) for own, valid, _ in seen)
    assert others > 10
    for own, valid, scores in seen:
        for tensor in (scores.logprobs, *([scores.entropies] if changes else [])):
            assert (tensor[valid & ~own] != 0).any() or not (valid & ~own).any()
            assert tensor.grad is not None and torch.all(tensor.grad[~own] == 0)
            assert (tensor.grad[own] != 0).any()


@every_method
def test_layout_and_micro_batches_do_not_change_a_step(stage: str) -> None:
    whole = cast()
    rows = measured(trainer(stage, whole, section(stage)), [1, 2])
    for layout, budget in (("plain", 8192), ("shared", 60), ("plain", 60)):
        made = cast(layout=layout)
        others = measured(trainer(stage, made, section(stage, micro_batch_tokens=budget)), [1, 2])
        for row, other in zip(rows, others, strict=True):
            assert row == {name: pytest.approx(value, rel=1e-6, abs=1e-9) for name, value in other.items()}
        for name, value in weights(whole.policy).items():
            assert torch.allclose(value, made.policy.state_dict()[name], rtol=1e-6, atol=1e-8)
    assert rows[0]["rollout/turns/mean"] > 1.3 and rows[0]["train/grad_norm"] > 0


@every_method
def test_one_turn_with_nothing_to_say_is_no_environment_bit_for_bit(stage: str) -> None:
    without, within = cast(None), cast(Silent, max_turns=1)
    plain = measured(trainer(stage, without, section(stage, environment=None, max_turns=None)), [1, 2])
    talked = measured(trainer(stage, within, section(stage, max_turns=1)), [1, 2])
    own = {"rollout/turns/mean", "rollout/environment_term/mean", "rollout/out_of_turns_fraction"}
    own |= {"rollout/out_of_room_fraction"}
    assert plain == [{name: value for name, value in row.items() if name not in own} for row in talked]
    assert equal(weights(without.policy), weights(within.policy))
    assert not equal(weights(without.policy), weights(cast(None).policy))


# --- where rewards lie -----------------------------------------------------------------------------------------------


def test_ppo_carries_advantages_across_what_others_wrote() -> None:
    """Against one unpadded row at a time: over the policy's tokens alone, in their order,
    A[t] = sum_k (gamma lambda)^k delta[t + k], with each turn's reward at its last token and the score at the end."""
    config = section(
        "ppo", minibatches=1, update_epochs=1, gamma=0.95, gae_lambda=0.8, kl_coef=0.1, whiten_advantages=False
    )
    made = cast()
    learner = trainer("ppo", made, config)
    value = copy.deepcopy(learner._pupils._value_model)
    rollout = first_rollout("ppo", copy.deepcopy(made), config)
    advantages, returns, kls = [], [], []
    for i, conversation in enumerate(rollout.conversations):
        ids, start = (*conversation.opening.ids, *conversation.completion.ids), len(conversation.opening.ids)
        own = [t for t, mine in enumerate(conversation.completion.mask) if mine]
        logs = [
            model(**unpadded(ids)).logits[0, start - 1 : -1].log_softmax(-1)[range(len(ids) - start), ids[start:]]
            for model in (made.policy, made.reference)
        ]
        kl = (logs[0] - logs[1]).detach()[own].tolist()
        v = value.score(value.base_model(**unpadded(ids)).last_hidden_state[0])[start - 1 : -1, 0][own].tolist()
        rewards = [-0.1 * k + conversation.rewards[t] for k, t in zip(kl, own, strict=True)]
        rewards[-1] += float(rollout.scores[i]) - 0.7 * (conversation.end == "length")
        deltas = [r + 0.95 * after - before for r, before, after in zip(rewards, v, [*v[1:], 0.0], strict=True)]
        found = [sum((0.95 * 0.8) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]
        advantages += found
        returns += [a + b for a, b in zip(found, v, strict=True)]
        kls.append(sum(kl))
    row = measured(learner, [1])[0]
    assert any(len(c.answers) == 3 for c in rollout.conversations) and any(
        r for c in rollout.conversations for r in c.rewards
    )
    assert row["train/advantage_mean"] == pytest.approx(fmean(advantages), rel=1e-5)
    assert row["train/advantage_std"] == pytest.approx(pstdev(advantages), rel=1e-5)
    assert row["train/return_mean"] == pytest.approx(fmean(returns), rel=1e-5)
    assert row["rollout/kl_per_sequence_nats"] == pytest.approx(fmean(kls), rel=1e-5)
    assert row["rollout/completion_tokens/mean"] == pytest.approx(len(advantages) / len(rollout.conversations))


@pytest.mark.parametrize("stage", [stage for stage in SECTIONS if stage != "ppo"])
def test_a_conversation_is_judged_by_its_score_and_by_what_its_answers_earned(stage: str) -> None:
    config = section(stage, **({} if stage == "online_dpo" else {"kl_coef": 0.0}))
    made = cast()
    rollout = first_rollout(stage, made, config)
    earned = [
        float(score) + sum(c.rewards) - 0.7 * (c.end == "length")
        for score, c in zip(rollout.scores, rollout.conversations, strict=True)
    ]
    lesson = LEARNERS[stage](config).lesson(rollout)
    assert lesson.rewards.tolist() == pytest.approx(earned, rel=1e-6)
    row = measured(trainer(stage, made, config), [1])[0]
    assert row["rollout/reward/mean"] == pytest.approx(fmean(earned), rel=1e-6)
    paid = [sum(c.rewards) for c in rollout.conversations]
    assert row["rollout/environment_term/mean"] == pytest.approx(fmean(paid), rel=1e-6)
    assert row["rollout/score/mean"] == pytest.approx(fmean(rollout.scores.tolist()) + fmean(paid), rel=1e-6)


# --- who is told what ------------------------------------------------------------------------------------------------


def test_what_scores_is_told_the_whole_conversation() -> None:
    told: list[tuple[Any, str, Any]] = []

    def judge(prompt: Any, completion: str, messages: Any) -> float:
        told.append((prompt, completion, messages))
        return 0.0

    made = cast()
    rollout = first_rollout("rloo", replace(made, scorer=FunctionScorer(judge, "judge")), section("rloo"))
    assert len(told) == len(rollout.conversations)
    for (prompt, completion, messages), conversation in zip(told, rollout.conversations, strict=True):
        said = [
            {"role": m.role, "content": m.content} for m in (*conversation.opening.messages, *conversation.messages)
        ]
        assert messages == said and completion == conversation.messages[-1].content
        assert prompt == (said[:-1] if len(said) > 2 else said[0]["content"])


def test_samples_show_the_conversation() -> None:
    sample = trainer("rloo", cast(), section("rloo")).step(1).samples[0]
    assert [m["role"] for m in sample["messages"]][:1] == ["assistant"]
    assert sample["messages"][-1]["content"] == sample["completion"]
    assert sample["prompt"] in PROMPTS
    assert (
        "messages"
        not in trainer("rloo", cast(None), section("rloo", environment=None, max_turns=None)).step(1).samples[0]
    )


class Fragile(Chatty):
    """Fails in the later turns of one prompt."""

    def step(self, messages: Sequence[Message], random: np.random.Generator) -> Turn:
        if messages[0].content == PROMPTS[0] and len(messages) > 2:
            raise KeyError("order")
        return super().step(messages, random)


def test_an_environment_that_fails_stops_the_step_and_names_the_conversation() -> None:
    with pytest.raises(RewardError, match=r"(?s)the environment tests:Chatty failed after answer 2: KeyError: 'order'"):
        trainer("rloo", cast(Fragile), section("rloo", prompts_per_step=5)).step(1)


def test_prompts_with_a_failed_conversation_are_left_out_up_to_a_bound() -> None:
    config = section("rloo", max_failed_fraction=0.2, prompts_per_step=5)
    whole = first_rollout("rloo", cast(Chatty), config)
    rollout = first_rollout("rloo", cast(Fragile), config)
    assert len(rollout.groups) == 4 and len(whole.groups) == 5 and rollout.failures
    # Those that are left are what they would have been beside the others.
    places = [whole.groups.index(group) for group in rollout.groups]
    assert rollout.conversations == tuple(c for p in places for c in whole.conversations[4 * p : 4 * p + 4])
    assert measured(trainer("rloo", cast(Fragile), config), [1])[0]["train/grad_norm"] > 0


def test_a_function_of_tokens_is_given_those_of_the_policy_and_pays_them() -> None:
    told: list[list[str]] = []

    def pay(prompt: Any, tokens: list[str]) -> list[float]:
        told.append(tokens)
        return [float(place) for place in range(len(tokens))]

    config = section("ppo", missing_eos_penalty=0.0)
    rollout = first_rollout("ppo", replace(cast(), scorer=TokenFunctionScorer(pay, "pay")), config)
    rewards = final_rewards(rollout, torch.zeros(rollout.mask.shape))
    for tokens, found, mask, paid in zip(told, rewards, rollout.mask, rollout.turn_rewards, strict=True):
        assert len(tokens) == int(mask.sum())
        assert found[mask].tolist() == pytest.approx([p + float(e) for p, e in enumerate(paid[mask])], abs=1e-5)
        assert not found[~mask].any()


def test_answers_that_are_divided_by_a_constant_are_divided_by_all_their_turns() -> None:
    assert section("grpo").max_own_tokens == 18
    assert section("grpo", environment=None, max_turns=None).max_own_tokens == 6
