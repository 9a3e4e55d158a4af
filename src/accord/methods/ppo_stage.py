"""The PPO stage: an online stage with a value model."""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter
from typing import Any

from accord.config import PPOConfig
from accord.data.shelf import mapped
from accord.errors import ConfigError
from accord.methods.context import Context, adapt, tokenised, weights_hash
from accord.methods.corpus import Part
from accord.methods.online_stage import Cast, run_rollout_stage
from accord.methods.plan import imitated
from accord.methods.ppo import PPOTrainer
from accord.methods.ptx import Imitation
from accord.methods.reward_models import value_model_beside
from accord.methods.rollouts import RolloutModels
from accord.models.compiled import compile_trunk
from accord.models.load import fresh_value_model, load_reward_model, value_head
from accord.models.recompute import recompute_activations
from accord.models.self_check import reads_alike

__all__ = ["run_ppo"]


def run_ppo(context: Context) -> dict[str, Any]:
    """Train (or continue, or find finished) the PPO stage of this run; returns its summary."""
    section = context.recipe.ppo
    assert section is not None

    def trainer(cast: Cast) -> PPOTrainer:
        # A reward model that waits on the CPU has its copy there.
        value = _value_model(context, section, cast).to(context.device)
        if context.recipe.model.activation_checkpointing and section.value_trunk != "policy":
            recompute_activations(value)
        if context.recipe.model.compile and section.value_trunk != "policy":
            compile_trunk(value)
        imitation = _imitation(context, section, cast)
        models = _readable_by(context, value, cast) if section.value_trunk != "policy" else cast.models
        return PPOTrainer(models, value, cast.prompts, section, context.seed, imitation)

    imitated_part = context.corpus.imitated() if section.ptx_coef else Part()
    own = section.value_trunk == "policy" or section.value_init in ("reward", "policy")
    weights = {} if own else {"value weights": "".join(weights_hash(section.value_init).values())}
    besides = Part(sources=imitated_part.sources | weights, notes=imitated_part.notes)
    return run_rollout_stage(context, "ppo", section, trainer, besides=besides)


def _readable_by(context: Context, value: Any, cast: Cast) -> RolloutModels:
    """The cast with a layout that the value model can read as well: how the policy reads was proved, not how this."""
    if reads_alike(cast.policy.model, value) or cast.models.layout == "plain":
        return cast.models
    context.say(
        f"prompts are run once per completion, and rows padded: the value model, a {type(value).__name__}, reads them "
        "otherwise than the policy"
    )
    return replace(cast.models, layout="plain")


def _imitation(context: Context, section: PPOConfig, cast: Cast) -> Imitation | None:
    """What is mixed into the updates, without the held-out part."""
    if not section.ptx_coef:
        return None
    groups = imitated(context.corpus, context.recipe.data.holdout)
    items = mapped(tokenised(context, groups, cast.policy.template, "mixed-in demonstrations"), itemgetter(1))
    context.say(f"{len(items)} demonstrations, {section.ptx_batch_size} of them mixed into each update of the policy")
    return Imitation(items, section, pad_id=cast.policy.pad_id, seed=context.seed)


def _value_model(context: Context, section: PPOConfig, cast: Cast) -> Any:
    policy, reward_model = cast.policy.model, cast.reward_model
    if section.value_trunk == "policy":
        return value_head(policy)
    if section.value_init not in ("reward", "policy"):
        reward_model, _ = load_reward_model(section.value_init, device=context.device)
    if section.value_init != "policy" and reward_model is not None:
        if reward_model.config.vocab_size != policy.config.vocab_size:
            raise ConfigError(
                f"`ppo.value_init` = {section.value_init}, and that model reads another vocabulary than the policy "
                "writes: set `ppo.value_init` = policy"
            )
        return value_model_beside(context, reward_model)
    value = fresh_value_model(policy)
    adapt(context, value, "ppo", "value")
    return value
