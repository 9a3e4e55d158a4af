"""The section of `accord loop`: rounds of sampling, labelling, refitting the reward model and training the policy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from accord.config.rewards import JudgeConfig
from accord.config.sections import Section

__all__ = ["LoopConfig"]


class LoopConfig(Section):
    """Rounds of sample, label, refit the reward model, train the policy, until the policy stops getting better."""

    rounds: int = Field(3, ge=1, description="Rounds at most.")
    comparisons: int = Field(
        500,
        ge=2,
        description="Prompts a round that the newest policy answers twice, for the reward model to learn from.",
    )
    holdout_pairs: int = Field(
        200,
        ge=2,
        description="Held-out prompts on which each new policy is compared with the best before it.",
    )
    labeller: Literal["human", "function", "judge"] = Field(
        "human",
        description="Who chooses between two answers: people, who fill in a file; a function that simulates them; or a "
        "language model that judges both by a rubric.",
    )
    label_function: str | None = Field(
        None, description="`module:function` f(prompt, completion) -> float: what simulated people value."
    )
    label_scale: float | None = Field(
        None,
        gt=0,
        description="Simulated people choose the first answer with probability sigmoid(difference / this). Unset: "
        "always the better one.",
    )
    judge: JudgeConfig | None = Field(
        None, description="The language model of `labeller` = judge: the answer with the higher score is chosen."
    )
    max_failed_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of a round's answers whose scoring by the function or the judge may fail before the loop "
        "stops. Their pairs have no label.",
    )
    patience: int = Field(
        1, ge=1, description="Stop after this many policies in a row that are not shown to be better."
    )
    start_from: Literal["best", "first"] = Field(
        "best",
        description="The policy that each round's training starts from and pays KL to: the best so far, or always the "
        "first.",
    )
