"""What a request adds to the logits of single tokens, and which tokens it allows."""

from __future__ import annotations

import numpy as np
import torch

from pagedkv.engine.sampling_params import SamplingParams

__all__ = ["TokenBias"]


class TokenBias:
    """`logit_bias` and `allowed_token_ids` of one row, as tensors on the host."""

    __slots__ = ("_allowed", "_token_ids", "_values")

    def __init__(self, params: SamplingParams) -> None:
        """O(tokens named)."""
        bias = dict(params.logit_bias)
        self._token_ids = torch.tensor([*bias], dtype=torch.int64)
        self._values = torch.tensor([*bias.values()], dtype=torch.float32)
        allowed = params.allowed_token_ids
        self._allowed = None if allowed is None else torch.from_numpy(np.unique(np.array(allowed, np.int64)))

    def apply(self, logits: torch.Tensor) -> None:
        """Change one row's logits (vocab,), in place. O(vocab) with allowed tokens, else O(tokens named)."""
        if self._allowed is not None:
            allowed = self._allowed.to(logits.device)
            kept = logits[allowed]
            logits.fill_(-torch.inf)
            logits[allowed] = kept
        logits[self._token_ids.to(logits.device)] += self._values.to(logits.device)
