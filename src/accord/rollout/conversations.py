"""Conversations, sampled turn by turn: one answer a prompt without an environment, several with one.

All that are still going on are answered together. What an environment says is tokenised as the template's parts are in
a finished dialogue; what the policy wrote stays the tokens it wrote, so nothing is decoded and tokenised again.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal

import numpy as np

from accord.data.templates import Template
from accord.errors import RewardError
from accord.randomness import generator
from accord.records import LARGEST_SCORE, ROLES, Message, SampledCompletion, TokenCompletion, Turn, content_id
from accord.rollout.environment import Environment, EnvironmentFactory
from accord.rollout.native import PromptTokens, Sampler
from accord.rollout.sampling import Sampling

__all__ = ["Conversation", "Opening", "Partner", "converse"]

End = Literal["over", "length", "turns", "room"]


@dataclass(frozen=True, slots=True)
class Partner:
    """Whom the policy talks with, and how far: at most `max_turns` answers, and `max_tokens`, prompt included."""

    name: str
    factory: EnvironmentFactory
    max_turns: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Opening:
    """What a conversation begins with, as messages and as the ids that the policy is given."""

    messages: tuple[Message, ...]
    ids: tuple[int, ...]
    prompt_id: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """From the opening to the policy's last answer; what an environment said to that one is not part of it.

    messages    the answers of the policy (assistant) and what was said in between
    completion  their tokens; the mask is True on those the policy wrote
    logprobs    (T,) nats each of those was drawn with, 0 elsewhere
    rewards     (T,) what the environment gave for an answer, at that answer's last token
    end         over: by the environment, or after its one answer where there is none; length: an answer was cut;
                turns: after as many answers as are allowed; room: another answer might not have fitted
    error       what the environment failed with, if it did
    """

    opening: Opening
    messages: tuple[Message, ...]
    completion: TokenCompletion
    logprobs: tuple[float, ...]
    rewards: tuple[float, ...]
    end: End
    error: str | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last answer."""
        return (*self.opening.messages, *self.messages[:-1])

    @property
    def answers(self) -> tuple[str, ...]:
        """What the policy wrote."""
        return tuple(message.content for message in self.messages if message.role == "assistant")

    @property
    def text(self) -> str:
        """All that the policy wrote."""
        return "\n".join(self.answers)

    @property
    def own_ids(self) -> tuple[int, ...]:
        """The tokens that the policy wrote."""
        return tuple(token for token, own in zip(self.completion.ids, self.completion.mask, strict=True) if own)


def converse(
    sampler: Sampler,
    template: Template,
    openings: Sequence[Opening],
    n: int,
    sampling: Sampling,
    key: tuple[int | str, ...],
    partner: Partner | None = None,
) -> list[tuple[Conversation, ...]]:
    """`n` conversations for each opening, in order.

    The first answers are samples of the opening under `key`. From then on sample i of a prompt takes its random numbers
    from `key`, the turn, the prompt and i, and from nothing else.

    Raises: RewardError when the environment cannot begin a conversation; DataError when the template cannot go on
        with one; what the sampler raises. An environment that fails later leaves an error in the conversation.
    """
    talks = _begun(openings, n, key) if partner is None else _begun_with(partner, template, openings, n, sampling, key)
    firsts = [row[0].opening for row in talks]
    sampled = sampler.generate([PromptTokens(o.ids, o.prompt_id) for o in firsts], n, sampling, key)
    speaking = [talk for row in talks for talk in row]
    for talk, sample in zip(speaking, (sample for samples in sampled for sample in samples), strict=True):
        talk.answer(sample, template)
    turn = 1
    while partner is not None:
        speaking = [talk for talk in speaking if talk.goes_on(partner, template, sampling)]
        if not speaking:
            break
        turn += 1
        requests = [PromptTokens(talk.tokens, talk.id) for talk in speaking]
        samples = sampler.generate(requests, 1, sampling, (*key, "turn", turn))
        for talk, (sample,) in zip(speaking, samples, strict=True):
            talk.answer(sample, template)
    return [tuple(talk.conversation() for talk in row) for row in talks]


@dataclass(slots=True)
class _Talk:
    """A conversation while it goes on: sample `index` of its prompt."""

    opening: Opening
    index: int
    key: tuple[int | str, ...]
    environment: Environment | None = None
    messages: list[Message] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    end: End = "over"
    error: str | None = None

    @property
    def id(self) -> int:
        """Tells this conversation's random numbers from those of the prompt's other samples."""
        return content_id([self.opening.prompt_id, self.index])

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.opening.ids, *self.ids)

    def answer(self, sample: SampledCompletion, template: Template) -> None:
        """The policy has written `sample`."""
        self.messages.append(Message("assistant", template.decode(sample.ids)))
        self._add(sample.ids, True, sample.logprobs)
        if sample.finish_reason == "length":
            self.end = "length"

    def goes_on(self, partner: Partner, template: Template, sampling: Sampling) -> bool:
        """Let the environment speak; whether the policy shall answer again."""
        try:
            reply = self._reply(partner)
        except (Exception, SystemExit) as error:  # the user's code may raise anything: a counted, named failure
            self.error = f"the environment {partner.name} failed after answer {self._turns()}: {_said(error)}"
            return False
        self.rewards[-1] = float(reply.reward)
        if self.end == "length" or reply.done or not reply.messages:
            return False
        if self._turns() == partner.max_turns:
            self.end = "turns"
            return False
        between = template.between(self.opening.messages, [*self.messages, *reply.messages])
        if len(self.tokens) + len(between) + sampling.max_new_tokens > partner.max_tokens:
            self.end = "room"
            return False
        self.messages += reply.messages
        self._add(between, False, (0.0,) * len(between))
        return True

    def conversation(self) -> Conversation:
        return Conversation(
            self.opening,
            tuple(self.messages),
            TokenCompletion(tuple(self.ids), tuple(self.mask)),
            tuple(self.logprobs),
            tuple(self.rewards),
            self.end,
            self.error,
        )

    def _reply(self, partner: Partner) -> Turn:
        assert self.environment is not None
        random = generator(*self.key, "environment", self.opening.prompt_id, self.index, self._turns())
        reply = self.environment.step((*self.opening.messages, *self.messages), random)
        if not isinstance(reply, Turn):
            raise TypeError(f"step returned {reply!r}, expected an accord.records.Turn")
        _require_messages(reply.messages, "step")
        if any(message.role == "assistant" for message in reply.messages):
            raise ValueError("step speaks as the assistant, whose turns are the policy's")
        if not (isinstance(reply.reward, Real) and abs(reply.reward) <= LARGEST_SCORE):  # NaN neither
            raise ValueError(f"step returned the reward {reply.reward!r}, expected a number within +-{LARGEST_SCORE:g}")
        return reply

    def _add(self, ids: Sequence[int], own: bool, logprobs: Sequence[float]) -> None:
        self.ids += ids
        self.mask += [own] * len(ids)
        self.logprobs += logprobs
        self.rewards += [0.0] * len(ids)

    def _turns(self) -> int:
        return sum(message.role == "assistant" for message in self.messages)


def _begun(openings: Sequence[Opening], n: int, key: tuple[int | str, ...]) -> list[list[_Talk]]:
    """`n` conversations for each opening. A prompt that occurs again has other samples than before."""
    earlier: Counter[int] = Counter()
    talks: list[list[_Talk]] = []
    for opening in openings:
        first = earlier[opening.prompt_id]
        earlier[opening.prompt_id] += n
        talks.append([_Talk(opening, first + i, key) for i in range(n)])
    return talks


def _begun_with(
    partner: Partner,
    template: Template,
    openings: Sequence[Opening],
    n: int,
    sampling: Sampling,
    key: tuple[int | str, ...],
) -> list[list[_Talk]]:
    """The same, each with an environment of its own that has said how it begins."""
    talks = _begun(openings, n, key)
    for row in talks:
        try:
            begins = [_reset(talk, partner, row[0].index) for talk in row]
            if any(begin != begins[0] for begin in begins):
                raise ValueError(
                    "reset begins the samples of one prompt differently, so they cannot be compared; what is random in "
                    "it must come from the generator it is given"
                )
        except (Exception, SystemExit) as error:
            asked = [(m.role, m.content) for m in row[0].opening.messages]
            raise RewardError(
                f"the environment {partner.name} cannot begin a conversation: {_said(error)}\n  prompt: {asked}"
            ) from error
        opening = row[0].opening
        if begins[0] != opening.messages:
            opening = Opening(begins[0], template.prompt_ids(begins[0]), opening.prompt_id)
        if len(opening.ids) + sampling.max_new_tokens > partner.max_tokens:
            raise RewardError(
                f"the environment {partner.name} begins with {len(opening.ids)} tokens, which leave no room for an "
                f"answer of {sampling.max_new_tokens} within {partner.max_tokens}: raise `data.max_tokens`, or let it "
                "begin with less"
            )
        for talk in row:
            talk.opening = opening
    return talks


def _reset(talk: _Talk, partner: Partner, first: int) -> tuple[Message, ...]:
    talk.environment = partner.factory()
    random: np.random.Generator = generator(*talk.key, "environment", talk.opening.prompt_id, first)
    messages = tuple(talk.environment.reset(talk.opening.messages, random))
    if messages != talk.opening.messages:
        _require_messages(messages, "reset")
        if not messages or messages[-1].role == "assistant":
            raise ValueError(f"reset returned {messages!r}, expected messages that the policy shall answer")
    return messages


def _require_messages(messages: Sequence[Message], what: str) -> None:
    for message in messages:
        if not isinstance(message, Message):
            raise TypeError(f"{what} returned {message!r}, expected an accord.records.Message")
        if not isinstance(message.role, str) or not isinstance(message.content, str):
            raise TypeError(f"{what} returned {message!r}, whose role and content must be text")
        if message.role not in ROLES:
            raise ValueError(f"{what} returned the role {message.role!r}, expected one of {', '.join(ROLES)}")
        message.content.encode("utf-8")  # a lone surrogate is no text


def _said(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
