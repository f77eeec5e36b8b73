"""Allocators of other projects, where they are installed: the tests find in them what docs/testing_allocators.md says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pagedkv import InvariantViolation
from pagedkv.testing import AllocatorTrial, verify

sys.path.append(str(Path(__file__).parents[2] / "examples" / "allocators"))


def adapter(package: str, module: str) -> Any:
    pytest.importorskip(package, reason=f"{package} is not installed")
    return pytest.importorskip(module)


@pytest.mark.parametrize(("package", "module"), [("nanovllm", "nano_vllm"), ("vllm", "vllm_block_pool")])
def test_a_second_close_is_silent(package: str, module: str) -> None:
    failure = verify(adapter(package, module).make_allocator, num_operations=100_000).failure

    assert failure is not None
    assert failure.invariant == "I9"
    assert [operation[0] for operation in failure.operations] == ["open", "close", "close"]


def test_nano_vllm_takes_no_second_block_where_blocks_hold_one_token() -> None:
    trial = AllocatorTrial(adapter("nanovllm", "nano_vllm").make_allocator, 4, 1)
    trial.open("a", [1])
    trial.extend("a", [2])

    with pytest.raises(InvariantViolation, match="I8: append"):
        trial.append("a", 1)


def test_vllm_hands_a_block_that_was_freed_twice_to_another_while_it_is_held() -> None:
    allocator = adapter("vllm", "vllm_block_pool").make_allocator(3, 2, 0)
    for sequence_id, tokens in (("a", [1, 2]), ("b", [1, 2, 3])):
        allocator.open(sequence_id, tokens, salt=b"")
        allocator.append(sequence_id, len(tokens) - allocator.requests[sequence_id].num_computed)
    allocator.close("a")
    allocator.close("a")
    allocator.open("c", [7, 7, 7, 7], salt=b"")
    allocator.append("c", 4)

    assert set(allocator.block_table("b")) & set(allocator.block_table("c")) == {0}
