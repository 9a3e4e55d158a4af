"""What a recipe names: models, functions and judges. Found out at the start, not after hours. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from accord.config import EvaluateConfig, Recipe, SamplingFields
from accord.errors import ConfigError
from accord.methods.catalogue import BEST_OF_N, POLICY_STAGES, STAGES
from accord.models.paths import check_model_path
from accord.rewards.functions import load_function
from accord.rewards.http import Client

__all__ = ["check_compared", "check_earlier", "check_evaluated", "check_names", "nothing_scores", "unfinished"]


def check_names(recipe: Recipe, stages: list[str], given: Collection[str] = ()) -> None:
    """Raises ConfigError where a stage names a model that cannot be one, a function that is not there, an address that
    is never connected to, or nothing that scores: now, not after the stages before. `given` are the keys of functions
    that come as Python objects."""
    for stage in stages:
        section = getattr(recipe, stage)
        _check_models(recipe, stage, section)
        for key in ("reward_function", "gold_function", "environment"):
            _check_function(f"{stage}.{key}", getattr(section, key, None), given)
        if isinstance(section, SamplingFields):
            _check_scorers(recipe, stage, section, given)
            _check_scored(recipe, stage, section, given)
    if "evaluate" in stages and recipe.evaluate is not None:
        check_evaluated(recipe, recipe.evaluate)


def check_earlier(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raises ConfigError where one of `stages` needs the model of an earlier stage that is neither finished nor among
    them: now, not after the data was read."""
    for stage in stages:
        for earlier in _needed(recipe, stage):
            folder = recipe.root / earlier
            if getattr(recipe, earlier) is not None and earlier not in stages and not _is_finished(folder):
                raise unfinished(earlier, folder)


def _needed(recipe: Recipe, stage: str) -> list[str]:
    """The stages whose models a stage starts from, compares or is judged by, where the recipe has them."""
    section = getattr(recipe, stage)
    if isinstance(section, EvaluateConfig):
        names = section.models or (*POLICY_STAGES, BEST_OF_N)
        needed = [name for name in names if name in POLICY_STAGES]
        if BEST_OF_N in names and recipe.bestofn is not None:
            needed += _needed(recipe, BEST_OF_N)
        return needed if section.reward_model is not None else [*needed, "reward"]
    needed = ["sft"] if "init" in type(section).model_fields and section.init is None else []
    if isinstance(section, SamplingFields):
        judges = [model for scorer in section.scorers.values() for model in (scorer.model, *scorer.models)]
        alone = not (section.scorers or section.reward_function or section.reward_model)
        needed += ["reward"] if alone or "reward" in judges else []
    return needed


def _is_finished(folder: Path) -> bool:
    return (folder / "summary.json").exists()


def unfinished(stage: str, folder: Path) -> ConfigError:
    return ConfigError(
        f"the {stage} stage of this recipe is not finished in {folder}: run `accord {STAGES[stage].verb}` first, or "
        "`accord run` for all stages in order"
    )


def _check_models(recipe: Recipe, stage: str, section: Any) -> None:
    for key in ("init", "value_init"):
        path = getattr(section, key, None)
        if path is not None and not (key == "value_init" and path in ("reward", "policy")):
            _check_model(recipe, f"{stage}.{key}", path)
    for key in ("reward_model", "holdout_reward_model"):
        path = getattr(section, key, None)
        if path is not None:
            _check_reward_model(recipe, f"{stage}.{key}", path)


def _check_function(key: str, spec: str | None, given: Collection[str]) -> None:
    if spec is not None and key not in given:
        load_function(spec, key)


def _check_scorers(recipe: Recipe, stage: str, section: SamplingFields, given: Collection[str]) -> None:
    for name, scorer in section.scorers.items():
        key = f"{stage}.scorers.{name}"
        for model in filter(None, (scorer.model, *scorer.models)):
            if model != "reward" or not _makes_reward_model(recipe):
                _check_reward_model(recipe, key, model)
        _check_function(f"{key}.function", scorer.function, given)
        _check_function(f"{key}.token_function", scorer.token_function, given)
        for kind, remote in (("endpoint", scorer.endpoint), ("judge", scorer.judge)):
            if remote is not None:
                Client(remote, f"{key}.{kind}").check_address()


def _check_scored(recipe: Recipe, stage: str, section: SamplingFields, given: Collection[str]) -> None:
    named = section.reward_model or section.scorers or section.reward_function
    if named or f"{stage}.reward_function" in given or _makes_reward_model(recipe):
        return
    if getattr(section, "environment", None) is None:
        raise nothing_scores(stage)
    if getattr(section, "value_init", None) == "reward" and getattr(section, "value_trunk", None) == "own":
        raise ConfigError(
            f"`{stage}.value_init` = reward, but only the environment scores, which is no model to start from: set "
            f"`{stage}.value_init` = policy"
        )


def _makes_reward_model(recipe: Recipe) -> bool:
    return recipe.reward is not None or _is_finished(recipe.root / "reward")


def nothing_scores(stage: str) -> ConfigError:
    return ConfigError(
        f"the {stage} stage needs something that scores: a `reward` stage in this recipe, `{stage}.reward_model` "
        f"(a folder), `{stage}.reward_function` (module:function), `{stage}.scorers`, or an `environment` where "
        "the method has one"
    )


def _check_model(recipe: Recipe, key: str, path: str) -> None:
    """As `check_model_path`, but for a folder that an earlier stage of this run may still make."""
    if Path(path).absolute().is_relative_to(recipe.root.absolute()):
        return
    try:
        check_model_path(path)
    except ConfigError as error:
        raise ConfigError(f"`{key}`: {error}") from error


def _check_reward_model(recipe: Recipe, key: str, path: str) -> None:
    """As `_check_model`; and a language model's head gives logits, no score."""
    _check_model(recipe, key, path)
    file = Path(path) / "config.json"
    if not file.is_file():
        return
    try:
        config = json.loads(file.read_bytes())
        kinds = [str(kind) for kind in config.get("architectures") or ()]
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise ConfigError(f"`{key}`: {file} is no model's configuration ({error})") from error
    if any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        raise ConfigError(
            f"`{key}`: {path} holds a language model ({kinds[0]}), which gives no scores; name a reward model, such as "
            "the folder `reward/model` of a run"
        )


def check_evaluated(recipe: Recipe, section: EvaluateConfig) -> None:
    """The models of an evaluation are stages, or paths; what they are compared against is one of them."""
    for name in section.models:
        if name == BEST_OF_N and recipe.bestofn is None:
            raise ConfigError(f"`evaluate.models` names {name!r}, which is no stage of this recipe")
        if name not in ("base", BEST_OF_N, *POLICY_STAGES):
            _check_model(recipe, "evaluate.models", name)
    check_compared(section, section.models or ("base", BEST_OF_N, *POLICY_STAGES))


def check_compared(section: EvaluateConfig, names: Sequence[str]) -> None:
    """Raises ConfigError where what the models are compared against is none of them."""
    for key, value in (("against", section.against), ("reference", section.reference)):
        if value is not None and value not in names:
            raise ConfigError(f"`evaluate.{key}` = {value!r} is not among the models evaluated: {', '.join(names)}")
