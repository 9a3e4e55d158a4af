"""The native sampler: token ids in, token ids and log-probabilities out, with any transformers causal language model.

Prompts are batched by length and run once for all their samples; finished sequences leave the batch. Text never
appears here, so nothing is decoded and tokenised again between the rollout and the loss.
Legend: B sequences in the batch, P prompt tokens with left padding, C new tokens, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from accord.errors import ConfigError, DataError, TrainingError
from accord.models.memory import asked_for, free_memory
from accord.models.precision import reading
from accord.phases import passing
from accord.randomness import generator
from accord.records import SampledCompletion
from accord.rollout.cache import first_row, reserve, take_rows
from accord.rollout.compiled_step import CompiledStep, compiled_step
from accord.rollout.llama_step import LlamaStep, llama_step
from accord.rollout.sampling import Sampling, choose

__all__ = ["NativeSampler", "PromptTokens", "Sampler"]


# Largest difference of a logit that rounding explains, as a share of the largest logit. Models that compute in float64
# have norms in float32 all the same.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt for a sampler. `prompt_id` keys its randomness (`Group.prompt_id`), so it must not depend on order."""

    ids: tuple[int, ...]
    prompt_id: int


class Sampler(Protocol):
    """What rollouts need: `n` completions for each prompt, in the prompts' order, reproducible from `key`."""

    def generate(
        self, prompts: Sequence[PromptTokens], n: int, sampling: Sampling, key: tuple[int | str, ...]
    ) -> list[tuple[SampledCompletion, ...]]: ...


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence to write: the prompt's place in the call, and the index of this sample among the prompt id's."""

    prompt: int
    sample_index: int


class NativeSampler:
    """Samples from a transformers causal language model in static batches with a key-value cache.

    Args:
        model: the policy; it is put into evaluation mode while sampling and back afterwards.
        pad_id: fills the left of shorter prompts; masked, so any valid token id will do.
        max_batch_sequences: sequences decoded at once; memory grows with it. It changes results by rounding only.
        progress: called as progress(sequences finished, sequences in all) after every batch.
        compiled: run the short decoding step through `torch.compile`; said and left where the model has none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_id: int,
        max_batch_sequences: int = 256,
        progress: Callable[[int, int], None] | None = None,
        compiled: bool = False,
    ) -> None:
        if max_batch_sequences < 1:
            raise ValueError(f"max_batch_sequences is {max_batch_sequences}; expected at least 1")
        self._model = model
        self._pad_id = pad_id
        self._max_batch_sequences = max_batch_sequences
        self._progress = progress
        self._step: LlamaStep | CompiledStep | None = llama_step(model)
        if compiled:
            self._step = compiled_step(model, self._step)
        self._step_checked = False
        self._told_of_halves = False

    def generate(
        self, prompts: Sequence[PromptTokens], n: int, sampling: Sampling, key: tuple[int | str, ...]
    ) -> list[tuple[SampledCompletion, ...]]:
        """`n` completions per prompt, in order.

        Sample i of a prompt takes its uniforms from `generator(*key, prompt_id, i)` and from nothing else. When a
        prompt id occurs again in one call, i goes on counting, so its samples differ from the earlier ones.

        Raises: ConfigError when a prompt and `max_new_tokens` do not fit into the model's context; DataError on an
            empty prompt; TrainingError when the model's logits are not finite, or memory runs out with one sequence.
        """
        self._check(prompts, n, sampling)
        earlier: Counter[int] = Counter()
        first_index = []
        for prompt in prompts:
            first_index.append(earlier[prompt.prompt_id])
            earlier[prompt.prompt_id] += n
        samples: list[list[SampledCompletion]] = [[] for _ in prompts]
        num_done, was_training = 0, self._model.training
        self._model.eval()
        try:
            for rows in self._batches(prompts, n, first_index):
                sampled = self._sampled(prompts, rows, sampling, key)
                for row, sample in zip(rows, sampled, strict=True):
                    samples[row.prompt].append(sample)
                num_done += len(rows)
                if self._progress is not None:
                    self._progress(num_done, n * len(prompts))
        finally:
            self._model.train(was_training)
        return [tuple(group) for group in samples]

    def _check(self, prompts: Sequence[PromptTokens], n: int, sampling: Sampling) -> None:
        if n < 1:
            raise ValueError(f"n is {n}; expected at least 1 sample per prompt")
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        for index, prompt in enumerate(prompts):
            if not prompt.ids:
                raise DataError(f"prompt {index} has no tokens; a model needs at least one, such as the BOS token")
            if len(prompt.ids) + sampling.max_new_tokens > limit:
                raise ConfigError(
                    f"prompt {index} has {len(prompt.ids)} tokens, and with max_new_tokens = {sampling.max_new_tokens}"
                    f" it exceeds the model's {limit} positions; shorten the prompts or lower max_new_tokens"
                )

    def _batches(self, prompts: Sequence[PromptTokens], n: int, first_index: list[int]) -> Iterator[list[_Row]]:
        """Rows in batches of similar prompt length, longest first so that running out of memory shows at once.

        A prompt's samples share a batch whenever they fit, because then the prompt runs through the model once.
        """
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].ids))
        rows = [_Row(index, first_index[index] + sample) for index in order for sample in range(n)]
        limit = self._max_batch_sequences
        size = limit - limit % n if n <= limit else limit
        for start in range(0, len(rows), size):
            yield rows[start : start + size]

    def _sampled(
        self, prompts: Sequence[PromptTokens], rows: list[_Row], sampling: Sampling, key: tuple[int | str, ...]
    ) -> list[SampledCompletion]:
        """One batch; where it finds no memory, its halves. The next batch is tried whole again: were the limit
        remembered, it would belong into checkpoints, and the cache is reserved first, so that failing costs little."""
        try:
            with reading(self._model.device):
                return self._decode(prompts, rows, sampling, key)
        except RuntimeError as error:
            reason = asked_for(error)
            if reason is None:
                raise
        longest = max(len(prompts[row.prompt].ids) for row in rows)
        what = f"with prompts of up to {longest} tokens and {sampling.max_new_tokens} new ones: {reason}"
        if len(rows) == 1:
            raise TrainingError(
                f"out of memory while sampling a single sequence {what}. Lower `max_new_tokens` or "
                "`data.max_prompt_tokens`; `model.adapter` and `model.precision` save memory as well"
            )
        if not self._told_of_halves:
            self._told_of_halves = True
            warnings.warn(
                f"out of memory while sampling {len(rows)} sequences {what}; such batches are sampled in halves, which "
                "is slower; answers stay the same. A lower `max_new_tokens` or `data.max_prompt_tokens` avoids it",
                stacklevel=3,
            )
        if isinstance(self._step, CompiledStep):
            self._step.release()
        free_memory()
        half = len(rows) // 2
        return [sample for part in (rows[:half], rows[half:]) for sample in self._sampled(prompts, part, sampling, key)]

    @torch.inference_mode()
    def _decode(
        self, prompts: Sequence[PromptTokens], rows: list[_Row], sampling: Sampling, key: tuple[int | str, ...]
    ) -> list[SampledCompletion]:
        """Write one batch to its end: (B, C) tensors throughout, Python per sequence only before and after."""
        device = self._model.device
        stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
        uniforms = np.stack(
            [generator(*key, prompts[r.prompt].prompt_id, r.sample_index).random(sampling.max_new_tokens) for r in rows]
        )
        uniforms = torch.from_numpy(uniforms).to(device)
        ids = torch.zeros(uniforms.shape, dtype=torch.long, device=device)
        logprobs = torch.zeros(uniforms.shape, device=device)

        logits, cache, mask = self._prefill(prompts, rows, sampling.max_new_tokens)
        num_prompt_columns = mask.shape[1] - sampling.max_new_tokens
        positions = mask[:, :num_prompt_columns].sum(dim=1, keepdim=True)
        alive = torch.arange(len(rows), device=device)  # which rows of `ids` the batch still holds
        finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
        for step in range(sampling.max_new_tokens):
            if step < sampling.min_new_tokens:
                logits = logits.index_fill(1, stop_ids, -math.inf)
            tokens, token_logprobs = choose(logits, uniforms[alive, step], sampling)
            ids[alive, step] = tokens
            logprobs[alive, step] = token_logprobs
            finished = finished | torch.isin(tokens, stop_ids)
            num_finished = int(finished.sum())
            if num_finished == len(alive) or step + 1 == sampling.max_new_tokens:
                break
            # Leaving copies the whole cache, so it waits until it saves enough; until then finished rows write
            # tokens that nobody reads.
            if 4 * num_finished >= len(alive):
                kept = (~finished).nonzero()[:, 0]
                take_rows(cache, kept)
                alive, tokens, mask, positions = alive[kept], tokens[kept], mask[kept], positions[kept]
                finished = finished[kept]
            logits = self._next_logits(tokens, mask[:, : num_prompt_columns + step + 1], positions + step, cache)
        return _completions(ids, logprobs, stop_ids)

    def _next_logits(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """(B, V) after one more token of every sequence, by the shorter way where the model has one."""
        if self._step is None:
            return _own_logits(self._model, tokens, mask, positions, cache)
        if not self._step_checked:
            return self._checked(self._step, tokens, mask, positions, cache)
        return self._step(tokens, mask, positions, cache)

    def _checked(
        self, step: LlamaStep | CompiledStep, tokens: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache
    ) -> Tensor:
        """Once, on the first sequence: does the short step say what the model itself does? If not, it is not used."""
        own = _own_logits(self._model, tokens[:1], mask[:1], positions[:1], first_row(cache))
        logits = step(tokens, mask, positions, cache)
        difference = float((logits[:1] - own).abs().max())
        self._step_checked = True
        if math.isfinite(difference) and difference > _TOLERANCE[own.dtype] * float(own.abs().max()):
            warnings.warn(
                f"the short decoding step differs from {type(self._model).__name__}'s own by {difference:.2g} in a "
                "logit; the model's own is used, which is slower",
                stacklevel=2,
            )
            self._step = None
            cache.crop(-1)  # the token that the step wrote
            return _own_logits(self._model, tokens, mask, positions, cache)
        return logits

    def _prefill(
        self, prompts: Sequence[PromptTokens], rows: list[_Row], max_new_tokens: int
    ) -> tuple[Tensor, DynamicCache, Tensor]:
        """Run each distinct prompt of the batch once, then repeat its cache for its rows.

        Returns: logits after the prompt (B, V), the cache, and the attention mask (B, P + C), True for every token
            that is or will be written. The mask is given even when nothing is padded: without one, some models warn
            about prompts that begin with their padding token.
        """
        distinct = list(dict.fromkeys(row.prompt for row in rows))
        width = max(len(prompts[index].ids) for index in distinct)
        padding = [width - len(prompts[index].ids) for index in distinct]
        input_ids = torch.tensor(
            [[self._pad_id] * pad + list(prompts[index].ids) for index, pad in zip(distinct, padding, strict=True)],
            device=self._model.device,
        )
        columns = torch.arange(width + max_new_tokens, device=self._model.device)
        mask = columns >= torch.tensor(padding, device=self._model.device)[:, None]
        cache = DynamicCache(config=self._model.config)
        passing(self._model, input_ids, mask[:, :width], logits=True)
        logits = self._model(
            input_ids=input_ids,
            attention_mask=mask[:, :width],
            position_ids=(mask[:, :width].cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        place = {index: position for position, index in enumerate(distinct)}
        repeat = torch.tensor([place[row.prompt] for row in rows], device=self._model.device)
        take_rows(cache, repeat)
        reserve(cache, max_new_tokens)
        return logits[repeat], cache, mask[repeat]


def _own_logits(model: PreTrainedModel, tokens: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    passing(model, tokens[:, None], mask, cached=mask.shape[1] - 1, logits=True)
    return model(
        input_ids=tokens[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).logits[:, -1]


def _completions(ids: Tensor, logprobs: Tensor, stop_ids: Tensor) -> list[SampledCompletion]:
    """Cut each row of (B, C) after its first stop token."""
    is_stop = torch.isin(ids, stop_ids)
    stopped = is_stop.any(dim=1)
    lengths = torch.where(stopped, is_stop.int().argmax(dim=1) + 1, ids.shape[1])
    counted = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    if not bool(torch.isfinite(logprobs[counted]).all()):
        raise TrainingError(
            "the policy's logits were not finite while sampling; its weights have diverged:"
            " lower the learning rate, or go back to an earlier checkpoint"
        )
    return [
        SampledCompletion(tuple(row_ids[:length]), tuple(row_logprobs[:length]), "stop" if stop else "length")
        for row_ids, row_logprobs, length, stop in zip(
            ids.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist(), strict=True
        )
    ]
