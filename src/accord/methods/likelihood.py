"""How likely fixed answers are: to the policy, to its reference, and what training changed about it.

A margin can grow while both answers get less likely; the account of a stage says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from accord.measures.statistics import cluster_interval
from accord.methods.context import Context, LoadedPolicy, headline
from accord.methods.offline import PolicyLogprobs, sequence_logprobs
from accord.methods.reference import cache_folder, reference_logprobs
from accord.models.layout import Layout
from accord.records import Interval, TokenGroup
from accord.training.runfolder import RunFolder

__all__ = ["LikelihoodChange", "policy_logprobs", "start_logprobs"]

MUCH_LESS_LIKELY = 0.1  # nats a token: each token has become 10% less likely


def policy_logprobs(policy: LoadedPolicy, layout: Layout, budget: int) -> PolicyLogprobs:
    """What the policy says, whenever it is asked."""

    def logprobs(groups: Sequence[TokenGroup]) -> Tensor:
        return sequence_logprobs(policy.model, groups, layout=layout, pad_id=policy.pad_id, budget=budget)

    return logprobs


def start_logprobs(
    context: Context,
    run: RunFolder,
    policy: LoadedPolicy,
    weights: Mapping[str, str],
    groups: Sequence[TokenGroup],
    *,
    layout: Layout,
    budget: int,
) -> Tensor:
    """(C,) what the reference says of every completion: the policy as it was loaded, so call this before training.

    The numbers are kept in the run's folder, and shared with other runs. `weights`: what `weights_hash` says of the
    folder the policy was loaded from.
    """
    return reference_logprobs(
        policy.model,
        groups,
        weights="".join(weights.values()),
        layout=layout,
        budget=budget,
        pad_id=policy.pad_id,
        kept=run.path / "reference",
        cache=cache_folder(),
        console=context.console,
        say=context.say,
    )


@dataclass(frozen=True, slots=True)
class LikelihoodChange:
    """Log-probability after training less before, nats: a mean over completions, and per counted token."""

    name: str
    interval: Interval
    per_token: float

    @classmethod
    def of(cls, name: str, changes: Sequence[float], prompts: Sequence[int], tokens: int) -> LikelihoodChange:
        """`changes` of completions that have `tokens` counted tokens in all; `prompts` says which prompt each is of."""
        return cls(name, cluster_interval(changes, prompts), sum(changes) / max(1, tokens))

    @property
    def fell_far(self) -> bool:
        """By more than chance explains, and by enough to matter."""
        return self.interval.high < 0 and self.per_token < -MUCH_LESS_LIKELY

    def row(self) -> dict[str, Any]:
        return headline(
            f"change of the {self.name} answers' log-probability",
            self.interval,
            unit="nats per completion",
            meaning=f"Held-out {self.name} answers: log-probability after training less before.",
        )

    def account(self) -> str:
        return f"The {self.name} answers' log-probability changed by {self.interval.value:+.2f} nats on average."

    def warning(self, remedy: str) -> str:
        return f"The {self.name} answers became less likely, by {-self.per_token:.2f} nats a token: {remedy}."
