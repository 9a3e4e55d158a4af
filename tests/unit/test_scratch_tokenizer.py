"""Tokenizers trained on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoTokenizer

from accord.errors import ConfigError
from accord.models.scratch_tokenizer import SPECIAL_TOKENS, train_tokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "天气很好，天气不好", "naïve café"] * 5
TOKENIZER = train_tokenizer(TEXTS, vocab_size=300)
TURNS = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.text() | st.sampled_from(TEXTS))
def test_any_text_comes_back_exactly(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert TOKENIZER.decode(ids) == text


def test_the_same_texts_give_the_same_tokenizer_in_any_order() -> None:
    again = train_tokenizer(reversed(TEXTS), vocab_size=300)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_padding_is_not_the_end_of_an_answer() -> None:
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4, 5]


def test_frequent_words_become_one_token_and_the_size_is_kept() -> None:
    assert len(TOKENIZER.encode("the")) == 1
    assert len(TOKENIZER) <= 300


def test_the_smallest_vocabulary_has_one_token_a_byte() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=262)
    assert len(tokenizer) == 262
    assert len(tokenizer.encode("abc天")) == 6


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size is 261, .* Set it to 262 or more"):
        train_tokenizer(TEXTS, vocab_size=261)


def test_a_saved_tokenizer_is_the_same_after_reloading(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.get_vocab() == TOKENIZER.get_vocab()
    assert reloaded.special_tokens_map == TOKENIZER.special_tokens_map
    assert reloaded.chat_template == TOKENIZER.chat_template
    for text in TEXTS:
        assert reloaded.encode(text) == TOKENIZER.encode(text)
    assert reloaded.apply_chat_template(TURNS, return_dict=False) == TOKENIZER.apply_chat_template(
        TURNS, return_dict=False
    )


def test_a_turn_is_its_marker_its_content_and_eos() -> None:
    rendered = TOKENIZER.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|user|>the cat<eos><|assistant|>sat<eos><|assistant|>"


def test_a_role_without_a_marker_is_refused() -> None:
    with pytest.raises(TemplateError, match="roles are system, user, assistant, tool, not critic"):
        TOKENIZER.apply_chat_template([{"role": "critic", "content": "no"}], tokenize=False)
