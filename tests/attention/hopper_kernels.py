"""Compile the Triton kernels for Hopper without a GPU, with the arguments of real calls, and print what they use.

A program of its own, for Triton must not be interpreting: `python tests/attention/hopper_kernels.py [NAME]`. Prints one line
of JSON for every kernel: registers, stack (spills), shared memory, and how often a few instructions stand in its code.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pagedkv.attention.call import AttentionCall, WriteCall
from pagedkv.attention.formats import CacheFormat, scale_shape
from pagedkv.attention.partition import Partition, make_plan
from pagedkv.attention.triton_kernels import launch
from pagedkv.attention.triton_kernels.tiles import decode_rows, prefill_rows

H200 = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
CACHE_DTYPES = {
    CacheFormat.FP8_E4M3: torch.float8_e4m3fn,
    CacheFormat.FP8_E5M2: torch.float8_e5m2,
    CacheFormat.INT8: torch.int8,
    CacheFormat.INT4: torch.uint8,
}
INSTRUCTIONS = ("HGMMA", "HMMA", "LDGSTS", "LDG", "LDL", "STL", "BAR", "I2F", "MUFU")


class Recorder:
    """Stands where a kernel stands and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.launches.append(arguments)


def compile_launch(kernel: Any, arguments: dict[str, Any]) -> Any:
    """What Triton would compile on its first launch with these arguments."""
    signature, constants, attributes = {}, {}, {}
    for idx, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        may_specialize = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (may_specialize and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(idx,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if may_specialize and value % 16 == 0:
                attributes[(idx,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: arguments[name] for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in arguments}
    return triton.compile(source, target=H200, options=options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers, stack and shared memory in bytes, and counts of instructions."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        run = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", "--dump-sass", cubin],
            capture_output=True,
            text=True,
            check=True,
        )
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", run.stdout)}
    found = {name: len(re.findall(rf"\b{name}\b", run.stdout)) for name in INSTRUCTIONS}
    return {"registers": usage["REG"], "stack": usage["STACK"], "shared": compiled.metadata.shared, **found}


def attention_call(
    lens: list[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    cache_format: CacheFormat = CacheFormat.FLOAT,
    heads: tuple[int, int] = (32, 8),
    dims: tuple[int, int] = (128, 128),
    is_latent: bool = False,
    block_size: int = 16,
    has_extras: bool = False,
) -> AttentionCall:
    """A call with tensors on the processor that nobody reads: kernels are compiled for their types and strides."""
    num_q_heads, num_kv_heads = heads
    packing = 2 if cache_format is CacheFormat.INT4 else 1
    cache_dtype = CACHE_DTYPES.get(cache_format, dtype)
    keys, values = (torch.empty(4, block_size, num_kv_heads, dim // packing, dtype=cache_dtype) for dim in dims)
    scale_dtype = torch.bfloat16 if cache_format is CacheFormat.INT4 else torch.float32
    shapes = [scale_shape(cache_format, 4, block_size, num_kv_heads, dim) for dim in dims]
    scales = [None if shape is None else torch.empty(shape, dtype=scale_dtype) for shape in shapes]
    group = num_q_heads // num_kv_heads
    partition = Partition(33, decode_rows(group), prefill_rows(group) // group, 256)
    query_lens, seq_lens = np.array(lens, np.int32).T
    starts = np.concatenate(([0], query_lens.cumsum())).astype(np.int32)
    tasks, merges, counts = make_plan(
        seq_lens, starts, partition, heads_per_kv_head=group, causal=True, window=(-1, -1)
    )
    num_tokens = int(starts[-1])
    return AttentionCall(
        query=torch.empty(num_tokens, num_q_heads, dims[0], dtype=dtype),
        key_cache=keys,
        value_cache=keys[..., : dims[1]] if is_latent else values,
        block_tables=torch.empty(len(lens), 8, dtype=torch.int32),
        seq_lens=torch.from_numpy(seq_lens),
        query_start_loc=torch.from_numpy(starts),
        scale=0.1,
        causal=True,
        window_left=100 if has_extras else -1,
        window_right=-1,
        softcap=30.0 if has_extras else 0.0,
        sinks=torch.empty(num_q_heads) if has_extras else None,
        alibi_slopes=torch.empty(num_q_heads) if has_extras else None,
        tree_mask=torch.empty(num_tokens, 2, dtype=torch.int32) if has_extras else None,
        k_scale=scales[0],
        v_scale=scales[1],
        tasks=torch.from_numpy(tasks),
        merges=torch.from_numpy(merges),
        counts=counts,
        out=torch.empty(num_tokens, num_q_heads, dims[1], dtype=dtype),
        lse=None,
    )


DECODE, PREFILL = [(1, 8192)] * 8, [(4096, 8192)]
LATENT: dict[str, Any] = {"heads": (128, 1), "dims": (576, 512), "is_latent": True}
KINDS: dict[str, dict[str, Any]] = {
    **{f"bfloat16 {dim}": {"dims": (dim, dim)} for dim in (128, 64, 80, 192, 256)},
    **{f"{f.value} 128": {"cache_format": f} for f in CacheFormat if f is not CacheFormat.FLOAT},
    "bfloat16 192/128": {"dims": (192, 128), "heads": (16, 16)},
    "bfloat16 576/512": LATENT,
    "fp8_e4m3 576/512": {**LATENT, "cache_format": CacheFormat.FP8_E4M3},
    "int4 576/512": {"heads": (128, 1), "dims": (576, 512), "cache_format": CacheFormat.INT4},
    "bfloat16 1024": {"dims": (1024, 1024)},
    "float16 128": {"dtype": torch.float16},
    "float32 128": {"dtype": torch.float32},
    "extras 128": {"has_extras": True},
}
# Bytes of stack that a kind may need, where registers run out; a few are harmless. The sums of the latent take half of
# them, and its keys in fp8 pass through the rest on their way to wgmma.
ALLOWED_STACK = {"bfloat16 576/512": 256, "fp8_e4m3 576/512": 1024, "int4 576/512": 256, "bfloat16 1024": 256}
DEFAULT_STACK = 64


def compile_all(wanted: str) -> None:
    """Compile what the calls named like `wanted` launch, and print a line for each kernel."""
    for phase, lens in (("decode", DECODE), ("prefill", PREFILL)):
        for kind, more in KINDS.items():
            name = f"{phase} {kind}"
            if wanted in name:
                call = attention_call(lens, **more)
                _report(name, lambda call=call: launch.attend(call))
    for cache_format in CacheFormat:
        name = f"write {cache_format.value}"
        if wanted in name:
            call = attention_call([(16, 16)], cache_format=cache_format)
            new = torch.empty(16, 8, 128, dtype=torch.bfloat16)
            slots = torch.zeros(16, dtype=torch.int64)
            writing = WriteCall(new, new, call.key_cache, call.value_cache, slots, call.k_scale, call.v_scale)
            _report(name, lambda writing=writing: launch.write(writing))


def _report(name: str, run: Any) -> None:
    recorders = {
        kernel: Recorder(getattr(launch, kernel)) for kernel in ("attend_tasks", "merge_splits", "write_slots")
    }
    with ExitStack() as patches:
        for kernel, recorder in recorders.items():
            patches.enter_context(mock.patch.object(launch, kernel, recorder))
        run()
    for kernel, recorder in recorders.items():
        for arguments in recorder.launches:
            row = {"name": name, "kernel": kernel, "num_warps": arguments["num_warps"]}
            row |= resources(compile_launch(recorder.kernel, arguments))
            print(
                json.dumps({**row, "allowed_stack": ALLOWED_STACK.get(name.partition(" ")[2], DEFAULT_STACK)}),
                flush=True,
            )


if __name__ == "__main__":
    compile_all(sys.argv[1] if len(sys.argv) > 1 else "")
