"""Chooses the next token of every row from one step's logits."""

from __future__ import annotations

import numpy as np
import torch

from pagedkv.arrays import Int32s, Int64s, Rows, as_int, as_token_ids
from pagedkv.engine.sampling.greedy import likeliest_tokens
from pagedkv.engine.sampling.history import TokenHistory
from pagedkv.engine.sampling.logprobs import TokenLogprobs
from pagedkv.engine.sampling.row_params import Need, Needs, RowParams
from pagedkv.engine.sampling.sampled import BadLogitsError, Sampled
from pagedkv.engine.sampling.stages import Stages
from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.errors import InvalidArgumentError

__all__ = ["Sampler"]

MAX_VOCAB_SIZE = 2**22
MAX_ROW = 2**20
MAX_PART_ELEMENTS = 2**24
"""Logits that are worked on at a time, however many rows sample in one step: 64 MiB of float32, 128 MiB of weights."""


class Sampler:
    """Chooses tokens for the rows of the scheduler's tables.

    A sample is seated in its row whenever it gets one, and then only named by it. A step costs a fixed number of
    operations on arrays and tensors, however many rows; Python-level work happens only for rows with a bias,
    penalties, a logits processor, log-probabilities, or too few tokens to end. A token depends on its row's logits, parameters,
    seed, position and known tokens alone.

    Like `generate` of transformers, it changes logits in this order: allowed tokens, bias, repetition penalty, presence
    and frequency, end tokens before `min_tokens`, the logits processor, temperature, top-k, top-p, min-p.
    """

    __slots__ = ("_rows", "vocab_size")

    def __init__(self, vocab_size: int) -> None:
        """`vocab_size` is the number of logits of a row, 1..2^22. They may be on any device, and are worked on there."""
        self.vocab_size = as_int("vocab_size", vocab_size, at_least=1, at_most=MAX_VOCAB_SIZE)
        self._rows = RowParams(self.vocab_size)

    def seat(
        self,
        row: int,
        params: SamplingParams,
        *,
        seed: int,
        num_prompt: int,
        known_token_ids: Int32s,
        end_token_ids: tuple[int, ...] = (),
    ) -> None:
        """Give a row to a sample, a new one or one that comes back.

        known_token_ids: (n,) int32, its `num_prompt` tokens of prompt and its output so far; read if `params.needs_history`
        end_token_ids:   tokens that end it, and may not be chosen before it has `min_tokens` tokens of output

        O(1), but O(n log n) with a history. Raises InvalidArgumentError, with nothing changed.
        """
        as_int("row", row, at_least=0, at_most=MAX_ROW)
        as_int("seed", seed, at_least=0, at_most=2**64 - 1)
        if params.logprobs is not None and params.logprobs > self.vocab_size:
            raise InvalidArgumentError(f"logprobs {params.logprobs} exceeds the vocabulary of {self.vocab_size} tokens")
        history = None
        if params.needs_history:
            known = as_token_ids("known_token_ids", known_token_ids)
            as_int("num_prompt", num_prompt, at_least=0, at_most=len(known))
            history = TokenHistory(params, known, num_prompt=num_prompt, vocab_size=self.vocab_size)
        ends = np.array([token_id for token_id in end_token_ids if token_id < self.vocab_size], np.int64)
        self._rows.seat(row, params, seed, ends, history)

    def sample(self, logits: torch.Tensor, rows: Rows, num_outputs: Int64s) -> Sampled:
        """Choose a token for each row.

        logits:      (s, vocab), any floating dtype; not changed
        rows:        (s,) int64; a row may come several times, for speculated positions, unless it has a history
        num_outputs: (s,) int64, how many tokens of output come before this one

        A row whose logits cannot be used, or whose logits processor raises, gets an error in the result, and the others
        are not disturbed. Raises InvalidArgumentError for a wrong shape, a row without a sample, or one whose last
        token was not accepted.
        """
        if logits.shape != (len(rows), self.vocab_size) or len(num_outputs) != len(rows):
            raise InvalidArgumentError(
                f"{len(rows)} rows and {len(num_outputs)} positions need logits ({len(rows)}, {self.vocab_size}), "
                f"found {tuple(logits.shape)}"
            )
        needs = self._needs_now(rows, num_outputs)
        if needs is None:
            return _sampled(likeliest_tokens(logits), logits, None, {})
        return self._sample_by_parts(logits, rows, num_outputs, needs)

    def accept(self, rows: Rows, token_ids: Int32s) -> None:
        """Tell which tokens the rows took, (s,) each. O(rows), with Python-level work for those with a history."""
        self._rows.append(rows, token_ids)

    def _needs_now(self, rows: Rows, num_outputs: Int64s) -> Needs | None:
        """(s,) uint8: what each row needs at its position, or None if that is nothing at all."""
        try:
            needs: Needs = self._rows.needs[rows]
        except IndexError:
            raise InvalidArgumentError(f"no sample is seated in row {rows.max()}") from None
        if not needs.any():
            return None
        if needs.max() >= Need.A_SAMPLE:
            raise InvalidArgumentError(f"no sample is seated in row {rows[needs.argmax()]}")
        needs[num_outputs >= self._rows.min_tokens[rows]] &= ~np.uint8(Need.MIN_TOKENS)
        return needs if needs.any() else None

    def _sample_by_parts(self, logits: torch.Tensor, rows: Rows, num_outputs: Int64s, needs: Needs) -> Sampled:
        """Take the rows that need more than their likeliest token through all stages, a part of them at a time."""
        self._rows.check_histories(rows, num_outputs, needs)
        chosen = np.flatnonzero(needs)
        if len(chosen) == len(rows):
            tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        else:
            tokens = likeliest_tokens(logits)
        logprobs: list[TokenLogprobs | None] = [None] * len(rows)
        errors: dict[int, Exception] = {}
        step = max(1, MAX_PART_ELEMENTS // self.vocab_size)
        for start in range(0, len(chosen), step):
            indices = chosen[start : start + step]
            stages = Stages(self._rows, indices, rows[indices], num_outputs[indices], needs[indices])
            outcome = stages.run(logits)
            tokens.index_copy_(0, torch.from_numpy(indices).to(logits.device), outcome.tokens)
            errors |= outcome.errors
            for index, entry in outcome.logprobs.items():
                logprobs[index] = entry
        return _sampled(tokens, logits, logprobs if (needs & Need.LOGPROBS).any() else None, errors)


def _sampled(
    tokens: torch.Tensor,
    logits: torch.Tensor,
    logprobs: list[TokenLogprobs | None] | None,
    errors: dict[int, Exception],
) -> Sampled:
    """Bring the tokens (s,) to the host, the one wait for a device in a greedy step, and explain those that are -1."""
    token_ids: Int32s = tokens.to("cpu", torch.int32).numpy()
    if len(token_ids) and token_ids.min() < 0:
        for index in np.flatnonzero(token_ids < 0).tolist():
            errors.setdefault(index, BadLogitsError(_fault_of(logits[index])))
    for index in errors:
        token_ids[index] = 0
        if logprobs is not None:
            logprobs[index] = None
    return Sampled(token_ids, logprobs, errors)


def _fault_of(logits: torch.Tensor) -> str:
    """Why no token could be chosen by a row's logits (vocab,)."""
    if logits.isnan().any():
        return f"{int(logits.isnan().sum())} of {len(logits)} logits are not a number"
    largest = float(logits.max())
    if largest == -np.inf:
        return f"all {len(logits)} logits are -inf"
    if largest == np.inf:
        return "a logit is infinite"
    return "penalties, min_tokens, the logits processor or the temperature leave no token with a finite logit"
