"""What each client's requests may take of seats and blocks, and those that stand back until it is their turn."""

from __future__ import annotations

from collections.abc import Iterable

from pagedkv.arrays import cdiv
from pagedkv.errors import InvariantViolation
from pagedkv.scheduler.config import SchedulerConfig
from pagedkv.scheduler.sample import Sample
from pagedkv.scheduler.waiting_queue import WaitingQueue

__all__ = ["ClientShares"]

Client = str | int | None


class ClientShares:
    """Keeps the requests of each client within `client_share` of seats and blocks, so that nobody can flood the others.

    A request *enters* when its share holds all that it may ever need beside those of its client that have entered; then
    it waits in the queue or runs, until it is over. The others of its client stand back, outside of the queue, in order
    of arrival; they take their place in the queue, behind whoever came meanwhile, when they enter. Needs are counted
    whole, shared beginnings too: what has entered never takes more, so nothing has to be taken back when sequences grow.
    Requests without a client are one client's. Without `client_share` everything enters at once. However small a share is,
    it holds one seat and one place to wait.
    """

    __slots__ = (
        "_block_size",
        "_entered",
        "_is_limited",
        "_lines",
        "_max_waiting",
        "max_blocks",
        "max_requests",
        "max_seats",
        "num_standing",
    )

    def __init__(self, config: SchedulerConfig, *, num_blocks: int, block_size: int) -> None:
        share = config.client_share
        self._is_limited = share is not None
        self._block_size = block_size
        # Of the blocks that a watermark leaves, so that what has entered is not kept waiting by it.
        self.max_blocks = _part(share, num_blocks - int(config.watermark * num_blocks))
        self.max_seats = max(1, _part(share, config.max_num_running))
        self.max_requests = max(1, _part(share, config.max_num_waiting))
        self._max_waiting = config.max_num_waiting
        self.num_standing = 0
        self._entered: dict[Client, tuple[int, int, int]] = {}  # Requests, seats and blocks.
        self._lines: dict[Client, WaitingQueue] = {}

    def reason_to_refuse(self, num_seats: int, num_blocks: int) -> str:
        """Why a request that needs so many at most can never enter; empty if it can. O(1)."""
        if self._is_limited and (num_seats > self.max_seats or num_blocks > self.max_blocks):
            return (
                f"it needs {num_seats} seats and up to {num_blocks} blocks, "
                f"a client's share is {self.max_seats} and {self.max_blocks}"
            )
        return ""

    def reason_to_turn_away(self, client: Client, num_waiting: int) -> str:
        """Why no other request of this client may wait, with so many samples that do; empty if it may. O(1).

        Of a client all requests count, running ones too: then the others', together, leave room for each client's own.
        """
        if num_waiting >= self._max_waiting:
            return f"{num_waiting} samples wait, no more may"
        num_live = self._entered.get(client, (0, 0, 0))[0] + len(self._lines.get(client, ()))
        if self._is_limited and num_live >= self.max_requests:
            return f"{num_live} requests of its client are here, no more may be"
        return ""

    def try_enter(self, sample: Sample) -> bool:
        """Enter a new request, or let it stand back. O(log of those of its client that do)."""
        if not self._is_limited:
            return True
        client = sample.request.client
        line = self._lines.get(client)
        if not line and self._has_room(sample):
            self._count(sample, 1)
            return True
        self._lines.setdefault(client, WaitingQueue()).push(sample)
        self.num_standing += 1
        return False

    def try_withdraw(self, sample: Sample) -> bool:
        """Take a request out that stands back; False if it does not. O(log of those of its client that do)."""
        client = sample.request.client
        line = self._lines.get(client)
        if line is None or sample not in line:
            return False
        line.remove(sample)
        self.num_standing -= 1
        if not line:
            del self._lines[client]
        return True

    def leave(self, sample: Sample) -> list[Sample]:
        """A request that had entered is over; returns those of its client that enter now. O(entering)."""
        if not self._is_limited:
            return []
        self._count(sample, -1)
        entering: list[Sample] = []
        line = self._lines.get(sample.request.client, WaitingQueue())
        while line and self._has_room(line.nth(0)):
            entering.append(line.nth(0))
            self._count(entering[-1], 1)
            self.try_withdraw(entering[-1])
        return entering

    def check(self, live: Iterable[Sample]) -> list[Sample]:
        """Recount what has entered from one sample of each live request; returns those that stand back. O(live).

        Raises InvariantViolation.
        """
        standing = {id(sample) for line in self._lines.values() for sample in line}
        samples = list(live)
        recounted: dict[Client, tuple[int, int, int]] = {}
        for sample in samples:
            if self._is_limited and id(sample) not in standing:
                client = sample.request.client
                recounted[client] = _sum(recounted.get(client), (1, *self._needs(sample)))
        if len(standing) != self.num_standing or recounted != self._entered:
            raise InvariantViolation(
                "I15", f"clients have entered {recounted}, counted are {self._entered}; {len(standing)} stand back"
            )
        for client, (_, num_seats, num_blocks) in recounted.items():
            if num_seats > self.max_seats or num_blocks > self.max_blocks:
                raise InvariantViolation("I15", f"client {client!r} has {num_seats} seats and {num_blocks} blocks")
        return [sample for sample in samples if id(sample) in standing]

    def _needs(self, sample: Sample) -> tuple[int, int]:
        """Seats and blocks that a request takes at most."""
        num_samples = sample.request.n
        return num_samples, num_samples * cdiv(sample.num_slots, self._block_size)

    def _has_room(self, sample: Sample) -> bool:
        _, num_seats, num_blocks = _sum(self._entered.get(sample.request.client), (1, *self._needs(sample)))
        return num_seats <= self.max_seats and num_blocks <= self.max_blocks

    def _count(self, sample: Sample, sign: int) -> None:
        client = sample.request.client
        num_seats, num_blocks = self._needs(sample)
        counts = _sum(self._entered.get(client), (sign, sign * num_seats, sign * num_blocks))
        if counts[0]:
            self._entered[client] = counts
        else:
            del self._entered[client]


def _part(share: float | None, number: int) -> int:
    """So much of a number, rounded down; of what floats make of 49 * (1 / 49), 1 and not 0."""
    return number if share is None else int(round(share * number, 6))


def _sum(one: tuple[int, int, int] | None, other: tuple[int, int, int]) -> tuple[int, int, int]:
    return other if one is None else (one[0] + other[0], one[1] + other[1], one[2] + other[2])
