"""The randomwalks score and objective of a language model, computed over all legal walks instead of sampled.

A sequence is prefix tokens, the prompt's letter, and up to `max_new_tokens` tokens, ending early at the end-of-sequence
token. Legal prefixes follow edges from the prompt; they and the state just after the goal are enumerated with their
probabilities, so E[optimality] and the KL over them are exact. Every other token leaves this tree: its optimality is
settled (0, or what the goal already earned), and only the KL of what follows is sampled.
Legend: R prefixes of one length, T tokens, V vocabulary, N nodes, S prompts, D draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from accord.randomness import generator
from accord.rollout.sampling import Sampling, choose
from accord.tasks.randomwalks import ALPHABET, MAX_NODES, RandomWalks, best_of_n_weights

__all__ = ["WalksEvaluation", "WalksPromptEvaluation", "best_of_n_evaluation", "exact_evaluation"]

_ONE_TOKEN = Sampling(1)


@dataclass(frozen=True, slots=True)
class WalksPromptEvaluation:
    """The quantities of `WalksEvaluation` for one prompt."""

    prompt: str
    optimality: float
    kl: float
    objective: float
    optimum: float
    off_path_mass: float
    off_path_kl: float
    reference_optimality: float


@dataclass(frozen=True, slots=True)
class WalksEvaluation:
    """What a policy achieves against a reference; means over the prompts.

    optimality            E[optimality] of the policy: exact
    kl                    KL(policy || reference) per sequence, nats: exact but for its part off_path_kl
    objective             optimality - kl_coef * kl
    optimum               the largest objective any policy can have against this reference: exact
    off_path_mass         probability that the policy leaves the legal tree: exact
    off_path_kl           the part of kl that lies beyond the tree: sampled, unbiased
    off_path_kl_error     its standard error
    reference_optimality  E[optimality] of the reference: exact
    """

    optimality: float
    kl: float
    objective: float
    optimum: float
    off_path_mass: float
    off_path_kl: float
    off_path_kl_error: float
    reference_optimality: float
    prompts: tuple[WalksPromptEvaluation, ...]


@torch.inference_mode()
def best_of_n_evaluation(
    policy: PreTrainedModel,
    walks: RandomWalks,
    n: int,
    *,
    prefix_ids: Sequence[int] = (),
    letter_ids: Sequence[int],
    eos_id: int,
    max_new_tokens: int = MAX_NODES - 1,
    kl_coef: float,
) -> WalksEvaluation:
    """Evaluate the best of `n` samples of `policy`, chosen by optimality, against one sample of it. All of it exact.

    The best of n is the policy with each sequence's probability multiplied by a weight that depends on its optimality
    alone (`best_of_n_weights`), so its KL needs nothing but the distribution of optimality. Arguments otherwise as in
    `exact_evaluation`.
    """
    _check(letter_ids, eos_id, max_new_tokens, kl_coef, num_samples=2)
    space = _space(policy.device, walks, prefix_ids, letter_ids, eos_id, max_new_tokens)
    with _evaluation_mode(policy):
        tree = _join([_walk_tree(policy, policy, space, start) for start in range(len(walks.prompts))])
    goal = tree.policy_goal.cpu().numpy()
    probabilities, optimalities = walks.outcomes(goal)
    weights = np.array([best_of_n_weights(p, o, n) for p, o in zip(probabilities, optimalities, strict=True)])
    best = probabilities * weights
    optimality = (best * optimalities).sum(axis=1)
    kl = (best * np.log(np.where(weights > 0, weights, 1.0))).sum(axis=1)
    beyond = tree.beyond_goal.cpu().numpy()
    before = tree.off_path_mass.cpu().numpy() - beyond.sum(axis=1)
    columns = {
        "optimality": optimality,
        "kl": kl,
        "objective": optimality - kl_coef * kl,
        "optimum": np.array([optimum.objective for optimum in walks.optima(goal, kl_coef)]),
        "off_path_mass": before * weights[:, -1] + (beyond * weights[:, :-1]).sum(axis=1),
        "off_path_kl": np.zeros(len(kl)),
        "reference_optimality": (goal * walks.optimalities).sum(axis=1),
    }
    return _evaluation(walks, {name: column.tolist() for name, column in columns.items()}, off_path_kl_error=0.0)


@torch.inference_mode()
def exact_evaluation(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    walks: RandomWalks,
    *,
    prefix_ids: Sequence[int] = (),
    letter_ids: Sequence[int],
    eos_id: int,
    max_new_tokens: int = MAX_NODES - 1,
    kl_coef: float,
    num_samples: int,
    key: tuple[int | str, ...],
) -> WalksEvaluation:
    """Evaluate `policy` against `reference` on every prompt of `walks`, at temperature 1.

        E[optimality] = sum over legal paths to the goal of p(path) optimality(path)
        KL = sum over prefixes x of p(x) KL(policy(. | x) || reference(. | x)), categorical KLs over the vocabulary
        optimum = kl_coef log E_ref[exp(optimality / kl_coef)] per prompt; at kl_coef 0 the best reachable optimality

    The end-of-sequence token is legal at every legal prefix, where it earns 0, and the only legal one after the goal.
    Beyond the tree, continuations are drawn from the policy and each of their prefixes contributes its categorical KL,
    which varies less than the log-ratio of the token drawn.

    Args:
        policy, reference: causal language models; both are read in evaluation mode.
        prefix_ids: tokens before the prompt's letter, such as BOS.
        letter_ids: the token of each letter of the alphabet, in order. Any other token is an illegal step.
        num_samples: continuations drawn for each position at which the tree can be left, at least 2.
        key: of the random numbers, which matter beyond the tree only.
    """
    _check(letter_ids, eos_id, max_new_tokens, kl_coef, num_samples)
    space = _space(policy.device, walks, prefix_ids, letter_ids, eos_id, max_new_tokens)
    with _evaluation_mode(policy, reference):
        tree = _join([_walk_tree(policy, reference, space, start) for start in range(len(walks.prompts))])
        off_path_kl, off_path_kl_error = _off_path_kl(policy, reference, space, tree.exits, num_samples, key)
    optimalities = torch.from_numpy(walks.optimalities).to(tree.kl.device)
    optima = walks.optima(tree.reference_goal.cpu().numpy(), kl_coef)
    optimality = (tree.policy_goal * optimalities).sum(dim=1)
    kl = tree.kl + off_path_kl
    columns = {
        "optimality": optimality,
        "kl": kl,
        "objective": optimality - kl_coef * kl,
        "optimum": torch.tensor([optimum.objective for optimum in optima], dtype=torch.float64),
        "off_path_mass": tree.off_path_mass,
        "off_path_kl": off_path_kl,
        "reference_optimality": (tree.reference_goal * optimalities).sum(dim=1),
    }
    return _evaluation(walks, {name: column.tolist() for name, column in columns.items()}, off_path_kl_error)


def _evaluation(walks: RandomWalks, columns: dict[str, list[float]], off_path_kl_error: float) -> WalksEvaluation:
    """The record of these columns, each with a value for every prompt."""
    rows = zip(walks.prompts, *columns.values(), strict=True)
    return WalksEvaluation(
        **{name: math.fsum(column) / len(column) for name, column in columns.items()},
        off_path_kl_error=off_path_kl_error,
        prompts=tuple(
            WalksPromptEvaluation(prompt, **dict(zip(columns, values, strict=True))) for prompt, *values in rows
        ),
    )


def _check(letter_ids: Sequence[int], eos_id: int, max_new_tokens: int, kl_coef: float, num_samples: int) -> None:
    if len({*letter_ids, eos_id}) != len(ALPHABET) + 1:
        raise ValueError(
            f"letter_ids and eos_id are {list(letter_ids)} and {eos_id};"
            f" expected {len(ALPHABET)} tokens, one for each letter, and another one"
        )
    if not 1 <= max_new_tokens < MAX_NODES:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 1 to {MAX_NODES - 1}")
    if not 0 <= kl_coef < math.inf:
        raise ValueError(f"kl_coef is {kl_coef}; expected a finite number >= 0")
    if num_samples < 2:
        raise ValueError(f"num_samples is {num_samples}; expected at least 2, for a standard error")


@contextmanager
def _evaluation_mode(*models: PreTrainedModel) -> Iterator[None]:
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


@dataclass(frozen=True, slots=True)
class _Space:
    """The sequences: where they start, which tokens are legal, when they end."""

    starts: Tensor  # (S, T) prefix and prompt letter
    start_nodes: Tensor  # (S,)
    letter_ids: Tensor  # (N,)
    edges: Tensor  # (N, N) bool; none out of the goal
    eos_id: int
    max_new_tokens: int


def _space(
    device: torch.device,
    walks: RandomWalks,
    prefix_ids: Sequence[int],
    letter_ids: Sequence[int],
    eos_id: int,
    max_new_tokens: int,
) -> _Space:
    letters = torch.tensor(letter_ids, device=device)
    nodes = torch.tensor([ALPHABET.index(prompt) for prompt in walks.prompts], device=device)
    prefix = torch.tensor([list(prefix_ids)] * len(nodes), dtype=torch.long, device=device)
    edges = torch.tensor(walks.adjacency, device=device)
    edges[0] = False
    return _Space(torch.cat([prefix, letters[nodes, None]], dim=1), nodes, letters, edges, eos_id, max_new_tokens)


class _Reader:
    """A model that reads sequences piece by piece, so that a shared prefix runs through it once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)

    def next_logprobs(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Go on with these of the sequences read so far, and read (R, T) more tokens.

        Returns: (R, V) float64 log-probabilities of what follows.
        """
        self._cache.reorder_cache(rows)  # pyright: ignore[reportArgumentType]
        num_read = self._cache.get_seq_length() + tokens.shape[1]
        output = self._model(
            input_ids=tokens,
            attention_mask=tokens.new_ones(len(tokens), num_read),
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.logits[:, -1].double().log_softmax(dim=-1)


def _categorical_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(policy || reference) of each row, (R, V) -> (R,)."""
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(dim=1)


@dataclass(frozen=True, slots=True)
class _Exit:
    """The ways to leave the tree at one position."""

    tokens: Tensor  # (R, T) legal prefixes
    prompt: Tensor  # (R,) index of the prompt
    mass: Tensor  # (R, V) probability of the prefix followed by this illegal token; 0 for legal ones


@dataclass(frozen=True, slots=True)
class _Tree:
    """What is exact. Goal probabilities are (S, path lengths in nodes), as in `RandomWalks.goal_probabilities`;
    `beyond_goal`, of the same shape, is the part of them that does not end at the goal."""

    policy_goal: Tensor
    beyond_goal: Tensor
    reference_goal: Tensor
    kl: Tensor  # (S,) over all prefixes in the tree
    off_path_mass: Tensor  # (S,)
    exits: tuple[_Exit, ...]  # one for each position


def _walk_tree(policy: PreTrainedModel, reference: PreTrainedModel, space: _Space, start: int) -> _Tree:
    """Enumerate the legal prefixes of one prompt, length by length, carrying their log-probabilities."""
    readers = _Reader(policy), _Reader(reference)
    tokens, node = space.starts[start : start + 1], space.start_nodes[start : start + 1]
    rows, unread = node, tokens  # nothing is read yet, so there are no rows to choose from
    prefix_logprob = torch.zeros(1, dtype=torch.float64, device=node.device)
    prefix_ref_logprob = prefix_logprob
    goal = prefix_logprob.new_zeros(1, MAX_NODES + 1)
    reference_goal, beyond_goal = torch.zeros_like(goal), torch.zeros_like(goal)
    kl, off_path_mass = torch.zeros_like(prefix_logprob), torch.zeros_like(prefix_logprob)
    exits = []
    for step in range(space.max_new_tokens):
        logprobs, ref_logprobs = (reader.next_logprobs(rows, unread) for reader in readers)
        kl += (prefix_logprob.exp() * _categorical_kl(logprobs, ref_logprobs)).sum()
        legal = torch.zeros_like(logprobs, dtype=torch.bool)
        legal[:, space.letter_ids] = space.edges[node]
        legal[:, space.eos_id] = True
        mass = (prefix_logprob[:, None] + logprobs).exp().masked_fill(legal, 0.0)
        off_path_mass += mass.sum()
        beyond_goal[:, step + 1] = mass[node == 0].sum()
        exits.append(_Exit(tokens, torch.full_like(node, start), mass))

        rows, node = space.edges[node].nonzero(as_tuple=True)
        ids = space.letter_ids[node]
        unread = ids[:, None]
        tokens = torch.cat([tokens[rows], unread], dim=1)
        prefix_logprob = prefix_logprob[rows] + logprobs[rows, ids]
        prefix_ref_logprob = prefix_ref_logprob[rows] + ref_logprobs[rows, ids]
        goal[:, step + 2] = prefix_logprob[node == 0].exp().sum()
        reference_goal[:, step + 2] = prefix_ref_logprob[node == 0].exp().sum()
        if not len(rows):
            break
    return _Tree(goal, beyond_goal, reference_goal, kl, off_path_mass, tuple(exits))


def _join(trees: Sequence[_Tree]) -> _Tree:
    """The trees of all prompts as one, in their order."""
    positions = [[exit for exit in exits if exit] for exits in zip_longest(*(tree.exits for tree in trees))]
    return _Tree(
        torch.cat([tree.policy_goal for tree in trees]),
        torch.cat([tree.beyond_goal for tree in trees]),
        torch.cat([tree.reference_goal for tree in trees]),
        torch.cat([tree.kl for tree in trees]),
        torch.cat([tree.off_path_mass for tree in trees]),
        tuple(
            _Exit(
                torch.cat([exit.tokens for exit in exits]),
                torch.cat([exit.prompt for exit in exits]),
                torch.cat([exit.mass for exit in exits]),
            )
            for exits in positions
        ),
    )


def _off_path_kl(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    space: _Space,
    exits: Sequence[_Exit],
    num_samples: int,
    key: tuple[int | str, ...],
) -> tuple[Tensor, float]:
    """The KL beyond the tree for each prompt (S,), and the standard error of its mean over prompts.

    At each position, D = `num_samples` draws stand for all the probability that leaves there. Of their uniforms,
    column 0 chooses the prefix, column 1 the illegal token, and the others what follows.
    """
    num_prompts = len(space.starts)
    kl = torch.zeros(num_prompts, dtype=torch.float64, device=space.starts.device)
    variance = 0.0
    for position, exit in enumerate(exits[: space.max_new_tokens - 1]):  # nothing follows the last place
        uniforms = torch.from_numpy(generator(*key, position).random((num_samples, space.max_new_tokens + 1)))
        uniforms = uniforms.to(kl.device)
        unread, prompt = _leave(exit, uniforms[:, 0], uniforms[:, 1])
        readers = _Reader(policy), _Reader(reference)
        totals = torch.zeros_like(uniforms[:, 0])  # KL along each draw
        alive = rows = torch.arange(num_samples, device=kl.device)
        for step in range(position + 1, space.max_new_tokens):
            logprobs, ref_logprobs = (reader.next_logprobs(rows, unread) for reader in readers)
            totals[alive] += _categorical_kl(logprobs, ref_logprobs)
            ids, _ = choose(logprobs, uniforms[alive, step + 1], _ONE_TOKEN)
            rows = (ids != space.eos_id).nonzero()[:, 0]
            alive, unread = alive[rows], ids[rows, None]
            if not len(rows):
                break
        contributions = totals * exit.mass.sum() / num_samples
        kl.index_add_(0, prompt, contributions)
        variance += num_samples * contributions.var().item()
    return kl, math.sqrt(variance) / num_prompts


def _leave(exit: _Exit, row_uniforms: Tensor, token_uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw ways out in proportion to their mass: prefixes with their illegal token (D, T + 1), and prompts (D,).

    One draw falls into each of D equal slices of the mass, which never does worse than independent draws.
    """
    cumulative = exit.mass.sum(dim=1).cumsum(dim=0)
    num_draws = len(row_uniforms)
    points = (torch.arange(num_draws, device=row_uniforms.device) + row_uniforms) / num_draws * cumulative[-1]
    # Where the mass underflows to 0 nothing can leave, and any row will do: its weight is 0.
    rows = torch.searchsorted(cumulative, points, right=True).clamp(max=len(cumulative) - 1)
    ids, _ = choose(exit.mass[rows].log(), token_uniforms, _ONE_TOKEN)
    return torch.cat([exit.tokens[rows], ids[:, None]], dim=1), exit.prompt[rows]
