"""Sums and means over the entries that count, and the checks every loss shares.

Shapes: C completions, T tokens. Masks are boolean and True = counts. What stands at a masked entry must not matter,
whatever it is: entries are selected, never multiplied by 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "Count",
    "counted",
    "full_precision",
    "masked_mean",
    "masked_sum",
    "mean_logprobs",
    "require_same_shape",
    "sequence_logprobs",
    "whiten",
]

Count = int | float | Tensor
"""A normaliser: how many entries the WHOLE optimizer step averages over."""


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32 at least (float64 stays): sums of bf16 terms lose whole terms after a few hundred."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def require_same_shape(**tensors: Tensor) -> None:
    """Raises ValueError unless all shapes are equal: (C,) against (C, 1) would broadcast to (C, C), silently."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"expected equal shapes, found {', '.join(f'{name} {shape}' for name, shape in shapes.items())}"
        )


def counted(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where `mask` is True and 0 elsewhere, in float32 at least.

    A loss selects its inputs with this before it computes: selecting the result alone is not enough for the gradient,
    because the derivative at a masked entry may be NaN, and NaN * 0 is NaN.
    Raises: ValueError on shapes that differ.
    """
    require_same_shape(x=x, mask=mask)
    x = full_precision(x)
    return torch.where(mask, x, x.new_zeros(()))


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` where `mask` is True, (), in float32 at least. No True at all gives 0.

    Raises: ValueError on shapes that differ.
    """
    return counted(x, mask).sum()


def masked_mean(x: Tensor, mask: Tensor, count: Count | None = None) -> Tensor:
    """Mean of `x` where `mask` is True: sum(x[mask]) / count, ().

    count   normaliser. None = the number of True entries here. When a step is split into micro-batches, pass the number
            in the whole step to each: their results, and gradients, then add up to those of the undivided step.
    A mask without any True, or a count below 1, divides by 1: the result is 0, not NaN.
    Raises: ValueError on shapes that differ.
    """
    total = masked_sum(x, mask)
    count = torch.as_tensor(mask.sum() if count is None else count, device=total.device, dtype=total.dtype)
    return total / count.clamp_min(1)


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each completion: the sum over its counted tokens, nats. A completion without any has 0.

    Shapes: logprobs (C, T) float, nats; mask (C, T) bool, True = counts -> (C,), in float32 at least.
    Raises: ValueError on shapes that differ.
    Tested by: tests/golden/test_golden_preference.py, tests/property/test_losses_preference.py
    """
    return counted(logprobs, mask).sum(dim=1)


def mean_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log-probability per counted token of each completion, nats. A completion without any has 0, not NaN.

    Shapes: logprobs (C, T) float, nats; mask (C, T) bool, True = counts -> (C,), in float32 at least.
    Raises: ValueError on shapes that differ.
    Tested by: tests/golden/test_golden_preference.py, tests/property/test_losses_preference.py
    """
    return sequence_logprobs(logprobs, mask) / mask.sum(dim=1).clamp_min(1)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Entries that count, scaled to variance 1 (and mean 0); the others are 0.

        (x - mean) * rsqrt(var + 1e-8)  [+ mean when the mean is kept]

    Mean and variance are over the True entries; the variance is biased (divides by n), as in the code this detail comes
    from. A constant `x` gives 0 (or the constant), never NaN. Whitening amplifies pure noise to unit variance too, so
    whoever whitens should also log the raw spread.

    Shapes: x (C, T) float, mask (C, T) bool -> (C, T) float, detached.
    Args:
        shift_mean: subtract the mean (advantages) or keep it (rewards, whose sign means something).
    Source: Ziegler et al. 2019, arXiv:1909.08593 (code); Huang et al. 2024, arXiv:2403.17031.
    """
    x = full_precision(x.detach())
    mean = masked_mean(x, mask)
    centred = x - mean
    white = centred * torch.rsqrt(masked_mean(centred.square(), mask) + 1e-8)
    return counted(white if shift_mean else white + mean, mask)
