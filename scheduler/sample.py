"""The scheduler's own record of a request: one per sample."""

from __future__ import annotations

from enum import StrEnum

from pagedkv.arrays import Int32s
from pagedkv.content import Content, TokenContent
from pagedkv.errors import InvalidArgumentError
from pagedkv.scheduler.request import Request

__all__ = ["Sample", "SampleState"]


class SampleState(StrEnum):
    """Where a sample is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


class Sample:
    """One output of one request, from arrival to end. Touched only when its state changes, never per step.

    While it runs or is swapped out it owns row `row` of the tables; while it waits, and when it has ended by itself, `content`
    and `num_known` stand for it.
    """

    __slots__ = (
        "content",
        "deferral",
        "max_tokens",
        "num_bypasses",
        "num_known",
        "num_preemptions",
        "num_prompt",
        "num_samples",
        "place",
        "request",
        "row",
        "sample_idx",
        "state",
    )

    def __init__(self, request: Request, content: Content, num_prompt: int, *, rank: float, serial: int) -> None:
        self.request = request
        self.content = content
        self.num_prompt = num_prompt
        self.num_known = num_prompt
        self.max_tokens = num_prompt + request.max_new_tokens
        self.num_samples = request.n
        """Seats that it takes: it becomes that many samples when its prompt is computed."""
        self.sample_idx = 0
        self.place = (rank, serial, 0)
        """(rank, arrival number, sample): its place in the queue for all its life."""
        self.state = SampleState.WAITING
        self.row = -1
        self.num_preemptions = 0
        self.num_bypasses = 0
        self.deferral = ""
        """The reason that was last told for not admitting it."""

    @property
    def num_slots(self) -> int:
        """Token slots that it needs at most: the K/V of the last sampled token is never computed."""
        return max(self.num_prompt, self.max_tokens - 1)

    @property
    def output_token_ids(self) -> Int32s:
        """(n,) int32: tokens beyond the prompt that its content holds: all of them, once its row was synchronised or closed."""
        content = self.content
        if not isinstance(content, TokenContent):
            raise InvalidArgumentError(f"request {self.request.request_id!r} is simulated: it has no token ids")
        return content.token_ids(self.num_prompt, content.num_tokens)

    def fork(self, sample_idx: int, row: int, content: Content) -> Sample:
        """The record of another sample of the same request, already in a row."""
        sibling = Sample(self.request, content, self.num_prompt, rank=self.place[0], serial=self.place[1])
        sibling.num_samples = 1
        sibling.sample_idx = sample_idx
        sibling.place = (self.place[0], self.place[1], sample_idx)
        sibling.state = SampleState.RUNNING
        sibling.row = row
        return sibling
