"""A small model guesses what a large one will say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pagedkv import CacheConfig, CacheIdentity, KVCacheManager
from pagedkv.arrays import Int32s, Int64s, Rows, as_int, cdiv
from pagedkv.engine.building import dtype_name, max_length_of
from pagedkv.engine.memory_budget import as_bytes, num_blocks_within
from pagedkv.engine.model import PagedModel, inspect_model
from pagedkv.engine.model.self_check import check_same_logits
from pagedkv.engine.sampling.greedy import likeliest_tokens
from pagedkv.engine.speculation.draft_sequences import CatchUp, DraftSequences
from pagedkv.engine.speculation.drafter import NO_DRAFTS, SampleKey, checked_limits
from pagedkv.engine.step_inputs import StepInputs
from pagedkv.errors import ConfigError, InvalidArgumentError
from pagedkv.storage import KVStorage

__all__ = ["DraftModelDrafter"]

MAX_DRAFTS = 64
MAX_STEP_TOKENS = 2**24


class DraftModelDrafter:
    """Guesses by a small model of transformers, whose likeliest tokens are proposed. It has K/V memory of its own.

    All samples are guessed for together: one packed step computes what they got since the last time, and draws the first
    guess of each; then comes one step of one token each for every further guess. A prompt is computed when its sample is
    first guessed for, but for what the prefix cache has, in steps of at most `max_num_batched_tokens` tokens.

    If the memory is short, the samples that come last get no guesses until there is room: the target goes on all the same.
    So do samples beyond the positions that the small model knows.
    """

    def __init__(
        self,
        model: Any,
        *,
        num_drafts: int = 4,
        num_blocks: int | None = None,
        kv_memory: str | int | None = None,
        block_size: int = 16,
        max_num_batched_tokens: int = 2048,
    ) -> None:
        """Take the memory and get ready. The model stays the caller's: it is set to evaluation, and between calls it
        is as it was otherwise.

        model:      of the same tokenizer as the target
        num_drafts: guesses at most, each of which costs a step of the model
        num_blocks: blocks of K/V; or else
        kv_memory:  bytes or a text such as "1GiB"

        Raises UnsupportedModelError, ConfigError, MemoryBudgetError, InvalidArgumentError.
        """
        try:
            self.num_drafts = as_int("num_drafts", num_drafts, at_least=1, at_most=MAX_DRAFTS)
            self._max_step = as_int(
                "max_num_batched_tokens", max_num_batched_tokens, at_least=1, at_most=MAX_STEP_TOKENS
            )
        except InvalidArgumentError as error:
            raise ConfigError(str(error)) from None
        if (num_blocks is None) == (kv_memory is None):
            raise ConfigError("a draft model has memory of its own: give it either num_blocks or kv_memory")
        model.eval()
        layers = inspect_model(model)
        check_same_logits(model, layers)
        spec = layers[0].kv_spec(len(layers), dtype_name(model.dtype), block_size)
        if num_blocks is None:
            num_blocks = num_blocks_within(spec, as_bytes("kv_memory", kv_memory or 0))
        identity = CacheIdentity(model=type(model).__name__)
        self.manager = KVCacheManager(CacheConfig(num_blocks, block_size, identity=identity))
        storage = KVStorage(spec, num_blocks, next(model.parameters()).device)
        self.model = PagedModel(model, layers, storage)
        self._sequences = DraftSequences(self.manager, max_length_of(model))

    def check_target(self, vocab_size: int) -> None:
        """Raise ConfigError unless both models have as many tokens: others would not mean the same."""
        if vocab_size != self.model.vocab_size:
            raise ConfigError(
                f"the draft model has logits for {self.model.vocab_size} tokens, the target for {vocab_size}: "
                "they must have the same tokenizer"
            )

    def begin(self, key: SampleKey, token_ids: Sequence[int] | Int32s, *, salt: bytes = b"") -> None:
        """See Drafter. Nothing is computed yet. O(tokens + blocks held for a sample that starts over)."""
        self._sequences.begin(key, token_ids, salt)

    def extend(self, key: SampleKey, token_ids: Sequence[int] | Int32s) -> None:
        """See Drafter. K/V of guesses that came true is kept. O(tokens)."""
        self._sequences.extend(key, token_ids)

    def end(self, key: SampleKey) -> None:
        """See Drafter. O(blocks)."""
        self._sequences.end(key)

    def propose(self, keys: Sequence[SampleKey], max_drafts: Sequence[int]) -> list[Int32s]:
        """See Drafter. As many steps of the model as there are guesses, and more only for long prompts.

        If the model raises, so does this; the samples stay begun.
        """
        limits = checked_limits(keys, max_drafts, self.num_drafts)
        sequences = [self._sequences.get(key) for key in keys]
        try:
            work = self._sequences.begin_step(keys, limits)
            self._sequences.end_step(self._guess(work) if len(work.rows) else [])
        except BaseException:
            self._sequences.fail_step()
            raise
        return [
            NO_DRAFTS if sequence.drafts is None else sequence.drafts[:limit]
            for sequence, limit in zip(sequences, limits, strict=True)
        ]

    # Computing

    def _guess(self, work: CatchUp) -> list[Int32s]:
        """Guesses for each row of the work, each (up to num_drafts,) int32."""
        lengths = work.starts + work.num_tokens
        counts = work.num_drafts.copy()
        guesses = np.zeros((len(counts), int(counts.max())), np.int32)
        tokens = self._catch_up(work)
        going_on = np.arange(len(counts))
        for nth in range(guesses.shape[1]):
            if nth:
                going_on = (counts > nth).nonzero()[0]
                rows, positions = work.rows[going_on], lengths[going_on] + nth - 1
                tokens = self._step(rows, positions, np.ones_like(rows), guesses[going_on, nth - 1])
            # Where the logits are not finite, there is no likeliest token: the guesses end before it.
            is_none = tokens < 0
            counts[going_on[is_none]] = nth
            guesses[going_on, nth] = np.where(is_none, 0, tokens)
        return [row[:count] for row, count in zip(guesses, counts.tolist(), strict=True)]

    def _catch_up(self, work: CatchUp) -> Int32s:
        """Compute the known tokens of all rows, in steps of limited size; returns the likeliest token after each, (n,) int32."""
        token_ids = self.manager.memory.tokens.packed(work.rows, work.starts, work.num_tokens)
        stops = work.num_tokens.cumsum()
        firsts = stops - work.num_tokens
        likeliest = np.empty(len(stops), np.int32)
        for low in range(0, len(token_ids), self._max_step):
            high = min(low + self._max_step, len(token_ids))
            part = ((stops > low) & (firsts < high)).nonzero()[0]
            begins, ends = firsts[part].clip(low, high), stops[part].clip(low, high)
            starts = work.starts[part] + begins - firsts[part]
            # A row of which a part is left gets a token all the same; that of its last part takes its place.
            likeliest[part] = self._step(work.rows[part], starts, ends - begins, token_ids[low:high])
        return likeliest

    def _step(self, rows: Rows, starts: Int64s, num_tokens: Int64s, token_ids: Int32s) -> Int32s:
        """Compute tokens of rows, packed; they have slots. Returns the likeliest token after the last of each row, (n,) int32."""
        query_start_loc = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(num_tokens, out=query_start_loc[1:])
        positions = (starts - query_start_loc[:-1]).repeat(num_tokens) + np.arange(len(token_ids))
        table = self.manager.memory.sequences
        seq_lens = (starts + num_tokens).astype(np.int32)
        width = cdiv(int(seq_lens.max()), self.model.block_size)
        step = StepInputs(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=table.slots(rows.repeat(num_tokens), positions),
            block_tables=table.block_tables[:, :width][rows],
            seq_lens=seq_lens,
            query_start_loc=query_start_loc,
            logit_indices=query_start_loc[1:].astype(np.int64) - 1,
            device=self.model.device,
        )
        with torch.inference_mode():
            likeliest: Int32s = likeliest_tokens(self.model.forward(step)).cpu().numpy().astype(np.int32)
        return likeliest
