"""How fast is this machine at plain Python? A fixed loop that every figure can be divided by."""

from __future__ import annotations

import gc
import time

NUM_OBJECTS = 1000
NUM_PASSES = 200
NUM_REPEATS = 3


class Item:
    """An object of two slots, as a Python scheduler would keep one for a request."""

    __slots__ = ("a", "b")

    def __init__(self, a: int) -> None:
        self.a = a
        self.b: int | None = None


def yardstick_ms() -> float:
    """Milliseconds of this thread's CPU for 200,000 rounds of: set an attribute, store in a dict, read back, append.

    The best of three, object creation excluded.
    """
    items = [Item(i) for i in range(NUM_OBJECTS)]
    best = float("inf")
    for _ in range(NUM_REPEATS):
        by_a: dict[int, Item] = {}
        values: list[int | None] = []
        start = time.thread_time()
        for _ in range(NUM_PASSES):
            for item in items:
                item.b = item.a + 1
                by_a[item.a] = item
                values.append(by_a[item.a].b)
            values.clear()
        best = min(best, time.thread_time() - start)
    return best * 1e3


if __name__ == "__main__":
    gc.collect()
    gc.freeze()
    print(f"{yardstick_ms():.2f} ms")
