"""ROUGE, diversity, repetition and length against counts made by hand."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.measures.text import (
    distinct_n,
    duplicate_fraction,
    num_words,
    repetition,
    rouge,
    rouge_l,
    rouge_n,
    self_similarity,
    word_shares,
    words,
)

quick = settings(max_examples=50, derandomize=True, deadline=None)
sentences = st.lists(st.sampled_from("a b c d".split()), max_size=7).map(" ".join)


def test_rouge_of_a_sentence_with_a_word_left_out() -> None:
    """5 of 5 and 5 of 6 words: F1 10 / 11. Pairs: the-cat, on-the, the-mat are shared, cat-on is not: 3 of 4 and 3 of
    5, F1 6 / 9. The answer is a subsequence of the reference: 5 of 5 and 5 of 6 again."""
    scores = rouge("the cat on the mat", "the cat sat on the mat")
    assert [scores.rouge_1, scores.rouge_2, scores.rouge_l] == pytest.approx([10 / 11, 6 / 9, 10 / 11])


def test_repeating_a_word_of_the_reference_earns_nothing() -> None:
    """ "the" counts twice at most, as in the reference: 2 of 7 and 2 of 6 words."""
    assert rouge_n("the the the the the the the", "the cat sat on the mat", 1) == pytest.approx(4 / 13)


def test_the_longest_common_subsequence_respects_order() -> None:
    """ "c b a" shares all words with "a b c" but only one in order: 1 of 3."""
    assert rouge_l("c b a", "a b c") == pytest.approx(1 / 3)
    assert rouge_n("c b a", "a b c", 1) == 1.0


def test_chinese_is_compared_by_characters() -> None:
    """Five of six characters in order; of 5 and 4 pairs of characters, 天气 气很 are shared, 今天 likewise: 3."""
    scores = rouge("今天天气好", "今天天气很好")
    assert words("今天天气好") == list("今天天气好")
    assert [scores.rouge_1, scores.rouge_2, scores.rouge_l] == pytest.approx([10 / 11, 6 / 9, 10 / 11])


def test_mixed_text_splits_into_words_and_characters() -> None:
    assert words("Don't use GPT2在中国, ｏｋ? 東京タワー_x") == [
        "don", "t", "use", "gpt2", "在", "中", "国", "ok", "東", "京", "タ", "ワ", "ー", "x",
    ]  # fmt: skip
    assert words("Größe café, naïve") == ["größe", "café", "naïve"]
    assert num_words("  one, two;three!  ") == 3


@pytest.mark.parametrize(("answer", "reference"), [("", "a b"), ("a b", ""), ("", ""), ("?!", "..."), ("a", "b")])
def test_nothing_in_common_scores_zero(answer: str, reference: str) -> None:
    scores = rouge(answer, reference)
    assert (scores.rouge_1, scores.rouge_2, scores.rouge_l) == (0.0, 0.0, 0.0)


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """By trying all subsequences of `a`, longest first."""
    for length in range(len(a), 0, -1):
        for chosen in itertools.combinations(a, length):
            rest = iter(b)
            if all(token in rest for token in chosen):
                return length
    return 0


@quick
@given(a=sentences, b=sentences)
def test_rouge_l_agrees_with_trying_all_subsequences(a: str, b: str) -> None:
    length = longest_common_subsequence(a.split(), b.split())
    total = len(a.split()) + len(b.split())
    assert rouge_l(a, b) == pytest.approx(2 * length / total if total else 0.0)
    assert rouge_l(a, b) == rouge_l(b, a)


@quick
@given(a=sentences, n=st.integers(1, 3))
def test_a_text_is_identical_to_itself(a: str, n: int) -> None:
    assert rouge_n(a, a, n) == (1.0 if len(a.split()) >= n else 0.0)


def test_distinct_pairs_over_all_answers() -> None:
    """a-b b-c | a-b b-d: three different pairs of four, and no pair spans two answers."""
    assert distinct_n(["a b c", "a b d"], 2) == 0.75
    assert distinct_n(["a", "b"], 2) == 0.0
    assert distinct_n([], 1) == 0.0


def test_repetition_within_an_answer() -> None:
    """ "very good" said four times has 8 words, 6 triples, of which very-good-very and good-very-good are all different
    ones: 4 of 6 repeat."""
    assert repetition("very good very good very good very good") == pytest.approx(4 / 6)
    assert repetition("all of these words are different") == 0.0
    assert repetition("too short") == 0.0
    assert repetition("no no no no", n=1) == 0.75


def test_a_duplicate_is_an_answer_that_another_prompt_got_too() -> None:
    assert duplicate_fraction([["Yes!", "no"], ["yes", "maybe"], ["so", "so", "so"]]) == pytest.approx(2 / 7)
    assert duplicate_fraction([]) == 0.0


def test_likeness_is_the_mean_over_neighbours_and_then_over_prompts() -> None:
    """a b c and a b d share one of two 2-grams each: F1 = 1/2. Equal answers count 1 even without a 2-gram."""
    assert self_similarity([["a b c", "a b d"], ["yes", "yes"]]) == pytest.approx((0.5 + 1) / 2)
    assert self_similarity([["a b c", "a b d", "x y"]]) == pytest.approx(0.25)
    assert self_similarity([["only one"], []]) is None


def test_a_word_counts_once_a_text() -> None:
    assert word_shares(["Well, well", "well then", "no"]) == {"well": 2 / 3, "then": 1 / 3, "no": 1 / 3}
