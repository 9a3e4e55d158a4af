"""Learning from answers that were judged one by one: what makes a step of KTO, and of BCO.

    loss = sum over the step's answers of the answer's loss / number of answers

Both compare an answer's implicit reward with a point that belongs to the whole step and carries no gradient, so it is
known before the first micro-batch. KTO's is the mean log-ratio of mismatched pairs: every prompt of the data has the
answer to another prompt beside its own, the same one in every epoch, so that their reference log-probabilities are
computed once, with the others. BCO's is the mean of all rewards seen so far, this step's included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from accord.config import KTOConfig
from accord.errors import DataError
from accord.losses.kto import UnpairedLoss, bco_loss, kto_loss, kto_reference_point
from accord.methods.offline import PolicyLogprobs, Sums
from accord.models.layout import CompletionBatch
from accord.models.token_scores import score_tokens
from accord.randomness import permutation
from accord.records import TokenCompletion, TokenGroup

__all__ = [
    "BCOPoint",
    "JudgedAnswer",
    "JudgedObjective",
    "JudgedStep",
    "KTOPoint",
    "RewardShift",
    "bco_objective",
    "derangement",
    "kto_objective",
    "with_mismatched",
    "with_reference",
]


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """One answer to one prompt, as tokens, and what people thought of it.

    mismatched               the same prompt with the answer to another one; None where the loss needs none
    ref_logprob, mismatched_ref_logprob   the reference's log-probability of the answers, nats, summed over the tokens
    """

    tokens: TokenGroup
    desirable: bool
    mismatched: TokenGroup | None = None
    ref_logprob: float = 0.0
    mismatched_ref_logprob: float = 0.0

    @property
    def groups(self) -> tuple[TokenGroup, ...]:
        """All that the reference must be asked about."""
        return (self.tokens,) if self.mismatched is None else (self.tokens, self.mismatched)


def derangement(prompt_ids: Sequence[int], *key: int | str) -> list[int]:
    """For each of N answers the index of an answer to another prompt, every answer taken once; determined by `key`.

    Answers in a random order, those of one prompt side by side, take the one that stands m places further, where m is
    the most answers that one prompt has: so nobody meets an own one, nor, at the end, comes round to one.

    prompt_ids: (N,) which prompt each answer belongs to.
    Raises: DataError when one prompt has more than half of all answers: then there is no such assignment.
    """
    n, most = len(prompt_ids), max(Counter(prompt_ids).values())
    if 2 * most > n:
        raise DataError(
            f"{most} of {n} answers belong to one prompt, so they cannot all be set against answers to other prompts, "
            "which is how KTO finds its reference point: use `kto.loss` = bco, or data with more prompts"
        )
    order = permutation(n, "mismatch", *key)
    rank = {prompt: place for place, prompt in reversed(list(enumerate(prompt_ids[i] for i in order)))}
    order.sort(key=lambda i: rank[prompt_ids[i]])
    others = [0] * n
    for place, index in enumerate(order):
        others[index] = order[(place + most) % n]
    return others


def with_mismatched(
    items: Sequence[JudgedAnswer], completions: Sequence[TokenCompletion], max_tokens: int
) -> tuple[list[JudgedAnswer], int]:
    """Items with the answer to another prompt, cut where it would exceed `max_tokens`; and how many were cut."""
    made: list[JudgedAnswer] = []
    cut = 0
    for item, other in zip(items, completions, strict=True):
        room = max_tokens - len(item.tokens.prompt_ids)
        cut += len(other.ids) > room
        shorter = TokenCompletion(other.ids[:room], other.mask[:room])
        made.append(replace(item, mismatched=replace(item.tokens, completions=(shorter,))))
    return made, cut


def with_reference(items: Sequence[JudgedAnswer], logprobs: Sequence[float]) -> list[JudgedAnswer]:
    """Items with the reference's log-probabilities of all their groups, in order."""
    values = iter(logprobs)
    made: list[JudgedAnswer] = []
    for item in items:
        own = next(values)
        other = 0.0 if item.mismatched is None else next(values)
        made.append(replace(item, ref_logprob=own, mismatched_ref_logprob=other))
    return made


@dataclass(frozen=True, slots=True)
class JudgedStep:
    """What the answers of a step share: the point their rewards are compared with, (), and how many they are."""

    point: Tensor
    count: int


class RewardShift:
    """BCO's memory: the mean of all implicit rewards seen so far, every answer weighing the same."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    @property
    def mean(self) -> float:
        return self._sum / max(1, self._count)

    def include(self, rewards: Tensor) -> None:
        self._sum += float(rewards.double().sum())
        self._count += len(rewards)

    def after_update(self, step: int) -> None:
        """Nothing: a step's rewards are included before it uses the mean."""

    def values(self) -> dict[str, Any]:
        return {"sum": self._sum, "count": self._count}

    def restore(self, values: dict[str, Any]) -> None:
        self._sum, self._count = values["sum"], values["count"]


class KTOPoint:
    """Finds KTO's reference point, over all answers of a step or of the held-out part at once."""

    metric = "kto_reference_point"

    def __call__(self, items: Sequence[JudgedAnswer], logprobs: PolicyLogprobs, *, training: bool) -> Tensor:
        groups = [item.mismatched for item in items if item.mismatched is not None]
        policy = logprobs(groups)
        return kto_reference_point(policy, policy.new_tensor([item.mismatched_ref_logprob for item in items]))


class BCOPoint:
    """Keeps BCO's shift: in training a step's rewards are included before they are compared with it."""

    metric = "bco_reward_shift"

    def __init__(self, beta: float, shift: RewardShift) -> None:
        self._beta, self._shift = beta, shift

    def __call__(self, items: Sequence[JudgedAnswer], logprobs: PolicyLogprobs, *, training: bool) -> Tensor:
        if training:
            policy = logprobs([item.tokens for item in items])
            self._shift.include(self._beta * (policy - policy.new_tensor([item.ref_logprob for item in items])))
        return torch.tensor(self._shift.mean, dtype=torch.float64)


LossOfAnswers = Callable[[Tensor, Tensor, Tensor, Tensor, int | None], UnpairedLoss]
"""(policy_logprobs (C,), ref_logprobs (C,), desirable (C,), point (), num_completions) -> the loss and its record."""


class JudgedObjective:
    """A loss of single answers with the point it needs."""

    def __init__(self, loss_of_answers: LossOfAnswers, point: KTOPoint | BCOPoint) -> None:
        self._loss_of_answers, self._point = loss_of_answers, point

    def tokens(self, item: JudgedAnswer) -> TokenGroup:
        return item.tokens

    def begin(self, items: Sequence[JudgedAnswer], logprobs: PolicyLogprobs) -> JudgedStep:
        return JudgedStep(self._point(items, logprobs, training=True), len(items))

    def held_out(self, items: Sequence[JudgedAnswer], logprobs: PolicyLogprobs) -> JudgedStep:
        """What `begin` finds, of answers that are only measured."""
        return JudgedStep(self._point(items, logprobs, training=False), len(items))

    def loss(
        self, model: Any, items: Sequence[JudgedAnswer], batch: CompletionBatch, step: JudgedStep
    ) -> tuple[Tensor, Sums]:
        return self.loss_of(items, score_tokens(model, batch, mask="loss").logprobs.sum(1), step)

    def loss_of(self, items: Sequence[JudgedAnswer], logprobs: Tensor, step: JudgedStep) -> tuple[Tensor, Sums]:
        """The loss of these answers, given the policy's log-probability of each, (C,), summed over its tokens."""
        desirable = torch.tensor([item.desirable for item in items], device=logprobs.device)
        reference = logprobs.new_tensor([item.ref_logprob for item in items])
        result = self._loss_of_answers(logprobs, reference, desirable, step.point.to(logprobs.device), step.count)
        detached = logprobs.detach()
        return result.loss, {
            "loss": float(result.loss_sum),
            "correct": float(result.correct_sum),
            "point": float(step.point) * len(items),
            "answers": float(len(items)),
            "desirable": float(result.desirable_count),
            "desirable_reward": float(result.desirable_reward_sum),
            "desirable_logprob": float(detached[desirable].sum()),
            "undesirable": float(result.undesirable_count),
            "undesirable_reward": float(result.undesirable_reward_sum),
            "undesirable_logprob": float(detached[~desirable].sum()),
        }

    def correct(self, items: Sequence[JudgedAnswer], logprobs: Tensor, step: JudgedStep) -> list[float]:
        """1 for every answer that its reward puts on its mark's side of the point, 0.5 on the point, else 0."""
        return [self.loss_of([item], logprobs[i : i + 1], step)[1]["correct"] for i, item in enumerate(items)]

    def metrics(self, sums: Sums) -> dict[str, float]:
        """A kind that the step lacks has no mean: NaN, which is not logged."""

        def mean(name: str, count: str) -> float:
            return sums[name] / sums[count] if sums[count] else float("nan")

        return {
            "train/loss": mean("loss", "answers"),
            "train/accuracy": mean("correct", "answers"),
            f"train/{self._point.metric}": mean("point", "answers"),
            "train/desirable_reward/mean": mean("desirable_reward", "desirable"),
            "train/undesirable_reward/mean": mean("undesirable_reward", "undesirable"),
            "train/desirable_logprob/mean": mean("desirable_logprob", "desirable"),
            "train/undesirable_logprob/mean": mean("undesirable_logprob", "undesirable"),
        }


def kto_objective(section: KTOConfig, weights: tuple[float, float]) -> JudgedObjective:
    """KTO, with the weights of (desirable, undesirable) answers."""

    def loss_of_answers(
        policy: Tensor, reference: Tensor, desirable: Tensor, point: Tensor, count: int | None
    ) -> UnpairedLoss:
        return kto_loss(
            policy, reference, desirable, point, beta=section.beta,
            desirable_weight=weights[0], undesirable_weight=weights[1], num_completions=count,
        )  # fmt: skip

    return JudgedObjective(loss_of_answers, KTOPoint())


def bco_objective(section: KTOConfig, shift: RewardShift) -> JudgedObjective:
    """BCO; `shift` is the run's memory."""

    def loss_of_answers(
        policy: Tensor, reference: Tensor, desirable: Tensor, point: Tensor, count: int | None
    ) -> UnpairedLoss:
        return bco_loss(policy, reference, desirable, point, beta=section.beta, num_completions=count)

    return JudgedObjective(loss_of_answers, BCOPoint(section.beta, shift))
