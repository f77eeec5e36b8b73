"""Limits of a step and of admission."""

from __future__ import annotations

from dataclasses import dataclass

from pagedkv.arrays import keep_int, shown
from pagedkv.errors import ConfigError, InvalidArgumentError

__all__ = ["SchedulerConfig"]

MAX_BATCHED_TOKENS = 2**24
MAX_RUNNING = 2**16
DEFAULT_RUNNING = 256
MAX_INTERVAL = 2**20
MAX_PREEMPTIONS = 2**20
MAX_WAITING = 2**24


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How much one step computes, and how readily requests are admitted.

    max_num_batched_tokens: tokens computed in one step, over all rows
    max_num_running:        seats; a request with n samples takes n
    long_prefill_tokens:    if several rows have more than one token to compute in a step, none gets more than this of it;
                            those that wait for seats or blocks do not count (None: no cap)
    admission_interval:     steps from one that admits requests to the next that may, while anything runs and nobody was
                            left for want of token budget: with more than 1, rows decode undisturbed in between, and
                            first tokens come later
    chunked_prefill:        whether a prompt may be computed over several steps
    watermark:              share of the blocks that an admission must leave available, unless nothing runs
    max_bypasses:           how often later requests may pass one for which seats, blocks or, without chunks, tokens are too
                            few; then nobody passes it any more
    max_preemptions:        how often one sample may lose its seat; then it keeps the next one until it ends
    max_num_waiting:        samples that may wait; then new requests are refused
    client_share:           share of seats, blocks and places to wait that the requests of one `client` may take, and so
                            how many clients can be there without any of them noticing that another floods; one seat
                            and one place at least (None: all)
    """

    max_num_batched_tokens: int = 8192
    max_num_running: int = DEFAULT_RUNNING
    long_prefill_tokens: int | None = None
    admission_interval: int = 1
    chunked_prefill: bool = True
    watermark: float = 0.01
    max_bypasses: int = 4
    max_preemptions: int = 8
    max_num_waiting: int = MAX_WAITING
    client_share: float | None = None

    def __post_init__(self) -> None:
        try:
            keep_int(self, "max_num_batched_tokens", at_least=1, at_most=MAX_BATCHED_TOKENS)
            keep_int(self, "max_num_running", at_least=1, at_most=MAX_RUNNING)
            if self.long_prefill_tokens is not None:
                keep_int(self, "long_prefill_tokens", at_least=1, at_most=MAX_BATCHED_TOKENS)
            keep_int(self, "admission_interval", at_least=1, at_most=MAX_INTERVAL)
            keep_int(self, "max_bypasses", at_least=0, at_most=1000)
            keep_int(self, "max_preemptions", at_least=1, at_most=MAX_PREEMPTIONS)
            keep_int(self, "max_num_waiting", at_least=1, at_most=MAX_WAITING)
        except InvalidArgumentError as error:
            raise ConfigError(str(error)) from None
        if self.max_num_running > self.max_num_batched_tokens:
            raise ConfigError(
                f"max_num_running {self.max_num_running} exceeds max_num_batched_tokens {self.max_num_batched_tokens}, and "
                f"every running request needs one token a step: pass max_num_running of at most {self.max_num_batched_tokens} "
                f"(the default is {DEFAULT_RUNNING}), or a larger max_num_batched_tokens"
            )
        if self.long_prefill_tokens is not None and not self.chunked_prefill:
            raise ConfigError("long_prefill_tokens caps chunks of a prompt, so it needs chunked_prefill")
        if not isinstance(self.watermark, float | int) or not 0 <= self.watermark <= 0.5:
            raise ConfigError(f"watermark must be a number in 0..0.5, found {shown(self.watermark)}")
        share = self.client_share
        if share is not None and (not isinstance(share, float | int) or not 0 < share <= 1):
            raise ConfigError(f"client_share must be None or a number above 0, at most 1, found {shown(share)}")
