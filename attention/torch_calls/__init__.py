"""Attention in calls of torch alone: what runs where there is no compiler and no Triton."""

from pagedkv.attention.torch_calls.backend import TorchBackend

__all__ = ["TorchBackend"]
