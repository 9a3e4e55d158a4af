"""ILQL on randomwalks: the walks with their optimality as return, and the trained policy at several beta, exactly.

ILQL starts from random weights. What it should reach is known: `RandomWalks.shaped_optimality` solves it exactly for
the random walk, for every beta. Beta 1 is not near the optimum: one needless step costs about a third of a standard
deviation of the returns, so the token that takes it stays exp(-1/3) times as likely beside the best one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accord.evaluation.exact_walks import WalksEvaluation, exact_evaluation
from accord.methods.context import Context
from accord.methods.corpus import Part
from accord.models.ilql import ShapedPolicy, load_heads
from accord.models.load import load_policy
from accord.records import Group
from accord.tasks.randomwalks import ALPHABET, RandomWalks

__all__ = ["BETAS", "ILQL_SETTINGS", "shaped_evaluation", "with_ratings"]

BETAS = (0.0, 1.0, 4.0, 100.0)
ILQL_SETTINGS: dict[str, Any] = {
    "epochs": 15,
    "batch_size": 50,
    "learning_rate": 1e-3,
    "warmup_fraction": 0.0,
    "schedule": "linear",
    "tau": 0.8,
    "target_rate": 0.1,
    "beta": 4.0,
    "eval_every": 1000,
}


def with_ratings(context: Context, groups: Sequence[Group], start: Path) -> Context:
    """The context with rated walks to learn from, and ILQL starting from the model `start`."""
    assert context.recipe.ilql is not None
    section = context.recipe.ilql.model_copy(update={"init": str(start)})
    return replace(
        context,
        recipe=context.recipe.model_copy(update={"ilql": section}),
        corpus=replace(context.corpus, preferences=Part.of(groups, "rated walks")),
    )


def shaped_evaluation(
    folder: Path, reference: Any, walks: RandomWalks, *, beta: float, num_samples: int, key: tuple[int | str, ...]
) -> WalksEvaluation:
    """The exact evaluation of the policy and heads in `folder` when they are sampled with `beta`."""
    policy, tokenizer = load_policy(folder, device=reference.device)
    return exact_evaluation(
        ShapedPolicy(load_heads(policy, folder)[0], beta),  # pyright: ignore[reportArgumentType]  (read as a model)
        reference,
        walks,
        letter_ids=[tokenizer.convert_tokens_to_ids(letter) for letter in ALPHABET],
        eos_id=tokenizer.eos_token_id,
        kl_coef=0.0,
        num_samples=num_samples,
        key=key,
    )
