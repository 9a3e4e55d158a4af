"""What a pass of a transformer has to compute, counted in floating-point operations: a multiplication and the addition
that goes with it are two.

    matrix (inputs, outputs)   2 * inputs * outputs a token
    attention of width A       4 * A a pair of a query and a key it sees: 2 A for the score, 2 A for the weighted sum
                               (A = heads * head size)
    backward                   as much again for the gradient that goes on to the input, where one does, and as much for
                               that of the matrix, where it is trained; attention twice its forward pass
    vocabulary projection      a matrix (width, vocabulary), at the tokens that are scored alone

Left out, each far below 1%: embeddings, norms, activations, softmax, biases, scalar heads, the optimiser's arithmetic.
Left out as well: the first layers of ILQL's heads; their products with the vocabulary are counted.
Sliding windows are counted as full attention. Of a mixture of experts only what stands in two-dimensional matrices is
counted. Attention kernels that compute scores a second time in the backward pass do more than is counted; blocks whose
activations were dropped do up to one product less. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "Attention",
    "Flops",
    "Matrix",
    "Trunk",
    "attention_flops",
    "causal_pairs",
    "matrix_flops",
    "trunk_flops",
]


@dataclass(frozen=True, slots=True)
class Flops:
    """Of a forward pass and of the backward pass that belongs to it; 0 where there is none."""

    forward: float
    backward: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer. `reached`: in a backward pass the gradient goes on to its input; `trained`: to the matrix."""

    inputs: int
    outputs: int
    trained: bool = False
    reached: bool = False


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention layer of `width` = heads * head size. `reached`: a gradient goes through it."""

    width: int
    reached: bool = False


@dataclass(frozen=True, slots=True)
class Trunk:
    """All of a model but its head."""

    matrices: tuple[Matrix, ...]
    attentions: tuple[Attention, ...]


def matrix_flops(tokens: float, matrix: Matrix) -> Flops:
    """Of one linear layer at `tokens` tokens: 2 * tokens * inputs * outputs, and once or twice as much backward.

    Tested by: tests/unit/test_profile_flops.py
    """
    product = 2.0 * tokens * matrix.inputs * matrix.outputs
    return Flops(product, product * (matrix.reached + matrix.trained))


def attention_flops(pairs: float, attention: Attention) -> Flops:
    """Of one attention layer with `pairs` pairs of a query and a key that it sees: 4 * pairs * width, backward 8.

    Backward there are four products for the forward pass's two: the gradients of queries, keys, values and weights.
    """
    product = 4.0 * pairs * attention.width
    return Flops(product, 2.0 * product * attention.reached)


def trunk_flops(tokens: float, pairs: float, trunk: Trunk) -> Flops:
    """Of all layers; `pairs` are those of one attention layer."""
    total = Flops(0.0, 0.0)
    for matrix in trunk.matrices:
        total += matrix_flops(tokens, matrix)
    for attention in trunk.attentions:
        total += attention_flops(pairs, attention)
    return total


def causal_pairs(queries: float, before: float = 0.0) -> float:
    """Pairs of a query and a key it sees, of one row: `queries` tokens that follow `before` others, each of which sees
    all up to itself. queries * before + queries * (queries + 1) / 2."""
    return queries * before + queries * (queries + 1) / 2
