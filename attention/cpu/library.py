"""The compiled kernel as Python sees it: its structures, loaded once, called without the interpreter's lock."""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_uint32, c_void_p, py_object
from pathlib import Path
from typing import TypeAlias

__all__ = ["AttentionCallC", "CacheC", "Kernel", "KnownAttentionC", "KnownWriteC", "Layouts", "WriteCallC"]

MAX_DIMS = 5
MAX_TENSORS = 13
# Of DLPack's table of functions in its first major version: behind a header of 16 bytes, an allocator and two functions for
# owned tensors.
DLPACK_NAME, DLPACK_MAJOR = b"dlpack_exchange_api", 1
PLACE_OF_VIEW = 40


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


class PythonC(Structure):
    """`struct python` in kernels/known_calls.h."""

    _fields_ = [
        ("view_of", c_void_p),
        ("item_of", c_void_p),
        ("release_lock", c_void_p),
        ("take_lock", c_void_p),
        ("none", c_void_p),
    ]


class LayoutC(Structure):
    """`struct layout` in kernels/known_calls.h."""

    _fields_ = [
        ("device", c_int32 * 2),
        ("num_dims", c_int32),
        ("dtype", c_uint32),
        ("shape", c_int64 * MAX_DIMS),
        ("strides", c_int64 * MAX_DIMS),
    ]


_LAYOUTS = LayoutC * MAX_TENSORS
Layouts: TypeAlias = ctypes.Array[LayoutC]


class KnownAttentionC(Structure):
    """`struct known_attention` in kernels/known_calls.h."""

    _fields_ = [
        ("call", AttentionCallC),
        ("layouts", _LAYOUTS),
        ("seq_lens", c_void_p),
        ("query_start_loc", c_void_p),
    ]


class KnownWriteC(Structure):
    """`struct known_write` in kernels/known_calls.h."""

    _fields_ = [("call", WriteCallC), ("layouts", _LAYOUTS), ("num_slots", c_int64)]


class Kernel:
    """The loaded library. Each call runs with the best instruction set, from `instruction_set` on, that serves it.

    dlpack_table: `__dlpack_c_exchange_api__` of the tensors' type, by which C sees them; None if it has none
    """

    def __init__(self, path: Path, dlpack_table: object = None) -> None:
        library = ctypes.CDLL(str(path))
        self._attention = library.pagedkv_attention
        self._attention.argtypes = [POINTER(AttentionCallC), c_int, c_int, c_void_p]
        self._attention.restype = c_int
        self._write = library.pagedkv_write
        self._write.argtypes = [POINTER(WriteCallC), c_int, c_int, c_void_p]
        self._write.restype = None
        # Called with the interpreter's lock: these look at Python's objects.
        with_lock = ctypes.PyDLL(str(path))
        self._note = with_lock.pagedkv_note
        self._note.argtypes = [POINTER(PythonC), py_object, c_int, POINTER(LayoutC)]
        self._attend_known = with_lock.pagedkv_attend_known
        self._attend_known.argtypes = [POINTER(KnownAttentionC), POINTER(PythonC), py_object, c_int, c_int, c_void_p]
        self._write_known = with_lock.pagedkv_write_known
        self._write_known.argtypes = [POINTER(KnownWriteC), POINTER(PythonC), py_object, c_int, c_int, c_void_p]
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
        self._python = _python_of(dlpack_table)

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

    def layouts_of(self, tensors: tuple[object, ...]) -> Layouts | None:
        """How tensors lie, for a known call; None if they are not shown to C. Raises what torch raises of one without memory."""
        if self._python is None:
            return None
        layouts = _LAYOUTS()
        return layouts if self._note(byref(self._python), tensors, len(tensors), layouts) == 0 else None

    def attend_known(self, known: KnownAttentionC, tensors: tuple[object, ...], num_threads: int) -> bool:
        """Run the known call on other tensors; False, with nothing done, if they lie otherwise. Raises as `attend`."""
        index = self.instruction_sets[self.instruction_set]
        result: int = self._attend_known(byref(known), self._python, tensors, index, num_threads, self._parallel)
        if result < 0:
            raise MemoryError("the attention kernel found no memory to work in")
        return result == 0

    def write_known(self, known: KnownWriteC, tensors: tuple[object, ...], num_threads: int) -> bool:
        """Run the known write on other tensors; False, with nothing done, if they lie otherwise or a slot is out of range."""
        index = self.instruction_sets[self.instruction_set]
        result: int = self._write_known(byref(known), self._python, tensors, index, num_threads, self._parallel)
        return result == 0


def _check_sizes(library: ctypes.CDLL) -> None:
    for structure, size in (
        (AttentionCallC, library.pagedkv_size_of_attention_call),
        (WriteCallC, library.pagedkv_size_of_write_call),
        (KnownAttentionC, library.pagedkv_size_of_known_attention),
        (KnownWriteC, library.pagedkv_size_of_known_write),
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


def _python_of(dlpack_table: object) -> PythonC | None:
    """By which functions the kernel looks at tensors; None if this is no table of DLPack's that we know."""
    api = ctypes.pythonapi
    api.PyCapsule_IsValid.argtypes = api.PyCapsule_GetPointer.argtypes = [py_object, c_char_p]
    api.PyCapsule_GetPointer.restype = c_void_p
    if not api.PyCapsule_IsValid(dlpack_table, DLPACK_NAME):
        return None
    address = api.PyCapsule_GetPointer(dlpack_table, DLPACK_NAME)
    major = c_uint32.from_address(address).value
    view_of = c_void_p.from_address(address + PLACE_OF_VIEW).value
    if major != DLPACK_MAJOR or not view_of:
        return None
    names = ("PyTuple_GetItem", "PyEval_SaveThread", "PyEval_RestoreThread")
    functions = (ctypes.cast(getattr(api, name), c_void_p).value for name in names)
    return PythonC(view_of, *functions, id(None))
