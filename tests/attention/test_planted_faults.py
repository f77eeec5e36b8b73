"""Faults of one line, planted into the model of a kernel: the comparison must catch each of them.

A fault replaces a piece of kernel_model.py. If that piece is no longer there, the test fails and says so: plant the fault
anew. `pytest -s` shows after how many random batches each was caught.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import kernel_model
import pytest
from agreement import check_call, divided, failure
from batches import Batch
from random_batches import random_batch

from pagedkv.attention import backend_info
from pagedkv.attention.backends import _REGISTRY

SOURCE = Path(str(kernel_model.__file__))

NUM_BATCHES = 200

FAULTS = {
    # Which keys are seen
    "a query sees the key after its own": ("visible &= distance <= 0", "visible &= distance <= 1"),
    "a query does not see its own key": ("visible &= distance <= 0", "visible &= distance < 0"),
    "causal is aligned top left": (
        "torch.arange(length - (seq_end - first), length - (seq_end - end))",
        "torch.arange(first - seq_start, end - seq_start)",
    ),
    "the window is one key short": ("distance >= -call.window_left", "distance > -call.window_left"),
    "the window is one key long": ("distance >= -call.window_left", "distance >= -call.window_left - 1"),
    "a window without keys before is none": ("if call.window_left >= 0", "if call.window_left > 0"),
    "the window to the right is not looked at": ("if call.window_right >= 0", "if False"),
    "the tree mask is not looked at": ("visible &= (among < 0)", "visible |= (among < 0)"),
    "only the tree mask's first word is read": ("among // 32, 0, call.tree_mask.shape[1] - 1", "among // 32, 0, 0"),
    "the tree mask is read from bit 1": (">> (among % 32)", ">> ((among + 1) % 32)"),
    "a split loses its last key": ("(positions < end_key)", "(positions < end_key - 1)"),
    "keys of the next split are read too": ("(positions < end_key)", "(positions < length)"),
    "keys before the split are read too": ("(positions >= first_key)", "(positions >= 0)"),
    # Where keys are found
    "blocks are taken to hold 16": (
        "block_size, num_kv_heads = call.key_cache.shape[1:3]",
        "block_size, num_kv_heads = 16, call.key_cache.shape[2]",
    ),
    "all sequences use the first table": ("call.block_tables[seq_idx, column]", "call.block_tables[0, column]"),
    "blocks lie one after another": ("int(call.block_tables[seq_idx, column])", "column % call.key_cache.shape[0]"),
    "caches are taken to be contiguous": (
        "codes = cache[block_id]",
        "codes = cache.as_strided(cache.shape, torch.empty(cache.shape).stride())[block_id]",
    ),
    "unused values are multiplied by zero": ("torch.where(visible.any(0)[:, None, None], values, 0)", "values"),
    "unused scores are added to": (
        "torch.where(visible[:, None, None], scores, -torch.inf)",
        "scores + torch.where(visible[:, None, None], 0, -torch.inf)",
    ),
    "query heads are dealt out in turn": (
        "query.view(end - first, num_kv_heads, num_q_heads // num_kv_heads, -1)",
        "query.view(end - first, num_q_heads // num_kv_heads, num_kv_heads, -1).transpose(1, 2)",
    ),
    "the query is taken to be contiguous": (
        "call.query[first:end].float()",
        "call.query.as_strided(call.query.shape, call.query.contiguous().stride())[first:end].float()",
    ),
    # What codes mean
    "int4 nibbles are swapped": ("low, high = codes & 15, codes >> 4", "high, low = codes & 15, codes >> 4"),
    "int4 has no minimum": ("nibbles * step + minimum", "nibbles * step"),
    "int4 has one group": (
        ".repeat_interleave(nibbles.shape[-1] // scale.shape[3], 2)",
        "[..., :1, :].repeat_interleave(nibbles.shape[-1], 2)",
    ),
    "int8 scales are those of the first block": ("scale = scale[block_id]", "scale = scale[0]"),
    "fp8 scales are those of the first head": ("scale = scale[None]", "scale = scale[None, :1]"),
    "values are scaled like keys": ("call.value_cache, call.v_scale", "call.value_cache, call.k_scale"),
    "fp8 is not scaled": ("    if scale is None:", "    if scale is None or scale.ndim < 3:"),
    # Scores
    "the scale is not looked at": ("* call.scale", "* call.query.shape[2] ** -0.5"),
    "the soft-cap caps at one": ("call.softcap * torch.tanh", "torch.tanh"),
    "the soft-cap is not looked at": ("if call.softcap > 0", "if False"),
    "ALiBi is added": ("scores = scores - slopes", "scores = scores + slopes"),
    "ALiBi forgets the sign of a distance": ("distance.abs()[:, None, None]", "(-distance)[:, None, None]"),
    "ALiBi slopes are those of the KV head": (
        "call.alibi_slopes.view(1, num_kv_heads, -1, 1)",
        "call.alibi_slopes.view(1, num_kv_heads, -1, 1)[:, :, :1]",
    ),
    # Softmax
    "sums are not rescaled": ("weighted = weighted * decay", "weighted = weighted"),
    "the denominator is not rescaled": ("total = total * decay", "total = total"),
    "a query that sees nothing is NaN": ("weighted / torch.where(total > 0, total, 1)", "weighted / total"),
    "a query that sees nothing has a finite LSE": ("torch.log(total), -torch.inf)", "torch.log(total), -1e30)"),
    "the LSE is of base 2": ("highest + torch.log(total)", "(highest + torch.log(total)) * 1.4426950408889634"),
    "the maximum is left out of the LSE": ("highest + torch.log(total)", "torch.log(total)"),
    # Sinks and merges
    "sinks are not looked at": ("if call.sinks is not None", "if False"),
    "sinks are left out of the LSE": ("        lse = total\n", ""),
    "a sink of no weight is NaN": ("torch.where(total == -torch.inf, 0, total)", "total"),
    "splits are averaged": ("(outs * weights[..., None]).sum(0)", "outs.mean(0)"),
    "the last split is not merged": ("(outs * weights[..., None]).sum(0)", "(outs * weights[..., None])[:-1].sum(0)"),
    "splits that see nothing are NaN": ("torch.where(lse == -torch.inf, 0, lse)", "lse"),
    "partial results are laid out token by token": (
        "partial_out[parts].view(num_splits, end - first, num_q_heads, value_dim)",
        "partial_out[parts].view(end - first, num_splits, num_q_heads, value_dim).transpose(0, 1)",
    ),
    # Storing
    "the output is taken to be contiguous": (
        "    call.out[first:end] = out.to(call.out.dtype)",
        "    call.out.as_strided(call.out.shape, out.contiguous().stride())[first:end] = out.to(call.out.dtype)",
    ),
    "one token too many is stored": (
        "    call.out[first:end] = out.to(call.out.dtype)",
        (
            "    more = (end - first + 1, *out.shape[1:]), call.out.stride(), call.out[first:].storage_offset()\n"
            "    call.out.as_strided(*more).copy_(torch.cat((out, out[:1])))"
        ),
    ),
}


def model_with(fault: str) -> ModuleType:
    """kernel_model.py, with the fault in it."""
    found, planted = FAULTS[fault]
    source = SOURCE.read_text()
    assert source.count(found) >= 1, f"kernel_model.py no longer says {found!r}"
    module = ModuleType("faulty_model")
    exec(compile(source.replace(found, planted, 1), f"<kernel_model.py, {fault}>", "exec"), module.__dict__)  # noqa: S102
    return module


def check_in_splits(batch: Batch) -> None:
    with divided("model", None, None, has_decodes=True):
        check_call(batch, "model")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend_info(), "the registry fills itself when it is first asked"
    monkeypatch.setitem(_REGISTRY, "model", model_with(fault).KernelModel())

    # The same batches for all faults, so that what they are held against is computed once.
    drawn = (random_batch(seed, head_dims=(16, 40, 64), max_seqs=3) for seed in range(NUM_BATCHES))
    caught = next((i for i, batch in enumerate(drawn, 1) if failure(check_in_splits, batch)), None)

    print(f"{fault}: caught by batch {caught}")
    assert caught is not None, f"not one of {NUM_BATCHES} batches fails"
