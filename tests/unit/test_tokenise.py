"""Groups to tokens: answers are never eaten, nothing is left out unsaid."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from io import StringIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import templates_support as support
from accord.config import Recipe
from accord.data.templates import Template
from accord.data.tldr import tldr_prompt
from accord.data.tokenise import Dropped, Tokenised, tokenise_groups
from accord.errors import DataError
from accord.methods.context import Context, tokenised
from accord.methods.corpus import Corpus
from accord.records import Completion, Group, Message, Origin, TokenGroup

SYSTEM = Message("system", "be brief")
OLD_TURNS = (Message("user", "an old question"), Message("assistant", "an old answer"))
QUESTION = Message("user", "what is the question of the right words?")


@cache
def template(name: str) -> Template:
    if name in ("plain", "raw"):
        return Template.of(support.byte_tokenizer(), name)
    return Template.of(support.byte_tokenizer(getattr(support, name.upper())))


def answer(text: str, *, learn: bool = True, rank: int | None = None) -> Completion:
    return Completion((Message("assistant", text, learn),), rank=rank)


def tokens(
    *groups: Group, name: str = "chatml", max_tokens: int = 1000, max_prompt_tokens: int | None = None, **options: str
) -> Tokenised:
    options.setdefault("loss_on", "assistant")
    return tokenise_groups(
        groups, template(name), max_tokens=max_tokens, max_prompt_tokens=max_prompt_tokens, **options
    )


def prompt_text(group: TokenGroup, name: str = "chatml") -> str:
    return template(name).tokenizer.decode(list(group.prompt_ids))


def longest_prompt(group: Group) -> int:
    return len(template("chatml").prompt_ids(group.prompt))


def longest(group: TokenGroup) -> int:
    return len(group.prompt_ids) + max(len(completion.ids) for completion in group.completions)


words = st.lists(st.sampled_from(["one", "two", "the answer", "中", "<|im_end|>", "\n"]), min_size=1, max_size=30)
texts = words.map(" ".join)


@st.composite
def text_groups(draw: st.DrawFn) -> Group:
    prompt = (SYSTEM,) if draw(st.booleans()) else ()
    for _ in range(draw(st.integers(0, 2))):
        prompt += (Message("user", draw(texts)), Message("assistant", draw(texts)))
    completions = tuple(answer(text, rank=rank) for rank, text in enumerate(draw(st.lists(texts, max_size=3))))
    return Group((*prompt, Message("user", draw(texts))), completions)


@pytest.mark.parametrize("name", ["chatml", "plain", "llama3"])
@pytest.mark.parametrize("side", ["start", "end"])
def test_prompts_are_cut_and_answers_are_whole_or_named(name: str, side: str) -> None:
    chat = template(name)
    header = chat.prompt_ids(())

    @settings(max_examples=50, derandomize=True, deadline=None)
    @given(text_groups(), st.integers(20, 250), st.none() | st.integers(15, 150))
    def check(group: Group, max_tokens: int, max_prompt_tokens: int | None) -> None:
        limits = {"max_tokens": max_tokens, "max_prompt_tokens": max_prompt_tokens}
        result = tokens(group, name=name, truncate_prompt=side, **limits)
        whole = chat.prompt_ids(group.prompt)
        assert len(result.groups) + len(result.dropped) == 1
        for kept in result.groups:
            expected = [chat.completion(group.prompt, completion.messages) for completion in group.completions]
            assert list(kept.completions) == expected
            prompt_room = max_tokens - max((len(completion.ids) for completion in expected), default=0)
            assert len(kept.prompt_ids) <= min(prompt_room, max_prompt_tokens or max_tokens)
            assert result.truncated_prompts == (kept.prompt_ids != whole)
            assert kept.prompt_ids[-3:] == (whole[-3:] if name == "plain" else header[-3:])
            assert group.prompt[0] != SYSTEM or SYSTEM.content in prompt_text(kept, name)
            assert kept.prompt_id == group.prompt_id

    check()


def test_a_prompt_that_fits_exactly_is_not_cut() -> None:
    group = Group((*OLD_TURNS, QUESTION), (answer("one"),))
    size = longest(tokens(group).groups[0])
    assert tokens(group, max_tokens=size) == tokens(group)
    assert tokens(group, max_tokens=size - 1).truncated_prompts == 1


def test_the_oldest_turns_go_first_and_the_system_message_stays() -> None:
    group = Group((SYSTEM, *OLD_TURNS, *OLD_TURNS, QUESTION), (answer("one"),))
    for kept_turns in ((*OLD_TURNS, QUESTION), (QUESTION,)):
        shorter = replace(group, prompt=(SYSTEM, *kept_turns))
        limit = longest(tokens(shorter).groups[0])
        result = tokens(group, max_tokens=limit)
        assert result.groups[0].prompt_ids == tokens(shorter).groups[0].prompt_ids
        assert result.truncated_prompts == 1


def test_the_last_turn_is_cut_inside_the_template() -> None:
    group = Group((SYSTEM, *OLD_TURNS, QUESTION), (answer("one"),))
    limit = longest(tokens(replace(group, prompt=(SYSTEM, QUESTION))).groups[0]) - 3
    from_start = prompt_text(tokens(group, max_tokens=limit).groups[0])
    from_end = prompt_text(tokens(group, max_tokens=limit, truncate_prompt="end").groups[0])
    before, after = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    for text in (from_start, from_end):
        assert text.startswith(before)
        assert text.endswith(after)
    assert QUESTION.content.endswith(from_start[len(before) : -len(after)])
    assert QUESTION.content.startswith(from_end[len(before) : -len(after)])
    assert len(from_start) > len(before + after) < len(from_end)


def test_a_long_tldr_post_loses_lines_and_keeps_what_asks_for_the_summary() -> None:
    post = tldr_prompt("one", "the title", "line one\nline two\nline three")
    limit = len(template("raw").prompt_ids((Message("user", post),))) - 1
    result = tokens(Group((Message("user", post),)), name="raw", max_prompt_tokens=limit)
    assert prompt_text(result.groups[0], "raw") == tldr_prompt("one", "the title", "line one\nline two")
    assert result.truncated_prompts == 1


def test_what_the_prompts_lost_is_counted_by_part() -> None:
    post = Group((Message("user", tldr_prompt("one", "the title", "line one\nline two\nline three")),))
    cut = tokens(post, post, Group((QUESTION,)), max_prompt_tokens=longest_prompt(post) - 1)
    assert cut.cuts == (("the end of their post", 2),)
    dialogue, question = Group((*OLD_TURNS, QUESTION)), Group((QUESTION,))
    limit = longest_prompt(question) - 3
    assert tokens(dialogue, question, max_prompt_tokens=limit).cuts == (("their oldest part", 2),)
    assert tokens(dialogue, max_prompt_tokens=limit, truncate_prompt="end").cuts == (("their end", 1),)
    turns_lost = tokens(dialogue, max_prompt_tokens=limit + 3, truncate_prompt="end")
    assert turns_lost.cuts == (("their oldest part", 1),)


def test_a_stage_says_what_the_prompts_lost() -> None:
    post = Group((Message("user", tldr_prompt("one", "the title", "line one\nline two\nline three")),))
    said = StringIO()
    context = Context(Recipe.model_validate({"name": "x"}), Corpus(), Console(file=said))
    tokenised(context, [post], template("chatml"), "posts", max_prompt_tokens=longest_prompt(post) - 1)
    assert said.getvalue().strip() == "1 of 1 prompts of posts are too long and lost the end of their post"


def test_all_completions_of_a_group_share_one_shortened_prompt() -> None:
    group = Group((QUESTION,), (answer("one", rank=0), answer("two " * 20, rank=1)))
    size = longest(tokens(group).groups[0])
    (pair,) = tokens(group, max_tokens=size - 2).groups
    assert longest(pair) <= size - 2
    assert [completion.ids for completion in pair.completions] == [
        template("chatml").completion((QUESTION,), completion.messages).ids for completion in group.completions
    ]


def test_an_answer_that_does_not_fit_leaves_its_group_out_by_name() -> None:
    good, long = Group((QUESTION,), (answer("one"),)), Group((QUESTION,), (answer("one"), answer("two " * 50)))
    result = tokens(good, replace(long, origin=Origin("pairs.jsonl", 7)), max_tokens=40)
    assert len(result.groups) == 1
    assert result.sources == (0,)
    (dropped,) = result.dropped
    assert (dropped.index, dropped.origin) == (1, Origin("pairs.jsonl", 7))
    assert str(dropped).startswith("pairs.jsonl:7: the completion has ")
    assert "max_tokens is 40" in str(dropped)


def test_a_prompt_that_cannot_be_shortened_enough_is_left_out_by_name() -> None:
    long_system = Group((Message("system", "one two " * 20), QUESTION), (answer("one"),))
    only_system = Group((Message("system", "one two " * 20),), (answer("one"),))
    result = tokens(long_system, only_system, max_tokens=30)
    assert result.groups == ()
    assert [str(dropped).split(",")[0].split(" tokens and ")[1][:30] for dropped in result.dropped] == [
        "cannot be shortened to 28: its"
    ] * 2
    assert str(result.dropped[1]).startswith("group 1: the prompt has ")


def test_the_limit_of_the_prompt_holds_without_completions() -> None:
    limit = len(template("chatml").prompt_ids((QUESTION,))) - 1
    (group,) = tokens(Group((QUESTION,), origin=Origin("prompts.txt", 2)), max_prompt_tokens=limit).groups
    assert group.origin == Origin("prompts.txt", 2)
    assert len(group.prompt_ids) <= limit
    assert group.completions == ()


def test_loss_on_all_counts_every_token_but_the_first() -> None:
    group = Group((SYSTEM, *OLD_TURNS, QUESTION), (Completion((*answer("one").messages, QUESTION, *OLD_TURNS[1:])),))
    (some,), (every,) = tokens(group).groups, tokens(group, loss_on="all").groups
    assert every.prompt_ids == some.prompt_ids[:1]
    assert every.completions[0].ids == some.prompt_ids[1:] + some.completions[0].ids
    assert all(every.completions[0].mask)
    assert not all(some.completions[0].mask)


def test_a_dialogue_is_one_group_where_the_template_keeps_its_turns() -> None:
    turns = (*answer("one").messages, QUESTION, *answer("two", learn=False).messages, QUESTION, *answer("six").messages)
    (group,) = tokens(Group((QUESTION,), (Completion(turns),))).groups
    (completion,) = group.completions
    counted = [token for token, counts in zip(completion.ids, completion.mask, strict=True) if counts]
    assert template("chatml").tokenizer.decode(counted) == "one<|im_end|>six<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_gets_one_group_an_answer() -> None:
    thought, unlearnt = "<think>so</think>one", "<think>no</think>two"
    turns = (*answer(thought).messages, QUESTION, *answer(unlearnt, learn=False).messages, QUESTION)
    dialogue = Group((QUESTION,), (Completion((*turns, *answer("six").messages)),))
    result = tokens(Group((QUESTION,)), dialogue, name="stripping")
    assert result.sources == (0, 1, 1)
    result = tokens(dialogue, name="stripping")
    decode = template("stripping").tokenizer.decode
    assert [decode(list(group.completions[0].ids)) for group in result.groups] == [
        thought + "<|im_end|>",
        "<think></think>six<|im_end|>",
    ]
    assert all(all(group.completions[0].mask) for group in result.groups)
    history = prompt_text(result.groups[1], "stripping")
    assert history.count(QUESTION.content) == 3
    assert "one" in history
    assert "so" not in history


def test_one_answer_that_does_not_fit_does_not_take_the_others_of_its_dialogue_along() -> None:
    turns = (*answer("<think>" + "so " * 60 + "</think>one").messages, QUESTION, *answer("two").messages)
    result = tokens(Group((QUESTION,), (Completion(turns),)), name="stripping", max_tokens=60)
    assert len(result.groups) == len(result.dropped) == 1
    assert template("stripping").decode(result.groups[0].completions[0].ids) == "two"


def test_comparisons_of_dialogues_need_a_template_that_keeps_turns() -> None:
    turns = (*answer("<think>so</think>one").messages, QUESTION, *answer("two").messages)
    pair = Group((QUESTION,), (Completion(turns, rank=0), answer("one", rank=1)))
    assert len(tokens(pair).groups[0].completions) == 2
    (dropped,) = tokens(pair, name="stripping").dropped
    assert "no prompt in common" in dropped.reason


@pytest.mark.parametrize("name", ["chatml", "stripping"])
def test_a_group_with_nothing_to_learn_is_left_out_by_name(name: str) -> None:
    turns = (*answer("<think>so</think>one", learn=False).messages, QUESTION, *answer("two", learn=False).messages)
    result = tokens(Group((QUESTION,), (Completion(turns),)), name=name)
    assert result.groups == ()
    assert [dropped.reason[:16] for dropped in result.dropped] == ["nothing to learn"]


def test_turns_the_template_refuses_are_an_error_with_their_origin() -> None:
    group = Group((SYSTEM, QUESTION), (answer("one"),), origin=Origin("chat.jsonl", 3))
    with pytest.raises(DataError, match=r"^chat\.jsonl:3: The tokenizer's own chat template refuses .* no system role"):
        tokens(group, name="gemma")


def test_an_answer_that_does_not_follow_its_prompt_is_an_error_with_its_origin() -> None:
    """This template names the model in the header of an answer, but not in its generation prompt, for some answers."""
    source = support.CHATML.replace("m.role +", "m.role + (' (odd)' if 'odd' in m.content else '') +")
    group = Group((QUESTION,), (answer("one odd"),), origin=Origin("chat.jsonl", 3))
    chat = Template.of(support.byte_tokenizer(source))
    with pytest.raises(DataError, match=r"^chat\.jsonl:3: .* renders an assistant turn differently"):
        tokenise_groups([group], chat, max_tokens=1000, max_prompt_tokens=None, loss_on="assistant")


def test_a_dropped_group_prints_as_its_place_and_reason() -> None:
    assert str(Dropped(4, None, "too long")) == "group 4: too long"
    assert str(Dropped(4, Origin("a.csv", 9), "too long")) == "a.csv:9: too long"
