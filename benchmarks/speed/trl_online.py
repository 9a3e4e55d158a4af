"""One run of GRPO or RLOO by TRL's trainers, whole iterations."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from transformers import AutoTokenizer

from accord.records import TokenGroup
from accord.training.environment import peak_memory_mb
from benchmarks.speed.trl_clock import Clock
from benchmarks.speed.work import KL_COEF, OPTIMISER, Timing, Work, groups_of, mean_logprob, reward, words

__all__ = ["run"]


def run(work: Work, folder: Path, apart: bool) -> Timing:
    (groups,) = groups_of(work)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    at_rest, started = peak_memory_mb(), time.perf_counter()
    rows = work.batch * work.answers
    at_once = work.peer_rows or rows
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        shared: dict[str, Any] = {
            **OPTIMISER, "output_dir": out, "per_device_train_batch_size": at_once,
            "gradient_accumulation_steps": rows // at_once, "max_steps": work.calls(apart),
            "num_generations": work.answers, "max_completion_length": work.answer, "beta": KL_COEF,
            "lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "adamw_torch_fused", "bf16": False,
            "gradient_checkpointing": False, "use_cpu": True, "logging_steps": 1, "save_strategy": "no",
            "report_to": "none", "shuffle_dataset": False, "disable_tqdm": True, "dataloader_pin_memory": False,
            "model_init_kwargs": {"dtype": "float32"},
        }  # fmt: skip
        data = Dataset.from_list([{"prompt": words(group.prompt_ids)} for group in groups])
        trainer = _trainer(work, str(folder / "policy"), tokenizer, data, shared, clock)
        if apart:
            answers = _Given(groups)
            trainer._generate_single_turn = answers.of if work.kind == "rloo" else answers.with_logprobs
            clock.after_step = lambda: mean_logprob(trainer.model, groups)
        trainer.train()
    return Timing(clock.first - started, clock.seconds, clock.found, at_rest, peak_memory_mb(), trl.__version__)


def even_words(completions: list[str], **others: Any) -> list[float]:
    return [reward(completion) for completion in completions]


def _trainer(work: Work, model: str, tokenizer: Any, data: Any, shared: dict[str, Any], clock: Clock) -> Any:
    """Both as published: KL of GRPO in the loss (k3, without the ratio that TRL multiplies it by) and a mean over each
    answer; KL of RLOO in the reward."""
    common: dict[str, Any] = {
        "model": model, "train_dataset": data, "processing_class": tokenizer, "callbacks": [clock],
        "reward_funcs": even_words,
    }  # fmt: skip
    if work.kind == "rloo":
        return trl.RLOOTrainer(args=trl.RLOOConfig(**shared), **common)
    grpo = {"loss_type": "grpo", "use_bias_correction_kl": False}
    return trl.GRPOTrainer(args=trl.GRPOConfig(**shared, **grpo), **common)


class _Given:
    """Hands out the answers of the work instead of sampling."""

    def __init__(self, groups: Sequence[TokenGroup]) -> None:
        self._answers = {group.prompt_ids: [list(c.ids) for c in group.completions] for group in groups}

    def of(self, prompt_ids: Sequence[Sequence[int]], *others: Any) -> list[list[int]]:
        """A prompt's answers in turn: it stands there as often as it has some."""
        seen: dict[tuple[int, ...], int] = {}
        found = []
        for ids in map(tuple, prompt_ids):
            found.append(self._answers[ids][seen.get(ids, 0)])
            seen[ids] = seen.get(ids, 0) + 1
        return found

    def with_logprobs(self, prompt_ids: Sequence[Sequence[int]], *others: Any) -> tuple[list[list[int]], None]:
        return self.of(prompt_ids), None
