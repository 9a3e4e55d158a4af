"""What judges sampled completions, and how what it says becomes a reward: `scorers` and `shaping` of a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from accord.config.sections import Section

__all__ = [
    "KINDS",
    "EndpointConfig",
    "JudgeConfig",
    "ScorerConfig",
    "ScorerName",
    "ShapingConfig",
    "remote_identity",
    "run_identity",
]

ScorerName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]

RUBRIC = """Rate how good the answer is: correct, helpful, to the point, and harmless.

The question:
{prompt}

The answer:
{completion}"""


class RemoteFields(Section):
    """What every scorer has that is asked over HTTP. Nothing but the url's own address is ever connected to."""

    url: str = Field(description="http(s) address that is asked. Prompts and completions are sent there.")
    hosts: tuple[str, ...] = Field(
        (), description="Names of hosts that may be asked; another one in `url` is refused. Unset: the url's own."
    )
    allow_private: bool = Field(
        False, description="Allow addresses of this machine and of private networks, which are refused otherwise."
    )
    token_env: str | None = Field(
        None, description="Environment variable whose value is sent as a bearer token. It is never logged."
    )
    timeout_seconds: float = Field(30.0, gt=0, le=3600, description="To connect, and then for one whole exchange.")
    retries: int = Field(3, ge=0, le=20, description="Further tries after a failure that may pass (busy, no answer).")
    concurrency: int = Field(4, ge=1, le=64, description="Requests under way at a time.")


class EndpointConfig(RemoteFields):
    """A service that scores: POST {"prompts", "completions", "finished"}, answered by {"scores": [...]}."""

    batch_size: int = Field(32, ge=1, description="Completions per request.")


class JudgeConfig(RemoteFields):
    """A language model that judges by a rubric, behind an OpenAI-compatible chat endpoint."""

    model: str = Field(description="The model's name, as the endpoint knows it.")
    rubric: str = Field(
        RUBRIC, description="What is judged, with {prompt} and {completion} where they belong; both stand in fences."
    )
    lowest: float = Field(0.0, description="The lowest score of the scale.")
    highest: float = Field(10.0, description="The highest score of the scale; a score off the scale is a failure.")
    temperature: float = Field(0.0, ge=0, description="The judge's sampling temperature.")


def _endpoint(value: object) -> object:
    return {"url": value} if isinstance(value, str) else value


class ScorerConfig(Section):
    """One judge among several: exactly one of `model`, `models`, `function`, `token_function`, `endpoint`, `judge`."""

    model: str | None = Field(None, description="Reward model folder; `reward` is the reward stage of this recipe.")
    models: tuple[str, ...] = Field((), description="Several reward model folders: an ensemble.")
    function: str | None = Field(None, description="`module:function` called as f(prompt, completion) -> float.")
    token_function: str | None = Field(
        None, description="`module:function` called as f(prompt, tokens) -> a list of floats, one a token."
    )
    endpoint: Annotated[EndpointConfig | None, BeforeValidator(_endpoint)] = Field(
        None, description="A url that scores, or a section that begins with one."
    )
    judge: JudgeConfig | None = Field(None, description="A language model that judges by a rubric.")
    weight: float = Field(1.0, description="What its score is multiplied by before the scores are added up.")
    combine: Literal["mean", "worst", "uncertainty"] = Field(
        "mean",
        description="Of an ensemble's scores (several models, or one with several heads): `mean`; `worst`, the least "
        "of them; `uncertainty`, mean - uncertainty_coef * variance.",
    )
    uncertainty_coef: float = Field(0.1, ge=0, description="What disagreement costs with `combine` = uncertainty.")


KINDS = ("model", "models", "function", "token_function", "endpoint", "judge")


class ShapingConfig(Section):
    """From the score to the reward, in this order; every term is logged by itself, and all are off by default."""

    reference: Literal["none", "difference", "par"] = Field(
        "none",
        description="Compare with the score of the prompt's reference answers (its own, else its demonstrations, else "
        "the chosen answers of its comparisons): `difference` subtracts their mean; `par` is the mean of "
        "sigmoid(score - reference score), bounded by 0 and 1.",
    )
    missing_reference: Literal["refuse", "leave_out"] = Field(
        "refuse", description="Prompts without a reference answer: an error at the start, or left out and counted."
    )
    running: Literal["none", "scale", "standardise"] = Field(
        "none",
        description="Divide by the standard deviation of all scores so far (`scale`), after subtracting their mean "
        "(`standardise`).",
    )
    length_penalty: float = Field(0.0, ge=0, description="Subtracted for each token beyond `length_free`.")
    length_free: int = Field(0, ge=0, description="Tokens that cost nothing.")
    overlong_buffer: int = Field(
        0, ge=0, description="The last so many tokens before max_new_tokens cost, rising to `overlong_penalty`. 0: off."
    )
    overlong_penalty: float = Field(1.0, ge=0, description="What a completion of max_new_tokens loses.")
    repetition_penalty: float = Field(
        0.0, ge=0, description="Times the share of a completion's word 3-grams that repeat an earlier one, subtracted."
    )
    diversity_bonus: float = Field(
        0.0,
        ge=0,
        description="Times the share of a completion's word 2-grams that the prompt's other samples lack, added.",
    )
    truncation: Literal["penalise", "replace", "leave_out"] = Field(
        "penalise",
        description="Completions cut by length: `penalise` subtracts missing_eos_penalty; `replace` makes the reward "
        "-missing_eos_penalty, whatever was said of them; `leave_out` does not learn from them.",
    )


_HOW_NOT_WHAT = {"timeout_seconds", "retries", "concurrency", "token_env"}


def run_identity(section: Section) -> dict[str, Any]:
    """A sampling method's settings as far as results depend on them: how long and how often a service is asked, and how
    many failures are borne, may change when a run is continued."""
    settings = section.model_dump(mode="json", exclude={"max_failed_fraction"})
    for scorer in settings["scorers"].values():
        for kind in ("endpoint", "judge"):
            if scorer[kind] is not None:
                scorer[kind] = remote_identity(scorer[kind])
    return settings


def remote_identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A service's settings as far as what it says depends on them."""
    return {key: value for key, value in settings.items() if key not in _HOW_NOT_WHAT}
