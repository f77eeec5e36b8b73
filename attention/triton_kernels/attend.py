"""Attention of one task: a tile of query rows against a range of keys, by an online softmax.

Source: Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 1. A tile's rows are the query tokens of the task times the
heads of one KV head, so that a decode step of grouped heads reads each key once. Keys are read `KEYS` at a time whatever the
block size: row r of a tile lies in entry r // BLOCK_SIZE of the table. `parts` says what the two parts of a head are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pagedkv.attention.triton_kernels.numbers import log2_of, narrowed, product, tanh
from pagedkv.attention.triton_kernels.parts import channels_of, read_parts, store_parts

__all__ = ["attend_tasks"]

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


# What differs from call to call must not compile another kernel.
@triton.jit(
    do_not_specialize=["window_left", "window_right", "first_task", "stride_table", "stride_tasks", "stride_tree"]
)
def attend_tasks(
    out,
    lse,
    partial_out,
    partial_lse,
    query,
    key_cache,
    value_cache,
    block_tables,
    seq_lens,
    query_start_loc,
    tasks,
    sinks,
    alibi_slopes,
    tree_mask,
    k_scale,
    v_scale,
    scale,
    softcap,
    window_left,
    window_right,
    first_task,
    num_kv_heads,
    stride_out_token,
    stride_out_head,
    stride_query_token,
    stride_query_head,
    stride_key_block,
    stride_key_slot,
    stride_key_head,
    stride_value_block,
    stride_value_slot,
    stride_value_head,
    stride_k_scale_block,
    stride_k_scale_slot,
    stride_k_scale_head,
    stride_k_scale_group,
    stride_v_scale_block,
    stride_v_scale_slot,
    stride_v_scale_head,
    stride_v_scale_group,
    stride_table,
    stride_tasks,
    stride_tree,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEY_A: tl.constexpr,
    KEY_B: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_A: tl.constexpr,
    VALUE_B: tl.constexpr,
    KEY_GROUP_BYTES: tl.constexpr,
    VALUE_GROUP_BYTES: tl.constexpr,
    VALUES_ARE_KEYS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_PLAIN: tl.constexpr,
    IN_FLOAT16: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One program: `ROWS` of the rows of one task for one KV head. `launch` says what the arguments are.

    The grid is one-dimensional, row tiles and KV heads of a task side by side: their keys lie side by side in memory, or
    are the same. A task without query tokens is none, so a plan may be padded with zeros.
    """
    program = tl.program_id(0)
    row_tile = program % ROW_TILES
    kv_head = (program // ROW_TILES) % num_kv_heads
    task = tasks + first_task + program // ROW_TILES // num_kv_heads
    first_token = tl.load(task + stride_tasks)
    end_token = tl.load(task + 2 * stride_tasks)
    if row_tile * ROWS >= (end_token - first_token) * GROUP:
        return
    seq_idx = tl.load(task)
    first_key = tl.load(task + 3 * stride_tasks)
    end_key = tl.load(task + 4 * stride_tasks)
    partial_idx = tl.load(task + 5 * stride_tasks)
    length = tl.load(seq_lens + seq_idx)
    end_of_queries = tl.load(query_start_loc + seq_idx + 1)

    rows = row_tile * ROWS + tl.arange(0, ROWS)
    tokens = first_token + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    row_exists = tokens < end_token
    # The last query token stands at the sequence's last position.
    positions = tokens + (length - end_of_queries)

    DTYPE: tl.constexpr = tl.float16 if IN_FLOAT16 else query.dtype.element_ty
    query_rows = query + tokens.to(tl.int64) * stride_query_token + heads.to(tl.int64) * stride_query_head
    channels = channels_of(KEY_A, FORMAT, 0, False)
    mask = row_exists[:, None] & (channels < HEAD_DIM)[None, :]
    query_a = tl.load(query_rows[:, None] + channels[None, :], mask=mask, other=0.0)
    query_b = query_a
    if KEY_B > 0:
        channels = channels_of(KEY_B, FORMAT, KEY_A, True)
        mask = row_exists[:, None] & (channels < HEAD_DIM)[None, :]
        query_b = tl.load(query_rows[:, None] + channels[None, :], mask=mask, other=0.0)
    # What turns a product into a score in units of log 2.
    factor = tl.full((ROWS,), 1.0, tl.float32) * scale
    if IN_FLOAT16:
        # A row's largest number goes to 1..2, by a power of two: float16 has not the exponents of bfloat16.
        largest = tl.max(tl.abs(query_a.to(tl.float32)), 1)
        if KEY_B > 0:
            largest = tl.maximum(largest, tl.max(tl.abs(query_b.to(tl.float32)), 1))
        power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.where(power > 0, power, 1.0)
        query_a = (query_a.to(tl.float32) / power[:, None]).to(tl.float16)
        if KEY_B > 0:
            query_b = (query_b.to(tl.float32) / power[:, None]).to(tl.float16)
        factor *= power
    value_factor = 1.0
    if FORMAT == "fp8_e4m3" or FORMAT == "fp8_e5m2":
        if k_scale is not None:
            factor *= tl.load(k_scale + kv_head.to(tl.int64) * stride_k_scale_head)
        if v_scale is not None:
            value_factor = tl.load(v_scale + kv_head.to(tl.int64) * stride_v_scale_head)
    if not HAS_SOFTCAP:
        factor *= LOG2_E
    slopes = factor
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + heads, mask=row_exists, other=0.0) * LOG2_E

    # Tiles of keys: the first may be cut by the window's left side, the last ones by its right side, by the tree and by the
    # end; those between are seen by all rows and need no mask.
    tile_first = first_token + row_tile * ROWS // GROUP + (length - end_of_queries)
    tile_last = tl.minimum(first_token + (row_tile * ROWS + ROWS - 1) // GROUP, end_token - 1)
    tile_last += length - end_of_queries
    if HAS_LEFT:
        first_key = tl.maximum(first_key, tile_first - window_left)
    if HAS_RIGHT:
        end_key = tl.minimum(end_key, tile_last + window_right + 1)
    num_tiles = tl.cdiv(tl.maximum(end_key - first_key, 0), KEYS)
    full_start = 0
    if HAS_LEFT:
        full_start = tl.minimum(tl.cdiv(tl.maximum(tile_last - window_left - first_key, 0), KEYS), num_tiles)
    seen_end = end_key
    if HAS_RIGHT:
        seen_end = tl.minimum(seen_end, tile_first + window_right + 1)
    num_before = length
    if tree_mask is not None:
        num_before = length - (end_of_queries - tl.load(query_start_loc + seq_idx))
        seen_end = tl.minimum(seen_end, num_before)
    full_end = tl.maximum(tl.maximum(seen_end - first_key, 0) // KEYS, full_start)

    table = block_tables + seq_idx.to(tl.int64) * stride_table
    keys = key_cache + kv_head.to(tl.int64) * stride_key_head
    values = value_cache + kv_head.to(tl.int64) * stride_value_head
    highest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sum_a = tl.zeros((ROWS, VALUE_A), tl.float32)
    sum_b = tl.zeros((ROWS, VALUE_B if VALUE_B > 0 else 1), tl.float32)
    # int8: the largest scale of a value so far; sums are in units of it.
    unit = 0.0

    # Compiled twice: without masks, then with them.
    for MASKED in tl.static_range(2):
        start, stop = full_start, full_end
        if MASKED:
            start, stop = 0, full_start + num_tiles - full_end
        for step in tl.range(start, stop):
            tile = step
            if MASKED:
                tile = tl.where(step < full_start, step, step - full_start + full_end)
            key_positions = first_key + tile * KEYS + tl.arange(0, KEYS)
            in_range = key_positions < end_key
            if MASKED:
                block_ids = tl.load(table + key_positions // BLOCK_SIZE, mask=in_range, other=0).to(tl.int64)
            else:
                block_ids = tl.load(table + key_positions // BLOCK_SIZE).to(tl.int64)
            slots = (key_positions % BLOCK_SIZE).to(tl.int64)
            key_rows = keys + block_ids * stride_key_block + slots * stride_key_slot
            value_rows = values + block_ids * stride_value_block + slots * stride_value_slot
            key_scales = key_rows
            value_scales = value_rows
            if FORMAT == "int8" or FORMAT == "int4":
                key_scales = k_scale + block_ids * stride_k_scale_block + slots * stride_k_scale_slot
                key_scales += kv_head.to(tl.int64) * stride_k_scale_head
                value_scales = v_scale + block_ids * stride_v_scale_block + slots * stride_v_scale_slot
                value_scales += kv_head.to(tl.int64) * stride_v_scale_head

            key_a, key_b = read_parts(
                key_rows, key_scales, stride_k_scale_group, in_range,
                HEAD_DIM, KEY_A, KEY_B, FORMAT, KEY_GROUP_BYTES, DTYPE, MASKED, True,
            )  # fmt: skip
            scores = product(query_a, key_a, tl.zeros((ROWS, KEYS), tl.float32))
            if KEY_B > 0:
                scores = product(query_b, key_b, scores)
            if FORMAT == "int8":
                if MASKED:
                    scores *= tl.load(key_scales, mask=in_range, other=0.0)[None, :]
                else:
                    scores *= tl.load(key_scales)[None, :]

            if MASKED or not IS_PLAIN:
                scores *= factor[:, None]
                if HAS_SOFTCAP:
                    scores = tanh(scores / softcap) * (softcap * LOG2_E)
                if alibi_slopes is not None:
                    distances = tl.abs(key_positions[None, :] - positions[:, None])
                    scores -= slopes[:, None] * distances.to(tl.float32)
                if MASKED:
                    visible = in_range[None, :]
                    if HAS_LEFT:
                        visible &= key_positions[None, :] >= (positions - window_left)[:, None]
                    if HAS_RIGHT:
                        visible &= key_positions[None, :] <= (positions + window_right)[:, None]
                    if tree_mask is not None:
                        branch = key_positions - num_before
                        word_mask = row_exists[:, None] & (in_range & (branch >= 0))[None, :]
                        tree_rows = tree_mask + tokens.to(tl.int64) * stride_tree
                        words = tl.load(tree_rows[:, None] + (branch >> 5)[None, :], mask=word_mask, other=0)
                        visible &= (branch < 0)[None, :] | (((words >> (branch & 31)[None, :]) & 1) == 1)
                    scores = tl.where(visible, scores, -float("inf"))
                new_highest = tl.maximum(highest, tl.max(scores, 1))
                # A row that has seen nothing yet: any base will do but -inf.
                base = tl.where(new_highest == -float("inf"), 0.0, new_highest)
                weights = tl.exp2(scores - base[:, None])
                decay = tl.exp2(highest - base)
            else:
                # The maximum before the factor, which is not negative: one multiplication less for every score.
                new_highest = tl.maximum(highest, tl.max(scores, 1) * factor)
                weights = tl.exp2(scores * factor[:, None] - new_highest[:, None])
                decay = tl.exp2(highest - new_highest)
            highest = new_highest
            total = total * decay + tl.sum(weights, 1)
            if MASKED and tree_mask is not None:
                # Values that no row sees may be NaN, and a weight of 0 does not undo that. Without a tree the range ends
                # where the rows' sight does.
                is_seen = tl.max(weights, 0) > 0
            if FORMAT == "int8":
                if MASKED:
                    token_scales = tl.load(value_scales, mask=in_range, other=0.0)
                    if tree_mask is not None:
                        token_scales = tl.where(is_seen, token_scales, 0.0)
                else:
                    token_scales = tl.load(value_scales)
                new_unit = tl.maximum(unit, tl.max(tl.abs(token_scales), 0))
                safe_unit = tl.where(new_unit > 0, new_unit, 1.0)
                weights *= (token_scales / safe_unit)[None, :]
                decay *= unit / safe_unit
                unit = new_unit

            if VALUES_ARE_KEYS:
                value_a = tl.trans(key_a)
                value_b = value_a
            else:
                value_a, value_b = read_parts(
                    value_rows, value_scales, stride_v_scale_group, in_range,
                    VALUE_DIM, VALUE_A, VALUE_B, FORMAT, VALUE_GROUP_BYTES, DTYPE, MASKED, False,
                )  # fmt: skip
            if MASKED and tree_mask is not None:
                value_a = tl.where(is_seen[:, None], value_a, 0.0)
                if VALUE_B > 0:
                    value_b = tl.where(is_seen[:, None], value_b, 0.0)
            shares = narrowed(weights, DTYPE)
            sum_a = product(shares, value_a, sum_a * decay[:, None])
            if VALUE_B > 0:
                sum_b = product(shares, value_b, sum_b * decay[:, None])

    if FORMAT == "int8":
        value_factor = unit
    share = value_factor / tl.where(total > 0, total, 1.0)
    num_q_heads = num_kv_heads * GROUP
    if partial_idx >= 0:
        # The merge adds the sink, once.
        places = (partial_idx + tokens - first_token).to(tl.int64) * num_q_heads + heads
        tl.store(partial_lse + places, (highest + log2_of(total)) * LN_2, mask=row_exists)
        store_parts(
            partial_out + places * VALUE_DIM, sum_a, sum_b, share, row_exists, VALUE_DIM, VALUE_A, VALUE_B, FORMAT
        )
    else:
        if sinks is not None:
            sink = tl.load(sinks + heads, mask=row_exists, other=0.0) * LOG2_E
            with_sink = tl.maximum(highest, sink)
            base = tl.where(with_sink == -float("inf"), 0.0, with_sink)
            decay = tl.exp2(highest - base)
            total = total * decay + tl.exp2(sink - base)
            share = value_factor * decay / tl.where(total > 0, total, 1.0)
            highest = with_sink
        if lse is not None:
            places = tokens.to(tl.int64) * num_q_heads + heads
            tl.store(lse + places, (highest + log2_of(total)) * LN_2, mask=row_exists)
        out_rows = out + tokens.to(tl.int64) * stride_out_token + heads.to(tl.int64) * stride_out_head
        store_parts(out_rows, sum_a, sum_b, share, row_exists, VALUE_DIM, VALUE_A, VALUE_B, FORMAT)
