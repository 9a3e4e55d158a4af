"""The records that cross boundaries in Accord: frozen, documented, free of torch.

One idea carries all methods: a `Group` is one prompt with zero or more completions. Text records (`Message`,
`Completion`, `Group`) come from files; token records (`TokenCompletion`, `TokenGroup`) go to models;
`SampledCompletion` comes from samplers; `Turn` comes from environments; `Score` comes from scorers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "LARGEST_SCORE",
    "ROLES",
    "Completion",
    "Group",
    "GroupKind",
    "Interval",
    "Message",
    "Origin",
    "SampledCompletion",
    "Score",
    "ScoreRequest",
    "TokenCompletion",
    "TokenGroup",
    "Turn",
    "content_id",
]

ROLES = ("system", "user", "assistant", "tool")

GroupKind = Literal["prompts", "sft", "pairs", "ranked", "rated"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `learn=False` keeps an assistant turn out of the loss (a per-message loss weight of 0)."""

    role: str  # one of ROLES
    content: str
    learn: bool = True


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a record came from; prints as `file:line`. Lines count from 1; for JSON arrays the line of the row's
    start."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Completion:
    """What followed the prompt: usually one assistant message, several turns for a dialogue.

    rank     0 = best; equal ranks are ties; None = not ranked
    score    a scalar from people or a model; None = not scored
    label    desirable (True) or not (False); None = unlabelled
    rewards  one for each token the assistant wrote, end token included, adding up to the score; None = not given
    """

    messages: tuple[Message, ...]
    rank: int | None = None
    score: float | None = None
    label: bool | None = None
    rewards: tuple[float, ...] | None = None

    @property
    def text(self) -> str:
        """The last assistant turn, which is the answer being judged."""
        return self.messages[-1].content


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and its completions: the unit every method trains on.

    margin      for pairs: how much better rank 0 is, in score units; None = unknown
    soft_label  for pairs: P(rank 0 is preferred) in [0, 1]; None = certain
    reference   a human reference answer, when the file has one apart from the completions
    """

    prompt: tuple[Message, ...]
    completions: tuple[Completion, ...] = ()
    margin: float | None = None
    soft_label: float | None = None
    reference: str | None = None
    origin: Origin | None = field(default=None, compare=False)

    def at(self, origin: Origin | None) -> Group:
        """The same group, with this origin."""
        return Group(self.prompt, self.completions, self.margin, self.soft_label, self.reference, origin)

    @property
    def kind(self) -> GroupKind:
        """What this group can teach: the richest reading of what its completions carry."""
        if not self.completions:
            return "prompts"
        if len(self.completions) >= 2 and all(c.rank is not None for c in self.completions):
            return "pairs" if len(self.completions) == 2 else "ranked"
        if any(c.score is not None or c.label is not None for c in self.completions):
            return "rated"
        return "sft"

    @property
    def prompt_id(self) -> int:
        """A 63-bit id of the prompt's content, stable across files and runs: the key of its randomness and its
        cluster."""
        return content_id([[m.role, m.content] for m in self.prompt])


def content_id(value: object) -> int:
    """63-bit hash of a JSON value; the same on every machine and in every process."""
    blob = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(blob).digest()[:8], "big") >> 1


@dataclass(frozen=True, slots=True)
class TokenCompletion:
    """Tokens after the prompt. `mask[t]` True = token t counts in the loss (the model wrote it)."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """A `Group` as token ids. `prompt_ids` includes everything the model is given before it writes."""

    prompt_ids: tuple[int, ...]
    completions: tuple[TokenCompletion, ...] = ()
    prompt_id: int = 0
    origin: Origin | None = field(default=None, compare=False)

    @property
    def num_tokens(self) -> int:
        """Tokens in the shared layout: the prompt once, every completion once."""
        return len(self.prompt_ids) + sum(len(c.ids) for c in self.completions)


@dataclass(frozen=True, slots=True)
class SampledCompletion:
    """What a sampler returns: ids including the stop token when there was one, the log-probabilities (nats, at the
    sampling temperature) each token was drawn with, and why it ended: "stop" = a stop token, "length" = out of room."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Turn:
    """What an environment says to an answer of the policy.

    messages  what comes before the policy's next answer; empty = the conversation is over
    reward    what the answer earned, in score units
    done      True = the conversation is over, whatever the messages say
    """

    messages: tuple[Message, ...] = ()
    reward: float = 0.0
    done: bool = False


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One completion to be scored, as text. `finished` is False when it was cut by the length limit.

    tokens  the same as the text of each token, end token included; empty where no scorer asks for them
    """

    prompt: tuple[Message, ...]
    completion: str
    finished: bool = True
    prompt_id: int = 0
    tokens: tuple[str, ...] = ()


LARGEST_SCORE = 1e18
"""Scores and rewards beyond this have squares that float32 does not hold, so nothing can be learned from them."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a scorer says. A failure is a value with an error, never a silent 0.

    members  the scores of an ensemble's members, that `value` was made of; empty = one judge
    tokens   what each token of the request earned, adding up to what they contribute to `value`; empty = judged whole
    parts    of a composed score: (name, score before its weight) of each judge
    """

    value: float | None
    error: str | None = None
    members: tuple[float, ...] = ()
    tokens: tuple[float, ...] = ()
    parts: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95% confidence interval and the number of clusters (usually prompts) behind it."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}
