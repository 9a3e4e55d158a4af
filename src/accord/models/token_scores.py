"""What a model says about a batch: log-probabilities and entropies of tokens, values, scores of completions.

Every model is read through transformers' public interface: the trunk (`base_model`), the output embedding
(`get_output_embeddings()`), or the scalar head. Shape letters as in `layout`: C completions, T tokens, R rows,
L places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from accord.errors import ConfigError
from accord.models.attention import blockwise
from accord.models.compiled import trunk_of
from accord.models.flex import BlockMask, as_blocks
from accord.models.heads import scalar_head, score_head
from accord.models.last_block import most_read, only_at
from accord.models.layout import CompletionBatch
from accord.models.precision import lowered, reading
from accord.models.projection import LogitTransform, token_logprobs
from accord.models.recompute import recomputing
from accord.models.shared_attention import splitting, written_out
from accord.phases import passing

__all__ = [
    "TokenScores",
    "attention_window",
    "head_scores",
    "hidden_states",
    "last_hidden_states",
    "logit_transform",
    "predicting_hidden_states",
    "predicting_states",
    "score_completions",
    "score_tokens",
    "score_values",
    "spread",
    "token_head_scores",
    "tokens_of",
    "values_of",
]


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Per-token results, (C, T); exactly 0, without gradient, where nothing was scored.

    logprobs   log-probability of each completion token, nats, at the temperature asked for
    entropies  entropy of the distribution each token was drawn from, nats; None unless asked for
    """

    logprobs: Tensor
    entropies: Tensor | None


def score_tokens(
    model: Any,
    batch: CompletionBatch,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    mask: Literal["loss", "valid"] = "valid",
    chunk_rows: int | None = None,
) -> TokenScores:
    """Log-probabilities of the completion tokens under a causal language model; gradients flow unless switched off.

    The vocabulary projection runs at the scored tokens alone: all that exist ("valid") or those in the loss ("loss").
    `chunk_rows` is `token_logprobs`'.
    """
    return tokens_of(
        model, hidden_states(model, batch, _predicting_places(batch, _scored(batch, mask))), batch,
        temperature=temperature, with_entropy=with_entropy, mask=mask, chunk_rows=chunk_rows,
    )  # fmt: skip


def tokens_of(
    model: Any,
    hidden: Tensor,
    batch: CompletionBatch,
    *,
    temperature: float,
    with_entropy: bool,
    mask: Literal["loss", "valid"],
    chunk_rows: int | None = None,
) -> TokenScores:
    """`score_tokens` from the model's hidden states (R, L, H), for whoever needs these for something else as well."""
    scored = _scored(batch, mask)
    head = model.get_output_embeddings()
    hidden, weight = lowered(_at(hidden, _predicting_places(batch, scored)), head.weight)
    logprobs, entropies = token_logprobs(
        hidden,
        weight,
        head.bias,
        batch.completion_ids[scored],
        logit_transform(model, temperature),
        with_entropy=with_entropy,
        chunk_rows=chunk_rows,
    )
    return TokenScores(
        logprobs=spread(logprobs, scored), entropies=None if entropies is None else spread(entropies, scored)
    )


def score_values(value_model: Any, batch: CompletionBatch) -> Tensor:
    """(C, T) value before each completion token: the head on the hidden state that predicts it. 0 where no token is."""
    return values_of(scalar_head(value_model), predicting_hidden_states(value_model, batch), batch)


def predicting_hidden_states(model: Any, batch: CompletionBatch) -> Tensor:
    """(R, L, H) for `tokens_of` and `values_of`."""
    return hidden_states(model, batch, _predicting_places(batch, batch.valid_mask))


def values_of(head: Any, hidden: Tensor, batch: CompletionBatch) -> Tensor:
    """`score_values` from hidden states (R, L, H) and a head on them, H to 1."""
    # The head runs everywhere: H multiplications a place cost less than gathering and scattering H numbers a token.
    values = _read_by(head, hidden).flatten()
    return spread(values.index_select(0, _predicting_places(batch, batch.valid_mask)), batch.valid_mask)


def head_scores(reward_model: Any, batch: CompletionBatch) -> Tensor:
    """(C, K) score of each completion by each head: the heads on the hidden state of its last token."""
    return _read_by(score_head(reward_model), last_hidden_states(reward_model, batch))


def score_completions(reward_model: Any, batch: CompletionBatch) -> Tensor:
    """(C,) score of each completion: the mean of its scores by the heads."""
    return head_scores(reward_model, batch).mean(1)


def token_head_scores(reward_model: Any, batch: CompletionBatch) -> Tensor:
    """(C, T, K) score by each head of each completion as far as token t: the heads on that token's hidden state. 0,
    without gradient, where there is no token."""
    places = batch.row_index[:, None] * batch.input_ids.shape[1] + batch.token_index
    hidden = hidden_states(reward_model, batch, places[batch.valid_mask])
    scores = _read_by(score_head(reward_model), hidden).flatten(0, 1)
    return torch.where(batch.valid_mask[:, :, None], scores[places], 0.0)


def last_hidden_states(model: Any, batch: CompletionBatch) -> Tensor:
    """(C, H) hidden state at each completion's last token."""
    places = batch.row_index * batch.input_ids.shape[1] + batch.last_index
    return _at(hidden_states(model, batch, places), places)


def predicting_states(model: Any, batch: CompletionBatch, scored: Tensor) -> Tensor:
    """(N, H) hidden states that predict the True tokens of `scored` (C, T), row by row."""
    places = _predicting_places(batch, scored)
    return _at(hidden_states(model, batch, places), places)


def _scored(batch: CompletionBatch, mask: Literal["loss", "valid"]) -> Tensor:
    return batch.valid_mask if mask == "valid" else batch.completion_mask


def _predicting_places(batch: CompletionBatch, scored: Tensor) -> Tensor:
    """(N,) places, counted through all rows, whose hidden states predict the True tokens of `scored` (C, T)."""
    return (batch.row_index[:, None] * batch.input_ids.shape[1] + batch.predict_index)[scored]


def _at(hidden: Tensor, places: Tensor) -> Tensor:
    """(N, H) hidden states at places (N,) counted through all rows."""
    return hidden.flatten(0, 1).index_select(0, places)


def attention_window(config: Any) -> int | None:
    """Tokens that the narrowest attention layer looks back over, itself included; None = all of them.

    The attention of a model for text and images is described by its text configuration.
    """
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not any(kind in {"sliding_attention", "chunked_attention"} for kind in kinds):
        return None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)


def logit_transform(model: Any, temperature: float) -> LogitTransform:
    """The model's own changes to its logits, from the names transformers' configurations give them."""
    config = model.config.get_text_config()
    return LogitTransform(
        scale=(getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
        temperature=temperature,
    )


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) values at the True places of a (C, T) mask, 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def hidden_states(model: Any, batch: CompletionBatch, read: Tensor) -> Tensor:
    """(R, L, H) what the trunk makes of the places `read` (N,), counted through the batch's rows; elsewhere it may be
    anything."""
    if isinstance(batch.attention_mask, Tensor) and batch.attention_mask.dim() == 2:
        # Under a causal mask no token sees the padding to its right, so padding may pass for real: only then does the
        # fast causal kernel run. The model counts positions by itself.
        inputs = {"attention_mask": torch.ones_like(batch.input_ids)}
    else:
        window = attention_window(model.config)
        if window is not None and batch.longest > window:
            raise ConfigError(
                f"a prompt and completion of {batch.longest} tokens exceed {type(model).__name__}'s attention window "
                f"of {window}: the mask of shared or packed rows would replace the window; use the plain layout"
            )
        inputs = {"position_ids": batch.position_ids, "attention_mask": _as_model_mask(model, batch)}
    if model.base_model is model:
        raise ConfigError(
            f"{type(model).__name__} does not tell its trunk from its head, so token scores cannot be computed; "
            "use another architecture (llama, qwen, mistral, gemma, phi, olmo, gpt2, ...)"
        )
    with reading(batch.input_ids.device), recomputing(model.base_model):
        trunk = trunk_of(model)
        marked = _marked(batch.input_ids, read)
        places = most_read(trunk, marked, inputs["attention_mask"])
        passing(model, batch.input_ids, inputs["attention_mask"], read=None if places is None else marked)
        with only_at(trunk, places):
            return trunk(input_ids=batch.input_ids, use_cache=False, **inputs).last_hidden_state


def _marked(like: Tensor, places: Tensor) -> Tensor:
    """(R, L) bool, True at places (N,) counted through all rows of `like`."""
    return torch.zeros_like(like, dtype=torch.bool).view(-1).index_fill_(0, places, True).view_as(like)


def _as_model_mask(model: Any, batch: CompletionBatch) -> Tensor | BlockMask:
    """The boolean mask for scaled-dot-product attention, or its blocks; the additive one for attention written out in
    Python."""
    kind = model.config._attn_implementation
    if kind not in {"sdpa", "eager"}:
        raise ConfigError(
            f"attention implementation {kind!r} takes no mask of ours; use the plain layout, or sdpa or eager"
        )
    planned = trunk_of(model) is model.base_model  # compiled code takes no plan of ours
    if kind == "sdpa" and planned and not blockwise():
        return splitting(batch)
    mask = written_out(batch)
    if kind == "sdpa":
        return as_blocks(mask) if blockwise() else mask
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(model.dtype).min
    )


def _read_by(head: nn.Linear, hidden: Tensor) -> Tensor:
    """What a scalar head says of hidden states (..., H), in float32 at least."""
    values = head(hidden.to(head.weight.dtype))
    return values.to(torch.promote_types(values.dtype, torch.float32))
