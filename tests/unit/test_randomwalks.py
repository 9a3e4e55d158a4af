"""The randomwalks benchmark: bit-identical to the original's graph and walks, and its exact quantities.

Expected numbers were computed once, independently, by enumerating all paths of the original benchmark's graphs.
"""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from accord.tasks.randomwalks import ALPHABET, RandomWalks, regularised_optimum

WALKS = {seed: RandomWalks(seed) for seed in (1000, 1002)}
W = WALKS[1000]


def _clone(walks: RandomWalks) -> np.ndarray:
    """The maximum-likelihood Markov chain of the walks: transition counts, normalised."""
    counts = np.zeros((21, 21))
    for walk in walks.walks:
        for a, b in pairwise(walk):
            counts[ALPHABET.index(a), ALPHABET.index(b)] += 1
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


@pytest.mark.parametrize(
    ("seed", "draws", "edges", "histogram", "first", "after_b"),
    [
        (1000, 3, 51, {2: 2, 3: 6, 4: 9, 5: 3}, ("sda", "fda", "ebjnbdtkna"), "dju"),
        (1002, 7, 42, {2: 3, 3: 7, 4: 6, 5: 4}, ("oseotba", "qka", "jrmhnba"), "a"),
    ],
)
def test_the_graph_and_the_walks_are_the_original_ones(
    seed: int, draws: int, edges: int, histogram: dict[int, int], first: tuple[str, ...], after_b: str
) -> None:
    walks = WALKS[seed]
    assert walks.num_draws == draws
    assert walks.adjacency[1:].sum() == edges
    assert walks.next_letters("a") == "a"
    assert {n: int((walks.shortest[1:] == n).sum()) for n in sorted(set(walks.shortest[1:].tolist()))} == histogram
    assert walks.walks[:3] == first
    assert walks.next_letters("b") == after_b
    assert walks.prompts == tuple("bcdefghijklmnopqrstu")


@pytest.mark.parametrize(
    ("seed", "mean", "reached", "optimal", "zero", "nodes"),
    [(1000, 0.35151, 0.560, 0.184, 0.495, 7.735), (1002, 0.79018, 0.985, 0.539, 0.032, 4.870)],
)
def test_the_walks_score_as_published(
    seed: int, mean: float, reached: float, optimal: float, zero: float, nodes: float
) -> None:
    walks = WALKS[seed]
    scores = np.array([walks.optimality(walk) for walk in walks.walks])
    assert len(scores) == 1000
    assert scores.mean() == pytest.approx(mean, abs=5e-6)
    assert np.mean([walk.endswith("a") for walk in walks.walks]) == pytest.approx(reached, abs=1e-12)
    assert (np.mean(scores == 1), np.mean(scores == 0)) == pytest.approx((optimal, zero), abs=1e-12)
    assert np.mean([len(walk) for walk in walks.walks]) == pytest.approx(nodes, abs=1e-12)
    edges = {walk[i : i + 2] for walk in walks.walks for i in range(len(walk) - 1)}
    assert len(edges) == walks.adjacency[1:].sum()  # every edge occurs


@pytest.mark.parametrize(
    ("seed", "walk", "lowest", "highest", "clone", "greedy", "uniform"),
    [
        (1000, 0.34623, 0.2109, 0.6301, 0.35506, 0.1000, 0.00556),
        (1002, 0.78517, 0.5489, 1.0, 0.79493, 0.9090, 0.00800),
    ],
)
def test_markov_policies_score_exactly(
    seed: int, walk: float, lowest: float, highest: float, clone: float, greedy: float, uniform: float
) -> None:
    walks = WALKS[seed]
    goal = walks.goal_probabilities(walks.random_walk())
    per_prompt = (goal * walks.optimalities).sum(axis=1)
    assert walks.mean_optimality(goal) == pytest.approx(walk, abs=5e-6)
    assert (per_prompt.min(), per_prompt.max()) == pytest.approx((lowest, highest), abs=5e-5)
    counts = _clone(walks)
    assert walks.mean_optimality(walks.goal_probabilities(counts)) == pytest.approx(clone, abs=5e-6)
    best = np.eye(21)[counts.argmax(axis=1)]
    assert walks.mean_optimality(walks.goal_probabilities(best)) == pytest.approx(greedy, abs=5e-5)
    any_letter = np.full((21, 21), 1 / 21)
    assert walks.mean_optimality(walks.goal_probabilities(any_letter)) == pytest.approx(uniform, abs=5e-6)


@pytest.mark.parametrize(
    ("seed", "kl_coef", "optimality", "kl", "objective"),
    [
        (1000, 1.0, 0.5068, 0.0815, 0.4253),
        (1000, 0.5, 0.6623, 0.3128, 0.5059),
        (1000, 0.3, 0.8128, 0.7054, 0.6012),
        (1000, 0.2, 0.9070, 1.0865, 0.6897),
        (1000, 0.1, 0.9749, 1.5408, 0.8208),
        (1000, 0.05, 0.9954, 1.8189, 0.9045),
        (1000, 0.02, 1.0000, 1.9364, 0.9612),
        (1002, 1.0, 0.8359, 0.0243, 0.8115),
        (1002, 0.5, 0.8750, 0.0821, 0.8339),
        (1002, 0.3, 0.9126, 0.1808, 0.8584),
        (1002, 0.2, 0.9436, 0.3078, 0.8820),
        (1002, 0.1, 0.9835, 0.5855, 0.9250),
        (1002, 0.05, 0.9978, 0.7744, 0.9590),
        (1002, 0.02, 1.0000, 0.8311, 0.9834),
    ],
)
def test_the_optimum_against_the_random_walk(
    seed: int, kl_coef: float, optimality: float, kl: float, objective: float
) -> None:
    walks = WALKS[seed]
    optima = walks.optima(walks.goal_probabilities(walks.random_walk()), kl_coef)
    assert len(optima) == 20
    found = [np.mean([getattr(optimum, name) for optimum in optima]) for name in ("optimality", "kl", "objective")]
    assert found == pytest.approx([optimality, kl, objective], abs=6e-5)


def test_without_a_penalty_the_optimum_is_the_shortest_path() -> None:
    goal = W.goal_probabilities(W.random_walk())
    optima = W.optima(goal, 0.0)
    assert {optimum.objective for optimum in optima} == {1.0}
    shortest = [goal[i, W.shortest[ALPHABET.index(prompt)]] for i, prompt in enumerate(W.prompts)]
    assert [optimum.kl for optimum in optima] == pytest.approx(-np.log(shortest), abs=1e-12)


@pytest.mark.parametrize(("n", "expected"), [(4, 0.7527), (16, 0.9671), (32, 0.9904), (64, 0.9974), (128, 0.9997)])
def test_the_best_of_n_random_walks_scores_exactly(n: int, expected: float) -> None:
    """E[max] = sum over values of value * (P(all n <= value) - P(all n < value))."""
    goal = W.goal_probabilities(W.random_walk())
    means = []
    for probabilities, optimalities in zip(goal, W.optimalities, strict=True):
        below = 1 - probabilities[optimalities > 0].sum()
        mean = 0.0
        for value in sorted(set(optimalities[optimalities > 0])):
            upto = below + probabilities[optimalities == value].sum()
            mean += value * (upto**n - below**n)
            below = upto
        means.append(mean)
    assert np.mean(means) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ("sda", 1.0),  # the shortest path from s has 3 nodes
        ("sdaxyz", 1.0),  # what follows the goal is ignored
        ("susda", 5 / 7),  # 5 nodes where 3 are enough: (10 - 5) / (10 - 3)
        ("bda", 1.0),
        ("susa", 0.0),  # no edge from s to a
        ("susususda", 1 / 7),  # 9 nodes
        ("sususususda", 0.0),  # 11 nodes, all edges legal
        ("sd", 0.0),
        ("s", 0.0),
        ("", 0.0),
        ("sba", 0.0),
        ("dda", 0.0),  # only the first step is no edge
        ("sd?a", 0.0),
        ("?da", 0.0),
        ("a", 1.0),
        ("ab", 1.0),
        ("sdA", 0.0),
    ],
)
def test_edge_cases_of_the_score(sample: str, expected: float) -> None:
    assert W.optimality(sample) == pytest.approx(expected, abs=1e-12)


def test_a_walk_of_exactly_ten_nodes_scores_zero() -> None:
    """(10 - 10) / (10 - shortest) = 0 although it reaches the goal."""
    ten = [walk for walk in W.walks if len(walk) == 10 and walk.endswith("a")]
    nine = [walk for walk in W.walks if len(walk) == 9 and walk.endswith("a")]
    assert ten and nine
    assert {W.optimality(walk) for walk in ten} == {0.0}
    assert min(W.optimality(walk) for walk in nine) > 0


@pytest.mark.parametrize(("num_nodes", "expected"), [(9, 1.0), (10, 1.0), (11, 0.0)])
def test_a_start_ten_nodes_away_is_defined(num_nodes: int, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the shortest path has 10 nodes the formula is 0 / 0; taking it counts 1. Farther starts count 0."""
    line = np.zeros((21, 21), dtype=bool)
    path = [20, *range(num_nodes - 2, -1, -1)]
    for a, b in pairwise(path):
        line[a, b] = True
    line[[i for i in range(21) if i not in path], 0] = True
    line[0, 0] = True
    monkeypatch.setattr("accord.tasks.randomwalks._draw_adjacency", lambda _draw: (line, 1))
    walks = RandomWalks()
    assert walks.optimality("".join(ALPHABET[node] for node in path)) == expected
    assert not np.isnan(walks.optimalities).any()


def test_the_supervised_groups_split_each_walk_after_its_first_letter() -> None:
    groups = W.sft_groups()
    assert len(groups) == 1000
    assert [g.prompt[0].content + g.completions[0].text for g in groups] == list(W.walks)
    assert {(g.kind, len(g.prompt[0].content), g.prompt[0].role) for g in groups} == {("sft", 1, "user")}
    assert {g.completions[0].messages[0].role for g in groups} == {"assistant"}


def test_the_optimum_of_two_outcomes_is_the_logistic_one() -> None:
    """p = (1/4, 3/4), o = (1, 0), kl_coef = 1: Z = (e + 3)/4, mass e/(e + 3) on the first; KL = E - log Z."""
    found = regularised_optimum(np.array([0.25, 0.75]), np.array([1.0, 0.0]), 1.0)
    best = math.e / (math.e + 3)
    kl = best * math.log(best / 0.25) + (1 - best) * math.log((1 - best) / 0.75)
    assert (found.optimality, found.kl) == pytest.approx((best, kl), abs=1e-12)
    assert found.objective == pytest.approx(math.log((math.e + 3) / 4), abs=1e-12)
    assert found.objective == pytest.approx(found.optimality - found.kl, abs=1e-12)


def test_impossible_outcomes_do_not_count() -> None:
    for kl_coef in (0.0, 0.1):
        assert regularised_optimum(np.array([1.0, 0.0]), np.array([0.5, 1.0]), kl_coef).objective == pytest.approx(0.5)


def test_a_tiny_kl_coef_does_not_overflow() -> None:
    """As kl_coef falls to 0, the objective rises to the best outcome: 1 + kl_coef log p(best)."""
    found = regularised_optimum(np.array([0.25, 0.75]), np.array([1.0, 0.0]), 1e-4)
    assert found.objective == pytest.approx(1 + 1e-4 * math.log(0.25), abs=1e-12)


def test_the_task_needs_no_torch() -> None:
    code = "import accord.tasks.randomwalks as r, sys; r.RandomWalks(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
