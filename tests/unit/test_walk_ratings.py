"""What exact ILQL reaches on randomwalks, against anchors, a second computation and limits; and the rated walks."""

from __future__ import annotations

import numpy as np
import pytest

from accord.tasks.randomwalks import ALPHABET, MAX_NODES, RandomWalks

WALKS = {seed: RandomWalks(seed) for seed in (1000, 1002)}


def expectile(values: np.ndarray, tau: float) -> float:
    """By bisection of its slope."""
    low, high = values.min(), values.max()
    for _ in range(100):
        middle = (low + high) / 2
        slope = (np.where(values > middle, tau, 1 - tau) * (values - middle)).sum()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return (low + high) / 2


def by_recursion(walks: RandomWalks, tau: float, gamma: float, beta: float) -> float:
    """Mean over the prompts of the optimality of the shaped policy, walk by walk from the front."""
    scores = np.array([walks.optimality(walk) for walk in walks.walks])
    mean, std = scores.mean(), scores.std()

    def value(start: str, node: str, nodes: int) -> float:
        if node == "a":
            return (walks.path_optimality(start, nodes) - mean) / std
        if nodes == MAX_NODES:
            return -mean / std
        if (start, node, nodes) not in valued:
            valued[start, node, nodes] = expectile(np.array(q_of(start, node, nodes)), tau)
        return valued[start, node, nodes]

    def q_of(start: str, node: str, nodes: int) -> list[float]:
        if (start, node, nodes) not in known:
            known[start, node, nodes] = [gamma * value(start, n, nodes + 1) for n in walks.next_letters(node)]
        return known[start, node, nodes]

    known: dict[tuple[str, str, int], list[float]] = {}
    valued: dict[tuple[str, str, int], float] = {}

    def reach(start: str, node: str, nodes: int) -> float:
        if node == "a":
            return walks.path_optimality(start, nodes)
        if nodes == MAX_NODES:
            return 0.0
        if (start, node, nodes) not in reached:
            q = np.array(q_of(start, node, nodes))
            weights = np.exp(beta * (q - q.max()))
            shares = weights / weights.sum()
            after = [reach(start, n, nodes + 1) for n in walks.next_letters(node)]
            reached[start, node, nodes] = float((shares * after).sum())
        return reached[start, node, nodes]

    reached: dict[tuple[str, str, int], float] = {}
    return float(np.mean([reach(letter, letter, 1) for letter in walks.prompts]))


@pytest.mark.parametrize("seed", [1000, 1002])
@pytest.mark.parametrize(("tau", "gamma", "beta"), [(0.8, 0.99, 1.0), (0.8, 0.99, 4.0), (0.5, 0.9, 2.0)])
def test_exact_ilql_is_what_a_recursion_from_the_front_finds(seed: int, tau: float, gamma: float, beta: float) -> None:
    found = WALKS[seed].shaped_optimality(tau=tau, gamma=gamma, beta=beta)
    assert found == pytest.approx(by_recursion(WALKS[seed], tau, gamma, beta), abs=1e-9)


@pytest.mark.parametrize(("seed", "random_walk"), [(1000, 0.34623), (1002, 0.78517)])
def test_beta_0_is_the_random_walk_and_a_large_one_takes_shortest_paths(seed: int, random_walk: float) -> None:
    walks = WALKS[seed]
    assert walks.shaped_optimality(tau=0.8, gamma=0.99, beta=0.0) == pytest.approx(random_walk, abs=1e-5)
    assert walks.shaped_optimality(tau=0.99, gamma=0.99, beta=1e4) == pytest.approx(1.0)


def test_rated_walks_carry_their_optimality() -> None:
    walks = WALKS[1000]
    groups = walks.rated_groups()
    assert [g.kind for g in groups] == ["rated"] * 1000
    for group, walk in zip(groups, walks.walks, strict=True):
        assert group.prompt[0].content + group.completions[0].text == walk
        assert group.completions[0].score == walks.optimality(walk)
    assert np.mean([g.completions[0].score for g in groups]) == pytest.approx(0.35151, abs=1e-5)
    assert {walk[0] for walk in walks.walks} <= set(ALPHABET)
