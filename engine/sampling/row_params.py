"""What the sampler knows of every row, in columns."""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pagedkv.arrays import Int32s, Int64s
from pagedkv.engine.sampling.history import TokenHistory
from pagedkv.engine.sampling.randomness import UInt64s, stream_key
from pagedkv.engine.sampling.token_bias import TokenBias
from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.errors import InvalidArgumentError

__all__ = ["Need", "Needs", "RowParams"]

Needs: TypeAlias = NDArray[np.uint8]
"""(n,) uint8: flags of Need."""


class Need:
    """Flags: what a row needs beside the likeliest token of the model's own logits.

    Plain numbers: numpy is slow with members of an enum.
    """

    CHANCE: Final = 1
    MIN_TOKENS: Final = 2
    PENALTIES: Final = 4
    PROCESSOR: Final = 8
    HISTORY: Final = 4 | 8
    LOGPROBS: Final = 16
    BIAS: Final = 32
    A_SAMPLE: Final = 128
    """Nobody was seated in this row."""


class RowParams:
    """Columns by row; a row's entries hold for the sample that was seated there last.

    needs:            (rows,) uint8, flags of Need
    keys:             (rows,) uint64, of the row's random numbers
    temperatures, top_p, min_p: (rows,) float64
    top_k:            (rows,) int64, at least the vocabulary's size where there is no limit
    min_tokens:       (rows,) int64
    num_alternatives: (rows,) int64
    end_token_ids:    by row, of rows with min_tokens
    histories:        by row, of rows with penalties or a processor
    biases:           by row, of rows with a logit bias or allowed tokens
    """

    __slots__ = (
        "biases",
        "end_token_ids",
        "histories",
        "keys",
        "min_p",
        "min_tokens",
        "needs",
        "num_alternatives",
        "temperatures",
        "top_k",
        "top_p",
        "vocab_size",
    )

    def __init__(self, vocab_size: int, num_rows: int = 64) -> None:
        self.vocab_size = vocab_size
        self.needs: Needs = np.full(num_rows, Need.A_SAMPLE, np.uint8)
        self.keys: UInt64s = np.zeros(num_rows, np.uint64)
        self.temperatures: NDArray[np.float64] = np.ones(num_rows)
        self.top_k: Int64s = np.full(num_rows, vocab_size, np.int64)
        self.top_p: NDArray[np.float64] = np.ones(num_rows)
        self.min_p: NDArray[np.float64] = np.zeros(num_rows)
        self.min_tokens: Int64s = np.zeros(num_rows, np.int64)
        self.num_alternatives: Int64s = np.zeros(num_rows, np.int64)
        self.end_token_ids: dict[int, Int64s] = {}
        self.histories: dict[int, TokenHistory] = {}
        self.biases: dict[int, TokenBias] = {}

    def seat(
        self, row: int, params: SamplingParams, seed: int, end_token_ids: Int64s, history: TokenHistory | None
    ) -> None:
        """Write a row's entries. O(end tokens)."""
        if row >= len(self.needs):
            self._grow(row + 1)
        self.needs[row] = _needs_of(params)
        self.keys[row] = stream_key(seed)
        self.temperatures[row] = params.temperature
        self.top_k[row] = self.vocab_size if params.top_k is None else params.top_k
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.min_tokens[row] = params.min_tokens
        self.num_alternatives[row] = params.logprobs or 0
        self.histories.pop(row, None)
        self.biases.pop(row, None)
        if params.min_tokens:
            self.end_token_ids[row] = end_token_ids
        if params.has_bias:
            self.biases[row] = TokenBias(params)
        if history is not None:
            self.histories[row] = history

    def append(self, rows: Int64s, token_ids: Int32s) -> None:
        """Tell the histories of rows that have one about a new token. O(rows), plus Python-level work for those."""
        keeps = self.needs[rows] & Need.HISTORY
        if keeps.any():
            chosen = np.flatnonzero(keeps)
            for row, token_id in zip(rows[chosen].tolist(), token_ids[chosen].tolist(), strict=True):
                self.histories[row].append(token_id)

    def check_histories(self, rows: Int64s, num_outputs: Int64s, needs: Needs) -> None:
        """Raise InvalidArgumentError if a row's history has not as many tokens of output as it should."""
        for index in np.flatnonzero(needs & Need.HISTORY).tolist():
            row, expected = int(rows[index]), int(num_outputs[index])
            found = self.histories[row].num_outputs
            if found != expected:
                raise InvalidArgumentError(
                    f"row {row} is at token {expected} of its output, but {found} were accepted: penalties and "
                    "logits processors need every token"
                )

    def _grow(self, num_rows: int) -> None:
        more = RowParams(self.vocab_size, max(num_rows, 2 * len(self.needs)) - len(self.needs))
        for name in ("keys", "min_p", "min_tokens", "needs", "num_alternatives", "temperatures", "top_k", "top_p"):
            setattr(self, name, np.concatenate((getattr(self, name), getattr(more, name))))


def _needs_of(params: SamplingParams) -> int:
    return (
        Need.CHANCE * (params.temperature > 0)
        | Need.MIN_TOKENS * (params.min_tokens > 0)
        | Need.PENALTIES * params.has_penalties
        | Need.PROCESSOR * (params.logits_processor is not None)
        | Need.BIAS * params.has_bias
        | Need.LOGPROBS * (params.logprobs is not None)
    )
