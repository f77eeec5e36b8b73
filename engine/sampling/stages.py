"""All that may happen to logits on their way to a token, for the rows that need more than the likeliest one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pagedkv.arrays import Int64s, Rows
from pagedkv.engine.sampling.filters import Filters, draw, token_weights
from pagedkv.engine.sampling.greedy import likeliest_tokens
from pagedkv.engine.sampling.history import apply_penalties
from pagedkv.engine.sampling.logprobs import TokenLogprobs, token_logprobs
from pagedkv.engine.sampling.randomness import uniforms
from pagedkv.engine.sampling.row_params import Need, Needs, RowParams
from pagedkv.engine.sampling.sampled import BadLogitsError

__all__ = ["Outcome", "Stages"]


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What came of m rows.

    tokens:   (m,) int64, -1 where the logits admit none
    logprobs: of rows that asked, by their index in the step; meaningless without a token
    errors:   of logits processors, by index in the step
    """

    tokens: torch.Tensor
    logprobs: dict[int, TokenLogprobs]
    errors: dict[int, Exception]


class Stages:
    """The stages of one step for m of its rows.

    params:      the columns of all rows
    indices:     (m,) int64, which of the step's logits these are
    rows:        (m,) int64, whose they are
    num_outputs: (m,) int64, the position of the token in its row's output
    needs:       (m,) uint8, the stages that each passes through
    """

    __slots__ = ("_errors", "_indices", "_needs", "_num_outputs", "_params", "_rows")

    def __init__(self, params: RowParams, indices: Int64s, rows: Rows, num_outputs: Int64s, needs: Needs) -> None:
        self._params = params
        self._indices = indices
        self._rows = rows
        self._num_outputs = num_outputs
        self._needs = needs
        self._errors: dict[int, Exception] = {}

    def run(self, step_logits: torch.Tensor) -> Outcome:
        """Choose a token for each row from the step's logits (s, vocab), which are left as they are."""
        logits = step_logits.index_select(0, torch.from_numpy(self._indices).to(step_logits.device)).float()
        reported = np.flatnonzero(self._needs & Need.LOGPROBS)
        own_logits = _select(logits, reported) if len(reported) else None
        self._bias(logits)
        self._penalise(logits)
        is_too_short = self._needs & Need.MIN_TOKENS != 0
        self._forbid_ends(logits, np.flatnonzero(is_too_short))
        self._process(logits)
        # Once more: the scheduler would end a sample with an end token that its processor brought back.
        self._forbid_ends(logits, np.flatnonzero(is_too_short & (self._needs & Need.PROCESSOR != 0)))
        tokens = self._choose(logits)
        logprobs = {} if own_logits is None else self._report(own_logits, reported, tokens)
        return Outcome(tokens, logprobs, self._errors)

    def _bias(self, logits: torch.Tensor) -> None:
        for place in np.flatnonzero(self._needs & Need.BIAS).tolist():
            self._params.biases[int(self._rows[place])].apply(logits[place])

    def _penalise(self, logits: torch.Tensor) -> None:
        places = np.flatnonzero(self._needs & Need.PENALTIES)
        if len(places):
            histories = [self._params.histories[row] for row in self._rows[places].tolist()]
            apply_penalties(logits, places, histories)

    def _forbid_ends(self, logits: torch.Tensor, places: Int64s) -> None:
        """Take the end tokens from rows that have too few tokens to end."""
        if len(places):
            ends = [self._params.end_token_ids[row] for row in self._rows[places].tolist()]
            of_row = np.repeat(places, [len(each) for each in ends])
            forbidden = torch.from_numpy(np.stack((of_row, np.concatenate(ends)))).to(logits.device)
            logits[forbidden[0], forbidden[1]] = -torch.inf

    def _process(self, logits: torch.Tensor) -> None:
        for place in np.flatnonzero(self._needs & Need.PROCESSOR).tolist():
            history = self._params.histories[int(self._rows[place])]
            processor = history.params.logits_processor
            if processor is None:
                continue
            try:
                # A copy: it may change its argument before it raises, or keep it.
                logits[place] = _checked(processor(history.known_token_ids, logits[place].clone()), logits[place])
            except Exception as error:  # noqa: BLE001 - a caller's code may raise anything; it must not harm other rows
                self._errors[int(self._indices[place])] = error

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        by_chance = self._needs & Need.CHANCE
        if not by_chance.any():
            return likeliest_tokens(logits)
        if by_chance.all():
            return self._draw(logits, self._rows, self._num_outputs)
        places = np.flatnonzero(by_chance)
        tokens = likeliest_tokens(logits)
        drawn = self._draw(_select(logits, places), self._rows[places], self._num_outputs[places])
        return tokens.index_copy_(0, torch.from_numpy(places).to(logits.device), drawn)

    def _draw(self, logits: torch.Tensor, rows: Rows, num_outputs: Int64s) -> torch.Tensor:
        """Draw from the filtered distribution of each row; -1 where there is none. Overwrites the logits."""
        params = self._params
        chances = np.stack((params.temperatures[rows], uniforms(params.keys[rows], num_outputs)))
        temperatures, numbers = torch.from_numpy(chances).to(logits.device)
        scaled = logits.div_(temperatures.float()[:, None])
        largest = scaled.amax(-1)
        filters = Filters(params.top_k[rows], params.top_p[rows], params.min_p[rows])
        tokens = draw(token_weights(scaled, largest, filters), numbers)
        return tokens.masked_fill_(~largest.isfinite(), -1)

    def _report(self, own_logits: torch.Tensor, reported: Int64s, tokens: torch.Tensor) -> dict[int, TokenLogprobs]:
        chosen = _select(tokens, reported).clamp_(min=0)
        entries = token_logprobs(own_logits, chosen, self._params.num_alternatives[self._rows[reported]])
        return dict(zip(self._indices[reported].tolist(), entries, strict=True))


def _select(tensor: torch.Tensor, places: Int64s) -> torch.Tensor:
    """A copy of some rows of a tensor, by indices of the host."""
    return tensor.index_select(0, torch.from_numpy(places).to(tensor.device))


def _checked(processed: object, own: torch.Tensor) -> torch.Tensor:
    """What a logits processor returned, if it can stand for `own`. Raises BadLogitsError."""
    if not isinstance(processed, torch.Tensor) or processed.shape != own.shape or not processed.is_floating_point():
        found = (
            f"{processed.dtype} {tuple(processed.shape)}"
            if isinstance(processed, torch.Tensor)
            else type(processed).__name__
        )
        raise BadLogitsError(
            f"the logits processor must return a tensor of floats of shape {tuple(own.shape)}, found {found}"
        )
    return processed
