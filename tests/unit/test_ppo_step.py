"""One PPO step on tiny models: what is assembled, against a second way of computing it, and what must not matter."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from accord.config import PPOConfig
from accord.errors import RewardError
from accord.methods.ppo import PPOTrainer
from accord.methods.rollouts import RolloutModels
from accord.models import layout as layouts
from accord.models.load import reward_model_from
from accord.records import Group, SampledCompletion, TokenGroup
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling
from models_support import tiny_model
from online_support import (
    PROMPTS,
    FirstRollout,
    OffsetSampler,
    equal,
    gradient_norm,
    prompts,
    rollout_cast,
    uneven,
    unpadded,
    weights,
)
from online_support import measured as steps

STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Cast(RolloutModels):
    """The models of a rollout, and PPO's value model."""

    value: Any


def ppo(made: Cast, asked: list[tuple[Group, TokenGroup]], config: PPOConfig, *, seed: int) -> PPOTrainer:
    return PPOTrainer(made, made.value, asked, config, seed)


def models(kind: str = "gpt2", dtype: torch.dtype = torch.float64, **options: Any) -> Cast:
    """The cast of a rollout, and a value model of its own."""
    cast = rollout_cast(kind, dtype, **options)
    value = reward_model_from(tiny_model(kind, dtype=dtype, seed=3), 4)
    return Cast(**{field.name: getattr(cast, field.name) for field in fields(cast)}, value=value)


def section(**changes: Any) -> PPOConfig:
    fields: dict[str, Any] = {
        "prompts_per_step": 3, "samples_per_prompt": 6, "episodes": 18 * STEPS, "max_new_tokens": 9, "minibatches": 2,
        "update_epochs": 2, "learning_rate": 0.01, "samples_every": 2, "kl_coef": 0.1, "schedule": "constant",
    }  # fmt: skip
    return PPOConfig(**(fields | changes))


def step(made: Cast, config: PPOConfig, number: int = 1) -> dict[str, float]:
    return steps(ppo(made, prompts(), config, seed=0), range(number, number + 1))[0]


# --- the ratio -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["sampler", "recompute"])
@pytest.mark.parametrize("layout", ["shared", "plain"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_before_the_first_update_of_every_rollout_the_ratio_is_1(source: str, layout: str, temperature: float) -> None:
    """In float32, also after updates have moved the policy: sampler and update see the same weights and temperature."""
    config = section(old_logprobs=source, temperature=temperature, learning_rate=1e-3)
    trainer = ppo(models("llama", torch.float32, layout=layout), prompts(), config, seed=0)
    rows = steps(trainer, range(1, STEPS + 1))
    assert all(row["train/ratio_max_deviation"] <= 1e-5 for row in rows)
    assert trainer.drift == max(row["train/ratio_max_deviation"] for row in rows)
    assert all(abs(row["train/ratio_mean"] - 1) > 1e-6 for row in rows)  # the updates themselves do move it


def test_a_sampler_that_disagrees_with_the_trainer_is_seen_and_recomputing_mends_it() -> None:
    for source, expected in (("sampler", math.expm1(0.01)), ("recompute", 0.0)):
        made = models()
        made = replace(made, sampler=OffsetSampler(made.sampler, 0.01))
        trainer = ppo(made, prompts(), section(old_logprobs=source), seed=0)
        assert steps(trainer, [1])[0]["train/ratio_max_deviation"] == pytest.approx(expected, abs=1e-5)
        assert trainer.drift == pytest.approx(expected, abs=1e-5)


# --- the signal, computed a second way -------------------------------------------------------------------------------


class Oracle(FirstRollout):
    """The first step's losses in float64 from one unpadded row at a time, with advantages by their defining sums."""

    def __init__(self, made: Cast, config: PPOConfig) -> None:
        super().__init__(made, config, "ppo")
        self.config, self.made = config, made
        self.values = [self._values(*row) for row in self.rows]

    def _values(self, prompt: tuple[int, ...], ids: tuple[int, ...]) -> Any:
        hidden = self.made.value.base_model(**unpadded(prompt + ids)).last_hidden_state[0]
        return self.made.value.score(hidden)[len(prompt) - 1 : -1, 0]

    def rewards(self) -> list[list[float]]:
        result = []
        for old, ref, score in zip(self.logprobs, self.ref, self.shaped(), strict=True):
            price = self.config.kl_coef if self.config.kl_in == "reward" else 0.0
            row = [-price * float(p - r) for p, r in zip(old.detach(), ref, strict=True)]
            row[-1] += score
            result.append(row)
        return result

    def advantages(self) -> list[list[float]]:
        """A[t] = sum over k of (gamma lambda)^k delta[t + k]."""
        gamma, decay = self.config.gamma, self.config.gamma * self.config.gae_lambda
        result = []
        for rewards, values in zip(self.rewards(), self.values, strict=True):
            v = [*values.tolist(), 0.0]
            deltas = [r + gamma * v[t + 1] - v[t] for t, r in enumerate(rewards)]
            result.append([sum(decay**k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))])
        return result


@pytest.mark.parametrize("kl_term", ["k1 in reward", "k2 in loss", "k3 in loss"])
def test_one_step_assembles_what_a_second_computation_says(kl_term: str) -> None:
    """One update on the whole rollout, where the ratio is 1 and nothing is clipped: the policy loss is
    -mean(white A r) - c mean(H) [+ kl_coef mean(x^2/2) or mean(exp(-x) - 1 + x), x = log(policy / reference)], the
    value loss mean(0.5 (V - (A + V_old))^2), each over all tokens of the rollout."""
    estimator, _, place = kl_term.split()
    config = section(
        minibatches=1, update_epochs=1, gamma=0.95, gae_lambda=0.8, score_clip=2.0, missing_eos_penalty=0.7,
        temperature=1.5, entropy_coef=0.3, max_grad_norm=1e9, kl_estimator=estimator, kl_in=place,
    )  # fmt: skip
    made = models()
    oracle = Oracle(copy.deepcopy(made), config)
    row = step(made, config)
    assert 0 < sum(oracle.finished) < len(oracle.finished)
    assert any(abs(score) > 2 for score in oracle.scores)

    flat = [a for advantages in oracle.advantages() for a in advantages]
    n = len(flat)
    mean = sum(flat) / n
    std = math.sqrt(sum((a - mean) ** 2 for a in flat) / n)
    kl = oracle.kl()
    returns = [a + v for a, v in zip(flat, torch.cat(oracle.values).tolist(), strict=True)]
    white = torch.tensor([(a - mean) / std for a in flat], dtype=torch.float64)
    new = torch.cat(oracle.logprobs)
    policy_loss = -(white * (new - new.detach()).exp()).mean()
    entropy = torch.cat(oracle.entropies).mean()
    value_loss = (0.5 * (torch.cat(oracle.values) - torch.tensor(returns, dtype=torch.float64)) ** 2).mean()
    x = new - torch.cat(oracle.ref)
    kl_loss = (x**2 / 2 if estimator == "k2" else (-x).exp() - 1 + x).mean()
    (policy_loss - 0.3 * entropy + (0.1 * kl_loss if place == "loss" else 0.0)).backward()
    value_loss.backward()

    expected = {
        "rollout/score/mean": sum(oracle.scores) / len(oracle.scores),
        "rollout/reward/mean": sum(map(sum, oracle.rewards())) / len(kl),
        "rollout/kl_per_sequence_nats": sum(kl) / len(kl),
        "rollout/kl_per_token_nats": sum(kl) / n,
        "rollout/finished_fraction": sum(oracle.finished) / len(kl),
        "rollout/completion_tokens/mean": n / len(kl),
        "rollout/entropy_nats": -float(new.detach().sum()) / n,
        "train/advantage_mean": mean,
        "train/advantage_std": std,
        "train/return_mean": sum(returns) / n,
        "train/policy_loss": float(policy_loss.detach()),
        "train/entropy_nats": float(entropy.detach()),
        "train/value_loss": float(value_loss.detach()),
        "train/grad_norm": gradient_norm(oracle.made.policy),
        "train/value_grad_norm": gradient_norm(oracle.made.value),
    } | ({"train/kl_loss": float(kl_loss.detach())} if place == "loss" else {})
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_an_answer_cut_by_length_is_scored_less_the_penalty() -> None:
    rows = [step(models(), section(missing_eos_penalty=penalty)) for penalty in (0.0, 2.5)]
    cut = rows[0]["rollout/truncated_fraction"]
    assert 0 < cut < 1
    assert rows[1]["rollout/score/mean"] == rows[0]["rollout/score/mean"]
    difference = rows[0]["rollout/reward/mean"] - rows[1]["rollout/reward/mean"]
    assert difference == pytest.approx(2.5 * cut, rel=1e-5)


def test_nothing_to_learn_teaches_nothing() -> None:
    """Reward 0, no KL penalty, and a critic that rightly says 0: every advantage is 0 and no weight moves a bit."""
    made = models(function=lambda prompt, completion: 0.0)
    with torch.no_grad():
        made.value.score.weight.zero_()
    before = weights(made.policy), weights(made.value)
    row = step(made, section(kl_coef=0.0, missing_eos_penalty=0.0))
    for name in ("advantage_mean", "advantage_std", "policy_loss", "value_loss", "grad_norm", "value_grad_norm"):
        assert row[f"train/{name}"] == 0, name
    assert equal(before[0], weights(made.policy)) and equal(before[1], weights(made.value))


def test_a_constant_reward_is_explained_away_by_the_critic_but_kl_still_teaches() -> None:
    made = models(function=lambda prompt, completion: 0.0)
    with torch.no_grad():
        made.value.score.weight.zero_()
    assert step(made, section(kl_coef=0.1, missing_eos_penalty=0.0))["train/grad_norm"] > 0


# --- what must not matter --------------------------------------------------------------------------------------------


def test_neither_micro_batches_nor_layout_change_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64: 16 tokens are one prompt's completions or less, 10,000 the whole rollout; rows are packed wherever their
    lengths differ."""
    monkeypatch.setattr(layouts, "ROW_TOKENS", 0)
    runs = []
    for layout, budget in (
        ("plain", 10_000), ("plain", 16), ("shared", 16), ("shared", 64), ("shared_packed", 64), ("plain_packed", 64),
    ):  # fmt: skip
        made = models(layout=layout)
        rows = steps(ppo(made, prompts(), section(micro_batch_tokens=budget), seed=0), range(1, STEPS + 1))
        runs.append((weights(made.policy), weights(made.value), rows))
    for policy, value, rows in runs[1:]:
        for name in policy:
            torch.testing.assert_close(policy[name], runs[0][0][name], rtol=0, atol=1e-7)
        for name in value:
            torch.testing.assert_close(value[name], runs[0][1][name], rtol=0, atol=1e-7)
        for row, other in zip(rows, runs[0][2], strict=True):
            assert row == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_the_truth_is_logged_and_never_trained_on() -> None:
    made, told = models(), models(gold=lambda prompt, completion: 100.0 * len(completion))
    row, other = step(made, section()), step(told, section())
    assert other.pop("rollout/gold_utility/mean") > 100
    other.pop("rollout/gold_utility/std")
    assert row == other
    assert equal(weights(made.policy), weights(told.policy)) and equal(weights(made.value), weights(told.value))


def test_the_reference_is_never_trained_and_policy_and_value_are() -> None:
    made = models()
    before = [weights(m) for m in (made.reference, made.policy, made.value)]
    step(made, section())
    assert equal(before[0], weights(made.reference))
    assert not equal(before[1], weights(made.policy)) and not equal(before[2], weights(made.value))


def test_the_value_model_has_a_learning_rate_of_its_own() -> None:
    made = models()
    before = weights(made.policy), weights(made.value)
    row = step(made, section(value_learning_rate=0.0))
    assert (row["train/learning_rate"], row["train/value_learning_rate"]) == (0.01, 0.0)
    assert not equal(before[0], weights(made.policy)) and equal(before[1], weights(made.value))


def test_with_learning_rate_0_nothing_moves() -> None:
    made = models()
    before = weights(made.policy), weights(made.value)
    rows = steps(ppo(made, prompts(), section(learning_rate=0.0), seed=0), range(1, STEPS + 1))
    assert equal(before[0], weights(made.policy)) and equal(before[1], weights(made.value))
    assert all(row["train/grad_norm"] > 0 for row in rows)


# --- bookkeeping -----------------------------------------------------------------------------------------------------


def test_the_adaptive_coefficient_moves_by_its_rule_after_each_rollout() -> None:
    """kl_coef (1 + clip(KL / target - 1, -.2, .2) n / horizon), n = 18 completions, from the KL of the row before."""
    config = section(kl_controller="adaptive", target_kl=0.5, kl_horizon=40)
    rows = steps(ppo(models(), prompts(), config, seed=0), range(1, STEPS + 1))
    assert rows[0]["train/kl_coef"] == 0.1
    for before, after in pairwise(rows):
        error = max(-0.2, min(0.2, before["rollout/kl_per_sequence_nats"] / 0.5 - 1))
        assert after["train/kl_coef"] == pytest.approx(before["train/kl_coef"] * (1 + error * 18 / 40), rel=1e-12)
    assert rows[1]["train/kl_coef"] != rows[0]["train/kl_coef"]
    for row in rows:  # and it is the moved coefficient that prices the KL
        cut = config.missing_eos_penalty * row["rollout/truncated_fraction"]
        price = row["train/kl_coef"] * row["rollout/kl_per_sequence_nats"]
        assert row["rollout/reward/mean"] == pytest.approx(row["rollout/score/mean"] - cut - price, rel=1e-5)
    fixed = steps(ppo(models(), prompts(), section(), seed=0), range(1, STEPS + 1))
    assert {row["train/kl_coef"] for row in fixed} == {0.1}


class RecordingSampler:
    def __init__(self, inner: NativeSampler) -> None:
        self._inner, self.calls = inner, []  # type: ignore[var-annotated]

    def generate(
        self, prompts: Sequence[PromptTokens], n: int, sampling: Sampling, key: tuple[int | str, ...]
    ) -> list[tuple[SampledCompletion, ...]]:
        self.calls.append([p.prompt_id for p in prompts])
        return self._inner.generate(prompts, n, sampling, key)


def test_every_prompt_is_used_equally_often_in_an_order_that_changes() -> None:
    """5 prompts, 2 a step: 5 steps are two passes, one of which begins in the middle of a step."""
    made = models()
    recorder = RecordingSampler(made.sampler)  # type: ignore[arg-type]
    config = section(prompts_per_step=2, episodes=60, update_epochs=1)
    trainer = ppo(replace(made, sampler=recorder), prompts(), config, seed=0)
    assert trainer.total_steps == 5
    steps(trainer, range(1, 6))
    used = [prompt for call in recorder.calls for prompt in call]
    assert all(len(call) == 2 for call in recorder.calls)
    assert Counter(used[:5]) == Counter(used[5:]) == Counter(tokens.prompt_id for _, tokens in prompts())
    assert used[:5] != used[5:]


def test_every_pass_over_a_rollout_is_shuffled_afresh() -> None:
    """One prompt a minibatch, so that each forward pass of the value model shows which one it is."""
    made = models(layout="plain")
    seen: list[tuple[int, ...]] = []
    hook = made.value.base_model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(tuple(inputs["input_ids"][0, :2].tolist())), with_kwargs=True
    )
    step(made, section(minibatches=3, update_epochs=6))
    hook.remove()
    updates = seen[-18:]
    orders = [tuple(updates[i : i + 3]) for i in range(0, 18, 3)]
    assert all(len(set(order)) == 3 for order in orders)
    assert len(set(orders)) > 1


def test_episodes_are_rounded_up_to_whole_rollouts() -> None:
    assert ppo(models(), prompts(), section(episodes=37), seed=0).total_steps == 3


def test_samples_are_kept_at_the_first_the_last_and_every_few_steps() -> None:
    made = models(gold=lambda prompt, completion: 1.0)
    trainer = ppo(made, prompts(), section(samples_every=2, episodes=18 * 5), seed=0)
    kept = [trainer.step(number).samples for number in range(1, 6)]
    assert [bool(samples) for samples in kept] == [True, True, False, True, True]
    sample = kept[0][0]
    assert sample.keys() - {"reward"} == {"prompt", "completion", "score", "finished", "gold"}
    assert all((s["reward"] == s["score"] - 1) == (not s["finished"]) for s in kept[0] if "reward" in s)
    assert sample["prompt"] in PROMPTS
    assert len({s["prompt"] for s in kept[0]}) == len(kept[0]) == 3  # one for each prompt of the step
    assert all(s["score"] == uneven("", s["completion"]) for s in kept[0])


def test_a_captured_trainer_goes_on_as_the_old_one() -> None:
    config = section(kl_controller="adaptive", target_kl=0.5, kl_horizon=40)
    old_models, new_models = models(), models()
    old = ppo(old_models, prompts(), config, seed=0)
    steps(old, [1])
    captured = copy.deepcopy(old.capture())
    rows = steps(old, [2, 3])
    new = ppo(new_models, prompts(), config, seed=0)
    new.restore(captured)
    assert steps(new, [2, 3]) == rows
    assert equal(weights(old_models.policy), weights(new_models.policy))
    assert equal(weights(old_models.value), weights(new_models.value))
    assert old.drift == new.drift


def test_a_reward_function_that_raises_stops_the_step_and_names_the_prompt() -> None:
    def moody(prompt: str, completion: str) -> float:
        if prompt == PROMPTS[0]:
            raise LookupError("no opinion")
        return 0.0

    trainer = ppo(models(function=moody), prompts(), section(prompts_per_step=5), seed=0)
    with pytest.raises(RewardError, match=rf"(?s)LookupError: no opinion.*{PROMPTS[0]!r}"):
        trainer.step(1)
