"""Writes that look like one that was checked: done at once; and all others, which are checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from known import CheckedError, needs_known_calls
from torch import Tensor

from pagedkv.attention import AttentionArgumentError, op, write_kv

pytestmark = needs_known_calls


def written(slots: list[int], value: float, **options: Any) -> Tensor:
    """The slots' first channel after a write of keys, and of values of the other sign."""
    keys, values = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8)
    new = torch.full((len(slots), 2, 8), value)
    write_kv(new, -new, keys, values, torch.tensor(slots), **options)
    assert torch.equal(values, -keys)
    return keys[..., 0, 0].flatten()


def test_the_next_write_is_not_checked(unchecked: Callable[[], None]) -> None:
    written([3, 5], 1.0)

    unchecked()
    found = written([7, -1], 2.0)

    assert found.nonzero().flatten().tolist() == [7]
    assert found[7] == 2.0
    with pytest.raises(CheckedError):
        written([7], 1.0)


@pytest.mark.parametrize("slots", [[3, 12], [-2, 3]])
def test_slots_out_of_range_are_refused_beside_a_known_write(slots: list[int]) -> None:
    written([3, 5], 1.0)

    with pytest.raises(AttentionArgumentError, match=r"slot_mapping must be in -1..11"):
        written(slots, 1.0)


def test_slots_are_not_looked_at_where_they_need_not_be(unchecked: Callable[[], None]) -> None:
    written([3, 5], 1.0)

    unchecked()
    assert written([11, 0], 1.0, check_slots=False).nonzero().flatten().tolist() == [0, 11]


@pytest.mark.parametrize("kind", ["latent", "scaled"])
def test_a_write_of_a_latent_and_one_with_scales_are_known_too(kind: str, unchecked: Callable[[], None]) -> None:
    new, slots = torch.ones(2, 1, 8), torch.tensor([1, 2])

    def latent() -> tuple[Tensor, ...]:
        cache = torch.zeros(3, 4, 1, 8)
        write_kv(new, None, cache, None, slots)
        return (cache,)

    def scaled() -> tuple[Tensor, ...]:
        caches = [torch.zeros(3, 4, 1, 8, dtype=torch.int8) for _ in range(2)]
        scales = [torch.zeros(3, 4, 1) for _ in range(2)]
        write_kv(new, new, *caches, slots, k_scale=scales[0], v_scale=scales[1])
        return *caches, *scales

    write = latent if kind == "latent" else scaled
    expected = write()
    unchecked()

    assert all(torch.equal(one, other) for one, other in zip(write(), expected, strict=True))
    assert expected[-1].count_nonzero() > 0


def test_another_backend_is_asked() -> None:
    written([3, 5], 1.0, backend="cpu")
    assert written([3, 5], 1.0, backend="reference").count_nonzero() == 2
    assert op._known_write is None
