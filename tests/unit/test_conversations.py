"""Conversations with an environment: their tokens, their random numbers, how they end, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from accord.data.templates import Template
from accord.errors import DataError, RewardError
from accord.records import Message, SampledCompletion, Turn
from accord.rollout.conversations import Conversation, Opening, Partner, converse
from accord.rollout.native import NativeSampler, PromptTokens
from accord.rollout.sampling import Sampling
from models_support import PAD_ID, tiny_model, word_tokenizer
from templates_support import CHATML, GEMMA, LLAMA3, MISTRAL, PHI, STRIPPING, byte_tokenizer, prefix_tokenizer

ANSWERS = ("a question of  words", "the <|im_end|> is\n\n", "one")
REPLIES = ("what is <s> the answer", "  two\nthree ")


class Scripted:
    """Says the replies in order, each worth as much as its place; then it is over."""

    def __init__(self, replies: Sequence[str] = REPLIES) -> None:
        self._replies = list(replies)

    def reset(self, prompt: Sequence[Message], random: np.random.Generator) -> Sequence[Message]:
        return prompt

    def step(self, messages: Sequence[Message], random: np.random.Generator) -> Turn:
        place = sum(m.role == "assistant" for m in messages)
        if place > len(self._replies):
            return Turn(reward=float(place))
        return Turn((Message("user", self._replies[place - 1]),), float(place))


class Dice:
    """Says random words, from its generator alone, as long as a coin falls on heads."""

    def reset(self, prompt: Sequence[Message], random: np.random.Generator) -> Sequence[Message]:
        return [*prompt, Message("user", f"w{random.integers(2, 50)}")]

    def step(self, messages: Sequence[Message], random: np.random.Generator) -> Turn:
        words = " ".join(f"w{number}" for number in random.integers(2, 50, size=int(random.integers(1, 4))))
        return Turn((Message("user", words),), float(random.random()), done=bool(random.random() < 0.3))


class Reciting:
    """A sampler that writes what it is told to, turn by turn, and keeps the prompts it was given."""

    def __init__(self, turns: Sequence[tuple[int, ...]], reason: Any = "stop") -> None:
        self.given: list[tuple[int, ...]] = []
        self._turns, self._reason = list(turns), reason

    def generate(
        self, prompts: Sequence[PromptTokens], n: int, sampling: Sampling, key: tuple[int | str, ...]
    ) -> list[tuple[SampledCompletion, ...]]:
        ids = self._turns[len(self.given)]
        self.given.append(prompts[0].ids)
        return [(SampledCompletion(ids, tuple(-0.5 - i for i in range(len(ids))), self._reason),) * n for _ in prompts]


def opening(template: Template, *texts: str) -> Opening:
    messages = tuple(Message("user", text) for text in texts)
    return Opening(messages, template.prompt_ids(messages), 7)


def with_whom(factory: Callable[[], Any], *, max_turns: int = 3, max_tokens: int = 1000) -> Partner:
    return Partner("test:Environment", factory, max_turns, max_tokens)


TEMPLATES = {
    "plain": lambda: Template.of(byte_tokenizer(), "plain"),
    "raw": lambda: Template.of(byte_tokenizer(), "raw"),
    "chatml": lambda: Template.of(byte_tokenizer(CHATML)),
    "llama3": lambda: Template.of(byte_tokenizer(LLAMA3, add_bos=True)),
    "mistral": lambda: Template.of(prefix_tokenizer(MISTRAL)),
    "gemma": lambda: Template.of(prefix_tokenizer(GEMMA)),
    "phi": lambda: Template.of(byte_tokenizer(PHI)),
}


def recited(template: Template, start: Opening, answers: Sequence[str] = ANSWERS) -> tuple[Conversation, Reciting]:
    """A conversation whose answers are the tokens of `answers` as the template renders each behind what came before."""
    said, turns = list(start.messages), []
    for place, answer in enumerate(answers):
        turns.append(template.completion(said, [Message("assistant", answer)]).ids)
        said += [Message("assistant", answer), *(Message("user", text) for text in REPLIES[place : place + 1])]
    sampler = Reciting(turns)
    sampling = Sampling(30, stop_ids=template.stop_ids)
    ((conversation,),) = converse(sampler, template, [start], 1, sampling, (1,), with_whom(Scripted))
    return conversation, sampler


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_are_those_of_the_same_dialogue_as_an_example(name: str) -> None:
    """Parts with control tokens, doubled spaces and newlines at their edges would come out otherwise if they were
    tokenised together, or decoded and tokenised again."""
    template = TEMPLATES[name]()
    start = opening(template, "the right words")
    conversation, sampler = recited(template, start)
    example = template.completion(start.messages, conversation.messages)
    assert conversation.completion == example
    assert len(conversation.messages) == 5 and conversation.end == "over"
    whole = (*start.ids, *conversation.completion.ids)
    assert all(given == whole[: len(given)] for given in sampler.given)
    # Each answer is sampled behind the prompt it has as an example of its own.
    for turn, given in enumerate(sampler.given):
        assert given == template.prompt_ids((*start.messages, *conversation.messages[: 2 * turn]))


def test_rewards_and_log_probabilities_stand_at_the_policy_s_own_tokens() -> None:
    template = TEMPLATES["chatml"]()
    conversation, _ = recited(template, opening(template, "the right words"))
    mask = conversation.completion.mask
    lasts = [i for i, own in enumerate(mask) if own and (i + 1 == len(mask) or not mask[i + 1])]
    assert {i: r for i, r in enumerate(conversation.rewards) if r} == dict(zip(lasts, (1.0, 2.0, 3.0), strict=True))
    assert all((logprob < 0) == own for logprob, own in zip(conversation.logprobs, mask, strict=True))
    assert conversation.completion.mask[-1] and conversation.answers == tuple(
        m.content for m in conversation.messages[::2]
    )
    assert conversation.prompt == (*conversation.opening.messages, *conversation.messages[:-1])


def test_a_template_that_rewrites_earlier_answers_is_refused() -> None:
    template = Template.of(byte_tokenizer(STRIPPING))
    with pytest.raises(DataError, match="no single sequence of tokens"):
        recited(template, opening(template, "one"), ("<think>two</think>one", "one"))


# --- randomness ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy() -> tuple[NativeSampler, Template]:
    import torch

    model = tiny_model("gpt2", dtype=torch.float64, seed=1)
    return NativeSampler(model, pad_id=PAD_ID), Template.of(word_tokenizer(), "raw")


SAMPLING = Sampling(5, stop_ids=(1, *range(30, 53)))


def openings(template: Template, *texts: str) -> list[Opening]:
    found = []
    for number, text in enumerate(texts):
        messages = (Message("user", text),)
        found.append(Opening(messages, template.prompt_ids(messages), number))
    return found


def told(conversations: Sequence[Conversation]) -> list[Any]:
    return [(c.opening.messages, c.messages, c.completion, c.rewards, c.end) for c in conversations]


def test_a_conversation_does_not_depend_on_the_others(policy: tuple[NativeSampler, Template]) -> None:
    sampler, template = policy
    partner = with_whom(Dice, max_turns=4)
    starts = openings(template, "w2 w3", "w4", "w5 w6 w7")
    together = converse(sampler, template, starts, 3, SAMPLING, ("t", 1), partner)
    for start, expected in zip(starts, together, strict=True):
        (alone,) = converse(sampler, template, [start], 3, SAMPLING, ("t", 1), partner)
        assert told(alone) == told(expected)
    (fewer,) = converse(sampler, template, starts[1:2], 2, SAMPLING, ("t", 1), partner)
    assert told(fewer) == told(together[1][:2])
    lengths = {len(c.answers) for group in together for c in group}
    assert len(lengths) > 1 and max(lengths) > 2  # so that others really leave while one goes on
    # Samples of a prompt begin alike and part; another step is another conversation.
    assert all(len({c.opening for c in group}) == 1 for group in together)
    assert all(len({c.messages for c in group}) > 1 for group in together)
    assert all(len({c.messages[1] for c in group if len(c.messages) > 1}) != 1 for group in together)
    again = converse(sampler, template, starts, 3, SAMPLING, ("t", 2), partner)
    assert all(a[0].opening != b[0].opening for a, b in zip(again, together, strict=True))


def test_a_conversation_goes_on_alike_when_an_earlier_sample_has_ended(policy: tuple[NativeSampler, Template]) -> None:
    class Endless(Dice):
        def step(self, messages: Sequence[Message], random: np.random.Generator) -> Turn:
            return Turn(super().step(messages, random).messages)

    sampler, template = policy
    starts = openings(template, "w2 w3")
    sampling = Sampling(2, stop_ids=tuple(range(53)))  # every token ends an answer

    def begun(factory: Callable[[], Any]) -> Any:
        return converse(sampler, template, starts, 3, sampling, ("t", 1), with_whom(factory, max_turns=4))[0]

    made: list[Any] = []

    def first_ends() -> Any:
        made.append(Scripted(()) if not made else Endless())
        if len(made) == 1:
            made[0].reset = Endless().reset
        return made[-1]

    all_go_on, one_ends = begun(Endless), begun(first_ends)
    assert len(one_ends[0].answers) == 1 and len(all_go_on[0].answers) == 4
    assert told(one_ends[1:]) == told(all_go_on[1:])


def test_a_prompt_that_occurs_twice_has_other_conversations(policy: tuple[NativeSampler, Template]) -> None:
    sampler, template = policy
    start = openings(template, "w2 w3")
    first, second = converse(sampler, template, start * 2, 2, SAMPLING, ("t", 1), with_whom(Dice))
    assert told(first) != told(second) and first[0].opening != second[0].opening
    assert told(first) == told(converse(sampler, template, start, 2, SAMPLING, ("t", 1), with_whom(Dice))[0])


def test_without_an_environment_one_sample_is_one_conversation(policy: tuple[NativeSampler, Template]) -> None:
    sampler, template = policy
    starts = openings(template, "w2 w3", "w4")
    samples = sampler.generate([PromptTokens(o.ids, o.prompt_id) for o in starts], 3, SAMPLING, ("t", 1))
    conversations = converse(sampler, template, starts, 3, SAMPLING, ("t", 1))
    for group, expected in zip(conversations, samples, strict=True):
        for conversation, sample in zip(group, expected, strict=True):
            assert (conversation.completion.ids, conversation.logprobs) == (sample.ids, sample.logprobs)
            assert all(conversation.completion.mask) and not any(conversation.rewards)
            assert (conversation.end == "length") == (sample.finish_reason == "length")
            assert conversation.answers == (template.decode(sample.ids),)


# --- how conversations end -------------------------------------------------------------------------------------------


def ended(partner: Partner, *, reason: str = "stop", max_new_tokens: int = 10) -> Conversation:
    template = TEMPLATES["chatml"]()
    sampler = Reciting([template.completion((), [Message("assistant", "one")]).ids] * 9, reason)
    sampling = Sampling(max_new_tokens, stop_ids=template.stop_ids)
    ((conversation,),) = converse(sampler, template, [opening(template, "one")], 1, sampling, (1,), partner)
    return conversation


def test_a_conversation_ends_where_it_should() -> None:
    for max_turns, end, answers in ((1, "turns", 1), (2, "turns", 2), (3, "over", 3), (9, "over", 3)):
        conversation = ended(with_whom(Scripted, max_turns=max_turns))
        assert (conversation.end, len(conversation.answers)) == (end, answers)
        assert sum(conversation.rewards) == sum(range(answers + 1))  # the last answer has its reward, too
    cut = ended(with_whom(Scripted), reason="length")
    assert (cut.end, len(cut.answers), sum(cut.rewards)) == ("length", 1, 1.0)


def test_a_conversation_without_room_for_another_answer_ends() -> None:
    whole = ended(with_whom(Scripted))
    total = len(whole.opening.ids) + len(whole.completion.ids)
    last = len(whole.completion.ids) - max(i for i, own in enumerate(whole.completion.mask) if not own) - 1
    exactly = total - last + 10
    assert ended(with_whom(Scripted, max_tokens=exactly)) == whole
    short = ended(with_whom(Scripted, max_tokens=exactly - 1))
    assert short.end == "room" and len(short.answers) == 2
    assert short.completion.mask[-1] and sum(short.rewards) == 3.0


# --- what is refused -------------------------------------------------------------------------------------------------


class Wrong(Scripted):
    def __init__(self, reply: Any = None, begin: Any = None) -> None:
        super().__init__()
        self._reply, self._begin = reply, begin

    def reset(self, prompt: Sequence[Message], random: np.random.Generator) -> Sequence[Message]:
        return prompt if self._begin is None else self._begin(prompt)

    def step(self, messages: Sequence[Message], random: np.random.Generator) -> Turn:
        return self._reply(messages)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (lambda m: {}["no"], "KeyError: 'no'"),
        (lambda m: exit(3), "SystemExit: 3"),
        (lambda m: "well done", "expected an accord.records.Turn"),
        (lambda m: Turn(("hello",)), "expected an accord.records.Message"),
        (lambda m: Turn((Message("assistant", "me"),)), "speaks as the assistant"),
        (lambda m: Turn((Message("user", None),)), "whose role and content must be text"),  # type: ignore[arg-type]
        (lambda m: Turn((Message("user", "a\ud800"),)), "surrogates not allowed"),
        (lambda m: Turn((Message("banana", "me"),)), "the role 'banana', expected one of system, user"),
        (lambda m: Turn(reward=math.nan), "the reward nan"),
        (lambda m: Turn(reward=1e39), "the reward 1e+39"),
        (lambda m: Turn(reward="good"), "the reward 'good'"),  # type: ignore[arg-type]
    ],
)
def test_an_environment_that_fails_leaves_a_named_error(reply: Callable[..., Any], said: str) -> None:
    error = ended(with_whom(partial(Wrong, reply))).error
    assert error is not None and said in error
    assert error.startswith("the environment test:Environment failed after answer 1: ")


@pytest.mark.parametrize(
    ("begin", "said"),
    [
        (lambda prompt: 1 / 0, "ZeroDivisionError"),
        (lambda prompt: [], "expected messages that the policy shall answer"),
        (lambda prompt: [Message("assistant", "me")], "expected messages that the policy shall answer"),
        (lambda prompt: ["hello"], "expected an accord.records.Message"),
        (lambda prompt: [Message("user", "one two three " * 99)], "leave no room for an answer of 10 within 50"),
    ],
)
def test_an_environment_that_cannot_begin_is_refused(begin: Callable[..., Any], said: str) -> None:
    with pytest.raises(RewardError, match=re.escape(said)):
        ended(with_whom(partial(Wrong, None, begin), max_tokens=50))


def test_samples_of_a_prompt_that_begin_differently_are_refused(policy: tuple[NativeSampler, Template]) -> None:
    sampler, template = policy
    numbers = iter(range(2, 50))
    partner = with_whom(partial(Wrong, None, lambda prompt: [Message("user", f"w{next(numbers)}")]))
    with pytest.raises(RewardError, match="begins the samples of one prompt differently"):
        converse(sampler, template, openings(template, "w2"), 2, SAMPLING, (1,), partner)
