"""How much memory programs can still take: of the machine, and of the container that this one runs in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pagedkv.engine.errors import MemoryBudgetError

__all__ = ["available_bytes"]

# By hierarchy: where it is mounted, and the names of its limit, of what is taken, and of the part of that which is cache.
V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("", "memory.max", "memory.current", "inactive_file")


def available_bytes() -> int:
    """Memory that can be taken without swapping, as Linux estimates it, and without exceeding the limit of a control group.

    Raises MemoryBudgetError on a system that does not tell. O(depth of the group), a few reads of files.
    """
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        of_machine = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        raise MemoryBudgetError(
            "the available memory cannot be read on this system: give num_blocks or kv_memory in bytes"
        ) from None
    return max(0, min([of_machine, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    """What each of the groups around this process may still take; nothing for those without a limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            names = V2
        elif "memory" in controllers.split(","):
            names = V1
        else:
            continue
        mount, path = Path("/sys/fs/cgroup", names[0]), Path(group.lstrip("/"))
        # In a container the path may be the host's, which is not there: its own group is then the mount itself.
        for folder in (path, *path.parents):
            left = _left(mount / folder, *names[1:])
            if left is not None:
                yield left


def _left(group: Path, limit: str, taken: str, cache: str) -> int | None:
    """What a group may still take, where a cache of files that nobody uses counts as free; None without a limit."""
    try:
        most, used = int((group / limit).read_text()), int((group / taken).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return most - (used - min(used, int(stat.get(cache, 0))))
    except (OSError, ValueError):  # The group is not there, or its limit is "max".
        return None
