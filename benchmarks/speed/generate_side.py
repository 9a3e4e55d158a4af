"""One run of sampling by transformers' `generate`, with the better of its caches."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from accord.training.environment import peak_memory_mb
from benchmarks.speed.work import PAD, Timing, Work, groups_of

__all__ = ["run"]

CACHES = ("dynamic", "static")


def run(work: Work, folder: Path, apart: bool) -> Timing:
    """Every call is made with each cache, and the faster cache's calls count. In the run apart the likeliest tokens are
    written, and these returned."""
    (groups,) = groups_of(work)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype="float32").eval()
    model.generation_config.eos_token_id = None  # nothing ends an answer early
    at_rest, started = peak_memory_mb(), time.perf_counter()
    ids = torch.tensor([group.prompt_ids for group in groups])
    options = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": work.answer, "do_sample": not apart,
        "pad_token_id": PAD, "temperature": None if apart else 1.0, "top_k": None if apart else 0,
    }  # fmt: skip
    once = time.perf_counter() - started
    seconds: dict[str, list[float]] = {cache: [] for cache in CACHES}
    learned: list[float] = []
    for _ in range(work.calls(apart)):
        for cache in CACHES:
            before = time.perf_counter()
            written = model.generate(ids, cache_implementation=cache, **options)
            seconds[cache].append(time.perf_counter() - before)
        assert written.shape == (work.batch, (work.prompt or 0) + (work.answer or 0))
        if apart:
            learned += written[:, work.prompt :].flatten().double().tolist()
    best = min(CACHES, key=lambda cache: fmean(seconds[cache][work.warm_up :]))
    return Timing(once, seconds[best], learned, at_rest, peak_memory_mb(), transformers.__version__)
