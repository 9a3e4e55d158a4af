"""Loss scaling: gradients that float16 would round to 0 are computed of a larger loss, and divided again.

    gradient = d(scale * loss) / scale

The scale is a power of two, so nothing is rounded by it. Where a gradient overflows, the update is skipped and the
scale halved; after GROW_AFTER updates without one it is doubled.

Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2. Departures: the first scale and the patience are those
of torch's GradScaler; at a scale of 1 the gradient itself is not finite, which is the optimiser's business.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["LossScale"]

FIRST, GROW_AFTER, LARGEST = 2**16, 2000, 2**24


class LossScale:
    """The scale, and how many updates went well since it last changed: integers, so that they survive a restart."""

    def __init__(self) -> None:
        self.scale, self.good = FIRST, 0

    def undo(self, gradients: Sequence[Tensor]) -> None:
        """Divide the gradients, in place, by the scale that they were computed with."""
        if gradients:
            torch._foreach_mul_(list(gradients), 1 / self.scale)

    def seen(self, *, finite: bool) -> bool:
        """Note how an update went; returns whether it merely overflowed, and a smaller scale is tried next."""
        if finite:
            self.good += 1
            if self.good >= GROW_AFTER:
                self.scale, self.good = min(LARGEST, 2 * self.scale), 0
            return False
        overflowed = self.scale > 1
        self.scale, self.good = max(1, self.scale // 2), 0
        return overflowed
