"""One step of each online method without a value model: what is assembled, against a second way of computing it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from statistics import mean, pstdev, stdev
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from accord.config import GRPOConfig, OnlineDPOConfig, REINFORCEConfig, RLOOConfig, RolloutFields, ShapingConfig
from accord.methods.online import prompt_indices
from accord.methods.online_stage import LEARNERS
from accord.methods.online_trainer import OnlineTrainer
from accord.methods.rollouts import RolloutModels, collect
from accord.models import layout as layouts
from online_support import (
    PROMPTS,
    FirstRollout,
    OffsetSampler,
    equal,
    gradient_norm,
    measured,
    prompts,
    rollout_cast,
    weights,
)

SECTIONS: dict[str, type[RolloutFields]] = {
    "rloo": RLOOConfig, "grpo": GRPOConfig, "reinforce": REINFORCEConfig, "online_dpo": OnlineDPOConfig,
}  # fmt: skip
POLICY_GRADIENTS = ("rloo", "grpo", "reinforce")
STEPS = 3
SAMPLES = 6
SEED = 9  # with it some answers of every method's first rollout end by themselves, which few do

every_method = pytest.mark.parametrize("stage", SECTIONS)


def section(stage: str, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "prompts_per_step": 3, "samples_per_prompt": SAMPLES, "episodes": 3 * SAMPLES * STEPS, "max_new_tokens": 9,
        "minibatches": 2, "update_epochs": 2, "learning_rate": 0.01, "samples_every": 2, "schedule": "constant",
    }  # fmt: skip
    return SECTIONS[stage](**(fields | changes))


def online(stage: str, made: RolloutModels, config: Any) -> OnlineTrainer:
    return OnlineTrainer(stage, made, prompts(), config, LEARNERS[stage](config), SEED)


def run(stage: str, made: RolloutModels, config: Any, steps: int = STEPS) -> list[dict[str, float]]:
    return measured(online(stage, made, config), range(1, steps + 1))


def nothing(prompt: str, completion: str) -> float:
    return 0.0


def test_the_methods_tested_here_are_those_that_exist() -> None:
    assert SECTIONS.keys() == LEARNERS.keys()


# --- the loss, computed a second way ---------------------------------------------------------------------------------

ONE_UPDATE = {
    "minibatches": 1, "update_epochs": 1, "score_clip": 2.0, "missing_eos_penalty": 0.7, "temperature": 1.5,
    "max_grad_norm": 1e9,
}  # fmt: skip


def groups(values: list[Any]) -> list[list[Any]]:
    return [values[i : i + SAMPLES] for i in range(0, len(values), SAMPLES)]


def leave_one_out(rewards: list[float]) -> list[float]:
    return [r - mean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]


def compare(stage: str, config: Any, expected: Callable[[FirstRollout], tuple[Any, dict[str, float]]]) -> None:
    """One update on the whole rollout against `expected`, which gives the loss and what the metrics should say."""
    made = rollout_cast()
    oracle_models = copy.deepcopy(made)
    oracle = FirstRollout(oracle_models, config, stage, SEED)
    [row] = run(stage, made, config, 1)
    assert 0 < sum(oracle.finished) < len(oracle.finished)
    assert any(abs(score) > 2 for score in oracle.scores)
    loss, values = expected(oracle)
    loss.backward()
    values = {
        "train/grad_norm": gradient_norm(oracle_models.policy),
        "train/entropy_nats": float(torch.cat(oracle.entropies).detach().mean()),
        "train/approx_kl": 0.0,
        "train/ratio_mean": 1.0,
        "rollout/kl_per_sequence_nats": mean(oracle.kl()),
        "rollout/score/mean": mean(oracle.scores),
    } | values
    assert values["train/grad_norm"] > 0.01
    for name, value in values.items():
        assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def reinforced(oracle: FirstRollout, advantages: list[float], entropy_coef: float) -> Any:
    """-mean(A R) - c mean(H): R the ratio of a whole completion, which is 1, H over all tokens."""
    ratios = [(new - new.detach()).sum().exp() for new in oracle.logprobs]
    surrogate = sum(a * ratio for a, ratio in zip(advantages, ratios, strict=True)) / len(ratios)
    return -surrogate - entropy_coef * torch.cat(oracle.entropies).mean()


def test_one_rloo_step_assembles_what_a_second_computation_says() -> None:
    config = section("rloo", kl_coef=0.1, entropy_coef=0.3, **ONE_UPDATE)

    def expected(oracle: FirstRollout) -> tuple[Any, dict[str, float]]:
        rewards = [s - 0.1 * kl for s, kl in zip(oracle.shaped(), oracle.kl(), strict=True)]
        advantages = [a for group in groups(rewards) for a in leave_one_out(group)]
        return reinforced(oracle, advantages, 0.3), {
            "rollout/reward/mean": mean(rewards),
            "train/advantage_mean": 0.0,
            "train/advantage_std": pstdev(advantages),
            "train/policy_loss": -mean(advantages),
        }

    compare("rloo", config, expected)


@pytest.mark.parametrize("scale", ["std", "none"])
def test_one_reinforce_step_assembles_what_a_second_computation_says(scale: str) -> None:
    config = section("reinforce", kl_coef=0.1, entropy_coef=0.3, advantage_scale=scale, **ONE_UPDATE)

    def expected(oracle: FirstRollout) -> tuple[Any, dict[str, float]]:
        rewards = [s - 0.1 * kl for s, kl in zip(oracle.shaped(), oracle.kl(), strict=True)]
        advantages = leave_one_out(rewards)
        if scale == "std":
            advantages = [a / (stdev(advantages) + 1e-4) for a in advantages]
        return reinforced(oracle, advantages, 0.3), {
            "rollout/reward/mean": mean(rewards),
            "train/advantage_std": pstdev(advantages),
            "train/policy_loss": -mean(advantages),
        }

    compare("reinforce", config, expected)


@pytest.mark.parametrize("averaging", ["completion", "token", "constant"])
@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("kl", ["k3 in loss", "k2 in loss", "k1 in reward"])
def test_one_grpo_step_assembles_what_a_second_computation_says(kl: str, scale: str, averaging: str) -> None:
    """sum over tokens of w (-A ratio + kl_coef k) - c mean(H), w = 1 / (C length), 1 / tokens, or 1 / (C 9)."""
    estimator, _, place = kl.split()
    options = {"kl_estimator": estimator, "kl_in": place, "advantage_scale": scale, "averaging": averaging}
    config = section("grpo", kl_coef=0.1, entropy_coef=0.3, **options, **ONE_UPDATE)

    def expected(oracle: FirstRollout) -> tuple[Any, dict[str, float]]:
        price = 0.1 if place == "reward" else 0.0
        rewards = [s - price * kl for s, kl in zip(oracle.shaped(), oracle.kl(), strict=True)]
        advantages: list[float] = []
        for group in groups(rewards):
            spread = stdev(group) + 1e-4 if scale == "std" else 1.0
            advantages += [(r - mean(group)) / spread for r in group]
        lengths = [len(new) for new in oracle.logprobs]
        weights = {
            "completion": [1 / (len(lengths) * n) for n in lengths],
            "token": [1 / sum(lengths) for _ in lengths],
            "constant": [1 / (len(lengths) * 9) for _ in lengths],
        }[averaging]
        policy_loss = kl_loss = torch.zeros((), dtype=torch.float64)
        for new, ref, advantage, weight in zip(oracle.logprobs, oracle.ref, advantages, weights, strict=True):
            policy_loss = policy_loss - weight * advantage * (new - new.detach()).exp().sum()
            x = new - ref
            kl_loss = kl_loss + weight * ((-x).exp() - 1 + x if estimator == "k3" else x**2 / 2).sum()
        values = {
            "rollout/reward/mean": mean(rewards),
            "train/advantage_std": pstdev(advantages),
            "train/policy_loss": float(policy_loss.detach()),
        }
        loss = policy_loss - 0.3 * torch.cat(oracle.entropies).mean()
        if place == "loss":
            loss = loss + 0.1 * kl_loss
            values["train/kl_loss"] = float(kl_loss.detach())
        return loss, values

    compare("grpo", config, expected)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "hinge"])
def test_one_online_dpo_step_assembles_what_a_second_computation_says(kind: str) -> None:
    """D = log-ratio of the best less that of the worst sample of a prompt, sums over tokens; three prompts, no ties."""
    config = section("online_dpo", loss=kind, beta=0.3, **ONE_UPDATE)

    def expected(oracle: FirstRollout) -> tuple[Any, dict[str, float]]:
        differences, entropies = [], []
        for first, scores in zip(range(0, 18, SAMPLES), groups(oracle.shaped()), strict=True):
            best, worst = first + scores.index(max(scores)), first + scores.index(min(scores))
            ratios = [(oracle.logprobs[i] - oracle.ref[i]).sum() for i in (best, worst)]
            differences.append(ratios[0] - ratios[1])
            entropies += [oracle.entropies[best], oracle.entropies[worst]]
        d = torch.stack(differences)
        losses = {
            "dpo": -logsigmoid(0.3 * d), "ipo": (d - 1 / 0.6).square(), "hinge": (1 - 0.3 * d).clamp_min(0),
        }[kind]  # fmt: skip
        return losses.mean(), {
            "rollout/reward/mean": mean(oracle.shaped()),
            "rollout/tied_fraction": 0.0,
            "train/loss": float(losses.detach().mean()),
            "train/accuracy": float((d > 0).double().mean()),
            "train/margin/mean": 0.3 * float(d.detach().mean()),
            "train/entropy_nats": float(torch.cat(entropies).detach().mean()),
        }

    compare("online_dpo", config, expected)


OFF = 0.1  # the sampler's log-probability of every token is off by this


@pytest.mark.parametrize("stage", POLICY_GRADIENTS)
@pytest.mark.parametrize("cap", [1.09, 2.4])
def test_a_samplers_actions_weigh_what_the_trainer_would_have_drawn_them(stage: str, cap: float) -> None:
    """Tokens (grpo) weigh exp(.1), completions exp(.1 tokens), each at most the cap; nothing has been updated."""
    config = section(stage, sampler_correction="truncated", sampler_correction_cap=cap, kl_coef=0.0, **ONE_UPDATE)
    made = rollout_cast()
    made = RolloutModels(**{**_fields(made), "sampler": OffsetSampler(made.sampler, OFF)})
    oracle_models = copy.deepcopy(made)
    oracle = FirstRollout(oracle_models, config, stage, SEED)
    learner = LEARNERS[stage](config)
    drawn = [prompts()[i] for i in prompt_indices(1, config, len(PROMPTS), SEED, stage)]
    advantages = learner.lesson(collect(made, drawn, config, (stage, SEED, 1))).advantages
    assert advantages is not None

    lengths = [len(new) for new in oracle.logprobs]
    exact = [math.exp(OFF * (1 if stage == "grpo" else n)) for n in lengths]
    weights = [min(w, cap) for w in exact]
    counts = lengths if stage == "grpo" else [1] * len(lengths)
    share = [w * n for w, n in zip(weights, counts, strict=True)]
    [row] = run(stage, made, config, 1)
    assert row["rollout/sampler_weight/mean"] == pytest.approx(sum(share) / sum(counts), rel=1e-5)
    capped = sum(n for w, n in zip(exact, counts, strict=True) if w >= cap) / sum(counts)
    assert row["rollout/sampler_weight_capped_fraction"] == pytest.approx(capped)
    assert capped == (cap == 1.09) if stage == "grpo" else 0 < capped

    ratios = [(new - new.detach()).exp().mean() for new in oracle.logprobs]
    if stage != "grpo":
        ratios = [(new - new.detach()).sum().exp() for new in oracle.logprobs]
    loss = -sum(a * w * r for a, w, r in zip(advantages.tolist(), weights, ratios, strict=True)) / len(ratios)
    loss.backward()
    assert row["train/policy_loss"] == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-5)
    assert row["train/grad_norm"] == pytest.approx(gradient_norm(oracle_models.policy), rel=1e-5)


@pytest.mark.parametrize("stage", POLICY_GRADIENTS)
def test_a_sampler_that_agrees_with_the_trainer_is_not_corrected(stage: str) -> None:
    plain, corrected = rollout_cast(), rollout_cast()
    run(stage, plain, section(stage), 2)
    rows = run(stage, corrected, section(stage, sampler_correction="truncated"), 2)
    assert all(row["rollout/sampler_weight/mean"] == pytest.approx(1, abs=1e-5) for row in rows)
    for name, value in weights(plain.policy).items():
        torch.testing.assert_close(value, weights(corrected.policy)[name], rtol=0, atol=1e-5)


# --- what must hold of all of them -----------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("source", ["sampler", "recompute"])
@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_before_the_first_update_of_every_rollout_the_ratio_is_1(stage: str, source: str, layout: str) -> None:
    config = section(stage, old_logprobs=source, temperature=0.6, learning_rate=1e-3)
    trainer = online(stage, rollout_cast("llama", torch.float32, layout=layout), config)
    rows = measured(trainer, range(1, STEPS + 1))
    assert all(row["train/ratio_max_deviation"] <= 1e-5 for row in rows)
    assert trainer.drift == max(row["train/ratio_max_deviation"] for row in rows)
    assert all(abs(row["train/ratio_mean"] - 1) > 1e-6 for row in rows)  # the updates themselves do move it


@every_method
def test_a_sampler_that_disagrees_with_the_trainer_is_seen(stage: str) -> None:
    made = rollout_cast()
    made = RolloutModels(**{**_fields(made), "sampler": OffsetSampler(made.sampler, 0.01)})
    trainer = online(stage, made, section(stage, old_logprobs="sampler"))
    measured(trainer, [1])
    assert trainer.drift == pytest.approx(math.expm1(0.01), abs=1e-5)


def _fields(made: RolloutModels) -> dict[str, Any]:
    return {name: getattr(made, name) for name in RolloutModels.__dataclass_fields__}


@every_method
@pytest.mark.parametrize("score", [0.0, 0.1])
def test_equal_scores_teach_nothing(stage: str, score: float) -> None:
    """Without a price on KL every advantage is exactly 0, every pair a tie, and no weight moves a bit."""
    made = rollout_cast(function=lambda prompt, completion: score)
    before = weights(made.policy)
    options = {"kl_coef": 0.0} if stage in POLICY_GRADIENTS else {}
    rows = run(stage, made, section(stage, missing_eos_penalty=0.0, **options))
    assert all(row["rollout/tied_fraction"] == 1 for row in rows)
    assert all(row.get("train/grad_norm", 0.0) == 0 for row in rows)
    assert equal(before, weights(made.policy))


@pytest.mark.parametrize("stage", POLICY_GRADIENTS)
def test_the_price_of_kl_teaches_even_where_scores_are_equal(stage: str) -> None:
    made = rollout_cast(function=nothing)
    config = section(stage, missing_eos_penalty=0.0, kl_coef=1.0, learning_rate=0.003, episodes=18 * 8)
    rows = run(stage, made, config, 8)
    assert all(row["train/grad_norm"] > 0 for row in rows)
    assert rows[-1]["rollout/kl_per_sequence_nats"] < rows[0]["rollout/kl_per_sequence_nats"] - 1


@every_method
def test_neither_micro_batches_nor_layout_change_a_step(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float64: 16 tokens are one prompt's completions or less, 10,000 the whole rollout; rows are packed wherever their
    lengths differ."""
    monkeypatch.setattr(layouts, "ROW_TOKENS", 0)
    options = {"entropy_coef": 0.1} if stage in POLICY_GRADIENTS else {}
    runs = []
    for layout, budget in (
        ("plain", 10_000), ("plain", 16), ("shared", 16), ("shared", 64), ("shared_packed", 64), ("plain_packed", 64),
    ):  # fmt: skip
        made = rollout_cast(layout=layout)
        rows = run(stage, made, section(stage, micro_batch_tokens=budget, **options))
        runs.append((weights(made.policy), rows))
    for policy, rows in runs[1:]:
        for name in policy:
            torch.testing.assert_close(policy[name], runs[0][0][name], rtol=0, atol=1e-7)
        for row, other in zip(rows, runs[0][1], strict=True):
            assert row == pytest.approx(other, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("averaging", ["token", "constant"])
def test_the_averages_do_not_depend_on_micro_batches_either(averaging: str) -> None:
    runs = [
        run("grpo", rollout_cast(), section("grpo", averaging=averaging, micro_batch_tokens=budget))
        for budget in (10_000, 16)
    ]
    for row, other in zip(*runs, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)


@every_method
def test_the_truth_is_logged_and_never_trained_on_and_the_reference_stays(stage: str) -> None:
    made, told = rollout_cast(), rollout_cast(gold=lambda prompt, completion: 100.0 * len(completion))
    before = weights(told.reference), weights(told.policy)
    [row], [other] = run(stage, made, section(stage), 1), run(stage, told, section(stage), 1)
    assert other.pop("rollout/gold_utility/mean") > 100
    other.pop("rollout/gold_utility/std")
    assert row == other
    assert equal(weights(made.policy), weights(told.policy))
    assert equal(before[0], weights(told.reference)) and not equal(before[1], weights(told.policy))


@every_method
def test_with_learning_rate_0_nothing_moves(stage: str) -> None:
    made = rollout_cast()
    before = weights(made.policy)
    assert all(row["train/grad_norm"] > 0 for row in run(stage, made, section(stage, learning_rate=0.0)))
    assert equal(before, weights(made.policy))


@every_method
def test_a_captured_trainer_goes_on_as_the_old_one(stage: str) -> None:
    old_models, new_models = rollout_cast(), rollout_cast()
    old = online(stage, old_models, section(stage))
    measured(old, [1])
    captured = copy.deepcopy(old.capture())
    rows = measured(old, [2, 3])
    new = online(stage, new_models, section(stage))
    new.restore(captured)
    assert measured(new, [2, 3]) == rows
    assert equal(weights(old_models.policy), weights(new_models.policy))
    assert old.drift == new.drift


# --- every option is read --------------------------------------------------------------------------------------------

# Values that must change what happens in two steps of `section(..., max_new_tokens=20)`.
ROLLOUT_OPTIONS: dict[str, Any] = {
    "learning_rate": 0.02, "schedule": "linear", "warmup_fraction": 0.9, "weight_decay": 0.5, "adam_beta1": 0.5,
    "adam_beta2": 0.5, "adam_epsilon": 0.01, "max_grad_norm": 0.001, "max_new_tokens": 5, "temperature": 0.5,
    "missing_eos_penalty": 3.0, "prompts_per_step": 2, "samples_per_prompt": 4, "update_epochs": 3, "minibatches": 3,
    "score_clip": 1.0, "old_logprobs": "sampler", "kl_budget": 0.001,
    "shaping": ShapingConfig(length_penalty=0.1, length_free=4),
}  # fmt: skip
SHARED_OPTIONS: dict[str, Any] = {
    "kl_coef": 0.5, "clip_range": 0.001, "entropy_coef": 0.5, "sampler_correction": "truncated",
}  # fmt: skip
OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "rloo": SHARED_OPTIONS,
    "grpo": {
        **SHARED_OPTIONS, "kl_estimator": "k2", "kl_in": "reward", "advantage_scale": "none", "averaging": "token",
    },
    "reinforce": {**SHARED_OPTIONS, "advantage_scale": "std"},
    "online_dpo": {"loss": "hinge", "beta": 0.3},
}  # fmt: skip
# Read by the stage, by the training loop, or with no say in the result.
ELSEWHERE = {
    "init", "reward_model", "holdout_reward_model", "reward_function", "gold_function", "checkpoint_every",
    "keep_checkpoints", "samples_every", "optimiser",
    "episodes", "micro_batch_tokens", "max_failed_fraction", "environment", "max_turns",
    "scorers",
}  # fmt: skip


def outcome(stage: str, **changes: Any) -> list[dict[str, float]]:
    """What two steps did, answers being long enough to end by themselves, but for what merely repeats an option."""
    rows = run(stage, rollout_cast(layout="plain"), section(stage, **({"max_new_tokens": 20} | changes)), 2)
    return [{k: v for k, v in row.items() if k not in ("train/learning_rate", "train/kl_coef")} for row in rows]


@pytest.fixture(scope="module")
def usual() -> dict[str, list[dict[str, float]]]:
    return {stage: outcome(stage) for stage in SECTIONS}


@every_method
def test_every_option_of_the_section_is_in_a_table(stage: str) -> None:
    assert SECTIONS[stage].model_fields.keys() == ROLLOUT_OPTIONS.keys() | OWN_OPTIONS[stage].keys() | (
        ELSEWHERE | ({"sampler_correction_cap"} if stage in POLICY_GRADIENTS else set())
    )


@pytest.mark.parametrize(
    ("stage", "option", "value"),
    [(stage, *item) for stage in SECTIONS for item in (ROLLOUT_OPTIONS | OWN_OPTIONS[stage]).items()]
    + [("grpo", "averaging", "constant"), ("online_dpo", "loss", "ipo")],
)
def test_every_option_changes_the_outcome(
    stage: str, option: str, value: Any, usual: dict[str, list[dict[str, float]]]
) -> None:
    assert outcome(stage, **{option: value}) != usual[stage]


@every_method
def test_episodes_are_rounded_up_and_samples_are_kept_when_due(stage: str) -> None:
    trainer = online(stage, rollout_cast(), section(stage, episodes=3 * SAMPLES * 4 + 1, samples_every=2))
    assert trainer.total_steps == 5
    assert [bool(trainer.step(number).samples) for number in range(1, 6)] == [True, True, False, True, True]


# --- pairs, and single samples ---------------------------------------------------------------------------------------


def test_pairs_that_tie_are_skipped_and_counted() -> None:
    """Only the first prompt's answers differ: one pair of five prompts, and a pass has one update, whatever parts."""

    def only_the_first(prompt: str, completion: str) -> float:
        return float(len(completion)) if prompt == PROMPTS[0] else 0.0

    made = rollout_cast(function=only_the_first)
    config = section("online_dpo", prompts_per_step=5, minibatches=3, missing_eos_penalty=0.0, learning_rate=0.0)
    [row] = run("online_dpo", made, config, 1)
    assert row["rollout/tied_fraction"] == pytest.approx(0.8)

    alone = rollout_cast(function=only_the_first)
    [other] = run("online_dpo", alone, config.model_copy(update={"minibatches": 1, "update_epochs": 1}), 1)
    for name in ("train/loss", "train/grad_norm", "train/margin/mean", "train/entropy_nats"):
        assert row[name] == pytest.approx(other[name], rel=1e-9)


def test_online_dpo_prefers_the_best_and_disprefers_the_worst() -> None:
    """The score counts a digit: after a few steps it is written more often; scored the other way round, less."""
    scores = []
    for sign in (1, -1):
        made = rollout_cast(function=lambda prompt, completion, sign=sign: sign * float(completion.count("4")))
        config = section("online_dpo", missing_eos_penalty=0.0, episodes=18 * 6, beta=0.5, learning_rate=0.003)
        scores.append([row["rollout/score/mean"] for row in run("online_dpo", made, config, 6)])
    assert all(score[-1] > score[0] + 0.5 for score in scores)


def test_one_sample_a_prompt_will_do_for_reinforce() -> None:
    config = section("reinforce", samples_per_prompt=1, prompts_per_step=5, episodes=15)
    rows = run("reinforce", rollout_cast(), config)
    assert all(row["train/grad_norm"] > 0 and "rollout/tied_fraction" not in row for row in rows)
