"""One run of PPO by the last TRL that had it, 1.12, whole iterations."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from sys import stderr
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from accord.records import TokenGroup
from accord.training.environment import peak_memory_mb
from benchmarks.speed.trl_clock import Clock
from benchmarks.speed.work import KL_COEF, OPTIMISER, Timing, Work, groups_of, mean_logprob

__all__ = ["run"]


def run(work: Work, folder: Path, apart: bool) -> Timing:
    (groups,) = groups_of(work)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    policy, reference = (_load(AutoModelForCausalLM, folder / "policy") for _ in range(2))
    at_rest, started = peak_memory_mb(), time.perf_counter()
    value, reward_model = (_load(AutoModelForSequenceClassification, folder / "reward") for _ in range(2))
    clock = Clock()
    if apart:
        ppo_trainer.batch_generation = _given(groups)
        clock.after_step = lambda: mean_logprob(policy, groups)
    with tempfile.TemporaryDirectory() as out, redirect_stdout(stderr):
        trainer = PPOTrainer(
            args=PPOConfig(**_settings(work, out, apart)), processing_class=tokenizer, model=policy,
            ref_model=reference, reward_model=reward_model, value_model=value, callbacks=[clock],
            train_dataset=Dataset.from_list([{"input_ids": list(group.prompt_ids)} for group in groups]),
        )  # fmt: skip
        clock.begin()
        trainer.train()
    return Timing(clock.first - started, clock.seconds, clock.found, at_rest, peak_memory_mb(), trl.__version__)


def _load(kind: Any, folder: Path) -> Any:
    return kind.from_pretrained(folder, dtype="float32")


def _settings(work: Work, out: str, apart: bool) -> dict[str, Any]:
    """A minibatch in one pass, which is TRL's fastest here; a batch made of several passes would be as many fewer
    updates. The weight of the value loss is 1, as Accord's own optimiser for the value model makes it."""
    return {
        **OPTIMISER, "output_dir": out, "per_device_train_batch_size": work.batch, "gradient_accumulation_steps": 1,
        "num_mini_batches": 1 if apart else 4, "num_ppo_epochs": 4, "total_episodes": work.calls(apart) * work.batch,
        "local_rollout_forward_batch_size": work.peer_rows or work.batch, "num_sample_generations": 0,
        "response_length": work.answer, "stop_token": "eos", "temperature": 1.0, "kl_coef": KL_COEF, "vf_coef": 1.0,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "adamw_torch_fused", "bf16": False,
        "gradient_checkpointing": False, "use_cpu": True, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def _given(groups: Sequence[TokenGroup]) -> Any:
    """What stands in for TRL's sampling: the answers of the work behind their prompts, with the policy's logits."""
    answers = {group.prompt_ids: group.completions[0].ids for group in groups}

    def generation(model: Any, queries: torch.Tensor, rows: int, pad_id: int, config: Any) -> tuple[Any, Any]:
        written = torch.tensor([[*ids, *answers[tuple(ids)]] for ids in queries.tolist()])
        with torch.no_grad():
            logits = model(input_ids=written).logits[:, queries.shape[1] - 1 : -1]
        return written, logits

    return generation
