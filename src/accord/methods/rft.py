"""Rejection-sampling fine-tuning: sample, keep what scores best of each prompt, imitate it, and begin again.

    a cycle   completions are sampled with the policy as it is, and scored; what earlier cycles sampled is forgotten
    a step    q rises from start_quantile to end_quantile over the steps of a cycle;
              kept = the different completions that reach their prompt's quantile q and beat its worst score;
              loss = -sum over kept tokens of log p(token | everything before it) / number of kept tokens

A completion cut by length takes part with its score less the penalty (see `shaping.truncation`); where it is kept all
the same, it is imitated as it stands, without an end. One that could not be scored is not chosen.

Source: Gulcehre et al. 2023, arXiv:2308.08998; Dong et al. 2023, arXiv:2304.06767. Departures: thresholds are each
prompt's own; the pool holds one cycle's samples; repeated completions count once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from accord.config import RFTConfig
from accord.data.order import batch_indices, num_steps
from accord.losses.sft import sft_loss
from accord.measures.selection import Selection, improvement_quantile, select_best
from accord.measures.text import distinct_n, repetition
from accord.methods.candidates import Candidates, Drawing, best_of, draw
from accord.methods.offline import group_passes
from accord.methods.rollouts import Prompt
from accord.models.adapters import load_trainable_state, trainable_state
from accord.models.layout import Layout, collate
from accord.models.memory import MicroBatches, one_pass
from accord.models.token_scores import score_tokens
from accord.phases import phase
from accord.randomness import permutation
from accord.records import TokenCompletion, TokenGroup
from accord.rollout.sampling import Sampling
from accord.training.environment import peak_memory_mb
from accord.training.loop import Captured, StepOutcome
from accord.training.optim import Optimiser, learning_rate_at

__all__ = ["RFTTrainer", "cycle_prompts"]

SAMPLES_KEPT = 4


@dataclass(frozen=True, slots=True)
class _Pool:
    """What a cycle sampled: P prompts, n completions each; the rest (P, n), as in `Candidates`."""

    ids: tuple[tuple[tuple[int, ...], ...], ...]
    finished: NDArray[np.bool_]
    scores: NDArray[np.float64]
    rewards: NDArray[np.float64]
    usable: NDArray[np.bool_]
    gold: NDArray[np.float64] | None


class RFTTrainer:
    """One step is one selection and the passes over it; see `accord.training.loop.Trainer`."""

    stage = "rft"

    def __init__(
        self, policy: Any, drawing: Drawing, prompts: Sequence[Prompt], section: RFTConfig, *, layout: Layout, seed: int
    ) -> None:
        self.checkpoint_every, self.keep_checkpoints = section.checkpoint_every, section.keep_checkpoints
        self.total_steps = section.cycles * section.improve_steps
        self.prompts_per_cycle = section.prompts_per_cycle or len(prompts)
        self._policy, self._drawing, self._prompts, self._section = policy, drawing, prompts, section
        self._layout: Layout = layout
        self._seed = seed
        self._optimiser = Optimiser(policy, section)
        self._micro_batches = MicroBatches(section.micro_batch_tokens)
        self._pool: _Pool | None = None
        self._tokens = self._sequences = 0

    def step(self, step: int) -> StepOutcome:
        """Sample where a cycle begins; then select and imitate."""
        started, section = time.monotonic(), self._section
        cycle, place = divmod(step - 1, section.improve_steps)
        prompts = [
            self._prompts[i] for i in cycle_prompts(cycle, self.prompts_per_cycle, len(self._prompts), self._seed)
        ]
        metrics: dict[str, float] = {}
        if place == 0:
            drawn = self._draw(prompts, cycle)
            self._pool = _Pool(
                tuple(tuple(s.ids for s in row) for row in drawn.sampled),
                drawn.finished, drawn.scores, drawn.rewards, drawn.usable, drawn.gold,
            )  # fmt: skip
            metrics |= _pool_metrics(drawn)
        assert self._pool is not None
        pool = self._pool
        quantile = improvement_quantile(place + 1, section.improve_steps, section.start_quantile, section.end_quantile)
        # What may not be chosen has its prompt's worst reward, and the worst is never chosen.
        chosen = select_best(pool.rewards, pool.ids, quantile)
        kept = [
            TokenGroup(prompts[p][1].prompt_ids, (_whole(pool.ids[p][k]),), prompts[p][1].prompt_id)
            for p, k in np.argwhere(chosen.kept).tolist()
        ]
        updating = time.monotonic()
        metrics |= self._imitate(step, kept)
        now = time.monotonic()
        metrics |= _selection_metrics(pool, chosen) | {
            "rollout/selection_quantile": quantile,
            "rollout/prompts": (cycle + 1) * len(prompts),
            "rollout/samples": (cycle + 1) * pool.scores.size,
            "train/skipped_updates": self._optimiser.skipped,
            "train/tokens": self._tokens,
            "train/sequences": self._sequences,
            "time/update_seconds": now - updating,
            "system/tokens_per_second": _tokens_run(prompts, pool, place, kept, section.epochs) / (now - started),
            "system/peak_memory_mb": peak_memory_mb(),
        }
        status = f"kept {len(kept)} of {pool.scores.size}"
        if kept:
            status += f", which score {metrics['rollout/kept_score/mean']:+.2f}"
        due = step == 1 or step % section.samples_every == 0 or step == self.total_steps
        samples = self._samples(prompts, pool) if due else ()
        return StepOutcome(metrics, status, samples, notes=self._micro_batches.notes())

    def capture(self) -> Captured:
        pool = {} if self._pool is None else _to_tensors(self._pool)
        return Captured(
            {"policy": trainable_state(self._policy), "optimiser": self._optimiser.tensors(), "pool": pool},
            {
                "optimiser": self._optimiser.counters(),
                "micro_batch_tokens": self._micro_batches.tokens,
                "tokens": self._tokens,
                "sequences": self._sequences,
            },
        )

    def restore(self, captured: Captured) -> None:
        load_trainable_state(self._policy, captured.tensors["policy"])
        self._optimiser.restore(captured.tensors["optimiser"], captured.values["optimiser"])
        self._micro_batches.restore(captured.values)
        self._pool = _from_tensors(captured.tensors["pool"])
        self._tokens, self._sequences = captured.values["tokens"], captured.values["sequences"]

    def _draw(self, prompts: Sequence[Prompt], cycle: int) -> Candidates:
        section = self._section
        sampling = Sampling(
            section.max_new_tokens, section.temperature, stop_ids=self._drawing.template.stop_ids
        )  # fmt: skip
        return draw(self._drawing, prompts, section.samples_per_prompt, sampling, section, ("rft", self._seed, cycle))

    @phase("forward")
    def _imitate(self, step: int, kept: Sequence[TokenGroup]) -> dict[str, float]:
        """SFT on the kept completions: `epochs` passes, each freshly shuffled. Without any nothing happens."""
        section = self._section
        rate = learning_rate_at(step, self.total_steps, section.learning_rate, section)
        nll = tokens = 0.0
        norms: list[float] = []
        for update in range(1, num_steps(len(kept), section.batch_size, section.epochs, None) + 1):
            order = batch_indices(update, len(kept), section.batch_size, self._seed, "rft", step)
            batch_groups = [kept[i] for i in order]
            count = sum(len(group.completions[0].ids) for group in batch_groups)
            nll += self._micro_batches.attempt(partial(self._accumulate, batch_groups, count), self._optimiser.discard)
            norms.append(self._optimiser.update(rate).grad_norm)
            tokens += count
            self._sequences += len(batch_groups)
        self._tokens += int(tokens)
        if not norms:
            return {"train/learning_rate": rate}
        return {
            "train/loss": nll / tokens,
            "train/grad_norm": sum(norms) / len(norms),
            "train/learning_rate": rate,
        }

    def _accumulate(self, batch_groups: Sequence[TokenGroup], count: int, budget: int) -> float:
        """Gradient of one update on `count` tokens, in passes of at most `budget`; the summed loss, nats."""
        nll = 0.0
        for groups in group_passes(batch_groups, lambda g: g, self._layout, budget):
            with one_pass(groups):
                with phase("data"):
                    batch = collate(
                        groups,
                        layout=self._layout, pad_id=self._drawing.template.pad_id, device=self._policy.device,
                    )  # fmt: skip
                logprobs = score_tokens(self._policy, batch, mask="loss").logprobs
                result = sft_loss(logprobs, batch.completion_mask, num_tokens=count)
                self._optimiser.backward(result.loss)
            nll += float(result.nll_sum)
        return nll

    def _samples(self, prompts: Sequence[Prompt], pool: _Pool) -> tuple[dict[str, Any], ...]:
        """The first prompts, each with what would be kept of it at the strictest quantile: its best completion."""
        best = best_of(pool.rewards, pool.usable)
        return tuple(
            {
                "prompt": "\n".join(m.content for m in prompts[p][0].prompt),
                "completion": self._drawing.template.decode(pool.ids[p][k]),
                "score": float(pool.scores[p, k]),
                "finished": bool(pool.finished[p, k]),
                **({} if pool.gold is None else {"gold": float(pool.gold[p, k])}),
            }
            for p, k in enumerate(best[:SAMPLES_KEPT])
        )


def cycle_prompts(cycle: int, size: int, count: int, seed: int) -> list[int]:
    """The prompts of cycle `cycle` (from 0): the next `size` of shuffled passes through all `count`; all, in order,
    when a cycle takes them all."""
    if size == count:
        return list(range(count))
    start = cycle * size
    first, last = start // count, (start + size - 1) // count
    order = [i for passed in range(first, last + 1) for i in permutation(count, "rft-prompts", seed, passed)]
    return order[start - first * count :][:size]


def _whole(ids: tuple[int, ...]) -> TokenCompletion:
    return TokenCompletion(ids, (True,) * len(ids))


def _pool_metrics(drawn: Candidates) -> dict[str, float]:
    """What the policy wrote, whatever is kept of it."""
    texts = [request.completion for row in drawn.requests for request in row]
    metrics = {
        **drawn.metrics,
        "rollout/completion_tokens/mean": sum(len(s.ids) for row in drawn.sampled for s in row) / len(texts),
        "rollout/finished_fraction": float(drawn.finished.mean()),
        "rollout/truncated_fraction": float((~drawn.finished).mean()),
        "rollout/repetition": sum(map(repetition, texts)) / len(texts),
        "rollout/distinct_2": distinct_n(texts, 2),
        "time/generate_seconds": drawn.generate_seconds,
        "time/score_seconds": drawn.score_seconds,
    }
    if drawn.gold is not None:
        metrics["rollout/gold_utility/mean"] = float(drawn.gold.mean())
        metrics["rollout/gold_utility/std"] = float(drawn.gold.std())
    return metrics


def _selection_metrics(pool: _Pool, chosen: Selection) -> dict[str, float]:
    passed, kept = int(chosen.passed.sum()), int(chosen.kept.sum())
    metrics = {
        "rollout/kept_fraction": passed / chosen.passed.size,
        "rollout/dropped_prompts": chosen.num_dropped,
    }
    if passed:
        means = [scores[row].mean() for scores, row in zip(pool.scores, chosen.passed, strict=True) if row.any()]
        metrics["rollout/kept_distinct_fraction"] = kept / passed
        metrics["rollout/kept_score/mean"] = float(np.mean(means))
    return metrics


def _tokens_run(prompts: Sequence[Prompt], pool: _Pool, place: int, kept: Sequence[TokenGroup], epochs: int) -> int:
    """Tokens that went through the policy in a step: of the sampling where there was some, and of the passes."""
    sampled = sum(
        len(tokens.prompt_ids) + sum(map(len, row)) for (_, tokens), row in zip(prompts, pool.ids, strict=True)
    )
    return (sampled if place == 0 else 0) + epochs * sum(group.num_tokens for group in kept)


def _to_tensors(pool: _Pool) -> dict[str, Tensor]:
    flat = [ids for row in pool.ids for ids in row]
    tensors = {
        "ids": torch.tensor([token for ids in flat for token in ids], dtype=torch.int32),
        "lengths": torch.tensor([len(ids) for ids in flat], dtype=torch.int32),
        "finished": torch.from_numpy(pool.finished),
        "scores": torch.from_numpy(pool.scores),
        "rewards": torch.from_numpy(pool.rewards),
        "usable": torch.from_numpy(pool.usable),
    }
    return tensors if pool.gold is None else tensors | {"gold": torch.from_numpy(pool.gold)}


def _from_tensors(tensors: dict[str, Tensor]) -> _Pool:
    ids, finished = tensors["ids"].tolist(), tensors["finished"].numpy()
    ends = np.concatenate([[0], np.cumsum(tensors["lengths"].numpy())]).tolist()
    rows, n = finished.shape
    pieces = [tuple(ids[ends[i] : ends[i + 1]]) for i in range(rows * n)]
    return _Pool(
        tuple(tuple(pieces[row * n : (row + 1) * n]) for row in range(rows)),
        finished,
        tensors["scores"].numpy(),
        tensors["rewards"].numpy(),
        tensors["usable"].numpy(),
        tensors["gold"].numpy() if "gold" in tensors else None,
    )
