"""Is the Triton backend right on this GPU? A grid of features, formats and shapes against float64, in several processes.

Nearly all of the time goes into compiling kernels, one for each combination: hence the processes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "attention"))

from agreement import check
from batches import Batch
from caches import DTYPES, FORMATS
from gpu_cases import brief
from writes import Write

from pagedkv.attention import paged_attention, plan, write_kv

__all__ = ["check_all", "pool"]

# Decodes and prefills over cached keys, long enough to be split and merged; one without queries, one without keys, and
# one with more query tokens than keys.
LENS = ((1, 900), (0, 9), (1, 33), (150, 700), (3, 64), (1, 0), (5, 3))
FEATURES: tuple[dict[str, Any], ...] = (
    {},
    {"causal": False},
    {"window": (100, 0)},
    {"window": (60, 20), "causal": False},
    {"softcap": 30.0, "query_scale": 4.0},
    {"scale": -0.3},
    {"has_sinks": True},
    {"has_alibi": True},
    {"has_tree_mask": True},
    {"layout": "hnd", "block_size": 32},
    {"layout": "padded", "block_size": 5},
    {"layout": "joint", "block_size": 1, "has_packed_query": True},
    {"block_size": 256, "has_wide_tables": True, "out": "strided"},
    {"group": 1, "num_kv_heads": 3},
    {"group": 8},
    {"group": 17},
    {"head_dim": 64, "value_dim": 64},
    {"head_dim": 80, "value_dim": 80},
    {"head_dim": 96, "value_dim": 40},
    {"head_dim": 112, "value_dim": 112},
    {"head_dim": 192, "value_dim": 128},
    {"head_dim": 256, "value_dim": 256},
    {"head_dim": 576, "value_dim": 512, "layout": "latent", "group": 16, "num_kv_heads": 1},
    {
        "head_dim": 576,
        "value_dim": 512,
        "layout": "latent",
        "group": 128,
        "num_kv_heads": 1,
        "lens": ((1, 600), (9, 40)),
    },
    {"head_dim": 576, "value_dim": 576, "has_tree_mask": True},
    {"head_dim": 1024, "value_dim": 1024},
)
QUANTISED: tuple[dict[str, Any], ...] = (
    {"cache": "fp8_e4m3"},
    {"cache": "fp8_e4m3", "fp8_scale": "head", "layout": "hnd"},
    {"cache": "fp8_e5m2", "fp8_scale": "tensor"},
    {"cache": "int8", "window": (100, 0)},
    {"cache": "int8", "layout": "hnd", "head_dim": 80, "value_dim": 80},
    {"cache": "int4", "int4_groups": (4, 4)},
    {"cache": "int4", "int4_groups": (5, 1), "head_dim": 80, "value_dim": 96},
    {"cache": "fp8_e4m3", "head_dim": 576, "value_dim": 512, "layout": "latent", "group": 16, "num_kv_heads": 1},
    {"cache": "int4", "head_dim": 576, "value_dim": 512, "int4_groups": (18, 16), "group": 16, "num_kv_heads": 1},
    {
        "cache": "int4",
        "head_dim": 576,
        "value_dim": 512,
        "int4_groups": (18, 16),
        "group": 128,
        "num_kv_heads": 1,
        "lens": ((1, 600), (9, 40)),
    },
)


def batches_to_check() -> list[Batch]:
    """bfloat16 with everything; the other dtypes with what differs for them."""
    base: dict[str, Any] = {"lens": LENS, "num_kv_heads": 2, "group": 4, "head_dim": 128, "value_dim": 128}
    found = [Batch(**{**base, **more}) for more in ({**f, "dtype": "bfloat16"} for f in (*FEATURES, *QUANTISED))]
    for dtype, more in itertools.product(("float16", "float32"), (*FEATURES[:9], *FEATURES[16:23:3], *QUANTISED[:7:2])):
        found.append(Batch(**{**base, **more, "dtype": dtype}))
    return found


def writes_to_check() -> list[Write]:
    """Every format in every dtype, in two layouts."""
    base: dict[str, Any] = {"num_tokens": 40, "num_skipped": 7, "num_kv_heads": 3, "head_dim": 128, "value_dim": 80}
    return [
        Write(**base, dtype=dtype, cache=cache, layout=layout, magnitude=magnitude, int4_groups=(4, 5))
        for dtype, cache, (layout, magnitude) in itertools.product(DTYPES, FORMATS, (("nhd", 1.0), ("hnd", 300.0)))
    ]


def wrong(case: Batch | Write) -> str | None:
    """What is wrong with a case, None if nothing is."""
    try:
        if isinstance(case, Batch):
            check(case, *case.call("triton", device="cuda"))
        else:
            got, wanted = case.run("triton", "cuda"), case.run("reference", "cuda")
            for name, tensor in wanted.items():
                other = got[name]
                if tensor is not None and other is not None:
                    same = torch.equal(other.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
                    assert same, f"{name} differs from the reference's"
    # Whatever one case raises, a kernel that does not compile among it, the others are still to be told of.
    except Exception as error:  # noqa: BLE001
        return f"{case}: {brief(error)}"
    return None


def told(check: Callable[[], str | None]) -> str | None:
    """What a check says, or what it raises."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001
        return f"{check.__name__}: {brief(error)}"


def wrong_addresses() -> str | None:
    """Blocks past 2^31 elements, written and read."""
    num_blocks, dim = 2**20 + 2, 128
    cache = torch.zeros(num_blocks, 16, 1, dim, dtype=torch.float16, device="cuda")
    new = torch.randn(30, 1, dim, device="cuda").half()
    slots = torch.arange(30, device="cuda") + (num_blocks - 2) * 16
    write_kv(new, new, cache, cache, slots, backend="triton")
    query = torch.randn(1, 4, dim, device="cuda").half()
    lens = torch.tensor([30], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
    outs = []
    for keys, first in ((cache, num_blocks - 2), (cache[-2:].clone(), 0)):
        tables = torch.tensor([[first, first + 1]], dtype=torch.int32, device="cuda")
        outs.append(paged_attention(query, keys, keys, tables, lens, starts, backend="triton"))
    if not torch.equal(cache.view(-1, 1, dim)[slots], new):
        return "write past 2^31 elements: the cache does not hold what was written"
    return None if torch.equal(*outs) else "read past 2^31 elements: other results than from a small cache"


def wrong_graph() -> str | None:
    """A step captured in a graph and replayed for a later one: other queries, shorter sequences, the plan taken over."""
    batch = Batch(LENS, dtype="bfloat16", num_kv_heads=2, group=4, head_dim=128, value_dim=128)
    tensors = dict(batch.tensors("cuda"))
    starts = batch.tensors()["query_start_loc"].numpy()
    made, later = (
        plan(lengths, starts, num_q_heads=8, num_kv_heads=2, device="cuda", backend="triton", fixed_size=True)
        for lengths in (batch.tensors()["seq_lens"].numpy(), batch.tensors()["seq_lens"].numpy() // 2)
    )
    for name in ("query", "seq_lens"):
        tensors[name] = tensors[name].clone()
    out = torch.empty_like(tensors["query"])
    paged_attention(**tensors, out=out, plan=made)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_attention(**tensors, out=out, plan=made)
    tensors["query"].mul_(-1.5)
    tensors["seq_lens"].floor_divide_(2)
    made.take_over(later)
    out.fill_(torch.nan)
    graph.replay()
    wanted = paged_attention(**tensors, plan=later)
    assert isinstance(wanted, torch.Tensor)
    return None if torch.equal(out, wanted) else "a replayed graph gives other results than the same step without one"


def pool() -> ProcessPoolExecutor:
    """Processes that share the GPU and Triton's cache of compiled kernels on disk."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max(min((os.cpu_count() or 2) - 2, 12), 1), mp_context=context)


def check_all(workers: ProcessPoolExecutor) -> list[str]:
    """What is wrong, a line for each case; an empty list if nothing is."""
    cases: list[Batch | Write] = [*batches_to_check(), *writes_to_check()]
    found = [*workers.map(wrong, cases, chunksize=1), told(wrong_addresses), told(wrong_graph)]
    print(f"correctness: {len(found)} cases, {sum(line is not None for line in found)} wrong")
    return [line for line in found if line is not None]
