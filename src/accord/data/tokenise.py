"""Groups of text to groups of token ids, within a length limit.

Only prompts are ever shortened; an answer is kept whole or its group is left out and named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from accord.data.templates import Template
from accord.data.tldr import fit_tldr_prompt
from accord.errors import DataError
from accord.records import Group, Message, Origin, TokenCompletion, TokenGroup

__all__ = ["Dropped", "Tokenised", "tokenise_groups"]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A group that could not be used: its index among the groups (from 0), its origin and the reason."""

    index: int
    origin: Origin | None
    reason: str

    def __str__(self) -> str:
        return f"{_where(self.index, self.origin)}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Tokenised:
    """What came of the groups.

    groups             the token groups, in the order of their sources
    sources            for each token group, the index of the group it was made from (a dialogue may give several)
    cuts               what prompts that were too long have lost, and in how many token groups
    dropped            what could not be used
    """

    groups: tuple[TokenGroup, ...]
    sources: tuple[int, ...]
    cuts: tuple[tuple[str, int], ...]
    dropped: tuple[Dropped, ...]

    @property
    def truncated_prompts(self) -> int:
        """How many token groups have a shortened prompt."""
        return sum(count for _, count in self.cuts)


@dataclass(frozen=True, slots=True)
class _Limits:
    max_tokens: int
    max_prompt_tokens: int | None
    truncate_prompt: Literal["start", "end"]


def tokenise_groups(
    groups: Iterable[Group],
    template: Template,
    *,
    max_tokens: int,
    max_prompt_tokens: int | None,
    loss_on: Literal["assistant", "all"],
    truncate_prompt: Literal["start", "end"] = "start",
    first: int = 0,
) -> Tokenised:
    """Token ids and loss masks of every group, in order.

    A prompt that is too long loses its oldest turns first (never a system message), then the start or the end of the
    turn that is left, as text, so the template around it stays whole (a TL;DR prompt loses lines of its post, never the
    "TL;DR:"). All completions of a group share one prompt.

    Where the template rewrites earlier turns, a dialogue with several answers becomes one group per answer, each
    behind its own rendering of what came before; a comparison of such dialogues has no common prompt and is dropped.

    Args:
        max_tokens: limit of prompt + completion, for each completion.
        max_prompt_tokens: limit of the prompt alone; None = only `max_tokens` limits it.
        loss_on: "assistant" counts what assistant turns wrote, end of turn included. "all" counts every token but
            the first of the prompt, which nothing predicts: `prompt_ids` is then that token alone.
        truncate_prompt: which end of the turn that is left is cut.
        first: the index of the first group, where these are a part of more.
    Raises: DataError, with the origin, when the template refuses a group's turns.
    """
    limits = _Limits(max_tokens, max_prompt_tokens, truncate_prompt)
    kept: list[TokenGroup] = []
    sources: list[int] = []
    dropped: list[Dropped] = []
    cuts = Counter[str]()
    for index, group in enumerate(groups, first):
        try:
            for example in _examples(group, template):
                try:
                    token_group, cut = _fit(example, template, limits)
                    kept.append(_count_all(token_group) if loss_on == "all" else token_group)
                    sources.append(index)
                    cuts.update([cut] if cut else [])
                except _Unusable as error:
                    dropped.append(Dropped(index, group.origin, str(error)))
        except DataError as error:
            raise DataError(f"{_where(index, group.origin)}: {error}") from error
    return Tokenised(tuple(kept), tuple(sources), tuple(cuts.items()), tuple(dropped))


class _Unusable(Exception):
    """This group, or one of the examples it was split into, is left out; the message says why."""


def _where(index: int, origin: Origin | None) -> str:
    return f"group {index}" if origin is None else str(origin)


def _examples(group: Group, template: Template) -> list[Group]:
    """The group itself or, where its one dialogue is no single sequence of tokens, one group per answer to learn."""
    if len(group.completions) != 1 or template.keeps_turns(group.prompt, group.completions[0].messages):
        return [group]
    (dialogue,) = group.completions
    answers = [
        replace(
            group,
            prompt=(*group.prompt, *dialogue.messages[:index]),
            completions=(replace(dialogue, messages=(message,)),),
        )
        for index, message in enumerate(dialogue.messages)
        if _is_learnt(message)
    ]
    return answers or [group]


def _is_learnt(message: Message) -> bool:
    return message.role == "assistant" and message.learn


def _fit(group: Group, template: Template, limits: _Limits) -> tuple[TokenGroup, str | None]:
    """The group's tokens, and what its prompt lost if it had to be shortened; its completions are whole."""
    if group.completions and not any(_is_learnt(message) for c in group.completions for message in c.messages):
        raise _Unusable("nothing to learn: no turn of the assistant, or only turns with a loss weight of 0.")
    if not all(template.keeps_turns(group.prompt, completion.messages) for completion in group.completions):
        raise _Unusable(
            f"the {template.name} chat template rewrites earlier turns, so completions of several answers have no "
            "prompt in common. Compare single answers, or use template plain."
        )
    whole = _token_group(group, group.prompt, template)
    longest = max((len(completion.ids) for completion in whole.completions), default=0)
    room = min(limits.max_tokens - longest, limits.max_prompt_tokens or limits.max_tokens)
    if room < 1:
        raise _Unusable(
            f"the completion has {longest} tokens, and max_tokens is {limits.max_tokens}: a completion is never cut. "
            f"Set max_tokens above {longest}, or shorten the completion."
        )
    if len(whole.prompt_ids) <= room:
        return whole, None
    shortened = _shortened(group.prompt, template, room, limits.truncate_prompt)
    if shortened is None:
        raise _Unusable(
            f"the prompt has {len(whole.prompt_ids)} tokens and cannot be shortened to {room}: its system message and "
            "the template alone take more. Raise max_tokens or max_prompt_tokens."
        )
    prompt, cut = shortened
    return _token_group(group, prompt, template), cut


def _token_group(group: Group, prompt: tuple[Message, ...], template: Template) -> TokenGroup:
    completions = tuple(template.completion(prompt, completion.messages) for completion in group.completions)
    return TokenGroup(template.prompt_ids(prompt), completions, group.prompt_id, group.origin)


def _shortened(
    prompt: Sequence[Message], template: Template, room: int, side: Literal["start", "end"]
) -> tuple[tuple[Message, ...], str] | None:
    """The prompt within `room` tokens (system messages, then the newest turns, then a part of the oldest one left),
    and what it lost."""
    system = tuple(message for message in prompt if message.role == "system")
    turns = tuple(message for message in prompt if message.role != "system")
    tails = [turns[i:] for i, message in enumerate(turns) if message.role == "user"]  # templates want a user first
    for tail in tails:
        if len(template.prompt_ids((*system, *tail))) <= room:
            return (*system, *tail), "their oldest part"
    if not tails:
        return None
    first, *rest = tails[-1]

    def with_text(text: str) -> tuple[Message, ...]:
        return (*system, replace(first, content=text), *rest)

    def fits(text: str) -> bool:
        return len(template.prompt_ids(with_text(text))) <= room

    shorter_post = fit_tldr_prompt(first.content, fits)
    if fits(shorter_post):
        return with_text(shorter_post), "the end of their post"

    def part(length: int) -> str:
        return first.content[-length:] if side == "start" else first.content[:length]

    fitting, too_long = 0, len(first.content)
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        if fits(part(middle)):
            fitting = middle
        else:
            too_long = middle
    lost = "their oldest part" if side == "start" else "their end"
    return (with_text(part(fitting)), lost) if fitting else None


def _count_all(group: TokenGroup) -> TokenGroup:
    shared = group.prompt_ids[1:]
    completions = tuple(
        TokenCompletion(shared + completion.ids, (True,) * (len(shared) + len(completion.ids)))
        for completion in group.completions
    )
    return replace(group, prompt_ids=group.prompt_ids[:1], completions=completions)
