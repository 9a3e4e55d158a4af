"""Random numbers are a function of their key, and of nothing else."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from accord.randomness import generator, permutation, torch_seed


def test_a_generator_is_philox_keyed_by_the_hash_of_its_key() -> None:
    """Spelt out: two 63-bit halves of the key from SHA-256 of the JSON lists ["a", ...] and ["b", ...]."""
    halves = [
        int.from_bytes(hashlib.sha256(blob).digest()[:8], "big") >> 1
        for blob in (b'["a","ppo",7,0]', b'["b","ppo",7,0]')
    ]
    expected = np.random.Generator(np.random.Philox(key=halves)).random(5)
    assert generator("ppo", 7, 0).random(5).tolist() == expected.tolist()


def test_what_was_drawn_before_does_not_matter() -> None:
    first = generator("ppo", 1, 2).random(4).tolist()
    generator("ppo", 1, 1).random(100)
    np.random.default_rng(0).random(3)
    assert generator("ppo", 1, 2).random(4).tolist() == first


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    assert generator("ppo", 1).random(9)[:4].tolist() == generator("ppo", 1).random(4).tolist()


def test_every_part_of_the_key_counts() -> None:
    keys = [("ppo", 0, 0), ("ppo", 0, 1), ("ppo", 1, 0), ("sft", 0, 0), ("ppo", 0), ("ppo", "0", 0), ("ppo", 0, 0, 0)]
    assert len({generator(*key).random() for key in keys}) == len(keys)


def test_uniforms_of_neighbouring_keys_are_uniform_and_uncorrelated() -> None:
    """4,000 keys, 2 numbers each: standard errors .0046 (means) and .016 (correlation); the bounds are 4 of them."""
    x = np.array([generator("uniform", i).random(2) for i in range(4000)])
    assert np.abs(x.mean(axis=0) - 0.5).max() < 4 * 0.0046
    assert abs(np.corrcoef(x[:, 0], x[:, 1])[0, 1]) < 4 * 0.016
    assert abs(np.corrcoef(x[1:, 0], x[:-1, 0])[0, 1]) < 4 * 0.016


def test_a_permutation_holds_every_index_once() -> None:
    order = permutation(50, "shuffle", 3)
    assert sorted(order) == list(range(50))
    assert order == permutation(50, "shuffle", 3)
    assert order != permutation(50, "shuffle", 4)
    assert order != list(range(50))


@pytest.mark.parametrize("size", [0, 1])
def test_permutations_of_nothing_and_of_one_exist(size: int) -> None:
    assert permutation(size, "shuffle") == list(range(size))


def test_torch_seeds_fit_and_differ_by_key() -> None:
    seeds = [torch_seed("dropout", step) for step in range(100)]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
