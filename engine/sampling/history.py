"""The tokens that rows with penalties or a logits processor know, and what these do to the logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pagedkv.arrays import Int32s, Int64s
from pagedkv.engine.sampling_params import SamplingParams

__all__ = ["TokenHistory", "apply_penalties"]


class TokenHistory:
    """What one row knows of its tokens.

    token_ids:     (u,) int64, the different tokens that penalties touch, ascending
    output_counts: (u,) float32, how often each is in the output; 0 for a token of the prompt alone
    num_outputs:   output tokens so far

    Penalties then cost O(different tokens), not O(vocabulary): a table of counts for 256 rows of a large vocabulary
    would take 128 MiB.
    """

    __slots__ = ("_known", "_num_known", "_vocab_size", "num_outputs", "output_counts", "params", "token_ids")

    def __init__(self, params: SamplingParams, known_token_ids: Int32s, *, num_prompt: int, vocab_size: int) -> None:
        """O(n log n) for n known tokens."""
        self.params = params
        self._vocab_size = vocab_size
        self._known = np.array(known_token_ids, np.int32)
        self._num_known = len(self._known)
        self.num_outputs = self._num_known - num_prompt
        # The prompt may hold tokens that the model takes in but never puts out.
        outputs, counts = np.unique(self._known[num_prompt:], return_counts=True)
        penalised = self._known if params.repetition_penalty != 1 else outputs
        self.token_ids: Int64s = np.unique(penalised[penalised < vocab_size]).astype(np.int64)
        self.output_counts: NDArray[np.float32] = np.zeros(len(self.token_ids), np.float32)
        is_possible = outputs < vocab_size
        self.output_counts[np.searchsorted(self.token_ids, outputs[is_possible])] = counts[is_possible]

    @property
    def known_token_ids(self) -> Int32s:
        """(n,) int32: prompt and output so far; a copy, for a caller's code to keep. O(n)."""
        return self._known[: self._num_known].copy()

    def append(self, token_id: int) -> None:
        """Take a token of the output. O(different tokens) to insert a new one, for a move of memory; else O(log)."""
        if self._num_known == len(self._known):
            self._known = np.concatenate((self._known, np.zeros(max(64, len(self._known)), np.int32)))
        self._known[self._num_known] = token_id
        self._num_known += 1
        self.num_outputs += 1
        place = int(np.searchsorted(self.token_ids, token_id))
        if place == len(self.token_ids) or self.token_ids[place] != token_id:
            self.token_ids = np.insert(self.token_ids, place, token_id)
            self.output_counts = np.insert(self.output_counts, place, 0.0)
        self.output_counts[place] += 1


def apply_penalties(logits: torch.Tensor, indices: Int64s, histories: Sequence[TokenHistory]) -> None:
    """Penalise known tokens, in place: for repetition as transformers does, then for presence and frequency as OpenAI.

    logits:    (m, vocab) float32
    indices:   (h,) int64, rows of `logits`, one for each history

    Repetition (Keskar et al.: CTRL, 2019, section 4.1; negative logits as in transformers): logit / r if positive, else
    logit · r. Presence and frequency (OpenAI's API reference): logit - count · frequency - [count > 0] · presence.
    O(different tokens of these rows), with a fixed number of tensor operations.
    """
    lengths = [len(history.token_ids) for history in histories]
    token_ids = np.concatenate([history.token_ids for history in histories])
    if not len(token_ids):
        return
    counts = np.concatenate([history.output_counts for history in histories])
    of_row = np.repeat(np.arange(len(histories)), lengths)
    params = [history.params for history in histories]
    per_row = np.array(
        [[each.repetition_penalty, each.presence_penalty, each.frequency_penalty] for each in params], np.float32
    )
    repetition, presence, frequency = per_row[of_row].T
    subtracted = counts * frequency + (counts > 0) * presence
    factors = torch.from_numpy(np.stack((repetition, subtracted.astype(np.float32)))).to(logits.device)
    places = torch.from_numpy(np.stack((indices[of_row], token_ids))).to(logits.device)
    values = logits[places[0], places[1]]
    values = torch.where(values < 0, values * factors[0], values / factors[0]) - factors[1]
    logits[places[0], places[1]] = values
