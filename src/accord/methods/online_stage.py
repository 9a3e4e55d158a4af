"""The online stages: who plays which role, training, and the account of what happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

from accord.config import RolloutFields, run_identity
from accord.methods import learners
from accord.methods.card import model_card
from accord.methods.context import Context, LoadedPolicy, data_note, run_stage, weights_hash
from accord.methods.corpus import Part
from accord.methods.judges import judges_of
from accord.methods.judging import ReferenceScores
from accord.methods.online_account import Online, online_summary
from accord.methods.online_trainer import Learner, OnlineTrainer
from accord.methods.plan import check_prompts, with_reference_answers
from accord.methods.roles import holdout_of, partner_of, rollout_models, starting_model, step_prompts
from accord.methods.rollouts import Prompt, RolloutModels, first_answers
from accord.methods.watch import MAX_ANSWERS, watch_answers
from accord.rewards.scorers import fingerprint
from accord.training.loop import Trainer, run_training
from accord.training.runfolder import RunFolder

__all__ = ["LEARNERS", "Cast", "RolloutTrainer", "run_online", "run_rollout_stage"]

LEARNERS: Mapping[str, Callable[[Any], Learner]] = MappingProxyType(
    {
        "rloo": learners.rloo,
        "grpo": learners.grpo,
        "reinforce": learners.reinforce,
        "online_dpo": learners.online_dpo,
    }
)


class RolloutTrainer(Trainer, Online, Protocol):
    """What trains in an online stage: it runs in the loop, and the account knows what it did."""


@dataclass(frozen=True, slots=True)
class Cast:
    """What an online trainer is made of; `reward_model` is None when a function scores."""

    policy: LoadedPolicy
    models: RolloutModels
    prompts: list[Prompt]
    reward_model: Any | None


def comparable_prompts(
    context: Context, stage: str, section: RolloutFields, prompts: list[Prompt]
) -> tuple[list[Prompt], dict[int, tuple[str, ...]] | None]:
    """The prompts that have what shaping compares with, and that; what is left out is said."""
    groups, answers = with_reference_answers(stage, section, context.corpus, [group for group, _ in prompts])
    if len(groups) < len(prompts):
        context.say(f"{len(prompts) - len(groups)} of {len(prompts)} prompts have no reference answer: left out")
    kept = {group.prompt_id for group in groups}
    return [prompt for prompt in prompts if prompt[0].prompt_id in kept], answers


def run_online(context: Context, stage: str) -> dict[str, Any]:
    """Train (or continue, or find finished) one of the stages of `LEARNERS`; returns its summary."""
    section = getattr(context.recipe, stage)
    learner = LEARNERS[stage](section)

    def trainer(cast: Cast) -> OnlineTrainer:
        return OnlineTrainer(stage, cast.models, cast.prompts, section, learner, context.seed)

    return run_rollout_stage(context, stage, section, trainer, besides=Part())


def run_rollout_stage(
    context: Context,
    stage: str,
    section: RolloutFields,
    trainer_of: Callable[[Cast], RolloutTrainer],
    besides: Part,
) -> dict[str, Any]:
    """The frame of every online stage, PPO's too: roles, prompts, the trainer made of them, and its account. `besides`
    is what the trainer depends on besides: sources (what -> content hash), and notes on them."""
    start = starting_model(context, section.init)
    judges, partner = judges_of(context, stage, section), partner_of(context, stage, section)
    part = context.corpus.all_prompts()
    notes = tuple(dict.fromkeys((*part.notes, *besides.notes)))
    sources = part.sources | besides.sources | weights_hash(start) | judges.sources
    if section.shaping.reference != "none":
        sources |= context.corpus.sft.sources | context.corpus.preferences.sources
    if partner is not None:
        sources |= {"environment": fingerprint(partner.factory)}

    def body(run: RunFolder) -> dict[str, Any]:
        for note in notes:
            context.say(note)
        policy = LoadedPolicy.to_train(context, start, stage)
        prompts, answers = comparable_prompts(
            context, stage, section, step_prompts(context, policy, section.max_new_tokens)
        )
        check_prompts(stage, section, len(prompts))
        scorer, judge = judges.scorer(context, section.micro_batch_tokens, policy, run.path)
        models = rollout_models(context, section, policy, scorer, judges.gold, [t for _, t in prompts], partner)
        if answers is not None:
            models.rewards.references = ReferenceScores(scorer, answers)
        # Before anything is restored the policy is the one training started from.
        asked = prompts[: min(MAX_ANSWERS, 2 * section.prompts_per_step * section.samples_per_prompt)]
        first = first_answers(models, asked, section, (f"{stage}-watch", context.seed))
        models = replace(models, watch=watch_answers(first, judge, holdout_of(context, section)))
        trainer = trainer_of(Cast(policy, models, prompts, None if judge is None else judge.model))
        context.say(
            f"{len(prompts)} prompts, {trainer.total_steps} rollouts of {section.prompts_per_step} prompts x "
            f"{section.samples_per_prompt} samples, {section.update_epochs} x {section.minibatches} updates each"
        )
        ended = run_training(trainer, run, context.console, context.recipe.guards)
        summary = online_summary(run, trainer, section, scorer.name, ended)
        summary["account"] += data_note(Part(notes=notes))
        policy.save(run.path / "model", model_card(context.recipe, stage, start, sources, summary))
        return summary

    settings = {
        stage: run_identity(section),
        "data": context.recipe.data.model_dump(mode="json", include={"holdout", "max_tokens", "max_prompt_tokens"}),
    }
    return run_stage(context, stage, settings=settings, sources=sources, body=body)
