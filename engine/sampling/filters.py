"""From scaled logits to the weights that a token is drawn by.

Weights are whole numbers: exp(logit - largest logit), times a power of two, cut off. Sums of whole numbers do not
depend on the order of adding them up, so neither the filters nor the drawn token can depend on the shape of the batch
or on how a device splits the sum. In floating point, a cumulative sum on a GPU may differ from run to run. A token
loses less than 2^-44 of the likeliest one's weight (for 2^17 tokens), far less than float32 loses in the exponential.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pagedkv.arrays import Int64s

__all__ = ["Filters", "draw", "token_weights"]

FIRST_WIDTH = 256
WIDENING = 16


class Filters(NamedTuple):
    """What each of m rows admits.

    top_k: (m,) int64, at least the number of tokens in the vocabulary where there is no limit
    top_p: (m,) float64, 1 where there is no limit
    min_p: (m,) float64, 0 where there is no limit
    """

    top_k: Int64s
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]


def token_weights(scaled: torch.Tensor, largest: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Return the weight of every token, (m, vocab) int64; 0 where a filter removes it. Rows sum to at most 2^62.

    scaled:  (m, vocab) float32, logits divided by the temperature; overwritten
    largest: (m,) float32, the largest of each row, finite. A row for which it is not gets meaningless weights.

    The filters and their order are those of transformers' `generate`: top-k keeps all tokens tied with the k-th; top-p,
    on what is left, keeps the tokens before which less than `top_p` of the probability has gone; min-p removes what is
    less likely than `min_p` times the likeliest. Of tokens tied where top-p ends, those with the highest ids stay, as a
    stable sort would have it; transformers sorts in no particular order. O(vocab) a row, but for top-p where hundreds
    of tokens pass.
    """
    vocab_size = scaled.shape[1]
    kth = _kth_largest(scaled, filters.top_k)
    below = None if kth is None else scaled < kth[:, None]
    unit = 2.0 ** (62 - (vocab_size - 1).bit_length())
    weights = scaled.sub_(largest[:, None]).exp_().mul_(unit).to(torch.int64)
    if below is not None:
        weights.masked_fill_(below, 0)
    if (filters.top_p < 1).any():
        _keep_top_p(weights, filters.top_p)
    if (filters.min_p > 0).any():
        cuts = torch.from_numpy(np.ceil(filters.min_p * unit)).to(weights.device, torch.int64)
        weights.masked_fill_(weights < cuts[:, None], 0)
    return weights


def draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return a token for each row, (m,) int64, by inverting the cumulative distribution at `uniforms`. O(vocab) a row.

    weights:  (m, vocab) int64, overwritten; a token of weight 0 is never drawn
    uniforms: (m,) float64 in [0, 1)

    One random number a row is enough. Gumbel's trick needs one for every token: 2^25 hashes for 256 rows of a large
    vocabulary.
    """
    cumulative = torch.cumsum(weights, -1, out=weights)
    totals = cumulative[:, -1:]
    # Below the total, though it may be rounded up in float64 by half a unit: 1 - 2^-53 times it is a whole one less.
    targets = (uniforms[:, None] * totals).to(torch.int64)
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def _kth_largest(scaled: torch.Tensor, top_k: Int64s) -> torch.Tensor | None:
    """(m,) the top_k-th largest of each row, -inf where nothing is to be removed; None if that is so in all rows."""
    vocab_size = scaled.shape[1]
    limited = np.flatnonzero(top_k < vocab_size)
    if not len(limited):
        return None
    places = torch.from_numpy(top_k[limited] - 1).to(scaled.device)
    rows = torch.from_numpy(limited).to(scaled.device)
    likeliest = _some_rows(scaled, rows).topk(int(top_k[limited].max())).values
    kth = scaled.new_full((len(top_k),), -torch.inf)
    return kth.index_copy_(0, rows, likeliest.gather(1, places[:, None])[:, 0])


def _keep_top_p(weights: torch.Tensor, top_p: NDArray[np.float64]) -> None:
    """Set the weights that top-p removes to 0, in place.

    Sorting a whole vocabulary is the one costly thing here, and a few hundred tokens nearly always hold all that is
    kept. So only the largest weights are sorted, and more of them for the rows where those do not suffice.
    """
    vocab_size = weights.shape[1]
    rows = torch.from_numpy(np.flatnonzero(top_p < 1)).to(weights.device)
    limits = torch.from_numpy(top_p).to(weights.device)
    width = FIRST_WIDTH
    while len(rows):
        some = _some_rows(weights, rows)
        targets = some.sum(-1, keepdim=True) * limits[rows][:, None]
        largest = some.topk(min(width, vocab_size)).values
        cumulative = largest.cumsum(-1)
        num_kept = ((cumulative - largest) < targets).sum(-1).clamp_(min=1)
        suffices = cumulative[:, -1] >= targets[:, 0] if width < vocab_size else torch.ones_like(rows, dtype=torch.bool)
        cuts = largest.gather(1, num_kept[:, None] - 1)
        num_tied_kept = num_kept - (largest > cuts).sum(-1)
        kept = _keep_above(some, cuts, num_tied_kept)
        weights[rows[suffices]] = kept[suffices]
        rows = rows[~suffices]
        width *= WIDENING


def _keep_above(weights: torch.Tensor, cuts: torch.Tensor, num_tied_kept: torch.Tensor) -> torch.Tensor:
    """Return weights (m, vocab) with what is below `cuts` (m, 1) at 0, and what is equal to it but for the last ones.

    num_tied_kept: (m,) int64, how many of the equal ones stay
    """
    tied = weights == cuts
    num_surplus = tied.sum(-1) - num_tied_kept
    kept = weights.masked_fill(weights < cuts, 0)
    if bool((num_surplus > 0).any()):
        surplus = tied & (tied.cumsum(-1) <= num_surplus[:, None])
        kept.masked_fill_(surplus, 0)
    return kept


def _some_rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of a tensor, without a copy where that is all of them."""
    return tensor if len(rows) == len(tensor) else tensor.index_select(0, rows)
