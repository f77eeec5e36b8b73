"""What an event log has told of one live request so far."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["LiveRequest", "SampleHistory"]


@dataclass(slots=True)
class SampleHistory:
    """One sample: its state (waiting, running, swapped, finished), and what it had when that began."""

    state: str = "waiting"
    num_known: int = 0
    num_preemptions: int = 0
    num_swapped_tokens: int = 0
    moved_after: int = 0
    """Failed steps before it was last admitted or preempted."""
    admitted_step: int = 0


@dataclass(slots=True)
class LiveRequest:
    """A request that was added and has not ended. Samples beyond the first appear when the log first names them.

    A request keeps seats for all of its samples from its first admission on. When they fork off, the log does not tell;
    a sample that it never named stands as the first one did before it was preempted, so `num_seats` is a lower bound.
    """

    num_prompt: int
    max_new_tokens: int
    num_samples: int = 1
    num_ended: int = 0
    num_counted_seats: int = 0
    """What the checker has counted for it."""
    first_step: int = 0
    """In which it was first admitted."""
    samples: dict[int, SampleHistory] = field(default_factory=lambda: {0: SampleHistory()})

    def sample(self, sample_idx: int) -> SampleHistory:
        """The history of one sample; another than the first begins to run when it is first named, some steps after it did."""
        if sample_idx not in self.samples:
            self.samples[sample_idx] = SampleHistory("running", self.num_prompt, admitted_step=self.first_step)
        return self.samples[sample_idx]

    @property
    def num_seats(self) -> int:
        """Seats that its samples surely take. O(samples)."""
        named = sum(sample.state == "running" for sample in self.samples.values())
        unnamed = self.num_samples - len(self.samples)
        # Until the first sample is preempted, the others either have a seat each or have one kept for them; and once it has
        # ended they have parted from it.
        first = self.samples[0]
        is_certain = first.state == "finished" or (first.state == "running" and first.num_preemptions == 0)
        return named + (unnamed if is_certain else 0)

    def surely_holds(self, failed_steps: int) -> bool:
        """Whether some sample was seated after so many failed steps in all: one seated before may hold nothing. O(samples)."""
        return any(sample.state == "running" and sample.moved_after == failed_steps for sample in self.samples.values())

    def may_be(self, state: str, failed_steps: int) -> bool:
        """Whether some sample may be in this state, after so many failed steps in all. O(samples)."""
        states = {sample.state for sample in self.samples.values()}
        # A failed step makes no copies, so those that it was to swap out start over.
        if any(sample.state == "swapped" and failed_steps > sample.moved_after for sample in self.samples.values()):
            states.add("waiting")
        return state in states or (state == "running" and self.num_samples > len(self.samples))
