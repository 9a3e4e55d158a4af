"""The account of an online run, for its summary and report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from accord.config import RolloutFields
from accord.methods.context import headline
from accord.methods.online import RATIO_TOLERANCE
from accord.models.precision import reading_dtype
from accord.models.self_check import TOLERANCE
from accord.report.reading import Points, read_run
from accord.training.loop import Ended
from accord.training.runfolder import RunFolder

__all__ = ["online_summary"]


class Online(Protocol):
    """What the account needs of an online trainer."""

    stage: str
    total_steps: int
    episodes_per_step: int
    drift: float


def online_summary(
    run: RunFolder, trainer: Online, section: RolloutFields, scorer: str, ended: Ended
) -> dict[str, Any]:
    rows = read_run(run.path).metrics
    # What a step measures is the work of the weights after the step before it.
    kept = {name: tuple(p for p in points if p[0] <= ended.weights + 1) for name, points in rows.items()}
    first, last = _end_mean(kept, -1), _end_mean(kept, 1)
    kl = last["rollout/kl_per_sequence_nats"]
    did, pieces = ("wrote", "answers") if section.environment is None else ("had", "conversations")
    account = [
        f"The policy {did} {ended.steps * trainer.episodes_per_step:,} {pieces}, scored by {scorer}. The mean "
        f"score went from {first['rollout/score/mean']:+.2f} to {last['rollout/score/mean']:+.2f}, at a distance of "
        f"{kl:.2f} nats per {pieces[:-1]} from the model it started from (KL, k1 estimator; first and last tenth of "
        "the run).",
        f"{pieces.capitalize()} went from {first['rollout/completion_tokens/mean']:.1f} to "
        f"{last['rollout/completion_tokens/mean']:.1f} tokens; {last['rollout/finished_fraction']:.1%} ended by "
        f"themselves.",
    ]
    if ended.early is not None:
        theirs = "" if ended.weights == ended.steps else " What follows is measured up to these."
        account.insert(0, f"Training stopped at step {ended.steps} of {trainer.total_steps}: {ended.early}.{theirs}")
    if section.environment is not None:
        account.append(
            f"In a conversation with {section.environment} the policy gave {first['rollout/turns/mean']:.1f} answers "
            f"on average at first and {last['rollout/turns/mean']:.1f} in the end; their tokens alone are counted and "
            f"learned from. {last['rollout/out_of_turns_fraction']:.1%} of the last conversations were cut after "
            f"{section.max_turns} answers, {last['rollout/out_of_room_fraction']:.1%} for want of room within "
            "`data.max_tokens` or the model's positions."
        )
    if "rollout/gold_utility/mean" in last:
        account.append(
            f"The true utility, which training never saw, went from {first['rollout/gold_utility/mean']:+.2f} to "
            f"{last['rollout/gold_utility/mean']:+.2f}."
        )
    names = [
        "rollout/score/mean",
        "rollout/kl_per_sequence_nats",
        "rollout/completion_tokens/mean",
        "rollout/entropy_nats",
    ]
    return {
        "headline": [headline(name, last[name]) for name in names],
        "account": account,
        "warnings": _warnings(rows, trainer, section),
    }


def _warnings(rows: Mapping[str, Points], trainer: Online, section: RolloutFields) -> list[str]:
    warnings: list[str] = []
    failed, left_out = (_total(rows, f"rollout/{name}") for name in ("failed_scores", "left_out_prompts"))
    if failed:
        warnings.append(
            f"Scoring failed for {failed:,} answers; nothing was learned from their {left_out:,} prompts in those "
            "steps. samples.jsonl names the first of each step."
        )
    skipped = rows["train/skipped_updates"][-1][1] if rows.get("train/skipped_updates") else 0
    if skipped:
        warnings.append(
            f"{skipped:,.0f} updates were skipped, because their gradients were not finite: nothing was learned in "
            "them. Look at the scale of the rewards, or lower the learning rate."
        )
    lower = reading_dtype()
    tolerance = RATIO_TOLERANCE if lower is None else TOLERANCE[lower]
    if trainer.drift > tolerance:
        advice = (
            f"Set {trainer.stage}.old_logprobs=recompute."
            if section.old_logprobs == "sampler"
            else "The model is not deterministic."
        )
        warnings.append(
            f"Before any update of a rollout the probability ratio was off 1 by up to {trainer.drift:.1e}, expected at "
            f"most {tolerance:.0e}. {advice}"
        )
    return warnings


def _end_mean(metrics: Mapping[str, Points], end: Literal[-1, 1]) -> dict[str, float]:
    """Each metric's mean over the first (-1) or last (1) tenth of the steps."""
    result = {}
    for name, points in metrics.items():
        if not points:
            continue
        size = max(1, len(points) // 10)
        part = points[-size:] if end == 1 else points[:size]
        result[name] = sum(value for _, value in part) / len(part)
    return result


def _total(metrics: Mapping[str, Points], name: str) -> int:
    """The sum of a count over all steps."""
    return int(sum(value for _, value in metrics.get(name, ())))
