"""Contradictions between keys: found before anything is loaded, each with the edit that mends it."""

from __future__ import annotations

import math

from accord.config.sections import PPOConfig, Recipe

__all__ = ["contradictions"]


def contradictions(recipe: Recipe) -> list[str]:
    """One sentence for each pair of keys that cannot both be meant."""
    problems: list[str] = []
    model = recipe.model
    if model.path is not None and model.scratch is not None:
        problems.append("`model.path` and `model.scratch` are both set: keep the one to start from")
    if model.scratch is not None and model.scratch.hidden_size % model.scratch.heads:
        problems.append(
            f"`model.scratch.heads` = {model.scratch.heads} does not divide `model.scratch.hidden_size` = "
            f"{model.scratch.hidden_size}"
        )
    data = recipe.data
    if data.max_prompt_tokens is not None and data.max_prompt_tokens >= data.max_tokens:
        problems.append(
            f"`data.max_prompt_tokens` = {data.max_prompt_tokens} leaves no room for an answer within "
            f"`data.max_tokens` = {data.max_tokens}"
        )
    if recipe.ppo is not None:
        problems.extend(_ppo(recipe.ppo, data.max_tokens))
    if recipe.evaluate is not None and recipe.evaluate.max_new_tokens >= data.max_tokens:
        problems.append(
            f"`evaluate.max_new_tokens` = {recipe.evaluate.max_new_tokens} leaves no room for a prompt within "
            f"`data.max_tokens` = {data.max_tokens}"
        )
    return problems


def _ppo(ppo: PPOConfig, max_tokens: int) -> list[str]:
    problems: list[str] = []
    if ppo.reward_model is not None and ppo.reward_function is not None:
        problems.append("`ppo.reward_model` and `ppo.reward_function` are both set: keep the one that scores")
    if ppo.reward_function is not None and ppo.value_init == "reward":
        problems.append(
            "`ppo.value_init` = reward, but `ppo.reward_function` is no model to start from: set `ppo.value_init` = "
            "policy"
        )
    if ppo.kl_controller == "adaptive" and ppo.target_kl is None:
        problems.append("`ppo.kl_controller` = adaptive needs `ppo.target_kl` (nats per sequence, for example 6)")
    if ppo.kl_controller == "adaptive" and ppo.kl_coef == 0:
        problems.append("`ppo.kl_controller` = adaptive multiplies `ppo.kl_coef`, which is 0 and would stay 0")
    if ppo.kl_controller == "fixed" and ppo.target_kl is not None:
        problems.append("`ppo.target_kl` is read only by `ppo.kl_controller` = adaptive, which is fixed")
    if ppo.minibatches > ppo.prompts_per_step:
        problems.append(
            f"`ppo.minibatches` = {ppo.minibatches} is more than `ppo.prompts_per_step` = {ppo.prompts_per_step}: "
            "a minibatch holds whole prompts"
        )
    if ppo.max_new_tokens >= max_tokens:
        problems.append(
            f"`ppo.max_new_tokens` = {ppo.max_new_tokens} leaves no room for a prompt within `data.max_tokens` = "
            f"{max_tokens}"
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
