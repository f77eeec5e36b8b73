"""The Triton backend: what it can do, where it runs, and its kernels' launches. Triton is imported by the first of them."""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from pagedkv.attention.call import AttentionCall, Features, WriteCall
from pagedkv.attention.formats import CacheFormat
from pagedkv.attention.partition import Partition
from pagedkv.attention.triton_kernels.tiles import MAX_HEAD_DIM, decode_rows, prefill_rows

__all__ = ["TritonBackend", "is_interpreted"]

_FP8 = (CacheFormat.FP8_E4M3, CacheFormat.FP8_E5M2)


@functools.cache
def is_interpreted() -> bool:
    """Whether Triton interprets kernels, on tensors of any device, instead of compiling them: TRITON_INTERPRET=1.

    Triton itself reads this when a kernel is defined, so it is asked once.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _why_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if is_interpreted():
        return None
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "there is no CUDA GPU; TRITON_INTERPRET=1 runs the kernels on the processor, slowly, for tests"
    return None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _num_multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _launches() -> ModuleType:
    from pagedkv.attention.triton_kernels import launch

    return launch


class TritonBackend:
    """NVIDIA GPUs from Ampere on, every format and feature, up to float32. Split keys, merged by a second kernel.

    A call launches up to three kernels, and allocates where the plan has split keys. The grids depend on the plan's counts
    and the shapes alone, nothing is read back, and the tiles are chosen by shape: so calls can be captured in a CUDA graph,
    once each has run (a kernel is compiled by its first launch). Tasks and merges that are all zero do nothing.
    """

    name = "triton"

    def unavailable(self) -> str | None:
        """Why not: no Triton, or no GPU and no interpreter."""
        return _why_unavailable()

    def runs_on(self, device_type: str) -> bool:
        """On CUDA; on the processor in Triton's interpreter only."""
        return device_type == "cuda" or (device_type == "cpu" and is_interpreted())

    def refuses(self, features: Features) -> str | None:
        """float64, for which tensor cores keep no tile; wide heads; and GPUs older than Ampere, or for e4m3 than Ada."""
        widest = max(features.head_dim, features.value_dim)
        if widest > MAX_HEAD_DIM:
            return f"heads of more than {MAX_HEAD_DIM} channels do not fit in shared memory, these have {widest}"
        return self._refuses_types(features)

    def refuses_write(self, features: Features) -> str | None:
        """float64 into a quantised cache; and GPUs older than Ampere."""
        if features.cache_format is CacheFormat.FLOAT:
            return self._refuses_device(features)
        return self._refuses_types(features)

    def _refuses_types(self, features: Features) -> str | None:
        if features.dtype == torch.float64:
            return "it does not compute in float64"
        return self._refuses_device(features)

    def _refuses_device(self, features: Features) -> str | None:
        if features.device.type != "cuda" or is_interpreted():
            return None
        capability = _capability(_index(features.device))
        if capability < (8, 0):
            return f"it needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
        if features.cache_format is CacheFormat.FP8_E4M3 and capability < (8, 9):
            return f"e4m3 needs compute capability 8.9, this GPU has {capability[0]}.{capability[1]}"
        return None

    def partition(self, num_q_heads: int, num_kv_heads: int, device: torch.device) -> Partition:
        """Two programs on each multiprocessor, one for each KV head and task."""
        group = num_q_heads // num_kv_heads
        if is_interpreted():
            return Partition(
                num_workers=2,
                max_decode_rows=decode_rows(group),
                query_tile=max(32 // group, 1),
                min_split=24,
                tasks_per_worker=2,
            )
        row_tiles = -(-decode_rows(group) // 64)
        return Partition(
            num_workers=max(2 * _num_multiprocessors(_index(device)) // (num_kv_heads * row_tiles), 1),
            max_decode_rows=decode_rows(group),
            query_tile=prefill_rows(group) // group,
            min_split=256,
        )

    def know_attention(self, call: AttentionCall, asked: tuple[object, ...], lengths: tuple[Tensor, Tensor]) -> None:
        """Nothing: each call is checked."""

    def know_write(self, call: WriteCall, asked: str | None) -> None:
        """Nothing: each write is checked."""

    def describe(self) -> str:
        """The version of Triton, and the GPU."""
        import triton

        if is_interpreted():
            return f"Triton {triton.__version__}, interpreted on the processor: for tests"
        return f"Triton {triton.__version__} on {torch.cuda.get_device_name()}"

    def attend(self, call: AttentionCall) -> None:
        """Decode tasks, prefill tasks, merges: a launch each, if there are any."""
        _launches().attend(call)

    def write(self, call: WriteCall) -> None:
        """Keys and values in one launch."""
        _launches().write(call)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
