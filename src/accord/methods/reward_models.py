"""Reward and value models beside a policy: they share with it, and with each other, every weight that nobody trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accord.methods.context import Context, LoadedPolicy, adapt, weights_hash
from accord.models.adapters import CONFIG_FILE, adapter_heads, adapter_settings, has_adapter, load_adapter
from accord.models.blocks import train_top_blocks
from accord.models.heads import score_head
from accord.models.load import load_reward_model, load_tokenizer, reward_model_from, value_model_from
from accord.models.sharing import share_equal
from accord.training.runfolder import read_fingerprints, recorded_settings

__all__ = ["reward_model_beside", "value_model_beside"]

WEIGHTS = "starting weights"  # what `weights_hash` calls the content of a folder


def reward_model_beside(context: Context, policy: LoadedPolicy, folder: Path | str) -> tuple[Any, Any]:
    """(reward model, tokenizer) of a folder, as `load_reward_model`; but if the policy is only partly trained, and the
    reward model was made from the same weights, it shares what neither changes. Which of them it is, is said."""
    model = context.recipe.model
    if has_adapter(policy.model):
        obstacle = _obstacle(context, policy, folder)
        if obstacle is None:
            context.say("one trunk for all roles: the reward model is an adapter on the policy's frozen weights")
            return _as_adapter(policy, Path(folder)), load_tokenizer(folder)
        context.say(f"the reward model is loaded beside the policy, with weights of its own: {obstacle}")
    reward_model, tokenizer = load_reward_model(folder, device=context.device)
    if model.trainable_blocks is not None:
        saved = share_equal(reward_model, policy.model)
        context.say(
            f"the reward model shares {saved:.0%} of its weights with the policy: the frozen ones that are equal"
        )
    return reward_model, tokenizer


def value_model_beside(context: Context, reward_model: Any) -> Any:
    """A value model that starts as the reward model and trains what the recipe says; the rest it shares with it."""
    model = context.recipe.model
    if has_adapter(reward_model):  # and of the same settings as the recipe's: see `_obstacle`
        return value_model_from(reward_model, sharing=True)
    if model.trainable_blocks is not None:
        train_top_blocks(reward_model, model.trainable_blocks)
        return value_model_from(reward_model, sharing=True)
    if model.adapter is None:
        return value_model_from(reward_model)
    reward_model.requires_grad_(False)
    score_head(reward_model).requires_grad_(True)
    value = value_model_from(reward_model, sharing=True)
    adapt(context, value, "ppo", "value")
    return value


def _as_adapter(policy: LoadedPolicy, folder: Path) -> Any:
    adapter = _adapter_of(folder)
    reward_model = reward_model_from(policy.model, seed=0, heads=adapter_heads(adapter))
    load_adapter(reward_model, adapter)
    return reward_model


def _obstacle(context: Context, policy: LoadedPolicy, folder: Path | str) -> str | None:
    """Why the reward model cannot be an adapter on the weights that the policy starts from; None when it can."""
    adapter = _adapter_of(folder)
    if not (adapter / CONFIG_FILE).is_file():
        return f"there is no adapter in {adapter}"
    trained_on = read_fingerprints(adapter.parent).get(WEIGHTS)
    if trained_on is None or trained_on != weights_hash(policy.start).get(WEIGHTS):
        return "its adapter was not trained on the weights that the policy starts from"
    was, now = recorded_settings(adapter.parent).get("model", {}).get("quantise"), context.recipe.model.quantise
    if was != now:
        return f"its adapter was trained with `model.quantise` = {was}, and now that is {now}"
    theirs, ours = adapter_settings(adapter), adapter_settings(policy.model)
    if theirs != ours:
        return f"its adapter is {theirs}, and the policy's {ours}"
    return None


def _adapter_of(folder: Path | str) -> Path:
    return Path(folder).absolute().with_name("adapter")
