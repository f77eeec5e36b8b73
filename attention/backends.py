"""The backends, how one is picked, and what each can do here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pagedkv.attention.call import AttentionCall, Features, WriteCall
from pagedkv.attention.errors import AttentionArgumentError, BackendUnsupportedError
from pagedkv.attention.partition import Partition

__all__ = [
    "Backend",
    "BackendInfo",
    "KnownAttention",
    "KnownWrite",
    "backend_info",
    "backend_named",
    "pick_backend",
    "pick_for_device",
]


class KnownAttention(Protocol):
    """A planned call that passed all checks. One that asks the same of tensors that lie alike would pass them too."""

    def attend(
        self, operands: tuple[Tensor, *tuple[Tensor | None, ...]], asked: tuple[object, ...], out: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor] | None:
        """The result; None, with nothing written, if this is another call."""


class KnownWrite(Protocol):
    """A write that passed all checks. One of tensors that lie alike would pass them too, if its slots are in range."""

    def write(self, operands: tuple[Tensor | None, ...], asked: str | None) -> bool:
        """Whether this is a write like the known one, and done; else nothing was written."""


class Backend(Protocol):
    """One way to compute attention. Objects have no state but what they load."""

    name: str

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine; None if it can. May load a library, never compiles on import."""

    def runs_on(self, device_type: str) -> bool:
        """Whether tensors on such a device can be served."""

    def refuses(self, features: Features) -> str | None:
        """What of a call it cannot do; None if it can do all of it."""

    def refuses_write(self, features: Features) -> str | None:
        """What of a write it cannot do; None if it can do all of it."""

    def partition(self, num_q_heads: int, num_kv_heads: int, device: torch.device) -> Partition:
        """How finely work should be cut."""

    def attend(self, call: AttentionCall) -> None:
        """Write `call.out`, and `call.lse` if there is one."""

    def know_attention(
        self, call: AttentionCall, asked: tuple[object, ...], lengths: tuple[Tensor, Tensor]
    ) -> KnownAttention | None:
        """What does calls like this one, which has been checked and done, without looking again; None if there is no such thing.

        asked: its options as they were given; lengths: that its plan was made for
        """

    def know_write(self, call: WriteCall, asked: str | None) -> KnownWrite | None:
        """The same for a write that was asked of this backend."""

    def write(self, call: WriteCall) -> None:
        """Write the new keys and values, and their scales, into the cache."""

    def describe(self) -> str:
        """What runs, in a few words: the instruction set, the version."""


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What `backend_info` says of one backend."""

    name: str
    is_available: bool
    detail: str


def _backends() -> dict[str, Backend]:
    # In the order of preference. Imported here: a backend imports this module's neighbours.
    from pagedkv.attention.cpu.backend import CPUBackend
    from pagedkv.attention.reference import ReferenceBackend
    from pagedkv.attention.torch_calls import TorchBackend
    from pagedkv.attention.triton_kernels import TritonBackend, is_interpreted

    backends: list[Backend] = [CPUBackend(), TorchBackend(), ReferenceBackend()]
    # Interpreted, Triton serves every device, and everything but the reference is faster: by name only.
    backends.insert(len(backends) - 1 if is_interpreted() else 0, TritonBackend())
    return {backend.name: backend for backend in backends}


_REGISTRY: dict[str, Backend] = {}


def _registry() -> dict[str, Backend]:
    if not _REGISTRY:
        _REGISTRY.update(_backends())
    return _REGISTRY


def backend_named(name: str) -> Backend:
    """The backend of this name. Raises AttentionArgumentError if there is none, BackendUnsupportedError if it cannot run here."""
    backend = _registry().get(name)
    if backend is None:
        raise AttentionArgumentError(f"backend must be one of {', '.join(_registry())}, found {name!r}")
    reason = backend.unavailable()
    if reason is not None:
        raise BackendUnsupportedError(name, reason)
    return backend


def pick_for_device(device: torch.device) -> Backend:
    """The first backend, in order of preference, that runs on `device`."""
    device_type = device.type
    for backend in _registry().values():
        if backend.runs_on(device_type) and backend.unavailable() is None:
            return backend
    raise AttentionArgumentError(f"no backend runs on {device}")


def pick_backend(features: Features, name: str | None, *, for_write: bool = False) -> Backend:
    """The backend called `name`, or the first that can do all that is asked.

    Raises BackendUnsupportedError, naming what it cannot do, and AttentionArgumentError if none runs on the device.
    """
    device_type = features.device.type
    if name is not None:
        backend = backend_named(name)
        if not backend.runs_on(device_type):
            raise BackendUnsupportedError(name, f"it does not run on {device_type}")
        refusal = backend.refuses_write(features) if for_write else backend.refuses(features)
        if refusal is not None:
            raise BackendUnsupportedError(name, refusal)
        return backend
    for backend in _registry().values():
        if not backend.runs_on(device_type) or backend.unavailable() is not None:
            continue
        if (backend.refuses_write(features) if for_write else backend.refuses(features)) is None:
            return backend
    # The reference does everything wherever it runs.
    raise AttentionArgumentError(f"no backend runs on {features.device}")


def backend_info() -> list[BackendInfo]:
    """Every backend in the order in which they are tried: whether it runs here, and with what, or why not.

    >>> [info.name for info in backend_info()][-1]
    'reference'
    """
    infos = []
    for backend in _registry().values():
        reason = backend.unavailable()
        infos.append(BackendInfo(backend.name, reason is None, backend.describe() if reason is None else reason))
    return infos
