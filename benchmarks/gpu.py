"""SFT, DPO, PPO and sampling on one GPU in bfloat16, against TRL and transformers' `generate`.

    python -m benchmarks.gpu                      models of 0.1, 0.4 and 1.5 billion parameters, random weights
    python -m benchmarks.gpu --sizes 1.5B --work dpo
    python -m benchmarks.gpu --small              a toy model for a minute, on whatever device there is

Weights are float32, matrix products bfloat16, on both sides; sampling has weights of bfloat16 on both. Of each work the
first update warms up and the median of the others counts. MFU is the arithmetic that the work needs at least (each
prompt once, the vocabulary where a token is scored, nothing for recomputation), the same number for both sides, over
the seconds and the peak: what is written on the GPU for dense bfloat16 where that is known here, else the fastest
square product. PPO has no peer: TRL has had none since 1.13. Peak memory is the GPU's; on a CPU it is the process's,
and grows from row to row.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accord.atomic import write_json
from accord.config import DPOConfig, PPOConfig, SFTConfig
from accord.data.templates import Template
from accord.methods.offline import OfflineTrainer, sequence_logprobs
from accord.methods.ppo import PPOTrainer
from accord.methods.preference import Pair, RankedAnswers, dpo_objective
from accord.methods.rollouts import RolloutModels
from accord.methods.sft import SFTObjective
from accord.models.device import choose_device
from accord.models.load import ModelShape, build_model, fresh_value_model
from accord.models.precision import precision
from accord.models.sharing import sharing_copy
from accord.profiling.flops import Attention, Matrix, Trunk, causal_pairs, matrix_flops, trunk_flops
from accord.records import Group, Message, TokenGroup
from accord.rewards.scorers import FunctionScorer
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling
from accord.training.environment import environment, peak_memory_mb
from benchmarks.speed.work import END, PAD, Work, groups_of, reward, word_tokenizer, words

NEVER_RUN = (
    "No GPU was at hand while this was written. Never run on one: this benchmark, `model.device` = cuda, bfloat16 and "
    "float16 there, activation checkpointing, offloading, recovery from a real out-of-memory error, and the sampler. "
    "What tests show is that every method works on a simulated second device without mixing it with the CPU. Decoding "
    "by CUDA graphs is not built."
)
# Dense bfloat16 operations a second, as the makers write.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}
SHAPES = {
    "small": ModelShape(64, 2, 4, 512),
    "0.1B": ModelShape(768, 12, 12, 2048),
    "0.4B": ModelShape(1024, 24, 16, 2048),
    "1.5B": ModelShape(2048, 28, 16, 2048),
}
LATEST = Path(__file__).parent / "results" / "gpu.json"
LEARNING: dict[str, Any] = {"learning_rate": 1e-5, "schedule": "constant", "warmup_fraction": 0.0}
EPOCHS, MINIBATCHES = 4, 4  # of PPO


def works(small: bool) -> dict[str, Work]:
    """By kind: 16 rows of 1,024 tokens; 16 pairs; 64 episodes; 64 answers. Small: 4 of each."""
    rest: dict[str, Any] = {"vocabulary": 512, "updates": 2} if small else {"vocabulary": 32000, "updates": 5}
    rest["warm_up"] = 1
    if small:
        made = Work("sft", 4, 8, 8, **rest), Work("dpo", 4, 8, 8, 2, **rest)
        made += Work("ppo", 4, 8, 4, **rest), Work("sampling", 4, 8, 4, **rest)
    else:
        made = Work("sft", 16, 1, 1023, **rest), Work("dpo", 16, 512, 256, 2, **rest)
        made += Work("ppo", 64, 128, 128, **rest), Work("sampling", 64, 128, 256, **rest)
    return {work.kind: work for work in made}


@dataclass(frozen=True, slots=True)
class Row:
    """What a side reached at a work; `mfu` is a share."""

    work: str
    size: str
    side: str
    seconds: float
    tokens_per_second: float
    mfu: float
    peak_mb: float


def needed_flops(work: Work, shape: ModelShape) -> float:
    """The arithmetic of one update (of one iteration for PPO, of one call for sampling)."""
    prompt, answer = work.prompt or 0, work.answer or 0
    rows, answers = work.batch, work.batch * work.answers
    tokens = rows * prompt + answers * answer
    pairs = rows * causal_pairs(prompt) + answers * causal_pairs(answer, prompt)
    hidden, inner = shape.hidden_size, shape.intermediate_size or -(-shape.hidden_size * 8 // 3 // 16) * 16
    block = [Matrix(hidden, hidden, True, True)] * 4 + [Matrix(hidden, inner, True, True)] * 3
    trunk = Trunk(tuple(block * shape.layers), (Attention(hidden, True),) * shape.layers)
    body = trunk_flops(tokens, pairs, trunk)
    head = matrix_flops(answers * answer, Matrix(hidden, work.vocabulary, True, True))
    if work.kind == "sampling":
        return body.forward + head.forward
    if work.kind == "ppo":
        # Sampling, old and reference log-probabilities, values; then both models in every epoch.
        once = 4 * body.forward + 3 * head.forward
        return once + EPOCHS * (2 * (body.forward + body.backward) + head.forward + head.backward)
    return body.forward + body.backward + head.forward + head.backward


# --- Accord ----------------------------------------------------------------------------------------------------------


def accord_update(work: Work, model: Any) -> Callable[[int], object]:
    """What makes update number n (from 1)."""
    groups = [group for step in groups_of(work) for group in step]
    if work.kind == "sampling":
        sampler = NativeSampler(model, pad_id=PAD)
        sampling = Sampling(work.answer or 1, min_new_tokens=work.answer or 1, stop_ids=(END,))
        asked = [PromptTokens(group.prompt_ids, group.prompt_id) for group in groups]
        return lambda number: sampler.generate(asked, 1, sampling, ("gpu", number))
    if work.kind == "ppo":
        return ppo_trainer(work, model, groups).step
    settings = LEARNING | {"batch_size": work.batch, "epochs": 1, "eval_every": 1000, "micro_batch_tokens": 16384}
    if work.kind == "sft":
        section, objective, items = SFTConfig(**settings), SFTObjective(), groups
    else:
        section = DPOConfig(**settings)
        known = sequence_logprobs(model, groups, layout="shared", pad_id=PAD, budget=16384).tolist()
        pairs = zip(known[::2], known[1::2], strict=True)
        items = [RankedAnswers(g, (Pair(0, 1),), both) for g, both in zip(groups, pairs, strict=True)]
        objective = dpo_objective(section)
    trainer: OfflineTrainer[Any] = OfflineTrainer(
        work.kind, model, items, section, section, objective,
        layout="shared", pad_id=PAD, seed=0, evaluate=dict,
    )  # fmt: skip
    return trainer.step


def ppo_trainer(work: Work, model: Any, groups: Sequence[TokenGroup]) -> PPOTrainer:
    section = PPOConfig(
        **LEARNING, prompts_per_step=work.batch, samples_per_prompt=1, episodes=work.batch * work.updates,
        max_new_tokens=work.answer or 1, update_epochs=EPOCHS, minibatches=MINIBATCHES, micro_batch_tokens=16384,
        samples_every=1000,
    )  # fmt: skip
    cast = RolloutModels(
        policy=model,
        reference=sharing_copy(model).requires_grad_(False),
        sampler=NativeSampler(model, pad_id=PAD),
        template=Template.of(word_tokenizer(work.vocabulary), "raw"),
        scorer=FunctionScorer(lambda prompt, completion: reward(completion), "the share of even words"),
        gold=None,
        layout="plain",
    )
    prompts = [(Group((Message("user", words(g.prompt_ids)),)), replace(g, completions=())) for g in groups]
    return PPOTrainer(cast, fresh_value_model(model), prompts, section, 0)


# --- the peers -------------------------------------------------------------------------------------------------------


def peer_seconds(work: Work, model: Any) -> list[float] | None:
    """Seconds of every update of TRL, or of every call of `generate`; None where there is no peer."""
    if work.kind == "ppo" or (work.kind != "sampling" and find_spec("trl") is None):
        return None
    if work.kind == "sampling":
        ids = torch.tensor([g.prompt_ids for g in groups_of(work)[0]], device=model.device)
        options: dict[str, Any] = {
            "max_new_tokens": work.answer,
            "min_new_tokens": work.answer,
            "do_sample": True,
            "top_k": 0,
        }
        options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": PAD}
        # The static cache is for GPUs, where transformers compiles the step for it; the faster of the two counts.
        caches = [{}, {"cache_implementation": "static"}] if model.device.type == "cuda" else [{}]
        found = [timed(lambda _, cache=cache: model.generate(ids, **options, **cache), work, model) for cache in caches]
        return min(found, key=lambda seconds: statistics.median(seconds[work.warm_up :]))
    import trl
    from datasets import Dataset

    from benchmarks.speed.trl_clock import Clock
    from benchmarks.speed.trl_side import _rows

    clock, on_gpu = Clock(), model.device.type == "cuda"
    with tempfile.TemporaryDirectory() as out:
        shared: dict[str, Any] = {
            "output_dir": out, "per_device_train_batch_size": work.batch, "learning_rate": 1e-5, "bf16": True,
            "use_cpu": not on_gpu, "lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "adamw_torch_fused",
            "gradient_checkpointing": False, "logging_steps": 1000, "save_strategy": "no", "report_to": "none",
            "num_train_epochs": 1, "max_length": 2048, "disable_tqdm": True, "dataloader_pin_memory": on_gpu,
        }  # fmt: skip
        data = Dataset.from_list([row for step in groups_of(work) for row in _rows(work, step)])
        common = {
            "model": model, "train_dataset": data, "processing_class": word_tokenizer(work.vocabulary),
            "callbacks": [clock],
        }  # fmt: skip
        if work.kind == "sft":
            trl.SFTTrainer(args=trl.SFTConfig(**shared), **common).train()
        else:
            trl.DPOTrainer(args=trl.DPOConfig(**shared, precompute_ref_log_probs=True), **common).train()
    return clock.seconds


# --- measuring -------------------------------------------------------------------------------------------------------


def timed(update: Callable[[int], object], work: Work, model: Any) -> list[float]:
    seconds = []
    for number in range(1, work.updates + 1):
        started = time.perf_counter()
        update(number)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        seconds.append(time.perf_counter() - started)
    return seconds


def measure(work: Work, size: str, device: torch.device, peak: float) -> list[Row]:
    """One row a side."""
    shape, rows = SHAPES[size], []
    for side in ("accord", "transformers" if work.kind == "sampling" else "trl"):
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        model = build_model(shape, vocab_size=work.vocabulary, pad_id=PAD, eos_id=END, seed=0)
        model.to(device, torch.bfloat16 if work.kind == "sampling" else torch.float32)
        if side == "accord":
            with precision("float32" if work.kind == "sampling" else "bfloat16"):
                seconds: list[float] | None = timed(accord_update(work, model), work, model)
        else:
            seconds = peer_seconds(work, model)
        if seconds is None:
            continue
        each = statistics.median(seconds[work.warm_up :])
        written = work.batch * (work.answer or 0)
        tokens = (
            written
            if work.kind in ("ppo", "sampling")
            else work.batch * work.answers * ((work.prompt or 0) + (work.answer or 0))
        )
        mfu = needed_flops(work, shape) / each / peak
        rows.append(Row(work.kind, size, side, each, tokens / each, mfu, peak_memory_mb()))
    return rows


def peak_of(device: torch.device) -> tuple[float, str]:
    """Operations a second at best, and where the number is from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((peak for key, peak in PEAKS.items() if key in name), None)
        if known is not None:
            return known, f"as written on {name}"
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    a: Tensor = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds), f"measured: a product of {size} x {size} {dtype}"


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| work | model | side | s an update | tokens/s | MFU | peak MB | speed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    own = {(row.work, row.size): row for row in rows if row.side == "accord"}
    for row in rows:
        speed = "" if row.side == "accord" else f"{row.seconds / own[row.work, row.size].seconds:.2f}x"
        lines.append(
            f"| {row.work} | {row.size} | {row.side} | {row.seconds:.4f} | {row.tokens_per_second:,.0f} "
            f"| {row.mfu:.1%} | {row.peak_mb:,.0f} | {speed} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--sizes", nargs="+", choices=[size for size in SHAPES if size != "small"], help="models")
    parser.add_argument("--work", default="", help="only works whose name begins so")
    parser.add_argument("--small", action="store_true", help="a toy model, on a CPU too")
    parser.add_argument("--out", type=Path, help=f"the results, as JSON ({LATEST.name}, or -small)")
    args = parser.parse_args(arguments)
    device = choose_device("auto")
    if device.type == "cpu" and not args.small:
        sys.exit("no GPU here: with --small the same code runs on a CPU, to see that it works")
    chosen = [work for kind, work in works(args.small).items() if kind.startswith(args.work)]
    if not chosen:
        sys.exit(f"no work begins with {args.work!r}; there are {', '.join(works(True))}")
    peak, source = peak_of(device)
    print(NEVER_RUN if device.type == "cpu" else f"On {torch.cuda.get_device_name(device)}.")
    print(f"Peak: {peak / 1e12:.3g} TFLOP/s ({source}).")
    sizes = ["small"] if args.small else args.sizes or ["0.1B", "0.4B", "1.5B"]
    rows = [row for size in sizes for work in chosen for row in measure(work, size, device, peak)]
    print(table(rows))
    if find_spec("trl") is None:
        print("TRL is not installed, so SFT and DPO have no peer here: pip install accord-rlhf[bench]")
    out = args.out or (LATEST.with_stem(f"{LATEST.stem}-small") if args.small else LATEST)
    out.parent.mkdir(parents=True, exist_ok=True)
    machine = environment(str(device)) | {"peak": peak, "peak_source": source}
    write_json(out, {"machine": machine, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
