"""The PPO stage: who plays which role, training, and the account of what happened."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from accord.config import PPOConfig
from accord.data.templates import Template
from accord.errors import ConfigError
from accord.methods.card import model_card
from accord.methods.context import (
    Context,
    LoadedPolicy,
    base_folder,
    choose_layout,
    data_note,
    headline,
    run_stage,
    stage_model,
    tokenised,
    weights_hash,
)
from accord.methods.corpus import split_holdout
from accord.methods.ppo import RATIO_TOLERANCE, PPOTrainer
from accord.methods.rollouts import RolloutModels
from accord.models.load import load_reward_model, reward_model_from, value_model_from
from accord.randomness import torch_seed
from accord.records import TokenCompletion, TokenGroup
from accord.report.reading import Points, read_run
from accord.rewards.scorers import FunctionScorer, ModelScorer, Scorer, load_function
from accord.rollout.native import NativeSampler
from accord.training.loop import run_training
from accord.training.runfolder import RunFolder

__all__ = ["function_scorer", "model_scorer", "run_ppo"]


def run_ppo(context: Context) -> dict[str, Any]:
    """Train (or continue, or find finished) the PPO stage of this run; returns its summary."""
    section = context.recipe.ppo
    assert section is not None
    start: Path | str = section.init or stage_model(context, "sft") or base_folder(context)
    function = function_scorer(context, "ppo.reward_function", section.reward_function)
    gold = function_scorer(context, "ppo.gold_function", section.gold_function)
    reward_folder = None if function is not None else _reward_folder(context, section)
    part = context.corpus.all_prompts()
    sources = part.sources | weights_hash(start)
    if function is not None:
        sources |= {"reward function": function.fingerprint}
    if reward_folder is not None:
        sources |= {"reward weights": "".join(weights_hash(reward_folder).values())}

    def body(run: RunFolder) -> dict[str, Any]:
        for note in part.notes:
            context.say(note)
        policy = LoadedPolicy.from_folder(start, context.recipe.model.template)
        data = context.recipe.data
        room = data.max_tokens - section.max_new_tokens
        groups, _ = split_holdout(part.groups, data.holdout)
        limit = min(room, data.max_prompt_tokens or room)
        prompts = tokenised(context, groups, policy.template, "prompts", max_tokens=room, max_prompt_tokens=limit)
        if len(prompts) < section.prompts_per_step:
            raise ConfigError(
                f"`ppo.prompts_per_step` = {section.prompts_per_step}, but only {len(prompts)} distinct training "
                f"prompts "
                "are left: lower it, or give more prompts"
            )
        models = _models(context, section, policy, function, gold, reward_folder, [t for _, t in prompts])
        trainer = PPOTrainer(models, prompts, section, context.seed)
        context.say(
            f"{len(prompts)} prompts, {trainer.total_steps} rollouts of {section.prompts_per_step} prompts x "
            f"{section.samples_per_prompt} samples, {section.update_epochs} x {section.minibatches} updates each"
        )
        run_training(trainer, run, context.console)
        summary = _summary(run, trainer, section, models.scorer.name)
        summary["account"] += data_note(part)
        policy.save(run.path / "model", model_card(context.recipe, "ppo", start, sources, summary))
        return summary

    settings = {
        "ppo": section.model_dump(mode="json"),
        "data": context.recipe.data.model_dump(mode="json", include={"holdout", "max_tokens", "max_prompt_tokens"}),
    }
    return run_stage(context, "ppo", settings=settings, sources=sources, body=body)


def function_scorer(context: Context, key: str, spec: str | None) -> FunctionScorer | None:
    """The function a key names, or the Python object given for it; None without either."""
    given = context.functions.get(key)
    if given is not None:
        return FunctionScorer(given, getattr(given, "__name__", "the given function"))
    return None if spec is None else FunctionScorer(load_function(spec, key), spec)


def model_scorer(context: Context, model: Any, tokenizer: Any, budget: int, folder: Path | str) -> ModelScorer:
    """A loaded reward model as a scorer.

    Prompts are cut as in its training. Answers may use all of the model's positions: text that the policy wrote within
    its limit can take more tokens when it is read back, and that must not stop a run.
    """
    data = context.recipe.data
    positions = getattr(model.config, "max_position_embeddings", None) or data.max_tokens
    return ModelScorer(
        model,
        Template.of(tokenizer, "auto"),
        micro_batch_tokens=budget,
        max_tokens=max(positions, data.max_tokens),
        max_prompt_tokens=data.max_prompt_tokens or data.max_tokens,
        name=f"the reward model {folder}",
    )


def _reward_folder(context: Context, section: PPOConfig) -> Path | str:
    folder = section.reward_model or stage_model(context, "reward")
    if folder is None:
        raise ConfigError(
            "PPO needs something that scores: a `reward` stage in this recipe, `ppo.reward_model` (a folder) or "
            "`ppo.reward_function` (module:function)"
        )
    return folder


def _models(
    context: Context,
    section: PPOConfig,
    policy: LoadedPolicy,
    function: Scorer | None,
    gold: Scorer | None,
    reward_folder: Path | str | None,
    prompts: list[TokenGroup],
) -> RolloutModels:
    reward_model = None
    if reward_folder is None:
        assert function is not None
        scorer = function
    else:
        reward_model, tokenizer = load_reward_model(reward_folder)
        scorer = model_scorer(context, reward_model, tokenizer, section.micro_batch_tokens, reward_folder)
    if section.value_init == "reward" and reward_model is not None:
        if reward_model.config.vocab_size != policy.model.config.vocab_size:
            raise ConfigError(
                "`ppo.value_init` = reward, but the reward model reads another vocabulary than the policy writes: set "
                "`ppo.value_init` = policy"
            )
        value = value_model_from(reward_model)
    else:
        value = reward_model_from(policy.model, torch_seed(context.seed, "value-head"))
    reference = copy.deepcopy(policy.model).requires_grad_(False)
    n = section.samples_per_prompt
    shapes = [TokenGroup(t.prompt_ids, (_filler(t, section.max_new_tokens),) * n) for t in prompts[:64]]
    return RolloutModels(
        policy=policy.model,
        reference=reference,
        value=value,
        sampler=NativeSampler(policy.model, pad_id=policy.pad_id),
        template=policy.template,
        scorer=scorer,
        gold=gold,
        layout=choose_layout(context, policy.model, shapes, policy.pad_id),
    )


def _filler(prompt: TokenGroup, length: int) -> TokenCompletion:
    """A completion of half the allowed length made of the prompt's own tokens, to weigh the layouts with."""
    ids = (prompt.prompt_ids * length)[: max(1, length // 2)]
    return TokenCompletion(ids, (True,) * len(ids))


def _summary(run: RunFolder, trainer: PPOTrainer, section: PPOConfig, scorer: str) -> dict[str, Any]:
    rows = read_run(run.path).metrics
    first, last = _end_mean(rows, -1), _end_mean(rows, 1)
    kl = last["rollout/kl_per_sequence_nats"]
    account = [
        f"The policy wrote {trainer.total_steps * trainer.episodes_per_step:,} answers, scored by {scorer}. The mean "
        f"score went from {first['rollout/score/mean']:+.2f} to {last['rollout/score/mean']:+.2f}, at a distance of "
        f"{kl:.2f} nats per answer from the model it started from (KL, k1 estimator; first and last tenth of the run).",
        f"Answers went from {first['rollout/completion_tokens/mean']:.1f} to "
        f"{last['rollout/completion_tokens/mean']:.1f} tokens; {last['rollout/finished_fraction']:.1%} ended by "
        f"themselves.",
    ]
    if "rollout/gold_utility/mean" in last:
        account.append(
            f"The true utility, which training never saw, went from {first['rollout/gold_utility/mean']:+.2f} to "
            f"{last['rollout/gold_utility/mean']:+.2f}."
        )
    warnings = []
    if trainer.drift > RATIO_TOLERANCE:
        advice = (
            "Set ppo.old_logprobs=recompute."
            if section.old_logprobs == "sampler"
            else "The model is not deterministic."
        )
        warnings.append(
            f"Before any update of a rollout the probability ratio was off 1 by up to {trainer.drift:.1e}, expected at "
            f"most {RATIO_TOLERANCE:.0e}. {advice}"
        )
    names = [
        "rollout/score/mean",
        "rollout/kl_per_sequence_nats",
        "rollout/completion_tokens/mean",
        "train/entropy_nats",
    ]
    return {"headline": [headline(name, last[name]) for name in names], "account": account, "warnings": warnings}


def _end_mean(metrics: Mapping[str, Points], end: Literal[-1, 1]) -> dict[str, float]:
    """Each metric's mean over the first (-1) or last (1) tenth of the steps."""
    result = {}
    for name, points in metrics.items():
        size = max(1, len(points) // 10)
        part = points[-size:] if end == 1 else points[:size]
        result[name] = sum(value for _, value in part) / len(part)
    return result
