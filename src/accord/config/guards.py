"""The guards' section: what is watched while a stage trains, from where it is alarming, and what an alarm does."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from accord.config.sections import Section

__all__ = ["GuardName", "GuardsConfig"]

GuardName = Literal[
    "kl",
    "length",
    "word",
    "repetition",
    "diversity",
    "entropy",
    "duplicates",
    "ceiling",
    "disagreement",
    "outliers",
    "holdout",
    "likelihood",
    "overfit",
]


def _limits(limits: tuple[float, float]) -> tuple[float, float]:
    if not 0 < limits[0] < limits[1]:
        raise ValueError("expected WARN's limit and then ALERT's, the second above the first and both above 0")
    return limits


def _ratios(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] < 1:
        raise ValueError("expected ratios to the beginning, which is 1: neither limit may be below it")
    return limits


Limits = Annotated[tuple[float, float], AfterValidator(_limits)]
Ratios = Annotated[Limits, AfterValidator(_ratios)]


class GuardsConfig(Section):
    """Alarms over what a stage logs: each guard says OK, WARN or ALERT. Of two numbers the first is WARN's limit."""

    on_alert: Literal["log", "pause", "stop"] = Field(
        "log",
        description="What an ALERT does: `log` says it and trains on; `pause` saves and ends with exit code 3, to be "
        "continued with `acknowledge`; `stop` ends the stage with the weights from before the alarm began.",
    )
    off: tuple[GuardName, ...] = Field((), description="Guards that do not watch.")
    acknowledge: tuple[GuardName, ...] = Field(
        (), description="Guards whose ALERT you have looked into: they go on watching, and no longer pause or stop."
    )
    baseline: int = Field(3, ge=1, description="Evaluations at the beginning whose mean is the baseline.")
    window: int = Field(
        5, ge=1, description="Latest rollouts whose mean is compared with it: each is a small sample of new answers."
    )
    fixed_window: int = Field(
        3, ge=1, description="The same for what is measured on fixed data, in training and in evaluations."
    )
    patience: int = Field(2, ge=1, description="Evaluations in a row before a guard changes its level.")
    kl_nats: Limits = Field((10.0, 20.0), description="WARN and ALERT above this KL per answer, in nats.")
    length_ratio: Ratios = Field((1.2, 1.4), description="Answers this many times longer than at the beginning.")
    shorter_ratio: Ratios = Field((1.6, 2.0), description="Answers this many times shorter than at the beginning.")
    word_rise: Limits = Field(
        (0.7, 0.9), description="A word in this much larger a share of the answers than before training."
    )
    repetition_rise: Limits = Field(
        (0.04, 0.08),
        description="Rise of the share of repeated 3-grams in an answer; of truncated answers, three times as much.",
    )
    diversity_loss: Limits = Field(
        (0.55, 0.65),
        description="Share of the variety lost: distinct 2-grams, and how little a prompt's samples agree.",
    )
    entropy_loss: Limits = Field((0.75, 0.85), description="Share of the policy's entropy lost.")
    duplicate_rise: Limits = Field(
        (0.25, 0.45), description="Rise of the share of answers that another prompt got too, word for word."
    )
    ceiling: Limits = Field((0.6, 0.8), description="Share of the scores at the highest one, or clipped.")
    disagreement_ratio: Ratios = Field(
        (1.5, 2.0), description="Spread of the reward ensemble, this many times that of the beginning."
    )
    outlier_rise: Limits = Field(
        (0.4, 0.6),
        description="Rise of the share of answers that the reward model sees as unlike those before training.",
    )
    holdout_drop: Limits = Field(
        (1.0, 2.0),
        description="Standard errors by which a judge that is not trained on has fallen from its best, "
        "while the score has risen.",
    )
    likelihood_loss: Limits = Field(
        (0.25, 0.5), description="Share of their log-probability at the beginning that good answers have lost."
    )
    overfit: Limits = Field(
        (0.05, 0.15),
        description="Rise of the held-out loss above its lowest, as a share of it, while the training loss falls.",
    )
