"""The next token of every row, from the logits of one step."""

from __future__ import annotations

from pagedkv.engine.sampling.logprobs import TokenLogprobs
from pagedkv.engine.sampling.randomness import seed_for
from pagedkv.engine.sampling.sampled import BadLogitsError, Sampled
from pagedkv.engine.sampling.sampler import Sampler

__all__ = ["BadLogitsError", "Sampled", "Sampler", "TokenLogprobs", "seed_for"]
