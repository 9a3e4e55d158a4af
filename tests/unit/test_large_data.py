"""Training on data larger than memory: the same items in the same order, the same bits learned, and nothing a row."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.data import shelf, token_store
from accord.data.convert import as_kind
from accord.data.order import batch_indices
from accord.data.read import read_groups
from accord.data.shelf import Lazy, in_memory, joined, kept, mapped, numbered, shelved
from accord.data.templates import Template
from accord.data.token_store import StoredTokens, store_tokens
from accord.data.tokenise import Tokenised, tokenise_groups
from accord.errors import DataError
from accord.methods.corpus import Part, split_holdout
from accord.methods.offline import OfflineTrainer
from accord.models.scratch_tokenizer import train_tokenizer
from accord.records import Completion, Group, Message, Origin, TokenCompletion, TokenGroup
from stages_support import answers_to, logged, run_stage_on, saved_model, weights_of

LIMITS: dict[str, Any] = {"max_tokens": 64, "max_prompt_tokens": 12, "loss_on": "assistant"}


@pytest.fixture(autouse=True)
def on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Everything goes to files, in stretches of a few groups, made two at a time."""
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shelf, "MEMORY_BYTES", 0)
    monkeypatch.setattr(token_store, "SHARD_CHARACTERS", 200)
    monkeypatch.setattr(token_store, "BLOCK_BYTES", 2000)
    return tmp_path / "cache"


def pairs(count: int) -> list[Group]:
    return [
        answers_to(
            f"ask {i}", (f"yes {i % 7}", {"rank": 0}), (f"no {i % 5}", {"rank": 1}), origin=Origin("pairs.jsonl", i + 1)
        )
        for i in range(count)
    ]


# --- groups ----------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=[]), max_size=8)  # half surrogate pairs too
turns = st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), texts, st.booleans()), max_size=3).map(
    tuple
)
numbers = st.none() | st.floats(allow_nan=False)
answers = st.builds(
    Completion, turns, st.none() | st.integers(0, 9), numbers, st.none() | st.booleans(),
    st.none() | st.tuples(st.floats(allow_nan=False)),
)  # fmt: skip
groups_of = st.builds(
    Group, turns, st.lists(answers, max_size=3).map(tuple), numbers, numbers, st.none() | texts,
    st.none() | st.builds(Origin, st.sampled_from(["a", "b"]), st.integers(1, 1 << 40)),
)  # fmt: skip


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.lists(groups_of, min_size=1, max_size=70))
def test_a_group_comes_back_from_the_file_as_it_was(groups: list[Group]) -> None:
    stored = shelved(groups)
    assert not in_memory(stored) and len(stored) == len(groups)
    for back in (list(stored), [stored[i] for i in range(len(groups))], list(stored[:]), list(stored[::-1])[::-1]):
        assert back == groups and [g.origin for g in back] == [g.origin for g in groups]
    assert stored[-1] == groups[-1]
    with pytest.raises(IndexError):
        stored[len(groups)]


def test_few_groups_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "MEMORY_BYTES", 1 << 20)
    assert shelved(pairs(3)) == tuple(pairs(3))
    assert not in_memory(shelved(pairs(2000)))


def test_views_of_a_file_hold_what_the_same_views_of_a_list_hold() -> None:
    groups = pairs(100)
    stored = shelved(groups)
    for items in (groups, stored):
        some = kept(items, lambda group: group.prompt_id % 3 > 0)
        made: list[Sequence[Any]] = [
            some, mapped(some, lambda group: group.prompt), numbered(some, lambda i, group: (i, group)),
            joined(some, some), *split_holdout(items, 0.3), as_kind(items, "sft").groups,
            as_kind(items, "ranked").groups,
        ]  # fmt: skip
        if items is groups:
            expected = [list(view) for view in made]
        else:
            assert all(not in_memory(view) for view in made)
            assert [list(view) for view in made] == expected
            assert [[view[i] for i in range(len(view))] for view in made] == expected
    assert as_kind(stored, "ranked").groups is stored  # what stays as it is takes no second place on the disk


def test_a_disk_that_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACCORD_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="ACCORD_CACHE"):
        shelved(pairs(3))


# --- tokens ----------------------------------------------------------------------------------------------------------


def mixed() -> list[Group]:
    """With dialogues, an answer that is too long, prompts that are, and an answer that is not learned."""
    long = answers_to("ask long", ("yes " * 40, {"rank": 0}), ("no", {"rank": 1}), origin=Origin("pairs.jsonl", 98))
    said = tuple(Message(role, "yes 1", learn) for role, learn in (("assistant", False), ("user", True)))
    dialogue = Group(
        (Message("user", "ask"),),
        (
            Completion(
                (*said, Message("assistant", "no")),
            ),
        ),
    )
    cut = answers_to("ask " * 30, ("yes", {"rank": 0}), ("no", {"rank": 1}), origin=Origin("pairs.jsonl", 99))
    return [*pairs(40), long, dialogue, cut, *pairs(3)]


@pytest.fixture
def template() -> Template:
    texts = [m.content for g in pairs(40) for m in (*g.prompt, *(c.messages[0] for c in g.completions))]
    return Template.of(train_tokenizer(texts, vocab_size=300))


def same(stored: StoredTokens, groups: Sequence[Group], template: Template, **limits: Any) -> None:
    expected = tokenise_groups(groups, template, **(LIMITS | limits))
    found = list(stored.pairs)
    assert [tokens for _, tokens in found] == list(expected.groups)
    assert [tokens.origin for _, tokens in found] == [tokens.origin for tokens in expected.groups]
    assert [group for group, _ in found] == [groups[source] for source in expected.sources]
    assert (dict(stored.cuts), stored.dropped) == (dict(expected.cuts), len(expected.dropped))
    assert stored.first_dropped == (str(expected.dropped[0]) if expected.dropped else "")
    assert [stored.pairs[i] for i in range(len(found))] == found


def test_stored_tokens_are_those_made_in_memory(template: Template, on_disk: Path) -> None:
    groups = shelved(mixed())
    stored = store_tokens(groups, template, on_disk / "tokens", **LIMITS)
    same(stored, mixed(), template)
    assert stored.dropped == 1 and stored.first_dropped.startswith("pairs.jsonl:98") and len(stored.cuts) == 1
    assert len(list((on_disk / "tokens").glob("*.tokens"))) > 3
    # The row that is named is where it is now, not where it was when its tokens were made.
    moved = [*pairs(1), *(group.at(Origin("moved.jsonl", line)) for line, group in enumerate(mixed()[1:], 2))]
    same(store_tokens(shelved(moved), template, on_disk / "tokens", **LIMITS), moved, template)
    nameless = [group.at(None) for group in mixed()]
    assert store_tokens(nameless, template, on_disk / "tokens", **LIMITS).first_dropped.startswith("group 40: ")


def test_stretches_have_few_rows(template: Template, on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "SHARD_ROWS", 3)
    same(store_tokens(shelved(mixed()), template, on_disk / "tokens", **LIMITS), mixed(), template)
    assert len(list((on_disk / "tokens").glob("*.tokens"))) == len(mixed()) // 3 + 1


def test_a_group_that_is_refused_is_named_by_its_number(on_disk: Path) -> None:
    plain = Template.of(train_tokenizer(["ask yes no"], vocab_size=300))
    half = answers_to("ask \ud800", ("yes", {}))
    with pytest.raises(DataError, match="group 33: "):
        store_tokens([group.at(None) for group in (*pairs(33), half)], plain, on_disk / "tokens", **LIMITS)


def test_tokens_are_made_once(template: Template, on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that was killed goes on where it was; a file that grew, or moved, costs its new rows only."""
    made: list[int] = []

    def counting(groups: Sequence[Group], *arguments: Any, **limits: Any) -> Any:
        made.append(len(groups))
        if len(made) == 3:
            raise KeyboardInterrupt
        return tokenise_groups(groups, *arguments, **limits)

    monkeypatch.setattr(token_store, "tokenise_groups", counting)
    monkeypatch.setattr(token_store, "BLOCK_BYTES", 1 << 20)  # a stretch at a time
    folder = on_disk / "tokens"
    with pytest.raises(KeyboardInterrupt):
        store_tokens(shelved(pairs(80)), template, folder, **LIMITS)
    same(store_tokens(shelved(pairs(80)), template, folder, **LIMITS), pairs(80), template)
    assert sum(made) == 80 + made[2]
    before = len(made)
    moved = [group.at(Origin("elsewhere.jsonl", 1)) for group in pairs(80)]
    same(store_tokens(shelved(moved), template, folder, **LIMITS), moved, template)
    assert len(made) == before
    same(store_tokens(shelved(pairs(120)), template, folder, **LIMITS), pairs(120), template)
    assert 40 <= sum(made[before:]) < 80
    for changed in ({"max_tokens": 63}, {"loss_on": "all"}):
        same(store_tokens(shelved(pairs(20)), template, folder, **(LIMITS | changed)), pairs(20), template, **changed)
    raw = Template.of(template.tokenizer, "raw")
    same(store_tokens(shelved(pairs(20)), raw, folder, **LIMITS), pairs(20), raw)


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_file_is_made_again(template: Template, on_disk: Path, damage: str) -> None:
    folder = on_disk / "tokens"
    store_tokens(shelved(pairs(40)), template, folder, **LIMITS)
    for path in folder.glob("*.tokens"):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes({"cut": content[:-3], "flipped": content, "emptied": b""}[damage])
    same(store_tokens(shelved(pairs(40)), template, folder, **LIMITS), pairs(40), template)


# --- stages ----------------------------------------------------------------------------------------------------------

STAGES: dict[str, dict[str, Any]] = {
    "sft": {"loss_on": "all"}, "reward": {"heads": 2}, "dpo": {}, "orpo": {}, "kto": {}, "ilql": {},
}  # fmt: skip


def trained(folder: Path, model: Path, stage: str, groups: Sequence[Group], steps: int = 4) -> tuple[Any, ...]:
    part = Part(shelved(groups), {"pairs": "1"})
    section = STAGES[stage] | {"max_steps": steps, "checkpoint_every": 1, "epochs": 2}
    summary = run_stage_on(folder, model, part, stage, section)
    rows = [
        {name: value for name, value in row.items() if not name.startswith(("time/", "system/"))}
        for row in logged(folder, stage)
    ]
    return weights_of(folder, stage), rows, summary["headline"], summary["account"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_learns_the_same_bits_from_a_file(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in its third step and started again, too."""
    groups = [*pairs(40), answers_to("ask 1", ("no 1", {"rank": 0}), ("yes 1", {"rank": 1}))]
    model = saved_model(tmp_path / "model", groups, seed=1)
    step = OfflineTrainer.step

    def interrupted(trainer: Any, number: int) -> Any:
        if number == 3:
            monkeypatch.setattr(OfflineTrainer, "step", step)
            raise RuntimeError("killed")
        return step(trainer, number)

    monkeypatch.setattr(OfflineTrainer, "step", interrupted)
    with pytest.raises(RuntimeError, match="killed"):
        trained(tmp_path / "file", model, stage, groups)
    from_file = trained(tmp_path / "file", model, stage, groups)
    monkeypatch.setattr(shelf, "MEMORY_BYTES", 1 << 30)
    assert trained(tmp_path / "list", model, stage, groups) == from_file


@pytest.mark.parametrize(("words", "rows"), [(2, 150), (300, 8)])
def test_what_a_group_takes_is_known_before_its_tokens_are_made(words: int, rows: int) -> None:
    """Short rows are objects, long ones are tokens: seven times their text."""
    known = "a pear an apple some plums and the old quince tree".split()
    sentences = [" ".join(known[i * j % 11] for j in range(words)) for i in range(1, rows + 1)]
    template = Template.of(train_tokenizer(sentences, vocab_size=600))
    limits = LIMITS | {"max_tokens": 10_000, "max_prompt_tokens": None}
    tokenise_groups(pairs(1), template, **limits)
    tracemalloc.start()
    groups = [
        Group(
            (Message("user", f"{text}!"),),
            tuple(Completion((Message("assistant", f"{text}{i}"),), rank=i) for i in range(2)),
            origin=Origin("pairs.jsonl", 1),
        )
        for text in sentences
    ]
    tokens = tokenise_groups(groups, template, **limits).groups
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(tokens) == rows
    assert 0.7 < sum(map(shelf.object_bytes, groups)) / taken < 1.5


def quickly(groups: Sequence[Group], *_: Any, first: int = 0, **__: Any) -> Tokenised:
    """Tokens of their own for each group, in no time."""
    made: list[TokenGroup] = []
    for number, group in enumerate(groups, first):
        ids = tuple(range(1000 + number, 1010 + number))
        made.append(TokenGroup(ids, (TokenCompletion(ids, (True,) * len(ids)),), group.prompt_id))
    return Tokenised(tuple(made), tuple(range(first, first + len(made))), (), ())


def test_making_tokens_takes_few_bytes_a_row(
    tmp_path: Path, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In stretches as long as they are: what grows is the record of a row, of about 100 bytes here, until its stretch
    is written. As Python's objects a row and its tokens take more than 1 kB."""
    monkeypatch.undo()
    monkeypatch.setattr(token_store, "tokenise_groups", quickly)
    many = answers_to("ask", ("yes", {}))
    peaks, told = {}, list[int]()
    for rows in (2000, 2000, 8000):
        groups = Lazy(rows, lambda i: many.at(Origin("rows.jsonl", i + 1)))
        told.clear()
        tracemalloc.start()
        store_tokens(groups, template, tmp_path / str(len(peaks)), told.append, **LIMITS)
        peaks[rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (peaks[8000] - peaks[2000]) / 6000 < 250
    assert len(told) > 5 and told == sorted(told) and told[-1] == 8000  # a bar that moves


def test_what_is_loaded_takes_few_bytes_a_row(
    tmp_path: Path, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file on the disk to batches: masks, ends and positions, and of each stretch (50 rows here) its file. As
    Python's objects a row takes 2 kB."""

    monkeypatch.setattr(token_store, "tokenise_groups", quickly)
    monkeypatch.setattr(token_store, "SHARD_CHARACTERS", 2000)

    def load(path: Path) -> None:
        groups = as_kind(read_groups(path).groups, "ranked").groups
        train, _ = split_holdout(groups, 0.1)
        items = kept(store_tokens(train, template, tmp_path / path.stem, **LIMITS).pairs, lambda pair: bool(pair))
        assert isinstance(items, Lazy)
        batches = [[items[i] for i in batch_indices(step, len(items), 8, 1)] for step in (1, 2)]
        assert all(len(batch) == 8 for batch in batches)

    peaks = {}
    for rows in (300, 300, 1200):
        path = tmp_path / f"{rows}.jsonl"
        made = [{"prompt": f"ask {i}", "chosen": f"yes {i % 7} " * 4, "rejected": "no"} for i in range(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
        tracemalloc.start()
        load(path)
        peaks[rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (peaks[1200] - peaks[300]) / 900 < 300
