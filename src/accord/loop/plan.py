"""What a loop would do, and what is refused before it starts. Torch-free."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from rich.table import Table

from accord.config import LoopConfig, Recipe
from accord.data.order import num_steps
from accord.errors import ConfigError
from accord.methods.catalogue import POLICY_STAGES, STAGES
from accord.methods.corpus import Corpus, Part, split_holdout
from accord.methods.named import check_names
from accord.methods.plan import check_sizes
from accord.randomness import permutation
from accord.records import Group
from accord.rewards.functions import load_function
from accord.rewards.http import Client

__all__ = ["check_loop", "fixed_prompts", "held_out", "left_out", "loop_table", "online_stage", "round_prompts"]

_ONLINE = tuple(name for name in POLICY_STAGES if STAGES[name].data == "prompts")


def online_stage(recipe: Recipe) -> str:
    """The stage that trains the policy in every round. Raises ConfigError unless there is exactly one."""
    found = [name for name in _ONLINE if getattr(recipe, name) is not None]
    if len(found) != 1:
        wrong = f"has {' and '.join(f'`{name}`' for name in found)}: keep one" if found else "has none: add one"
        raise ConfigError(
            f"`accord loop` trains the policy by one method that samples, and the recipe {wrong} of the sections "
            f"{', '.join(_ONLINE)}"
        )
    return found[0]


def check_loop(recipe: Recipe, corpus: Corpus, given: Collection[str] = ()) -> None:
    """Raises ConfigError or DataError for what could not work in some round: now, not when the round comes. `given` are
    the keys of functions that come as Python objects."""
    config = recipe.loop
    if config is None:
        raise ConfigError("`loop` is null, and `accord loop` runs it: leave null out")
    online = online_stage(recipe)
    if recipe.reward is None:
        raise ConfigError("`accord loop` refits a reward model in every round: add a `reward:` section")
    if config.labeller == "function" and config.label_function is None and "loop.label_function" not in given:
        raise ConfigError("`loop.labeller` = function needs `loop.label_function` (module:function)")
    if config.label_function is not None and "loop.label_function" not in given:
        load_function(config.label_function, "loop.label_function")
    if config.judge is not None:
        Client(config.judge, "loop.judge").check_address()
    section = getattr(recipe, online)
    for key, instead in (
        ("init", "the loop chooses where each round starts (`loop.start_from`)"),
        ("reward_model", "the loop refits its own"),
        ("reward_function", "the loop fits a reward model to labels"),
        ("environment", "people compare single answers"),
    ):
        if getattr(section, key, None) is not None:
            raise ConfigError(f"`{online}.{key}` is set, but {instead}: unset it")
    if section.scorers and not any("reward" in (one.model, *one.models) for one in section.scorers.values()):
        raise ConfigError(
            f"none of `{online}.scorers` is the reward model that the loop refits: add one, model: reward"
        )
    stages = [*(["sft"] if recipe.sft is not None else []), online]
    check_names(recipe, [*stages, "reward"], given)
    check_sizes(recipe, corpus, stages)
    available = len(fixed_prompts(corpus).prompts.groups)
    if config.comparisons > available:
        raise ConfigError(
            f"`loop.comparisons` = {config.comparisons}, but there are only {available} distinct prompts: lower it, or "
            "give more prompts"
        )
    others = len(held_out(corpus, recipe.data.holdout))
    if config.holdout_pairs > others:
        raise ConfigError(
            f"`loop.holdout_pairs` = {config.holdout_pairs}, but only {others} prompts are held out: lower it, raise "
            f"`data.holdout` (now {recipe.data.holdout}), or set `data.evaluation`"
        )


def left_out(recipe: Recipe) -> list[str]:
    """Sections of stages that the loop does not run; `accord run` does."""
    online = online_stage(recipe)
    return [name for name in STAGES if name not in ("sft", "reward", online) and getattr(recipe, name) is not None]


def fixed_prompts(corpus: Corpus) -> Corpus:
    """The corpus whose prompts stay what they are, however many comparisons are added to it."""
    return replace(corpus, prompts=corpus.all_prompts(), evaluation=corpus.evaluation_prompts() or Part())


def held_out(corpus: Corpus, share: float) -> list[Group]:
    """The prompts on which policies are compared: `data.evaluation`, else the held-out part of the prompts."""
    own = corpus.evaluation_prompts()
    return list(own.groups if own is not None else split_holdout(corpus.all_prompts().groups, share)[1])


def round_prompts(number: int, count: int, total: int, seed: int) -> list[int]:
    """Which of `total` prompts round `number` (from 1) asks for two answers: `count` different ones, and other ones
    than the rounds before as long as there are that many; then all over again in another order."""
    turn, place = divmod(number - 1, total // count)
    return permutation(total, "loop-prompts", seed, turn)[place * count : (place + 1) * count]


def loop_table(recipe: Recipe, corpus: Corpus) -> Table:
    """One row a round: what is sampled, labelled, learned from, and where the policy starts."""
    config, reward, online = recipe.loop, recipe.reward, online_stage(recipe)
    assert config is not None and reward is not None
    given = len(corpus.comparisons().groups) if corpus.preferences.groups else 0
    table = Table("round", "pairs to label", "labels so far", "reward model", f"{STAGES[online].verb} starts from")
    for number in range(1, config.rounds + 1):
        labels = given + number * config.comparisons
        taught = round(labels * (1 - recipe.data.holdout))
        steps = num_steps(taught, reward.batch_size, reward.epochs, reward.max_steps)
        pairs = f"{config.comparisons:,} by policy {number - 1}" + _judged(config, number)
        start = "policy 0" if number == 1 or config.start_from == "first" else f"the best of policies 0 to {number - 1}"
        table.add_row(str(number), pairs, f"at most {labels:,}", f"about {steps:,} steps of {reward.batch_size}", start)
    table.add_row("after", _judged(config, config.rounds + 1).removeprefix(" and "), "", "", "")
    table.caption = (
        f"labelled by {_labeller(config)}; stops at {config.patience} in a row not shown to be better. Two "
        "equal answers are not labelled"
    )
    return table


def _labeller(config: LoopConfig) -> str:
    if config.judge is not None:
        return f"{config.judge.model} at {config.judge.url}"
    return "people, in a file" if config.labeller == "human" else f"the function {config.label_function or 'given'}"


def _judged(config: LoopConfig, number: int) -> str:
    return f" and {config.holdout_pairs:,} held out, policy {number - 1} against the best before" if number > 1 else ""
