"""The PPO stage: who plays which role, training, and the account of what happened."""

from __future__ import annotations

from typing import Any

from accord.config import PPOConfig
from accord.errors import ConfigError
from accord.methods.card import model_card
from accord.methods.context import Context, LoadedPolicy, adapt, data_note, run_stage, weights_hash
from accord.methods.online_account import online_summary
from accord.methods.ppo import PPOTrainer
from accord.methods.roles import check_prompts, judges_of, rollout_models, starting_model, step_prompts
from accord.models.adapters import sharing_copy
from accord.models.load import fresh_value_model, value_model_from
from accord.training.loop import run_training
from accord.training.runfolder import RunFolder

__all__ = ["run_ppo"]


def run_ppo(context: Context) -> dict[str, Any]:
    """Train (or continue, or find finished) the PPO stage of this run; returns its summary."""
    section = context.recipe.ppo
    assert section is not None
    start = starting_model(context, section.init)
    judges = judges_of(context, "ppo", section)
    part = context.corpus.all_prompts()
    sources = part.sources | weights_hash(start) | judges.sources

    def body(run: RunFolder) -> dict[str, Any]:
        for note in part.notes:
            context.say(note)
        policy = LoadedPolicy.to_train(context, start, "ppo")
        prompts = step_prompts(context, policy, section.max_new_tokens)
        check_prompts("ppo", section, len(prompts))
        scorer, reward_model = judges.scorer(context, section.micro_batch_tokens)
        value = _value_model(context, section, policy, reward_model)
        models = rollout_models(context, section, policy, scorer, judges.gold, [t for _, t in prompts])
        trainer = PPOTrainer(models, value, prompts, section, context.seed)
        context.say(
            f"{len(prompts)} prompts, {trainer.total_steps} rollouts of {section.prompts_per_step} prompts x "
            f"{section.samples_per_prompt} samples, {section.update_epochs} x {section.minibatches} updates each"
        )
        run_training(trainer, run, context.console)
        summary = online_summary(run, trainer, section, scorer.name)
        summary["account"] += data_note(part)
        policy.save(run.path / "model", model_card(context.recipe, "ppo", start, sources, summary))
        return summary

    settings = {
        "ppo": section.model_dump(mode="json"),
        "data": context.recipe.data.model_dump(mode="json", include={"holdout", "max_tokens", "max_prompt_tokens"}),
    }
    return run_stage(context, "ppo", settings=settings, sources=sources, body=body)


def _value_model(context: Context, section: PPOConfig, policy: LoadedPolicy, reward_model: Any | None) -> Any:
    if section.value_init == "reward" and reward_model is not None:
        if reward_model.config.vocab_size != policy.model.config.vocab_size:
            raise ConfigError(
                "`ppo.value_init` = reward, but the reward model reads another vocabulary than the policy writes: set "
                "`ppo.value_init` = policy"
            )
        value = value_model_from(reward_model) if context.recipe.model.adapter is None else sharing_copy(reward_model)
    else:
        value = fresh_value_model(policy.model)
    adapt(context, value, "ppo", "value")
    return value
