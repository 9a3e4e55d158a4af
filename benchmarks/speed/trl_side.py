"""One run of a work by TRL's trainers, in the best configuration that was found for it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from accord.records import TokenGroup
from accord.training.environment import peak_memory_mb
from benchmarks.speed.trl_clock import Clock
from benchmarks.speed.work import BETA, OPTIMISER, Timing, Work, desirable, groups_of, pairs_of, words

__all__ = ["run"]


def run(work: Work, folder: Path) -> Timing:
    steps = groups_of(work)
    per_group = len(pairs_of(steps[0][0])) if work.kind == "reward" else 1
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    kind = AutoModelForSequenceClassification if work.kind == "reward" else AutoModelForCausalLM
    model = kind.from_pretrained(folder / ("reward" if work.kind == "reward" else "policy"), dtype="float32")
    at_rest, started = peak_memory_mb(), time.perf_counter()
    rows = [row for step in steps for row in _rows(work, step)]
    batch = work.batch * per_group
    at_once = work.peer_rows or batch
    with tempfile.TemporaryDirectory() as out:
        shared: dict[str, Any] = {
            **OPTIMISER, "output_dir": out, "per_device_train_batch_size": at_once,
            "gradient_accumulation_steps": batch // at_once, "lr_scheduler_type": "constant", "warmup_steps": 0,
            "optim": "adamw_torch_fused", "bf16": False, "gradient_checkpointing": False, "use_cpu": True,
            "logging_steps": 1, "save_strategy": "no", "report_to": "none", "num_train_epochs": 1, "max_length": 1024,
            "train_sampling_strategy": "group_by_length" if work.peer_grouped else "sequential",
            "disable_tqdm": True, "dataloader_pin_memory": False,
        }  # fmt: skip
        clock, losses = Clock(), []
        trainer = _trainer(work, model, tokenizer, Dataset.from_list(rows), shared, clock)
        inner = trainer.compute_loss

        def compute_loss(*args: Any, **options: Any) -> Any:
            result = inner(*args, **options)
            losses.append(float((result[0] if isinstance(result, tuple) else result).detach()))
            return result

        trainer.compute_loss = compute_loss
        trainer.train()
    parts = batch // at_once
    # Parts of an accumulated update are each divided by what belongs to the whole one.
    by_update = [sum(losses[i : i + parts]) for i in range(0, len(losses), parts)]
    return Timing(clock.first - started, clock.seconds, by_update, at_rest, peak_memory_mb(), trl.__version__)


def _rows(work: Work, groups: list[TokenGroup]) -> list[dict[str, Any]]:
    """A step's rows; those of mixed lengths are sorted, so that parts of an accumulated update are padded little."""
    if work.kind == "sft":
        ordered = sorted(groups, key=lambda g: g.num_tokens)
        return [
            {
                "input_ids": [*g.prompt_ids, *g.completions[0].ids],
                "completion_mask": [0] * len(g.prompt_ids) + [1] * len(g.completions[0].ids),
            }
            for g in ordered
        ]
    if work.kind == "reward":
        return [
            {"chosen_ids": [*g.prompt_ids, *better.ids], "rejected_ids": [*g.prompt_ids, *worse.ids]}
            for g in groups
            for better, worse in pairs_of(g)
        ]
    # The tokenizer turns these words back into the ids, and TRL adds the end itself.
    if work.kind == "kto":
        return [
            {
                "prompt": words(g.prompt_ids),
                "completion": " " + words(g.completions[0].ids[:-1]),
                "label": desirable(g),
            }
            for g in groups
        ]
    pairs = [(g.prompt_ids, *pair) for g in groups for pair in pairs_of(g)]
    return [
        {"prompt": words(prompt), "chosen": " " + words(better.ids[:-1]), "rejected": " " + words(worse.ids[:-1])}
        for prompt, better, worse in pairs
    ]


def _trainer(work: Work, model: Any, tokenizer: Any, data: Any, shared: dict[str, Any], clock: Clock) -> Any:
    common: dict[str, Any] = {
        "model": model, "train_dataset": data, "processing_class": tokenizer, "callbacks": [clock],
    }  # fmt: skip
    if work.kind == "sft":
        return trl.SFTTrainer(args=trl.SFTConfig(**shared, completion_only_loss=True), **common)
    if work.kind == "reward":
        return trl.RewardTrainer(args=trl.RewardConfig(**shared), **common)
    if work.kind == "dpo":
        return trl.DPOTrainer(args=trl.DPOConfig(**shared, beta=BETA, precompute_ref_log_probs=True), **common)
    if work.kind == "kto":
        return trl.KTOTrainer(args=trl.KTOConfig(**shared, beta=BETA, precompute_ref_log_probs=True), **common)
    return _orpo_trainer(shared, common)


def _orpo_trainer(shared: dict[str, Any], common: dict[str, Any]) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class CompletionORPO(ORPOTrainer):
        """TRL's imitation term covers the prompt too. This one covers the completion alone, as Accord's does, from
        log-probabilities that are there anyhow; completions are equally long, so their mean is that over all tokens.
        It spares TRL the backward pass of the other."""

        def concatenated_forward(self, model: Any, batch: Any) -> tuple[Any, ...]:
            chosen, rejected, chosen_logits, rejected_logits, _ = super().concatenated_forward(model, batch)
            return chosen, rejected, chosen_logits, rejected_logits, -chosen.mean()

    return CompletionORPO(args=ORPOConfig(**shared, beta=BETA), **common)
