"""The compiled kernel as Python sees it: its structures, loaded once, called without the interpreter's lock."""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

__all__ = ["AttentionCallC", "CacheC", "Kernel", "WriteCallC"]


class CacheC(Structure):
    """`struct cache` in kernels/call.h."""

    _fields_ = [
        ("data", c_void_p),
        ("scale", c_void_p),
        ("block_stride", c_int64),
        ("slot_stride", c_int64),
        ("head_stride", c_int64),
        ("scale_block_stride", c_int64),
        ("scale_slot_stride", c_int64),
        ("scale_head_stride", c_int64),
        ("dim", c_int64),
        ("group_size", c_int64),
    ]


class AttentionCallC(Structure):
    """`struct attention_call` in kernels/call.h."""

    _fields_ = [
        ("query", c_void_p),
        ("key", CacheC),
        ("value", CacheC),
        ("block_tables", c_void_p),
        ("seq_lens", c_void_p),
        ("query_start_loc", c_void_p),
        ("tasks", c_void_p),
        ("merges", c_void_p),
        ("tree_mask", c_void_p),
        ("sinks", c_void_p),
        ("alibi_slopes", c_void_p),
        ("out", c_void_p),
        ("lse", c_void_p),
        ("partial_out", c_void_p),
        ("partial_lse", c_void_p),
        ("query_token_stride", c_int64),
        ("query_head_stride", c_int64),
        ("out_token_stride", c_int64),
        ("out_head_stride", c_int64),
        ("table_stride", c_int64),
        ("num_tasks", c_int64),
        ("num_decode_tasks", c_int64),
        ("num_merges", c_int64),
        ("num_partial_tokens", c_int64),
        ("num_q_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("block_size", c_int64),
        ("tree_words", c_int64),
        ("window_left", c_int64),
        ("window_right", c_int64),
        ("dtype", c_int32),
        ("format", c_int32),
        ("causal", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
    ]


class WriteCallC(Structure):
    """`struct write_call` in kernels/call.h."""

    _fields_ = [
        ("source", c_void_p * 2),
        ("cache", CacheC * 2),
        ("slots", c_void_p),
        ("token_stride", c_int64 * 2),
        ("head_stride", c_int64 * 2),
        ("num_tokens", c_int64),
        ("num_kv_heads", c_int64),
        ("block_size", c_int64),
        ("dtype", c_int32),
        ("format", c_int32),
    ]


class Kernel:
    """The loaded library. Each call runs with the best instruction set, from `instruction_set` on, that serves it."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._attention = library.pagedkv_attention
        self._attention.argtypes = [POINTER(AttentionCallC), c_int, c_int, c_void_p]
        self._attention.restype = c_int
        self._write = library.pagedkv_write
        self._write.argtypes = [POINTER(WriteCallC), c_int, c_int, c_void_p]
        self._write.restype = None
        _check_sizes(library)
        library.pagedkv_instruction_set.argtypes = [c_int, POINTER(c_int), POINTER(c_int)]
        library.pagedkv_instruction_set.restype = c_char_p
        self.instruction_sets: dict[str, int] = {}
        """Those that this processor has, the best first."""
        self.in_use: list[str] = []
        """Those that calls are run with: special ones for what they serve, then one for everything."""
        is_supported, serves_all = c_int(), c_int()
        index, is_complete = 0, False
        while (name := library.pagedkv_instruction_set(index, byref(is_supported), byref(serves_all))) is not None:
            if is_supported.value:
                self.instruction_sets[name.decode()] = index
                if not is_complete:
                    self.in_use.append(name.decode())
                is_complete = is_complete or bool(serves_all.value)
            index += 1
        self.instruction_set = self.in_use[0]
        """Where the search for the one that serves a call begins."""
        self._parallel = _team_of_the_process()

    @property
    def shares_threads(self) -> bool:
        """Whether the process' OpenMP threads do the work, so that there is one pool; else threads are made per call."""
        return self._parallel is not None

    def attend(self, call: AttentionCallC, num_threads: int) -> None:
        """Run a call. Raises MemoryError, with nothing written, if there is no room for the threads to work in."""
        if self._attention(byref(call), self.instruction_sets[self.instruction_set], num_threads, self._parallel) != 0:
            raise MemoryError("the attention kernel found no memory to work in")

    def write(self, call: WriteCallC, num_threads: int) -> None:
        """Run a write."""
        self._write(byref(call), self.instruction_sets[self.instruction_set], num_threads, self._parallel)


def _check_sizes(library: ctypes.CDLL) -> None:
    for structure, size in (
        (AttentionCallC, library.pagedkv_size_of_attention_call),
        (WriteCallC, library.pagedkv_size_of_write_call),
    ):
        size.restype = c_int64
        if size() != ctypes.sizeof(structure):
            raise OSError(f"the kernel's {structure.__name__} has {size()} bytes, ours has {ctypes.sizeof(structure)}")


def _team_of_the_process() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch has loaded; None if it has none that we know.

    A runtime of our own would be a second pool of threads that spin against torch's on the same cores.
    """
    if sys.platform == "win32":
        return None
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value
    except (AttributeError, OSError):
        return None
