"""Who plays which role in an online stage: policy, reference, sampler, scorer, and the truth that is only measured."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accord.config import RolloutFields, SamplingFields
from accord.data.templates import Template
from accord.methods.context import (
    Context,
    LoadedPolicy,
    base_folder,
    choose_layout,
    stage_model,
    tokenised,
    weights_hash,
)
from accord.methods.corpus import split_holdout
from accord.methods.plan import nothing_scores
from accord.methods.reward_models import reward_model_beside
from accord.methods.rollouts import Prompt, RolloutModels
from accord.methods.watch import Holdout
from accord.models.adapters import has_adapter
from accord.models.layout import Layout
from accord.models.load import load_reward_model
from accord.models.sharing import sharing_copy
from accord.records import TokenCompletion, TokenGroup
from accord.rewards.scorers import FunctionScorer, ModelScorer, NoScorer, Scorer, load_function
from accord.rollout.conversations import Partner
from accord.rollout.native import NativeSampler

__all__ = [
    "Judges",
    "function_scorer",
    "holdout_of",
    "judges_of",
    "model_scorer",
    "partner_of",
    "rollout_models",
    "sampling_layout",
    "starting_model",
    "step_prompts",
]


@dataclass(frozen=True, slots=True)
class Judges:
    """What scores a stage's completions, resolved before its run folder is made: a function, a reward model's folder,
    or neither where an environment gives all rewards; `gold` is logged and never trained on. `sources` is what the
    result depends on (what -> content hash)."""

    function: FunctionScorer | None
    reward_folder: Path | str | None
    gold: FunctionScorer | None
    sources: dict[str, str] = field(default_factory=dict)

    def scorer(self, context: Context, budget: int, policy: LoadedPolicy) -> tuple[Scorer, Any | None]:
        """The scorer, and the reward model behind it when it is one; it shares with the policy what it can."""
        if self.function is not None:
            return self.function, None
        if self.reward_folder is None:
            return NoScorer("the environment"), None
        model, tokenizer = reward_model_beside(context, policy, self.reward_folder)
        return model_scorer(context, model, tokenizer, budget, self.reward_folder), model


def judges_of(context: Context, stage: str, section: SamplingFields) -> Judges:
    """Who judges in this stage. Raises ConfigError when nothing does."""
    function = function_scorer(context, f"{stage}.reward_function", section.reward_function)
    gold = function_scorer(context, f"{stage}.gold_function", section.gold_function)
    second = getattr(section, "holdout_reward_model", None)
    holdout = {} if second is None else {"hold-out reward weights": "".join(weights_hash(second).values())}
    if function is not None:
        return Judges(function, None, gold, {"reward function": function.fingerprint} | holdout)
    folder = section.reward_model or stage_model(context, "reward")
    if folder is None:
        if getattr(section, "environment", None) is None:
            raise nothing_scores(stage)
        return Judges(None, None, gold, holdout)
    return Judges(None, folder, gold, {"reward weights": "".join(weights_hash(folder).values())} | holdout)


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


def function_scorer(context: Context, key: str, spec: str | None) -> FunctionScorer | None:
    """The function a key names, or the Python object given for it; None without either."""
    given = context.functions.get(key)
    if given is not None:
        return FunctionScorer(given, getattr(given, "__name__", "the given function"))
    return None if spec is None else FunctionScorer(load_function(spec, key), spec)


def holdout_of(context: Context, section: RolloutFields) -> Holdout | None:
    """The reward model that is only measured with; None when the section names none."""
    folder = section.holdout_reward_model
    if folder is None:
        return None
    model, tokenizer = load_reward_model(folder)
    return Holdout(model_scorer(context, model, tokenizer, section.micro_batch_tokens, folder), model)


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


def step_prompts(context: Context, policy: LoadedPolicy, max_new_tokens: int) -> list[Prompt]:
    """The training prompts as tokens, each leaving room for an answer."""
    data = context.recipe.data
    room = data.max_tokens - max_new_tokens
    groups, _ = split_holdout(context.corpus.all_prompts().groups, data.holdout)
    limit = min(room, data.max_prompt_tokens or room)
    return tokenised(context, groups, policy.template, "prompts", max_tokens=room, max_prompt_tokens=limit)


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
        sampler=NativeSampler(policy.model, pad_id=policy.pad_id),
        template=policy.template,
        scorer=scorer,
        gold=gold,
        layout=sampling_layout(context, policy, prompts, section.max_own_tokens, section.samples_per_prompt),
        partner=partner,
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
