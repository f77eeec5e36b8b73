"""The largest steps that a configuration admits, carried out once so that what they take can be measured."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pagedkv.arrays import Int32s, cdiv
from pagedkv.engine.device import DecodeGraphs
from pagedkv.engine.model import PagedModel
from pagedkv.engine.sampling import Sampler
from pagedkv.engine.sampling.sampler import MAX_PART_ELEMENTS
from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.engine.step_inputs import StepInputs

__all__ = ["LargestStep"]


class LargestStep:
    """Steps of as many tokens, sequences and sampled positions as may come, over a storage of one block. Nothing is written.

    max_num_batched_tokens, max_num_running: the scheduler's
    max_length: of a sequence, None if only the blocks limit it
    num_drafts: of a row, 0 without a drafter, None if nobody knows
    """

    __slots__ = ("_max_length", "_max_num_running", "_model", "_num_logits", "_seq_lens")

    def __init__(
        self,
        model: PagedModel,
        *,
        max_num_batched_tokens: int,
        max_num_running: int,
        max_length: int | None,
        num_drafts: int | None,
    ) -> None:
        longest = max_num_batched_tokens if max_length is None else min(max_length, max_num_batched_tokens)
        num_tokens = min(max_num_batched_tokens, max_num_running * longest)
        self._model = model
        self._max_length = max_length
        self._max_num_running = max_num_running
        self._seq_lens: Int32s = np.full(cdiv(num_tokens, longest), longest, np.int32)
        self._seq_lens[-1] = num_tokens - longest * (len(self._seq_lens) - 1)
        # Every draft is a token of the step; the samples that a prompt forks into are not.
        num_verified = num_tokens if num_drafts is None else min(num_tokens, max_num_running * (1 + num_drafts))
        self._num_logits = max(max_num_running, num_verified)

    def run(self) -> None:
        """Prompts that take the whole budget, a token for every seat and draft, chosen with all filters."""
        num_tokens = int(self._seq_lens.sum())
        starts = np.concatenate(([0], self._seq_lens.cumsum())).astype(np.int32)
        step = StepInputs(
            token_ids=np.zeros(num_tokens, np.int32),
            positions=np.concatenate([np.arange(length) for length in self._seq_lens.tolist()]),
            slot_mapping=np.full(num_tokens, -1, np.int64),
            block_tables=np.zeros((len(self._seq_lens), self._width(int(self._seq_lens.max()))), np.int32),
            seq_lens=self._seq_lens,
            query_start_loc=starts,
            logit_indices=np.arange(self._num_logits) % num_tokens,
            device=self._model.device,
        )
        _choose(self._model.forward(step), self._model.vocab_size)

    def run_decodes(self) -> None:
        """What decode steps hold on a GPU beside all others: their graphs' memory is a pool of its own.

        A pass is run, and not captured, which takes the same; the graphs' buffers and the device's block tables are made.
        """
        num_rows, device = self._max_num_running, self._model.device
        width = 2**31 if self._max_length is None else self._width(self._max_length)
        _buffers = [DecodeGraphs(self._model, max_rows=num_rows, max_width=width) for _ in range(2)]
        step = StepInputs(
            token_ids=np.zeros(num_rows, np.int32),
            positions=np.zeros(num_rows, np.int64),
            slot_mapping=np.full(num_rows, -1, np.int64),
            block_tables=np.zeros((num_rows, 1), np.int32),
            seq_lens=np.ones(num_rows, np.int32),
            query_start_loc=np.arange(num_rows + 1, dtype=np.int32),
            logit_indices=np.arange(num_rows),
            device=device,
        )
        self._model.forward(step).clone()

    def _width(self, num_tokens: int) -> int:
        return cdiv(num_tokens, self._model.block_size)


def _choose(logits: Tensor, vocab_size: int) -> None:
    """Sample as many of the rows as are worked on at a time, in the way that takes most: all filters, over even chances."""
    num_rows = min(len(logits), max(1, MAX_PART_ELEMENTS // vocab_size))
    filtered = SamplingParams(temperature=1e5, top_k=max(1, vocab_size - 1), top_p=0.999, min_p=1e-6, logprobs=1)
    # Where some rows need less than the others, these are copied.
    others = {1: SamplingParams(), 2: SamplingParams(temperature=0, logprobs=1)}
    sampler = Sampler(vocab_size)
    for row in range(num_rows):
        params = others.get(row, filtered)
        sampler.seat(row, params, seed=0, num_prompt=1, known_token_ids=np.zeros(1, np.int32))
    sampler.sample(logits[:num_rows], np.arange(num_rows), np.zeros(num_rows, np.int64))
