"""What can be counted in a text without a model: ROUGE, diversity, repetition, length. Pure Python.

A token is a lower-case word (letters and digits) or, where a script puts no spaces between words (Chinese characters,
kana), one character. Punctuation is no token. There is no stemming.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = [
    "Rouge",
    "distinct_n",
    "duplicate_fraction",
    "novelty",
    "num_words",
    "repetition",
    "rouge",
    "rouge_l",
    "rouge_n",
    "self_similarity",
    "word_shares",
    "words",
]

# Kana, Chinese characters with their extensions and compatibility forms.
_SPACELESS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"[{_SPACELESS}]|(?:(?![{_SPACELESS}])[^\W_])+")


@dataclass(frozen=True, slots=True)
class Rouge:
    """F1 scores in [0, 1] of an answer against a reference: tokens, pairs of tokens, longest common subsequence."""

    rouge_1: float
    rouge_2: float
    rouge_l: float


def words(text: str) -> list[str]:
    """The tokens of a text, as defined at the top of this file; full-width forms count as the ordinary ones."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


def num_words(text: str) -> int:
    """Length of a text in tokens, comparable between models with different tokenizers."""
    return len(words(text))


def rouge(answer: str, reference: str) -> Rouge:
    """All three ROUGE scores of one answer.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries". Departures: sentence level, no stemming,
        Chinese and Japanese by characters.
    Tested by: tests/unit/test_text_metrics.py
    """
    return Rouge(rouge_n(answer, reference, 1), rouge_n(answer, reference, 2), rouge_l(answer, reference))


def rouge_n(answer: str, reference: str, n: int) -> float:
    """F1 of the n-grams both share, each counted as often as in the text with fewer. 0 where one has no n-gram."""
    ours, theirs = Counter(_ngrams(words(answer), n)), Counter(_ngrams(words(reference), n))
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of tokens. 0 where one has no token."""
    ours, theirs = words(answer), words(reference)
    return _f1(_common_subsequence(ours, theirs), len(ours), len(theirs))


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Share of different n-grams among all n-grams of all texts: 1 = nothing said twice. 0 when there is no n-gram.

    Falls with the amount of text, so compare equal numbers of answers of similar length only.
    Source: Li et al. 2016, arXiv:1510.03055, section 5.3. Tested by: tests/unit/test_text_metrics.py
    """
    grams = [gram for text in texts for gram in _ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(text: str, n: int = 3) -> float:
    """Share of a text's n-grams that repeat an earlier one, in [0, 1): 0 = no repetition, or fewer than n tokens.

    Tested by: tests/unit/test_text_metrics.py
    """
    grams = _ngrams(words(text), n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def novelty(text: str, others: Iterable[str], n: int = 2) -> float:
    """Share of a text's different n-grams that none of the others has, in [0, 1]; 0 where it has no n-gram.

    Tested by: tests/unit/test_text_metrics.py
    """
    ours = set(_ngrams(words(text), n))
    theirs = {gram for other in others for gram in _ngrams(words(other), n)}
    return len(ours - theirs) / len(ours) if ours else 0.0


def duplicate_fraction(answers: Sequence[Sequence[str]]) -> float:
    """Share of answers that some OTHER prompt got too, word for word; `answers` holds one list a prompt. 0 without any.

    Saying one thing twice to one prompt is no duplicate here: that is what `self_similarity` sees.
    Tested by: tests/unit/test_text_metrics.py
    """
    told = [{" ".join(words(text)) for text in group} for group in answers]
    prompts_told = Counter(text for group in told for text in group)
    flat = [" ".join(words(text)) for group in answers for text in group]
    return sum(prompts_told[text] > 1 for text in flat) / len(flat) if flat else 0.0


def self_similarity(answers: Sequence[Sequence[str]]) -> float | None:
    """How alike the answers to one prompt are, in [0, 1]: mean ROUGE-2 F1 of neighbouring answers, equal ones counting
    1, averaged over prompts with at least two; None where there is no such prompt.

    It stands in for self-BLEU, whose cost grows with the square of the answers to a prompt.
    Tested by: tests/unit/test_text_metrics.py
    """
    means = [
        sum(1.0 if a == b else rouge_n(a, b, 2) for a, b in pairwise(group)) / (len(group) - 1)
        for group in answers
        if len(group) > 1
    ]
    return sum(means) / len(means) if means else None


def word_shares(texts: Sequence[str]) -> dict[str, float]:
    """The share of texts that hold each word. Tested by: tests/unit/test_text_metrics.py"""
    counts = Counter(word for text in texts for word in set(words(text)))
    return {word: count / len(texts) for word, count in counts.items()}


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _f1(common: int, ours: int, theirs: int) -> float:
    """2PR / (P + R) with P = common / ours and R = common / theirs."""
    return 2 * common / (ours + theirs) if common else 0.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence; a row of the table is the bits of one integer, so each token of `b`
    costs a few integer operations. Source: Hyyrö 2004, "Bit-parallel LCS-length computation revisited"."""
    positions: dict[str, int] = {}
    for i, token in enumerate(a):
        positions[token] = positions.get(token, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        matched = row & positions.get(token, 0)
        row = (row + matched | row - matched) & full
    return len(a) - row.bit_count()
