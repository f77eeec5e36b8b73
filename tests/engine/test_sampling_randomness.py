"""Random numbers come from a seed and a position alone."""

from __future__ import annotations

import numpy as np
import pytest

from pagedkv.engine.sampling.randomness import seed_for, stream_key, uniforms
from pagedkv.errors import InvalidArgumentError


def stream(seed: int, positions: np.ndarray) -> np.ndarray:
    return uniforms(np.full(len(positions), stream_key(seed)), positions)


def test_they_are_those_of_splitmix64() -> None:
    """First outputs of SplitMix64 with state 1234567 (the values that Rosetta Code lists)."""
    found = uniforms(np.full(3, 1234567, np.uint64), np.arange(3))

    assert [int(value * 2**53) for value in found] == [
        6457827717110365317 >> 11,
        3203168211198807973 >> 11,
        9817491932198370423 >> 11,
    ]


def test_a_number_does_not_depend_on_its_neighbours() -> None:
    together = stream(5, np.arange(100))

    assert stream(5, np.array([63])).tolist() == [together[63]]
    assert stream(5, np.array([9, 3, 9])).tolist() == together[[9, 3, 9]].tolist()


def test_they_are_even_along_positions_and_along_seeds() -> None:
    along_positions = stream(0, np.arange(100_000))
    along_seeds = uniforms(np.array([stream_key(seed) for seed in range(20_000)]), np.zeros(20_000, np.int64))

    for numbers in (along_positions, along_seeds):
        expected = len(numbers) / 100
        observed = np.bincount((numbers * 100).astype(int), minlength=100)
        chi_square = ((observed - expected) ** 2 / expected).sum()
        assert 60 < chi_square < 149  # 99 degrees of freedom: 0.1 % lie above 149, 0.1 % below 60
    pairs = np.corrcoef(along_positions[:-1], along_positions[1:])[0, 1]
    assert abs(pairs) < 0.01


def test_samples_of_one_request_have_different_seeds() -> None:
    seeds = {seed_for(base, idx) for base in (0, 1, 2**64 - 1) for idx in range(1000)}

    assert len(seeds) == 3000
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_wrong_seeds_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="base_seed must be in"):
        seed_for(-1, 0)
    with pytest.raises(InvalidArgumentError, match=r"seed must be a whole number, found 0.5"):
        stream_key(0.5)  # type: ignore[arg-type]
