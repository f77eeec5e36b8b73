import numpy as np

from pagedkv.content import SimulatedContent
from pagedkv.sequences import SequenceTable


def add(table: SequenceTable, *block_ids: int) -> int:
    return table.add(SimulatedContent([], 1), 10, np.array(block_ids, np.int64), 0)


def test_rows_are_dense_and_used_again() -> None:
    table = SequenceTable(2)
    assert [add(table), add(table), add(table)] == [0, 1, 2]
    table.remove(1)
    assert (add(table), add(table), table.num_live) == (1, 3, 4)


def test_a_removed_row_holds_nothing() -> None:
    table = SequenceTable(2)
    row = add(table, 5, 6)
    table.remove(row)
    assert (table.blocks(row).tolist(), bool(table.is_live[row]), table.contents[row]) == ([], False, None)


def test_growing_in_rows_keeps_what_was_there() -> None:
    table = SequenceTable(2, num_rows=2, width=2)
    rows = [add(table, row, row + 10) for row in range(5)]
    assert rows == [0, 1, 2, 3, 4]
    assert [table.blocks(row).tolist() for row in rows] == [[0, 10], [1, 11], [2, 12], [3, 13], [4, 14]]


def test_growing_in_width_keeps_what_was_there() -> None:
    table = SequenceTable(2, num_rows=2, width=1)
    first, second = add(table, 7), add(table, 8)
    table.reserve_width(4)
    table.append_blocks(np.array([second, first]), np.array([1, 3]), np.array([1, 2, 3, 4]))
    assert table.blocks(first).tolist() == [7, 2, 3, 4]
    assert table.blocks(second).tolist() == [8, 1]


def test_a_new_sequence_may_be_wider_than_the_table() -> None:
    table = SequenceTable(2, num_rows=2, width=1)
    assert table.blocks(add(table, 1, 2, 3)).tolist() == [1, 2, 3]


def test_one_block_each_and_a_run_for_one_row_are_appended_at_the_end() -> None:
    table = SequenceTable(2, num_rows=2, width=1)
    first, second = add(table, 7), add(table)
    table.reserve_width(3)
    table.append_single(np.array([first, second]), np.array([1, 2]))
    table.append_run(second, 1, np.array([3, 4]))
    assert table.blocks(first).tolist() == [7, 1]
    assert table.blocks(second).tolist() == [2, 3, 4]


def test_a_slot_is_block_times_size_plus_offset() -> None:
    table = SequenceTable(4)
    first, second = add(table, 5, 3), add(table, 2)
    rows = np.array([first, first, second, first])
    assert table.slots(rows, np.array([0, 7, 3, 4])).tolist() == [20, 15, 11, 12]


def test_slots_of_a_run_begin_and_end_in_the_middle_of_blocks() -> None:
    table = SequenceTable(block_size=4)
    row = table.add(None, 12, np.array([7, 2, 5]), 0)
    assert table.slots_of_run(row, 3, 9).tolist() == [31, 8, 9, 10, 11, 20]
    assert table.slots_of_run(row, 4, 8).tolist() == [8, 9, 10, 11]
    assert table.slots_of_run(row, 6, 7).tolist() == [10]
