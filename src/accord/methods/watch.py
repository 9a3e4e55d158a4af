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
from accord.rewards.scorers import JudgingModel, values_of

__all__ = ["MAX_ANSWERS", "Watch", "heard", "watch_answers"]

MAX_ANSWERS = 256


@dataclass(frozen=True, slots=True)
class Watch:
    """The answers of the starting policy, summarised.

    word_shares  the share of them that held each word
    cloud        where a reward model's last hidden states lay; None without a reward model
    head         of that model: the one that is trained against, or the hold-out where a function scores
    holdout      a reward model that is only measured with; None without one
    """

    word_shares: Mapping[str, float]
    cloud: Cloud | None = None
    head: nn.Module | None = None
    holdout: JudgingModel | None = None

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


def watch_answers(requests: Sequence[ScoreRequest], judge: JudgingModel | None, holdout: JudgingModel | None) -> Watch:
    """A watch from answers of the starting policy; it is the same at every start of a run, so nothing is saved. `judge`
    is the reward model that is trained against, and nobody else is asked: other judges may be paid by the answer."""
    watch = Watch(word_shares([request.completion for request in requests]), holdout=holdout)
    heard_model = judge or holdout
    if heard_model is None:
        return watch
    head = score_head(heard_model.model)
    with heard(head) as states:
        heard_model.scorer.score(requests)
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
