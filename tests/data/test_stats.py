"""Figures of a small file, each counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.data.stats import BINS, QUANTILES, data_stats, words
from accord.records import Completion, Group, Message


def make(prompt: str, *answers: tuple[str, dict], **rest) -> Group:
    made = tuple(Completion((Message("assistant", text),), **judged) for text, judged in answers)
    return Group((Message("user", prompt),), made, **rest)


PAIRS = [
    make("one two", ("longer", {"rank": 0}), ("short", {"rank": 1}), margin=1.0),
    make("one two", ("short", {"rank": 0}), ("longer", {"rank": 1}), margin=3.0),
    make("三", ("longer", {"rank": 0}), ("short", {"rank": 1})),
    make("one two", ("longer", {"rank": 0}), ("short", {"rank": 1})),
    make("x", ("a", {"rank": 0}), ("b", {"rank": 0})),
]


def test_counts_of_pairs() -> None:
    """Of five groups two repeat a prompt and one repeats all; of four pairs with a winner three prefer the longer."""
    stats = data_stats(PAIRS)
    assert (stats.groups, stats.kinds, stats.completions_per_group, stats.turns) == (5, {"pairs": 5}, {2: 5}, {2: 5})
    assert (stats.duplicate_prompts, stats.duplicate_groups, stats.ties) == (2, 1, 1)
    assert stats.chosen_longer_fraction == 0.75 and stats.desirable_fraction is None and stats.scores is None
    assert stats.margins is not None and (stats.margins.count, stats.margins.mean) == (2, 2.0)


def test_counts_of_labels_scores_and_languages() -> None:
    """说说说 has three CJK letters, abc def six others, and the answers one each: 3 of 11."""
    stats = data_stats([make("说说说", ("a", {"label": True})), make("abc def", ("b", {"label": False, "score": 2.0}))])
    assert stats.desirable_fraction == 0.5 and stats.scores is not None and stats.scores.mean == 2.0
    assert stats.cjk_fraction == pytest.approx(3 / 11)


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("one  two\nthree", 3), ("说一个质数", 5), ("用 Python 写", 3), ("用Python写", 3), ("café", 1)],
)
def test_words_count_spaces_and_cjk_characters(text: str, count: int) -> None:
    assert words(text) == count


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_distributions_agree_with_a_sorted_list(sizes: list[int]) -> None:
    lengths = data_stats([Group((Message("user", "x" * size),)) for size in sizes]).prompt_characters
    assert lengths is not None
    ordered = sorted(sizes)
    assert lengths.quantiles == tuple(ordered[round(q * (len(sizes) - 1))] for q in QUANTILES)
    assert lengths.mean == pytest.approx(sum(sizes) / len(sizes))
    assert sum(lengths.histogram) == len(sizes) and len(lengths.histogram) == BINS
    assert lengths.histogram[-1] >= sizes.count(max(sizes)) or min(sizes) == max(sizes)
    assert lengths.histogram[0] >= sizes.count(min(sizes))
