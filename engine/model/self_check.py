"""Whether a model computes the same through block tables as by its own attention: tried once, before it serves anybody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pagedkv.arrays import cdiv
from pagedkv.engine.errors import UnsupportedModelError
from pagedkv.engine.model.layers import LayerShape
from pagedkv.engine.model.paged_model import PagedModel
from pagedkv.engine.step_inputs import StepInputs
from pagedkv.storage import KVStorage

__all__ = ["check_same_logits"]

NUM_TOKENS = 24
MAX_TOKENS = 96
NUM_COMPARED = 8
BLOCK_SIZE = 4
LEAST_TOLERANCE = 1e-3
NOISE_FACTOR = 4
"""Over 13 families, three dtypes, 2 and 16 layers with large random weights, paging made 0.2 to 0.9 of what a changed last place
of the embeddings makes."""
INCONCLUSIVE = 0.5
"""Of the spread of the logits: attention that misses a window, a mask or a bias is off by that order. A model that makes as
much of a rounding error cannot be told from a wrong one."""


def check_same_logits(model: Any, layers: list[LayerShape]) -> None:
    """Compare the logits of the last few tokens of a random text: whole by the model itself, and in two steps, paged.

    How much of a difference is rounding is measured: the model runs once more, its embeddings changed by a unit in the
    last place. Four times what comes of that is allowed, and a thousandth of the spread of the logits at least. The median
    over the tokens counts, since a mixture of experts may choose others by a rounding error. Where rounding alone could
    explain half of the spread (deep mixtures of experts in bfloat16), the comparison says nothing, and nothing is refused.

    Four forward passes of at most 96 tokens. Raises UnsupportedModelError if the logits differ.
    """
    name = type(model).__name__
    windows = [layer.window for layer in layers if layer.window is not None]
    num_tokens = min(MAX_TOKENS, max([NUM_TOKENS, *(window + NUM_COMPARED for window in windows)]))
    vocab_size = model.get_input_embeddings().weight.shape[0]
    tokens = np.random.default_rng(0).integers(0, vocab_size, num_tokens).astype(np.int32)
    dtype = str(model.dtype).removeprefix("torch.")
    num_blocks = cdiv(num_tokens, BLOCK_SIZE)
    spec = layers[0].kv_spec(len(layers), dtype, BLOCK_SIZE)
    paged_model = PagedModel(model, layers, KVStorage(spec, num_blocks, next(model.parameters()).device))
    paged = _paged_logits(paged_model, tokens, num_blocks)
    device_tokens = torch.from_numpy(tokens.astype(np.int64)[None]).to(paged_model.device)
    plain = _plain_logits(model, device_tokens)
    with _changed_by_rounding(model):
        noise = _difference(_plain_logits(model, device_tokens), plain)
    allowed = max(LEAST_TOLERANCE, NOISE_FACTOR * noise)
    error = _difference(paged, plain)
    if allowed <= INCONCLUSIVE and not error <= allowed:
        raise UnsupportedModelError(
            name,
            f"through block tables its logits differ from its own by {error:.2g} of their spread, by rounding at most "
            f"{allowed:.2g}: its attention does something that the op does not know",
        )


def _plain_logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits[0, -NUM_COMPARED:]
    return logits


def _difference(logits: Tensor, other: Tensor) -> float:
    """Largest difference of a token's logits, over their spread; the median over the tokens."""
    return float(((logits - other).float().abs().amax(dim=-1) / other.float().std(dim=-1)).median())


@contextmanager
def _changed_by_rounding(model: Any) -> Iterator[None]:
    """Within, embeddings are off by up to a unit in the last place, each its own way."""
    generator = torch.Generator().manual_seed(0)

    def change(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        noise = torch.rand(output.shape, generator=generator).to(output.device) * 2 - 1
        return (output.float() * (1 + torch.finfo(output.dtype).eps * noise)).to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


def _paged_logits(model: PagedModel, tokens: np.ndarray[Any, np.dtype[np.int32]], num_blocks: int) -> Tensor:
    """Logits of the last tokens, computed in two steps over blocks in descending order."""
    table = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)[None]
    middle = len(tokens) // 2 + 1
    logits = []
    for start, stop in ((0, middle), (middle, len(tokens))):
        positions = np.arange(start, stop)
        slots = table[0, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        step = StepInputs(
            token_ids=tokens[start:stop],
            positions=positions,
            slot_mapping=slots,
            block_tables=table,
            seq_lens=np.array([stop], np.int32),
            query_start_loc=np.array([0, stop - start], np.int32),
            logit_indices=positions - start,
            device=model.device,
        )
        logits.append(model.forward(step))
    return torch.cat(logits)[-NUM_COMPARED:]
