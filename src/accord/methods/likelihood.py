"""How likely held-out answers became. A margin can grow while both answers get less likely: the account says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accord.measures.statistics import cluster_interval
from accord.methods.context import headline
from accord.records import Interval

__all__ = ["LikelihoodChange"]

MUCH_LESS_LIKELY = 0.1  # nats a token: each token has become 10% less likely


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
