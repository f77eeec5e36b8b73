"""A model whose keys and values live in paged storage: runs one packed step, returns logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pagedkv.engine.model.layers import LayerShape, PagedLayer
from pagedkv.engine.model.patches import Patches
from pagedkv.engine.step_inputs import StepInputs
from pagedkv.storage import KVStorage

__all__ = ["PagedModel"]


class PagedModel:
    """Runs steps of a transformers model over `storage`. Between steps the model is as its owner left it."""

    def __init__(self, model: Any, layers: list[LayerShape], storage: KVStorage) -> None:
        self.model = model
        self.device: torch.device = next(model.parameters()).device
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.block_size: int = storage.spec.block_size
        self._layers = {layer.module: PagedLayer(layer, storage, idx) for idx, layer in enumerate(layers)}
        self._patches = Patches(model, self._attend)
        self._step: StepInputs | None = None

    def forward(self, step: StepInputs) -> Tensor:
        """Compute a step: K/V of all its tokens go into the storage. Returns (logits, vocab), one row per logit index."""
        self._step = step
        with self._patches, torch.inference_mode():
            output = self.model(
                input_ids=step.token_ids,
                position_ids=step.positions,
                use_cache=False,
                logits_to_keep=step.logit_indices,
            )
        self._step = None
        logits: Tensor = output.logits[0]
        return logits

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, None]:
        step = self._step
        if step is None:
            raise RuntimeError("attention was called outside of a step")
        return self._layers[module].attend(step, query, key, value), None
