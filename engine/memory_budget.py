"""How many blocks: from what was granted, what the device has, and what a step of the model itself needs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pagedkv.engine.available_memory import available_bytes
from pagedkv.engine.errors import MemoryBudgetError
from pagedkv.engine.largest_step import LargestStep
from pagedkv.errors import InvalidArgumentError
from pagedkv.kv_spec import KVSpec

__all__ = ["MemoryBudget", "as_bytes", "can_measure", "measure_budget", "num_blocks_within"]

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
DEFAULT_SHARE = {"cpu": 0.25, "cuda": 0.9}


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What a device has for K/V, in bytes.

    total_bytes:     of a GPU all its memory, on a CPU what is available to programs now, within the limit of a container
    free_bytes:      not in use now, the model being there already
    step_bytes:      needed on top by the largest step, choosing its tokens included, as measured; on a GPU also by graphs
    """

    total_bytes: int
    free_bytes: int
    step_bytes: int

    def granted(self, kv_memory: str | int | float | None, device_type: str) -> int:
        """Bytes for K/V. Raises InvalidArgumentError, or MemoryBudgetError if they are not there.

        `kv_memory`: bytes, a text such as "4GiB", or as a float in (0, 1] the share of the total that everything, the
        model included, may take on a GPU, and of the available memory that K/V may take on a CPU.
        """
        _require_known(device_type)
        left = self.free_bytes - self.step_bytes
        if kv_memory is None:
            kv_memory = DEFAULT_SHARE[device_type]
        if isinstance(kv_memory, float):
            if not 0 < kv_memory <= 1:
                raise InvalidArgumentError(f"kv_memory as a share must be above 0 and at most 1, found {kv_memory}")
            if device_type == "cuda":
                granted = left - int(self.total_bytes * (1 - kv_memory))
            else:
                granted = min(left, int(self.total_bytes * kv_memory))
            wanted = f"a share of {kv_memory:g}"
        else:
            granted = as_bytes("kv_memory", kv_memory)
            wanted = f"{_gib(granted)}"
        if granted > left or granted <= 0:
            raise MemoryBudgetError(
                f"kv_memory of {wanted} does not fit: {_gib(self.free_bytes)} are free of {_gib(self.total_bytes)}, and the "
                f"largest step takes {_gib(self.step_bytes)} of them (fewer max_num_batched_tokens and max_num_running take less)"
            )
        return granted


def as_bytes(name: str, amount: str | int) -> int:
    """Bytes of a number or of a text such as "4GiB" or "500 MB". Raises InvalidArgumentError.

    >>> as_bytes("kv_memory", "1.5GiB")
    1610612736
    """
    if isinstance(amount, int) and not isinstance(amount, bool) and amount > 0:
        return amount
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", amount) if isinstance(amount, str) else None
    if match is None or match[2] not in UNITS or float(match[1]) <= 0:
        raise InvalidArgumentError(f'{name} must be bytes or a text such as "4GiB", found {amount!r}')
    return int(float(match[1]) * UNITS[match[2]])


def can_measure(device: torch.device) -> bool:
    """Whether the system tells what memory the device has: of a CPU, Linux alone does."""
    if device.type not in DEFAULT_SHARE:
        return False
    if device.type != "cuda":
        try:
            available_bytes()
        except MemoryBudgetError:
            return False
    return True


def measure_budget(device: torch.device, largest: LargestStep) -> MemoryBudget:
    """Look at the device before and during the largest steps that will come. Raises MemoryBudgetError."""
    _require_known(device.type)
    if device.type == "cuda":
        # Added up: a captured graph keeps what its pass took, beside what other steps take.
        step_bytes = _cuda_peak_growth(device, largest.run_decodes) + _cuda_peak_growth(device, largest.run)
        free, total = torch.cuda.mem_get_info(device)
        return MemoryBudget(total, free, step_bytes)
    available = available_bytes()
    return MemoryBudget(available, available, _peak_growth(largest.run))


def num_blocks_within(spec: KVSpec, num_bytes: int) -> int:
    """Blocks that fit. Raises MemoryBudgetError, with the arithmetic, if not one does."""
    try:
        return spec.num_blocks_for(num_bytes)
    except InvalidArgumentError as error:
        raise MemoryBudgetError(str(error)) from None


def _require_known(device_type: str) -> None:
    if device_type not in DEFAULT_SHARE:
        known = " and ".join(DEFAULT_SHARE)
        raise MemoryBudgetError(
            f"the memory of {device_type} cannot be measured, only that of {known}: give num_blocks or kv_memory in bytes"
        )


def _cuda_peak_growth(device: torch.device, run: Callable[[], None]) -> int:
    """By how much the tensors on the device grew at their highest while `run` ran; the allocator gives back what it kept."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.max_memory_allocated(device) - before


def _peak_growth(run: Callable[[], None]) -> int:
    """By how much the process's resident memory grew at its highest while `run` ran."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    clear.write_text("5")  # Resets the high-water mark.
    before = _status_bytes(status, "VmRSS")
    run()
    return max(0, _status_bytes(status, "VmHWM") - before)


def _status_bytes(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
