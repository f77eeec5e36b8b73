"""How likely the model itself found the tokens that were chosen, and which ones it found likelier."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pagedkv.arrays import Int64s

__all__ = ["TokenLogprobs", "token_logprobs"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely the model found a token: in its own distribution, before penalties, temperature and filters.

    logprob:      natural logarithm of its probability
    rank:         1 for the likeliest token, plus one for every token that is likelier than this one
    alternatives: log-probabilities of the likeliest tokens, best first, equal ones by id; impossible ones are left out
    """

    token_id: int
    logprob: float
    rank: int
    alternatives: dict[int, float]


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_alternatives: Int64s) -> list[TokenLogprobs]:
    """Look up m chosen tokens. O(vocab) a row, and O(k log k) for k alternatives.

    logits:           (m, vocab) float32, the model's own
    token_ids:        (m,) int64
    num_alternatives: (m,) int64, 0 to vocab
    """
    chosen = logits.gather(1, token_ids[:, None])
    norms = logits.logsumexp(-1)
    ranks = (logits > chosen).sum(-1) + 1
    alternatives = _alternatives(logits, norms, num_alternatives)
    columns = (token_ids, chosen[:, 0] - norms, ranks)
    return [
        TokenLogprobs(*values) for values in zip(*(column.tolist() for column in columns), alternatives, strict=True)
    ]


def _alternatives(logits: torch.Tensor, norms: torch.Tensor, num_alternatives: Int64s) -> list[dict[int, float]]:
    """The likeliest tokens of each row, in order. `topk` alone would choose among tied ones as it likes."""
    most = int(num_alternatives.max())
    if most == 0:
        return [{} for _ in num_alternatives]
    places = torch.from_numpy(np.maximum(num_alternatives - 1, 0)).to(logits.device)
    least = logits.topk(most).values.gather(1, places[:, None])
    places_of = ((logits >= least) & (logits > -torch.inf)).nonzero()
    rows, token_ids = places_of.T.cpu().numpy()
    values = (logits - norms[:, None])[tuple(places_of.T)].cpu().numpy()
    order = np.lexsort((token_ids, -values, rows))
    rows, token_ids, values = rows[order], token_ids[order], values[order]
    starts = np.searchsorted(rows, np.arange(len(logits)))
    return [
        dict(zip(token_ids[start : start + num].tolist(), values[start : start + num].tolist(), strict=True))
        for start, num in zip(starts.tolist(), _at_most(num_alternatives, starts, len(rows)), strict=True)
    ]


def _at_most(num_alternatives: Int64s, starts: Int64s, num_found: int) -> list[int]:
    ends = np.append(starts[1:], num_found)
    return np.minimum(num_alternatives, ends - starts).tolist()  # type: ignore[no-any-return]
