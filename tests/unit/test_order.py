"""The order of the data: every item once an epoch, a fresh order each time, and nothing to remember but the step."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from accord.data.order import PASS_TOKENS, batch_indices, epochs_done, micro_batches, num_steps
from accord.randomness import permutation

few = settings(max_examples=50, derandomize=True, deadline=None)


@few
@given(items=st.integers(1, 40), size=st.integers(1, 12), epochs=st.integers(1, 4))
def test_every_item_is_seen_once_an_epoch(items: int, size: int, epochs: int) -> None:
    steps = num_steps(items, size, epochs, None)
    batches = [batch_indices(step, items, size, 7, "sft") for step in range(1, steps + 1)]
    assert all(1 <= len(batch) <= size for batch in batches)
    per_epoch = len(batches) // epochs
    for epoch in range(epochs):
        seen = [i for batch in batches[epoch * per_epoch : (epoch + 1) * per_epoch] for i in batch]
        assert sorted(seen) == list(range(items))


def test_each_epoch_each_seed_and_each_stage_has_an_order_of_its_own() -> None:
    orders = [
        batch_indices(1, 50, 50, 0, "sft"),
        batch_indices(2, 50, 50, 0, "sft"),
        batch_indices(1, 50, 50, 1, "sft"),
        batch_indices(1, 50, 50, 0, "reward"),
    ]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert list(range(50)) not in orders


def test_the_order_depends_on_the_key_alone() -> None:
    later = batch_indices(9, 20, 6, 3, "sft")
    for step in range(1, 9):
        batch_indices(step, 20, 6, 3, "sft")
    assert batch_indices(9, 20, 6, 3, "sft") == later


def test_the_number_of_steps_counts_the_smaller_last_batch_and_is_cut_by_max_steps() -> None:
    assert num_steps(10, 4, 1, None) == 3
    assert num_steps(10, 4, 2, None) == 6
    assert num_steps(8, 4, 2, None) == 4
    assert num_steps(10, 4, 2, 5) == 5
    assert num_steps(10, 4, 1, 5) == 3


@few
@given(items=st.integers(1, 40), size=st.integers(1, 12), epochs=st.integers(1, 4))
def test_passes_over_the_data_are_items_seen_by_items_there_are(items: int, size: int, epochs: int) -> None:
    seen = 0
    for step in range(1, num_steps(items, size, epochs, None) + 1):
        seen += len(batch_indices(step, items, size, 0))
        assert abs(epochs_done(step, items, size) - seen / items) < 1e-12
    assert seen == epochs * items


@few
@given(
    items=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 4)), min_size=1, max_size=20),
    budget=st.integers(16, 120),
)
def test_micro_batches_hold_every_item_once_within_the_budget(items: list[tuple[int, int]], budget: int) -> None:
    """An item is (tokens of its longest row, rows); a pass costs its longest row times all its rows."""
    passes = micro_batches(items, lambda item: item[0], lambda item: item[1], budget)
    assert Counter(item for group in passes for item in group) == Counter(items)
    for group in passes:
        cost = max(length for length, _ in group) * sum(rows for _, rows in group)
        assert cost <= budget or len(group) == 1
    lengths = [length for group in passes for length, _ in group]
    assert lengths == sorted(lengths, reverse=True)


@few
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_a_budget_for_everything_makes_one_pass(lengths: list[int]) -> None:
    passes = micro_batches(lengths, lambda length: length, lambda _: 1, max(lengths) * len(lengths))
    assert len(passes) == 1


def test_items_of_one_length_keep_their_order_and_fill_passes_to_the_budget() -> None:
    passes = micro_batches(list("abcdefg"), lambda _: 5, lambda _: 2, 30)
    assert passes == [["a", "b", "c"], ["d", "e", "f"], ["g"]]


@few
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 3)), min_size=1, max_size=8), st.integers(200, 1200))
def test_no_other_cut_of_the_sorted_items_runs_fewer_tokens(items: list[tuple[int, int]], budget: int) -> None:
    """Against all 2^(n - 1) ways to cut: the cost is rows times longest row of each pass, or where rows are packed what
    all of them take of one if that is less, and a constant a pass."""

    def cost(passes: list[list[tuple[int, int]]], packed: bool) -> float:
        costs = []
        for part in passes:
            tokens = sum(rows for _, rows in part) * max(length for length, _ in part)
            if packed:
                tokens = min(tokens, sum(map(together, part)))
            costs.append(tokens + PASS_TOKENS if tokens <= budget or len(part) == 1 else float("inf"))
        return sum(costs)

    def together(item: tuple[int, int]) -> int:
        return item[0] * item[1] - item[0] // 2 + 10

    ordered = sorted(items, reverse=True, key=lambda item: item[0])
    ways = []
    for cuts in range(2 ** (len(ordered) - 1)):
        passes: list[list[tuple[int, int]]] = [[ordered[0]]]
        for place, item in enumerate(ordered[1:]):
            if cuts >> place & 1:
                passes.append([item])
            else:
                passes[-1].append(item)
        ways.append((cost(passes, False), cost(passes, True)))
    for packed, least in enumerate(map(min, zip(*ways, strict=True))):
        found = micro_batches(items, lambda i: i[0], lambda i: i[1], budget, together if packed else None)
        assert cost(found, bool(packed)) == least


def test_an_epoch_is_the_keyed_permutation_in_slices() -> None:
    """So a seed means the same batches however the order is kept."""
    for epoch in (0, 1):
        batches = [batch_indices(4 * epoch + step, 23, 6, 5, "sft") for step in (1, 2, 3, 4)]
        assert [i for batch in batches for i in batch] == permutation(23, "order", 5, "sft", epoch)
        assert all(type(i) is int for batch in batches for i in batch)
