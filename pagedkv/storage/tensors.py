"""The tensors: one buffer on the device and one on the host, whole blocks side by side in each."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Mapping
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from pagedkv.arrays import BlockIds, as_int, cdiv
from pagedkv.block_pool import MAX_NUM_BLOCKS
from pagedkv.config import CacheConfig
from pagedkv.errors import ConfigError, InvalidArgumentError
from pagedkv.kv_spec import KVSpec
from pagedkv.storage.files import SavedBlocks, read_file, write_file
from pagedkv.storage.host_memory import pinned_zero_bytes, unpin, zero_bytes
from pagedkv.storage.moves import BlockMoves, Run, checked_block_ids, checked_distinct, checked_runs, runs_of
from pagedkv.storage.views import LayerViews, Layout, layer_views

__all__ = ["KVStorage", "Where", "ZeroOn"]

ZeroOn = Literal["free", "alloc", "never"]
Where = Literal["device", "host"]

# torch divides a longer copy among threads (at::internal::GRAIN_SIZE). A thousand such copies meet at a thousand
# barriers: on two busy cores this took 100 times as long as one thread takes alone.
GRAIN_WORDS = 32768
WORD_BYTES = 8


class KVStorage:
    """K/V of `num_blocks` blocks on `device` and of `host_blocks` blocks on the host.

    A block lies in one piece, all layers side by side, so that a swap is one copy per block (docs/storage.md has the
    figures). The views of a layer are therefore `bytes_per_block` apart from block to block: more than 2^31 elements in
    all, so that whoever computes addresses from their strides needs 64 bits. All bytes are zero at first.

    On CUDA the host's memory is pinned and moves run on a stream of their own. Not for several threads at once.
    """

    __slots__ = (
        "__weakref__",
        "_buffers",
        "_layers",
        "_stream",
        "_zeros",
        "device",
        "layout",
        "num_blocks",
        "num_host_blocks",
        "spec",
        "zero_on",
    )

    def __init__(
        self,
        spec: KVSpec,
        num_blocks: int,
        device: torch.device | str = "cpu",
        host_blocks: int = 0,
        *,
        layout: Layout = "HND",
        zero_on: ZeroOn = "never",
    ) -> None:
        """Take the memory. `layout` orders tokens (N), heads (H) and channels (D) within a layer of a block.

        What is zeroed by default cannot depend on who shares it, which only `for_cache` is told.

        Raises ConfigError; on a GPU torch's own error if the memory cannot be had, else MemoryError.
        """
        try:
            self.num_blocks = as_int("num_blocks", num_blocks, at_least=1, at_most=MAX_NUM_BLOCKS)
            self.num_host_blocks = as_int("host_blocks", host_blocks, at_least=0, at_most=MAX_NUM_BLOCKS)
        except InvalidArgumentError as error:
            raise ConfigError(str(error)) from None
        if layout not in ("NHD", "HND"):
            raise ConfigError(f"layout must be 'NHD' or 'HND', found {layout!r}")
        if zero_on not in ("free", "alloc", "never"):
            raise ConfigError(f"zero_on must be 'free', 'alloc' or 'never', found {zero_on!r}")
        device = torch.device(device)
        if device.type not in ("cpu", "cuda"):
            raise ConfigError(f"device must be a CPU or a CUDA device, found {device}")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device is {device}, but this torch sees no CUDA GPU: use device='cpu'")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.spec = spec
        self.device = device
        self.layout: Layout = layout
        self.zero_on: ZeroOn = zero_on
        self._stream: torch.cuda.Stream | None = None
        # An engine may build its storage in inference mode; the tensors must be writable outside of it as well.
        with torch.inference_mode(False):
            shape, host_shape = ((n, spec.bytes_per_block) for n in (self.num_blocks, self.num_host_blocks))
            self._buffers: dict[Where, Tensor] = {}
            if device.type == "cpu":
                self._buffers["device"] = zero_bytes(math.prod(shape)).view(shape)
                self._buffers["host"] = zero_bytes(math.prod(host_shape)).view(host_shape)
            else:
                self._buffers["device"] = torch.zeros(shape, dtype=torch.uint8, device=device)
                self._start_cuda()
            self._layers = layer_views(self._buffers["device"], spec, layout)
            num_zeros = spec.bytes_per_block // WORD_BYTES if zero_on == "alloc" else 0
            self._zeros = torch.zeros(num_zeros, dtype=torch.int64, device=device)

    @classmethod
    def for_cache(
        cls,
        spec: KVSpec,
        config: CacheConfig,
        device: torch.device | str = "cpu",
        *,
        layout: Layout = "HND",
        zero_on: ZeroOn | None = None,
    ) -> Self:
        """The storage of the memory that `config` describes: its sizes, and wiped blocks where tenants share it.

        `zero_on=None` is "never" for memory of one tenant, and "alloc" with `config.requires_salt`: `apply` then wipes what a
        scheduler's plan takes, evicted blocks too, which go to the next owner without ever having been free.
        Raises ConfigError, for different block sizes too.
        """
        if spec.block_size != config.block_size:
            raise ConfigError(f"spec has blocks of {spec.block_size} tokens, config of {config.block_size}")
        if zero_on is None:
            zero_on = "alloc" if config.requires_salt else "never"
        return cls(spec, config.num_blocks, device, config.num_host_blocks, layout=layout, zero_on=zero_on)

    def _start_cuda(self) -> None:
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        # Freed memory must not be given away while the side stream still works on it.
        self._buffers["device"].record_stream(self._stream)
        num_bytes = self.num_host_blocks * self.spec.bytes_per_block
        pages = pinned_zero_bytes(num_bytes)
        if len(pages):
            weakref.finalize(self, unpin, pages, self.device).atexit = False
        self._buffers["host"] = pages[:num_bytes].view(self.num_host_blocks, self.spec.bytes_per_block)

    def __repr__(self) -> str:
        return (
            f"KVStorage({self.spec}, num_blocks={self.num_blocks}, device={self.device}, "
            f"host_blocks={self.num_host_blocks}, layout={self.layout}, zero_on={self.zero_on})"
        )

    # Views

    def key_cache(self, layer: int) -> Tensor:
        """(num_blocks, block_size, num_kv_heads, head_dim), a view; half of head_dim in uint8 for int4. O(1)."""
        return self._layer(layer).key

    def value_cache(self, layer: int) -> Tensor:
        """(num_blocks, block_size, num_kv_heads, value_dim), a view; of a latent, the first channels of its keys. O(1)."""
        return self._layer(layer).value

    def k_scale(self, layer: int) -> Tensor | None:
        """The keys' scales where the format has one per token (int8, int4), as a view; otherwise None. O(1)."""
        return self._layer(layer).k_scale

    def v_scale(self, layer: int) -> Tensor | None:
        """The values' scales, as `k_scale`. O(1)."""
        return self._layer(layer).v_scale

    def _layer(self, layer: int) -> LayerViews:
        return self._layers[as_int("layer", layer, at_least=0, at_most=self.spec.num_layers - 1)]

    # Moves

    def apply(self, plan: BlockMoves) -> None:
        """Carry out a plan's swaps out, copies and swaps in, in this order; what is computed next finds them done.

        If `zero_on` is "alloc", blocks that the plan took and to which nothing was copied are zeros then.
        Everything is checked before a byte moves: BlockStateError for an id that is no block or a target that stands
        twice, InvalidArgumentError for what are no ids. Then one native call moves everything. It allocates nothing, and
        an interrupt comes before its first byte or after its last; so no call that raises has moved a part. On CUDA an
        error of the device itself can: then the process has lost its CUDA context, and of the host's blocks only the
        targets of `plan.swaps_out` may have changed. O(blocks), O(1) without any.
        """
        if self._stream is None:
            self._move(plan)
        else:
            self.start(plan)
            self.wait()

    def start(self, plan: BlockMoves) -> None:
        """The first half of `apply`: on CUDA, moves begin after all that the current stream has been given so far.

        The blocks of the plan must not be touched before `wait`. On a CPU this is all of `apply`.
        """
        if self._stream is None:
            self._move(plan)
        else:
            current = torch.cuda.current_stream(self.device)
            with torch.cuda.stream(self._stream):
                self._stream.wait_stream(current)
                self._move(plan)

    def wait(self) -> None:
        """The second half of `apply`: what the current stream is given from now on finds all moves done. Does not block."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def _move(self, plan: BlockMoves) -> None:
        num_blocks, num_host_blocks = self.num_blocks, self.num_host_blocks
        swaps_out = checked_runs("swaps_out", plan.swaps_out, num_blocks, num_host_blocks, is_within=False)
        copies = checked_runs("copies", plan.copies, num_blocks, num_blocks, is_within=True)
        swaps_in = checked_runs("swaps_in", plan.swaps_in, num_host_blocks, num_blocks, is_within=False)
        device, host = self._buffers["device"], self._buffers["host"]
        targets, sources = self._targets(host, swaps_out), self._sources(device, swaps_out)
        # A copy's target has one dimension more than its source. That keeps torch off its fused CUDA kernel, which takes
        # pairs of equal shape on one device and copies them all at once: these must go one after the other.
        targets += [piece[None] for piece in self._targets(device, copies)]
        sources += self._sources(device, copies)
        targets += self._targets(device, swaps_in)
        sources += self._sources(host, swaps_in)
        if self.zero_on == "alloc":
            wiped = self._wiped(plan)
            targets += wiped
            sources += [self._zeros[: len(piece)] for piece in wiped]
        if targets:
            # Nothing may follow in this function: see `apply`.
            torch._foreach_copy_(targets, sources, non_blocking=True)

    def _wiped(self, plan: BlockMoves) -> list[Tensor]:
        """The blocks that the plan took, but for those to which it copies."""
        taken = np.setdiff1d(
            checked_block_ids("taken", plan.taken, self.num_blocks),
            np.concatenate((plan.copies.targets, plan.swaps_in.targets)),
        )
        return self._pieces(self._buffers["device"], [(block_id, 1) for block_id in taken.tolist()])

    def _targets(self, buffer: Tensor, runs: list[Run]) -> list[Tensor]:
        return self._pieces(buffer, [(run.target, run.num_blocks) for run in runs])

    def _sources(self, buffer: Tensor, runs: list[Run]) -> list[Tensor]:
        return self._pieces(buffer, [(run.source, run.num_blocks) for run in runs])

    def _pieces(self, buffer: Tensor, runs: list[tuple[int, int]]) -> list[Tensor]:
        """The memory of runs of blocks, in order: one piece for each run, or on a CPU as many as one thread takes at once."""
        if not runs:
            return []
        words, width = buffer.view(torch.int64).view(-1), self.spec.bytes_per_block // WORD_BYTES
        pieces: list[Tensor] = []
        for first, num_blocks in runs:
            run = words[first * width : (first + num_blocks) * width]
            if self._stream is None and num_blocks * width > GRAIN_WORDS:
                pieces += run.chunk(cdiv(num_blocks * width, GRAIN_WORDS))
            else:
                pieces.append(run)
        return pieces

    # Zeroing

    def on_alloc(self, block_ids: BlockIds) -> None:
        """Blocks were allocated: zeroes them if `zero_on` is "alloc". For engines without our scheduler; see docs/storage.md."""
        if self.zero_on == "alloc":
            self.zero(block_ids)

    def on_free(self, block_ids: BlockIds, *, where: Where = "device") -> None:
        """Blocks became free: zeroes them if `zero_on` is "free". Call it after `apply`, which may still read them.

        A block without a holder that the prefix cache still names is not free: it must not be handed in before it is
        evicted, and then "alloc" is the better moment, for an evicted block is taken at once.
        """
        if self.zero_on == "free":
            self.zero(block_ids, where=where)

    def zero(self, block_ids: BlockIds, *, where: Where = "device") -> None:
        """Write zeros over whole blocks, scales included. Raises as `apply`, before any is written. O(blocks)."""
        buffer = self._settled(where)
        ids = checked_block_ids("block_ids", block_ids, len(buffer))
        if len(ids):
            torch._foreach_zero_(self._targets(buffer, runs_of(ids, ids)))

    # Bytes

    def read_blocks(self, block_ids: BlockIds, *, where: Where = "device") -> Tensor:
        """The bytes of whole blocks: (n, spec.bytes_per_block) uint8 on the host. Waits for the device. O(n)."""
        buffer = self._settled(where)
        ids = checked_block_ids("block_ids", block_ids, len(buffer))
        out = torch.empty((len(ids), self.spec.bytes_per_block), dtype=torch.uint8, device="cpu")
        runs = runs_of(ids, np.arange(len(ids)))
        if runs:
            torch._foreach_copy_(self._targets(out, runs), self._sources(buffer, runs))
        return out

    def write_blocks(self, block_ids: BlockIds, content: Tensor, *, where: Where = "device") -> None:
        """Put back what `read_blocks` returned, into these blocks or others. Raises as `apply`. O(n)."""
        buffer = self._settled(where)
        ids = checked_distinct("block_ids", block_ids, len(buffer))
        wanted = (len(ids), self.spec.bytes_per_block)
        if content.dtype != torch.uint8 or content.shape != wanted or content.device.type != "cpu":
            raise InvalidArgumentError(
                f"content must be uint8 {wanted} on the CPU, found {content.dtype} {tuple(content.shape)} on {content.device}"
            )
        content = content.contiguous()
        if content.data_ptr() % WORD_BYTES:
            content = content.clone()
        runs = runs_of(np.arange(len(ids)), ids)
        if runs:
            torch._foreach_copy_(self._targets(buffer, runs), self._sources(content, runs))

    def save_blocks(
        self,
        path: str | os.PathLike[str],
        block_ids: BlockIds,
        *,
        num_tokens: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write device blocks, in this order, to a safetensors file, which appears complete or not at all.

        `num_tokens` of them are in use (all, if None). Slots behind these are written as zeros: they may hold what an
        earlier owner of the block has left. Raises BlockStateError, InvalidArgumentError or OSError. O(bytes).
        """
        content = self.read_blocks(block_ids)
        write_file(
            path, content, spec=self.spec, layout=self.layout, num_tokens=num_tokens, metadata=dict(metadata or {})
        )

    def load_blocks(self, path: str | os.PathLike[str], block_ids: BlockIds) -> SavedBlocks:
        """Read a file of `save_blocks` into device blocks, in this order; `read_saved` says how many it takes.

        Ids, format, spec, layout, shape, file size and digest are checked before a byte of the storage changes. The
        digest finds damage; it is no signature. Raises BlockStateError, SavedBlocksError or OSError. O(bytes).
        """
        ids = checked_distinct("block_ids", block_ids, self.num_blocks)
        saved, content = read_file(path, len(ids), spec=self.spec, layout=self.layout)
        self.write_blocks(ids, content)
        return saved

    def _settled(self, where: Where) -> Tensor:
        """The buffer, once the moves that were started are done for whoever uses it next."""
        if where not in self._buffers:
            raise InvalidArgumentError(f"where must be 'device' or 'host', found {where!r}")
        self.wait()
        if self._stream is not None and where == "host":
            self._stream.synchronize()
        return self._buffers[where]
