"""What a trial says of allocators: the checker is tested with planted corruption, not trusted."""

from __future__ import annotations

import pytest

from pagedkv import ConfigError, InvalidArgumentError, InvariantViolation
from pagedkv.testing import AllocatorTrial, Capabilities, NewSlots, ReferenceAllocator
from pagedkv.testing.content_shadow import ContentShadow, Histories
from pagedkv.testing.shrinking import shrink
from pagedkv.testing.zoo.atomicity import KeepsTheCallersList
from pagedkv.testing.zoo.prefixes import SaltIsLeftOut


def trial_of(kind: type[ReferenceAllocator], num_blocks: int = 4) -> AllocatorTrial:
    return AllocatorTrial(kind, num_blocks, 2, 4)


def test_equal_tokens_behind_other_tokens_or_another_salt_are_other_content() -> None:
    histories = Histories()
    root, other = histories.root(b""), histories.root(b"x")

    assert histories.walk(root, [1, 2]) == histories.walk(root, [1, 2])
    assert histories.walk(root, [1, 2])[1] != histories.walk(root, [3, 2])[1]
    assert histories.walk(root, [1, 2]) != histories.walk(other, [1, 2])


def test_copies_are_carried_out_in_order() -> None:
    content = ContentShadow(3, 1, 0)
    content.device[0] = [7]

    content.copy(content.device, content.device, [(0, 1), (1, 2)])

    assert content.device == [[7], [7], [7]]


def test_content_that_was_overwritten_is_found_at_its_first_token() -> None:
    content = ContentShadow(2, 2, 0)
    content.device[:] = [[1, 2], [3, 9]]

    assert content.first_difference([0, 1], [1, 2, 3, 4], 4, on_host=False) == 3
    assert content.first_difference([0, 1], [1, 2, 3, 4], 3, on_host=False) is None


def test_content_is_read_back_and_not_only_counted() -> None:
    trial = trial_of(ReferenceAllocator)
    trial.open("a", [1, 2, 3])
    trial.append("a", 3)
    trial.content.device[trial.model.sequences["a"].blocks[0]][1] = 99

    with pytest.raises(InvariantViolation, match="I4: token 1 of 'a', in block 0, is not what was written"):
        trial.extend("a", [4])


def test_content_that_was_lost_on_the_host_is_a_failed_swap() -> None:
    trial = trial_of(ReferenceAllocator)
    trial.open("a", [1, 2, 3])
    trial.append("a", 3)
    trial.swap_out("a")
    trial.content.host[0][0] = 99

    with pytest.raises(InvariantViolation, match="I6: token 0 of 'a', in host block 0"):
        trial.lookup([1])


def test_a_needless_copy_is_reported() -> None:
    class Copies(ReferenceAllocator):
        def append(self, sequence_id, num_tokens):
            slots, _ = super().append(sequence_id, num_tokens)
            return NewSlots(slots, [(0, 1)])

    trial = trial_of(Copies)
    trial.open("a", [1])

    with pytest.raises(InvariantViolation, match=r"I5: append\('a', 1\) copies \[\(0, 1\)\]"):
        trial.append("a", 1)


def test_a_wrong_number_of_free_blocks_is_told_with_the_call_before_it() -> None:
    class Miscounts(ReferenceAllocator):
        def num_free(self):
            return super().num_free() + bool(self.sequences)

    trial = trial_of(Miscounts)

    with pytest.raises(
        InvariantViolation, match=r"I2: 5 device blocks are free after open\('a', \[1\], b''\), the tables"
    ):
        trial.open("a", [1])


def test_counting_held_blocks_as_free_is_i2_and_handing_them_out_is_i1() -> None:
    class FreesTooEarly(ReferenceAllocator):
        def extend(self, sequence_id, token_ids):
            super().extend(sequence_id, token_ids)
            self.free.append(self.sequences[sequence_id].blocks[0])

    trial = trial_of(FreesTooEarly)
    trial.open("a", [1])
    trial.append("a", 1)

    with pytest.raises(InvariantViolation, match=r"I1: 4 device blocks .* hands out blocks that tables name"):
        trial.extend("a", [2])


def test_a_list_of_tokens_that_is_kept_and_changed_is_told_and_spoils_no_record() -> None:
    trial = trial_of(KeepsTheCallersList)
    prompt = [1, 2]
    trial.open("a", prompt)
    trial.extend("a", [3])

    with pytest.raises(InvariantViolation, match=r"I8: open\('a', \[1, 2\]\) changed its argument: .* \[1, 2, 3\]"):
        trial.close("a")
    assert prompt == [1, 2]
    assert trial.calls[0] == ("open", "a", [1, 2], b"")


def test_a_list_of_tokens_that_is_used_up_is_told_at_once() -> None:
    class UsesUp(ReferenceAllocator):
        def lookup(self, token_ids, *, salt=b""):
            found = super().lookup(token_ids, salt=salt)
            token_ids.clear()
            return found

    with pytest.raises(InvariantViolation, match=r"I8: lookup\(\[1\]\) changed its argument: it has become \[\]"):
        trial_of(UsesUp).lookup([1])


def test_an_allocator_without_salts_is_given_none() -> None:
    class Unsalted(ReferenceAllocator):
        capabilities = Capabilities(salts=False)

    trial = trial_of(Unsalted)
    for id_, salt in (("a", b""), ("b", b"x")):
        trial.open(id_, [1, 2, 3], salt)
        trial.append(id_, trial.model.sequences[id_].num_pending)
    trial.lookup([1, 2, 3], b"y")

    assert trial.allocator.sequences["b"].salt == b""
    assert trial.log[-1] == ("lookup", 2)


def test_a_hit_of_anothers_blocks_is_told_with_id_and_salt() -> None:
    trial = trial_of(SaltIsLeftOut)
    trial.open("a", [1, 2, 3], b"x")
    trial.append("a", 3)

    with pytest.raises(
        InvariantViolation, match=r"I3: lookup\(\[1, 2, 3\], b'y'\) hit 2 tokens, no blocks hold more than 0"
    ):
        trial.lookup([1, 2, 3], b"y")
    with pytest.raises(
        InvariantViolation, match=r"I3: open\('b', \[1, 2, 3\], b'y'\) hit 2 tokens, no blocks hold more than"
    ):
        trial.open("b", [1, 2, 3], b"y")


def test_a_refusal_that_was_not_due_is_told_without_a_stray_comma() -> None:
    class Refuses(ReferenceAllocator):
        def append(self, sequence_id, num_tokens):
            raise InvalidArgumentError("no")

    trial = trial_of(Refuses)
    trial.open("a", [1])

    with pytest.raises(
        InvariantViolation, match=r"I8: append\('a', 1\) raised InvalidArgumentError\(no\): expected success"
    ):
        trial.append("a", 1)


def test_no_tokens_take_nothing_and_succeed() -> None:
    trial = trial_of(ReferenceAllocator)
    trial.open("a", [1])

    trial.append("a", 0)

    assert trial.log[-1] == ("append", (), ())


def test_an_allocators_own_check_is_called_and_believed() -> None:
    class Checks(ReferenceAllocator):
        def check(self):
            raise InvariantViolation("I2", "as counted by the allocator itself")

    trial = trial_of(Checks)

    for _ in range(15):
        trial.lookup([1])
    with pytest.raises(InvariantViolation, match="I2: as counted by the allocator itself"):
        trial.lookup([1])


def test_an_allocator_that_lacks_a_verb_it_claims_is_a_mistake_of_the_user() -> None:
    class Few:
        capabilities = Capabilities(forking=False, truncating=False, swapping=False)

        def open(self):
            pass

    with pytest.raises(ConfigError, match="Few lacks extend, append, close, block_table, num_free, lookup, which"):
        AllocatorTrial(lambda *_: Few(), 2, 2)
    with pytest.raises(ConfigError, match=r"object\.capabilities must be a Capabilities, found None"):
        AllocatorTrial(lambda *_: object(), 2, 2)


def test_a_call_that_is_no_verb_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="'__init__' is no verb of a trial: these are open, extend"):
        trial_of(ReferenceAllocator).run(("__init__",))


def test_shrinking_keeps_the_calls_that_matter_and_makes_their_arguments_small() -> None:
    calls = [("open", "a", [1, 0, 1, 1], b"x"), *[("lookup", [1], b"")] * 20, ("append", "a", 9), ("close", "a")]

    def fails(candidate) -> bool:
        lengths = [len(call[2]) for call in candidate if call[0] == "open"]
        return sum(lengths) >= 3 and any(call[0] == "append" and call[2] >= 3 for call in candidate)

    assert shrink(calls, fails) == [("open", "a", [0, 0, 0], b""), ("append", "a", 3)]


def test_shrinking_ends_when_its_attempts_are_used_up() -> None:
    calls = [("lookup", [1], b"")] * 100

    assert len(shrink(calls, lambda candidate: len(candidate) > 1, max_attempts=0)) == 100
