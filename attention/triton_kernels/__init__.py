"""Attention and cache writes as Triton kernels. Importing this does not import Triton."""

from pagedkv.attention.triton_kernels.backend import TritonBackend, is_interpreted

__all__ = ["TritonBackend", "is_interpreted"]
