"""What a file of groups holds, in numbers: kinds, lengths, turns, duplicates, biases, languages. One pass.

Lengths are kept as 32-bit numbers and duplicates as 8-byte hashes, so a million rows take tens of megabytes.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from accord.records import Completion, Group, GroupKind, Message, content_id

__all__ = ["DataStats", "Lengths", "data_stats", "words"]

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS = 12


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


def _is_cjk(char: str) -> bool:
    return "぀" <= char <= "ヿ" or "㐀" <= char <= "鿿" or "가" <= char <= "힣" or "\U00020000" <= char <= "\U0003134f"


class _Counts:
    """The running totals of one pass."""

    def __init__(self) -> None:
        self.kinds: Counter[GroupKind] = Counter()
        self.turns: Counter[int] = Counter()
        self.sizes: Counter[int] = Counter()
        self.lengths = {name: array("I") for name in ("prompt_c", "prompt_w", "completion_c", "completion_w")}
        self.margins, self.scores = array("d"), array("d")
        self.prompts: set[int] = set()
        self.contents: set[int] = set()
        self.groups = self.pairs = self.longer = self.ties = self.labels = self.desirable = 0
        self.letters = self.cjk = 0

    def add(self, group: Group) -> None:
        self.groups += 1
        self.kinds[group.kind] += 1
        self.sizes[len(group.completions)] += 1
        self.prompts.add(group.prompt_id)
        self.contents.add(content_id([_plain(group.prompt), *(_plain(item.messages) for item in group.completions)]))
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
        self.lengths[f"{what}_c"].append(sum(len(message.content) for message in messages))
        self.lengths[f"{what}_w"].append(sum(words(message.content) for message in messages))
        for message in messages:
            self.letters += sum(map(str.isalpha, message.content))
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
            prompt_characters=_lengths(self.lengths["prompt_c"]),
            prompt_words=_lengths(self.lengths["prompt_w"]),
            completion_characters=_lengths(self.lengths["completion_c"]),
            completion_words=_lengths(self.lengths["completion_w"]),
            turns=dict(sorted(self.turns.items())),
            completions_per_group=dict(sorted(self.sizes.items())),
            duplicate_prompts=self.groups - len(self.prompts),
            duplicate_groups=self.groups - len(self.contents),
            chosen_longer_fraction=self.longer / self.pairs if self.pairs else None,
            ties=self.ties,
            desirable_fraction=self.desirable / self.labels if self.labels else None,
            margins=_lengths(self.margins),
            scores=_lengths(self.scores),
            cjk_fraction=self.cjk / self.letters if self.letters else None,
        )


def _plain(messages: tuple[Message, ...]) -> list[list[str]]:
    return [[message.role, message.content] for message in messages]


def _lengths(values: array[int] | array[float]) -> Lengths | None:
    """Quantiles by the nearest rank: the value at position round(q (n - 1)) in increasing order."""
    if not values:
        return None
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    histogram = [0] * BINS
    for value in ordered:
        histogram[min(int((value - low) / (high - low) * BINS), BINS - 1) if high > low else 0] += 1
    quantiles = tuple(float(ordered[round(q * (len(ordered) - 1))]) for q in QUANTILES)
    return Lengths(len(ordered), sum(ordered) / len(ordered), quantiles, tuple(histogram))
