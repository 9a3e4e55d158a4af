"""What a file of groups holds, in numbers: kinds, lengths, turns, duplicates, biases, languages. One pass.

What grows with the rows is 16 bytes a group (63-bit hashes, to count duplicates exactly but for a chance of n^2 / 2^64
that two of n contents share one) and 8 bytes a margin or score. Lengths are counted by value.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from string import ascii_letters

import numpy as np
from numpy.typing import NDArray

from accord.records import Completion, Group, GroupKind, Message, content_id

__all__ = ["DataStats", "Lengths", "data_stats", "words"]

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS = 12
LETTERS = ascii_letters.encode()


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution: values at QUANTILES (minimum to maximum), and counts in BINS equal bins between them."""

    count: int
    mean: float
    quantiles: tuple[float, ...]
    histogram: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DataStats:
    """All figures about one file. Fractions are in [0, 1]; None where nothing can be counted.

    duplicate_prompts         groups whose prompt was seen before
    duplicate_groups          groups whose prompt and answers were seen before
    chosen_longer_fraction    pairs whose chosen answer has more characters; far from 1/2 a reward model learns length
    ties                      pairs and ranked lists in which all ranks are equal
    desirable_fraction        of the completions with a label
    margins, scores           distributions of the values that are there
    cjk_fraction              of the letters: Chinese, Japanese, Korean; the rest is Latin and other alphabets
    """

    groups: int
    kinds: dict[GroupKind, int]
    prompt_characters: Lengths | None
    prompt_words: Lengths | None
    completion_characters: Lengths | None
    completion_words: Lengths | None
    turns: dict[int, int]
    completions_per_group: dict[int, int]
    duplicate_prompts: int
    duplicate_groups: int
    chosen_longer_fraction: float | None
    ties: int
    desirable_fraction: float | None
    margins: Lengths | None
    scores: Lengths | None
    cjk_fraction: float | None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def data_stats(groups: Iterable[Group]) -> DataStats:
    counts = _Counts()
    for group in groups:
        counts.add(group)
    return counts.done()


def words(text: str) -> int:
    """Words between spaces; each Chinese, Japanese or Korean character counts as a word of its own."""
    cjk = sum(map(_is_cjk, text)) if not text.isascii() else 0
    return cjk + len("".join(" " if _is_cjk(char) else char for char in text).split()) if cjk else len(text.split())


def _letters(text: str) -> int:
    if text.isascii():
        return len(text) - len(text.encode().translate(None, LETTERS))
    return sum(map(str.isalpha, text))


def _is_cjk(char: str) -> bool:
    return "぀" <= char <= "ヿ" or "㐀" <= char <= "鿿" or "가" <= char <= "힣" or "\U00020000" <= char <= "\U0003134f"


class _Counts:
    """The running totals of one pass."""

    def __init__(self) -> None:
        self.kinds: Counter[GroupKind] = Counter()
        self.turns: Counter[int] = Counter()
        self.sizes: Counter[int] = Counter()
        self.lengths = {name: Counter[int]() for name in ("prompt_c", "prompt_w", "completion_c", "completion_w")}
        self.margins, self.scores = array("d"), array("d")
        self.prompts, self.contents = array("q"), array("q")
        self.groups = self.pairs = self.longer = self.ties = self.labels = self.desirable = 0
        self.letters = self.cjk = 0

    def add(self, group: Group) -> None:
        self.groups += 1
        self.kinds[group.kind] += 1
        self.sizes[len(group.completions)] += 1
        self.prompts.append(group.prompt_id)
        self.contents.append(content_id([_plain(group.prompt), *(_plain(item.messages) for item in group.completions)]))
        if group.prompt:
            self._measure("prompt", group.prompt)
        for item in group.completions:
            self._measure("completion", item.messages)
            self._judgement(item)
        longest = max((len(item.messages) for item in group.completions), default=0)
        self.turns[sum(message.role != "system" for message in group.prompt) + longest] += 1
        if group.margin is not None:
            self.margins.append(group.margin)
        if group.kind in ("pairs", "ranked"):
            self._preference(group)

    def _measure(self, what: str, messages: tuple[Message, ...]) -> None:
        self.lengths[f"{what}_c"][sum(len(message.content) for message in messages)] += 1
        self.lengths[f"{what}_w"][sum(words(message.content) for message in messages)] += 1
        for message in messages:
            self.letters += _letters(message.content)
            self.cjk += sum(map(_is_cjk, message.content)) if not message.content.isascii() else 0

    def _judgement(self, item: Completion) -> None:
        if item.score is not None:
            self.scores.append(item.score)
        if item.label is not None:
            self.labels += 1
            self.desirable += item.label

    def _preference(self, group: Group) -> None:
        ranks = {item.rank for item in group.completions}
        if len(ranks) == 1:
            self.ties += 1
        elif group.kind == "pairs":
            best, worst = sorted(group.completions, key=lambda item: item.rank or 0)
            self.pairs += 1
            self.longer += len(best.text) > len(worst.text)

    def done(self) -> DataStats:
        return DataStats(
            groups=self.groups,
            kinds=dict(self.kinds),
            prompt_characters=_counted(self.lengths["prompt_c"]),
            prompt_words=_counted(self.lengths["prompt_w"]),
            completion_characters=_counted(self.lengths["completion_c"]),
            completion_words=_counted(self.lengths["completion_w"]),
            turns=dict(sorted(self.turns.items())),
            completions_per_group=dict(sorted(self.sizes.items())),
            duplicate_prompts=_repeated(self.prompts),
            duplicate_groups=_repeated(self.contents),
            chosen_longer_fraction=self.longer / self.pairs if self.pairs else None,
            ties=self.ties,
            desirable_fraction=self.desirable / self.labels if self.labels else None,
            margins=_listed(self.margins),
            scores=_listed(self.scores),
            cjk_fraction=self.cjk / self.letters if self.letters else None,
        )


def _plain(messages: tuple[Message, ...]) -> list[list[str]]:
    return [[message.role, message.content] for message in messages]


def _repeated(hashes: array[int]) -> int:
    """How many of the hashes stood before."""
    ordered = np.array(hashes, dtype=np.int64)
    ordered.sort()
    return int(np.count_nonzero(ordered[1:] == ordered[:-1]))


def _counted(counts: Counter[int]) -> Lengths | None:
    values = np.array(sorted(counts), dtype=np.int64)
    return _lengths(values, np.array([counts[value] for value in values.tolist()], dtype=np.int64))


def _listed(values: array[float]) -> Lengths | None:
    return _lengths(*np.unique(np.array(values, dtype=np.float64), return_counts=True))


def _lengths(values: NDArray[np.int64] | NDArray[np.float64], counts: NDArray[np.int64]) -> Lengths | None:
    """Of different values in increasing order, each `counts` times. Quantiles by the nearest rank: the value at
    position round(q (n - 1)) in increasing order."""
    if not len(values):
        return None
    low, high, count = values[0].item(), values[-1].item(), int(counts.sum())
    bins = (
        ((values - low) / (high - low) * BINS).astype(np.int64).clip(max=BINS - 1) if high > low else [0] * len(values)
    )
    histogram = np.bincount(bins, weights=counts, minlength=BINS).astype(np.int64)
    places = np.searchsorted(counts.cumsum(), [round(q * (count - 1)) for q in QUANTILES], side="right")
    mean = float((values * counts).sum()) / count
    return Lengths(count, mean, tuple(float(value) for value in values[places]), tuple(histogram.tolist()))
