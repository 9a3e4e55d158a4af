"""Training on fixed data: one trainer for every method whose step is a pure loss on groups from a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from accord.config import OptimiserFields
from accord.data.order import batch_indices, epochs_done, micro_batches, num_steps
from accord.models.adapters import load_trainable_state, trainable_state
from accord.models.layout import CompletionBatch, Layout, collate, packed_size, packs, shares
from accord.models.memory import MicroBatches, one_pass
from accord.models.token_scores import score_tokens
from accord.phases import EVALUATION, phase
from accord.records import TokenGroup
from accord.training.environment import peak_memory_mb
from accord.training.loop import Captured, StepOutcome
from accord.training.optim import Optimiser, learning_rate_at

__all__ = [
    "Memory",
    "Objective",
    "OfflineTrainer",
    "PolicyLogprobs",
    "Schedule",
    "group_passes",
    "sequence_logprobs",
]

Item = TypeVar("Item")
ItemIn = TypeVar("ItemIn", contravariant=True)
Sums = dict[str, float]
PolicyLogprobs = Callable[[Sequence[TokenGroup]], Tensor]
"""(C,) log-probability of every completion's counted tokens, summed, under the policy as it is; without gradient."""


class Schedule(Protocol):
    """The fields of a section that say how long training is and how often it is evaluated."""

    epochs: int
    max_steps: int | None
    batch_size: int
    eval_every: int


class Objective(Protocol[ItemIn]):
    """What makes a method: which tokens an item has, what a whole step knows, and the loss of a micro-batch."""

    def tokens(self, item: ItemIn) -> TokenGroup: ...

    def begin(self, items: Sequence[ItemIn], logprobs: PolicyLogprobs) -> Any:
        """What the whole optimiser step has in common and its micro-batches need: the count its loss is divided by, and
        whatever must be known of all items before the first gradient."""
        ...

    def loss(self, model: Any, items: Sequence[ItemIn], batch: CompletionBatch, step: Any) -> tuple[Tensor, Sums]:
        """The loss to differentiate, and sums that add up over micro-batches. `step` is what `begin` returned."""
        ...

    def metrics(self, sums: Sums) -> dict[str, float]:
        """The step's metrics from the added-up sums."""
        ...


class Memory(Protocol):
    """What a method remembers from step to step besides the model and its optimiser."""

    def after_update(self, step: int) -> None: ...

    def values(self) -> dict[str, Any]:
        """JSON values for the checkpoint."""
        ...

    def restore(self, values: dict[str, Any]) -> None: ...


class OfflineTrainer(Generic[Item]):
    """Runs an objective over items in a seeded order; see `accord.training.loop.Trainer`."""

    def __init__(
        self,
        stage: str,
        model: Any,
        items: Sequence[Item],
        section: OptimiserFields,
        schedule: Schedule,
        objective: Objective[Item],
        *,
        layout: Layout,
        pad_id: int,
        seed: int,
        evaluate: Callable[[], Mapping[str, float]],
        memory: Memory | None = None,
    ) -> None:
        self.stage = stage
        self.checkpoint_every, self.keep_checkpoints = section.checkpoint_every, section.keep_checkpoints
        self.total_steps = num_steps(len(items), schedule.batch_size, schedule.epochs, schedule.max_steps)
        self._model, self._items, self._section, self._schedule = model, items, section, schedule
        self._objective, self._pad_id, self._seed = objective, pad_id, seed
        self._layout: Layout = layout
        self._evaluate, self._memory = evaluate, memory
        self._optimiser = Optimiser(model, section)
        self._micro_batches = MicroBatches(section.micro_batch_tokens)
        self._tokens = self._sequences = 0

    def step(self, step: int) -> StepOutcome:
        """One optimiser update on the step's batch, whatever number of forward passes it takes."""
        started = time.monotonic()
        size = self._schedule.batch_size
        with phase("data"):
            batch_items = [self._items[i] for i in batch_indices(step, len(self._items), size, self._seed, self.stage)]
            begun = self._micro_batches.attempt(lambda _: self._objective.begin(batch_items, self._policy_logprobs))
        sums, tokens = self._micro_batches.attempt(
            lambda budget: self._accumulate(batch_items, begun, budget), self._optimiser.discard
        )
        groups = [self._objective.tokens(item) for item in batch_items]
        self._tokens += sum(sum(completion.mask) for group in groups for completion in group.completions)
        self._sequences += sum(len(group.completions) for group in groups)
        rate = learning_rate_at(step, self.total_steps, self._section.learning_rate, self._section)
        update = self._optimiser.update(rate)
        if self._memory is not None:
            with phase("optimiser"):
                self._memory.after_update(step)
        metrics = self._objective.metrics(sums) | {
            "train/grad_norm": update.grad_norm,
            "train/learning_rate": rate,
            "train/skipped_updates": self._optimiser.skipped,
            "train/tokens": self._tokens,
            "train/sequences": self._sequences,
            "train/epoch": epochs_done(step, len(self._items), size),
            "system/tokens_per_second": tokens / (time.monotonic() - started),
            "system/peak_memory_mb": peak_memory_mb(),
        }
        if step % self._schedule.eval_every == 0 or step == self.total_steps:
            before = time.monotonic()
            with phase(EVALUATION):
                metrics |= self._evaluate()
            metrics["time/eval_seconds"] = time.monotonic() - before
        return StepOutcome(metrics, status=f"loss {metrics['train/loss']:.3f}", notes=self._micro_batches.notes())

    def _accumulate(self, batch_items: Sequence[Item], begun: Any, budget: int) -> tuple[Sums, int]:
        """Gradients of the step, in passes of at most `budget` tokens; the step's sums, and the tokens that ran."""
        sums: Sums = {}
        tokens = 0
        with phase("data"):
            passes = list(group_passes(batch_items, self._objective.tokens, self._layout, budget))
        for items in passes:
            groups = [self._objective.tokens(item) for item in items]
            with one_pass(groups):
                with phase("data"):
                    batch = collate(groups, layout=self._layout, pad_id=self._pad_id, device=self._model.device)
                with phase("forward"):
                    loss, part = self._objective.loss(self._model, items, batch, begun)
                self._optimiser.backward(loss)
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + value
            tokens += batch.input_ids.numel()
        return sums, tokens

    def capture(self) -> Captured:
        return Captured(
            {"model": trainable_state(self._model), "optimiser": self._optimiser.tensors()},
            {
                "optimiser": self._optimiser.counters(),
                "micro_batch_tokens": self._micro_batches.tokens,
                "tokens": self._tokens,
                "sequences": self._sequences,
                "memory": None if self._memory is None else self._memory.values(),
            },
        )

    def restore(self, captured: Captured) -> None:
        load_trainable_state(self._model, captured.tensors["model"])
        self._optimiser.restore(captured.tensors["optimiser"], captured.values["optimiser"])
        self._tokens, self._sequences = captured.values["tokens"], captured.values["sequences"]
        self._micro_batches.restore(captured.values)
        if self._memory is not None:
            self._memory.restore(captured.values["memory"])

    @phase("scoring")
    def _policy_logprobs(self, groups: Sequence[TokenGroup]) -> Tensor:
        return sequence_logprobs(
            self._model, groups, layout=self._layout, pad_id=self._pad_id, budget=self._micro_batches.tokens
        )


def sequence_logprobs(model: Any, groups: Sequence[TokenGroup], *, layout: Layout, pad_id: int, budget: int) -> Tensor:
    """(C,) log-probability of every completion's counted tokens, summed, in the groups' order; without gradient, in
    float32 at least, on the CPU."""
    first = [0]
    for group in groups:
        first.append(first[-1] + len(group.completions))
    result = torch.zeros(first[-1], dtype=torch.promote_types(model.dtype, torch.float32))
    for indices in group_passes(range(len(groups)), lambda i: groups[i], layout, budget):
        with phase("data"):
            batch = collate([groups[i] for i in indices], layout=layout, pad_id=pad_id, device=model.device)
        with torch.no_grad(), one_pass([groups[i] for i in indices]):
            sums = score_tokens(model, batch, mask="loss").logprobs.sum(1)
        result[[row for i in indices for row in range(first[i], first[i + 1])]] = sums.to(result)
    return result


def group_passes(
    items: Sequence[Item], tokens: Callable[[Item], TokenGroup], layout: Layout, budget: int
) -> Iterator[list[Item]]:
    """Cut items into forward passes of at most `budget` tokens in the given layout, padding included; the items of a
    pass are looked up when it comes."""
    groups = map(tokens, items)
    if shares(layout):
        sizes = [(group.num_tokens, 1, packed_size(group, layout)) for group in groups]
    else:
        sizes = [(_longest(group), len(group.completions), packed_size(group, layout)) for group in groups]
    length, rows, packed = ((lambda i, part=part: sizes[i][part]) for part in range(3))
    for places in micro_batches(range(len(sizes)), length, rows, budget, packed if packs(layout) else None):
        yield [items[i] for i in places]


def _longest(group: TokenGroup) -> int:
    return len(group.prompt_ids) + max(len(c.ids) for c in group.completions)
