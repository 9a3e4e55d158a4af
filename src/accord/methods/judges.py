"""What scores a stage's completions, and the truth that is only measured: resolved before anything runs, then built."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accord.config import SamplingFields, ScorerConfig
from accord.data.templates import Template
from accord.methods.context import Context, LoadedPolicy, stage_model, weights_hash
from accord.methods.named import nothing_scores
from accord.methods.reward_models import reward_model_beside
from accord.rewards.compose import ComposedScorer, EnsembleScorer, Weighted
from accord.rewards.functions import load_function
from accord.rewards.http import Client
from accord.rewards.remote import Journal, endpoint_scorer, judge_scorer
from accord.rewards.scorers import (
    FunctionScorer,
    JudgingModel,
    ModelScorer,
    NoScorer,
    Scorer,
    TokenFunctionScorer,
)

__all__ = ["Judge", "Judges", "function_scorer", "judges_of", "model_scorer"]


@dataclass(frozen=True, slots=True)
class Judge:
    """One judge: what the recipe says of it, and a function, the folders of models, or a client for its url."""

    name: str
    config: ScorerConfig
    function: FunctionScorer | TokenFunctionScorer | None = None
    folders: tuple[Path | str, ...] = ()
    client: Client | None = None

    @property
    def sources(self) -> dict[str, str]:
        """What it says depends on, besides its settings: what -> content hash."""
        if self.function is not None:
            return {"function": self.function.fingerprint}
        hashes = ["".join(weights_hash(folder).values()) for folder in self.folders]
        return {f"weights{f' {k}' if len(hashes) > 1 else ''}": content for k, content in enumerate(hashes, start=1)}


@dataclass(frozen=True, slots=True)
class Judges:
    """What scores a stage's completions: one judge, or `composed` ones whose weighted scores add up, or none where an
    environment gives all rewards. `gold` is logged and never trained on. `sources` is what the result depends on
    (what -> content hash)."""

    judges: tuple[Judge, ...]
    composed: bool
    gold: FunctionScorer | None
    sources: dict[str, str] = field(default_factory=dict)

    def scorer(
        self, context: Context, budget: int, policy: LoadedPolicy, folder: Path
    ) -> tuple[Scorer, JudgingModel | None]:
        """The scorer, and its first judge that is one reward model, which shares with the policy what it can. What
        remote judges answer is kept in `folder`."""
        built = [_built(context, judge, budget, policy, folder) for judge in self.judges]
        first = next((JudgingModel(scorer, model) for scorer, model in built if model is not None), None)
        if not built:
            return NoScorer("the environment"), None
        if not self.composed:
            return built[0][0], first
        weighted = [
            Weighted(judge.name, scorer, judge.config.weight)
            for judge, (scorer, _) in zip(self.judges, built, strict=True)
        ]
        return ComposedScorer(weighted), first


def judges_of(context: Context, stage: str, section: SamplingFields) -> Judges:
    """Who judges in this stage. Raises ConfigError when nothing does."""
    gold = function_scorer(context, f"{stage}.gold_function", section.gold_function)
    second = getattr(section, "holdout_reward_model", None)
    holdout = {} if second is None else {"hold-out reward weights": "".join(weights_hash(second).values())}
    if section.scorers:
        judges = tuple(
            _judge(context, f"{stage}.scorers.{name}", name, config) for name, config in section.scorers.items()
        )
        sources = {f"{what} of {judge.name}": content for judge in judges for what, content in judge.sources.items()}
        return Judges(judges, True, gold, sources | holdout)
    function = function_scorer(context, f"{stage}.reward_function", section.reward_function)
    folder = None if function is not None else section.reward_model or stage_model(context, "reward")
    if function is None and folder is None:
        if getattr(section, "environment", None) is None:
            raise nothing_scores(stage)
        return Judges((), False, gold, holdout)
    judge = Judge("reward", ScorerConfig.model_validate({}), function, () if folder is None else (folder,))
    sources = {f"reward {what}": content for what, content in judge.sources.items()}
    return Judges((judge,), False, gold, sources | holdout)


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
        offload=context.offload,
    )


def _judge(context: Context, key: str, name: str, config: ScorerConfig) -> Judge:
    """A judge of a composition; see `accord.config.check` for what its section may say."""
    if config.token_function is not None:
        token_function = load_function(config.token_function, f"{key}.token_function")
        return Judge(name, config, TokenFunctionScorer(token_function, config.token_function))
    function = function_scorer(context, f"{key}.function", config.function)
    if function is not None:
        return Judge(name, config, function)
    for kind in ("endpoint", "judge"):
        remote = getattr(config, kind)
        if remote is not None:
            return Judge(name, config, client=Client(remote, f"{key}.{kind}"))
    named = config.models or (config.model or "",)
    folders = tuple((one == "reward" and stage_model(context, "reward")) or one for one in named)
    return Judge(name, config, folders=folders)


def _built(
    context: Context, judge: Judge, budget: int, policy: LoadedPolicy, folder: Path
) -> tuple[Scorer, Any | None]:
    """The judge as a scorer, and its model if it is a single one."""
    config = judge.config
    if judge.function is not None:
        return judge.function, None
    if judge.client is not None:
        context.say(f"prompts and answers are sent to {judge.client.url}")
        journal = Journal(folder / f"scores-{judge.name}.jsonl")
        if config.endpoint is not None:
            return endpoint_scorer(config.endpoint, judge.client, journal), None
        assert config.judge is not None
        return judge_scorer(config.judge, judge.client, journal), None
    scorers: list[Scorer] = []
    model: Any = None
    for one in judge.folders:
        model, tokenizer = reward_model_beside(context, policy, one)
        scorers.append(model_scorer(context, model, tokenizer, budget, one))
    scorer = EnsembleScorer(scorers, config.combine, config.uncertainty_coef)
    return scorer, model if len(judge.folders) == 1 else None
