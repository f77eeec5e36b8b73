"""Calls like one that was checked, done at once: C code compares how their tensors lie, and Python looks at none of them."""

from __future__ import annotations

import torch
from torch import Tensor

from pagedkv.attention.call import AttentionCall, WriteCall
from pagedkv.attention.cpu.library import Kernel, KnownAttentionC, KnownWriteC, Layouts
from pagedkv.attention.cpu.structures import attention_structure, write_structure

__all__ = ["KnownAttention", "KnownWrite", "are_plain"]

_PLAIN = {Tensor, type(None)}
# Raised of None in the place of a query, of a tensor without memory (a sparse one, or one that a transform sees), and of options
# that cannot be compared.
_UNKNOWN = (AttributeError, BufferError, RuntimeError, TypeError, ValueError)


def are_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether these are tensors of torch's own, or None: what a subclass means by its memory is not known."""
    return _PLAIN.issuperset(map(type, tensors))


class KnownAttention:
    """A planned call that passed all checks. One that asks the same of tensors that lie alike would pass them too.

    layouts: of its operands, `out` and `lse`
    call:    readable as it is
    asked:   its options as they were given
    lengths: that the plan was made for
    """

    __slots__ = ("_asked", "_kept", "_kernel", "_known", "_lse", "_out_shape")

    def __init__(
        self,
        kernel: Kernel,
        layouts: Layouts,
        call: AttentionCall,
        asked: tuple[object, ...],
        lengths: tuple[Tensor, Tensor],
    ) -> None:
        self._kernel = kernel
        self._asked = asked
        # Of a query's shape, as most outputs are, one is made in half the time.
        self._out_shape = None if call.out.shape == call.query.shape else call.out.shape
        self._lse = None if call.lse is None else (call.lse.shape, call.lse.dtype)
        # Their addresses stand in the structure; those of other tensors that stand there are replaced at each call.
        self._kept = (call.tasks, call.merges, lengths)
        self._known = KnownAttentionC(call=attention_structure(call), layouts=layouts)
        self._known.seq_lens, self._known.query_start_loc = (tensor.data_ptr() for tensor in lengths)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # Addresses mean nothing elsewhere: a plan that is pickled or copied deeply knows no call.
        return type(None), ()

    def attend(
        self, operands: tuple[Tensor, *tuple[Tensor | None, ...]], asked: tuple[object, ...], out: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor] | None:
        """The result; None, with nothing written, if this is another call."""
        try:
            if asked != self._asked or not are_plain((*operands, out)):
                return None
            if out is None:
                out = self._new_out(operands[0])
            lse = None if self._lse is None else torch.empty(self._lse[0], dtype=self._lse[1], device="cpu")
            tensors = (*operands, out, lse)
            if not self._kernel.attend_known(self._known, tensors, torch.get_num_threads()):
                return None
        except _UNKNOWN:
            return None
        return out if lse is None else (out, lse)

    def _new_out(self, query: Tensor) -> Tensor:
        if self._out_shape is None:
            return torch.empty_like(query, memory_format=torch.contiguous_format)
        return query.new_empty(self._out_shape)


class KnownWrite:
    """A write that passed all checks. One of tensors that lie alike would pass them too, if its slots are in range."""

    __slots__ = ("_asked", "_kernel", "_known")

    def __init__(self, kernel: Kernel, layouts: Layouts, call: WriteCall, asked: str | None) -> None:
        self._kernel = kernel
        self._asked = asked
        num_slots = call.key_cache.shape[0] * call.key_cache.shape[1]
        self._known = KnownWriteC(call=write_structure(call), layouts=layouts, num_slots=num_slots)

    def write(self, operands: tuple[Tensor | None, ...], asked: str | None) -> bool:
        """Whether this is a write like the known one, and done; else nothing was written."""
        try:
            return (
                asked == self._asked
                and are_plain(operands)
                and self._kernel.write_known(self._known, operands, torch.get_num_threads())
            )
        except _UNKNOWN:
            return False
