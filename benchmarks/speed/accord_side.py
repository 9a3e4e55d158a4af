"""One run of a work by Accord: the trainer of its stages, from tokens to updated weights."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

import accord
from accord.config import DPOConfig, KTOConfig, ORPOConfig, RewardConfig, SFTConfig
from accord.data.order import batch_indices
from accord.methods.kto import JudgedAnswer, kto_objective, with_mismatched, with_reference
from accord.methods.offline import OfflineTrainer
from accord.methods.preference import Pair, RankedAnswers, dpo_objective, orpo_objective
from accord.methods.reference import reference_logprobs
from accord.methods.reward import Comparison, RewardObjective
from accord.methods.sft import SFTObjective
from accord.models.layout import Layout
from accord.models.load import load_policy, load_reward_model
from accord.models.self_check import best_layout, check_layouts, saved_by_sharing
from accord.records import TokenGroup
from accord.training.environment import peak_memory_mb
from benchmarks.speed.work import BETA, OPTIMISER, PAD, Timing, Work, desirable, groups_of

__all__ = ["layout_of", "run"]


def run(work: Work, folder: Path) -> Timing:
    steps = groups_of(work)
    groups = [group for step in steps for group in step]
    model, _ = load_reward_model(folder / "reward") if work.kind == "reward" else load_policy(folder / "policy")
    at_rest, started = peak_memory_mb(), time.perf_counter()
    layout = layout_of(model, folder, work, groups)
    settings: dict[str, Any] = {
        **OPTIMISER, "schedule": "constant", "warmup_fraction": 0.0, "batch_size": work.batch, "eval_every": 1000,
    }  # fmt: skip
    section, objective, items = _method(work, model, groups, layout, settings)
    trainer = OfflineTrainer(
        work.kind, model, _in_order(items, work.batch, work.kind), section, section, objective,
        layout=layout, pad_id=PAD, seed=0, evaluate=dict,
    )  # fmt: skip
    once = time.perf_counter() - started
    seconds, losses = [], []
    for step in range(1, work.updates + 1):
        before = time.perf_counter()
        losses.append(trainer.step(step).metrics["train/loss"])
        seconds.append(time.perf_counter() - before)
    return Timing(once, seconds, losses, at_rest, peak_memory_mb(), accord.__version__)


def _in_order(items: list[Any], batch: int, stage: str) -> list[Any]:
    """Items so placed that the trainer's own order makes batches of them as they stand: the peer, which has another
    way to shuffle, must see the same ones."""
    placed = list(items)
    for step in range(len(items) // batch):
        for index, item in zip(
            batch_indices(step + 1, len(items), batch, 0, stage), items[step * batch :], strict=False
        ):
            placed[index] = item
    return placed


def layout_of(model: Any, folder: Path, work: Work, groups: list[TokenGroup]) -> Layout:
    """As the stages choose, self-check included; a classifier is checked as the policy it came from."""
    policy = load_policy(folder / "policy")[0] if work.kind == "reward" else model
    check = check_layouts(policy, sorted(groups, key=lambda g: g.num_tokens)[:4], PAD, max_tokens=1024)
    return best_layout(check, saved_by_sharing(groups), compiled=False)


def _method(
    work: Work, model: Any, groups: list[TokenGroup], layout: Layout, settings: dict[str, Any]
) -> tuple[Any, Any, list[Any]]:
    if work.kind == "sft":
        return SFTConfig.model_validate(settings), SFTObjective(), list(groups)
    if work.kind == "reward":
        ranks = tuple(range(work.answers))
        return RewardConfig.model_validate(settings), RewardObjective(0.0), [Comparison(g, ranks) for g in groups]
    items = [RankedAnswers(group, (Pair(0, 1),)) for group in groups]
    if work.kind == "orpo":
        orpo = ORPOConfig.model_validate(settings | {"odds_ratio_coef": BETA})
        return orpo, orpo_objective(orpo), items
    if work.kind == "kto":
        kto = KTOConfig.model_validate(settings | {"beta": BETA})
        judged = _judged(groups, work.batch)
        known = _reference(model, [group for answer in judged for group in answer.groups], layout, kto)
        return kto, kto_objective(kto, (1.0, 1.0)), with_reference(judged, known)
    dpo = DPOConfig.model_validate(settings | {"beta": BETA})
    each = iter(_reference(model, groups, layout, dpo))
    items = [replace(item, ref_logprobs=tuple(next(each) for _ in item.tokens.completions)) for item in items]
    return dpo, dpo_objective(dpo), items


def _judged(groups: list[TokenGroup], batch: int) -> list[JudgedAnswer]:
    """Answers, each with the one before it in the same batch as the answer to another prompt, which is how the peer
    pairs them. Accord itself pairs at random over all the data."""
    judged = [JudgedAnswer(group, desirable(group)) for group in groups]
    before = [start + (i - 1) % batch for start in range(0, len(groups), batch) for i in range(batch)]
    return with_mismatched(judged, [groups[i].completions[0] for i in before], max_tokens=1024)[0]


def _reference(model: Any, groups: list[TokenGroup], layout: Layout, section: DPOConfig | KTOConfig) -> list[float]:
    """Of every completion, as the stages compute them before the first update."""
    with tempfile.TemporaryDirectory() as kept:
        return reference_logprobs(
            model, groups, weights="", layout=layout, budget=section.micro_batch_tokens, pad_id=PAD,
            kept=Path(kept) / "own", cache=Path(kept) / "cache", console=Console(quiet=True), say=lambda text: None,
        ).tolist()  # fmt: skip
