"""What is known of the answers before training, to see what training does to them: for the guards, never trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from accord.measures.outliers import Cloud, outlier_fraction
from accord.measures.text import word_shares
from accord.models.heads import score_head
from accord.records import ScoreRequest
from accord.rewards.scorers import Scorer, values_of

__all__ = ["MAX_ANSWERS", "Holdout", "Watch", "heard", "watch_answers"]

MAX_ANSWERS = 256


@dataclass(frozen=True, slots=True)
class Holdout:
    """A reward model that is only measured with."""

    scorer: Scorer
    model: Any


@dataclass(frozen=True, slots=True)
class Watch:
    """The answers of the starting policy, summarised.

    word_shares  the share of them that held each word
    cloud        where a reward model's last hidden states lay; None without a reward model
    head         of that model: the one that is trained against, or the hold-out where a function scores
    holdout      None without one
    """

    word_shares: Mapping[str, float]
    cloud: Cloud | None = None
    head: nn.Module | None = None
    holdout: Holdout | None = None

    def metrics(self, requests: Sequence[ScoreRequest], states: Sequence[Tensor]) -> dict[str, float]:
        """What a rollout's answers, and the `states` heard while they were scored, are by comparison."""
        now = word_shares([request.completion for request in requests])
        rises = [share - self.word_shares.get(word, 0.0) for word, share in now.items()]
        metrics = {"rollout/word_rise": max([0.0, *rises])}
        if self.holdout is not None:
            with heard(None if states else self.head) as held_out_states:
                metrics["rollout/holdout_score/mean"] = float(np.mean(values_of(self.holdout.scorer, requests)))
            states = states or held_out_states
        if self.cloud is not None and states:
            metrics["rollout/outlier_fraction"] = outlier_fraction(self.cloud, _points(states))
        return metrics


def watch_answers(
    requests: Sequence[ScoreRequest], scorer: Scorer, reward_model: Any | None, holdout: Holdout | None
) -> Watch:
    """A watch from answers of the starting policy; it is the same at every start of a run, so nothing is saved."""
    watch = Watch(word_shares([request.completion for request in requests]), holdout=holdout)
    if reward_model is None and holdout is not None:
        scorer, reward_model = holdout.scorer, holdout.model
    if reward_model is None:
        return watch
    head = score_head(reward_model)
    with heard(head) as states:
        scorer.score(requests)
    return replace(watch, cloud=Cloud.of(_points(states)), head=head)


@contextmanager
def heard(head: nn.Module | None) -> Iterator[list[Tensor]]:
    """The hidden states that go into `head` meanwhile, (n, H) a pass; nothing for None.

    They are read on their way to the score, so they cost no pass of their own.
    """
    states: list[Tensor] = []
    if head is None:
        yield states
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].detach()))
    try:
        yield states
    finally:
        hook.remove()


def _points(states: Sequence[Tensor]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return torch.cat([part.double() for part in states]).cpu().numpy()
