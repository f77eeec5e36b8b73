"""Beam search: beams share blocks through forks, and copy what they write into."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pagedkv.arrays import MAX_TOKENS, Int32s, cdiv, keep_int, shown
from pagedkv.engine.interrupts import interruptible, uninterrupted
from pagedkv.engine.model import PagedModel
from pagedkv.engine.sampling_params import as_number, check_bool
from pagedkv.engine.step_inputs import StepInputs
from pagedkv.errors import InvalidArgumentError, OutOfBlocksError
from pagedkv.manager import KVCacheManager
from pagedkv.plans import NO_COPIES
from pagedkv.storage import KVStorage, Moves

__all__ = ["Beam", "BeamSearch", "BeamSearchParams"]

MAX_BEAMS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """What beam search keeps and when it ends, as transformers' `generate(num_beams=...)` means it.

    num_beams:      texts that are followed at a time, 1..256
    max_tokens:     new tokens at most, 1..2^26
    length_penalty: a text's score is its log-probability / its new tokens ** this
    early_stopping: True: end once `num_beams` texts have ended. False: once the best running one would not beat them if
                    it ended now. "never": once it could not beat them at any length
    ignore_eos:     the model's end tokens do not end a text
    """

    num_beams: int = 4
    max_tokens: int = 128
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        keep_int(self, "num_beams", at_least=1, at_most=MAX_BEAMS)
        keep_int(self, "max_tokens", at_least=1, at_most=MAX_TOKENS)
        length_penalty = as_number("length_penalty", self.length_penalty, at_least=-100.0, at_most=100.0)
        object.__setattr__(self, "length_penalty", length_penalty)
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            found = shown(self.early_stopping)
            raise InvalidArgumentError(f'early_stopping must be True, False or "never", found {found}')
        check_bool("ignore_eos", self.ignore_eos)


class Beam(NamedTuple):
    """One of the texts that beam search found.

    token_ids: new tokens, the one that ended it included
    score:     log-probability / new tokens ** length_penalty
    """

    token_ids: tuple[int, ...]
    score: float


class _Search:
    """The beams of one prompt: running ones with their sequences, and those that ended."""

    def __init__(self, prompt: Int32s, params: BeamSearchParams, idx: int, salt: bytes) -> None:
        self.prompt = prompt
        self.salt = salt
        self.params = params
        self.idx = idx
        self.running: list[tuple[tuple[int, int], tuple[int, ...], float]] = []
        """(sequence id, new tokens, log-probability) of each, the likeliest first."""
        self.open_ids: set[tuple[int, int]] = set()
        """Sequences of it that are open: between two steps those of the running ones."""
        self.ended: list[Beam] = []
        self.num_new = 0
        self._num_sequences = 0

    def new_id(self) -> tuple[int, int]:
        self._num_sequences += 1
        return self.idx, self._num_sequences

    def num_blocks(self, block_size: int) -> int:
        """Blocks that it can need at most: the prompt's once, and each beam's own, with the one that it copies."""
        own = cdiv(len(self.prompt) + self.params.max_tokens, block_size) - len(self.prompt) // block_size
        return len(self.prompt) // block_size + self.params.num_beams * (own + 1)

    def is_decided(self) -> bool:
        """Whether no running beam is to be followed any further."""
        params = self.params
        if not self.running or self.num_new == params.max_tokens:
            return True
        if len(self.ended) < params.num_beams:
            return False
        if params.early_stopping is True:
            return True
        # A positive penalty favours long texts: then the longest one is the best that a running one can become.
        can_gain = params.early_stopping == "never" and params.length_penalty > 0
        best_length = params.max_tokens if can_gain else self.num_new
        best = self.running[0][2] / best_length**params.length_penalty
        return bool(best <= min(beam.score for beam in self.ended))

    def advance(self, log_probs: Tensor, ends: frozenset[int]) -> list[tuple[int, int, float]]:
        """Choose from (beams, vocab) log-probabilities how beams go on: (parent, token, log-probability) of each that does.

        Looks at enough candidates that `num_beams` of them go on even if every beam could end in each way.
        """
        params = self.params
        scores = log_probs + torch.tensor([score for _, _, score in self.running], device=log_probs.device)[:, None]
        num_wanted = min(max(2, 1 + len(ends)) * params.num_beams, scores.numel())
        top = torch.topk(scores.flatten(), num_wanted)
        self.num_new += 1
        going_on: list[tuple[int, int, float]] = []
        for rank, (score, place) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
            parent, token = divmod(place, log_probs.shape[1])
            if token in ends or self.num_new == params.max_tokens:
                if rank < params.num_beams:
                    tokens = (*self.running[parent][1], token)
                    self.ended.append(Beam(tokens, score / self.num_new**params.length_penalty))
            elif len(going_on) < params.num_beams:
                going_on.append((parent, token, score))
        self.ended = sorted(self.ended, key=lambda beam: -beam.score)[: params.num_beams]
        return going_on


class BeamSearch:
    """Searches for several prompts at a time, as many as the free blocks hold for certain; the others wait.

    Beams of one prompt share its blocks and each other's; a beam that writes into a shared block copies it first. Nothing is ever
    preempted, so requests of the scheduler that run at the same time only see fewer free blocks.
    """

    def __init__(
        self, model: PagedModel, manager: KVCacheManager, storage: KVStorage, *, max_num_batched_tokens: int
    ) -> None:
        self._model = model
        self._manager = manager
        self._storage = storage
        self._budget = max_num_batched_tokens

    @uninterrupted
    def run(
        self, prompts: Sequence[Int32s], params: BeamSearchParams, end_token_ids: Iterable[int], *, salt: bytes = b""
    ) -> list[list[Beam]]:
        """For each prompt its `num_beams` best texts, the best first. Prompts of different salt share no cached blocks.

        Raises InvalidArgumentError if one can never fit, OutOfBlocksError if one does not fit beside the requests that run.
        Whatever is raised, every block is let go of, and nothing that was not computed stays in the prefix cache.
        """
        ends = frozenset() if params.ignore_eos else frozenset(end_token_ids)
        searches = [_Search(prompt, params, idx, salt) for idx, prompt in enumerate(prompts)]
        for search in searches:
            self._require_fit(search)
        waiting = searches[::-1]
        active: list[_Search] = []
        try:
            while waiting or active:
                reserved = sum(self._num_still_needed(search) for search in active)
                while waiting:
                    needed = waiting[-1].num_blocks(self._manager.config.block_size)
                    num_available = self._manager.memory.pool.num_available
                    if reserved + needed > num_available:
                        if not active:
                            raise OutOfBlocksError(needed, num_available)
                        break
                    reserved += needed
                    active.append(waiting.pop())
                    self._begin(active[-1], ends)
                self._step(active, ends)
                active = [search for search in active if not self._finish_if_decided(search)]
        finally:
            for search in active:
                self._close(search)
        return [search.ended for search in searches]

    def _require_fit(self, search: _Search) -> None:
        num_needed, num_blocks = search.num_blocks(self._manager.config.block_size), self._manager.config.num_blocks
        if num_needed > num_blocks:
            raise InvalidArgumentError(
                f"{search.params.num_beams} beams of a prompt of {len(search.prompt)} tokens with "
                f"max_tokens={search.params.max_tokens} can need {num_needed} blocks, there are {num_blocks}"
            )

    def _num_still_needed(self, search: _Search) -> int:
        """Blocks that a running search may yet take."""
        tables = [self._manager.block_table(sequence_id) for sequence_id, _, _ in search.running]
        num_held = len(np.unique(np.concatenate(tables))) if tables else 0
        return max(0, search.num_blocks(self._manager.config.block_size) - num_held)

    def _begin(self, search: _Search, ends: frozenset[int]) -> None:
        """Compute the prompt, in chunks, and let its likeliest continuations be the first beams."""
        first = search.new_id()
        start = self._manager.open(first, search.prompt, salt=search.salt)
        search.open_ids.add(first)
        search.running = [(first, (), 0.0)]
        logits = None
        for chunk_start in range(start, len(search.prompt), self._budget):
            num_tokens = min(self._budget, len(search.prompt) - chunk_start)
            logits = self._compute([first], [search.prompt[chunk_start : chunk_start + num_tokens]])
        if logits is None:
            raise InvalidArgumentError("a prompt has at least one token")
        self._advance(search, logits.float().log_softmax(-1), ends)

    def _step(self, active: list[_Search], ends: frozenset[int]) -> None:
        """One token for every running beam of every prompt, in one packed step."""
        beams = [beam for search in active for beam in search.running]
        if not beams:
            return
        tokens = [np.array(new_tokens[-1:], np.int32) for _, new_tokens, _ in beams]
        log_probs = self._compute([sequence_id for sequence_id, _, _ in beams], tokens).float().log_softmax(-1)
        start = 0
        for search in active:
            stop = start + len(search.running)
            if not search.is_decided():
                self._advance(search, log_probs[start:stop], ends)
            start = stop

    def _advance(self, search: _Search, log_probs: Tensor, ends: frozenset[int]) -> None:
        """Fork, close and extend sequences as the search says. The first child of a beam goes on in its sequence."""
        manager = self._manager
        parents = search.running
        going_on = search.advance(log_probs, ends)
        beams, taken = [], set()
        for parent, token, score in going_on:
            sequence_id, tokens, _ = parents[parent]
            if parent in taken:
                child = search.new_id()
                manager.fork(sequence_id, child)
                search.open_ids.add(child)
                sequence_id = child
            taken.add(parent)
            beams.append((sequence_id, (*tokens, token), score))
        for idx, (sequence_id, _, _) in enumerate(parents):
            if idx not in taken:
                manager.close(sequence_id)
                search.open_ids.remove(sequence_id)
        # Only now: a fork made after its parent was extended would continue the wrong text.
        for sequence_id, tokens, _ in beams:
            manager.extend(sequence_id, tokens[-1:])
        search.running = beams

    def _compute(self, sequence_ids: list[tuple[int, int]], tokens: list[Int32s]) -> Tensor:
        """Compute the next known tokens of each sequence; returns the logits of the last of each, (sequences, vocab)."""
        with self._manager.step():
            inputs = self._append(sequence_ids, tokens)
            with interruptible():
                return self._model.forward(inputs)

    def _append(self, sequence_ids: list[tuple[int, int]], tokens: list[Int32s]) -> StepInputs:
        """Give the tokens their slots, and carry out the copies on write."""
        manager = self._manager
        slots, copies = [], NO_COPIES
        for sequence_id, new in zip(sequence_ids, tokens, strict=True):
            appended = manager.append(sequence_id, len(new))
            slots.append(appended.slots)
            copies += appended.copies
        self._storage.apply(Moves(copies=copies))
        lengths = np.array([manager.num_computed(sequence_id) for sequence_id in sequence_ids], np.int32)
        counts = np.array([len(new) for new in tokens])
        stops = counts.cumsum()
        rows = np.array([manager.row(sequence_id) for sequence_id in sequence_ids])
        width = cdiv(int(lengths.max()), manager.config.block_size)
        return StepInputs(
            token_ids=np.concatenate(tokens),
            positions=np.concatenate([np.arange(n - k, n) for n, k in zip(lengths, counts, strict=True)]),
            slot_mapping=np.concatenate(slots),
            block_tables=manager.memory.sequences.block_tables[:, :width][rows],
            seq_lens=lengths,
            query_start_loc=np.concatenate(([0], stops)).astype(np.int32),
            logit_indices=stops - 1,
            device=self._model.device,
        )

    def _finish_if_decided(self, search: _Search) -> bool:
        if not search.is_decided():
            return False
        self._close(search)
        return True

    def _close(self, search: _Search) -> None:
        for sequence_id in sorted(search.open_ids):
            self._manager.close(sequence_id)
        search.open_ids.clear()
        search.running = []
