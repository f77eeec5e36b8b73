"""The plan of one step: made once on the host, checked, shared by all layers that look alike."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pagedkv.attention.backends import KnownAttention, backend_named, pick_for_device
from pagedkv.attention.checks import checked_window
from pagedkv.attention.errors import AttentionArgumentError
from pagedkv.attention.partition import Int32s, PlanCounts, make_plan
from pagedkv.attention.shared_prefixes import check_shared, check_shared_blocks, make_shared_plan

__all__ = ["AttentionPlan", "check_block_tables", "check_lengths", "check_table_rows", "on_host", "plan"]

# The usual step has none: one tensor of no elements serves all of their plans.
_NO_MERGES = torch.empty((4, 0), dtype=torch.int32, device="cpu")


@dataclass(slots=True, eq=False)
class AttentionPlan:
    """The tasks of one step. A task computes attention of some query tokens over a range of keys, for all heads.

    tasks:  (6, num_tasks) int32, on the device: seq_idx, first and end query token (indices into the packed query),
            first and end key (positions in the sequence), and partial_idx. Decode tasks come first, then prefill tasks;
            tasks that were not split are in order of length, the longest first. partial_idx is -1 where the task
            writes straight to `out`; otherwise its tokens' partial results start at this index in a workspace of
            (num_partial_tokens, q_heads, value_dim).
    merges: (4, num_merges) int32: first and end query token, first partial_idx, number of splits. Split s of token t
            lies at first partial_idx + s * (end - first) + (t - first).
    """

    tasks: Tensor
    merges: Tensor
    counts: PlanCounts
    num_seqs: int
    num_tokens: int
    max_query_len: int
    heads: tuple[int, int]
    causal: bool
    window: tuple[int, int]
    backend: str
    shares_prefixes: bool = False
    """Whether some tasks serve several sequences: then there is neither a window, nor ALiBi, nor a tree mask."""
    made_for: tuple[Tensor, Tensor] | None = None
    """seq_lens and query_start_loc, copied, by which a call on the CPU knows its own plan; None for other devices."""
    known: KnownAttention | None = field(default=None, init=False)
    """The last call that was checked, from the first call on where the backend has such a thing: the only field that changes."""

    def take_over(self, other: AttentionPlan) -> None:
        """Become the plan of another step in place: the tensors that a captured CUDA graph reads get `other`'s tasks.

        Both must be of `fixed_size`, for as many sequences with as many query tokens each. Raises AttentionArgumentError,
        with nothing changed, if they differ in anything but their tasks.
        """
        mine = (self.counts, self.num_seqs, self.num_tokens, self.max_query_len, self.heads, self.causal, self.window)
        others = (
            other.counts,
            other.num_seqs,
            other.num_tokens,
            other.max_query_len,
            other.heads,
            other.causal,
            other.window,
        )
        if mine != others or self.backend != other.backend or self.tasks.shape != other.tasks.shape:
            raise AttentionArgumentError(f"a plan of {mine} cannot take over one of {others}: were both of fixed_size?")
        self.tasks.copy_(other.tasks, non_blocking=True)
        self.merges.copy_(other.merges, non_blocking=True)
        if self.made_for is not None and other.made_for is not None:
            for own, others_own in zip(self.made_for, other.made_for, strict=True):
                own.copy_(others_own)


def plan(
    seq_lens: Int32s | Tensor,
    query_start_loc: Int32s | Tensor,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    block_tables: Int32s | Tensor | None = None,
    num_blocks: int | None = None,
    block_size: int | None = None,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    fixed_size: bool = False,
    shared: Int32s | Tensor | None = None,
) -> AttentionPlan:
    """Divide the work of one step among the device's workers: once per step, for all layers that look alike.

    seq_lens, query_start_loc: as in `paged_attention`, best as numpy arrays, which the host has anyway
    block_tables, num_blocks, block_size: given together, the entries that a query may read are checked; left out, the
        range check is off, and an entry out of range reads foreign memory
    backend: the one that will be asked; None takes the first that runs on the device, before the call's features are known
    fixed_size: as many tasks as any lengths can need, empty ones among them, so that `take_over` can renew the plan of a
        captured CUDA graph
    shared: (seqs,) int32, by `shared_with_previous`: prefixes that are read once for several decodes, where the backend
        can do that and it pays. Then the call may have no ALiBi slopes and no tree mask. That the blocks are the same is
        checked where block_tables are given

    Raises AttentionArgumentError on lengths that are no batch's and on table entries out of range. O(seqs + tasks).
    """
    if num_kv_heads < 1 or num_q_heads < 1 or num_q_heads % num_kv_heads:
        raise AttentionArgumentError(f"q_heads ({num_q_heads}) must be a multiple of kv_heads ({num_kv_heads})")
    lengths, starts = on_host("seq_lens", seq_lens, 1), on_host("query_start_loc", query_start_loc, 1)
    sides = checked_window(window)
    max_query_len = check_lengths(lengths, starts, None)
    if not (block_tables is None) == (num_blocks is None) == (block_size is None):
        raise AttentionArgumentError("block_tables, num_blocks and block_size are given together or not at all")
    shares = None if shared is None else on_host("shared", shared, 1)
    if shares is not None:
        check_shared(shares, lengths, starts)
    if block_tables is not None and num_blocks is not None and block_size is not None:
        tables = on_host("block_tables", block_tables, 2)
        check_block_tables(tables, lengths, starts, num_blocks=num_blocks, block_size=block_size, window_left=sides[0])
        if shares is not None:
            check_shared_blocks(shares, tables, block_size)
    device = torch.device(device)
    chosen = pick_for_device(device) if backend is None else backend_named(backend)
    partition = chosen.partition(num_q_heads, num_kv_heads, device)
    made = None
    if shares is not None and partition.shares_prefixes and causal and sides == (-1, -1) and not fixed_size:
        made = make_shared_plan(lengths, starts, shares, partition, heads_per_kv_head=num_q_heads // num_kv_heads)
    tasks, merges, counts = made or make_plan(
        lengths,
        starts,
        partition,
        heads_per_kv_head=num_q_heads // num_kv_heads,
        causal=causal,
        window=sides,
        fixed_size=fixed_size,
    )
    return AttentionPlan(
        tasks=_on_device(tasks, device),
        merges=_NO_MERGES if device.type == "cpu" and not merges.size else _on_device(merges, device),
        counts=counts,
        num_seqs=len(lengths),
        num_tokens=int(starts[-1]),
        max_query_len=max_query_len,
        heads=(num_q_heads, num_kv_heads),
        causal=causal,
        window=sides,
        backend=chosen.name,
        shares_prefixes=made is not None,
        made_for=(_on_device(lengths.copy(), device), _on_device(starts.copy(), device))
        if device.type == "cpu"
        else None,
    )


def on_host(name: str, values: Int32s | Tensor, ndim: int) -> Int32s:
    """The array. Raises AttentionArgumentError unless it is of int32 and has so many dimensions."""
    array: Int32s = values.numpy(force=True) if isinstance(values, Tensor) else values
    if not isinstance(array, np.ndarray) or array.dtype != np.int32 or array.ndim != ndim:
        found = f"{array.dtype} of {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise AttentionArgumentError(f"{name} must be {ndim}-D int32, found {found}")
    return array


def _on_device(array: Int32s, device: torch.device) -> Tensor:
    if torch.is_inference_mode_enabled():
        # A plan may outlive the mode that it was made in, and `take_over` writes to its tensors.
        with torch.inference_mode(False):
            return _on_device(array, device)
    tensor = torch.from_numpy(array)
    # `to` takes half a microsecond even where there is nothing to do.
    if device.type == "cpu":
        return tensor
    # From memory that is not pinned, a copy waits for all that the GPU has been given so far.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def check_lengths(seq_lens: Int32s, query_start_loc: Int32s, num_tokens: int | None) -> int:
    """The most query tokens that a sequence has. O(num_seqs).

    Raises AttentionArgumentError unless the lengths are those of a batch.
    """
    if len(query_start_loc) != len(seq_lens) + 1:
        raise AttentionArgumentError(
            f"query_start_loc must have one more entry than seq_lens ({len(seq_lens)}), found {len(query_start_loc)}"
        )
    # argmin, argmax and count_nonzero take a fifth of the time of min, max and any on arrays this short.
    if len(seq_lens) and seq_lens[seq_lens.argmin()] < 0:
        raise AttentionArgumentError(f"seq_lens must not be negative, found {int(seq_lens.min())}")
    # Were one below 0, a difference could overflow, and a fall look like a rise.
    num_queries = query_start_loc[1:] - query_start_loc[:-1]
    if (
        query_start_loc[0] != 0
        or query_start_loc[query_start_loc.argmin()] < 0
        or (len(num_queries) and num_queries[num_queries.argmin()] < 0)
    ):
        raise AttentionArgumentError("query_start_loc must start with 0 and never fall")
    if num_tokens is not None and int(query_start_loc[-1]) != num_tokens:
        raise AttentionArgumentError(
            f"query_start_loc must end with the number of query tokens ({num_tokens}), found {int(query_start_loc[-1])}"
        )
    return int(num_queries[num_queries.argmax()]) if len(num_queries) else 0


def check_table_rows(block_tables: Int32s, seq_lens: Int32s) -> None:
    """Raise AttentionArgumentError unless there is a row for each sequence. O(1)."""
    if len(block_tables) != len(seq_lens):
        raise AttentionArgumentError(
            f"block_tables must have a row for each of {len(seq_lens)} seq_lens, found {len(block_tables)}"
        )


def check_block_tables(
    block_tables: Int32s,
    seq_lens: Int32s,
    query_start_loc: Int32s,
    *,
    num_blocks: int,
    block_size: int,
    window_left: int,
) -> None:
    """Raise AttentionArgumentError unless every sequence has a row, and every entry that a query may read is a block.

    Entries behind the window and past the sequence's end are not looked at: they may hold anything.
    O(num_seqs * max_blocks).
    """
    if block_size < 1 or num_blocks < 0:
        raise AttentionArgumentError(
            f"block_size must be at least 1 and num_blocks at least 0, found {block_size} and {num_blocks}"
        )
    check_table_rows(block_tables, seq_lens)
    num_queries = np.diff(query_start_loc)
    lengths = np.where(num_queries > 0, seq_lens, 0)
    num_used = -(-lengths // block_size)
    if len(num_used) and int(num_used.max()) > block_tables.shape[1]:
        seq_idx = int(num_used.argmax())
        raise AttentionArgumentError(
            f"sequence {seq_idx} has {int(lengths[seq_idx])} tokens and needs {int(num_used[seq_idx])} blocks of "
            f"{block_size}, but block_tables has {block_tables.shape[1]} columns"
        )
    # Viewed as unsigned, a negative id is a large one: one comparison finds both.
    entries = block_tables.view(np.uint32)
    if not entries.size or int(entries.max()) < num_blocks:
        # The usual case, at a sixth of the cost: unused entries hold old ids, or zeros.
        return
    first_used = np.maximum(lengths - num_queries - window_left, 0) // block_size if window_left >= 0 else 0
    columns = np.arange(block_tables.shape[1])
    is_used = (columns < num_used[:, None]) & (columns >= np.reshape(first_used, (-1, 1)))
    is_wrong = is_used & (entries >= num_blocks)
    if is_wrong.any():
        seq_idx, column = (int(i) for i in np.argwhere(is_wrong)[0])
        raise AttentionArgumentError(
            f"block_tables[{seq_idx}, {column}] = {int(block_tables[seq_idx, column])} is no block: "
            f"the cache has {num_blocks}"
        )
