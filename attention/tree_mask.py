"""Tree masks: which of its own sequence's query tokens a query token sees, one bit each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pagedkv.attention.errors import AttentionArgumentError
from pagedkv.attention.partition import Int32s

__all__ = ["pack_tree_mask", "tree_mask_from_parents"]


def pack_tree_mask(visible: Tensor) -> Tensor:
    """Bits for `paged_attention`'s tree_mask, from one boolean each.

    visible: (tokens, max_query_len) bool; [i, j]: token i sees the j-th query token of its own sequence
    Returns (tokens, words) int32 with words = cdiv(max_query_len, 32), at least 1: bit j % 32 of word j // 32 of row i.
    Raises AttentionArgumentError if `visible` is no 2-D bool tensor. O(tokens * max_query_len).

    >>> pack_tree_mask(torch.tensor([[True, False], [True, True]])).tolist()
    [[1], [3]]
    """
    if visible.ndim != 2 or visible.dtype != torch.bool:
        raise AttentionArgumentError(f"visible must be 2-D bool, found {visible.dtype} {tuple(visible.shape)}")
    num_tokens, width = visible.shape
    num_words = max(-(-width // 32), 1)
    bits = torch.zeros((num_tokens, num_words * 32), dtype=torch.int64, device=visible.device)
    bits[:, :width] = visible
    words = (bits.view(num_tokens, num_words, 32) << torch.arange(32, device=visible.device)).sum(-1)
    # Bit 31 is int32's sign: the same 32 bits, read as a signed number.
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def tree_mask_from_parents(parents: Int32s | Tensor, query_start_loc: Int32s | Tensor) -> Tensor:
    """The mask of drafts that are trees: a token sees its ancestors and itself.

    parents:         (tokens,) int32: which query token of its own sequence a token follows; it must stand before it. -1
                     for one that follows the cached tokens
    query_start_loc: (seqs + 1,) int32: where each sequence's query tokens start; 0 first, tokens last
    Returns (tokens, words) int32 on the CPU, see `pack_tree_mask`. Raises AttentionArgumentError if a parent does not stand
    before its child, or the lengths do not fit. O(tokens * words), one token after the other, for a child's ancestors are
    its parent's and the parent.

    >>> tree_mask_from_parents(np.array([-1, 0, 0], np.int32), np.array([0, 3], np.int32)).tolist()
    [[1], [3], [5]]
    """
    parents, starts = _on_host("parents", parents), _on_host("query_start_loc", query_start_loc)
    if not len(starts) or starts[0] != 0 or starts[-1] != len(parents) or (np.diff(starts) < 0).any():
        raise AttentionArgumentError(
            f"query_start_loc must start with 0, never fall and end with the number of parents ({len(parents)})"
        )
    counts = np.diff(starts)
    nth = np.arange(len(parents)) - starts[:-1].repeat(counts)
    is_wrong = (parents < -1) | (parents >= nth)
    if is_wrong.any():
        token = int(is_wrong.argmax())
        raise AttentionArgumentError(
            f"parents[{token}] = {int(parents[token])} must be -1 or stand before query token {int(nth[token])} "
            "of its sequence"
        )
    num_words = max(-(-int(counts.max(initial=0)) // 32), 1)
    masks = np.zeros((len(parents), num_words), np.uint32)
    # A parent's row in the packed order; each row is finished before a later one copies it.
    rows = (np.arange(len(parents)) - nth + parents).tolist()
    for token, (idx, parent, row) in enumerate(zip(nth.tolist(), parents.tolist(), rows, strict=True)):
        if parent >= 0:
            masks[token] = masks[row]
        masks[token, idx // 32] |= np.uint32(1 << (idx % 32))
    return torch.from_numpy(masks.view(np.int32))


def _on_host(name: str, values: Int32s | Tensor) -> Int32s:
    array: Int32s = values.numpy(force=True) if isinstance(values, Tensor) else values
    if not isinstance(array, np.ndarray) or array.dtype != np.int32 or array.ndim != 1:
        found = f"{array.dtype} of {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise AttentionArgumentError(f"{name} must be 1-D int32, found {found}")
    return array
