"""PPO's options that keep what the model knew: each against what it must do to one step, or to several."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from accord.config import PPOConfig, recipe_from
from accord.errors import ConfigError
from accord.methods.online_stage import LEARNERS
from accord.methods.online_trainer import OnlineTrainer
from accord.methods.ppo import PPOTrainer
from accord.models.load import reward_model_from
from accord.training.loop import run_training
from accord.training.runfolder import RunFolder
from models_support import tiny_model
from online_support import OffsetSampler, equal, measured, prompts, rollout_cast, weights


def section(**changes: Any) -> PPOConfig:
    fields: dict[str, Any] = {
        "prompts_per_step": 3, "samples_per_prompt": 4, "episodes": 12 * 4, "max_new_tokens": 6, "minibatches": 3,
        "update_epochs": 2, "learning_rate": 0.01, "kl_coef": 0.1, "schedule": "constant",
    }  # fmt: skip
    return PPOConfig(**(fields | changes))


class Made:
    """A trainer, with the models it trains."""

    def __init__(self, config: PPOConfig, off: float = 0.0) -> None:
        cast = rollout_cast()
        self.models = replace(cast, sampler=OffsetSampler(cast.sampler, off))
        self.value = reward_model_from(tiny_model("gpt2", dtype=torch.float64, seed=3), 4)
        self.trainer = PPOTrainer(self.models, self.value, prompts(), config, 0)

    def steps(self, *numbers: int) -> list[dict[str, float]]:
        return measured(self.trainer, numbers)

    def weights(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return weights(self.models.policy), weights(self.value)


# --- value model first -----------------------------------------------------------------------------------------------


def test_in_the_warm_up_the_value_model_learns_and_the_policy_does_not_move_a_bit() -> None:
    made = Made(section(value_warmup=2, kl_controller="adaptive", target_kl=0.5, kl_horizon=20))
    before = made.weights()
    rows = made.steps(1, 2)
    after = made.weights()
    assert equal(before[0], after[0]) and not equal(before[1], after[1])
    assert all(row["train/value_grad_norm"] > 0 and row["train/updates"] == 6 for row in rows)
    assert all("train/policy_loss" not in row and "train/grad_norm" not in row for row in rows)
    [first] = made.steps(3)
    assert first["train/grad_norm"] > 0 and first["train/ratio_max_deviation"] < 1e-6
    assert first["train/kl_coef"] == 0.1  # nothing was steered while nothing moved
    assert not equal(after[0], made.weights()[0])
    assert made.steps(4)[0]["train/kl_coef"] != 0.1


def test_a_warm_up_leaves_a_value_model_that_explains_more() -> None:
    """The same rollout of the unmoved policy, with and without four rollouts of warm-up before it."""
    config = {"value_learning_rate": 0.02, "episodes": 12 * 9, "update_epochs": 6}
    made, fresh = Made(section(value_warmup=4, **config)), Made(section(**config))
    made.steps(1, 2, 3, 4)
    assert made.steps(5)[0]["train/explained_variance"] > fresh.steps(5)[0]["train/explained_variance"] + 0.1


# --- the budget of a run, and of an update ---------------------------------------------------------------------------


def test_a_rollout_over_the_budget_is_not_learned_from_and_ends_the_stage() -> None:
    made = Made(section())
    [kl] = [row["rollout/kl_per_sequence_nats"] for row in made.steps(1)]
    for budget, ends in ((kl * 1.001, False), (kl * 0.999, True)):
        limited = Made(section(kl_budget=budget))
        before = limited.weights()
        outcome = limited.trainer.step(1)
        assert (outcome.ending is not None) == ends
        assert equal(before[0], limited.weights()[0]) == equal(before[1], limited.weights()[1]) == ends
    assert outcome.ending == f"KL {kl:.4g} nats per answer exceeded the budget of {kl * 0.999:g}"
    assert outcome.samples and outcome.metrics["rollout/kl_per_sequence_nats"] == kl
    assert "train/policy_loss" not in outcome.metrics


@pytest.mark.parametrize("stage", LEARNERS)
def test_the_budget_holds_in_every_online_method(stage: str) -> None:
    from test_online_step import SECTIONS

    config = SECTIONS[stage](prompts_per_step=3, samples_per_prompt=4, max_new_tokens=6, kl_budget=1e-3)
    models = rollout_cast()
    before = weights(models.policy)
    outcome = OnlineTrainer(stage, models, prompts(), config, LEARNERS[stage](config), 0).step(1)
    assert outcome.ending is not None and "exceeded the budget of 0.001" in outcome.ending
    assert equal(before, weights(models.policy))


def test_a_run_over_its_budget_ends_with_the_model_before_that_rollout_and_stays_ended(tmp_path: Path) -> None:
    whole = Made(section())
    kls = [row["rollout/kl_per_sequence_nats"] for row in whole.steps(1, 2, 3, 4)]
    assert kls[2] > max(kls[:2])
    config = section(kl_budget=(max(kls[:2]) + kls[2]) / 2, checkpoint_every=2)
    kept = Made(section())
    kept.steps(1, 2)

    def run(made: Made) -> Any:
        with RunFolder.open(tmp_path, resolved_config={}, fingerprints={}) as folder:
            return run_training(made.trainer, folder, Console(file=io.StringIO()))

    made = Made(config)
    ended = run(made)
    assert ended.steps == 3 and ended.early is not None
    assert equal(kept.weights()[0], made.weights()[0]) and equal(kept.weights()[1], made.weights()[1])
    again = Made(config)
    assert run(again) == ended
    assert equal(kept.weights()[0], again.weights()[0])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_the_rest_of_a_rollout_is_left_once_a_minibatch_finds_the_policy_too_far() -> None:
    seen: list[float] = []
    for stop in (None, 1e-9):
        made = Made(section(update_kl_stop=stop))
        [row] = made.steps(1)
        seen.append(row["train/updates"])
    assert seen == [6, 1]  # the first minibatch sees no distance at all, the second always some


def test_a_minibatch_that_finds_the_policy_too_far_leaves_no_gradient_behind() -> None:
    made = Made(section(update_kl_stop=1e-9))
    made.steps(1)
    assert all(p.grad is None for model in (made.models.policy, made.value) for p in model.parameters())


def test_a_limit_that_is_never_reached_changes_nothing() -> None:
    free, limited = Made(section()), Made(section(update_kl_stop=100.0, kl_budget=1e6))
    assert free.steps(1, 2) == limited.steps(1, 2)
    assert equal(free.weights()[0], limited.weights()[0])


def test_values_move_freely_without_a_clip_range() -> None:
    clipped, free, wide = (Made(section(value_clip_range=clip)) for clip in (1e-3, None, 1e9))
    assert clipped.steps(1)[0]["train/value_clip_fraction"] > 0
    assert free.steps(1) == wide.steps(1)
    assert equal(free.weights()[1], wide.weights()[1]) and not equal(free.weights()[1], clipped.weights()[1])


# --- a sampler that is not the trainer --------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_tokens_of_a_sampler_weigh_what_the_trainer_would_have_drawn_them(kl_in: str) -> None:
    """Every token is weighed exp(.3) = 1.35, or the cap: so are the policy's loss and gradient, and the KL in it."""
    estimator = "k1" if kl_in == "reward" else "k2"
    one = {"minibatches": 1, "update_epochs": 1, "max_grad_norm": 1e9, "kl_estimator": estimator, "kl_in": kl_in}
    corrected = {**one, "sampler_correction": "truncated"}
    rows = []
    for changes in (one, corrected, {**corrected, "sampler_correction_cap": 1.2}):
        made = Made(section(**changes), off=0.3)
        rows += made.steps(1)
    for row, weight in zip(rows[1:], (math.exp(0.3), 1.2), strict=True):
        assert row["rollout/sampler_weight/mean"] == pytest.approx(weight, rel=1e-5)
        for name in ("train/policy_loss", "train/grad_norm", "train/kl_loss"):
            if name in row:
                assert row[name] == pytest.approx(weight * rows[0][name], rel=1e-4, abs=1e-6), name
        assert row["train/value_grad_norm"] == rows[0]["train/value_grad_norm"]
    assert [row.get("rollout/sampler_weight_capped_fraction") for row in rows] == [None, 0.0, 1.0]
    assert all(row["rollout/sampler_deviation"] == pytest.approx(-math.expm1(-0.3), rel=1e-4) for row in rows)


# --- what cannot be meant --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"kl_controller": "adaptive", "target_kl": 6, "kl_budget": 6},
            ["`ppo.target_kl` = 6", "`ppo.kl_budget` = 6", "well above"],
        ),
        ({"episodes": 256, "value_warmup": 2}, ["`ppo.value_warmup` = 2", "2 rollouts", "`ppo.episodes`"]),
        (
            {"sampler_correction": "truncated", "old_logprobs": "sampler"},
            ["`ppo.sampler_correction` = truncated", "set `ppo.old_logprobs` = recompute"],
        ),
        ({"sampler_correction_cap": 3}, ["`ppo.sampler_correction_cap` is read only by"]),
        ({"kl_in": "loss"}, ["`ppo.kl_estimator` = k1 with `ppo.kl_in` = loss", "zero in expectation", "Take k2"]),
        ({"kl_estimator": "k2"}, ["`ppo.kl_estimator` = k2 with `ppo.kl_in` = reward", "biased"]),
        ({"kl_estimator": "k3"}, ["`ppo.kl_estimator` = k3 with `ppo.kl_in` = reward", "not its gradient"]),
    ],
)
def test_a_contradiction_is_refused_with_the_reason(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        recipe_from({"ppo": changes})
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "changes", [{"kl_in": "reward"}, {"kl_estimator": "k1"}, {"kl_estimator": "k2", "kl_in": "reward"}]
)
def test_grpo_refuses_the_same_mixtures(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"`grpo\.kl_estimator` = k\d with `grpo\.kl_in`"):
        recipe_from({"grpo": changes})


def test_what_comes_close_is_no_contradiction() -> None:
    for changes in (
        {"kl_controller": "adaptive", "target_kl": 6, "kl_budget": 12},
        {"episodes": 257, "value_warmup": 2},
        {"kl_estimator": "k2", "kl_in": "loss"},
        {"kl_estimator": "k3", "kl_in": "loss"},
    ):
        recipe_from({"ppo": changes})
