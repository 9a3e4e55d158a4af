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

import torch
from torch import Tensor, nn

from accord.randomness import generator
from accord.rollout.sampling import Sampling, choose
from accord.tasks.randomwalks import ALPHABET, MAX_NODES, RandomWalks

__all__ = ["WalksEvaluation", "WalksPromptEvaluation", "exact_evaluation"]

_ROWS_PER_FORWARD = 2048
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
def exact_evaluation(
    policy: nn.Module,
    reference: nn.Module,
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
        policy, reference: called as `model(input_ids=...).logits`, in evaluation mode.
        prefix_ids: tokens before the prompt's letter, such as BOS.
        letter_ids: the token of each letter of the alphabet, in order. Any other token is an illegal step.
        num_samples: continuations drawn for each position at which the tree can be left, at least 2.
        key: of the random numbers, which matter beyond the tree only.
    """
    _check(letter_ids, eos_id, max_new_tokens, kl_coef, num_samples)
    space = _space(policy, walks, prefix_ids, letter_ids, eos_id, max_new_tokens)
    with _evaluation_mode(policy, reference):
        tree = _walk_tree(policy, reference, space)
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
        "off_path_mass": torch.stack([exit.prompt_mass for exit in tree.exits]).sum(dim=0),
        "off_path_kl": off_path_kl,
        "reference_optimality": (tree.reference_goal * optimalities).sum(dim=1),
    }
    rows = zip(walks.prompts, *(column.tolist() for column in columns.values()), strict=True)
    return WalksEvaluation(
        **{name: column.mean().item() for name, column in columns.items()},
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
def _evaluation_mode(*models: nn.Module) -> Iterator[None]:
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
    legal: Tensor  # (N, V) bool: edges and the end of the sequence
    eos_id: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class _Exit:
    """The ways to leave the tree at one position."""

    tokens: Tensor  # (R, T) legal prefixes
    prompt: Tensor  # (R,) index of the prompt
    mass: Tensor  # (R, V) probability of the prefix followed by this illegal token; 0 for legal ones
    prompt_mass: Tensor  # (S,) their sums


@dataclass(frozen=True, slots=True)
class _Tree:
    """What is exact. Goal probabilities are (S, path lengths in nodes), as in `RandomWalks.goal_probabilities`."""

    policy_goal: Tensor
    reference_goal: Tensor
    kl: Tensor  # (S,) over all prefixes in the tree
    exits: tuple[_Exit, ...]  # one for each position


def _space(
    policy: nn.Module,
    walks: RandomWalks,
    prefix_ids: Sequence[int],
    letter_ids: Sequence[int],
    eos_id: int,
    max_new_tokens: int,
) -> _Space:
    device = next(policy.parameters()).device
    letters = torch.tensor(letter_ids, device=device)
    nodes = torch.tensor([ALPHABET.index(prompt) for prompt in walks.prompts], device=device)
    prefix = torch.tensor([list(prefix_ids)] * len(nodes), dtype=torch.long, device=device)
    starts = torch.cat([prefix, letters[nodes, None]], dim=1)
    edges = torch.tensor(walks.adjacency, device=device)
    edges[0] = False
    legal = edges.new_zeros(len(ALPHABET), policy(input_ids=starts[:1]).logits.shape[-1])
    legal[:, letters] = edges
    legal[:, eos_id] = True
    return _Space(starts, nodes, letters, edges, legal, eos_id, max_new_tokens)


def _next_logprobs(model: nn.Module, tokens: Tensor) -> Tensor:
    """(R, V) float64 log-probabilities of the token after (R, T)."""
    return torch.cat(
        [model(input_ids=rows).logits[:, -1].double().log_softmax(dim=-1) for rows in tokens.split(_ROWS_PER_FORWARD)]
    )


def _categorical_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(policy || reference) of each row, (R, V) -> (R,)."""
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(dim=1)


def _walk_tree(policy: nn.Module, reference: nn.Module, space: _Space) -> _Tree:
    """Enumerate legal prefixes length by length, all prompts at once, carrying their log-probabilities."""
    tokens, node = space.starts, space.start_nodes
    num_prompts = len(node)
    prompt = torch.arange(num_prompts, device=node.device)
    prefix_logprob = torch.zeros(num_prompts, dtype=torch.float64, device=node.device)
    prefix_ref_logprob = prefix_logprob
    kl = torch.zeros_like(prefix_logprob)
    policy_goal = kl.new_zeros(num_prompts, MAX_NODES + 1)
    reference_goal = torch.zeros_like(policy_goal)
    exits = []
    for step in range(space.max_new_tokens):
        logprobs, ref_logprobs = _next_logprobs(policy, tokens), _next_logprobs(reference, tokens)
        kl.index_add_(0, prompt, prefix_logprob.exp() * _categorical_kl(logprobs, ref_logprobs))
        mass = (prefix_logprob[:, None] + logprobs).exp().masked_fill(space.legal[node], 0.0)
        prompt_mass = torch.zeros_like(kl).index_add_(0, prompt, mass.sum(dim=1))
        exits.append(_Exit(tokens, prompt, mass, prompt_mass))

        rows, node = space.edges[node].nonzero(as_tuple=True)
        ids = space.letter_ids[node]
        tokens, prompt = torch.cat([tokens[rows], ids[:, None]], dim=1), prompt[rows]
        prefix_logprob = prefix_logprob[rows] + logprobs[rows, ids]
        prefix_ref_logprob = prefix_ref_logprob[rows] + ref_logprobs[rows, ids]
        arrived = node == 0
        policy_goal[:, step + 2].index_add_(0, prompt[arrived], prefix_logprob[arrived].exp())
        reference_goal[:, step + 2].index_add_(0, prompt[arrived], prefix_ref_logprob[arrived].exp())
    return _Tree(policy_goal, reference_goal, kl, tuple(exits))


def _off_path_kl(
    policy: nn.Module,
    reference: nn.Module,
    space: _Space,
    exits: Sequence[_Exit],
    num_samples: int,
    key: tuple[int | str, ...],
) -> tuple[Tensor, float]:
    """The KL beyond the tree for each prompt (S,), and the standard error of its mean over prompts.

    At each position `num_samples` draws stand for all the probability that leaves there. Draws of all positions
    continue together, one token at a time, until they end.
    """
    num_draws = (space.max_new_tokens - 1) * num_samples  # nothing follows an illegal token in the last place
    device = space.starts.device
    uniforms = torch.from_numpy(generator(*key).random((num_draws, space.max_new_tokens + 1))).to(device)
    totals = torch.zeros(num_draws, dtype=torch.float64, device=device)  # KL along each draw
    prompt = torch.zeros(num_draws, dtype=torch.long, device=device)
    weight = torch.zeros_like(totals)
    tokens = space.starts.new_empty(0, space.starts.shape[1] + 1)
    draw = prompt[:0]
    for step in range(1, space.max_new_tokens):
        new = torch.arange((step - 1) * num_samples, step * num_samples, device=device)
        left, prompt[new], weight[new] = _leave(exits[step - 1], uniforms[new, 0], uniforms[new, step])
        tokens, draw = torch.cat([tokens, left]), torch.cat([draw, new])
        logprobs, ref_logprobs = _next_logprobs(policy, tokens), _next_logprobs(reference, tokens)
        totals[draw] += _categorical_kl(logprobs, ref_logprobs)
        ids, _ = choose(logprobs, uniforms[draw, step + 1], _ONE_TOKEN)
        go_on = ids != space.eos_id
        tokens, draw = torch.cat([tokens, ids[:, None]], dim=1)[go_on], draw[go_on]
    contributions = weight * totals
    num_prompts = len(space.start_nodes)
    kl = totals.new_zeros(num_prompts).index_add_(0, prompt, contributions)
    variance = num_samples * contributions.view(-1, num_samples).var(dim=1).sum().item()
    return kl, math.sqrt(variance) / num_prompts


def _leave(exit: _Exit, row_uniforms: Tensor, token_uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw ways out in proportion to their mass: prefixes with their illegal token (D, T + 1), prompts (D,), and the
    probability each draw stands for (D,). One draw falls into each of D equal slices of the mass, which never does
    worse than independent draws."""
    cumulative = exit.mass.sum(dim=1).cumsum(dim=0)
    num_draws = len(row_uniforms)
    points = (torch.arange(num_draws, device=row_uniforms.device) + row_uniforms) / num_draws * cumulative[-1]
    # Where nothing can leave, the mass underflows to 0 and any row will do: its weight is 0.
    rows = torch.searchsorted(cumulative, points, right=True).clamp(max=len(cumulative) - 1)
    ids, _ = choose(exit.mass[rows].log(), token_uniforms, _ONE_TOKEN)
    tokens = torch.cat([exit.tokens[rows], ids[:, None]], dim=1)
    return tokens, exit.prompt[rows], (cumulative[-1] / num_draws).expand(num_draws)
