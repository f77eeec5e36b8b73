"""Tests to inherit: a class of one's own, with a factory in it, is a test suite for an allocator."""

# ruff: noqa: D102 - a test's name is the fact that it checks

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, ClassVar, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from pagedkv.testing.allocator_machine import AllocatorMachine
from pagedkv.testing.allocator_protocol import AllocatorProtocol
from pagedkv.testing.allocator_trial import AllocatorTrial
from pagedkv.testing.allocator_verification import verify

__all__ = ["PROFILES", "AllocatorTests"]


class Profile(NamedTuple):
    """How much is tried."""

    num_operations: int
    max_examples: int
    num_steps: int


PROFILES = {
    "quick": Profile(num_operations=10_000, max_examples=50, num_steps=30),
    "ci": Profile(num_operations=200_000, max_examples=300, num_steps=50),
    "soak": Profile(num_operations=10_000_000, max_examples=20_000, num_steps=100),
}

Operation = tuple[Any, ...]
COMPUTE = "compute"

# One line of a service: shared prefixes, a fork in the middle of a block, rejected drafts, a swap there and back.
SCENARIO: tuple[Operation, ...] = (
    ("open", "a", [5, 5, 5, 6, 6, 6, 7]),
    (COMPUTE, "a", 3),
    (COMPUTE, "a"),
    ("open", "b", [5, 5, 5, 6, 6, 6, 8, 8]),
    (COMPUTE, "b"),
    ("fork", "a", "c"),
    ("extend", "a", [1]),
    (COMPUTE, "a"),
    ("extend", "c", [2, 2]),
    (COMPUTE, "c"),
    ("truncate", "c", 7),
    ("extend", "c", [3]),
    (COMPUTE, "c"),
    ("swap_out", "b"),
    ("open", "d", [9, 9, 9, 9, 9]),
    (COMPUTE, "d"),
    ("swap_in", "b"),
    ("extend", "b", [4]),
    (COMPUTE, "b"),
    ("close", "a"),
    ("open", "a", [5, 5, 5, 6, 6, 6, 7, 1, 1]),
    (COMPUTE, "a"),
)
IDS: tuple[Hashable, ...] = ("", "\N{SNOWMAN}", "a" * 2**20, (), 0)
SIZES = ((12, 2, 8), (12, 1, 8), (6, 3, 4), (5, 4, 3))


class AllocatorTests:
    """Inherit, and say how an allocator is made; what its capabilities deny is left out.

        class TestMyAllocator(AllocatorTests):
            def make_allocator(self, num_blocks, block_size, num_host_blocks):
                return MyAllocator(num_blocks, block_size)

    A failure is an InvariantViolation that names what was broken. `--kv-profile quick|ci|soak` says how much is tried,
    `--kv-seed` with which random calls.
    """

    machine: ClassVar[type[AllocatorMachine]] = AllocatorMachine
    """To be replaced by a subclass with more rules."""

    def make_allocator(self, num_blocks: int, block_size: int, num_host_blocks: int) -> AllocatorProtocol:
        """An empty allocator."""
        raise NotImplementedError(f"{type(self).__name__} must say how an allocator is made")

    def trial(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> AllocatorTrial:
        """A fresh allocator beside its model."""
        return AllocatorTrial(self.make_allocator, num_blocks, block_size, num_host_blocks)

    # Random calls

    def test_random_calls_do_what_the_model_predicts(self, request: pytest.FixtureRequest) -> None:
        profile, seed = profile_of(request), int(request.config.getoption("--kv-seed", default=0))
        report = verify(self.make_allocator, num_operations=profile.num_operations, seed=seed)
        if report.failure is not None:
            factory = f"{type(self).__module__}:{type(self).__name__}().make_allocator"
            pytest.fail(f"{report.failure.invariant}: {report.failure.message}\n\n{report.failure.script(factory)}")

    def test_the_state_machine_finds_nothing(self, request: pytest.FixtureRequest) -> None:
        profile = profile_of(request)
        machine = type("Machine", (self.machine,), {"make_allocator": staticmethod(self.make_allocator)})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=profile.max_examples,
                stateful_step_count=profile.num_steps,
                deadline=None,
                phases=[Phase.explicit, Phase.generate, Phase.shrink],  # Explaining takes longer than all else.
                report_multiple_bugs=False,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )

    # Sizes

    @pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 300])
    @pytest.mark.parametrize("block_size", [1, 2, 4])
    def test_a_pool_can_be_filled_to_its_last_slot_and_no_further(self, num_blocks: int, block_size: int) -> None:
        trial = self.trial(num_blocks, block_size)
        num_slots = num_blocks * block_size
        trial.open("a", list(range(num_slots)))
        compute(trial, "a")
        trial.extend("a", [0])
        trial.append("a", 1)
        trial.open("b", [num_slots])
        compute(trial, "b")
        trial.finish()

    def test_what_can_never_fit_is_a_shortage_and_not_a_crash(self) -> None:
        trial = self.trial(2, 2)
        trial.open("a", list(range(100)))
        compute(trial, "a")
        trial.finish()

    # Failures

    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_a_shortage_at_any_point_changes_nothing(self, size: tuple[int, int, int]) -> None:
        num_blocks, block_size, num_host_blocks = size
        for fewer_blocks in range(1, num_blocks + 1):
            for fewer_host_blocks in range(num_host_blocks + 1):
                trial = self.trial(fewer_blocks, block_size, fewer_host_blocks)
                for operation in SCENARIO:
                    play(trial, operation)
                trial.finish()

    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_a_sequence_can_be_closed_in_any_state(self, size: tuple[int, int, int]) -> None:
        for num_played in range(1, len(SCENARIO) + 1):
            for sequence_id in "abcd":
                trial = self.trial(*size)
                for operation in SCENARIO[:num_played]:
                    play(trial, operation)
                trial.close(sequence_id)
                trial.close(sequence_id)
                for operation in SCENARIO[num_played:]:
                    play(trial, operation)
                trial.finish()

    def test_a_second_close_is_refused(self) -> None:
        trial = self.trial(4, 2)
        for id_ in ("a", "b"):
            trial.open(id_, [1, 2, 3])
            compute(trial, id_)
        trial.close("a")
        trial.close("a")
        trial.close("b")
        trial.close("b")
        trial.finish()

    @pytest.mark.parametrize("sequence_id", IDS, ids=["empty", "snowman", "MiB", "tuple", "zero"])
    def test_any_id_will_do_and_may_be_used_again(self, sequence_id: Hashable) -> None:
        trial = self.trial(4, 2)
        for _ in range(3):
            trial.open(sequence_id, [1, 2, 3])
            compute(trial, sequence_id)
            trial.open(sequence_id, [1])
            trial.close(sequence_id)
        trial.finish()

    # Prefixes

    def test_a_prompt_is_hit_again_and_not_under_another_salt(self) -> None:
        allocator = self.make_allocator(8, 2, 0)
        caps = allocator.capabilities
        if not caps.prefix_caching:
            pytest.skip("no prefix caching")
        trial = self.trial(8, 2)
        trial.open("a", [1, 2, 3, 4, 5])
        compute(trial, "a")
        trial.close("a")
        found = trial.allocator.lookup([1, 2, 3, 4, 6], salt=b"")
        other = trial.allocator.lookup([1, 2, 3, 4, 6], salt=b"other") if caps.salts else 0
        if (found, other) != (4, 0):
            trial.fail("I3", f"the same salt hits {found} tokens and another salt {other}, expected 4 and 0")

    def test_conversations_hit_as_often_as_least_recent_use_lets_them(self) -> None:
        trial = self.trial(6, 2)
        caps = trial.capabilities
        if not (caps.prefix_caching and caps.exact_hits and caps.eviction == "lru"):
            pytest.skip("hits are not predicted to the token")
        hits = []
        for turn in (0, 1, 0, 2, 0, 1, 3, 0, 2, 1):
            prompt = [turn] * 5
            hits.append(trial.allocator.lookup(prompt, salt=b""))
            trial.open("a", prompt)
            compute(trial, "a")
            trial.close("a")
        if hits != GOLDEN_HITS:
            trial.fail("I7", f"conversations hit {hits} tokens, expected {GOLDEN_HITS}")

    # Repetition

    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_equal_calls_give_equal_results(self, size: tuple[int, int, int]) -> None:
        trial = self.trial(*size)
        for operation in SCENARIO:
            play(trial, operation)
        trial.finish()
        for _ in range(3):
            trial.repeat()


GOLDEN_HITS = [0, 0, 4, 0, 4, 2, 0, 2, 0, 0]
"""Worked out by hand: a prompt leaves two named blocks, of which the deeper one is evicted first."""


def profile_of(request: pytest.FixtureRequest) -> Profile:
    """What `--kv-profile` says; quick, where the plugin is not loaded."""
    return PROFILES[str(request.config.getoption("--kv-profile", default="quick"))]


def play(trial: AllocatorTrial, operation: Operation) -> None:
    """One call of a scenario; `compute` is an append of what is pending, or of so many tokens."""
    if operation[0] != COMPUTE:
        trial.run(operation)
        return
    for call in computing(trial, *operation[1:]):
        trial.run(call)


def compute(trial: AllocatorTrial, sequence_id: Hashable) -> None:
    """Append what is pending."""
    play(trial, (COMPUTE, sequence_id))


def computing(trial: AllocatorTrial, sequence_id: Hashable, at_most: int = 2**31) -> Iterator[Operation]:
    """The appends that compute a sequence as far as it is known, in the allocator's own steps."""
    sequence = trial.model.sequences.get(sequence_id)
    num_tokens = min(at_most, sequence.num_pending) if sequence is not None else 0
    if trial.capabilities.chunked_prefill:
        yield ("append", sequence_id, num_tokens)
    else:
        yield from [("append", sequence_id, 1)] * num_tokens
