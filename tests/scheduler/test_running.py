"""Rows that run: their order, their seats, and the columns that hold them."""

from __future__ import annotations

from pagedkv import SimulatedPrompt
from pagedkv.scheduler import Request
from pagedkv.scheduler.running import RunningRows
from pagedkv.scheduler.sample import Sample


def sample(row: int, *, n: int = 1) -> Sample:
    """Prompt of 4 tokens and 8 more; it arrived as number `row`, with rank row / 2."""
    made = Sample(Request(f"r{row}", SimulatedPrompt(4), 8, n=n), None, 4, rank=row / 2, serial=row)
    made.row = row
    return made


def test_rows_come_in_order_of_admission_and_gaps_close() -> None:
    running = RunningRows()
    samples = [sample(row) for row in (5, 2, 9)]
    for one in samples:
        running.add(one, protected_until=0)
    running.remove(samples[1])
    assert (running.rows.tolist(), len(running)) == ([5, 9], 2)
    running.add(samples[1], protected_until=0)
    running.remove(samples[2])
    assert running.rows.tolist() == [5, 2]


def test_columns_grow_with_the_rows_and_keep_what_they_hold() -> None:
    running = RunningRows(num_rows=2)
    samples = [sample(row) for row in (0, 1, 2, 7)]
    for one in samples:
        running.add(one, protected_until=10 + one.row)

    rows = running.rows
    assert rows.tolist() == [0, 1, 2, 7]
    assert running.max_tokens[rows].tolist() == [12, 12, 12, 12]
    assert running.protected_until[rows].tolist() == [10, 11, 12, 17]
    assert running.ranks[rows].tolist() == [0.0, 0.5, 1.0, 3.5]
    assert running.serials[rows].tolist() == [0, 1, 2, 7]
    assert [running.samples[row] for row in rows.tolist()] == samples
    assert running.samples[3] is None
    running.remove(samples[1])
    assert running.rows.tolist() == [0, 2, 7]


def test_a_request_keeps_a_seat_for_each_sample_that_is_still_to_fork_off() -> None:
    running = RunningRows()
    first = sample(3, n=3)
    running.add(first, protected_until=0)
    assert (running.num_seats, len(running), list(running.unforked)) == (3, 1, [3])
    running.mark_forked(first)
    assert (running.num_seats, running.unforked) == (1, {})
    running.mark_unforked(first)
    assert (running.num_seats, list(running.unforked)) == (3, [3])
    running.remove(first)
    assert (running.num_seats, running.unforked) == (0, {})
