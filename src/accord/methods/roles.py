"""Who plays which role in an online stage: policy, reference, sampler, scorer, and the truth that is only measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from accord.config import RolloutFields
from accord.methods.context import (
    Context,
    LoadedPolicy,
    base_folder,
    choose_layout,
    stage_model,
    tokenised,
)
from accord.methods.corpus import split_holdout
from accord.methods.judges import model_scorer
from accord.methods.rollouts import Prompt, RolloutModels
from accord.models.adapters import has_adapter
from accord.models.layout import Layout
from accord.models.load import load_reward_model
from accord.models.sharing import sharing_copy
from accord.records import TokenCompletion, TokenGroup
from accord.rewards.functions import load_function
from accord.rewards.scorers import JudgingModel, Scorer
from accord.rollout.conversations import Partner
from accord.rollout.native import NativeSampler

__all__ = [
    "holdout_of",
    "partner_of",
    "rollout_models",
    "sampler_of",
    "sampling_layout",
    "starting_model",
    "step_prompts",
]


def partner_of(context: Context, stage: str, section: RolloutFields) -> Partner | None:
    """Whom the policy talks with in this stage: what `environment` names, or the Python object given for it."""
    if section.environment is None:
        return None
    assert section.max_turns is not None
    given = context.functions.get(f"{stage}.environment")
    factory = load_function(section.environment, f"{stage}.environment") if given is None else given
    return Partner(section.environment, factory, section.max_turns, context.recipe.data.max_tokens)


def starting_model(context: Context, init: str | None) -> Path | str:
    """Where a stage's policy starts: the folder named, else the SFT stage's model, else the base."""
    return init or stage_model(context, "sft") or base_folder(context)


def holdout_of(context: Context, section: RolloutFields) -> JudgingModel | None:
    """The reward model that is only measured with; None when the section names none."""
    folder = section.holdout_reward_model
    if folder is None:
        return None
    model, tokenizer = load_reward_model(folder, device=context.device)
    return JudgingModel(model_scorer(context, model, tokenizer, section.micro_batch_tokens, folder), model)


def step_prompts(context: Context, policy: LoadedPolicy, max_new_tokens: int) -> list[Prompt]:
    """The training prompts as tokens, each leaving room for an answer."""
    data = context.recipe.data
    room = data.max_tokens - max_new_tokens
    groups, _ = split_holdout(context.corpus.all_prompts().groups, data.holdout)
    limit = min(room, data.max_prompt_tokens or room)
    return list(tokenised(context, groups, policy.template, "prompts", max_tokens=room, max_prompt_tokens=limit))


def sampler_of(context: Context, policy: LoadedPolicy) -> NativeSampler:
    """The sampler of a stage that learns or chooses from its samples, its step compiled if the recipe asks for that."""
    return NativeSampler(policy.model, pad_id=policy.pad_id, compiled=context.recipe.model.compile_sampling)


def rollout_models(
    context: Context,
    section: RolloutFields,
    policy: LoadedPolicy,
    scorer: Scorer,
    gold: Scorer | None,
    prompts: list[TokenGroup],
    partner: Partner | None = None,
) -> RolloutModels:
    """The cast of a rollout; the reference is a frozen copy of what the policy trains, as it is now, on what it does
    not train; or the policy itself without its adapter."""
    positions = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    if partner is not None and positions is not None:
        partner = replace(partner, max_tokens=min(partner.max_tokens, positions))
    reference = policy.model if has_adapter(policy.model) else sharing_copy(policy.model).requires_grad_(False)
    return RolloutModels(
        policy=policy.model,
        reference=reference,
        sampler=sampler_of(context, policy),
        template=policy.template,
        scorer=scorer,
        gold=gold,
        layout=sampling_layout(context, policy, prompts, section.max_own_tokens, section.samples_per_prompt),
        partner=partner,
        offload=context.offload,
    )


def sampling_layout(
    context: Context, policy: LoadedPolicy, prompts: list[TokenGroup], max_own_tokens: int, completions: int
) -> Layout:
    """The layout to learn from sampled completions in, so many of a prompt at a time, after the start-up self-check."""
    limit = context.recipe.data.max_tokens
    shapes = [
        TokenGroup(t.prompt_ids, (_filler(t, min(max_own_tokens, limit - len(t.prompt_ids))),) * completions)
        for t in prompts[:64]
    ]
    return choose_layout(context, policy.model, shapes, policy.pad_id)


def _filler(prompt: TokenGroup, length: int) -> TokenCompletion:
    """A completion of half the allowed length made of the prompt's own tokens, to weigh the layouts with."""
    ids = (prompt.prompt_ids * length)[: max(1, length // 2)]
    return TokenCompletion(ids, (True,) * len(ids))
