"""The backend on the processor."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor

from pagedkv.attention.call import AttentionCall, Features, WriteCall
from pagedkv.attention.cpu.build import KernelBuildError, find_kernel
from pagedkv.attention.cpu.known_calls import KnownAttention, KnownWrite, are_plain
from pagedkv.attention.cpu.library import Kernel
from pagedkv.attention.cpu.structures import (
    DTYPES,
    attention_structure,
    readable_attention,
    readable_write,
    write_structure,
)
from pagedkv.attention.partition import Partition

__all__ = ["CPUBackend"]

# Query rows of a prefill task: enough to make laying out a tile of keys cheap, few enough that their sums stay in L2. With tile
# registers (AMX) products are several times as fast and laying out weighs more, and L2 has 2 MB.
PREFILL_ROWS = 256
TILED_PREFILL_ROWS = 512
MAX_DECODE_ROWS = 16
MIN_SPLIT = 256


class CPUBackend:
    """The C kernel. Float32, float16, bfloat16 and every quantised format, every feature, any block size.

    It is compiled at first use where the package did not bring it; without a compiler one warning says so, once.
    """

    name = "cpu"

    def __init__(self) -> None:
        self._kernel: Kernel | None = None
        self._reason: str | None = None

    def unavailable(self) -> str | None:
        """Why there is no compiled kernel; None if there is one. The first call may compile it."""
        if self._kernel is None and self._reason is None:
            try:
                self._kernel = Kernel(find_kernel(), getattr(Tensor, "__dlpack_c_exchange_api__", None))
            except (KernelBuildError, OSError) as error:
                self._reason = str(error)
                warnings.warn(
                    f"pagedkv computes attention with torch, several times slower, for want of its C kernel: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return self._reason

    @property
    def kernel(self) -> Kernel:
        """The loaded library."""
        if self._kernel is None:
            raise RuntimeError(f"the C kernel is not available: {self.unavailable()}")
        return self._kernel

    def runs_on(self, device_type: str) -> bool:
        """On the processor."""
        return device_type == "cpu"

    def refuses(self, features: Features) -> str | None:
        """Float64."""
        return (
            None if features.dtype in DTYPES else f"it computes in float32, float16 and bfloat16, not {features.dtype}"
        )

    def refuses_write(self, features: Features) -> str | None:
        """Float64."""
        return self.refuses(features)

    def partition(self, num_q_heads: int, num_kv_heads: int, device: torch.device) -> Partition:
        """As many workers as torch has threads; tiles of about PREFILL_ROWS rows, or TILED_PREFILL_ROWS."""
        has_tiles = self._kernel is not None and "amx" in self._kernel.in_use
        prefill_rows = TILED_PREFILL_ROWS if has_tiles else PREFILL_ROWS
        return _partition(torch.get_num_threads(), num_q_heads // num_kv_heads, num_kv_heads, prefill_rows)

    def describe(self) -> str:
        """The instruction set, and whose threads."""
        kernel = self.kernel
        threads = "torch's OpenMP threads" if kernel.shares_threads else "its own threads"
        return f"C kernel with {', '.join(kernel.in_use)}, on {threads}"

    def attend(self, call: AttentionCall) -> None:
        """Hand the call over by address."""
        readable = readable_attention(call)
        self.kernel.attend(attention_structure(readable), torch.get_num_threads())
        if readable.out is not call.out:
            call.out.copy_(readable.out)

    def write(self, call: WriteCall) -> None:
        """Hand the write over by address."""
        readable = readable_write(call)
        self.kernel.write(write_structure(readable), torch.get_num_threads())

    def know_attention(
        self, call: AttentionCall, asked: tuple[object, ...], lengths: tuple[Tensor, Tensor]
    ) -> KnownAttention | None:
        """What does a planned call once more; None where its tensors have to be copied, or are not shown to C."""
        tensors = (*call.operands(), call.out, call.lse)
        if not are_plain(tensors) or readable_attention(call) is not call:
            return None
        layouts = self.kernel.layouts_of(tensors)
        return None if layouts is None else KnownAttention(self.kernel, layouts, call, asked, lengths)

    def know_write(self, call: WriteCall, asked: str | None) -> KnownWrite | None:
        """What does a write once more; None as for a call."""
        tensors = call.operands()
        if not are_plain(tensors) or readable_write(call) is not call:
            return None
        layouts = self.kernel.layouts_of(tensors)
        return None if layouts is None else KnownWrite(self.kernel, layouts, call, asked)


@lru_cache(maxsize=64)
def _partition(num_workers: int, group: int, num_kv_heads: int, prefill_rows: int) -> Partition:
    return Partition(
        num_workers=num_workers,
        max_decode_rows=max(MAX_DECODE_ROWS, group),
        query_tile=max(prefill_rows // group, 1),
        min_split=MIN_SPLIT,
        prefill_units=num_kv_heads,
        shares_prefixes=True,
    )
