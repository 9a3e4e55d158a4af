"""How many times the floating-point operations of Accord's update the peer's has, by counting: what arithmetic alone
would make of the speed, if both ran at the same share of the machine's peak.

    Accord   a row is a prompt with all its answers; the last block makes keys and values everywhere and the rest where
             a token is predicted or scored; the vocabulary there as well
    peer     a row is a prompt with one answer, all of it through all blocks and the vocabulary

Backward twice forward on both sides, so that it cancels. Attention is counted as it is run here, every pair of a row.
Works whose iteration is more than updates (sampling, GRPO and RLOO) and those of mixed lengths are not counted.
"""

from __future__ import annotations

from accord.profiling.flops import Attention, Matrix, attention_flops, matrix_flops
from benchmarks.speed.work import MODELS, Work

__all__ = ["counted", "own_flops", "peer_flops"]


def counted(work: Work) -> float | None:
    """The peer's operations over Accord's, of the forward passes of an update; None for works that are not counted."""
    if work.kind in ("sampling", "grpo", "rloo") or work.prompt is None:
        return None
    return peer_flops(work) / own_flops(work)


def own_flops(work: Work) -> float:
    """Operations for one prompt with its answers."""
    prompt, answer = work.prompt or 0, work.answer or 0
    row, predicted = prompt + work.answers * answer, work.answers * answer
    # The first tokens of all answers are read at one place, the prompt's last token.
    read = work.answers if work.kind == "reward" else predicted - (work.answers - 1)
    trunks = 2 if work.kind == "ppo" and not work.one_trunk else 1
    return trunks * _trunk(work, row, read) + _vocabulary(work, predicted)


def peer_flops(work: Work) -> float:
    """The same for the peer, whose reward models see both answers of every pair."""
    row = (work.prompt or 0) + (work.answer or 0)
    rows = work.answers * (work.answers - 1) if work.kind == "reward" else work.answers
    trunks = 2 if work.kind == "ppo" else 1
    return rows * (trunks * _trunk(work, row, row) + _vocabulary(work, row))


def _trunk(work: Work, row: int, read: int) -> float:
    """One row through all blocks; the last one runs `read` of its tokens, unless that is nearly all."""
    hidden, layers, _, mlp = MODELS[work.model]
    read = read if read <= 0.75 * row else row
    keys, rest = Matrix(hidden, 2 * hidden), Matrix(hidden, 2 * hidden + 3 * mlp)
    tokens = (layers - 1) * row + read
    linear = matrix_flops(layers * row, keys).forward + matrix_flops(tokens, rest).forward
    return linear + attention_flops(tokens * row, Attention(hidden)).forward


def _vocabulary(work: Work, tokens: int) -> float:
    hidden = MODELS[work.model][0]
    return 0.0 if work.kind == "reward" else matrix_flops(tokens, Matrix(hidden, work.vocabulary)).forward
