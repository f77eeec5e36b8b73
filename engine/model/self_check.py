"""Whether a model computes the same through block tables as by its own attention: tried once, before it serves anybody."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

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
# Of the spread of the logits. Rounding gives about 1e-5 in float32 and 3e-2 in bfloat16 with a few dozen layers; attention
# that misses a window, a mask or a bias is off by the order of the spread itself.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3, torch.float16: 0.1, torch.bfloat16: 0.25}


def check_same_logits(model: Any, layers: list[LayerShape]) -> None:
    """Compare the logits of the last few tokens of a random text: whole by the model itself, and in two steps, paged.

    The median over the tokens counts, since a mixture of experts may choose others by a rounding error. Three forward passes of
    at most 96 tokens. Raises UnsupportedModelError if they differ.
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
    with torch.inference_mode():
        plain = model(input_ids=device_tokens, use_cache=False).logits[0, -NUM_COMPARED:]
    difference = (paged - plain).float().abs().amax(dim=-1) / plain.float().std(dim=-1)
    error = float(difference.median())
    if not error <= TOLERANCE[model.dtype]:
        raise UnsupportedModelError(
            name,
            f"through block tables its logits differ from its own by {error:.2g} of their spread: its attention does "
            "something that the op does not know",
        )


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
            seq_lens=np.array([stop]),
            query_start_loc=np.array([0, stop - start], np.int32),
            logit_indices=positions - start,
            device=model.device,
        )
        logits.append(model.forward(step))
    return torch.cat(logits)[-NUM_COMPARED:]
