"""Captures work on a CUDA device as graphs, and finds out first whether it can be captured."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

__all__ = ["CudaCapture"]


class CudaCapture:
    """Makes CUDA graphs that share one memory pool: none of them may be replayed while another one runs.

    It owns the pool and one side stream, on which work is tried and captured; a graph is replayed on whatever stream is
    current then. What a graph leaves in the pool is overwritten by the next graph that is replayed, so results must be
    copied out within it, to memory of the caller's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], None]) -> None:
        """Run it for real on the side stream, between what the current stream has been given and what it will be.

        Kernels are compiled and libraries take their workspaces here: neither may happen in a capture.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                run()
        finally:
            current.wait_stream(self._stream)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture `run`, which was warmed up and leaves the same if it runs again; returns what replays it.

        It runs once more, then it is captured. Whatever that raises means that it cannot be captured; the current stream is
        then as it was. Waits for the device.
        """
        self._check_that_it_never_waits(run)
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        failure: Exception | None = None
        try:
            # Other threads of a server may allocate meanwhile, which the default mode would count as an error in here.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    run()
                except Exception as error:
                    failure = error
                    raise
        except BaseException:
            # Leaving a broken capture raises again, which says nothing of why it broke, and before the stream is put back.
            torch.cuda.set_stream(current)
            if failure is not None:
                raise failure from None
            raise
        return graph.replay

    def _check_that_it_never_waits(self, run: Callable[[], None]) -> None:
        """Raise RuntimeError if `run` waits for the device, as control flow that depends on data does.

        A capture would find it out too, but one that is broken off leaves the allocator and the random generators of torch
        in the midst of it. So this is asked while nothing is captured.
        """
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It says, once, that it does not find every operation that waits.
            torch.cuda.set_sync_debug_mode("error")
        try:
            self.warm_up(run)
        finally:
            torch.cuda.set_sync_debug_mode(before)
