"""Log-probabilities of given tokens from hidden states, without ever holding all logits.

The vocabulary projection is the largest matrix of a small model: (tokens, vocabulary) logits cost more memory than the
trunk's activations. Here rows are projected a chunk at a time, forward and backward. The log-probabilities of the first
chunks, up to a fixed number, wait for the backward pass; it projects the others again. So memory has a bound that
neither length nor vocabulary moves, and where everything fits nothing is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from accord.phases import projecting

__all__ = ["LogitTransform", "logits_of", "token_logprobs"]

# Logits of one chunk: about 16 MB in fp32, few enough to stay near the processor, many enough for a fast product.
_CHUNK_ELEMENTS = 2**22
_MIN_CHUNK_ROWS = 256
# Log-probabilities that wait for the backward pass: 256 MB in fp32.
_KEPT_ELEMENTS = 2**26


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to `hidden @ weight.T + bias` before softmax: first times `scale`, then soft-capped.

        logits = softcap * tanh(scale * x / softcap)        (softcap None: logits = scale * x)

    `temperature` then divides the logits; it is the sampler's, not the model's.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; expected a number above 0")


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    transform: LogitTransform,
    *,
    with_entropy: bool,
    chunk_rows: int | None = None,
    kept_elements: int = _KEPT_ELEMENTS,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits)[target] and the entropy of softmax(logits), row by row, in nats.

        logprob = z[target] - log sum_v exp z[v]
        entropy = -sum_v p[v] log p[v],   p = softmax(z),   z = transform(hidden @ weight.T + bias)

    Gradients flow to hidden, weight and bias through both; not twice differentiable.

    Shapes: N tokens, H hidden size, V vocabulary.
        hidden      (N, H) float
        weight      (V, H) float   the output embedding, also when it is tied to the input embedding
        bias        (V,) float or None
        target_ids  (N,) int64
    Args:
        chunk_rows: rows projected at once; None = as many as fit 16 MB of fp32 logits, at least 256.
        kept_elements: numbers that may wait for the backward pass instead of being computed again; 0 = none. It moves
            memory and speed, and gradients by rounding alone.
    Returns: logprobs (N,), entropies (N,) or None; float32, or float64 for float64 hidden states.
    """
    rows = chunk_rows or max(_MIN_CHUNK_ROWS, _CHUNK_ELEMENTS // weight.shape[0])
    # The derivative of a soft cap needs more than the log-probabilities: those chunks are all projected again.
    keeps = torch.is_grad_enabled() and transform.softcap is None
    kept_rows = kept_elements // weight.shape[0] if keeps else 0
    again = 0 if kept_rows >= len(hidden) else len(hidden) - kept_rows // rows * rows
    projecting(hidden, weight, again)
    logprobs, entropies = _TokenLogprobs.apply(
        hidden, weight, bias, target_ids, transform, with_entropy, rows, kept_rows
    )
    return logprobs, entropies if with_entropy else None


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """(logits over temperature, tanh value of the soft cap or an empty tensor) of one chunk, in at least float32."""
    x = torch.mm(hidden, weight.t())
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        x += bias
    if transform.softcap is None:
        if transform.scale != transform.temperature:  # a pass over all logits
            x.mul_(transform.scale / transform.temperature)
        return x, x.new_empty(0)
    tanh = x.mul_(transform.scale / transform.softcap).tanh_()
    return tanh * (transform.softcap / transform.temperature), tanh


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        transform: LogitTransform,
        with_entropy: bool,
        rows: int,
        kept_rows: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, normalisers, entropies = (hidden.new_zeros(hidden.shape[0], dtype=dtype) for _ in range(3))
        kept: list[Tensor] = []
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            z, _ = logits_of(hidden[part], weight, bias, transform)
            target = target_ids[part, None]
            logp = torch.log_softmax(z, dim=1)
            logprobs[part] = logp.gather(1, target)[:, 0]
            normalisers[part] = z.gather(1, target)[:, 0] - logprobs[part]
            if with_entropy:
                entropies[part] = -(logp.exp() * logp).sum(dim=1)
            if start + len(logp) <= kept_rows:
                kept.append(logp)
        ctx.save_for_backward(hidden, weight, bias, target_ids, normalisers, entropies, *kept)
        ctx.transform, ctx.rows, ctx.with_entropy = transform, rows, with_entropy
        if not with_entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target_ids, normalisers, entropies, *kept = ctx.saved_tensors
        transform: LogitTransform = ctx.transform
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # Summed in float32 also for 16-bit weights: thousands of chunks would otherwise round away small terms.
        grad_weight = torch.zeros_like(weight, dtype=normalisers.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=normalisers.dtype) if needs_bias else None
        for chunk, start in enumerate(range(0, hidden.shape[0], ctx.rows)):
            part = slice(start, start + ctx.rows)
            if chunk < len(kept):
                logp, tanh = kept[chunk], None
            else:
                z, tanh = logits_of(hidden[part], weight, bias, transform)
                logp = z.sub_(normalisers[part, None])
            grad = _logit_gradient(
                logp,
                target_ids[part],
                grad_logprobs[part],
                (entropies[part], grad_entropies[part]) if ctx.with_entropy else None,
            )
            if transform.softcap is not None:
                assert tanh is not None
                grad.mul_(tanh.square_().neg_().add_(1))
            if transform.scale != transform.temperature:
                grad.mul_(transform.scale / transform.temperature)
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), hidden[part].to(grad.dtype))
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            if grad_hidden is not None:
                torch.mm(grad.to(weight.dtype), weight, out=grad_hidden[part])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 5,
        )


def _logit_gradient(
    logp: Tensor,
    target_ids: Tensor,
    grad_logprobs: Tensor,
    entropy: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """d loss / d z of one chunk, z the logits; `logp` is left as it is, for it may be asked for again.

        d logprob / d z[v] = (v == target) - p[v]          d entropy / d z[v] = -p[v] (log p[v] + entropy)

    `entropy` holds the rows' entropies and the loss's gradient with respect to them.
    """
    grad = logp.exp()
    if entropy is None:
        grad.mul_(-grad_logprobs[:, None])
    else:
        values, grad_entropies = entropy
        grad.mul_((logp + values[:, None]).mul_(-grad_entropies[:, None]).sub_(grad_logprobs[:, None]))
    return grad.scatter_add_(1, target_ids[:, None], grad_logprobs[:, None])
