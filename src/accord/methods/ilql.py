"""Implicit language Q-learning: from answers with returns, a policy, and heads that say which token leads to more.

    loss = Q error + expectile value loss + cql_coef * CQL + awac_coef * weighted imitation
    at sampling: log policy(token) + beta * (Q(token) - V)

Every token the assistant wrote is an action. An answer's return is the reward of its last token; rewards of single
tokens may be given instead. See `accord.losses.ilql` for the terms and `accord.models.ilql` for the heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from accord.config import ILQLConfig
from accord.errors import DataError
from accord.losses.ilql import awac_loss, cql_loss, expectile_loss, ilql_advantages, q_loss
from accord.methods.offline import PolicyLogprobs, Sums
from accord.models.ilql import ILQLModel, ILQLScores
from accord.models.layout import CompletionBatch
from accord.records import Completion, Group, TokenCompletion, TokenGroup

__all__ = ["ILQLObjective", "RatedAnswers", "ReturnScale", "TargetSync", "rated_answers"]


@dataclass(frozen=True, slots=True)
class RatedAnswers:
    """Answers to one prompt, as tokens, with a reward for each token; tokens that do not count have 0."""

    tokens: TokenGroup
    rewards: tuple[tuple[float, ...], ...]

    @property
    def returns(self) -> tuple[float, ...]:
        """Of each answer, the sum of its rewards."""
        return tuple(math.fsum(rewards) for rewards in self.rewards)


def rated_answers(group: Group, tokens: TokenGroup) -> RatedAnswers | None:
    """The judged answers of a group with their rewards as the data has them; None when it has no judged answer.

    Raises: DataError where there are rewards of single tokens, but not one for each that counts.
    """
    kept = [(t, _rewards(c, t, group)) for c, t in zip(group.completions, tokens.completions, strict=True)]
    judged = [(t, rewards) for t, rewards in kept if rewards is not None]
    if not judged:
        return None
    return RatedAnswers(replace(tokens, completions=tuple(t for t, _ in judged)), tuple(r for _, r in judged))


def _rewards(completion: Completion, tokens: TokenCompletion, group: Group) -> tuple[float, ...] | None:
    """One reward a token, from rewards of tokens, else the score, else the mark (good +1, bad -1). None where nothing
    was judged, or no token counts."""
    places = [t for t, counts in enumerate(tokens.mask) if counts]
    given = completion.rewards
    if not places:
        return None
    if given is not None and len(given) != len(places):
        where = group.origin or f"the answer {completion.text[:60]!r}"
        raise DataError(
            f"{where} has {len(given)} rewards for {len(places)} tokens: give one reward, or one for each token of the "
            "answer in the model's tokenizer, its end token included"
        )
    if given is None:
        if completion.score is None and completion.label is None:
            return None
        last = completion.score if completion.score is not None else (1.0 if completion.label else -1.0)
        given = (*(0.0 for _ in places[1:]), last)
    by_place = dict(zip(places, given, strict=True))
    return tuple(by_place.get(t, 0.0) for t in range(len(tokens.ids)))


@dataclass(frozen=True, slots=True)
class ReturnScale:
    """Shifts and scales returns: (return - mean) / std. The shift lands on the last token that counts, where a return
    stands."""

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, returns: Sequence[float]) -> ReturnScale:
        """What makes these returns mean 0 and variance 1. Raises DataError when they are all equal."""
        mean = math.fsum(returns) / len(returns)
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in returns) / len(returns))
        if std == 0:
            raise DataError(
                f"all {len(returns)} answers have the return {mean:g}, so none is better than another: ILQL would only "
                "imitate. Give returns that differ, or use `accord sft`"
            )
        return cls(mean, std)

    def apply(self, answers: RatedAnswers) -> RatedAnswers:
        scaled = []
        for completion, rewards in zip(answers.tokens.completions, answers.rewards, strict=True):
            last = max(t for t, counts in enumerate(completion.mask) if counts)
            scaled.append(tuple((r - self.mean * (t == last)) / self.std for t, r in enumerate(rewards)))
        return RatedAnswers(answers.tokens, tuple(scaled))


class ILQLObjective:
    """All four terms, each a mean over the counted tokens of the whole step."""

    def __init__(self, section: ILQLConfig) -> None:
        self._section = section

    def tokens(self, item: RatedAnswers) -> TokenGroup:
        return item.tokens

    def begin(self, items: Sequence[RatedAnswers], logprobs: PolicyLogprobs) -> float:
        return sum(sum(c.mask) for item in items for c in item.tokens.completions)

    def loss(
        self, model: Any, items: Sequence[RatedAnswers], batch: CompletionBatch, step: float
    ) -> tuple[Tensor, Sums]:
        return self.loss_of(model(batch), items, batch, step)

    def loss_of(
        self, scores: ILQLScores, items: Sequence[RatedAnswers], batch: CompletionBatch, num_tokens: float
    ) -> tuple[Tensor, Sums]:
        """The loss and its sums from what the model says of the batch."""
        s, mask = self._section, batch.completion_mask
        rewards = _padded([rewards for item in items for rewards in item.rewards], mask)
        terms = {
            "q": (q_loss(scores.q, scores.values, rewards, mask, gamma=s.gamma, num_tokens=num_tokens), 1.0),
            "expectile": (expectile_loss(scores.values, scores.target_q, mask, tau=s.tau, num_tokens=num_tokens), 1.0),
            "cql": (cql_loss(scores.q_logprobs, mask, num_tokens=num_tokens), s.cql_coef),
            "awac": (
                awac_loss(
                    scores.logprobs, scores.target_q, scores.values, mask, beta=s.awac_beta, num_tokens=num_tokens
                ),
                s.awac_coef,
            ),
        }
        loss = torch.stack([weight * term.loss for term, weight in terms.values()]).sum()
        advantages = ilql_advantages(scores.target_q, scores.values.detach(), mask)
        sums = {name: float(term.loss_sum) for name, (term, _) in terms.items()} | {
            "total": sum(weight * float(term.loss_sum) for term, weight in terms.values()),
            "value": float(scores.values.detach().sum()),
            "advantage": float(advantages.sum()),
            "advantage_squared": float(advantages.square().sum()),
            "tokens": float(mask.sum()),
        }
        return loss, sums

    def metrics(self, sums: Sums) -> dict[str, float]:
        means = {name: value / max(1.0, sums["tokens"]) for name, value in sums.items()}
        return {
            "train/loss": means["total"],
            "train/q_loss": means["q"],
            "train/expectile_loss": means["expectile"],
            "train/cql_loss": means["cql"],
            "train/awac_loss": means["awac"],
            "train/value_mean": means["value"],
            "train/advantage_mean": means["advantage"],
            "train/advantage_std": math.sqrt(max(0.0, means["advantage_squared"] - means["advantage"] ** 2)),
        }


def _padded(rewards: Sequence[Sequence[float]], mask: Tensor) -> Tensor:
    """(C, T) of the completions' rewards, 0 after their end."""
    width = mask.shape[1]
    rows = [[*row, *[0.0] * (width - len(row))] for row in rewards]
    return torch.tensor(rows, dtype=torch.float32, device=mask.device)


class TargetSync:
    """Moves the lagged targets every `every` updates. The step number decides, so nothing has to be remembered: the
    targets themselves are part of the model's state."""

    def __init__(self, model: ILQLModel, *, rate: float, every: int) -> None:
        self._model, self._rate, self._every = model, rate, every

    def after_update(self, step: int) -> None:
        if step % self._every == 0:
            self._model.sync_targets(self._rate)

    def values(self) -> dict[str, Any]:
        return {}

    def restore(self, values: dict[str, Any]) -> None:
        pass
