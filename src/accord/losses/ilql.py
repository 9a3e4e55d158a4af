"""The four terms of implicit language Q-learning, and the update of its lagged targets.

The whole loss is q.loss + value.loss + cql_coef * cql.loss + awac_coef * awac.loss; the caller adds it up. Q is learned
by two heads. Whatever judges an action takes the smaller of their lagged copies, the target heads, so that an error
that flatters an action must be made twice.

Legend: C completions, T tokens; index 0 of a stack of two is the first head. A token that counts is an action.
values[t] is the state's value BEFORE token t, so the value after it is that of the next counted token: whatever stands
in between (turns that somebody else wrote) is part of the state. After the last counted token it is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accord.losses.masked import Count, counted, masked_mean, masked_sum

__all__ = ["ILQLTerm", "awac_loss", "cql_loss", "expectile_loss", "ilql_advantages", "polyak", "q_loss"]


@dataclass(frozen=True, slots=True)
class ILQLTerm:
    """loss () to differentiate; loss_sum () and token_count () of this call, detached: add them up over micro-batches,
    then divide. loss_sum is the sum over counted tokens of what `loss` averages, both heads together."""

    loss: Tensor
    loss_sum: Tensor
    token_count: Tensor


def q_loss(
    q: Tensor, values: Tensor, rewards: Tensor, mask: Tensor, *, gamma: float, num_tokens: Count | None = None
) -> ILQLTerm:
    """Squared error of both heads against the reward plus the discounted value of what follows.

        target[t] = rewards[t] + gamma * values[next counted token after t]        (0 after the last)
        loss = sum over heads, t of mask * (q - target)^2 / num_tokens

    Gradient flows through `q` only: a value that moved to meet Q would not be an expectile any more. The value that
    follows is the state's, not that of the best next token, so no action outside the data is ever asked for its Q.

    Shapes:
        q        (2, C, T) float   Q of the token that was written, requires grad
        values   (C, T) float      V before each token
        rewards  (C, T) float      a completion's return stands at its last counted token
        mask     (C, T) bool       True = counts
    Args:
        gamma: discount per token, in (0, 1].
        num_tokens: counted tokens in the whole optimizer step. None = those in this call.
    Raises: ValueError on shapes that do not fit.
    Source: Snell et al. 2022, arXiv:2206.11871 (the Bellman term). Departures: none.
    Tested by: tests/golden/test_golden_ilql.py, tests/property/test_losses_ilql.py
    """
    values, rewards = counted(values.detach(), mask), counted(rewards.detach(), mask)
    targets = rewards + gamma * _next_values(values, mask)
    both = _both(mask)
    return _term((counted(q, both) - targets).square(), both, num_tokens)


def expectile_loss(
    values: Tensor, target_q: Tensor, mask: Tensor, *, tau: float, num_tokens: Count | None = None
) -> ILQLTerm:
    """Asymmetric squared error: the value approaches the tau-expectile of Q over the actions in the data.

        u = min over heads of target_q - values
        loss = sum(mask * |tau - [u < 0]| * u^2) / num_tokens

    tau = 1/2 is half the squared error, whose optimum is the mean; tau -> 1 approaches the maximum, over actions that
    the data has. Gradient flows through `values` only.

    Shapes:
        values    (C, T) float      V before each token, requires grad
        target_q  (2, C, T) float   the target heads' Q of the token that was written
        mask      (C, T) bool       True = counts
    Args:
        tau: in (0, 1).
        num_tokens: counted tokens in the whole optimizer step. None = those in this call.
    Raises: ValueError on shapes that do not fit.
    Source: Kostrikov et al. 2021, arXiv:2110.06169, eq. 5; Snell et al. 2022, arXiv:2206.11871. Departures: none.
    Tested by: tests/golden/test_golden_ilql.py, tests/property/test_losses_ilql.py
    """
    u = counted(_smaller(target_q), mask) - counted(values, mask)
    return _term((tau - (u < 0).to(u.dtype)).abs() * u.square(), mask, num_tokens)


def cql_loss(q_logprobs: Tensor, mask: Tensor, *, num_tokens: Count | None = None) -> ILQLTerm:
    """Cross-entropy with Q as logits: Q of tokens that the data does not have stays below Q of the one it has.

        loss = sum over heads, t of mask * (log sum_v exp Q(v) - Q(token)) / num_tokens = -sum(mask * q_logprobs) / ...

    A Q that says the same of all V tokens costs ln V per head. The constant that all Q of a state share is free here.

    Shapes:
        q_logprobs  (2, C, T) float, nats   log softmax(Q) of the token that was written, requires grad
        mask        (C, T) bool             True = counts
    Args:
        num_tokens: counted tokens in the whole optimizer step. None = those in this call.
    Raises: ValueError on shapes that do not fit.
    Source: Kumar et al. 2020, arXiv:2006.04779; Snell et al. 2022, arXiv:2206.11871. Departures: none.
    Tested by: tests/golden/test_golden_ilql.py, tests/property/test_losses_ilql.py
    """
    return _term(-q_logprobs, _both(mask), num_tokens)


def awac_loss(
    policy_logprobs: Tensor,
    target_q: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    beta: float,
    num_tokens: Count | None = None,
) -> ILQLTerm:
    """Imitation of the data, each token weighed by how much better it was than the state promised.

        loss = -sum(mask * exp(beta * advantage) * policy_logprobs) / num_tokens,   see `ilql_advantages`

    beta = 0 is plain imitation. Gradient flows through `policy_logprobs` only. The weights are not bounded: one that
    overflows makes the loss infinite.

    Shapes:
        policy_logprobs  (C, T) float, nats   requires grad
        target_q         (2, C, T) float      the target heads' Q of the token that was written
        values           (C, T) float         V before each token
        mask             (C, T) bool          True = counts
    Args:
        beta: at least 0, per unit of return.
        num_tokens: counted tokens in the whole optimizer step. None = those in this call.
    Raises: ValueError on shapes that do not fit.
    Source: Nair et al. 2020, arXiv:2006.09359; Snell et al. 2022, arXiv:2206.11871. Departures: none.
    Tested by: tests/golden/test_golden_ilql.py, tests/property/test_losses_ilql.py
    """
    weights = (beta * ilql_advantages(target_q, values, mask)).exp()
    return _term(-weights * counted(policy_logprobs, mask), mask, num_tokens)


@torch.no_grad()
def ilql_advantages(target_q: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """How much better each token was than its state promised: the smaller of the two target Q minus V.

    Shapes: target_q (2, C, T) float; values (C, T) float; mask (C, T) bool, True = counts -> (C, T) float in float32 at
        least, detached, 0 where the mask is False.
    Raises: ValueError on shapes that do not fit.
    Tested by: tests/golden/test_golden_ilql.py, tests/property/test_losses_ilql.py
    """
    return counted(_smaller(target_q), mask) - counted(values, mask)


@torch.no_grad()
def polyak(targets: Tensor, values: Tensor, *, rate: float) -> Tensor:
    """What the lagged targets become: (1 - rate) * targets + rate * values, in the inputs' shape.

    rate = 1 gives the values themselves. In 16 bits a small rate moves nothing: keep both in float32.

    Tested by: tests/golden/test_golden_ilql.py
    """
    return torch.lerp(targets, values, rate)


def _next_values(values: Tensor, mask: Tensor) -> Tensor:
    """(C, T) the value at the next counted token after each place, 0 where none follows."""
    following = torch.zeros_like(values)
    next_value = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        following[:, t] = next_value
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    return following


def _smaller(target_q: Tensor) -> Tensor:
    """(C, T) minimum over the heads, detached."""
    return target_q.detach().amin(dim=0)


def _both(mask: Tensor) -> Tensor:
    """(2, C, T): the mask of both heads."""
    return mask.expand(2, *mask.shape)


def _term(losses: Tensor, mask: Tensor, num_tokens: Count | None) -> ILQLTerm:
    """The record of these losses: (C, T), or (2, C, T) of both heads, whose sum counts each token once."""
    tokens = (mask[0] if mask.dim() == 3 else mask).sum()
    return ILQLTerm(
        loss=masked_mean(losses, mask, tokens if num_tokens is None else num_tokens),
        loss_sum=masked_sum(losses.detach(), mask),
        token_count=tokens,
    )
