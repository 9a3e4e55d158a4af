"""Supervised fine-tuning: imitate the demonstrations' answers, token by token.

loss = -sum over counted tokens of log p(token | everything before it) / number of counted tokens
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from accord.config import SFTConfig
from accord.data.shelf import mapped
from accord.losses.sft import sft_loss
from accord.measures.statistics import cluster_interval
from accord.methods.card import model_card
from accord.methods.context import (
    Context,
    LoadedPolicy,
    base_folder,
    choose_layout,
    data_note,
    headline,
    run_stage,
    tokenised,
    weights_hash,
)
from accord.methods.corpus import split_holdout
from accord.methods.offline import OfflineTrainer, PolicyLogprobs, Sums, group_passes
from accord.methods.sft_rouge import RougeProbe, rouge_account
from accord.models.layout import CompletionBatch, Layout, collate
from accord.models.memory import one_pass
from accord.models.token_scores import score_tokens
from accord.records import TokenGroup
from accord.training.loop import run_training
from accord.training.runfolder import RunFolder

__all__ = ["SFTObjective", "held_out_loss", "run_sft"]


class SFTObjective:
    """Negative log-likelihood per counted token of the whole step."""

    def tokens(self, item: TokenGroup) -> TokenGroup:
        return item

    def begin(self, items: Sequence[TokenGroup], logprobs: PolicyLogprobs) -> float:
        return sum(sum(c.mask) for group in items for c in group.completions)

    def loss(self, model: Any, items: Sequence[TokenGroup], batch: CompletionBatch, step: float) -> tuple[Tensor, Sums]:
        logprobs = score_tokens(model, batch, mask="loss").logprobs
        result = sft_loss(logprobs, batch.completion_mask, num_tokens=step)
        return result.loss, {"nll": float(result.nll_sum), "tokens": float(result.token_count)}

    def metrics(self, sums: Sums) -> dict[str, float]:
        return {"train/loss": sums["nll"] / max(1.0, sums["tokens"])}


def held_out_loss(
    model: Any, groups: Sequence[TokenGroup], layout: Layout, pad_id: int, budget: int
) -> list[tuple[float, int, int]]:
    """(summed negative log-likelihood in nats, counted tokens, prompt id) of each group."""
    rows: list[tuple[float, int, int]] = []
    for groups_of_pass in group_passes(groups, lambda g: g, layout, budget):
        batch = collate(groups_of_pass, layout=layout, pad_id=pad_id, device=model.device)
        with torch.no_grad(), one_pass(groups_of_pass, "evaluating on held-out data"):
            nll = -score_tokens(model, batch, mask="loss").logprobs.sum(1)
        for index, group in enumerate(groups_of_pass):
            inside = batch.group_index == index
            counted = int(batch.completion_mask[inside].sum())
            rows.append((float(nll[inside].sum()), counted, group.prompt_id))
    return rows


def run_sft(context: Context) -> dict[str, Any]:
    """Train (or continue, or find finished) the SFT stage of this run; returns its summary."""
    section = context.recipe.sft
    assert section is not None
    start = base_folder(context)
    part = context.corpus.demonstrations()
    sources = part.sources | weights_hash(start)

    def body(run: RunFolder) -> dict[str, Any]:
        for note in part.notes:
            context.say(note)
        policy = LoadedPolicy.to_train(context, start, "sft")
        train, held_out = split_holdout(part.groups, context.recipe.data.holdout)
        items, tests = (
            mapped(tokenised(context, groups, policy.template, what, loss_on=section.loss_on), itemgetter(1))
            for groups, what in ((train, "demonstrations"), (held_out, "held-out demonstrations"))
        )
        layout = choose_layout(context, policy.model, items, policy.pad_id)
        probe = RougeProbe.of(context, policy, section.rouge, held_out)

        def measure() -> dict[str, float]:
            if not tests:
                return {}
            rows = held_out_loss(policy.model, tests, layout, policy.pad_id, section.micro_batch_tokens)
            loss = sum(r[0] for r in rows) / max(1, sum(r[1] for r in rows))
            written = {} if probe is None else {name: found.value for name, found in probe.measure().items()}
            return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))} | written

        trainer = OfflineTrainer(
            "sft", policy.model, items, section, section, SFTObjective(),
            layout=layout, pad_id=policy.pad_id, seed=context.seed, evaluate=measure,
        )  # fmt: skip
        context.say(
            f"{len(items)} demonstrations, {len(tests)} held out, {trainer.total_steps} steps of {section.batch_size}"
        )
        run_training(trainer, run, context.console, context.recipe.guards)
        summary = _summary(policy, section, items, tests, layout, trainer.total_steps)
        if probe is not None:
            written = probe.measure()
            summary["headline"] += [headline(name, found) for name, found in written.items()]
            summary["account"].append(rouge_account(written))
        summary["account"] += data_note(part)
        card = model_card(context.recipe, "sft", start, sources, summary)
        policy.save(run.path / "model", card)
        return summary

    data = context.recipe.data.model_dump(mode="json", include={"holdout", "max_tokens", "max_prompt_tokens"})
    settings = {"sft": section.model_dump(mode="json"), "data": data}
    return run_stage(context, "sft", settings=settings, sources=sources, body=body)


def _summary(
    policy: LoadedPolicy,
    section: SFTConfig,
    items: Sequence[TokenGroup],
    tests: Sequence[TokenGroup],
    layout: Layout,
    steps: int,
) -> dict[str, Any]:
    learned = "only from what the assistant wrote" if section.loss_on == "assistant" else "from every token"
    account = [
        f"The model imitated {len(items):,} demonstrations in {steps:,} optimiser steps, learning {learned}.",
    ]
    rows: list[dict[str, Any]] = []
    if tests:
        measured = held_out_loss(policy.model, tests, layout, policy.pad_id, section.micro_batch_tokens)
        per_token = cluster_interval([nll / max(1, n) for nll, n, _ in measured], [p for _, _, p in measured])
        loss = sum(r[0] for r in measured) / max(1, sum(r[1] for r in measured))
        rows.append(headline("eval/perplexity", math.exp(min(loss, 700.0))))
        rows.append(
            headline(
                "loss per answer",
                per_token,
                unit="nats per token",
                meaning="Mean over held-out answers of their loss per token.",
            )
        )
        account.append(
            f"On {len(tests):,} held-out demonstrations it hesitates between {math.exp(min(loss, 700.0)):.2f} equally "
            "likely tokens on average (perplexity)."
        )
    return {"headline": rows, "account": account}
