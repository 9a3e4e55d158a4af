"""Chat templates: what the model is given, what the assistant wrote, and that texts stay texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import templates_support as support
from accord.data.templates import Template
from accord.errors import ConfigError, DataError
from accord.models.scratch_tokenizer import SCRATCH_TEMPLATE, train_tokenizer
from accord.records import Message, TokenCompletion

# template, its end of a turn, what it writes between the generation prompt and the answer
FAMILIES = {
    "scratch": (SCRATCH_TEMPLATE, "</s>", ""),
    "chatml": (support.CHATML, "<|im_end|>", ""),
    "llama 3": (support.LLAMA3, "<|eot_id|>", ""),
    "mistral": (support.MISTRAL, "</s>", " "),
    "gemma": (support.GEMMA, "<end_of_turn>", ""),
    "generation": (support.GENERATION, "<|im_end|>", ""),
    "phi": (support.PHI, "<|im_end|>", ""),
    "plain": ("plain", "</s>", " "),
    "raw": ("raw", "</s>", ""),
    "endless": (support.ENDLESS, "</s>", ""),
}
KEEPS_CONTENT = ["scratch", "chatml", "mistral", "generation", "phi", "plain", "raw"]
LOOK_ALIKES = [*support.SPECIAL, "<eos>", "<pad>", "<|user|>", "<|", "im_end|>", "<", "\n", " ", "<s", "\ue000", "##"]
LOOK_ALIKES += ["{{ eos_token }}", "{% for m in messages %}", "{#", "<think>", "Assistant:", "the answer", "ä中"]
hostile_texts = st.lists(st.sampled_from(LOOK_ALIKES) | st.text(max_size=5), max_size=8).map("".join)
properties = settings(max_examples=50, derandomize=True, deadline=None)

QUESTION = (Message("user", "what is the question?"),)
ANSWER = (Message("assistant", "the answer\nis two"),)
DIALOGUE = (
    *QUESTION,
    Message("assistant", "one two"),
    Message("user", "and three?"),
    Message("assistant", "three, of course"),
    Message("user", "why?"),
    *ANSWER,
)


@cache
def family(name: str) -> Template:
    source = FAMILIES[name][0]
    if name in ("plain", "raw"):
        return Template.of(support.byte_tokenizer(), source)
    return Template.of(support.byte_tokenizer(source))


def text_of(template: Template, ids: Sequence[int]) -> str:
    return template.tokenizer.decode(list(ids))


def counted(template: Template, completion: TokenCompletion) -> str:
    return text_of(template, [token for token, counts in zip(completion.ids, completion.mask, strict=True) if counts])


def special_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    return [token for token in ids if token in tokenizer.added_tokens_decoder and token in tokenizer.all_special_ids]


@pytest.mark.parametrize("name", FAMILIES)
def test_exactly_what_the_assistant_wrote_counts(name: str) -> None:
    template, (_, end, lead) = family(name), FAMILIES[name]
    completion = template.completion(QUESTION, ANSWER)
    assert all(completion.mask)
    assert text_of(template, completion.ids) == lead + ANSWER[0].content + end


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"endless"}))
def test_in_a_dialogue_every_answer_counts_and_nothing_between_them(name: str) -> None:
    template, (_, end, lead) = family(name), FAMILIES[name]
    completion = template.completion(QUESTION, DIALOGUE[1:])
    answers = [message.content for message in DIALOGUE if message.role == "assistant"]
    assert counted(template, completion) == "".join(lead + answer + end for answer in answers)
    assert "why?" in text_of(template, completion.ids)
    assert completion.ids[-1] in template.stop_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_of_every_later_turn_is_the_beginning_of_the_training_tokens(name: str) -> None:
    template = family(name)
    dialogue = template.prompt_ids(QUESTION) + template.completion(QUESTION, DIALOGUE[1:]).ids
    for turn in (1, 3, 5):
        prompt = template.prompt_ids(DIALOGUE[:turn])
        assert dialogue[: len(prompt)] == prompt


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_is_the_one_transformers_gives(name: str) -> None:
    """The same ids for a question; the same text for a dialogue, whose answers are tokenised on their own here."""
    template = family(name)
    for turn in (1, 3, 5):
        messages = [{"role": message.role, "content": message.content} for message in DIALOGUE[:turn]]
        expected = template.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert text_of(template, template.prompt_ids(DIALOGUE[:turn])) == text_of(template, expected)
        assert turn > 1 or list(template.prompt_ids(DIALOGUE[:1])) == expected


@pytest.mark.parametrize("name", KEEPS_CONTENT)
def test_text_that_looks_like_control_tokens_or_templates_stays_text(name: str) -> None:
    template, (_, end, lead) = family(name), FAMILIES[name]

    @properties
    @given(hostile_texts, hostile_texts)
    def check(question: str, answer: str) -> None:
        harmless, hostile = (Message("user", "one"),), (Message("user", "one" + question),)
        prompt = template.prompt_ids(hostile)
        tokenizer = template.tokenizer
        assert special_ids(tokenizer, prompt) == special_ids(tokenizer, template.prompt_ids(harmless))
        assert text_of(template, prompt).count("one" + question) == 1
        completion = template.completion(hostile, (Message("assistant", answer),))
        assert special_ids(tokenizer, completion.ids) == [tokenizer.convert_tokens_to_ids(end)]
        assert text_of(template, completion.ids) == lead + answer + end
        assert template.decode(completion.ids) == answer

    check()


@pytest.mark.parametrize("name", ["chatml", "mistral", "plain"])
def test_hostile_dialogues_keep_the_prefix_and_the_mask(name: str) -> None:
    template, (_, end, lead) = family(name), FAMILIES[name]

    @properties
    @given(st.lists(hostile_texts, min_size=4, max_size=4))
    def check(texts: list[str]) -> None:
        dialogue = tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))
        completion = template.completion(dialogue[:1], dialogue[1:])
        whole = template.prompt_ids(dialogue[:1]) + completion.ids
        later = template.prompt_ids(dialogue[:3])
        assert whole[: len(later)] == later
        assert counted(template, completion) == lead + texts[1] + end + lead + texts[3] + end

    check()


@pytest.mark.parametrize("changed", ["nothing", "truncation", "padding", "split_special_tokens"])
def test_ids_are_those_of_the_tokenizers_own_encode(changed: str) -> None:
    """Also after others have asked the tokenizer, which then keeps how it was asked."""
    template = Template.of(support.byte_tokenizer(support.CHATML))
    tokenizer = template.tokenizer

    @settings(max_examples=40, derandomize=True, deadline=None)
    @given(hostile_texts)
    def check(text: str) -> None:
        if changed == "truncation":
            tokenizer("a b c d", truncation=True, max_length=1)
        elif changed == "padding":
            tokenizer("a", padding="max_length", max_length=50)
        elif changed == "split_special_tokens":
            tokenizer.split_special_tokens = False
            tokenizer("a")
            tokenizer.split_special_tokens = True
        found = template._encode_text("<|im_end|>" + text)
        assert found == tokenizer.encode("<|im_end|>" + text, add_special_tokens=False)

    check()


def test_a_tokenizer_with_an_encode_of_its_own_is_asked() -> None:
    tokenizer = support.byte_tokenizer(support.CHATML)

    tokenizer.__class__ = type("Own", (type(tokenizer),), {"encode": lambda _, text, **__: [1, 2]})
    assert Template.of(tokenizer)._encode_text("a") == [1, 2]


def test_overlapping_control_tokens_stay_text() -> None:
    tokenizer = support.byte_tokenizer(support.CHATML)
    tokenizer.add_tokens(["<<|im_end|>", "|im_end|>"], special_tokens=True)
    template = Template.of(tokenizer)
    prompt = template.prompt_ids((Message("user", "<<|im_end|>"),))
    plain = template.prompt_ids((Message("user", "one"),))
    assert special_ids(tokenizer, prompt) == special_ids(tokenizer, plain)
    assert text_of(template, prompt).count("<<|im_end|>") == 1


def test_a_thought_is_a_token_for_the_model_and_text_for_the_user() -> None:
    """<think> is an added token but not a special one, and the template below writes it itself."""
    template = Template.of(support.byte_tokenizer(support.STRIPPING))
    think = template.tokenizer.convert_tokens_to_ids("<think>")
    asked = (Message("user", "<think>one"),)
    assert think not in template.prompt_ids(asked)
    assert think in template.completion(asked, (Message("assistant", "<think>one</think>two"),)).ids


def test_runs_of_white_space_are_tokenised_as_ever() -> None:
    """The tokenizer has two newlines as an added token, and the template writes them too; they are still text."""
    template = family("llama 3")
    newlines = template.tokenizer.convert_tokens_to_ids("\n\n")
    headers = template.prompt_ids((Message("user", "one"),)).count(newlines)
    assert template.prompt_ids((Message("user", "one\n\ntwo <|eot_id|>"),)).count(newlines) == headers + 1


def test_an_end_of_turn_that_is_no_special_token_ends_turns_and_stays_text_in_them() -> None:
    tokenizer = support.byte_tokenizer(support.CHATML.replace("<|im_end|>", "<end><next>"))
    tokenizer.add_tokens(["<end>", "<next>"])
    template = Template.of(tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(template.stop_ids)) == ["<end>", "</s>"]
    answer = template.completion(QUESTION, (Message("assistant", "one<end>two"),))
    assert [token in template.stop_ids for token in answer.ids] == [False] * (len(answer.ids) - 1) + [True]
    assert template.decode(answer.ids) == "one<end>two"


def test_turns_without_a_loss_weight_do_not_count() -> None:
    template = family("chatml")
    turns = (Message("assistant", "one", learn=False), Message("user", "two"), Message("assistant", "three"))
    assert counted(template, template.completion(QUESTION, turns)) == "three<|im_end|>"


def test_an_empty_answer_is_the_end_of_turn_alone() -> None:
    for name in KEEPS_CONTENT:
        completion = family(name).completion(QUESTION, (Message("assistant", ""),))
        assert completion.ids[-1] in family(name).stop_ids
        assert family(name).decode(completion.ids) == ""


def test_a_template_that_ends_no_turn_gets_one_eos() -> None:
    template = family("endless")
    completion = template.completion(QUESTION, DIALOGUE[1:])
    assert template.stop_ids == (template.tokenizer.eos_token_id,)
    assert list(completion.ids).count(template.tokenizer.eos_token_id) == 1
    assert counted(template, completion) == "one two" + "three, of course" + "the answer\nis two</s>"


@pytest.mark.parametrize(
    ("name", "stops"),
    [("chatml", ["<|im_end|>", "</s>"]), ("phi", ["<|im_end|>", "</s>"]), ("mistral", ["</s>"]), ("raw", ["</s>"])],
)
def test_a_sampler_stops_at_the_end_of_turn_and_at_eos(name: str, stops: list[str]) -> None:
    template = family(name)
    assert template.tokenizer.convert_ids_to_tokens(list(template.stop_ids)) == stops


def test_decoding_stops_at_the_first_stop_token() -> None:
    template = family("plain")
    answer = template.completion(QUESTION, ANSWER).ids
    assert template.decode(answer + answer) == ANSWER[0].content
    assert template.decode(answer[:-1]) == ANSWER[0].content


def test_special_tokens_a_model_samples_are_not_part_of_its_text() -> None:
    template = family("chatml")
    header = template.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert template.decode((header, *template.completion(QUESTION, ANSWER).ids)) == ANSWER[0].content


@pytest.mark.parametrize("choice", ["plain", "raw"])
def test_bos_stands_once_where_the_tokenizer_would_add_one(choice: str) -> None:
    with_bos = Template.of(support.byte_tokenizer(add_bos=True), choice)
    without = Template.of(support.byte_tokenizer(), choice)
    bos = with_bos.tokenizer.bos_token_id
    for turn in (1, 3, 5):
        assert with_bos.prompt_ids(DIALOGUE[:turn]) == (bos, *without.prompt_ids(DIALOGUE[:turn]))
    assert with_bos.completion(QUESTION, ANSWER) == without.completion(QUESTION, ANSWER)


@pytest.mark.parametrize("name", ["llama 3", "mistral", "gemma"])
def test_a_template_that_writes_bos_gets_no_second_one(name: str) -> None:
    tokenizer = support.byte_tokenizer(FAMILIES[name][0], add_bos=True)
    prompt = Template.of(tokenizer).prompt_ids(DIALOGUE[:5])
    assert prompt[0] == tokenizer.bos_token_id
    assert prompt.count(tokenizer.bos_token_id) == 1


def test_raw_text_is_prompt_and_completion_and_eos() -> None:
    template = family("raw")
    prompt, completion = (Message("user", "one tw"),), (Message("assistant", "o three"),)
    assert text_of(template, template.prompt_ids(prompt)) == "one tw"
    assert text_of(template, template.completion(prompt, completion).ids) == "o three</s>"


def test_an_empty_prompt_is_the_start_token() -> None:
    assert family("raw").prompt_ids(()) == (family("raw").tokenizer.bos_token_id,)
    scratch = Template.of(train_tokenizer([], vocab_size=300), "raw")
    assert scratch.prompt_ids(()) == (scratch.tokenizer.eos_token_id,)
    assert scratch.prompt_ids((Message("user", ""),)) == (scratch.tokenizer.eos_token_id,)


def test_tokenizers_that_put_a_space_in_front_do_so_only_at_the_very_start() -> None:
    """In "[/INST] the answer" the answer is one "▁the" and one "▁answer", as in a text tokenised whole."""
    template = Template.of(support.prefix_tokenizer(support.MISTRAL))
    answer = template.completion(QUESTION, (Message("assistant", "the answer"),))
    assert template.tokenizer.convert_ids_to_tokens(list(answer.ids)) == ["▁the", "▁answer", "</s>"]
    assert template.decode(answer.ids) == "the answer"
    raw = Template.of(support.prefix_tokenizer(), "raw")
    for text in ("the answer", " the answer", "\n\n\nthe answer", "\n"):
        assert raw.decode(raw.completion(QUESTION, (Message("assistant", text),)).ids) == text


def test_hostile_texts_survive_a_tokenizer_that_puts_a_space_in_front() -> None:
    template = Template.of(support.prefix_tokenizer(), "raw")

    @properties
    @given(hostile_texts)
    def check(text: str) -> None:
        text = text.replace("▁", "_")  # that character is this tokenizer's way to write a space
        completion = template.completion(QUESTION, (Message("assistant", text),))
        assert template.decode(completion.ids) == text
        assert special_ids(template.tokenizer, completion.ids) == [template.tokenizer.eos_token_id]

    check()


@pytest.mark.parametrize("choice", ["auto", "plain", "raw", "file"])
def test_the_template_travels_with_the_tokenizer(choice: str, tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text(support.CHATML)
    template = Template.of(support.byte_tokenizer(), str(tmp_path / "template.jinja") if choice == "file" else choice)
    template.tokenizer.save_pretrained(tmp_path / "saved")
    reloaded = Template.of(AutoTokenizer.from_pretrained(tmp_path / "saved"))
    assert reloaded.prompt_ids(DIALOGUE[:5]) == template.prompt_ids(DIALOGUE[:5])
    assert reloaded.completion(QUESTION, DIALOGUE[1:]) == template.completion(QUESTION, DIALOGUE[1:])
    assert reloaded.stop_ids == template.stop_ids


def test_auto_prefers_the_template_of_the_tokenizer() -> None:
    assert "<|im_start|>" in text_of(family("chatml"), family("chatml").prompt_ids(QUESTION))
    assert text_of(family("plain"), Template.of(support.byte_tokenizer()).prompt_ids(QUESTION)).startswith("User: ")
    own = Template.of(support.byte_tokenizer(support.CHATML), "plain")
    assert text_of(own, own.prompt_ids(QUESTION)).startswith("User: ")


def test_a_template_that_drops_earlier_thoughts_is_told_apart() -> None:
    template = Template.of(support.byte_tokenizer(support.STRIPPING))
    thoughtful = (Message("assistant", "<think>so</think>one"), Message("user", "two"), *ANSWER)
    plain_answers = (Message("assistant", "<think></think>one"),)
    assert not template.keeps_turns(QUESTION, thoughtful)
    assert template.keeps_turns(QUESTION, plain_answers)
    with pytest.raises(DataError, match="rewrites or drops"):
        template.completion(QUESTION, thoughtful)
    last = template.completion((*QUESTION, *thoughtful[:2]), ANSWER)
    assert text_of(template, last.ids) == "<think></think>the answer\nis two<|im_end|>"
    assert template.decode(last.ids) == ANSWER[0].content
    assert "so" not in text_of(template, template.prompt_ids((*QUESTION, *thoughtful[:2])))


@pytest.mark.parametrize(
    ("name", "turns"),
    [("gemma", ("system", "user")), ("mistral", ("system", "user")), ("mistral", ("user", "user"))],
)
def test_turns_a_template_refuses_are_one_clear_error(name: str, turns: tuple[str, ...]) -> None:
    messages = tuple(Message(role, "one") for role in turns)
    with pytest.raises(DataError, match=rf"refuses the turns \({', '.join(turns)}\): (no system|roles must)"):
        family(name).prompt_ids(messages)


def test_a_completion_begins_with_the_assistant() -> None:
    with pytest.raises(DataError, match="begins with user: expected an assistant turn"):
        family("chatml").completion(QUESTION, QUESTION)


def test_half_a_character_is_one_clear_error() -> None:
    with pytest.raises(DataError, match=r"user turn has half of a character .*'\\ud83d'.* at character 4"):
        family("chatml").prompt_ids((Message("user", "one \ud83d"),))


def test_templates_that_cannot_work_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"asks for one with .*<think>"):
        Template.of(support.byte_tokenizer(support.FORCED_THOUGHT))
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}")
    with pytest.raises(ConfigError, match=r"broken\.jinja .*must render a user turn"):
        Template.of(support.byte_tokenizer(), str(tmp_path / "broken.jinja"))
    with pytest.raises(ConfigError, match="neither auto, plain or raw nor a readable jinja file"):
        Template.of(support.byte_tokenizer(), str(tmp_path / "missing.jinja"))
    no_eos = support.byte_tokenizer(support.ENDLESS)
    no_eos.eos_token = None
    with pytest.raises(ConfigError, match="an answer has no end"):
        Template.of(no_eos)
