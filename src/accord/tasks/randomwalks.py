"""The randomwalks benchmark: reach node 'a' of a random directed graph in as few steps as possible, one letter a node.

Everything about it can be computed without sampling: the graph, the walks to learn from, the score of any string, and,
for any policy that looks only at the last letter, its expected score and the best trade of score against KL. The graph
and the walks are bit-identical to the original benchmark's, which fixes the order of the random draws.
Legend: N = 21 nodes, S = 20 starts (every letter but 'a'), L = 11 path lengths in nodes (0 to 10, the start included).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from accord.records import Completion, Group, Message

__all__ = [
    "ALPHABET",
    "GOAL",
    "MAX_NODES",
    "RandomWalks",
    "RegularisedOptimum",
    "best_of_n_weights",
    "regularised_optimum",
]

ALPHABET = "abcdefghijklmnopqrstu"
GOAL = "a"
MAX_NODES = 10  # a walk visits at most 10 nodes, so a policy writes at most 9 letters after the first

_EDGE_PROBABILITY = 0.1
_NUM_WALKS = 1000


@dataclass(frozen=True, slots=True)
class RegularisedOptimum:
    """The best policy under E[optimality] - kl_coef * KL(policy || reference): its two terms and the objective."""

    optimality: float
    kl: float  # nats per sequence
    objective: float


def regularised_optimum(probabilities: np.ndarray, optimalities: np.ndarray, kl_coef: float) -> RegularisedOptimum:
    """The optimum over all policies, from the reference's distribution over outcomes.

        pi*(x) = p(x) exp(o(x) / kl_coef) / Z,  Z = sum p exp(o / kl_coef)
        objective = kl_coef log Z,  kl = E*[o] / kl_coef - log Z
        kl_coef = 0: all mass on the best possible outcome, objective = max o where p > 0, kl = -log p(best)

    Outcomes of equal optimality may be merged, because the optimum keeps their proportions.

    Shapes: probabilities (X,), at least 0, summing to 1; optimalities (X,); kl_coef >= 0.
    """
    possible = probabilities > 0
    p, o = probabilities[possible], optimalities[possible]
    best = o.max()
    if kl_coef == 0:
        return RegularisedOptimum(float(best), float(-np.log(p[o == best].sum())), float(best))
    weights = p * np.exp((o - best) / kl_coef)  # shifted by the best, so that a small kl_coef does not overflow
    log_z = best / kl_coef + np.log(weights.sum())
    optimality = (weights * o).sum() / weights.sum()
    return RegularisedOptimum(float(optimality), float(optimality / kl_coef - log_z), float(kl_coef * log_z))


def best_of_n_weights(probabilities: np.ndarray, optimalities: np.ndarray, n: int) -> np.ndarray:
    """How much likelier each outcome is for the best of n samples, chosen by optimality, than for one: exact.

        P(best has optimality o) = F(o)^n - F(o-)^n,  F the distribution of optimality;  weight = that / P(o)

    Outcomes of equal optimality share a weight, because ties are broken at random. So the best of n has
    optimality sum p w o and KL(best of n || one sample) = sum p w log w, whatever else tells the samples apart.

    Shapes: probabilities (X,), at least 0, summing to 1; optimalities (X,); returns (X,), 0 where the probability is.
    """
    weights = np.zeros(len(probabilities))
    for o in np.unique(optimalities[probabilities > 0]):
        below, level = (probabilities[where].sum() for where in (optimalities < o, optimalities == o))
        weights[optimalities == o] = ((below + level) ** n - below**n) / level
    return np.where(probabilities > 0, weights, 0.0)


class RandomWalks:
    """One instance of the benchmark, determined by its seed.

    Attributes:
        adjacency: (N, N) bool, [i, j] True when an edge leads from node i to node j; node 0 is the goal, and has none
            but the edge to itself.
        num_draws: adjacency matrices drawn until every node had a way out.
        walks: 1,000 random walks as strings, of 2 to 10 letters, ending at the first 'a'.
        prompts: the 20 letters a walk can start from, in order.
        shortest: (N,) nodes on the shortest path from each node to the goal, both included; 10 when there is none
            that short.
        optimalities: (S, L), the optimality of reaching the goal from prompt s with l nodes in all.
    """

    def __init__(self, seed: int = 1000) -> None:
        draw = np.random.RandomState(seed)
        self.adjacency, self.num_draws = _draw_adjacency(draw)
        self.walks = tuple(_draw_walk(draw, self.adjacency) for _ in range(_NUM_WALKS))
        self.prompts = tuple(sorted({walk[0] for walk in self.walks}))
        self.shortest = np.minimum(_nodes_to_goal(self.adjacency), MAX_NODES)
        self.optimalities = np.array(
            [[self.path_optimality(letter, nodes) for nodes in range(MAX_NODES + 1)] for letter in self.prompts]
        )

    def next_letters(self, letter: str) -> str:
        """The letters an edge leads to, in order."""
        return "".join(ALPHABET[j] for j in np.flatnonzero(self.adjacency[ALPHABET.index(letter)]))

    def path_optimality(self, start: str, num_nodes: int) -> float:
        """How good it is to reach the goal from `start` with `num_nodes` nodes in all, in [0, 1]; 1 = a shortest path.

            (10 - num_nodes) / (10 - shortest[start]), and 0 beyond 10 nodes

        Where the shortest path has 10 nodes the quotient is 0 / 0: such a path then counts 1.
        """
        node = ALPHABET.index(start)
        if num_nodes < self.shortest[node] or num_nodes > MAX_NODES:
            return 0.0
        if self.shortest[node] == MAX_NODES:
            return 1.0
        return float((MAX_NODES - num_nodes) / (MAX_NODES - self.shortest[node]))

    def optimality(self, sample: str) -> float:
        """The score of a sample, prompt letter included.

        0 for a sample that is empty, contains an unknown character or takes a step that is no edge before it reaches
        'a', or never reaches it. What follows the first 'a' is ignored; a sample that starts there scores 1.
        """
        for index, letter in enumerate(sample):
            if letter not in ALPHABET or (index > 0 and letter not in self.next_letters(sample[index - 1])):
                return 0.0
            if letter == GOAL:
                return self.path_optimality(sample[0], index + 1)
        return 0.0

    def sft_groups(self) -> tuple[Group, ...]:
        """The walks as supervised data: the first letter is the prompt, the rest its completion."""
        return tuple(
            Group((Message("user", walk[0]),), (Completion((Message("assistant", walk[1:]),)),)) for walk in self.walks
        )

    def rated_groups(self) -> tuple[Group, ...]:
        """The walks as answers with returns: the same prompts and completions, each with its optimality as score."""
        return tuple(
            Group(g.prompt, (Completion(g.completions[0].messages, score=self.optimality(walk)),))
            for g, walk in zip(self.sft_groups(), self.walks, strict=True)
        )

    def random_walk(self) -> np.ndarray:
        """(N, N) transition probabilities of the policy that takes every edge out of a node equally often."""
        return self.adjacency / self.adjacency.sum(axis=1, keepdims=True)

    def shaped_optimality(self, *, tau: float, gamma: float, beta: float) -> float:
        """Expected optimality, averaged over the prompts, of exact ILQL on the random walk: what training aims at.

            Q(s, a) = gamma * V(s');   V(s) = the tau-expectile of Q(s, .) under the random walk;
            policy(a | s) proportional to random walk(a | s) * exp(beta * Q(s, a))

        A state is the start, the last letter and how many nodes were visited. A walk ends at the goal or with its tenth
        node; V there is its return, the optimality standardised over the walks, which stands at the end token.
        beta = 0 is the random walk. Towards infinity it is the greedy policy, not always optimal for small tau.
        """
        scores = np.array([self.optimality(walk) for walk in self.walks])
        total = 0.0
        for prompt, letter in enumerate(self.prompts):
            ends = (self.optimalities[prompt] - scores.mean()) / scores.std()
            lost = -scores.mean() / scores.std()
            values = np.full(len(ALPHABET), lost)  # of the states with MAX_NODES nodes, from which nothing follows
            expected = np.zeros(len(ALPHABET))  # optimality still to come under the shaped policy
            for nodes in range(MAX_NODES, 1, -1):
                values[0], expected[0] = ends[nodes], self.optimalities[prompt, nodes]
                values, expected = self._shaped_step(gamma * values, expected, tau, beta)
            total += expected[ALPHABET.index(letter)]
        return float(total / len(self.prompts))

    def _shaped_step(
        self, q: np.ndarray, expected: np.ndarray, tau: float, beta: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Values and expected optimality one step earlier, (N,) each, from those after each next letter."""
        values, optimality = np.zeros_like(q), np.zeros_like(q)
        for node in range(1, len(ALPHABET)):
            following = np.flatnonzero(self.adjacency[node])
            weights = np.exp(beta * (q[following] - q[following].max()))
            values[node] = _expectile(q[following], tau)
            optimality[node] = (weights * expected[following]).sum() / weights.sum()
        return values, optimality

    def goal_probabilities(self, transitions: np.ndarray) -> np.ndarray:
        """(S, L): the probability that a policy first reaches the goal with l nodes, having taken edges only.

        `transitions` is (N, N): the probability of each next letter given the last one. Rows may sum to less than 1
        over the edges; what is missing goes to illegal steps, from which there is no way back.
        """
        legal = np.where(self.adjacency, transitions, 0.0)
        at = np.eye(len(ALPHABET))[[ALPHABET.index(prompt) for prompt in self.prompts]]
        reached = np.zeros((len(self.prompts), MAX_NODES + 1))
        for num_nodes in range(2, MAX_NODES + 1):
            at = at @ legal
            reached[:, num_nodes] = at[:, 0]
            at[:, 0] = 0.0
        return reached

    def mean_optimality(self, goal_probabilities: np.ndarray) -> float:
        """The expected optimality, averaged over the prompts, of a policy with these `goal_probabilities` (S, L)."""
        return float((goal_probabilities * self.optimalities).sum(axis=1).mean())

    def outcomes(self, goal_probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(S, L + 1) each: the probabilities and optimalities of reaching the goal with l nodes, and, last, of not."""
        missed = 1.0 - goal_probabilities.sum(axis=1, keepdims=True)
        probabilities = np.concatenate([goal_probabilities, missed], axis=1)
        return probabilities, np.concatenate([self.optimalities, np.zeros_like(missed)], axis=1)

    def optima(self, goal_probabilities: np.ndarray, kl_coef: float) -> tuple[RegularisedOptimum, ...]:
        """For each prompt, the optimum against a reference with these `goal_probabilities` (S, L)."""
        outcomes = zip(*self.outcomes(goal_probabilities), strict=True)
        return tuple(regularised_optimum(p, o, kl_coef) for p, o in outcomes)


def _expectile(values: np.ndarray, tau: float) -> float:
    """The v with tau * sum of (x - v) above it = (1 - tau) * sum of (v - x) below it, over equally likely values."""
    ordered = np.sort(values)
    for above in range(1, len(ordered) + 1):
        weights = np.where(np.arange(len(ordered)) >= len(ordered) - above, tau, 1 - tau)
        v = float((weights * ordered).sum() / weights.sum())
        if above == len(ordered) or v >= ordered[len(ordered) - above - 1]:
            return v
    return float(ordered[0])


def _draw_adjacency(draw: np.random.RandomState) -> tuple[np.ndarray, int]:
    size, num_draws = len(ALPHABET), 0
    while True:
        num_draws += 1
        adjacency = draw.rand(size, size) > 1 - _EDGE_PROBABILITY
        np.fill_diagonal(adjacency, False)
        if adjacency.any(axis=1).all():
            adjacency[0] = False
            adjacency[0, 0] = True
            return adjacency, num_draws


def _draw_walk(draw: np.random.RandomState, adjacency: np.ndarray) -> str:
    node = 0
    while node == 0:
        node = int(draw.randint(len(ALPHABET)))
    nodes = [node]
    while node != 0 and len(nodes) < MAX_NODES:
        node = int(draw.choice(np.flatnonzero(adjacency[node])))
        nodes.append(node)
    return "".join(ALPHABET[node] for node in nodes)


def _nodes_to_goal(adjacency: np.ndarray) -> np.ndarray:
    """(N,) nodes on the shortest path to the goal, by breadth-first search backwards; N + 1 where there is none."""
    distance = np.full(len(adjacency), len(adjacency) + 1)
    distance[0] = 1
    queue = deque([0])
    while queue:
        node = queue.popleft()
        for before in np.flatnonzero(adjacency[:, node]):
            if distance[before] > len(adjacency):
                distance[before] = distance[node] + 1
                queue.append(int(before))
    return distance
