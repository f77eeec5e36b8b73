"""Allocation failures on demand: the n-th time that memory asks for blocks, table space or a name, it gets none."""

from __future__ import annotations

from typing import Any

from pagedkv.row_memory import RowMemory

__all__ = ["ALLOCATION_POINTS", "AllocationFaults", "InjectedFailureError"]

ALLOCATION_POINTS = ("device blocks", "host blocks", "table rows", "table width", "names")
"""Where memory may run out: both pools, more rows, wider rows, and the map from keys to blocks."""


class InjectedFailureError(MemoryError):
    """No memory, on purpose."""


class AllocationFaults:
    """Installs itself at every allocation point of one memory. Others pay nothing: their classes are not touched.

    `num_reached` counts, for each point, how often it was reached since the last `arm` or `disarm`; `num_failures`, how often
    it has failed since the beginning.

    The parts of this memory get a class derived from their own whose allocating methods ask here first. Derived and
    put in place afterwards, because parts refer to each other, and no wrapper could stand in for all of the references.
    """

    def __init__(self, memory: RowMemory) -> None:
        self.num_failures = dict.fromkeys(ALLOCATION_POINTS, 0)
        self.disarm()
        for owner, point, methods in (
            (memory.pool, "device blocks", ("try_allocate",)),
            (memory.host_pool, "host blocks", ("try_allocate",)),
            (memory.sequences, "table rows", ("add",)),
            (memory.sequences, "table width", ("reserve_width",)),
            (memory.cache, "names", ("name_fresh", "name_each")),
        ):
            self._install(owner, point, methods)

    def arm(self, point: str, nth: int) -> None:
        """Let the `nth` next visit (1: the next one) to this point fail, once. Others that were armed are disarmed."""
        self.disarm()
        self._point, self._countdown = point, nth

    def disarm(self) -> None:
        """Let nothing fail."""
        self._point, self._countdown = "", 0
        self.num_reached = dict.fromkeys(ALLOCATION_POINTS, 0)

    @property
    def is_armed(self) -> bool:
        """Whether a failure is still to come."""
        return self._countdown > 0

    def reach(self, point: str) -> None:
        """An allocation is about to happen. Raises InjectedFailureError if it is to fail."""
        self.num_reached[point] += 1
        if point == self._point and self._countdown > 0:
            self._countdown -= 1
            if self._countdown == 0:
                self.num_failures[point] += 1
                raise InjectedFailureError(f"no memory for {point}, on purpose")

    def _install(self, owner: Any, point: str, methods: tuple[str, ...]) -> None:
        cls = type(owner)
        asking = {name: self._asking(getattr(cls, name), point) for name in methods}
        # Without slots of its own the derived class has the same layout, so an object may change over to it.
        owner.__class__ = type(cls.__name__, (cls,), {"__slots__": (), **asking})

    def _asking(self, method: Any, point: str) -> Any:
        def allocate(owner: object, *args: Any) -> Any:
            self.reach(point)
            return method(owner, *args)

        return allocate
