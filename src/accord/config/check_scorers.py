"""Contradictions within `scorers`, and between scorers and the rest of a method's section."""

from __future__ import annotations

from urllib.parse import urlsplit

from accord.config.online import PPOConfig, SamplingFields
from accord.config.rewards import KINDS, JudgeConfig, RemoteFields, ScorerConfig

__all__ = ["judge_contradictions", "scorer_contradictions"]


def scorer_contradictions(stage: str, section: SamplingFields) -> list[str]:
    """One sentence for each thing that cannot be meant."""
    problems: list[str] = []
    for name, scorer in section.scorers.items():
        key = f"{stage}.scorers.{name}"
        problems += _kind(key, scorer)
        if scorer.endpoint is not None:
            problems += _remote(f"{key}.endpoint", scorer.endpoint)
        if scorer.judge is not None:
            problems += judge_contradictions(f"{key}.judge", scorer.judge)
        if scorer.token_function is not None:
            problems += _single_tokens(key, stage, section)
    return problems


def _kind(key: str, scorer: ScorerConfig) -> list[str]:
    problems: list[str] = []
    given = [kind for kind in KINDS if getattr(scorer, kind)]
    if len(given) != 1:
        found = " and ".join(f"`{kind}`" for kind in given) or "none of them"
        problems.append(f"`{key}` needs exactly one of {', '.join(KINDS)}; found {found}")
    if len(scorer.models) == 1:
        problems.append(f"`{key}.models` has a single model: name it with `{key}.model`")
    if scorer.combine != "mean" and not scorer.models and scorer.model is None:
        problems.append(f"`{key}.combine` is read only for an ensemble: `models`, or a `model` with several heads")
    default = ScorerConfig.model_fields["uncertainty_coef"].default
    if scorer.combine != "uncertainty" and scorer.uncertainty_coef != default:
        problems.append(f"`{key}.uncertainty_coef` is read only by `{key}.combine` = uncertainty")
    if scorer.weight == 0:
        problems.append(f"`{key}.weight` = 0 makes it say nothing: drop it, or log it with `gold_function`")
    return problems


def _remote(key: str, remote: RemoteFields) -> list[str]:
    """What is wrong with a url; the rest is not looked at before that."""
    try:
        parts = urlsplit(remote.url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return [f"`{key}.url` = {remote.url!r} is no address ({error})"]
    if parts.scheme not in ("http", "https") or not host or remote.url != remote.url.strip():
        return [f"`{key}.url` = {remote.url!r}: expected http://host/path or https://host/path"]
    if not remote.url.isascii() or any(character.isspace() for character in remote.url):
        return [f"`{key}.url` = {remote.url!r} holds characters that must be written as %XX"]
    if parts.username is not None or parts.password is not None:
        return [f"`{key}.url` holds a password, which would be logged: name a variable with `{key}.token_env`"]
    problems: list[str] = []
    if remote.hosts and host not in {name.lower() for name in remote.hosts}:
        problems.append(f"`{key}.url` asks {host!r}, which is not among `{key}.hosts`: {', '.join(remote.hosts)}")
    if remote.token_env and parts.scheme == "http" and not remote.allow_private:
        problems.append(f"`{key}.token_env` would be sent unencrypted: use https, or set `{key}.allow_private` = true")
    return problems


def judge_contradictions(key: str, judge: JudgeConfig) -> list[str]:
    problems = _remote(key, judge)
    problems += [
        f"`{key}.rubric` does not say where {place} belongs"
        for place in ("{prompt}", "{completion}")
        if place not in judge.rubric
    ]
    if judge.lowest >= judge.highest:
        problems.append(f"`{key}.lowest` = {judge.lowest} is not below `{key}.highest` = {judge.highest}")
    return problems


def _single_tokens(key: str, stage: str, section: SamplingFields) -> list[str]:
    """Rewards of single tokens are paid as they are: what rescales whole scores has no share for each token."""
    rescaled = [f"`{stage}.shaping.reference`"] if section.shaping.reference != "none" else []
    if isinstance(section, PPOConfig):
        rescaled += [f"`{stage}.shaping.running`"] if section.shaping.running != "none" else []
        rescaled += [f"`{stage}.score_clip`"] if section.score_clip is not None else []
    return [
        f"{name} rescales the scores of whole answers, and `{key}.token_function` pays single tokens: drop one of them"
        for name in rescaled
    ]
