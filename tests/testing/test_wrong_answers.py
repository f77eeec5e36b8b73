"""Answers of a wrong kind, and errors where none may be, are told in one line: they are the allocator's failures."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from pagedkv import ConfigError, InvariantViolation
from pagedkv.testing import AllocatorTrial, Capabilities, NewSlots, ReferenceAllocator, verify


def answering(verb: str, change: Callable[[Any], Any]) -> type[ReferenceAllocator]:
    """A reference allocator of which one verb answers something else."""

    def answer(self: ReferenceAllocator, *arguments: Any, **options: Any) -> Any:
        return change(getattr(ReferenceAllocator, verb)(self, *arguments, **options))

    return type("Wrong", (ReferenceAllocator,), {verb: answer})


def use_all_verbs(trial: AllocatorTrial) -> None:
    trial.open("b", [1, 2, 3])
    trial.append("b", 3)
    trial.lookup([1, 2, 3])
    trial.swap_out("b")
    trial.swap_in("b")


def raise_error(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    ("verb", "change", "message"),
    [
        (
            "append",
            lambda found: list(found.slots),
            "append('b', 3) returned [0, 1, 2]: expected NewSlots(slots, copies)",
        ),
        ("append", lambda found: None, "append('b', 3) returned None: expected NewSlots(slots, copies)"),
        ("append", lambda found: (found.slots, None), "append('b', 3) returned ([0, 1, 2], None): expected NewSlots("),
        ("append", lambda found: (found.slots, [3]), "append('b', 3) returned ([0, 1, 2], [3]): expected NewSlots("),
        ("append", lambda found: (["x"], []), "append('b', 3) returned (['x'], []): expected NewSlots("),
        ("open", lambda found: None, "open('b', [1, 2, 3]) returned None: expected a number of tokens"),
        ("open", str, "open('b', [1, 2, 3]) returned '0': expected a number of tokens"),
        ("lookup", lambda found: None, "lookup([1, 2, 3]) returned None: expected a number of tokens"),
        ("swap_out", lambda found: None, "swap_out('b') returned None: expected a sequence of (source, target)"),
        ("swap_in", lambda found: [3], "swap_in('b') returned [3]: expected a sequence of (source, target)"),
        ("block_table", lambda found: None, "block_table('b') returned None: expected a sequence of block ids"),
        ("num_free", lambda found: None, "num_free() returned None: expected a number of blocks"),
        ("num_free_host", lambda found: None, "num_free_host() returned None: expected a number of blocks"),
        ("block_table", lambda found: raise_error(KeyError("b")), "block_table('b') raised KeyError('b'): expected an"),
        ("num_free", lambda found: raise_error(OSError("gone")), "num_free() raised OSError(gone): expected an answer"),
        ("append", lambda found: raise_error(SystemExit(3)), "append('b', 3) raised SystemExit(3): expected success"),
    ],
)
def test_an_answer_of_a_wrong_kind_breaks_i8_and_names_the_call(
    verb: str, change: Callable[[Any], Any], message: str
) -> None:
    trial = AllocatorTrial(answering(verb, change), 4, 2, 4)

    with pytest.raises(InvariantViolation, match=re.escape(f"I8: {message}")):
        use_all_verbs(trial)


def test_a_long_answer_of_a_wrong_kind_is_cut_and_kept_on_one_line() -> None:
    trial = AllocatorTrial(answering("block_table", lambda found: "x\ny" * 1000), 4, 2, 4)

    with pytest.raises(InvariantViolation) as caught:
        trial.open("b", [1])

    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 200


def test_an_error_in_state_is_a_failure_of_the_allocator() -> None:
    class Stateless(ReferenceAllocator):
        def state(self):
            raise RuntimeError("no state")

    trial = AllocatorTrial(Stateless, 4, 2, 4)

    with pytest.raises(InvariantViolation, match=r"I8: state\(\) raised RuntimeError\(no state\)"):
        trial.lookup([1])


def test_a_state_that_cannot_be_compared_is_a_mistake_of_the_user() -> None:
    class Odd:
        def __ne__(self, other):
            raise ValueError("which of the elements?")

        __eq__ = __ne__

    class Stateful(ReferenceAllocator):
        def state(self):
            return Odd()

    with pytest.raises(ConfigError, match="values of state\\(\\) must compare with ==: that raised ValueError"):
        AllocatorTrial(Stateful, 4, 2, 4).lookup([1])


@pytest.mark.parametrize("error", [RuntimeError("no more"), SystemExit("no more")], ids=["error", "exit"])
def test_a_factory_that_fails_later_is_a_mistake_of_the_user(error: BaseException) -> None:
    made: list[int] = []

    def factory(num_blocks: int, block_size: int, num_host_blocks: int) -> ReferenceAllocator:
        made.append(num_blocks)
        if len(made) == 3:
            raise error
        return ReferenceAllocator(num_blocks, block_size, num_host_blocks)

    with pytest.raises(
        ConfigError, match=rf"factory\(num_blocks=.*\) raised {type(error).__name__}\(no more\): expected"
    ):
        verify(factory, num_operations=2000)


def test_blocks_that_do_not_exist_are_found_in_hits_that_need_not_be_exact() -> None:
    class Loose(ReferenceAllocator):
        capabilities = Capabilities(exact_hits=False)

        def block_table(self, sequence_id):
            return [9 for _ in super().block_table(sequence_id)]

    trial = AllocatorTrial(Loose, 4, 2, 4)
    trial.open("a", [1, 2, 3])
    trial.allocator.append("a", 3)

    with pytest.raises(InvariantViolation, match=r"I1: block 9 was handed out, there are 0\.\.3"):
        trial.model.hold(trial.table("a"))


def test_copies_from_blocks_of_others_are_found_in_swaps_that_need_not_be_exact() -> None:
    class Loose(ReferenceAllocator):
        capabilities = Capabilities(exact_hits=False, prefix_caching=False)

        def swap_in(self, sequence_id):
            return [(77, target) for _, target in super().swap_in(sequence_id)]

    trial = AllocatorTrial(Loose, 4, 2, 4)

    with pytest.raises(InvariantViolation, match=r"I6: swap_in\('b'\) copies \[\(77, "):
        use_all_verbs(trial)


def test_answers_of_numpy_integers_will_do() -> None:
    numpy = pytest.importorskip("numpy")
    trial = AllocatorTrial(answering("append", lambda found: NewSlots(numpy.array(found.slots), found.copies)), 4, 2, 4)

    use_all_verbs(trial)

    assert trial.num_calls == 5
