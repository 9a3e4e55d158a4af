"""PPO's options that keep what the model knew: each against what it must do to one step, or to several."""

from __future__ import annotations

import copy
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
from accord.data.order import batch_indices
from accord.errors import ConfigError, DataError
from accord.methods.corpus import Corpus, Part
from accord.methods.online_stage import LEARNERS
from accord.methods.online_trainer import OnlineTrainer
from accord.methods.plan import check_sizes
from accord.methods.ppo import PPOTrainer
from accord.methods.ptx import Imitation
from accord.models.load import reward_model_from
from accord.records import Completion, Group, Message, TokenCompletion, TokenGroup
from accord.rewards.scorers import FunctionScorer
from accord.training.loop import run_training
from accord.training.optim import Optimiser
from accord.training.runfolder import RunFolder
from models_support import EOS_ID, PAD_ID, tiny_model
from online_support import OffsetSampler, equal, measured, prompts, rollout_cast, unpadded, weights


def section(**changes: Any) -> PPOConfig:
    fields: dict[str, Any] = {
        "prompts_per_step": 3, "samples_per_prompt": 4, "episodes": 12 * 4, "max_new_tokens": 6, "minibatches": 3,
        "update_epochs": 2, "learning_rate": 0.01, "kl_coef": 0.1, "schedule": "constant",
    }  # fmt: skip
    return PPOConfig(**(fields | changes))


DEMONSTRATIONS = [
    TokenGroup((5 + i, 6), (TokenCompletion((7, 8 + i, 9, EOS_ID)[:n], (True, i % 2 == 0, True, True)[:n]),))
    for i, n in enumerate((2, 3, 4, 2, 3, 4, 2))
]  # fmt: skip


class Made:
    """A trainer, with the models it trains."""

    def __init__(self, config: PPOConfig, off: float = 0.0, **changes: Any) -> None:
        cast = rollout_cast()
        self.models = replace(cast, sampler=OffsetSampler(cast.sampler, off), **changes)
        self.value = reward_model_from(tiny_model("gpt2", dtype=torch.float64, seed=3), 4)
        imitation = Imitation(DEMONSTRATIONS, config, pad_id=PAD_ID, seed=0) if config.ptx_coef else None
        self.trainer = PPOTrainer(self.models, self.value, prompts(), config, 0, imitation)

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


# --- demonstrations mixed in -----------------------------------------------------------------------------------------


def imitation_loss(model: Any, items: list[TokenGroup]) -> Any:
    """Minus the mean log-probability of the counted tokens, from one unpadded row at a time."""
    counted = []
    for item in items:
        [completion] = item.completions
        logits = model(**unpadded(item.prompt_ids + completion.ids)).logits[0, len(item.prompt_ids) - 1 : -1]
        logprobs = logits.log_softmax(-1)[range(len(completion.ids)), completion.ids]
        counted.append(logprobs[list(completion.mask)])
    return -torch.cat(counted).mean()


def imitation_gradient(model: Any, items: list[TokenGroup], weight: float) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    (weight * imitation_loss(model, items)).backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return gradient


def batch(number: int, size: int) -> list[TokenGroup]:
    return [DEMONSTRATIONS[i] for i in batch_indices(number, len(DEMONSTRATIONS), size, 0, "ppo", "ptx")]


@pytest.mark.parametrize("budget", [16, 10_000])
def test_the_gradient_of_a_batch_of_demonstrations_is_that_of_its_mean_loss(budget: int) -> None:
    config = section(ptx_coef=2.5, ptx_batch_size=5, micro_batch_tokens=budget)
    model = rollout_cast().policy
    expected = imitation_gradient(model, batch(3, 5), 2.5)
    imitation = Imitation(DEMONSTRATIONS, config, pad_id=PAD_ID, seed=0)
    sums = imitation.accumulate(model, 3, budget, lambda loss: loss.backward())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-9)
    assert sums["ptx_tokens"] == sum(sum(item.completions[0].mask) for item in batch(3, 5))


def test_with_nothing_else_to_learn_an_update_is_one_of_sft_on_that_batch() -> None:
    """No reward, no price on KL, values 0: the policy's gradients are those of the updates' batches alone."""
    nothing = FunctionScorer(lambda prompt, completion: 0.0, "nothing")
    config = section(
        ptx_coef=3.0, ptx_batch_size=3, kl_coef=0.0, missing_eos_penalty=0.0, update_epochs=1, minibatches=2
    )
    made = Made(config, scorer=nothing)
    with torch.no_grad():
        made.value.score.weight.zero_()
    model = copy.deepcopy(made.models.policy)
    optimiser = Optimiser(model, config)
    norms, losses, tokens = [], 0.0, 0
    for number in (3, 4):  # step 2 of two updates each
        gradient = imitation_gradient(model, batch(number, 3), 3.0)
        counted = sum(sum(item.completions[0].mask) for item in batch(number, 3))
        for name, parameter in model.named_parameters():
            parameter.grad = gradient[name]
        losses += counted * float(imitation_loss(model, batch(number, 3)).detach())
        tokens += counted
        norms.append(optimiser.update(config.learning_rate).grad_norm)
    [row] = made.steps(2)
    assert row["train/policy_loss"] == 0
    assert row["train/grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-6)
    assert row["train/ptx_loss"] == pytest.approx(losses / tokens, rel=1e-6)
    for name, value in weights(made.models.policy).items():
        torch.testing.assert_close(value, weights(model)[name], rtol=0, atol=1e-6)


def test_mixing_adds_the_gradients_of_both() -> None:
    """One update: with and without demonstrations, the difference is the batch's gradient, clipping aside."""
    one = {"minibatches": 1, "update_epochs": 1, "max_grad_norm": 1e9}
    without, mixed = Made(section(**one)), Made(section(ptx_coef=2.0, ptx_batch_size=4, **one))
    extra = imitation_gradient(without.models.policy, batch(1, 4), 2.0)
    plain, both = gradients_of(without), gradients_of(mixed)
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, plain[name] + extra[name], rtol=1e-5, atol=1e-7)
    assert equal(without.weights()[1], mixed.weights()[1])


def gradients_of(made: Made) -> dict[str, torch.Tensor]:
    """The policy's gradients as its optimiser finds them in the first update."""
    seen: dict[str, torch.Tensor] = {}
    optimiser = made.trainer._pupils._policy_optimiser
    update = optimiser.update

    def watched(rate: float) -> Any:
        seen.update({name: p.grad.clone() for name, p in made.models.policy.named_parameters()})
        return update(rate)

    optimiser.update = watched  # type: ignore[method-assign]
    made.steps(1)
    return seen


def test_every_demonstration_is_mixed_in_equally_often_in_an_order_that_changes() -> None:
    seen = [batch(number, 3) for number in range(1, 7)]  # 7 demonstrations: batches of 3, 3 and 1
    passes = [[item.prompt_ids for b in seen[i : i + 3] for item in b] for i in (0, 3)]
    assert sorted(passes[0]) == sorted(passes[1]) == [item.prompt_ids for item in DEMONSTRATIONS]
    assert passes[0] != passes[1]


def test_imitation_at_weight_0_would_not_change_a_bit() -> None:
    made, mixed = Made(section()), Made(section())
    mixed.trainer._imitation = Imitation(DEMONSTRATIONS, section(), pad_id=PAD_ID, seed=0)
    made.steps(1, 2)
    assert mixed.steps(1, 2)[0]["train/ptx_loss"] > 0
    assert equal(made.weights()[0], mixed.weights()[0]) and equal(made.weights()[1], mixed.weights()[1])


def test_with_everything_on_a_captured_trainer_goes_on_as_the_old_one() -> None:
    config = section(
        ptx_coef=0.5, ptx_batch_size=3, value_warmup=1, update_kl_stop=0.02, kl_estimator="k2", kl_in="loss",
        sampler_correction="truncated", kl_controller="adaptive", target_kl=0.5, kl_horizon=40, kl_budget=1e6,
    )  # fmt: skip
    old, new = Made(config, off=0.01), Made(config, off=0.01)
    old.steps(1, 2)
    captured = copy.deepcopy(old.trainer.capture())
    rows = old.steps(3, 4)
    assert {row["train/kl_coef"] for row in rows} != {0.1}
    new.trainer.restore(captured)
    assert new.steps(3, 4) == rows
    assert equal(old.weights()[0], new.weights()[0]) and equal(old.weights()[1], new.weights()[1])


def test_without_demonstrations_it_is_refused_before_training() -> None:
    recipe = recipe_from({"ppo": {"ptx_coef": 1.0, "prompts_per_step": 2, "minibatches": 1}, "data": {"holdout": 0}})
    asked = Part.of([Group((Message("user", text),)) for text in "abc"], "prompts")
    with pytest.raises(DataError, match=r"`ppo\.ptx_coef` mixes demonstrations .* set `data\.ptx`, `data\.sft`"):
        check_sizes(recipe, Corpus(prompts=asked), ["ppo"])
    said = Group((Message("user", "a"),), (Completion((Message("assistant", "b"),)),))
    for corpus in (
        Corpus(prompts=asked, ptx=Part.of([said], "text")),
        Corpus(prompts=asked, sft=Part.of([said], "demos")),
    ):
        check_sizes(recipe, corpus, ["ppo"])
    held_out = recipe_from(
        {"ppo": {"ptx_coef": 1.0, "prompts_per_step": 1, "minibatches": 1}, "data": {"holdout": 0.999}}
    )
    many = Part.of([Group((Message("user", str(i)),)) for i in range(3000)], "prompts")
    with pytest.raises(DataError, match="no demonstration to imitate: 1 are held out"):
        check_sizes(held_out, Corpus(prompts=many, ptx=Part.of([said], "text")), ["ppo"])


def test_what_is_mixed_in_is_data_ptx_before_the_demonstrations() -> None:
    one, two = (Group((Message("user", t),), (Completion((Message("assistant", t),)),)) for t in "ab")
    corpus = Corpus(sft=Part.of([one], "demos"), ptx=Part.of([two], "text"))
    assert corpus.imitated().groups == (two,) and list(corpus.imitated().sources) == ["text"]
    assert Corpus(sft=Part.of([one], "demos")).imitated().groups == (one,)


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
        ({"ptx_batch_size": 8}, ["`ppo.ptx_batch_size` is read only with `ppo.ptx_coef`"]),
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


def test_text_to_imitate_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`data\.ptx` is read only with `ppo\.ptx_coef`"):
        recipe_from({"data": {"ptx": "text.jsonl"}, "ppo": {}})
    recipe_from({"data": {"ptx": "text.jsonl"}, "ppo": {"ptx_coef": 1}})


def test_what_comes_close_is_no_contradiction() -> None:
    for changes in (
        {"kl_controller": "adaptive", "target_kl": 6, "kl_budget": 12},
        {"episodes": 257, "value_warmup": 2},
        {"kl_estimator": "k2", "kl_in": "loss"},
        {"kl_estimator": "k3", "kl_in": "loss"},
    ):
        recipe_from({"ppo": changes})
