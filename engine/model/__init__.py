"""A transformers model, bound to paged storage: what its layers are, and how a step runs through it."""

from pagedkv.engine.model.inspection import inspect_model
from pagedkv.engine.model.layers import LayerShape, PagedLayer
from pagedkv.engine.model.paged_model import PagedModel

__all__ = ["LayerShape", "PagedLayer", "PagedModel", "inspect_model"]
