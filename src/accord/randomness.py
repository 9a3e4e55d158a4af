"""Counter-based randomness: every random number is a function of a key, so nothing random has to survive a restart.

A key is a tuple such as `("ppo", seed, step, prompt_id, sample_index)`. Equal keys give equal numbers whatever was
drawn before, in whatever batch, process or order. There is no global generator in Accord.
"""

from __future__ import annotations

import numpy as np

from accord.records import content_id

__all__ = ["generator", "permutation", "torch_seed"]


def generator(*key: int | str) -> np.random.Generator:
    """A numpy generator (Philox, 128-bit key) determined by `key` alone."""
    return np.random.Generator(np.random.Philox(key=[content_id(["a", *key]), content_id(["b", *key])]))


def permutation(n: int, *key: int | str) -> list[int]:
    """A uniformly random order of `range(n)` determined by `key`."""
    return generator(*key).permutation(n).tolist()


def torch_seed(*key: int | str) -> int:
    """A 63-bit seed for `torch.Generator.manual_seed`, determined by `key`."""
    return content_id(["torch", *key])
