"""The data of a recipe as groups: read, converted where a stage needs another kind, split by prompt. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from accord.config import DataConfig, Source
from accord.data.convert import as_kind, convert_groups
from accord.data.read import Watch, read_groups
from accord.data.shelf import selected, shelved
from accord.errors import DataError
from accord.records import Group, GroupKind, content_id

__all__ = ["Corpus", "Part", "read_corpus", "split_holdout"]

HASH_RANGE = 1 << 63


@dataclass(frozen=True, slots=True)
class Part:
    """Groups for one purpose. `sources` says what they came from (path -> content hash); `notes` what was done to
    them."""

    groups: Sequence[Group] = ()
    sources: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, groups: Sequence[Group], name: str, notes: Sequence[str] = ()) -> Part:
        """Groups that are in memory already; their content stands for a file's."""
        blob = [
            [
                [[m.role, m.content, m.learn] for m in g.prompt],
                [[[m.content for m in c.messages], c.rank, c.score, c.label, c.rewards] for c in g.completions],
                [g.margin, g.soft_label, g.reference],
            ]
            for g in groups
        ]
        return cls(tuple(groups), {name: f"{content_id(blob):016x}"}, tuple(f"{name}: {note}" for note in notes))


@dataclass(frozen=True, slots=True)
class Corpus:
    """What the stages draw from; an empty part is filled from another one, and says so."""

    sft: Part = Part()
    preferences: Part = Part()
    prompts: Part = Part()
    ptx: Part = Part()
    evaluation: Part = Part()

    def demonstrations(self) -> Part:
        """For SFT: `data.sft`, else the chosen answers of `data.preferences`."""
        if self.sft.groups:
            return _converted(self.sft, "sft")
        if self.preferences.groups:
            return _converted(self.preferences, "sft", "data.sft is not set: the chosen answers of data.preferences")
        raise DataError("no demonstrations: set `data.sft` (or `data.preferences`, whose chosen answers would serve)")

    def imitated(self) -> Part:
        """For PPO-ptx: `data.ptx`, else the demonstrations."""
        if self.ptx.groups:
            return _converted(self.ptx, "sft")
        try:
            return self.demonstrations()
        except DataError as error:
            raise DataError(
                "`ppo.ptx_coef` mixes demonstrations into the updates, and there are none: set `data.ptx`, `data.sft` "
                "or `data.preferences`, or `ppo.ptx_coef` to 0"
            ) from error

    def comparisons(self) -> Part:
        """For the reward model, DPO and ORPO: groups with ranked completions."""
        if not self.preferences.groups:
            raise DataError("no comparisons: set `data.preferences` to a file of pairs, rankings or ratings")
        return _converted(self.preferences, "ranked")

    def ratings(self) -> Part:
        """For ILQL: answers that are marked good or bad, or scored."""
        if not self.preferences.groups:
            raise DataError("no ratings: set `data.preferences` to a file of marked or scored answers, or of pairs")
        return _converted(self.preferences, "rated")

    def labelled(self) -> Part:
        """For KTO: single answers, each marked good or bad; the two answers of a pair become one of each."""
        rated = self.ratings()
        answers = sum(len(group.completions) for group in rated.groups)
        marked = shelved(
            Group(group.prompt, (answer,), origin=group.origin)
            for group in rated.groups
            for answer in group.completions
            if answer.label is not None
        )
        if not marked:
            raise DataError(
                "the answers of `data.preferences` have scores, and kto learns from marks: give each answer a `label`, "
                "true or false (for instance, whether its score is above a threshold of yours), or use ilql, which "
                "learns from scores; rankings fit dpo and orpo"
            )
        notes: tuple[str, ...] = ()
        if len(marked) < answers:
            notes += (f"{answers - len(marked)} answers with a score and no label left out",)
        soft = sum(g.kind == "pairs" and g.soft_label not in (None, 1.0) for g in self.preferences.groups)
        if soft:
            notes += (f"{soft} soft labels of pairs are taken as certain",)
        return Part(marked, rated.sources, (*rated.notes, *notes))

    def all_prompts(self) -> Part:
        """For PPO: distinct prompts of `data.prompts`, else of `data.preferences`, else of `data.sft`."""
        for part, name in ((self.prompts, ""), (self.preferences, "data.preferences"), (self.sft, "data.sft")):
            if part.groups:
                note = f"data.prompts is not set: the prompts of {name}" if name else ""
                return _distinct(_converted(part, "prompts", note))
        raise DataError("no prompts: set `data.prompts`, `data.preferences` or `data.sft`")

    def reference_answers(self) -> dict[int, tuple[str, ...]]:
        """The reference answers of each prompt that has any, by prompt id: the different ones of the first kind it has
        of those given as such, demonstrations, and the best answers of comparisons and ratings.

        Kinds are not mixed: a demonstration is a person's, and a chosen answer may be a model's."""
        given: dict[int, dict[str, None]] = {}
        shown: dict[int, dict[str, None]] = {}
        chosen: dict[int, dict[str, None]] = {}
        for group in (g for part in (self.prompts, self.sft, self.preferences) for g in part.groups):
            if group.reference is not None:
                given.setdefault(group.prompt_id, {})[group.reference] = None
            found = shown if group.kind == "sft" else chosen
            for made in convert_groups((group,), "sft", Counter(), Counter()):
                for answer in made.completions:
                    if len(answer.messages) == 1:
                        found.setdefault(group.prompt_id, {})[answer.text] = None
        return {prompt_id: tuple(answers) for prompt_id, answers in (chosen | shown | given).items()}

    def evaluation_prompts(self) -> Part | None:
        """`data.evaluation` as distinct prompts, or None: then the held-out part of `all_prompts` serves."""
        return _distinct(_converted(self.evaluation, "prompts")) if self.evaluation.groups else None


def read_corpus(data: DataConfig, watch: Watch = iter) -> Corpus:
    """Read every source; `watch` shows how far it is. Raises DataError naming `file:line` of what cannot be used."""
    return Corpus(
        sft=_read(data.sft, data.lenient, watch),
        preferences=_read(data.preferences, data.lenient, watch),
        prompts=_read(data.prompts, data.lenient, watch),
        ptx=_read(data.ptx, data.lenient, watch),
        evaluation=_read(data.evaluation, data.lenient, watch),
    )


def split_holdout(groups: Sequence[Group], share: float) -> tuple[Sequence[Group], Sequence[Group]]:
    """(training, held-out) by a hash of the prompt, so that a prompt is on the same side in every file and run."""
    fractions = (content_id(["holdout", group.prompt_id]) / HASH_RANGE for group in groups)
    held_out = np.fromiter((fraction < share for fraction in fractions), dtype=np.bool_, count=len(groups))
    return selected(groups, ~held_out), selected(groups, held_out)


def _read(sources: tuple[Source, ...], lenient: bool, watch: Watch) -> Part:
    parts: list[Sequence[Group]] = []
    hashes: dict[str, str] = {}
    notes: list[str] = []
    for source in sources:
        result = read_groups(source.path, format=source.format, fields=source.map, lenient=lenient, watch=watch)
        used = result.groups[: source.limit]
        parts.append(used)
        hashes[source.path] = result.fingerprint
        limited = f", the first {len(used)} used" if len(used) < len(result.groups) else ""
        notes.append(f"{source.path}: {result.format}, {result.rows} rows, {len(result.groups)} usable groups{limited}")
        if result.problem_count:
            notes.append(f"{source.path}: {result.problem_count} rows left out; the first: {result.problems[0]}")
        notes.extend(f"{source.path}: {note}" for note in result.notes)
    return Part(parts[0] if len(parts) == 1 else shelved(chain.from_iterable(parts)), hashes, tuple(notes))


def _converted(part: Part, kind: GroupKind, note: str = "") -> Part:
    try:
        conversion = as_kind(part.groups, kind)
    except DataError as error:
        raise DataError(f"{', '.join(part.sources)}: {error}") from error
    changed = tuple(
        f"{count:,} {_BECAME[came_from, kind]}"
        for came_from, count in conversion.changed
        if (came_from, kind) in _BECAME
    )
    dropped = tuple(f"{count:,} {reason} left out" for reason, count in conversion.dropped)
    return Part(conversion.groups, part.sources, (*part.notes, *((note,) if note else ()), *changed, *dropped))


# What is said of groups of one kind that serve as another. Prompts are told apart by the note of where they come from.
_BECAME: dict[tuple[GroupKind, GroupKind], str] = {
    ("pairs", "sft"): "pairs give their chosen answers",
    ("ranked", "sft"): "rankings give their best answers",
    ("rated", "sft"): "rated answers or lists give the good or best answers",
    ("rated", "ranked"): "lists of rated answers are ranked by score or label",
    ("pairs", "rated"): "pairs give a desirable and an undesirable answer each",
    ("ranked", "rated"): "rankings give the scores of their answers",
}


def _distinct(part: Part) -> Part:
    ids = np.fromiter((group.prompt_id for group in part.groups), dtype=np.int64, count=len(part.groups))
    first = np.zeros(len(ids), dtype=np.bool_)
    first[np.unique(ids, return_index=True)[1]] = True
    repeated = len(ids) - int(first.sum())
    note = (f"{repeated} repeated prompts are used once",) if repeated else ()
    return Part(selected(part.groups, first), part.sources, (*part.notes, *note))
