"""Contradictions between keys: found before anything is loaded, each with the edit that mends it."""

from __future__ import annotations

import math
from typing import get_args

from accord.config.check_scorers import judge_contradictions, scorer_contradictions
from accord.config.loop import LoopConfig
from accord.config.offline import MARGIN_FREE, DPOConfig, KTOConfig, PairLoss, RewardConfig
from accord.config.online import (
    PolicyGradientFields,
    PPOConfig,
    REINFORCEConfig,
    RolloutFields,
    SamplingFields,
    TokenKLFields,
)
from accord.config.recipe import Recipe
from accord.config.sections import ModelConfig, Section

__all__ = ["contradictions"]


def contradictions(recipe: Recipe) -> list[str]:
    """One sentence for each pair of keys that cannot both be meant."""
    problems = _model(recipe.model)
    data = recipe.data
    if data.max_prompt_tokens is not None and data.max_prompt_tokens >= data.max_tokens:
        problems.append(
            f"`data.max_prompt_tokens` = {data.max_prompt_tokens} leaves no room for an answer within "
            f"`data.max_tokens` = {data.max_tokens}"
        )
    for stage in Recipe.model_fields:
        section = getattr(recipe, stage)
        for key, holder in ((stage, section), (f"{stage}.rouge", getattr(section, "rouge", None))):
            room = getattr(holder, "max_new_tokens", 0)
            if room >= data.max_tokens:
                problems.append(
                    f"`{key}.max_new_tokens` = {room} leaves no room for a prompt within `data.max_tokens` = "
                    f"{data.max_tokens}"
                )
        if isinstance(section, SamplingFields):
            problems.extend(_sampling(stage, section))
        if isinstance(section, RolloutFields):
            problems.extend(_rollout(stage, section))
        if isinstance(section, PolicyGradientFields):
            problems.extend(_sampler_correction(stage, section))
        if isinstance(section, TokenKLFields):
            problems.extend(_kl(stage, section))
    return problems + _methods(recipe)


def _model(model: ModelConfig) -> list[str]:
    problems: list[str] = []
    if model.path is not None and model.scratch is not None:
        problems.append("`model.path` and `model.scratch` are both set: keep the one to start from")
    if model.scratch is not None and model.scratch.hidden_size % model.scratch.heads:
        problems.append(
            f"`model.scratch.heads` = {model.scratch.heads} does not divide `model.scratch.hidden_size` = "
            f"{model.scratch.hidden_size}"
        )
    if model.offload and model.device == "cpu":
        problems.append(
            "`model.offload` moves models between a GPU and the CPU, and `model.device` = cpu leaves all on the CPU: "
            "drop one of them"
        )
    shared = next((key for key in ("adapter", "trainable_blocks") if getattr(model, key) is not None), None)
    if model.offload and shared is not None:
        problems.append(
            f"`model.offload` moves the reference off the GPU, and with `model.{shared}` it shares its weights with "
            "the policy, which needs them there: drop `model.offload`, for the reference costs next to nothing"
        )
    if model.adapter is not None and model.trainable_blocks is not None:
        problems.append(
            "`model.adapter` and `model.trainable_blocks` are both set: train adapters in all blocks, or the top "
            "blocks whole"
        )
    if model.quantise is not None and model.adapter is None:
        problems.append(
            f"`model.quantise` = {model.quantise} needs `model.adapter`: weights in 4 bits cannot be trained"
        )
    if model.compile:
        others = {"quantise": model.quantise is not None, "activation_checkpointing": model.activation_checkpointing}
        problems += [
            f"`model.compile` and `model.{key}` are both set, and such passes cannot be compiled: choose one"
            for key, chosen in others.items()
            if chosen
        ]
    if model.compile_sampling and model.adapter is not None:
        problems.append(
            "`model.compile_sampling` and `model.adapter` are both set, and the step of a model with adapters "
            "cannot be compiled: choose one"
        )
    if model.compile_sampling and model.scratch is not None and model.scratch.kind != "llama":
        problems.append(
            f"`model.compile_sampling` compiles the step of Llama-like models, and `model.scratch.kind` = "
            f"{model.scratch.kind}: take `llama`, or drop `model.compile_sampling`"
        )
    problems += _attention(model)
    if model.adapter is not None and model.adapter.targets:
        problems += [
            f"`model.adapter.ranks` names {ending}, which is no layer that `model.adapter.targets` = "
            f"{', '.join(model.adapter.targets)} adapts: add it there, or drop its rank"
            for ending in model.adapter.ranks
            if not any(_both_end(ending, target) for target in model.adapter.targets)
        ]
    if model.scratch is not None and (model.trainable_blocks or 0) > model.scratch.layers:
        problems.append(
            f"`model.trainable_blocks` = {model.trainable_blocks} is more than `model.scratch.layers` = "
            f"{model.scratch.layers}"
        )
    return problems


def _attention(model: ModelConfig) -> list[str]:
    """Kernels that the rest of the section leaves nothing to do, or makes impossible."""
    chosen = f"`model.attention` = {model.attention}"
    problems = []
    if model.attention in {"flex", "flash"} and model.device == "cpu":
        problems.append(f"{chosen} runs on a GPU alone, and `model.device` = cpu: set one of them to auto")
    if model.attention == "flex" and model.layout == "plain":
        problems.append(
            f"{chosen} is for the mask of the shared layout, and `model.layout` = plain has none: set one of them to "
            "auto"
        )
    if model.attention == "flash" and model.layout == "shared":
        problems.append(
            f"{chosen} takes no mask, and `model.layout` = shared needs one: set `model.layout` = plain, or "
            "`model.attention` = flex or auto"
        )
    if model.attention == "flash" and model.precision == "float32":
        problems.append(
            f"{chosen} computes in 16 bits alone, and `model.precision` is float32: set `model.precision` = bfloat16, "
            "or `model.attention` = auto"
        )
    return problems


def _both_end(first: str, second: str) -> bool:
    """Whether one name can end in both."""
    return f".{first}".endswith(f".{second}") or f".{second}".endswith(f".{first}")


def _methods(recipe: Recipe) -> list[str]:
    """Contradictions within the section of one method."""
    problems: list[str] = []
    if recipe.reward is not None:
        problems.extend(_reward(recipe.reward))
    if recipe.data.ptx and not (recipe.ppo and recipe.ppo.ptx_coef):
        problems.append("`data.ptx` is read only with `ppo.ptx_coef` above 0, and it is not: set it (1, for example)")
    if recipe.ppo is not None:
        problems.extend(_ppo(recipe.ppo))
    if recipe.dpo is not None:
        problems.extend(_dpo(recipe.dpo))
    if recipe.kto is not None:
        problems.extend(_kto(recipe.kto))
    if recipe.reinforce is not None:
        problems.extend(_reinforce(recipe.reinforce))
    if recipe.loop is not None:
        problems.extend(_loop(recipe.loop))
    if recipe.rft is not None and recipe.rft.end_quantile < recipe.rft.start_quantile:
        problems.append(
            f"`rft.end_quantile` = {recipe.rft.end_quantile} is below `rft.start_quantile` = "
            f"{recipe.rft.start_quantile}: the selection gets stricter within a cycle, never laxer"
        )
    return problems


def _sampling(stage: str, section: SamplingFields) -> list[str]:
    named = [key for key in ("reward_model", "reward_function") if getattr(section, key) is not None]
    problems = []
    if len(named) == 2:
        problems.append(f"`{stage}.reward_model` and `{stage}.reward_function` are both set: keep the one that scores")
    if section.scorers and named:
        problems.append(
            f"`{stage}.{named[0]}` and `{stage}.scorers` are both set: make it one of the scorers, or drop the others"
        )
    return problems + _shaping(stage, section) + scorer_contradictions(stage, section)


def _rollout(stage: str, section: RolloutFields) -> list[str]:
    problems = _conversation(stage, section)
    if section.minibatches > section.prompts_per_step:
        problems.append(
            f"`{stage}.minibatches` = {section.minibatches} is more than `{stage}.prompts_per_step` = "
            f"{section.prompts_per_step}: a minibatch holds whole prompts"
        )
    return problems


def _conversation(stage: str, section: RolloutFields) -> list[str]:
    if section.environment is None:
        if section.max_turns is None:
            return []
        return [f"`{stage}.max_turns` is read only with `{stage}.environment`, which is not set"]
    problems: list[str] = []
    if section.max_turns is None:
        problems.append(
            f"`{stage}.environment` needs `{stage}.max_turns`, the most answers the policy gives in a conversation"
        )
    if section.shaping.reference != "none":
        problems.append(
            f"`{stage}.shaping.reference` = {section.shaping.reference} compares answers to the prompt, and with "
            f"`{stage}.environment` the last answer is one to what was said in between: set it to none"
        )
    return problems


def _shaping(stage: str, section: SamplingFields) -> list[str]:
    """Keys of `shaping` that nothing would read, and those that the rest of the section makes impossible."""
    shaping, key = section.shaping, f"{stage}.shaping"
    unread = {
        "missing_reference": (shaping.reference == "none", "reference"),
        "length_free": (shaping.length_penalty == 0, "length_penalty"),
        "overlong_penalty": (shaping.overlong_buffer == 0, "overlong_buffer"),
    }
    problems = [
        f"`{key}.{name}` is read only with `{key}.{other}`, which is off"
        for name, (off, other) in unread.items()
        if off and _changed(shaping, name)
    ]
    if shaping.overlong_buffer > section.max_new_tokens:
        problems.append(
            f"`{key}.overlong_buffer` = {shaping.overlong_buffer} is more than `{stage}.max_new_tokens` = "
            f"{section.max_new_tokens}: it is the last part of it"
        )
    if not isinstance(section, RolloutFields):
        problems += [
            f"`{key}.{name}` compares prompts or rollouts with each other, and {stage} chooses among the answers to "
            "one prompt: it would change no choice by itself; drop it"
            for name in ("reference", "running")
            if _changed(shaping, name)
        ]
    if shaping.diversity_bonus > 0 and getattr(section, "samples_per_prompt", 2) < 2:
        problems.append(
            f"`{key}.diversity_bonus` compares a prompt's samples: raise `{stage}.samples_per_prompt` to at least 2"
        )
    if shaping.truncation == "leave_out" and _changed(section, "missing_eos_penalty"):
        problems.append(f"`{stage}.missing_eos_penalty` is not read with `{key}.truncation` = leave_out: drop one")
    return problems


def _reward(reward: RewardConfig) -> list[str]:
    if reward.length_decorrelation and reward.loss != "pairs":
        return [
            f"`reward.length_decorrelation` splits the scores of whole answers, and `reward.loss` = {reward.loss} "
            "learns those of every token: set one of them to its default"
        ]
    return []


def _sampler_correction(stage: str, section: PolicyGradientFields) -> list[str]:
    corrects = section.sampler_correction == "truncated"
    if corrects and section.old_logprobs == "sampler":
        return [
            f"`{stage}.sampler_correction` = truncated compares the trainer's log-probabilities with the sampler's, "
            f"and `{stage}.old_logprobs` = sampler takes the sampler's for both: set `{stage}.old_logprobs` = recompute"
        ]
    if not corrects and _changed(section, "sampler_correction_cap"):
        return [
            f"`{stage}.sampler_correction_cap` is read only by `{stage}.sampler_correction` = truncated, and it is none"
        ]
    return []


# Why an estimator may not stand where it was put, and where it belongs.
_UNSOUND_KL = {
    ("k1", "loss"): "k1's gradient is zero in expectation, so nothing would hold the policy. Take k2, whose gradient "
    "is that of KL(policy || reference), or k1 in the reward",
    ("k2", "reward"): "k2 is a biased estimate, and a reward is taken at its word: what is priced would be no KL. Take "
    "k1 in the reward, or k2 in the loss",
    ("k3", "reward"): "k3 has the KL's value but not its gradient, and would push the policy where no KL does. Take k1 "
    "in the reward, or k3 in the loss",
}


def _kl(stage: str, section: TokenKLFields) -> list[str]:
    reason = _UNSOUND_KL.get((section.kl_estimator, section.kl_in))
    if reason is None:
        return []
    return [f"`{stage}.kl_estimator` = {section.kl_estimator} with `{stage}.kl_in` = {section.kl_in}: {reason}"]


def _dpo(dpo: DPOConfig) -> list[str]:
    """Options that the chosen loss would not read, when they were changed on purpose."""
    readers = {
        "label_smoothing": ("conservative", "robust"),
        "target_margin": ("simpo",),
        "length_coef": ("rdpo",),
        "use_margins": tuple(loss for loss in get_args(PairLoss) if loss not in MARGIN_FREE),
    }
    return [
        f"`dpo.{key}` is read only by `dpo.loss` = {' or '.join(losses)}, and `dpo.loss` is {dpo.loss}"
        for key, losses in readers.items()
        if _changed(dpo, key) and dpo.loss not in losses
    ]


def _kto(kto: KTOConfig) -> list[str]:
    return [
        f"`kto.{key}` is read only by `kto.loss` = kto, and `kto.loss` is {kto.loss}"
        for key in ("desirable_weight", "undesirable_weight")
        if _changed(kto, key) and kto.loss != "kto"
    ]


def _changed(section: Section, key: str) -> bool:
    """Another value than the default: a resolved recipe names every key, and must still load."""
    return getattr(section, key) != type(section).model_fields[key].default


def _loop(loop: LoopConfig) -> list[str]:
    readers = {
        "label_function": ("function",),
        "label_scale": ("function",),
        "judge": ("judge",),
        "max_failed_fraction": ("function", "judge"),
    }
    problems = [
        f"`loop.{key}` is read only by `loop.labeller` = {' or '.join(labellers)}, and `loop.labeller` is "
        f"{loop.labeller}"
        for key, labellers in readers.items()
        if _changed(loop, key) and loop.labeller not in labellers
    ]
    if loop.labeller == "judge" and loop.judge is None:
        problems.append("`loop.labeller` = judge needs a section `loop.judge` with the `url` and the `model` to ask")
    return problems + ([] if loop.judge is None else judge_contradictions("loop.judge", loop.judge))


def _reinforce(reinforce: REINFORCEConfig) -> list[str]:
    if reinforce.prompts_per_step * reinforce.samples_per_prompt < 2:
        return [
            "`reinforce` over a single completion has itself as baseline and learns nothing: raise "
            "`reinforce.prompts_per_step` or `reinforce.samples_per_prompt`"
        ]
    return []


def _value_model(ppo: PPOConfig) -> list[str]:
    """What is said of a value model that is not there, or of its being only a head."""
    if ppo.value_trunk == "own":
        read = ["`ppo.value_coef` is read only by `ppo.value_trunk` = policy: a value model of its own is not weighed"]
        return read if _changed(ppo, "value_coef") else []
    problems: list[str] = []
    if ppo.value_learning_rate is not None:
        problems.append(
            "`ppo.value_learning_rate` has no place with `ppo.value_trunk` = policy, where one optimiser moves both: "
            "set `ppo.value_coef`"
        )
    if _changed(ppo, "value_init") and ppo.value_init != "policy":
        problems.append(
            f"`ppo.value_init` = {ppo.value_init}, but with `ppo.value_trunk` = policy the value model is a head of "
            "zeros on the policy: leave `ppo.value_init` out, or set `ppo.value_trunk` = own"
        )
    return problems


def _ppo(ppo: PPOConfig) -> list[str]:
    problems = _value_model(ppo)
    modelled = any(scorer.model is not None for scorer in ppo.scorers.values())
    unmodelled = ppo.reward_function is not None or (bool(ppo.scorers) and not modelled)
    if unmodelled and ppo.value_init == "reward" and ppo.value_trunk == "own":
        given = "reward_function" if ppo.reward_function is not None else "scorers"
        problems.append(
            f"`ppo.value_init` = reward, but `ppo.{given}` is no model to start from: set `ppo.value_init` = policy"
        )
    if ppo.kl_controller == "adaptive" and ppo.target_kl is None:
        problems.append("`ppo.kl_controller` = adaptive needs `ppo.target_kl` (nats per sequence, for example 6)")
    if ppo.kl_controller == "adaptive" and ppo.kl_coef == 0:
        problems.append("`ppo.kl_controller` = adaptive multiplies `ppo.kl_coef`, which is 0 and would stay 0")
    if ppo.kl_controller == "fixed" and ppo.target_kl is not None:
        problems.append("`ppo.target_kl` is read only by `ppo.kl_controller` = adaptive, and it is fixed")
    if ppo.kl_controller == "fixed" and ppo.kl_horizon != PPOConfig.model_fields["kl_horizon"].default:
        problems.append("`ppo.kl_horizon` is read only by `ppo.kl_controller` = adaptive, and it is fixed")
    if ppo.kl_budget is not None and ppo.target_kl is not None and ppo.target_kl >= ppo.kl_budget:
        problems.append(
            f"`ppo.target_kl` = {ppo.target_kl:g} steers towards a KL that `ppo.kl_budget` = {ppo.kl_budget:g} ends "
            "the stage at: set the budget well above the target"
        )
    if ppo.ptx_coef == 0 and _changed(ppo, "ptx_batch_size"):
        problems.append("`ppo.ptx_batch_size` is read only with `ppo.ptx_coef` above 0, and it is 0")
    steps = math.ceil(ppo.episodes / (ppo.prompts_per_step * ppo.samples_per_prompt))
    if ppo.value_warmup >= steps:
        problems.append(
            f"`ppo.value_warmup` = {ppo.value_warmup} leaves nothing of the {steps} rollouts to teach the policy: "
            "lower it, or raise `ppo.episodes`"
        )
    if (
        ppo.whiten_advantages
        and ppo.prompts_per_step * ppo.samples_per_prompt == 1
        and not math.isclose(ppo.gae_lambda, 0)
    ):
        problems.append(
            "`ppo.whiten_advantages` over a single completion erases the signal: sample more, or turn it off"
        )
    return problems
