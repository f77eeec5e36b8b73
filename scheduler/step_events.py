"""What came of one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagedkv.arrays import Int32s, Int64s, Rows
from pagedkv.scheduler.sample import Sample

__all__ = ["Output", "StepEvents"]


class Output(NamedTuple):
    """One new token of one sample; the last one of a sample that ended tells why."""

    request_id: str
    sample_idx: int
    token_id: int | None
    finish_reason: str | None


@dataclass(frozen=True, slots=True, eq=False)
class StepEvents:
    """What an update brought about.

    rows:       (s,) int64, rows that got tokens
    token_ids:  (t,) int32, packed row after row, or None where tokens are only simulated
    seated:     (rows,) object, by row of the tables: the sample that had it
    finished:   samples that ended, with the reason; `output_token_ids` of each are its tokens, the next plan vacates its row
    num_tokens: (s,) int64, how many tokens each row got: those behind a stop token are dropped; None: one each
    """

    step: int
    rows: Rows
    token_ids: Int32s | None = field(repr=False)
    seated: NDArray[np.object_] = field(repr=False)
    finished: tuple[tuple[Sample, str], ...]
    num_tokens: Int64s | None = None

    @property
    def samples(self) -> NDArray[np.object_]:
        """(s,) object: whose the `rows` are. O(s)."""
        samples: NDArray[np.object_] = self.seated[self.rows]
        return samples

    @property
    def outputs(self) -> list[Output]:
        """New tokens with the requests that they belong to, for people and streams. O(tokens)."""
        reasons = {id(sample): reason for sample, reason in self.finished}
        samples = self.samples.tolist()
        if self.num_tokens is not None:
            return self._several(samples, reasons, self.num_tokens.tolist())
        tokens = [None] * len(samples) if self.token_ids is None else self.token_ids.tolist()
        return [
            Output(sample.request.request_id, sample.sample_idx, token, reasons.get(id(sample)))
            for sample, token in zip(samples, tokens, strict=True)
        ]

    def _several(self, samples: list[Sample], reasons: dict[int, str], counts: list[int]) -> list[Output]:
        """Outputs of rows that got `counts[i]` tokens, 1 or more."""
        tokens = iter([] if self.token_ids is None else self.token_ids.tolist())
        return [
            Output(
                sample.request.request_id,
                sample.sample_idx,
                next(tokens),
                reasons.get(id(sample)) if nth == count - 1 else None,
            )
            for sample, count in zip(samples, counts, strict=True)
            for nth in range(count)
        ]

    @property
    def finished_ids(self) -> list[str]:
        """Ids of requests of which a sample ended in this step."""
        return [sample.request.request_id for sample, _ in self.finished]
